"""Handing a recommendation to training: how many tokens of which documents, how often."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl

from causalmix_pipeline.resources.frame_store import write_value


@runtime_checkable
class MixtureExporter(Protocol):
    """Where a recommended mixture goes."""

    def export(self, mixture: Mapping[str, Any], manifest: pl.DataFrame) -> dict[str, str]:
        """Write the mixture and its manifest; return what was written by name."""
        ...


class FolderExporter:
    """Writes `mixture.json` and `manifest.parquet` into a folder, each whole or not at all."""

    def __init__(self, folder: Path):
        """Set up; the folder is made at the first export."""
        self.folder = folder

    def export(self, mixture: Mapping[str, Any], manifest: pl.DataFrame) -> dict[str, str]:
        """Write both files; return their paths."""
        manifest_path, mixture_path = self.folder / "manifest.parquet", self.folder / "mixture.json"
        write_value(manifest_path, manifest)
        temporary = self.folder / f".mixture.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(mixture, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, mixture_path)
        return {"mixture": str(mixture_path), "manifest": str(manifest_path)}


def build_manifest(
    documents: pl.DataFrame, mixture: Mapping[str, float], *, budget_tokens: float, seed: int
) -> pl.DataFrame:
    """List which documents to train on, and how often, so that each domain gets its share.

    A domain is read in a random order, as often as its share needs; the last pass ends at the
    document that fills the share, so a domain is off by less than one document.

    Args:
        documents: the live documents frame.
        mixture: domain to share of the training tokens.
        budget_tokens: tokens of the training run; > 0.
        seed: of the order.

    Returns:
        Columns `document_id`, `domain`, `source`, `file`, `row`, `n_tokens`, `times` (>= 1).
    """
    parts = []
    for number, (domain, share) in enumerate(mixture.items()):
        part = documents.filter((pl.col("domain") == domain) & ~pl.col("augmented"))
        part = part.sort("document_id")
        n_tokens = part["n_tokens"].to_numpy()
        order = np.random.default_rng([seed, number]).permutation(part.height)
        whole, rest = divmod(share * budget_tokens, max(float(n_tokens.sum()), 1.0))
        before = np.cumsum(n_tokens[order]) - n_tokens[order]
        times = np.zeros(part.height, dtype=np.int64)
        times[order] = int(whole) + (before + n_tokens[order] / 2 < rest)
        parts.append(part.with_columns(times=pl.Series(times)).filter(pl.col("times") > 0))
    columns = ["document_id", "domain", "source", "file", "row", "n_tokens", "times"]
    return pl.concat(parts).select(columns)
