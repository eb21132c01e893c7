"""Noisy twins of documents: known bad text that a design can blend into a domain."""

from __future__ import annotations

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.document_ids import document_id

#: Share of a twin's characters that are replaced.
NOISE_SHARE = 0.2

_ALPHABET = np.array(list("abcdefghijklmnopqrstuvwxyz     0123456789.,;:!?-()[]{}<>=+*/#@&%"))


def add_noisy_twins(documents: pl.DataFrame, *, seed: int) -> pl.DataFrame:
    """Append a noisy twin of each document: a fifth of its characters replaced by random ones.

    A twin is divided into prompt and response where its document is.

    Args:
        documents: the reader's frame.
        seed: of the noise; a twin depends on it and on its document alone.

    Returns:
        The frame with columns `augmented` and `twin_of`, twins after the originals of a domain.
    """
    twins, twin_ids = [], []
    columns = ["text", "document_id", "prompt_chars"]
    for text, identity, prompt_chars in documents.select(columns).iter_rows():
        rng = np.random.default_rng([seed, int(identity[:15], 16)])
        letters = np.array(list(text))
        replaced = rng.random(len(letters)) < NOISE_SHARE
        letters[replaced] = rng.choice(_ALPHABET, int(replaced.sum()))
        twins.append("".join(letters))
        twin_ids.append(document_id(twins[-1], prompt_chars))
    twin_frame = documents.with_columns(
        text=pl.Series(twins, dtype=pl.String),
        twin_of=pl.col("document_id"),
        document_id=pl.Series(twin_ids, dtype=pl.String),
        augmented=pl.lit(True),
    )
    originals = documents.with_columns(
        twin_of=pl.lit(None, dtype=pl.String), augmented=pl.lit(False)
    )
    return pl.concat([originals, twin_frame.select(originals.columns)]).sort(
        "domain", "augmented", "document_id"
    )
