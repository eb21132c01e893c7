"""Reads the documents of a pool, whatever format they are in.

Nothing is dropped in silence: a row or file that can't be used becomes a row of the quarantine
table with its file, row and reason. Labels from the data (domains, sources, groups) stay data:
no path, query or name is ever built from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from causalmix_pipeline.adapters.pool_arrow import read_arrow, read_parquet
from causalmix_pipeline.adapters.pool_door import (
    DOCUMENT_SCHEMA,
    QUARANTINE_SCHEMA,
    ColumnMap,
    DoorRules,
    PoolBatch,
    UnreadableFileError,
    judge,
    refuse_file,
)
from causalmix_pipeline.adapters.pool_files import PoolFile, as_text, pool_files
from causalmix_pipeline.adapters.pool_text import read_csv, read_jsonl
from causalmix_pipeline.core.errors import PoolError

DEFAULT_RULES = DoorRules()
_READERS = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


@dataclass(frozen=True, eq=False)
class PoolDocuments:
    """What was read: a row per distinct (domain, text), and what was refused."""

    documents: pl.DataFrame  # DOCUMENT_SCHEMA, numbers, copies; sorted by domain and document_id
    quarantine: pl.DataFrame  # QUARANTINE_SCHEMA; row is null where (the rest of) a file is refused
    n_rows: int

    @property
    def rejected_share(self) -> float:
        """Refused rows and files over all rows and refused files."""
        n_files = self.quarantine["row"].null_count()
        return self.quarantine.height / max(self.n_rows + n_files, 1)


def read_pool(
    location: str | Path,
    columns: ColumnMap,
    *,
    domains: Sequence[str] | None = None,
    max_rejected_share: float = 1.0,
    rules: DoorRules = DEFAULT_RULES,
) -> PoolDocuments:
    """Read all documents of a pool into memory.

    Args:
        location: as for `pool_files`.
        columns: what the files' columns mean.
        domains: keep these only, others are left out on purpose; None keeps all.
        max_rejected_share: refuse the pool if more of it is quarantined; 0..1.
        rules: limits on documents and files.

    Raises:
        PoolError: if there's no file, no usable document, a listed domain has none, or too large
            a share was rejected. The message names the first reasons.
    """
    schema = DOCUMENT_SCHEMA | dict.fromkeys(columns.numbers, pl.Float64)
    documents, quarantine, n_rows = [pl.DataFrame(schema=schema)], [], 0
    for file in pool_files(location):
        for batch in read_batches(file, columns, rules):
            n_rows += batch.n_rows
            quarantine.append(batch.quarantine)
            if batch.documents.height:
                documents.append(batch.documents)
    frame = pl.concat(documents)
    if domains is not None:
        frame = frame.filter(pl.col("domain").is_in(list(domains)))
    refused = pl.concat([pl.DataFrame(schema=QUARANTINE_SCHEMA), *quarantine])
    pool = PoolDocuments(distinct_documents(frame), refused, n_rows)
    check_usable(pool, location, domains, max_rejected_share)
    return pool


def read_batches(
    file: PoolFile,
    columns: ColumnMap,
    rules: DoorRules = DEFAULT_RULES,
    *,
    batch_bytes: int = 8 * 2**20,
) -> Iterator[PoolBatch]:
    """Read a file in pieces of about `batch_bytes` of text, refused rows with their reasons.

    Rows before damage are kept; the last batch then names the file, without a row. A file that
    can't be read is no error: it's such a batch.
    """
    read = _READERS[file.format]
    try:
        for offered in read(file, columns, rules, batch_bytes):
            yield judge(offered, file, columns, rules)
    except UnreadableFileError as error:
        yield refuse_file(file, str(error))


def distinct_documents(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per (domain, text): the first by file and row, with the number of copies."""
    return (
        frame.sort("domain", "document_id", "file", "row")
        .with_columns(copies=pl.len().over("domain", "document_id").cast(pl.Int64))
        .unique(["domain", "document_id"], keep="first", maintain_order=True)
    )


def check_usable(
    pool: PoolDocuments,
    location: str | Path,
    domains: Sequence[str] | None,
    max_rejected_share: float,
) -> None:
    """Refuse a pool without usable documents, or with too many that were rejected.

    Raises:
        PoolError: as `read_pool`.
    """
    location = as_text(str(location))
    shown = "; ".join(
        f"{file}{'' if row is None else f' row {row}'}: {reason}"
        for file, row, reason in pool.quarantine.head(3).iter_rows()
    )
    found = pool.documents["domain"].unique().sort().to_list()
    absent = [d for d in domains or () if d not in found]
    if absent:
        raise PoolError(
            f"domains lists {absent[0]!r}, but {location} has no usable document of it (found: "
            f"{', '.join(found) or 'none'}). Correct the name, or add documents. {shown}".rstrip()
        )
    if pool.documents.is_empty():
        raise PoolError(
            f"{location} has no usable document. First reasons: {shown or 'empty files'}"
        )
    if pool.rejected_share > max_rejected_share:
        raise PoolError(
            f"quality.max_rejected_share is {max_rejected_share:g}, but {pool.rejected_share:.3f} "
            f"of {location} was rejected. Mend the files or raise the limit. First reasons: {shown}"
        )
