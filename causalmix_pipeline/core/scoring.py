"""What is asked of a scorer: metrics of documents, each a function of the document's content."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import polars as pl


@runtime_checkable
class Scorer(Protocol):
    """Measures some metrics of documents in one pass.

    A scorer is plain data that can be sent to another process; it loads what it needs there.
    """

    @property
    def key(self) -> str:
        """Name and version of all that the values depend on; lower-case letters, digits, "-"."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        ...

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Measure documents.

        Args:
            documents: `document_id`, `fold_id` (the id that decides the half of the pool:
                of a noisy twin its original's), `text`, `prompt_chars` (characters of the text
                before the response, 0 for plain text).

        Returns:
            `document_id` and `metrics`, the same rows in the same order.
        """
        ...
