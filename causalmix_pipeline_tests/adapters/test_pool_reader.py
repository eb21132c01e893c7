"""The reader meets bad input: a row is read, or refused with its file, number and reason."""

from __future__ import annotations

import json
import os
import random

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters import pool_reader
from causalmix_pipeline.adapters.document_scores import document_id
from causalmix_pipeline.adapters.pool_reader import (
    ColumnMap,
    pool_files,
    pool_fingerprint,
    read_pool,
)
from causalmix_pipeline.core.errors import PoolError

TEXT = ColumnMap()


def write(root, name: str, *lines: object) -> None:
    """A file of the pool; bytes are written as they are, other values as JSON lines."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw))


def good(text: str = "a good document") -> dict:
    return {"text": text}


def reasons(root, columns: ColumnMap = TEXT) -> list[tuple]:
    return read_pool(root, columns).quarantine.rows()


# What is read


def test_domains_come_from_folders_and_sources_from_files(tmp_path):
    write(tmp_path, "math/gsm.jsonl", good("one"), good("two"))
    write(tmp_path, "prose/deep/novels.jsonl", good("three"))
    documents = read_pool(tmp_path, TEXT).documents

    assert documents["domain"].to_list() == ["deep", "math", "math"]
    assert set(documents["source"]) == {"gsm", "novels"}
    assert documents["group"].to_list() == documents["document_id"].to_list()


def test_columns_are_mapped_from_jsonl_and_parquet_alike(tmp_path):
    columns = ColumnMap(text="body", domain="topic", source="origin", group="book")
    rows = [
        {"body": f"text {i}", "topic": "ab"[i % 2], "origin": "o", "book": "g"} for i in range(6)
    ]
    write(tmp_path / "one", "x.jsonl", *rows)
    (tmp_path / "two").mkdir()
    pl.DataFrame(rows).write_parquet(tmp_path / "two/x.parquet")
    first, second = (read_pool(tmp_path / part, columns).documents for part in ("one", "two"))

    assert first.drop("file").equals(second.drop("file"))
    assert first["domain"].to_list() == ["a"] * 3 + ["b"] * 3
    assert first["group"].unique().to_list() == ["g"]


def test_one_column_may_serve_twice(tmp_path):
    rows = [{"text": "x", "topic": "a"}, {"text": "y", "topic": "b"}]
    pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
    documents = read_pool(tmp_path, ColumnMap(domain="topic", source="topic")).documents

    assert documents["source"].to_list() == documents["domain"].to_list()


def test_the_same_text_in_a_domain_is_one_row_with_its_copies(tmp_path):
    write(tmp_path, "a/y.jsonl", good("same"), good("same"), good("other"))
    write(tmp_path, "a/x.jsonl", good("same"))
    write(tmp_path, "b/x.jsonl", good("same"))
    documents = read_pool(tmp_path, TEXT).documents.filter(document_id=document_id("same"))

    assert documents["copies"].to_list() == [3, 1]
    assert documents["file"].to_list() == ["a/x.jsonl", "b/x.jsonl"]


def test_the_order_of_files_and_rows_does_not_change_the_documents(tmp_path):
    texts = [f"document {i}" for i in range(30)]
    write(tmp_path / "one", "a/x.jsonl", *map(good, texts))
    random.Random(0).shuffle(texts)
    write(tmp_path / "two", "a/x.jsonl", *map(good, texts))
    first, second = (read_pool(tmp_path / part, TEXT).documents for part in ("one", "two"))

    assert first.drop("row").equals(second.drop("row"))


def test_domains_that_are_not_listed_are_left_out(tmp_path):
    for domain in "abc":
        write(tmp_path, f"{domain}/x.jsonl", good(domain))
    pool = read_pool(tmp_path, TEXT, domains=["c", "a"])

    assert pool.documents["domain"].to_list() == ["a", "c"]
    assert pool.quarantine.is_empty()


@pytest.mark.parametrize(
    "label", ["../../x", "'; DROP TABLE documents; --", "a\x00b", "/etc", "🦊"]
)
def test_a_label_from_the_data_stays_data(tmp_path, label):
    root = tmp_path / "pool"
    write(root, "x.jsonl", {"text": "one", "topic": label}, {"text": "two", "topic": "plain"})
    before = sorted(tmp_path.rglob("*"))
    documents = read_pool(root, ColumnMap(domain="topic", source="topic")).documents

    assert set(documents["domain"]) == {label, "plain"}
    assert set(documents["source"]) == {label, "plain"}
    assert sorted(tmp_path.rglob("*")) == before


def test_hidden_and_unfinished_files_are_left_out(tmp_path):
    write(tmp_path, "a/x.jsonl", good())
    write(tmp_path, "a/.x.jsonl", good("hidden"))
    write(tmp_path, ".cache/x.jsonl", good("cached"))
    write(tmp_path, "a/x.jsonl.part", good("unfinished"))
    write(tmp_path, "a/notes.txt", b"notes")

    assert [path.name for path in pool_files(tmp_path)] == ["x.jsonl"]


def test_a_file_name_with_brackets_is_a_name_and_no_pattern(tmp_path):
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "data[1].parquet")

    assert read_pool(tmp_path, TEXT).documents["source"].to_list() == ["data[1]"]


def test_a_folder_given_as_a_dot_still_names_its_domain(tmp_path, monkeypatch):
    write(tmp_path / "essays", "x.jsonl", good())
    monkeypatch.chdir(tmp_path / "essays")

    assert read_pool(pool_reader.Path("."), TEXT).documents["domain"].to_list() == ["essays"]


def test_a_file_name_that_is_no_utf8_is_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/x.jsonl", "wb") as file:
        file.write(b'{"text": "a"}')

    assert read_pool(tmp_path, TEXT).documents["domain"].to_list() == ["caf?"]
    assert len(pool_fingerprint(tmp_path)) == 64


def test_a_byte_order_mark_costs_no_document(tmp_path):
    write(tmp_path, "a/x.jsonl", b'\xef\xbb\xbf{"text": "first"}', good("second"))
    pool = read_pool(tmp_path, TEXT)

    assert pool.documents.sort("row")["text"].to_list() == ["first", "second"]
    assert pool.quarantine.is_empty()


def test_empty_lines_and_windows_line_ends_are_no_rows(tmp_path):
    write(tmp_path, "a/x.jsonl", b'\r\n{"text": "one"}\r\n   \n\n{"text": "two\\r"}\r\n')
    pool = read_pool(tmp_path, TEXT)

    assert set(pool.documents["text"]) == {"one", "two\r"}
    assert pool.n_rows == 2


# What is refused

BAD_ROWS = {
    "broken": (b'{"text": "cut', "not JSON"),
    "bytes": (b'{"text": "\xff\xfe"}', "not UTF-8 at byte 10"),
    "nan": (b'{"text": NaN}', "column 'text' must be text, got float"),
    "null": (b'{"text": null}', "column 'text' must be text, got NoneType"),
    "number": (b'{"text": 7}', "column 'text' must be text, got int"),
    "huge integer": (b'{"text": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "deep": (b'{"text": ' + b"[" * 100_000, "not JSON: "),
    "list": (b'["text"]', "not a JSON object"),
    "bare": (b"text", "not JSON"),
    "other column": (b'{"body": "x"}', "column 'text' is missing; found body"),
    "no column": (b"{}", "column 'text' is missing; found "),
    "blank": (b'{"text": " \\n\\t"}', "column 'text' is empty"),
    "surrogate": (b'{"text": "\\ud800"}', "column 'text' holds a lone surrogate"),
    "surrogate name": (b'{"\\ud800": 1}', "column 'text' is missing; found ?"),
    "many names": (
        json.dumps({f"column{i}": i for i in range(5000)}).encode(),
        "column 'text' is missing; found column0, column1",
    ),
    "object": (b'{"text": {"text": "x"}}', "column 'text' must be text, got dict"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_quarantined_with_its_reason_and_the_next_is_read(tmp_path, name):
    raw, reason = BAD_ROWS[name]
    write(tmp_path, "a/x.jsonl", good("before"), raw, good("after"))
    pool = read_pool(tmp_path, TEXT)

    (row,) = pool.quarantine.rows()
    assert row[:2] == ("a/x.jsonl", 1)
    assert row[2].startswith(reason)
    assert len(row[2]) <= pool_reader.MAX_REASON_CHARS
    assert set(pool.documents["text"]) == {"before", "after"}


def test_nul_characters_are_kept(tmp_path):
    write(tmp_path, "a/x.jsonl", b'{"text": "a\\u0000b"}', b'{"text": "raw\x00nul"}')
    pool = read_pool(tmp_path, TEXT)

    assert pool.documents["text"].to_list() == ["a\x00b"]
    assert pool.quarantine["reason"][0].startswith("not JSON: Invalid control character")


def test_a_document_that_would_swamp_its_domain_is_quarantined(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_reader, "MAX_DOCUMENT_BYTES", 100)
    write(tmp_path, "a/x.jsonl", good("é" * 51), good("é" * 50))

    assert reasons(tmp_path) == [("a/x.jsonl", 0, "column 'text' has 102 bytes; the limit is 100")]


@pytest.mark.parametrize("field", ["domain", "source", "group"])
def test_a_row_without_its_label_is_quarantined(tmp_path, field):
    columns = ColumnMap(**{field: "label"})
    write(
        tmp_path,
        "a/x.jsonl",
        {"text": "x", "label": "l"},
        {"text": "y"},
        {"text": "z", "label": ""},
    )

    assert [reason for *_, reason in reasons(tmp_path, columns)] == [
        "column 'label' is missing; found text",
        "column 'label' is empty",
    ]


def test_parquet_rows_without_text_are_quarantined(tmp_path):
    pl.DataFrame({"text": ["a", None, " "]}).write_parquet(tmp_path / "x.parquet")

    assert reasons(tmp_path) == [
        ("x.parquet", 1, "column 'text' must be text, got NoneType"),
        ("x.parquet", 2, "column 'text' is empty"),
    ]


def test_a_parquet_file_without_the_column_is_refused_whole(tmp_path):
    write(tmp_path, "a/x.jsonl", good())
    pl.DataFrame({"body": ["x"], "n": [1]}).write_parquet(tmp_path / "a/y.parquet")

    assert reasons(tmp_path) == [("a/y.parquet", None, "column 'text' is missing; found body, n")]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\x00" * 50])
def test_an_unreadable_parquet_file_is_refused_and_the_others_are_read(tmp_path, content):
    write(tmp_path, "a/x.jsonl", good())
    (tmp_path / "a/y.parquet").write_bytes(content)
    pool = read_pool(tmp_path, TEXT)

    assert pool.documents.height == 1
    assert pool.quarantine["row"].to_list() == [None]
    assert pool.quarantine["reason"][0].startswith("not readable as Parquet: ")


def test_flipped_bits_and_cuts_in_a_parquet_file_end_in_rows_or_a_reason(tmp_path, capfd):
    """Some damage makes Polars panic, which is no Exception: it must not end the process."""
    write(tmp_path, "a/x.jsonl", good())
    path = tmp_path / "a/y.parquet"
    pl.DataFrame({"text": [f"hello world {i}" for i in range(200)]}).write_parquet(path)
    raw, rng = path.read_bytes(), random.Random(0)
    for turn in range(120):
        damaged = bytearray(raw[: rng.randrange(len(raw))] if turn % 4 == 0 else raw)
        for _ in range(rng.choice([1, 3, 20]) if damaged else 0):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)

        assert read_pool(tmp_path, TEXT).documents.height >= 1
    capfd.readouterr()  # the panics' own words on stderr


def test_a_panic_of_the_parquet_reader_is_a_refused_file(tmp_path, monkeypatch):
    """The real panic depends on the damage; its class is what the reader must know."""

    def panic(*_: object, **__: object) -> None:
        raise pl.exceptions.PanicException("range end out of bounds")

    write(tmp_path, "a/x.jsonl", good())
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "a/y.parquet")
    monkeypatch.setattr(pool_reader.pl, "read_parquet", panic)

    assert reasons(tmp_path)[0][2].startswith("not readable as Parquet: range end")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    """It vanished, or its rights are missing; the tests may run as root, who has all rights."""
    write(tmp_path, "a/x.jsonl", good())
    here = pool_files(tmp_path)
    monkeypatch.setattr(pool_reader, "pool_files", lambda _: [*here, tmp_path / "a/gone.jsonl"])

    assert reasons(tmp_path)[0][:2] == ("a/gone.jsonl", None)
    assert reasons(tmp_path)[0][2].startswith("not readable: ")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=80)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_any_bytes_end_in_documents_or_reasons(tmp_path_factory, lines):
    root = tmp_path_factory.mktemp("pool")
    write(root, "a/x.jsonl", good(), *lines)
    pool = read_pool(root, TEXT)

    assert pool.documents.height + pool.quarantine.height == pool.n_rows


# Pools that can't be used


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PoolError, match=r"pools: .*/absent is not a folder\. Check `pools`"):
        read_pool(tmp_path / "absent", TEXT)


def test_an_empty_folder_is_refused(tmp_path):
    write(tmp_path, "a/notes.txt", b"notes")
    (tmp_path / "folder.jsonl").mkdir()

    with pytest.raises(
        PoolError, match=r"holds no \.jsonl or \.parquet file\. Put documents there"
    ):
        read_pool(tmp_path, TEXT)


@pytest.mark.parametrize("lines", [(), (b"oops",), (good(" "),)])
def test_a_pool_without_a_usable_document_is_refused_with_the_reasons(tmp_path, lines):
    write(tmp_path, "a/x.jsonl", *lines)

    shown = "row 0: " if lines else "empty files"
    with pytest.raises(PoolError, match=rf"has no usable document\. First reasons: .*{shown}"):
        read_pool(tmp_path, TEXT)


def test_a_listed_domain_without_usable_text_is_refused_by_name(tmp_path):
    write(tmp_path, "a/x.jsonl", good())
    write(tmp_path, "b/x.jsonl", {"text": None})

    with pytest.raises(PoolError, match=r"domains lists 'b', but .* \(found: a\).*got NoneType"):
        read_pool(tmp_path, TEXT, domains=["a", "b"])


def test_the_rejected_share_is_of_all_rows_and_refused_files(tmp_path):
    write(tmp_path, "a/x.jsonl", good("1"), good("2"), b"oops", b"oops", b"oops")
    write(tmp_path, "a/y.parquet", b"oops")
    pool = read_pool(tmp_path, TEXT)

    assert pool.rejected_share == pytest.approx(4 / 6)


def test_too_large_a_rejected_share_is_refused(tmp_path):
    write(tmp_path, "a/x.jsonl", good("1"), b"oops")

    assert read_pool(tmp_path, TEXT, max_rejected_share=0.5).documents.height == 1
    with pytest.raises(
        PoolError, match=r"max_rejected_share is 0\.4, but 0\.500 of .*row 1: not JSON"
    ):
        read_pool(tmp_path, TEXT, max_rejected_share=0.4)


# Fingerprint


def test_the_fingerprint_follows_names_and_contents_alone(tmp_path):
    write(tmp_path, "a/x.jsonl", good("one"))
    before = pool_fingerprint(tmp_path)
    os.utime(tmp_path / "a/x.jsonl", (1, 1))
    write(tmp_path, "a/.hidden.jsonl", good("hidden"))
    assert pool_fingerprint(tmp_path) == before

    write(tmp_path, "a/x.jsonl", good("two"))
    changed = pool_fingerprint(tmp_path)
    (tmp_path / "a/x.jsonl").rename(tmp_path / "a/y.jsonl")

    assert len({before, changed, pool_fingerprint(tmp_path)}) == 3
