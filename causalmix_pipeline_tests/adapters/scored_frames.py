"""Frames that scorers take, and documents that break careless ones."""

from __future__ import annotations

import polars as pl

from causalmix_pipeline.adapters.document_ids import document_id

#: Empty, blank, one word, signs alone, scripts without ASCII, marks, emoji, controls, long lines.
HARD_TEXTS = (
    "", " ", "\n\n", "a", "word", "!!!", "日本語のテキスト", "नमस्ते दुनिया", "👩\u200d👧 😀😀",
    "\x01\x1c\x1f", "é" * 300, "İSTANBUL \u017fince", "ΣΑΣ σας", "x " * 500, "a\r\nb\r\nb\r\n",
    "\u2028a\u0085b\u00a0c", "𝄞𝄞 𝄞", "\uff41\uff42 \uff11", "A" * 5000, "İ", "yes yes", "一" * 50,
)  # fmt: skip


def frame_of(*texts: str, fold_ids: list[str] | None = None) -> pl.DataFrame:
    """Documents as scorers take them."""
    ids = [document_id(text) for text in texts]
    return pl.DataFrame(
        {
            "document_id": ids,
            "fold_id": ids if fold_ids is None else fold_ids,
            "text": list(texts),
            "prompt_chars": [0] * len(texts),
        },
        schema={
            "document_id": pl.String,
            "fold_id": pl.String,
            "text": pl.String,
            "prompt_chars": pl.Int64,
        },
    )
