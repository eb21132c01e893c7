"""Reads the documents of a pool from a folder of JSONL and Parquet files.

Nothing is dropped in silence: a row or file that can't be used becomes a row of the quarantine
table with its file, row and reason. Labels from the data (domains, sources, groups) stay data:
no path, query or name is ever built from them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from causalmix_pipeline.adapters.document_scores import document_id
from causalmix_pipeline.core.errors import PoolError

#: A longer document is quarantined: it would be a large part of a small domain by itself.
MAX_DOCUMENT_BYTES = 4 * 2**20
#: Characters of a reason that are kept: a bad row may be large itself.
MAX_REASON_CHARS = 500

DOCUMENT_SCHEMA = {
    "document_id": pl.String,
    "domain": pl.String,
    "source": pl.String,
    "group": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "copies": pl.Int64,
    "text": pl.String,
}
QUARANTINE_SCHEMA = {"file": pl.String, "row": pl.Int64, "reason": pl.String}


@dataclass(frozen=True)
class ColumnMap:
    """Which column of the files holds what.

    Attributes:
        text: the document's text.
        domain: its domain; None takes the name of the file's folder.
        source: where it comes from; None takes the file's name without ending.
        group: documents that must not be split between training and evaluation; None takes each
            document for itself.
    """

    text: str = "text"
    domain: str | None = None
    source: str | None = None
    group: str | None = None


@dataclass(frozen=True, eq=False)
class PoolDocuments:
    """What was read: a row per distinct (domain, text), and what was refused."""

    documents: pl.DataFrame  # DOCUMENT_SCHEMA, sorted by domain and document_id
    quarantine: pl.DataFrame  # QUARANTINE_SCHEMA; row is null where the whole file is refused
    n_rows: int

    @property
    def rejected_share(self) -> float:
        """Refused rows and files over all rows and refused files."""
        n_files = self.quarantine["row"].null_count()
        return self.quarantine.height / max(self.n_rows + n_files, 1)


def pool_files(folder: Path) -> list[Path]:
    """The data files of a pool, sorted; hidden files and files being written are left out.

    Raises:
        PoolError: if the folder doesn't exist or holds no data file.
    """
    if not folder.is_dir():
        raise PoolError(f"pools: {folder} is not a folder. Check `pools` in the settings.")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".jsonl", ".parquet")
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise PoolError(
            f"pools: {folder} holds no .jsonl or .parquet file. Put documents there, in one "
            "folder per domain or with a domain column (`columns.domain`)."
        )
    return files


def pool_fingerprint(folder: Path) -> str:
    """A hash of the pool's file names and contents."""
    digest = hashlib.sha256()
    for path in pool_files(folder):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_pool(
    folder: Path,
    columns: ColumnMap,
    *,
    domains: Sequence[str] | None = None,
    max_rejected_share: float = 1.0,
) -> PoolDocuments:
    """Read all documents of a pool.

    Args:
        folder: searched for files in all its folders.
        columns: what the files' columns mean.
        domains: keep these only, others are left out on purpose; None keeps all.
        max_rejected_share: refuse the pool if more of it is quarantined; 0..1.

    Raises:
        PoolError: if there's no file, no usable document, a listed domain has none, or too large
            a share was rejected. The message names the first reasons.
    """
    folder = Path(os.path.abspath(folder))  # a folder given as "." has a name, too
    rows, refused, n_rows = [], [], 0
    for path in pool_files(folder):
        name = _as_text(str(path.relative_to(folder)))
        try:
            for number, record in _records(path, columns):
                n_rows += 1
                reason = record if isinstance(record, str) else _refusal(record, columns)
                if reason is None:
                    assert isinstance(record, dict)
                    rows.append(_document(path, name, number, record, columns))
                else:
                    refused.append((name, number, _as_text(reason[:MAX_REASON_CHARS])))
        except _UnreadableFileError as error:
            refused.append((name, None, _as_text(str(error)[:MAX_REASON_CHARS])))
    quarantine = pl.DataFrame(refused, schema=QUARANTINE_SCHEMA, orient="row")
    frame = pl.DataFrame(rows, schema=DOCUMENT_SCHEMA, orient="row")
    if domains is not None:
        frame = frame.filter(pl.col("domain").is_in(list(domains)))
    pool = PoolDocuments(_distinct(frame), quarantine, n_rows)
    _check_usable(pool, folder, domains, max_rejected_share)
    return pool


class _UnreadableFileError(Exception):
    """A file that can't be read, or not to its end."""


def _as_text(name: str) -> str:
    """A path or reason as UTF-8 can carry it, whatever bytes a file's name or a bad row holds."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _records(path: Path, columns: ColumnMap) -> Iterator[tuple[int, dict | str]]:
    """Yield (row number, record), or (row number, reason) for a row that doesn't parse."""
    if path.suffix == ".parquet":
        named = (columns.text, columns.domain, columns.source, columns.group)
        wanted = list(dict.fromkeys(column for column in named if column))
        try:
            # A name may hold brackets, which aren't a pattern. Some damage makes Polars panic.
            frame = pl.read_parquet(path, glob=False)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise _UnreadableFileError(f"not readable as Parquet: {error}") from error
        missing = [c for c in wanted if c not in frame.columns]
        if missing:
            raise _UnreadableFileError(
                f"column {missing[0]!r} is missing; found {', '.join(frame.columns)}"
            )
        yield from enumerate(frame.select(wanted).iter_rows(named=True))
        return
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file):
                if number == 0:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if raw.strip():
                    yield number, _parse(raw)
    except OSError as error:
        raise _UnreadableFileError(f"not readable: {error}") from error


def _parse(raw: bytes) -> dict | str:
    """The record of a JSONL line, or why there's none."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits, too
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else "not a JSON object"


def _refusal(record: dict, columns: ColumnMap) -> str | None:
    """Say why a record can't be used, or None."""
    for name in (columns.text, columns.domain, columns.source, columns.group):
        if name is None:
            continue
        if name not in record:
            return f"column {name!r} is missing; found {', '.join(map(str, record))}"
        if not isinstance(record[name], str):
            return f"column {name!r} must be text, got {type(record[name]).__name__}"
        try:
            n_bytes = len(record[name].encode("utf-8"))
        except UnicodeEncodeError:
            return f"column {name!r} holds a lone surrogate, which UTF-8 can't carry"
        if n_bytes > MAX_DOCUMENT_BYTES:
            return f"column {name!r} has {n_bytes} bytes; the limit is {MAX_DOCUMENT_BYTES}"
        if not record[name].strip():
            return f"column {name!r} is empty"
    return None


def _document(path: Path, name: str, number: int, record: dict, columns: ColumnMap) -> tuple:
    text = record[columns.text]
    identity = document_id(text)
    return (
        identity,
        record[columns.domain] if columns.domain else _as_text(path.parent.name),
        record[columns.source] if columns.source else _as_text(path.stem),
        record[columns.group] if columns.group else identity,
        name,
        number,
        1,
        text,
    )


def _distinct(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per (domain, text): the first by file and row, with the number of copies."""
    return (
        frame.sort("domain", "document_id", "file", "row")
        .with_columns(copies=pl.len().over("domain", "document_id").cast(pl.Int64))
        .unique(["domain", "document_id"], keep="first", maintain_order=True)
    )


def _check_usable(
    pool: PoolDocuments, folder: Path, domains: Sequence[str] | None, max_rejected_share: float
) -> None:
    shown = "; ".join(
        f"{file}{'' if row is None else f' row {row}'}: {reason}"
        for file, row, reason in pool.quarantine.head(3).iter_rows()
    )
    found = pool.documents["domain"].unique().sort().to_list()
    missing = [d for d in domains or () if d not in found]
    if missing:
        raise PoolError(
            f"domains lists {missing[0]!r}, but {folder} has no usable document of it (found: "
            f"{', '.join(found) or 'none'}). Correct the name, or add documents. {shown}".rstrip()
        )
    if pool.documents.is_empty():
        raise PoolError(f"{folder} has no usable document. First reasons: {shown or 'empty files'}")
    if pool.rejected_share > max_rejected_share:
        raise PoolError(
            f"quality.max_rejected_share is {max_rejected_share:g}, but {pool.rejected_share:.3f} "
            f"of {folder} was rejected. Mend the files or raise the limit. First reasons: {shown}"
        )
