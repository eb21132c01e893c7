"""Rows of text files: JSON lines and CSV, plain or compressed.

Lines and records are capped: one over the cap is a refused row, skipped without being held.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import polars as pl

from causalmix_pipeline.adapters.pool_door import (
    ColumnMap,
    DoorRules,
    UnreadableFileError,
    bad_text,
    check_columns,
    conversation,
    missing,
    number_of,
    offered_schema,
    parse_json,
    readable,
    wrong_text,
)
from causalmix_pipeline.adapters.pool_files import PoolFile, as_text, open_plain

#: A longer line of JSON, or record of CSV, is refused without being held in memory.
MAX_ROW_BYTES = 16 * 2**20


class _Row(NamedTuple):
    """A row as it stands in a file of text."""

    number: int  # of the row in the file, from 0
    record: dict[str, Any] | str  # column -> value, or why there's none
    n_bytes: int
    is_damaged: bool  # bytes that aren't UTF-8 stand in it as surrogate escapes
    may_hold_surrogates: bool


@dataclass
class _Offer:
    """Rows of text collected into a batch for the door."""

    columns: ColumnMap
    rows: dict[str, list] = field(init=False)
    n_bytes: int = 0

    def __post_init__(self) -> None:
        self.rows = {name: [] for name in offered_schema(self.columns)}

    def add(self, row: _Row) -> None:
        rows, record = self.rows, row.record
        self.n_bytes += row.n_bytes
        rows["row"].append(row.number)
        refusal, record = (record, {}) if isinstance(record, str) else (None, record)
        rows["refusal"].append(refusal)
        prompt_chars = 0
        for role, column in self.columns.texts.items():
            value, problem = record.get(column), None
            if role == "messages" and column in record and refusal is None:
                chat = conversation(column, value, damaged=row.is_damaged)
                value, problem = (None, chat) if isinstance(chat, str) else (chat[0], None)
                prompt_chars = 0 if isinstance(chat, str) else chat[1]
            elif not isinstance(value, str):
                is_there = column in record or refusal is not None
                problem = (
                    wrong_text(column, type(value).__name__)
                    if is_there
                    else missing(column, record)
                )
                value = None
            elif row.may_hold_surrogates:
                problem = bad_text(column, value, damaged=row.is_damaged)
                value = value if problem is None else None
            rows[role].append(value)
            rows[f"{role}!"].append(problem)
        for name in self.columns.numbers:
            number, problem = number_of(name, record.get(name))
            rows[f"number {name}"].append(number)
            rows[f"number {name}!"].append(problem)
        rows["prompt_chars"].append(prompt_chars)

    def take(self) -> pl.DataFrame:
        """The rows so far, as a frame; starts again without them."""
        frame = pl.DataFrame(self.rows, schema=offered_schema(self.columns))
        self.rows = {name: [] for name in self.rows}
        self.n_bytes = 0
        return frame


def _offer_rows(rows: Iterable[_Row], columns: ColumnMap, batch_bytes: int) -> Iterator[Any]:
    """Batches of rows; those before damage come before the exception."""
    offer = _Offer(columns)
    try:
        for row in readable(rows, ""):
            offer.add(row)
            if offer.n_bytes >= batch_bytes:
                yield offer.take()
    except UnreadableFileError:
        yield offer.take()
        raise
    yield offer.take()


def _pieces(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Lines, and whether each is whole; one over the limit comes in pieces, the last whole."""
    is_first = True
    while raw := file.readline(MAX_ROW_BYTES):
        is_whole = raw.endswith(b"\n") or len(raw) < MAX_ROW_BYTES
        yield raw.removeprefix(codecs.BOM_UTF8) if is_first else raw, is_whole
        is_first = False


def _decode(raw: bytes) -> tuple[str, bool]:
    """The text of bytes, and whether some weren't UTF-8; those become surrogate escapes."""
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape"), True


def _too_long(what: str) -> str:
    return f"{what} has more than {MAX_ROW_BYTES} bytes"


def read_jsonl(
    file: PoolFile, columns: ColumnMap, rules: DoorRules, batch_bytes: int
) -> Iterator[pl.DataFrame]:
    """Rows of a file of JSON lines, in batches for the door."""
    yield from _offer_rows(_json_rows(file, rules), columns, batch_bytes)


def _json_rows(file: PoolFile, rules: DoorRules) -> Iterator[_Row]:
    number, is_start = 0, True
    with open_plain(file, max_decompression_ratio=rules.max_decompression_ratio) as lines:
        for raw, is_whole in _pieces(lines):
            if is_start and is_whole:
                if raw.strip():
                    yield _parse_line(number, raw)
            elif is_whole:
                yield _Row(number, _too_long("line"), 0, False, False)
            number, is_start = number + is_whole, is_whole
        if not is_start:  # the file's last line has just the length of a piece
            yield _Row(number, _too_long("line"), 0, False, False)


def _parse_line(number: int, raw: bytes) -> _Row:
    """The row of a JSONL line."""
    text, is_damaged = _decode(raw)
    try:
        record = parse_json(text)
    except ValueError as error:
        record = as_text(f"not JSON: {error}")
    else:
        if not isinstance(record, dict):
            record = "not a JSON object"
    return _Row(number, record, len(raw), is_damaged, is_damaged or b"\\u" in raw)


class _TooLongError(Exception):
    """A record of CSV that isn't held in memory."""


class _CsvLines:
    """Lines for the csv module, which asks for as many as a record has."""

    def __init__(self, file: IO[bytes]) -> None:
        self._pieces = _pieces(file)
        self.start_record()

    def start_record(self) -> None:
        self.n_bytes, self.is_damaged, self._n_quotes = 0, False, 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        raw, is_whole = next(self._pieces)
        self.n_bytes += len(raw)
        self._n_quotes += raw.count(b'"')
        if not is_whole or self.n_bytes > MAX_ROW_BYTES:
            self._skip_record(is_whole)
            raise _TooLongError
        text, is_damaged = _decode(raw)
        self.is_damaged |= is_damaged
        return text

    def _skip_record(self, is_whole: bool) -> None:
        """Go to the line's end where all quotes are closed."""
        while not (is_whole and self._n_quotes % 2 == 0):
            raw, is_whole = next(self._pieces, (b"", True))
            if not raw:
                return
            self._n_quotes += raw.count(b'"')


def read_csv(
    file: PoolFile, columns: ColumnMap, rules: DoorRules, batch_bytes: int
) -> Iterator[pl.DataFrame]:
    """Rows of a CSV file with a header, in batches for the door."""
    yield from _offer_rows(_csv_rows(file, columns, rules), columns, batch_bytes)


def _csv_rows(file: PoolFile, columns: ColumnMap, rules: DoorRules) -> Iterator[_Row]:
    csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_ROW_BYTES))
    with open_plain(file, max_decompression_ratio=rules.max_decompression_ratio) as raw:
        lines = _CsvLines(raw)
        records = csv.reader(lines, strict=True)
        header: list[str] | None = None
        number = 0
        while True:
            lines.start_record()
            try:
                fields = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                fields = as_text(f"not CSV: {error}")
            except _TooLongError:
                fields = _too_long("row")
            if not fields:
                continue  # an empty line
            if header is None:
                header = _csv_header(fields, columns)
                continue
            if not isinstance(fields, str) and len(fields) != len(header):
                fields = f"row has {len(fields)} fields, the header {len(header)}"
            record = fields if isinstance(fields, str) else dict(zip(header, fields, strict=True))
            yield _Row(number, record, lines.n_bytes, lines.is_damaged, lines.is_damaged)
            number += 1


def _csv_header(fields: list[str] | str, columns: ColumnMap) -> list[str]:
    if isinstance(fields, str):
        raise ValueError(f"its header: {fields}")
    check_columns(fields, columns)
    return fields
