"""A scorer that says what it scored, and takes its time if asked."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl


@dataclass(frozen=True)
class CountingScorer:
    """Scores a document's length, and notes each in a file of the process.

    Attributes:
        log: folder of the notes.
        version: part of the key.
        seconds: of each chunk.
    """

    log: Path
    version: int = 1
    seconds: float = 0.0

    @property
    def key(self) -> str:
        return f"counting-v{self.version}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("length",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        time.sleep(self.seconds)
        self.log.mkdir(parents=True, exist_ok=True)
        with open(self.log / f"{self.key}-{os.getpid()}", "a") as file:
            file.writelines(f"{identity}\n" for identity in documents["document_id"])
        return documents.select(
            "document_id", length=pl.col("text").str.len_chars().cast(pl.Float64) + self.version
        )

    def scored(self) -> list[str]:
        """Ids of the documents that were scored, in any process, once each time."""
        notes = self.log.glob(f"{self.key}-*")
        return [line for note in notes for line in note.read_text().splitlines()]
