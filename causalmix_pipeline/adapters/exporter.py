"""Hands a mixture to a trainer: which documents to train on, and how often.

`mixture.json` says what was decided; `manifest.parquet` lists documents and copies. A domain's
documents are read in whole passes and one seeded partial pass, so that its tokens hit their target
to within one document. A trainer's own format is another `Exporter` (`trainer_formats.py`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.run_store import write_atomically
from causalmix_pipeline.adapters.trainer_sources import Source, pool_sources
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.mixture import check_mixture

#: Columns of the manifest.
MANIFEST_COLUMNS = ("document_id", "domain", "source", "file", "row", "n_tokens", "copies")


@dataclass(frozen=True, eq=False)
class Export:
    """A mixture and the documents that realise it.

    Attributes:
        domains: D labels, in the mixture's order.
        mixture_D: shares of training tokens.
        budget_tokens: tokens of the training run.
        manifest: a row per document that is read at all: `MANIFEST_COLUMNS`; `copies` is how
            often it is read in the run.
        available_D: distinct tokens of each domain.
        seed: of the partial passes.
        verdict: of the overlap check.
        fingerprints: what this was made from, by name.
        sources: the D domains as a trainer reads them.
        columns: what the columns of the pool's files mean.
        sample: files of a sample that was written of it: `jsonl` or `parquet`; None before.
        sample_files: absolute paths of a sample in one stream; empty for one by domain.
    """

    domains: tuple[str, ...]
    mixture_D: np.ndarray
    budget_tokens: int
    manifest: pl.DataFrame
    available_D: np.ndarray
    seed: int
    verdict: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    columns: ColumnMap = field(default_factory=ColumnMap)
    sample: str | None = None
    sample_files: tuple[str, ...] = ()

    @property
    def text_fields(self) -> list[str]:
        """Columns of the files that hold what is trained on."""
        if self.sample is None:
            texts = self.columns.texts
            return [texts[role] for role in ("messages", "prompt", "response", "text")
                    if role in texts]  # fmt: skip
        return ["prompt", "response"] if self.has_prompts else ["text"]

    @property
    def has_prompts(self) -> bool:
        """Whether a document of the pool is a prompt and its response."""
        return "text" not in self.columns.texts

    def tokens_of(self) -> dict[str, int]:
        """Tokens that the run reads of each domain, repeats counted."""
        read = dict(
            self.manifest.group_by("domain")
            .agg((pl.col("n_tokens") * pl.col("copies")).sum())
            .iter_rows()
        )
        return {domain: int(read.get(domain, 0)) for domain in self.domains}

    def to_dict(self) -> dict:
        """What `mixture.json` holds."""
        tokens = self.tokens_of()
        return {
            "unit": "share of training tokens",
            "verdict": self.verdict,
            "weights": dict(zip(self.domains, self.mixture_D.tolist(), strict=True)),
            "budget_tokens": self.budget_tokens,
            "tokens": tokens,
            "epochs": {
                domain: tokens[domain] / float(available) if available else 0.0
                for domain, available in zip(self.domains, self.available_D, strict=True)
            },
            "seed": self.seed,
            "fingerprints": dict(self.fingerprints),
        }


@runtime_checkable
class Exporter(Protocol):
    """Writes an export in a trainer's format."""

    def write(self, folder: Path, export: Export) -> list[Path]:
        """Write the files below `folder`, each whole or not at all, and return their paths."""
        ...


class ManifestExporter:
    """`mixture.json` and `manifest.parquet`. The manifest comes first, so the JSON never lies."""

    def paths(self, folder: Path, export: Export) -> list[Path]:
        """The files that `write` makes."""
        return [folder / "mixture.json", folder / "manifest.parquet"]

    def write(self, folder: Path, export: Export) -> list[Path]:
        """Write both files; the same export gives the same bytes."""
        content = io.BytesIO()
        export.manifest.write_parquet(content, compression="zstd")
        mixture, manifest = self.paths(folder, export)
        write_atomically(manifest, content.getvalue())
        text = json.dumps(export.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(mixture, text.encode("utf-8"))
        return [mixture, manifest]


def make_export(
    mixture: Sequence[float] | np.ndarray,
    domains: Sequence[str],
    documents: pl.DataFrame,
    *,
    budget_tokens: int,
    seed: int,
    verdict: str,
    fingerprints: Mapping[str, str],
    columns: ColumnMap | None = None,
) -> Export:
    """Choose the documents for a mixture, and how often each is read.

    Args:
        mixture: shares of training tokens; shape (D,).
        domains: D labels.
        documents: the documents frame of the live pool; augmented rows are left out.
        budget_tokens: tokens of the training run.
        seed: decides which documents the partial pass reads, and the order of a sample.
        verdict: of the overlap check, kept in `mixture.json`.
        fingerprints: what this was made from, by name.
        columns: what the columns of the pool's files mean.

    Raises:
        ConfigError: for a mixture off the simplex, or a budget that holds no document.
        PoolError: if a domain with a share has no document.
    """
    mixture_D = check_mixture(np.asarray(mixture, dtype=float), field="mixture")
    if budget_tokens < 1:
        raise ConfigError(
            f"policy.budget_tokens must be >= 1, got {budget_tokens}: a run needs tokens."
        )
    usable = (
        documents.filter(~pl.col("augmented"))
        .select(MANIFEST_COLUMNS)
        .sort("domain", "document_id")
    )
    parts, available = [], []
    for d, domain in enumerate(domains):
        part = usable.filter(pl.col("domain") == domain)
        available.append(int(part["n_tokens"].sum()))
        target = float(mixture_D[d]) * budget_tokens
        if target >= 1 and not available[-1]:
            raise PoolError(
                f"domain {domain!r} must have documents for its share of {mixture_D[d]:.4g}, got "
                "none. Add documents, or give it no share."
            )
        copies = count_copies(part["n_tokens"].to_numpy(), target, rng_seed=[seed, d])
        parts.append(part.with_columns(copies=pl.Series(copies, dtype=pl.Int64)))
    manifest = pl.concat(parts).filter(pl.col("copies") > 0).select(MANIFEST_COLUMNS)
    if manifest.is_empty():
        raise ConfigError(
            "the budget of a run must hold at least one document at the share of its domain, got "
            f"{budget_tokens} tokens: raise --tokens, or export.tokens in the settings."
        )
    return Export(
        domains=tuple(domains),
        mixture_D=mixture_D,
        budget_tokens=int(budget_tokens),
        manifest=manifest,
        available_D=np.array(available),
        seed=seed,
        verdict=verdict,
        fingerprints=fingerprints,
        sources=pool_sources(usable, domains, mixture_D),
        columns=columns or ColumnMap(),
    )


def count_copies(
    n_tokens: np.ndarray, target_tokens: float, *, rng_seed: Sequence[int]
) -> np.ndarray:
    """How often each document of a domain is read so that their tokens come near a target.

    Whole passes first, then documents in a random order while that brings the sum nearer.

    Args:
        n_tokens: tokens of each document; shape (n,).
        target_tokens: tokens wanted, >= 0.
        rng_seed: seed of the order.

    Returns:
        Copies, shape (n,); their tokens miss the target by at most half of the longest document.
    """
    n_tokens = np.asarray(n_tokens, dtype=np.int64)
    total = int(n_tokens.sum())
    if total == 0:
        return np.zeros(len(n_tokens), dtype=np.int64)
    passes = int(target_tokens // total)
    rest = target_tokens - passes * total
    copies = np.full(len(n_tokens), passes, dtype=np.int64)
    order = np.random.default_rng(list(rng_seed)).permutation(len(n_tokens))
    running = np.concatenate([[0], np.cumsum(n_tokens[order])])
    n_more = int(np.argmin(np.abs(running - rest)))
    copies[order[:n_more]] += 1
    return copies
