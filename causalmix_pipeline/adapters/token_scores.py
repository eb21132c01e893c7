"""Metrics of a document's token ids, and the token frequencies that score them.

The tokenizer and the frequencies belong to the experiment pool and are pinned with it, so that a
later pool is measured on the same scale.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.document_ids import fold_of
from causalmix_pipeline.adapters.text_scores import float_columns
from causalmix_pipeline.adapters.tokenizer import encode_texts
from causalmix_pipeline.core.errors import ScoringError


@dataclass(frozen=True, eq=False)
class PoolLanguageModel:
    """Unigram and interpolated bigram token frequencies of the experiment pool.

    p(b | a) = w_a * count(a, b) / count(a) + (1 - w_a) * p(b), with w_a = n / (n + distinct
    followers of a) (Witten-Bell), p(b) add-one smoothed. Fitted once and pinned with the tokenizer.
    """

    unigram_V: np.ndarray  # counts
    bigram_VV: np.ndarray  # counts

    @classmethod
    def fit(cls, encoded: list[np.ndarray], vocab_size: int) -> PoolLanguageModel:
        """Count tokens and pairs inside documents."""
        unigram_V = np.zeros(vocab_size, dtype=np.int64)
        bigram = np.zeros(vocab_size * vocab_size, dtype=np.int64)
        for tokens in encoded:
            ids = tokens.astype(np.int64)
            unigram_V += np.bincount(ids, minlength=vocab_size)
            pairs, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
            bigram[pairs] += counts
        return cls(unigram_V, bigram.reshape(vocab_size, vocab_size))

    def bits_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Bits of each token (V,), and of each token given the one before (V, V), float32."""
        vocab_size = len(self.unigram_V)
        p_V = (self.unigram_V + 1.0) / (self.unigram_V.sum() + vocab_size)
        n_V = self.bigram_VV.sum(axis=1)
        followers_V = (self.bigram_VV > 0).sum(axis=1)
        weight_V = n_V / np.maximum(n_V + followers_V, 1)
        p_VV = self.bigram_VV / np.maximum(n_V, 1)[:, None] * weight_V[:, None]
        p_VV += (1.0 - weight_V)[:, None] * p_V[None, :]
        return (-np.log2(p_V)).astype(np.float32), (-np.log2(p_VV)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class CrossFittedModel:
    """Token frequencies of the two halves of the experiment pool.

    A document is scored by the half that it isn't in. Scored by counts that hold the document
    itself, the experiment's states would look easier than any later pool: unseen documents of
    the same kind would lie beyond all of them.
    """

    halves: tuple[PoolLanguageModel, PoolLanguageModel]

    @classmethod
    def fit(
        cls, encoded: list[np.ndarray], document_ids: Sequence[str], vocab_size: int
    ) -> CrossFittedModel:
        """Count tokens and pairs of each half."""
        folds = [fold_of(identity) for identity in document_ids]
        first, second = (
            PoolLanguageModel.fit(
                [e for e, fold in zip(encoded, folds, strict=True) if fold == half], vocab_size
            )
            for half in (0, 1)
        )
        return cls((first, second))


@dataclass(frozen=True)
class TokenScorer:
    """Metrics of the token ids; 0 where a document has no token or no pair.

    `n_tokens`; `token_entropy` (bits; entropy of the document's own token frequencies);
    `unique_bigram_ratio` (distinct / all pairs); `unigram_cross_entropy` and
    `bigram_cross_entropy` (bits per token under the frequencies of the half of the experiment pool
    that the document isn't in: `fold_id` decides).

    Attributes:
        folder: holds `tokenizer.json`, `unigram_bits.npy` (2, V), `bigram_bits.npy` (2, V, V), and
            `content.txt`; every worker must reach it. Those of a machine share the tables' memory.
        content_hash: of the tokenizer and the counts.
    """

    folder: Path
    content_hash: str

    @classmethod
    def write(
        cls, folder: Path, tokenizer_json: str, language_model: CrossFittedModel
    ) -> TokenScorer:
        """Write what scoring needs into a new folder below `folder`, whole or not at all."""
        digest = hashlib.blake2b(tokenizer_json.encode("utf-8"), digest_size=16)
        for half in language_model.halves:
            for counts in (half.unigram_V, half.bigram_VV):
                digest.update(counts.astype("<i8").tobytes())
        content_hash = digest.hexdigest()
        final = folder / f"tokens-{content_hash}"
        if not final.exists():
            _write_folder(final, tokenizer_json, language_model, content_hash)
        return cls(final, content_hash)

    @property
    def key(self) -> str:
        """Name and version, with the hash of the tokenizer and the counts."""
        return f"tokens-v1-{self.content_hash}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return (
            "n_tokens",
            "token_entropy",
            "unique_bigram_ratio",
            "unigram_cross_entropy",
            "bigram_cross_entropy",
        )

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Encode and measure documents.

        Raises:
            ScoringError: if the folder is absent or holds something else.
        """
        tokenizer_json, bits_2V, bits_2VV = _load(self.folder, self.content_hash)
        encoded = encode_texts(tokenizer_json, documents["text"].to_list())
        halves = [1 - fold_of(identity) for identity in documents["fold_id"]]
        found = token_values(encoded, halves, bits_2V, bits_2VV)
        return documents.select(
            "document_id",
            pl.Series("n_tokens", [len(tokens) for tokens in encoded], dtype=pl.Int64),
            *float_columns(found, self.metrics[1:]),
        )


def token_values(
    encoded: Sequence[np.ndarray], halves: Sequence[int], bits_2V: np.ndarray, bits_2VV: np.ndarray
) -> np.ndarray:
    """Values of the metrics after `n_tokens`; shape (n, 4).

    Args:
        encoded: token ids of each document, uint32.
        halves: which table scores each document.
        bits_2V: bits of each token, of both halves; shape (2, V), float32.
        bits_2VV: bits of each token given the one before; shape (2, V, V), float32.
    """
    from causalmix_pipeline.adapters.compiled_scores import token_sums

    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens in encoded], dtype=np.int64, out=offsets[1:])
    tokens = np.concatenate([*encoded, np.zeros(0, dtype=np.uint32)])
    return token_sums(tokens, offsets, np.array(halves, dtype=np.int64), bits_2V, bits_2VV)


def _write_folder(
    final: Path, tokenizer_json: str, language_model: CrossFittedModel, content_hash: str
) -> None:
    def fill(building: Path) -> None:
        tables = [half.bits_tables() for half in language_model.halves]
        (building / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        np.save(building / "unigram_bits.npy", np.stack([bits_V for bits_V, _ in tables]))
        np.save(building / "bigram_bits.npy", np.stack([bits_VV for _, bits_VV in tables]))
        (building / "content.txt").write_text(f"{content_hash}\n{_digest_of(building)}\n")

    write_whole_folder(final, fill)


def write_whole_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whose name tells its content, whole or not at all, by any number of processes.

    Args:
        final: the folder.
        fill: writes the content into an empty folder.
    """
    building = final.with_name(f".{final.name}.{os.getpid()}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    fill(building)
    try:
        building.rename(final)
    except OSError:
        shutil.rmtree(building)
        if not final.exists():  # else another process wrote the same content first
            raise


def _digest_of(folder: Path) -> str:
    """Hash of the files that scoring reads."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("tokenizer.json", "unigram_bits.npy", "bigram_bits.npy"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _load(folder: Path, content_hash: str) -> tuple[str, np.ndarray, np.ndarray]:
    """The tokenizer and both tables, memory-mapped, once per process; checked against damage."""
    way_out = "Materialise the experiment pool again; workers must reach its folder."
    try:
        recorded, digest = (folder / "content.txt").read_text().split()
        found_digest = _digest_of(folder)
    except (OSError, ValueError) as error:
        raise ScoringError(
            f"token_scores: {folder} can't be read ({type(error).__name__}: {error}). {way_out}"
        ) from error
    if (recorded, digest) != (content_hash, found_digest):
        raise ScoringError(
            f"token_scores: {folder} must hold the frequencies {content_hash}, undamaged; it holds "
            f"{recorded}, hash of the files {found_digest}, once {digest}. {way_out}"
        )
    unigram, bigram = (
        np.asarray(np.load(folder / name, mmap_mode="r"))
        for name in ("unigram_bits.npy", "bigram_bits.npy")
    )
    return (folder / "tokenizer.json").read_text(encoding="utf-8"), unigram, bigram
