"""The domains of a mixture as a trainer's sources: an id, files, rows and tokens of each.

A trainer that mixes by rows needs the mean tokens of a row, since the mixture is in shares of
tokens. Domains keep their label as data; files and names of datasets go by an id made of it. The
pool's own files are named only where every row in them is a document of its domain: a trainer reads
whatever else they hold, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.pool_files import PoolFile, is_url, pool_files
from causalmix_pipeline.adapters.pool_reader import read_batches
from causalmix_pipeline.adapters.profiler import PoolSpec

#: Letters of a label that an id keeps.
_ID_LETTERS = 40

#: A label that can be its own id.
_IS_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")

#: What a trainer's loader would read as a pattern or a chain of file systems.
_PATTERN = re.compile(r"[*?\[\]{}:]")

#: Endings of pool files that trainers read -> their name in Hugging Face `datasets`.
BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class SourceFile:
    """A file with documents of one domain.

    Attributes:
        path: name below the pool's location, or an absolute path.
        rows: documents in it.
    """

    path: str
    rows: int


@dataclass(frozen=True)
class Source:
    """A domain as a trainer reads it.

    Attributes:
        domain: its label.
        id: a name of lower-case letters, digits, `-` and `_`, for files and datasets.
        share: of training tokens, as the mixture asks.
        rows: distinct documents; of a sample, those in its files with their repeats.
        n_tokens: tokens of these.
        files: that hold its documents and, as far as is known, nothing else; empty where there are
            none.
    """

    domain: str
    id: str
    share: float
    rows: int
    n_tokens: int
    files: tuple[SourceFile, ...] = ()

    @property
    def is_drawn(self) -> bool:
        """Whether a trainer draws from it: it has a share, and a row."""
        return self.share > 0 and self.rows > 0

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a row; 0 without rows."""
        return self.n_tokens / self.rows if self.rows else 0.0

    @property
    def builder(self) -> str:
        """Name of the files' format in Hugging Face `datasets`."""
        return BUILDERS[os.path.splitext(self.files[0].path)[1]]


def domain_ids(domains: Sequence[str]) -> list[str]:
    """A different id for each label: the label itself where it can be one."""
    taken = {domain for domain in domains if _IS_ID.fullmatch(domain)}
    ids = []
    for d, domain in enumerate(domains):
        if domain in taken:
            ids.append(domain)
            continue
        letters = re.sub(r"[^a-z0-9]+", "-", domain.lower()).strip("-")[:_ID_LETTERS].strip("-")
        new = f"domain-{d:02d}-{letters}".rstrip("-")
        while new in taken:
            new += "-x"
        taken.add(new)
        ids.append(new)
    return ids


def pool_sources(
    documents: pl.DataFrame, domains: Sequence[str], mixture_D: np.ndarray
) -> tuple[Source, ...]:
    """The domains as they stand in the pool.

    Args:
        documents: a row per distinct document of every domain that was read; no augmented ones.
        domains: D labels.
        mixture_D: shares of tokens; shape (D,).

    Returns:
        D sources; files by their names in the pool. None for a domain of which a file holds another
        domain, or misses a row among its documents: one that was refused, left out or repeats
        another. Rows after the last document are seen by `placed_sources`, which counts.
    """
    row = pl.col("row")
    has_no_gap = (row.n_unique() == pl.len()) & (row.max() == pl.len() - 1)
    whole = documents.group_by("file").agg(is_whole=has_no_gap & (pl.col("domain").n_unique() == 1))
    by_file = (
        documents.group_by("domain", "file")
        .agg(rows=pl.len().cast(pl.Int64), n_tokens=pl.col("n_tokens").sum())
        .join(whole, on="file")
        .sort("domain", "file")
    )
    rows: Mapping = by_file.partition_by("domain", as_dict=True)
    sources = []
    for d, (domain, name) in enumerate(zip(domains, domain_ids(domains), strict=True)):
        own = rows.get((domain,), by_file.clear())
        files = tuple(SourceFile(*row) for row in own.select("file", "rows").iter_rows())
        n_rows, n_tokens = int(own["rows"].sum()), int(own["n_tokens"].sum())
        files = files if own["is_whole"].all() else ()
        sources.append(Source(domain, name, float(mixture_D[d]), n_rows, n_tokens, files))
    return tuple(sources)


def placed_sources(sources: Sequence[Source], pool: PoolSpec, folder: Path) -> tuple[Source, ...]:
    """The sources with absolute paths: the pool's own files where trainers can read them.

    Otherwise the first file that a sample by domain has below `folder`; it may be missing yet. That
    is also so where a file has more rows than documents are known of it.
    """
    found = {file.name: file for file in pool_files(pool.location)}
    drawn = [source for source in sources if source.is_drawn]
    wanted = [file for source in drawn for file in source.files]
    if all(
        _readable([found[f.path].url if f.path in found else "" for f in source.files])
        for source in drawn
    ) and all(_has_rows(found[file.path], file.rows, pool) for file in wanted):
        return tuple(
            replace(s, files=tuple(SourceFile(found[f.path].url, f.rows) for f in s.files))
            if s.is_drawn
            else s
            for s in sources
        )
    return tuple(
        replace(s, files=(SourceFile(str(domain_folder(folder, s) / "part-00000.jsonl"), s.rows),))
        for s in sources
    )


def domain_folder(folder: Path, source: Source) -> Path:
    """Where a sample by domain keeps the shards of a domain."""
    return folder / "domains" / source.id


def is_placed_below(folder: Path, source: Source) -> bool:
    """Whether the first file of a source is, or will be, in the folder of its sample."""
    return bool(source.files) and source.files[0].path.startswith(
        f"{domain_folder(folder, source)}{os.sep}"
    )


def _readable(paths: Sequence[str]) -> bool:
    """Whether a trainer's loader takes the paths for files, all of one format that it knows."""
    endings = {os.path.splitext(path)[1] for path in paths}
    return len(endings) == 1 and endings <= set(BUILDERS) and not any(map(_is_odd, paths))


def _has_rows(file: PoolFile, n: int, pool: PoolSpec) -> bool:
    """Whether a file has just so many rows, refused ones counted; one not readable hasn't."""
    try:
        if file.format == "jsonl":
            return _n_lines(file) == n
        if file.format == "parquet":
            import pyarrow.parquet as pq

            return pq.read_metadata(file.url).num_rows == n
    except (OSError, ValueError):  # Arrow's own are among them
        return False
    n_rows = 0
    for batch in read_batches(file, pool.columns, pool.rules):
        n_rows += batch.n_rows
        if batch.quarantine.height or n_rows > n:
            return False
    return n_rows == n


def _n_lines(file: PoolFile) -> int:
    """Lines of a file, empty ones too."""
    n, last = 0, b"\n"
    with file.open() as raw:
        while piece := raw.read(2**20):
            n, last = n + piece.count(b"\n"), piece[-1:]
    return n + (last != b"\n")


def _is_odd(path: str) -> bool:
    return is_url(path) or not path.isprintable() or _PATTERN.search(path) is not None
