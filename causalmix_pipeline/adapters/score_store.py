"""Scores of documents, kept by content: a document is scored once by each scorer and version.

One folder a scorer key, one file a scored chunk, each written whole and sealed. A changed version
is another key, so it rescores that scorer's metrics alone; a document that left a pool isn't asked
for any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from causalmix_pipeline.adapters.sealed_frames import read_value, write_value
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.scoring import Scorer

#: More parts than this are joined into one after scoring: a look-up opens each of them.
MAX_PARTS = 400


@dataclass(frozen=True)
class ScoreStore:
    """Folder of scores.

    Attributes:
        root: holds a folder per scorer key.
    """

    root: Path

    def read(self, scorer: Scorer, documents: pl.DataFrame | None = None) -> pl.DataFrame:
        """The scores of a scorer, one row per document.

        Args:
            scorer: whose scores.
            documents: only those in its column `document_id`; None reads all.

        Returns:
            `document_id` and the scorer's metrics; documents without scores have no row.
        """
        parts = []
        for part in self._parts(scorer):
            frame = _read_part(part)
            if frame is not None and documents is not None:
                frame = frame.join(documents, on="document_id", how="semi")
            if frame is not None:
                parts.append(frame)
        columns = ["document_id", *scorer.metrics]
        if not parts:
            return pl.DataFrame(schema={"document_id": pl.String}).with_columns(
                pl.lit(None, dtype=pl.Float64).alias(name) for name in scorer.metrics
            )
        # A chunk that was scored twice around a crash gave the same values.
        return pl.concat(parts).select(columns).unique("document_id", keep="first")

    def known(self, scorer: Scorer) -> pl.DataFrame:
        """Ids of the documents that a scorer has scored; one column, `document_id`."""
        return self.read(scorer).select("document_id")

    def write(self, scorer: Scorer, scores: pl.DataFrame) -> None:
        """Keep scores: `document_id` and the scorer's metrics."""
        if scores.is_empty():
            return
        scores = scores.select("document_id", *scorer.metrics)
        text = "\n".join(scores["document_id"].to_list())
        name = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        write_value(self._folder(scorer) / f"{name}.parquet", scores)

    def tidy(self, scorer: Scorer) -> None:
        """Join the parts of a scorer if they are many; only while the store is locked."""
        parts = self._parts(scorer)
        if len(parts) <= MAX_PARTS:
            return
        self.write(scorer, self.read(scorer).sort("document_id"))
        for part in parts:
            part.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store while scoring, waiting for another process; dies with its holder.

        Two profiles at the same time would score the same documents twice.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _folder(self, scorer: Scorer) -> Path:
        return self.root / scorer.key

    def _parts(self, scorer: Scorer) -> list[Path]:
        return sorted(self._folder(scorer).glob("[!.]*.parquet"))


def _read_part(path: Path) -> pl.DataFrame | None:
    """A part's scores; a damaged part is put aside, and its documents are scored again."""
    try:
        return read_value(path)
    except PoolError:
        path.replace(path.with_suffix(".damaged"))
        return None
