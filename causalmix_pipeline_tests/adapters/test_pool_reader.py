"""The reader meets bad input: a row is read, or refused with its file, number and reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters import pool_arrow, pool_reader
from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.pool_door import MAX_REASON_CHARS, DoorRules
from causalmix_pipeline.adapters.pool_files import PoolFile, pool_files
from causalmix_pipeline.adapters.pool_reader import ColumnMap, read_batches, read_pool
from causalmix_pipeline.adapters.pool_text import MAX_ROW_BYTES
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline_tests.adapters.s3_server import s3_environment, s3_server

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


def test_a_file_name_with_brackets_is_a_name_and_no_pattern(tmp_path):
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "data[1].parquet")

    assert read_pool(tmp_path, TEXT).documents["source"].to_list() == ["data[1]"]


def test_a_folder_given_as_a_dot_still_names_its_domain(tmp_path, monkeypatch):
    write(tmp_path / "essays", "x.jsonl", good())
    monkeypatch.chdir(tmp_path / "essays")

    assert read_pool(".", TEXT).documents["domain"].to_list() == ["essays"]


def test_a_file_name_that_is_no_utf8_is_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/x.jsonl", "wb") as file:
        file.write(b'{"text": "a"}')

    assert read_pool(tmp_path, TEXT).documents["domain"].to_list() == ["caf?"]


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
    "bytes": (b'{"text": "\xff\xfe"}', "column 'text' is not UTF-8 at byte 0"),
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
    "twice": (b'{"text": "a", "text": "b"}', "not JSON: key 'text' stands twice in an object"),
    "twice inside": (b'{"text": "a", "m": [{"x": 1, "x": 1}]}', "not JSON: key 'x' stands twice"),
    "escaped nul": (b'{"text": "a\\u0000b"}', "column 'text' holds a NUL character"),
    "raw nul": (b'{"text": "raw\x00nul"}', "not JSON: Invalid control character"),
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
    assert len(row[2]) <= MAX_REASON_CHARS
    assert set(pool.documents["text"]) == {"before", "after"}


def test_a_document_that_would_swamp_its_domain_is_quarantined(tmp_path):
    write(tmp_path, "a/x.jsonl", good("é" * 51), good("é" * 50))
    pool = read_pool(tmp_path, TEXT, rules=DoorRules(max_document_bytes=100))

    assert pool.quarantine.rows() == [
        ("a/x.jsonl", 0, "column 'text' has 102 bytes; the limit is 100")
    ]


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


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    """It vanished, or its rights are missing; the tests may run as root, who has all rights."""
    write(tmp_path, "a/x.jsonl", good())
    here = pool_files(tmp_path)
    gone = PoolFile(str(tmp_path / "a/gone.jsonl"), "a/gone.jsonl", 9, "1", "jsonl")
    monkeypatch.setattr(pool_reader, "pool_files", lambda _: [*here, gone])

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


# The same verdict from every reader

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
VERDICTS = {  # text, number, chat as JSON -> the reason, None where it is kept
    "kept": ('a document\nof two lines, "quoted" é', "1.5", None),
    "blank": (" \n\t ", "1", "column 'text' is empty"),
    "nul": ("a\0b", "1", "column 'text' holds a NUL character"),
    "long": ("é" * 600, "1", "column 'text' has 1200 bytes; the limit is 1000"),
    "40 MB": ("x" * 12 * 2**20, "1", "column 'text' has 12582912 bytes; the limit is 1000"),
    "no number": ("good", "best", "column 'q' must be a number, got 'best'"),
    "nan": ("good too", "nan", None),
    "missing number": ("good as well", "", None),
}
ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.zst", "parquet", "arrow"]
ENDINGS += ["feather", "stream"]  # an IPC file, and an IPC stream named .arrow


def pack(raw: bytes, ending: str) -> bytes:
    import zstandard

    return {"gz": gzip.compress, "zst": zstandard.compress}.get(ending, bytes)(raw)


def csv_bytes(rows: list[dict]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows
    )
    return out.getvalue().encode("utf-8", "surrogateescape")


def table_bytes(rows: list[dict], ending: str, **options) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in columns.items():
        if isinstance(values[0], str):  # text as bytes: a file may hold what isn't UTF-8
            raw = [v.encode("utf-8", "surrogateescape") for v in values]
            columns[name] = pa.array(raw, pa.binary()).view(pa.string())
    table, out = pa.table(columns), io.BytesIO()
    if ending == "parquet":
        pq.write_table(table, out, **options)
    else:
        make = pa.ipc.new_stream if ending == "stream" else pa.ipc.new_file
        with make(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table, max_chunksize=50)
    return out.getvalue()


def file_bytes(rows: list[dict], ending: str) -> bytes:
    kind, _, packed = ending.partition(".")
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        return pack("\n".join(lines).encode("utf-8", "surrogateescape"), packed)
    return pack(csv_bytes(rows), packed) if kind == "csv" else table_bytes(rows, kind)


def put(root, ending: str, raw: bytes) -> PoolFile:
    path = root / f"x.{'arrow' if ending == 'stream' else ending}"
    path.write_bytes(raw)
    return pool_files(path)[0]


def read(file: PoolFile, columns: ColumnMap = TEXT, **options) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Documents and quarantine of a file, after checking that no row is lost."""
    rules = options.pop("rules", DoorRules())
    batches = list(read_batches(file, columns, rules, **options))
    for batch in batches:
        n_refused = batch.quarantine["row"].drop_nulls().len()
        assert batch.n_rows == batch.documents.height + n_refused
    quarantine = pl.concat([batch.quarantine for batch in batches])
    assert quarantine["row"].null_count() <= 1
    kept = [batch.documents for batch in batches if batch.documents.height]
    documents = pl.concat(kept) if kept else batches[0].documents
    numbers = [*documents["row"], *quarantine["row"].drop_nulls()]
    assert sorted(numbers) == sorted(set(numbers))
    return documents, quarantine


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_document_meets_the_same_verdict_in_every_format(tmp_path, ending):
    rows = [{"text": text, "q": number, "extra": "\udcff"} for text, number, _ in VERDICTS.values()]
    file = put(tmp_path, ending, file_bytes(rows, ending))
    columns, rules = ColumnMap(numbers=("q", "absent")), DoorRules(max_document_bytes=1000)
    documents, quarantine = read(file, columns, rules=rules)

    refused = {i: v[2] for i, v in enumerate(VERDICTS.values()) if v[2]}
    assert dict(zip(quarantine["row"], quarantine["reason"], strict=True)) == refused
    assert documents["text"].to_list() == [v[0] for v in VERDICTS.values() if not v[2]]
    assert documents["q"].to_list() == [1.5, None, None]
    assert documents["absent"].to_list() == [None] * 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_bytes_that_are_no_utf8_meet_the_same_verdict_in_every_format(tmp_path, ending):
    """ED A0 80 is a surrogate that someone wrote as UTF-8; bytes of unread columns don't count."""
    rows = [
        {"text": "fine", "extra": "\udcff"},
        {"text": "é\udcff", "extra": "x"},
        {"text": "\udced\udca0\udc80", "extra": "x"},
    ]
    documents, quarantine = read(put(tmp_path, ending, file_bytes(rows, ending)))

    assert documents["text"].to_list() == ["fine"]
    assert quarantine["reason"].to_list() == [
        "column 'text' is not UTF-8 at byte 2",
        "column 'text' is not UTF-8 at byte 0",
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_chat_is_read_alike_from_every_format(tmp_path, ending):
    bad = [{"role": "assistant", "content": "a\udcffb"}]
    rows = [{"m": CHAT}, {"m": CHAT[:1]}]
    if ending in ("jsonl", "csv"):  # the other writers of this test refuse such bytes inside
        rows.append({"m": bad})
    raw = file_bytes(rows, ending) if "csv" not in ending else None
    if raw is None:
        texts = [{"m": json.dumps(row["m"], ensure_ascii=False)} for row in rows]
        raw = file_bytes(texts, ending)
    documents, quarantine = read(put(tmp_path, ending, raw), ColumnMap(messages="m"))

    assert documents["text"].to_list() == ["user\nq\n\nanswer"]
    assert documents["prompt_chars"].to_list() == [8]
    assert documents["document_id"].to_list() == [document_id("user\nq\n\nanswer", 8)]
    assert (
        quarantine["reason"].to_list()
        == [
            "column 'm' holds no message of the assistant",
            "column 'm' is not UTF-8 at byte 1",
        ][: len(rows) - 1]
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_prompt_and_its_response_are_read_alike_from_every_format(tmp_path, ending):
    rows = [{"p": "why?", "r": "so"}, {"p": "why?", "r": ""}]
    file = put(tmp_path, ending, file_bytes(rows, ending))
    documents, quarantine = read(file, ColumnMap(prompt="p", response="r"))

    assert documents["text"].to_list() == ["why?\n\nso"]
    assert quarantine["reason"].to_list() == ["column 'r' is empty"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow", "stream"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [(7, "int"), (0.5, "float"), (True, "bool"), ([1], "list"), ({"a": 1}, "dict")],
)
def test_a_value_that_is_no_text_meets_the_same_verdict(tmp_path, ending, value, kind):
    file = put(tmp_path, ending, file_bytes([{"text": value}, {"text": None}], ending))
    _, quarantine = read(file)

    assert quarantine["reason"].to_list() == [
        f"column 'text' must be text, got {kind}",
        "column 'text' must be text, got NoneType",
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow", "stream"])
@pytest.mark.parametrize(
    ("value", "expected"), [(7, 7.0), (0.5, 0.5), (True, 1.0), (None, None), ([1], "list")]
)
def test_numbers_of_any_type_are_read_alike(tmp_path, ending, value, expected):
    file = put(tmp_path, ending, file_bytes([{"text": "a", "q": value}], ending))
    documents, quarantine = read(file, ColumnMap(numbers=("q",)))

    if expected == "list":
        assert quarantine["reason"].to_list() == ["column 'q' must be a number, got list"]
    else:
        assert documents["q"].to_list() == [expected]


def test_text_of_every_arrow_type_is_text(tmp_path):
    import pyarrow as pa

    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        table, out = pa.table({"text": pa.array(["a", None], kind)}), io.BytesIO()
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
        documents, quarantine = read(put(tmp_path, "arrow", out.getvalue()))
        assert (documents["text"].to_list(), quarantine.height) == (["a"], 1)
    frame = pl.DataFrame({"text": ["a", "b", "a"]}, schema={"text": pl.Categorical})
    for write_to in ("write_ipc", "write_parquet", "write_ipc_stream"):
        ending = "parquet" if write_to == "write_parquet" else "arrow"
        getattr(frame, write_to)(tmp_path / f"x.{ending}")
        documents, _ = read(pool_files(tmp_path / f"x.{ending}")[0])
        assert documents["text"].to_list() == ["a", "b", "a"]


def test_a_column_that_stands_twice_refuses_the_file(tmp_path):
    import pyarrow as pa

    table, out = pa.table([["a"], ["b"]], names=["text", "text"]), io.BytesIO()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    for ending, raw in (("csv", b"text,text\na,b\n"), ("arrow", out.getvalue())):
        _, quarantine = read(put(tmp_path, ending, raw))
        assert quarantine.rows() == [
            (f"x.{ending}", None, "column 'text' stands twice in the file")
        ]


# CSV


def test_csv_records_may_hold_line_ends_and_empty_lines_are_no_rows(tmp_path):
    raw = b'\xef\xbb\xbftext,topic\r\n\r\n"one\r\n""two""",a\r\n\nthree,b\n'
    documents, quarantine = read(put(tmp_path, "csv", raw), ColumnMap(domain="topic"))

    assert documents["text"].to_list() == ['one\r\n"two"', "three"]
    assert documents["row"].to_list() == [0, 1]
    assert quarantine.is_empty()


def test_bad_csv_records_are_refused_one_by_one(tmp_path):
    raw = b'text,topic\na\nb,c,d\n"e"f,g\nh,i\n"j,k\n'
    documents, quarantine = read(put(tmp_path, "csv", raw))

    assert documents["text"].to_list() == ["h"]
    assert quarantine.select("row", "reason").rows() == [
        (0, "row has 1 fields, the header 2"),
        (1, "row has 3 fields, the header 2"),
        (2, "not CSV: ',' expected after '\"'"),
        (4, "not CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize("raw", [b"", b"\n\n", b'"text\n', b"body,n\na,b\n"])
def test_a_csv_file_without_a_header_of_use_has_no_rows(tmp_path, raw):
    batches = list(read_batches(put(tmp_path, "csv", raw), TEXT))

    assert sum(batch.n_rows for batch in batches) == 0
    assert sum(batch.quarantine.height for batch in batches) == (1 if raw.strip() else 0)


# Size


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.zst"])
def test_a_row_over_the_cap_is_one_refused_row_and_the_next_is_read(tmp_path, ending):
    rows = [
        {"text": "before"},
        {"text": random.Random(0).randbytes(MAX_ROW_BYTES).hex().replace("00", '"\n')},
        {"text": "after"},
    ]
    what = "line" if "jsonl" in ending else "row"
    documents, quarantine = read(put(tmp_path, ending, file_bytes(rows, ending)))

    assert documents["text"].to_list() == ["before", "after"]
    assert documents["row"].to_list() == [0, 2]
    assert quarantine.rows()[0][1:] == (1, f"{what} has more than {MAX_ROW_BYTES} bytes")


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_last_line_may_be_just_as_long_as_the_cap(tmp_path, extra):
    text = "x" * (MAX_ROW_BYTES + extra - len('{"text": ""}'))
    _, quarantine = read(put(tmp_path, "jsonl", json.dumps({"text": text}).encode()))

    assert quarantine.height == 1
    assert quarantine["reason"][0].startswith("column" if extra < 0 else "line has more")


@pytest.mark.parametrize("ending", ["parquet", "arrow", "stream"])
def test_a_document_of_40_mb_is_one_refused_row(tmp_path, ending):
    rows = [{"text": "before"}, {"text": "x" * 40_000_000}, {"text": "after"}]
    documents, quarantine = read(put(tmp_path, ending, file_bytes(rows, ending)))

    assert documents["text"].to_list() == ["before", "after"]
    assert quarantine["reason"].to_list() == [
        "column 'text' has 40000000 bytes; the limit is 4194304"
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_batches_carry_about_the_bytes_that_are_asked_for(tmp_path, ending):
    rows = [{"text": f"{i} " + "word " * 200} for i in range(400)]
    file = put(tmp_path, ending, file_bytes(rows, ending))
    batches = list(read_batches(file, TEXT, batch_bytes=20_000))

    assert sum(batch.n_rows for batch in batches) == 400
    assert max(batch.documents["text"].str.len_bytes().sum() for batch in batches) < 40_000
    rows_in_order = [row for batch in batches for row in batch.documents["row"]]
    assert rows_in_order == list(range(400))


def test_one_huge_value_that_every_row_of_a_dictionary_repeats_stays_small(tmp_path):
    """Thousands of rows of one value of 3 MB are a small file, and many GB when decoded at once."""
    import pyarrow.parquet as pq

    rows = [{"text": random.Random(0).randbytes(1_500_000).hex()}] * 60
    file = put(tmp_path, "parquet", table_bytes(rows, "parquet"))
    with pq.ParquetFile(file.url) as parquet:
        group = parquet.metadata.row_group(0)

    assert file.size < 10_000_000
    assert pool_arrow._parquet_step(group, ["text"], DoorRules(), 2**23) <= 90
    assert read(file)[0].height == 60


# Bombs


def test_a_bomb_in_a_packed_file_is_refused_and_the_rows_before_it_are_kept(tmp_path):
    bomb = b'{"text": "first"}\n' + b" " * (200 * 2**20)
    for ending in ("jsonl.gz", "jsonl.zst"):
        documents, quarantine = read(put(tmp_path, ending, pack(bomb, ending[6:])))

        assert documents["text"].to_list() == ["first"]
        assert "taken for a bomb" in quarantine.rows()[-1][2]
        assert quarantine.rows()[-1][1] is None


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("parquet", {"compression": "zstd", "use_dictionary": False}),
        ("arrow", {"compression": "zstd"}),
        ("stream", {"compression": "zstd"}),
    ],
)
def test_a_bomb_in_compressed_columns_is_refused(tmp_path, ending, options, monkeypatch):
    monkeypatch.setattr(pool_arrow, "PARQUET_BUDGET_BYTES", 2**20)
    rows = [{"text": "0" * 20_000_000}] * 2
    _, quarantine = read(put(tmp_path, ending, table_bytes(rows, ending, **options)))

    assert quarantine["row"].to_list() == [None]
    assert "decompresses to" in quarantine["reason"][0]


# Damage


def intact(ending: str, n: int = 300) -> bytes:
    rows = [{"text": f"{i} {random.Random(i).random()}", "q": "1"} for i in range(n)]
    return file_bytes(rows, ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_cut_file_is_named_or_its_rows_are_whole(tmp_path, ending):
    raw = intact(ending)
    whole = read(put(tmp_path, ending, raw))[0]["text"].to_list()
    for part in (0.1, 0.5, 0.9, 0.99):
        documents, quarantine = read(put(tmp_path, ending, raw[: int(len(raw) * part)]))

        kept = documents["text"].to_list()
        if ending not in ("csv", "jsonl"):  # a cut text file just ends
            assert quarantine["row"].null_count() == 1
            assert kept == whole[: len(kept)]
        assert len(kept) < len(whole)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "csv.gz", "stream"])
def test_rows_before_a_cut_are_kept(tmp_path, ending):
    raw = intact(ending, 20_000)
    documents, quarantine = read(put(tmp_path, ending, raw[: len(raw) * 9 // 10]))

    assert 10_000 < documents.height < 20_000
    assert quarantine["row"].to_list() == [None]


def test_a_stream_that_is_cut_between_two_batches_is_named(tmp_path):
    """Nothing else tells such a file from a whole one."""
    raw = intact("stream")
    assert raw.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    documents, quarantine = read(put(tmp_path, "stream", raw[:-8]))

    assert documents.height == 300
    assert quarantine["reason"].to_list() == [
        "not readable as Arrow: it ends without its end mark, so rows may be missing"
    ]


def test_rows_of_good_row_groups_before_damage_are_kept(tmp_path):
    rows = [{"text": f"{i} {random.Random(i).random()}"} for i in range(300)]
    raw = bytearray(
        table_bytes(rows, "parquet", row_group_size=100, write_page_checksum=True, compression=None)
    )
    at = raw.index(b"150 0.")
    raw[at] ^= 1
    documents, quarantine = read(put(tmp_path, "parquet", bytes(raw)), batch_bytes=2000)

    assert documents.height == 100
    assert "CRC checksum" in quarantine["reason"][0]


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "double"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=4),
    ),
    max_size=4,
)
MAPS = [ColumnMap(numbers=("q",)), ColumnMap(messages="text"), ColumnMap(text="q", domain="text")]


def mutate(raw: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    changed = bytearray(raw)
    for what, place, value in mutations:
        at = int(place * max(len(changed) - 1, 0))
        if what == "cut":
            del changed[at:]
        elif what == "drop":
            del changed[at : at + value[0]]
        elif what == "double":
            changed[at:at] = changed[at : at + 64]
        elif what == "set":
            changed[at : at + len(value)] = value
        elif changed:
            changed[at] ^= 1 << value[0] % 8
    return bytes(changed)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=300), MUTATIONS), st.sampled_from(MAPS), st.integers(1, 10**5))
def test_random_and_mutated_bytes_end_in_rows_or_reasons(
    tmp_path_factory, ending, change, columns, batch_bytes
):
    """No crash, no row lost, no row twice; `read` checks the sums."""
    raw = change if isinstance(change, bytes) else mutate(intact(ending, 40), change)
    read(put(tmp_path_factory.mktemp("pool"), ending, raw), columns, batch_bytes=batch_bytes)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(MUTATIONS, st.sampled_from(["data-00000-of-00001.arrow", "state.json", "dataset_info.json"]))
def test_mutated_saved_datasets_end_in_rows_or_reasons(tmp_path_factory, mutations, name):
    import datasets

    root = tmp_path_factory.mktemp("pool")
    rows = {"text": [f"text {i}" for i in range(20)]}
    datasets.Dataset.from_dict(rows).save_to_disk(root / "set")
    write(root, "a/x.jsonl", good())
    path = root / "set" / name
    path.write_bytes(mutate(path.read_bytes(), mutations))
    pool = read_pool(root, TEXT)

    n_refused = pool.quarantine["row"].drop_nulls().len()
    assert pool.documents["copies"].sum() + n_refused == pool.n_rows
    if name != "data-00000-of-00001.arrow":
        assert pool.documents.height == 21


# Object storage


def test_every_format_is_read_from_object_storage(tmp_path, monkeypatch):
    import datasets
    import fsspec

    datasets.Dataset.from_dict({"text": ["hf 0", "hf 1"]}).save_to_disk(tmp_path / "set")
    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        storage = fsspec.filesystem("s3")
        storage.mkdir("bucket")
        for ending in ENDINGS:
            name = "stream/x.arrow" if ending == "stream" else f"{ending}/x.{ending}"
            rows = [{"text": f"{ending} {i}"} for i in range(50)]
            storage.pipe_file(f"bucket/pool/{name}", file_bytes(rows, ending))
        storage.put(str(tmp_path / "set"), "bucket/pool/set", recursive=True)
        storage.pipe_file("bucket/pool/bad/x.parquet", b"PAR1")
        pool = read_pool("s3://bucket/pool", TEXT)

    assert pool.documents.height == 50 * len(ENDINGS) + 2
    assert set(pool.documents["domain"]) == {*ENDINGS, "set"}
    assert pool.quarantine["file"].to_list() == ["bad/x.parquet"]
