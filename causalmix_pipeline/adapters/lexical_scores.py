r"""Lexical diversity of a document: MTLD, HD-D, vocd-D, over lower-cased words (`\w+`).

Source: McCarthy & Jarvis 2010, "MTLD, vocd-D, and HD-D", Behavior Research Methods 42(2), which
compares the three; vocd-D's curve is McKee, Malvern & Richards 2000.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.text_scores import character_kinds, float_columns, utf8_bytes


@dataclass(frozen=True)
class LexicalScorer:
    """`mtld` and `hdd` of a document; null where there is no word.

    `mtld`: words over factors, the mean of both directions. A factor ends where the type-token
    ratio of its words comes down to .72; the rest at the end is the part (1 - ratio) / (1 - .72) of
    a factor. A text without a repeated word counts as one factor. Unsteady under about 100 words.

    `hdd`: the mean type-token ratio of 42 words drawn without replacement, by the hypergeometric
    distribution; of a text of fewer words, its own type-token ratio.
    """

    @property
    def key(self) -> str:
        """Name and version."""
        return "lexical-v1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return "mtld", "hdd"

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Measure the lexical diversity of documents."""
        from causalmix_pipeline.adapters.compiled_scores import lexical_diversity

        text_B, offsets = utf8_bytes(documents["text"].str.to_lowercase())
        found = lexical_diversity(text_B, offsets, character_kinds())
        return documents.select("document_id", *float_columns(found, self.metrics))


@dataclass(frozen=True)
class VocdScorer:
    """`vocd_d`: the diversity D whose curve fits the type-token ratios of random samples.

    100 samples of each size from 35 to 50 words, without replacement; D is the least-squares fit of
    ratio(n) = D / n * (sqrt(1 + 2 n / D) - 1); the mean of three repetitions. Random numbers depend
    on the document's id alone. Null under 50 words, and where no sample repeats a word. It costs
    hundreds of times what `hdd` does and measures nearly the same: run it on a sample.
    """

    @property
    def key(self) -> str:
        """Name and version."""
        return "vocd-v1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("vocd_d",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Fit D to each document."""
        from causalmix_pipeline.adapters.compiled_scores import vocd

        text_B, offsets = utf8_bytes(documents["text"].str.to_lowercase())
        seeds = np.array([int(i[:16], 16) for i in documents["document_id"]], dtype=np.uint64)
        found = vocd(text_B, offsets, character_kinds(), seeds)
        return documents.select("document_id", *float_columns(found[:, None], self.metrics))
