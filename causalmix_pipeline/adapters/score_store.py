"""Scores of documents, kept by content: a document is scored once by each scorer and version.

One folder a scorer key, one Parquet file a scored chunk, named by the hash of its own bytes and
written whole: a damaged file is known by its name. A changed version is another key, so it rescores
that scorer's metrics alone; a document that left a pool isn't asked for any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from causalmix_pipeline.adapters.blobs import write_atomically
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

    def read(self, scorer: Scorer, parts: Sequence[str] | None = None) -> pl.DataFrame:
        """Scores of a scorer: `document_id` and its metrics.

        A document has one row; two with the same values where it was scored twice around a crash.

        Args:
            scorer: whose scores.
            parts: names that `write` gave; None reads all.
        """
        folder = self._folder(scorer)
        paths = self._parts(scorer) if parts is None else [folder / name for name in parts]
        frames = [frame for frame in map(_read_part, paths) if frame is not None]
        if not frames:
            return pl.DataFrame(schema={"document_id": pl.String}).with_columns(
                pl.lit(None, dtype=pl.Float64).alias(name) for name in scorer.metrics
            )
        return pl.concat(frames)

    def has_scores(self, scorer: Scorer) -> bool:
        """Tell whether a scorer has scored anything."""
        return bool(self._parts(scorer))

    def write(self, scorer: Scorer, scores: pl.DataFrame) -> str | None:
        """Keep scores: `document_id` and the scorer's metrics.

        Returns:
            The name of the part; None if there was nothing to keep.
        """
        if scores.is_empty():
            return None
        buffer = io.BytesIO()
        scores.select("document_id", *scorer.metrics).write_parquet(buffer, compression="zstd")
        content = buffer.getvalue()
        name = f"{_name_of(content)}.parquet"
        write_atomically(self._folder(scorer) / name, content)
        return name

    def tidy(self, scorer: Scorer) -> None:
        """Join the parts of a scorer if they are many; only while the store is locked."""
        parts = self._parts(scorer)
        if len(parts) <= MAX_PARTS:
            return
        scores = self.read(scorer).unique("document_id", keep="first")
        self.write(scorer, scores.sort("document_id"))
        for part in parts:
            part.unlink(missing_ok=True)

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


def _name_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _read_part(path: Path) -> pl.DataFrame | None:
    """A part's scores; a damaged part is put aside, and its documents are scored again."""
    content = path.read_bytes()
    if _name_of(content) != path.stem:
        path.replace(path.with_suffix(".damaged"))
        return None
    return pl.read_parquet(io.BytesIO(content))
