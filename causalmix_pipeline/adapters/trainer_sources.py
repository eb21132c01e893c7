"""The domains of a mixture as a trainer's sources: an id, files, rows and tokens of each.

A trainer that mixes by rows needs the mean tokens of a row, since the mixture is in shares of
tokens. Domains keep their label as data; files and names of datasets go by an id made of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.pool_files import is_url, pool_files

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
        rows: documents in one pass over its files, repeats in them included.
        n_tokens: tokens of these.
        files: that hold its documents and none of another domain; empty where there are none.
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
        documents: a row per distinct document, with `copies` in the pool; no augmented ones.
        domains: D labels.
        mixture_D: shares of tokens; shape (D,).

    Returns:
        D sources; files by their names in the pool, none where a file holds several domains.
    """
    by_file = (
        documents.group_by("domain", "file")
        .agg(pl.col("copies").sum(), n_tokens=(pl.col("copies") * pl.col("n_tokens")).sum())
        .sort("domain", "file")
    )
    are_apart = by_file["file"].n_unique() == by_file.height
    rows: Mapping = by_file.partition_by("domain", as_dict=True)
    sources = []
    for d, (domain, name) in enumerate(zip(domains, domain_ids(domains), strict=True)):
        own = rows.get((domain,), by_file.clear())
        files = tuple(SourceFile(*row) for row in own.select("file", "copies").iter_rows())
        n_rows, n_tokens = int(own["copies"].sum()), int(own["n_tokens"].sum())
        share = float(mixture_D[d])
        sources.append(Source(domain, name, share, n_rows, n_tokens, files if are_apart else ()))
    return tuple(sources)


def placed_sources(
    sources: Sequence[Source], location: str | Path, folder: Path
) -> tuple[Source, ...]:
    """The sources with absolute paths: the pool's own files where trainers can read them.

    Otherwise the first file that a sample by domain has below `folder`; it may be missing yet.
    """
    urls = {file.name: file.url for file in pool_files(location)}
    wanted = [[urls.get(f.path, "") for f in s.files] for s in sources if s.is_drawn]
    if all(_readable(paths) for paths in wanted):
        return tuple(
            replace(s, files=tuple(SourceFile(urls[f.path], f.rows) for f in s.files))
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


def _is_odd(path: str) -> bool:
    return is_url(path) or not path.isprintable() or _PATTERN.search(path) is not None
