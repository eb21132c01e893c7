"""What a document must be to enter: one set of rules, whatever file it came from.

Readers offer rows as they find them, column by column. The door judges all of them by one
declared schema and gives a refused row its reason, so that the same document meets the same
verdict in JSONL, CSV, Parquet and Arrow.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.pool_files import PoolFile, as_text
from causalmix_pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    import dataframely as dy

#: Characters of a reason that are kept: a bad row may be large itself.
MAX_REASON_CHARS = 500
#: What stands between a prompt and its response, and between messages.
SEPARATOR = "\n\n"

#: Columns of documents; one Float64 column for each of `ColumnMap.numbers` follows.
DOCUMENT_SCHEMA = {
    "document_id": pl.String,
    "domain": pl.String,
    "source": pl.String,
    "group": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "text": pl.String,
    "prompt_chars": pl.Int64,
}
QUARANTINE_SCHEMA = {"file": pl.String, "row": pl.Int64, "reason": pl.String}


@dataclass(frozen=True)
class ColumnMap:
    """Which column of the files holds what.

    Attributes:
        text: the document's text; not used where one of the next three is set.
        prompt: what the response answers; `response` must be set, too.
        response: the part that is trained on.
        messages: a chat: a list of objects with `role` and `content`, or that as JSON text.
        domain: its domain; None takes it from the file's place.
        domain_from: the place that names the domain: the file's "folder" or the "file" itself.
        source: where it comes from; None takes the file's name without endings.
        group: documents that must not be split between training and evaluation; None takes each
            document for itself.
        numbers: columns of numbers to keep beside the text, such as quality scores.
    """

    text: str = "text"
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    domain: str | None = None
    domain_from: Literal["folder", "file"] = "folder"
    source: str | None = None
    group: str | None = None
    numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse maps that contradict themselves."""
        object.__setattr__(self, "numbers", tuple(self.numbers))  # a list comes from settings
        if (self.prompt is None) != (self.response is None):
            raise ConfigError(
                f"columns.prompt and columns.response belong together, got {self.prompt!r} and "
                f"{self.response!r}. Set both or neither."
            )
        if self.messages is not None and self.prompt is not None:
            raise ConfigError(
                f"columns.messages ({self.messages!r}) and columns.prompt ({self.prompt!r}) are "
                "two forms of a document. Set one of them."
            )
        for name in self.numbers:
            if name in {*DOCUMENT_SCHEMA, "copies"} or self.numbers.count(name) > 1:
                raise ConfigError(
                    f"columns.numbers must be different from each other and from "
                    f"{', '.join(DOCUMENT_SCHEMA)}, copies; got {name!r}. Rename the column."
                )

    @property
    def texts(self) -> dict[str, str]:
        """Role -> column, of the columns of text that are read, in the order they are judged."""
        if self.messages is not None:
            form = {"messages": self.messages}
        elif self.prompt is not None and self.response is not None:
            form = {"prompt": self.prompt, "response": self.response}
        else:
            form = {"text": self.text}
        labels = {"domain": self.domain, "source": self.source, "group": self.group}
        return form | {role: column for role, column in labels.items() if column is not None}

    @property
    def wanted(self) -> list[str]:
        """Columns that are read from a file."""
        return list(dict.fromkeys((*self.texts.values(), *self.numbers)))


@dataclass(frozen=True)
class DoorRules:
    """Limits on what is read.

    Attributes:
        max_document_bytes: of UTF-8; a longer document would be a large part of a small domain.
        max_decompression_ratio: bytes read for each byte stored; more is taken for a bomb.
    """

    max_document_bytes: int = 4 * 2**20
    max_decompression_ratio: float = 200.0


@dataclass(frozen=True, eq=False)
class PoolBatch:
    """Some rows of one file: those that entered, and those that were refused.

    `n_rows` is the number of documents and of refused rows that have a number.
    """

    documents: pl.DataFrame  # DOCUMENT_SCHEMA and the numbers, in the file's order
    quarantine: pl.DataFrame  # QUARANTINE_SCHEMA; row is null where (the rest of) a file is refused
    n_rows: int


def offered_schema(columns: ColumnMap) -> dict[str, Any]:
    """Columns of the rows that readers offer.

    `refusal` says why a row can't be read at all. A value that can't be used is null, with the
    reason in the column of the same name and an exclamation mark.
    """
    schema: dict[str, Any] = {"row": pl.Int64, "refusal": pl.String, "prompt_chars": pl.Int64}
    for role in columns.texts:
        schema |= {role: pl.String, f"{role}!": pl.String}
    for name in columns.numbers:
        schema |= {f"number {name}": pl.Float64, f"number {name}!": pl.String}
    return schema


def refuse_file(file: PoolFile, reason: str) -> PoolBatch:
    """A batch that says that a file, or the rest of it, can't be read."""
    row = (file.name, None, as_text(reason[:MAX_REASON_CHARS]))
    return PoolBatch(
        pl.DataFrame(schema=DOCUMENT_SCHEMA),
        pl.DataFrame([row], schema=QUARANTINE_SCHEMA, orient="row"),
        0,
    )


def judge(offered: pl.DataFrame, file: PoolFile, columns: ColumnMap, rules: DoorRules) -> PoolBatch:
    """Let rows in or refuse each with the first rule that it breaks.

    Args:
        offered: columns of `offered_schema`.
        file: where the rows are from; it names what no column does.
        columns: what the file's columns mean.
        rules: limits.
    """
    schema, messages = _door(columns, rules.max_document_bytes)
    passed, failure = schema.filter(offered)
    broken = failure.details()
    reason = pl.coalesce(
        pl.when(pl.col(rule) == "invalid").then(message) for rule, message in messages.items()
    )
    quarantine = broken.select(
        pl.lit(file.name).alias("file"),
        "row",
        reason.str.slice(0, MAX_REASON_CHARS).alias("reason"),
    )
    documents = _documents(passed, file, columns)
    assert documents.height + quarantine.height == offered.height
    return PoolBatch(documents, quarantine, offered.height)


def _documents(passed: pl.DataFrame, file: PoolFile, columns: ColumnMap) -> pl.DataFrame:
    """The documents of rows that passed."""
    text, prompt_chars = pl.col(next(iter(columns.texts))), pl.col("prompt_chars")
    if columns.prompt is not None:
        text = pl.concat_str("prompt", pl.lit(SEPARATOR), "response")
        prompt_chars = pl.col("prompt").str.len_chars().cast(pl.Int64) + len(SEPARATOR)
    frame = passed.select(
        "row",
        *(role for role in ("domain", "source", "group") if role in columns.texts),
        *(pl.col(f"number {name}").alias(name) for name in columns.numbers),
        text.alias("text"),
        prompt_chars.alias("prompt_chars"),
        pl.lit(file.name).alias("file"),
    )
    identities = map(document_id, frame["text"].to_list(), frame["prompt_chars"].to_list())
    frame = frame.with_columns(pl.Series("document_id", list(identities), dtype=pl.String))
    places = {
        "domain": pl.lit(file.folder if columns.domain_from == "folder" else file.stem),
        "source": pl.lit(file.stem),
        "group": pl.col("document_id"),
    }
    frame = frame.with_columns(
        place.alias(role) for role, place in places.items() if role not in columns.texts
    )
    return frame.select(*DOCUMENT_SCHEMA, *columns.numbers)


@functools.lru_cache(maxsize=16)
def _door(
    columns: ColumnMap, max_document_bytes: int
) -> tuple[type[dy.Schema], dict[str, pl.Expr]]:
    """The schema of rows that may enter, and for each of its rules the reason of breaking it.

    Rules stand in the order in which they are told: a row that breaks several names the first.
    """
    import dataframely as dy

    kinds = {pl.Int64: dy.Int64, pl.String: dy.String, pl.Float64: dy.Float64}
    members: dict[str, Any] = {
        f"column{i}": kinds[kind](nullable=True, alias=name)
        for i, (name, kind) in enumerate(offered_schema(columns).items())
    }
    messages: dict[str, pl.Expr] = {}

    def add(ok: pl.Expr, message: pl.Expr) -> None:
        rule = f"rule{len(messages)}"
        # A rule that gives null, of a missing value, counts as kept: presence has its own rule.
        members[rule] = dy.rule()(lambda cls, ok=ok: ok)
        messages[rule] = message

    add(pl.col("refusal").is_null(), pl.col("refusal"))
    for role, column in columns.texts.items():
        value, problem, what = pl.col(role), pl.col(f"{role}!"), f"column {as_text(column)!r}"
        n_bytes = value.str.len_bytes()
        none = pl.lit(wrong_text(column, "NoneType"))
        add(value.is_not_null() & problem.is_null(), pl.coalesce(problem, none))
        words = f"{what} has \0 bytes; the limit is {max_document_bytes}"
        add(n_bytes <= max_document_bytes, _format(words, n_bytes))
        if role not in ("domain", "source", "group"):
            nul = value.str.contains("\0", literal=True)
            add(~nul, pl.lit(f"{what} holds a NUL character"))
        add(value.str.strip_chars() != "", pl.lit(f"{what} is empty"))
    if columns.prompt is not None:
        n_bytes = pl.sum_horizontal(pl.col("prompt", "response").str.len_bytes()) + len(SEPARATOR)
        words = f"prompt and response have \0 bytes; the limit is {max_document_bytes}"
        add(n_bytes <= max_document_bytes, _format(words, n_bytes))
    for name in columns.numbers:
        problem = pl.col(f"number {name}!")
        add(problem.is_null(), problem)
    return type("Door", (dy.Schema,), members), messages


def _format(words: str, value: pl.Expr) -> pl.Expr:
    """Words with a value in place of the NUL in them."""
    before, after = words.split("\0")
    return pl.concat_str(pl.lit(before), value.cast(pl.String), pl.lit(after))


# What readers say of single values


def wrong_text(column: str, kind: str) -> str:
    """The reason of a value that isn't text."""
    return as_text(f"column {column!r} must be text, got {kind}")


def missing(column: str, found: Mapping[str, Any] | list[str]) -> str:
    """The reason of a column that isn't there."""
    return as_text(f"column {column!r} is missing; found {', '.join(map(str, found))}")


def bad_text(column: str, value: str, *, damaged: bool) -> str | None:
    """Say why UTF-8 can't carry a text, or None.

    Args:
        column: the column's name.
        value: the text; bytes that weren't UTF-8 stand in it as Python's surrogate escapes.
        damaged: whether it may hold such bytes; otherwise a surrogate is one that was written.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        if damaged and "\udc80" <= value[error.start] <= "\udcff":
            return bad_bytes(column, len(value[: error.start].encode("utf-8")))
        return as_text(f"column {column!r} holds a lone surrogate, which UTF-8 can't carry")
    return None


def bad_bytes(column: str, position: int) -> str:
    """The reason of a value whose bytes aren't UTF-8."""
    return as_text(f"column {column!r} is not UTF-8 at byte {position}")


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NO_NUMBER = re.compile(r"|[+-]?(nan|inf|infinity)|null|none", re.IGNORECASE)


def number_of(column: str, value: object) -> tuple[float | None, str | None]:
    """A value as a finite number, None where it's missing; or the reason why it isn't one."""
    if isinstance(value, str):
        stripped = value.strip()
        if _NO_NUMBER.fullmatch(stripped):
            return None, None
        if not _NUMBER.fullmatch(stripped):
            return None, as_text(f"column {column!r} must be a number, got {value[:40]!r}")
        value = float(stripped)
    if value is None:
        return None, None
    if isinstance(value, bool | int | float):
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            return None, None
        return (number, None) if math.isfinite(number) else (None, None)
    return None, as_text(f"column {column!r} must be a number, got {type(value).__name__}")


def conversation(column: str, value: object, *, damaged: bool = False) -> tuple[str, int] | str:
    """A chat as text, and how many of its characters stand before the last assistant's answer.

    Earlier messages become the role, a line end and the content; later ones are dropped.

    Returns:
        (text, prompt_chars), or the reason why there's none.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            return as_text(f"column {column!r} is not JSON: {error}")
    what = f"column {column!r}"
    if not isinstance(value, list):
        return as_text(f"{what} must be a list of messages, got {type(value).__name__}")
    parts: list[tuple[str, str]] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return as_text(f"{what} must hold objects, got {type(message).__name__} at {i}")
        pair = []
        for key in ("role", "content"):
            part = message.get(key)
            if not isinstance(part, str):
                return as_text(f"{what} needs text as {key}, got {type(part).__name__} at {i}")
            problem = bad_text(column, part, damaged=damaged)
            if problem is not None:
                return problem
            pair.append(part)
        parts.append((pair[0], pair[1]))
    last = max((i for i, (role, _) in enumerate(parts) if role == "assistant"), default=None)
    if last is None:
        return as_text(f"{what} holds no message of the assistant")
    if not parts[last][1].strip():
        return as_text(f"{what} ends in an empty answer")
    prompt = "".join(f"{role}\n{content}{SEPARATOR}" for role, content in parts[:last])
    return prompt + parts[last][1], len(prompt)


def parse_json(text: str) -> Any:
    """Parse JSON, refusing objects that name a key twice.

    Raises:
        ValueError: with the reason.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"key {twice!r} stands twice in an object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


# What readers say of files


class UnreadableFileError(Exception):
    """A file that can't be read, or not to its end."""


def readable(pieces: Iterable, what: str) -> Iterator:
    """Pass on what is read; what libraries raise at damage becomes one exception."""
    import pyarrow as pa

    # ValueError: text of a damaged schema that isn't UTF-8; ArrowInvalid, too.
    damage = (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        OverflowError,
        MemoryError,
        pa.ArrowException,
    )
    iterator = iter(pieces)
    while True:
        try:
            piece = next(iterator, None)
        except damage as error:
            raise UnreadableFileError(f"not readable{what}: {error}") from error
        if piece is None:
            return
        yield piece


def check_columns(found: list[str], columns: ColumnMap) -> None:
    """Refuse a file that lacks a column of text, or has one that is wanted twice."""
    for column in columns.texts.values():
        if column not in found:
            raise UnreadableFileError(missing(column, found))
    for column in columns.wanted:
        if found.count(column) > 1:
            raise UnreadableFileError(as_text(f"column {column!r} stands twice in the file"))
