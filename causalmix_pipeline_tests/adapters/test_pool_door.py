"""The door's rules: what a value must be, in which order it is judged, what is told of it."""

from __future__ import annotations

import json
import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.pool_door import (
    DOCUMENT_SCHEMA,
    MAX_REASON_CHARS,
    ColumnMap,
    DoorRules,
    conversation,
    judge,
    number_of,
    offered_schema,
    parse_json,
    refuse_file,
)
from causalmix_pipeline.adapters.pool_files import PoolFile
from causalmix_pipeline.core.errors import ConfigError

FILE = PoolFile("/pool/math/gsm.v2.jsonl.gz", "math/gsm.v2.jsonl.gz", 1, "1", "jsonl")
USER = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "so"}


def offer(columns: ColumnMap, *rows: dict) -> pl.DataFrame:
    rows = tuple({"row": i, "prompt_chars": 0} | row for i, row in enumerate(rows))
    return pl.DataFrame(rows, schema=offered_schema(columns))


def let_in(columns: ColumnMap, *rows: dict, limit: int = 100):
    return judge(offer(columns, *rows), FILE, columns, DoorRules(max_document_bytes=limit))


# What the columns mean


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "p"}, r"columns.prompt and columns.response .* got 'p' and None"),
        ({"response": "r"}, r"got None and 'r'"),
        ({"prompt": "p", "response": "r", "messages": "m"}, r"columns.messages \('m'\)"),
        ({"numbers": ("q", "q")}, r"columns.numbers must be different .* got 'q'"),
        ({"numbers": ["row"]}, r"got 'row'"),
        ({"numbers": ("copies",)}, r"got 'copies'"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ColumnMap(**options)


def test_only_columns_with_a_meaning_are_read_and_each_once():
    columns = ColumnMap(messages="chat", domain="topic", source="topic", numbers=("q",))

    assert columns.wanted == ["chat", "topic", "q"]


# What is judged


def test_a_document_gets_its_labels_from_the_file_unless_a_column_has_them():
    batch = let_in(ColumnMap(), {"text": "one"})
    named = let_in(
        ColumnMap(domain="d", source="s", group="g", domain_from="file"),
        {"text": "one", "domain": "D", "source": "S", "group": "G"},
    )

    assert batch.documents.schema == pl.Schema(DOCUMENT_SCHEMA)
    assert batch.documents.row(0) == (
        *(document_id("one"), "math", "gsm.v2", document_id("one"), FILE.name, 0, "one", 0),
    )
    assert named.documents.row(0)[1:4] == ("D", "S", "G")
    assert let_in(ColumnMap(domain_from="file"), {"text": "a"}).documents["domain"][0] == "gsm.v2"


def test_a_prompt_stands_before_its_response_and_is_counted_in_characters():
    columns = ColumnMap(prompt="q", response="a")
    (row,) = let_in(columns, {"prompt": "é🦊", "response": "yes"}).documents.to_dicts()

    assert row["text"] == "é🦊\n\nyes"
    assert row["text"][row["prompt_chars"] :] == "yes"
    assert row["document_id"] == document_id("é🦊\n\nyes", 4)


def test_the_first_broken_rule_is_the_reason():
    columns = ColumnMap(text="{body}", domain="d", numbers=("q",))
    fine = {"text": "a", "domain": "d"}
    batch = let_in(
        columns,
        fine,
        {"refusal": "not JSON"},
        {"domain": "d"},
        {"text!": "no text", "domain!": "no domain"},
        fine | {"text": "é\0" * 60},
        fine | {"text": "a\0"},
        fine | {"text": " \n\u2003"},
        fine | {"domain": ""},
        fine | {"domain": None, "number q!": "no number"},
        fine | {"number q!": "no number"},
        fine | {"domain": "a\0b"},
    )

    assert batch.quarantine["row"].to_list() == list(range(1, 10))
    assert batch.quarantine["reason"].to_list() == [
        "not JSON",
        "column '{body}' must be text, got NoneType",
        "no text",
        "column '{body}' has 180 bytes; the limit is 100",
        "column '{body}' holds a NUL character",
        "column '{body}' is empty",
        "column 'd' is empty",
        "column 'd' must be text, got NoneType",
        "no number",
    ]
    assert batch.documents["row"].to_list() == [0, 10]
    assert batch.n_rows == 11


def test_a_prompt_and_a_response_share_one_limit():
    columns = ColumnMap(prompt="q", response="a")
    batch = let_in(
        columns,
        {"prompt": "p" * 50, "response": "r" * 48},
        {"prompt": "p" * 50, "response": "r" * 49},
        {"prompt": "p" * 101, "response": "r"},
    )

    assert batch.documents.height == 1
    assert batch.quarantine["reason"].to_list() == [
        "prompt and response have 101 bytes; the limit is 100",
        "column 'q' has 101 bytes; the limit is 100",
    ]


def test_a_reason_is_cut_and_always_text():
    assert len(let_in(ColumnMap(), {"refusal": "x" * 9999}).quarantine["reason"][0]) == 500
    (row,) = refuse_file(FILE, "\ud800" + "x" * 9999).quarantine.rows()

    assert row[:2] == (FILE.name, None)
    assert row[2].startswith("?x")
    assert len(row[2]) == MAX_REASON_CHARS


# Numbers


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (True, 1.0),
        (2.5, 2.5),
        (" -1.5e3 ", -1500.0),
        (".5", 0.5),
        *((v, None) for v in (None, math.nan, math.inf, 10**400, "", "NaN", "-inf", "1e999")),
    ],
)
def test_a_number_is_finite_or_missing(value, number):
    assert number_of("q", value) == (number, None)


@pytest.mark.parametrize(
    ("value", "got"), [("good", "'good'"), ("1_000", "'1_000'"), ([1], "list"), ({}, "dict")]
)
def test_what_is_no_number_is_refused(value, got):
    assert number_of("q", value) == (None, f"column 'q' must be a number, got {got}")


# Chats


def test_a_chat_is_its_messages_up_to_the_last_answer():
    chat = [{"role": "system", "content": "be kind"}, USER, ANSWER, USER, ANSWER, USER]
    made = conversation("m", chat)
    assert isinstance(made, tuple)
    text, prompt_chars = made

    assert text == "system\nbe kind\n\nuser\nwhy?\n\nassistant\nso\n\nuser\nwhy?\n\nso"
    assert text[prompt_chars:] == "so"
    assert conversation("m", json.dumps(chat)) == made
    assert conversation("m", [ANSWER]) == ("so", 0)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (None, "must be a list of messages, got NoneType"),
        ({"role": "user"}, "must be a list of messages, got dict"),
        ("[", "is not JSON: Expecting value"),
        ('[{"role": "user", "role": "user"}]', "is not JSON: key 'role' stands twice"),
        ([USER, "hi"], "must hold objects, got str at 1"),
        ([USER, {"role": "assistant"}], "needs text as content, got NoneType at 1"),
        ([{"role": 1, "content": ""}], "needs text as role, got int at 0"),
        ([USER], "holds no message of the assistant"),
        ([], "holds no message of the assistant"),
        ([{"role": "assistant", "content": " "}], "ends in an empty answer"),
        ([{"role": "assistant", "content": "\ud800"}], "holds a lone surrogate"),
    ],
)
def test_a_chat_that_teaches_nothing_is_refused(chat, reason):
    made = conversation("m", chat)

    assert isinstance(made, str)
    assert made.startswith(f"column 'm' {reason}")


# JSON


def test_the_key_that_stands_twice_is_named():
    with pytest.raises(ValueError, match="key 'b' stands twice"):
        parse_json('{"a": 1, "b": 2, "c": 3, "b": 4, "a": 5}')


def test_a_large_object_with_a_key_that_stands_twice_is_refused_at_once():
    keys = ",".join(f'"{i}":0' for i in range(300_000))

    with pytest.raises(ValueError, match="key '299999' stands twice"):
        parse_json(f'{{{keys},"299999":0}}')


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), st.lists))
def test_json_that_python_writes_is_read_back(value):
    assert parse_json(json.dumps(value)) == value
