"""Model-free metrics of documents: Polars expressions where they can be, numpy on token ids else.

Each metric is a function of the document (and of the experiment pool's tokenizer and token
frequencies, which are pinned), so a score is computed once per content and kept by content hash.
Formulas: see each function; sources: type-token counts and compression as in datatrove and
Lempel-Ziv repetition measures; discourse markers after the Penn Discourse Treebank's explicit
connectives.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.pool_state import METRICS

#: Explicit connectives: words that link statements logically.
LOGICAL_WORDS = (
    "because", "therefore", "thus", "hence", "however", "although", "though", "unless", "since",
    "whereas", "while", "if", "then", "else", "so", "but", "otherwise", "moreover", "furthermore",
    "consequently", "nevertheless", "instead", "finally", "first", "second", "next", "when",
)  # fmt: skip

#: MinHash: permutations, and the Jaccard similarity at which two documents are near-duplicates.
MINHASH_PERMUTATIONS = 128
NEAR_DUPLICATE_JACCARD = 0.8


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


def document_id(text: str) -> str:
    """Content hash of a document: BLAKE2b, 128 bits, 32 hex digits."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def fold_of(identity: str) -> int:
    """Half of the experiment pool that a document belongs to, by its content hash: 0 or 1."""
    return int(identity[0], 16) & 1


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


def text_metrics(text: pl.Series) -> pl.DataFrame:
    """Metrics of the text alone.

    Returns:
        `n_bytes` (UTF-8 bytes), `compress_ratio` (zlib level 6 bytes / UTF-8 bytes),
        `letter_share`, `digit_share`, `symbol_share` (shares of characters; symbols are neither
        letters, digits nor white space), `logical_words` (connectives per 100 words).
    """
    column = pl.col("text")
    n_chars = column.str.len_chars().clip(1)
    n_words = column.str.count_matches(r"\w+").clip(1)
    markers = r"(?i)\b(?:" + "|".join(LOGICAL_WORDS) + r")\b"
    frame = pl.DataFrame({"text": text}).select(
        n_bytes=column.str.len_bytes().cast(pl.Int64),
        letter_share=column.str.count_matches(r"\p{L}") / n_chars,
        digit_share=column.str.count_matches(r"\p{Nd}") / n_chars,
        symbol_share=column.str.count_matches(r"[^\p{L}\p{Nd}\s]") / n_chars,
        logical_words=column.str.count_matches(markers) * 100 / n_words,
    )
    ratios = [len(zlib.compress(raw, 6)) / max(len(raw), 1) for raw in map(str.encode, text)]
    return frame.with_columns(compress_ratio=pl.Series(ratios, dtype=pl.Float64))


def token_metrics(
    encoded: list[np.ndarray], document_ids: Sequence[str], language_model: CrossFittedModel
) -> pl.DataFrame:
    """Metrics of the token ids.

    Returns:
        `n_tokens`; `token_entropy` (bits; entropy of the document's own token frequencies);
        `unique_bigram_ratio` (distinct / all pairs); `unigram_cross_entropy` and
        `bigram_cross_entropy` (bits per token under the frequencies of the half of the experiment
        pool that the document isn't in).
    """
    tables = [half.bits_tables() for half in language_model.halves]
    rows = np.empty((len(encoded), 5))
    for i, (tokens, identity) in enumerate(zip(encoded, document_ids, strict=True)):
        bits_V, bits_VV = tables[1 - fold_of(identity)]
        ids = tokens.astype(np.int64)
        n = len(ids)
        counts = np.unique(ids, return_counts=True)[1]
        share = counts / max(n, 1)
        pairs = ids[:-1] * len(bits_V) + ids[1:]
        rows[i] = (
            n,
            -(share * np.log2(share)).sum(),
            len(np.unique(pairs)) / max(len(pairs), 1),
            bits_V[ids].mean() if n else 0.0,
            bits_VV[ids[:-1], ids[1:]].mean() if n > 1 else 0.0,
        )
    names = ["n_tokens", "token_entropy", "unique_bigram_ratio", "unigram_cross_entropy",
             "bigram_cross_entropy"]  # fmt: skip
    return pl.DataFrame(rows, schema=names).with_columns(pl.col("n_tokens").cast(pl.Int64))


def near_duplicates(texts: pl.Series) -> np.ndarray:
    """Flag documents with an earlier or later neighbour above .8 Jaccard over word 5-grams.

    MinHash with locality-sensitive hashing (rensa); candidates are confirmed on their signatures.

    Returns:
        Booleans, shape (n,).
    """
    from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue]

    index = RMinHashLSH(NEAR_DUPLICATE_JACCARD, MINHASH_PERMUTATIONS, 16)
    hashes = []
    for i, text in enumerate(texts):
        words = text.split()
        shingles = [" ".join(words[j : j + 5]) for j in range(max(len(words) - 4, 1))]
        minhash = RMinHash(MINHASH_PERMUTATIONS, 42)
        minhash.update(shingles)
        hashes.append(minhash)
        index.insert(i, minhash)
    flags = np.zeros(len(hashes), dtype=bool)
    for i, minhash in enumerate(hashes):
        flags[i] = any(
            j != i and minhash.jaccard(hashes[j]) >= NEAR_DUPLICATE_JACCARD
            for j in index.query(minhash)
        )
    return flags


def score_documents(
    documents: pl.DataFrame,
    encoded: list[np.ndarray],
    language_model: CrossFittedModel,
    known_scores: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Add the metrics to documents; those already scored are looked up, not computed.

    Args:
        documents: columns `document_id`, `domain`, `augmented`, `twin_of`, `text` and others.
        encoded: token ids of each document.
        language_model: of the experiment pool.
        known_scores: earlier result with `document_id` and the content metrics, or None.

    Returns:
        `documents` without `text`, with `n_bytes`, `n_tokens` and every metric of `METRICS`.
    """
    content = [m for m in METRICS if m not in ("near_duplicate", "bytes_per_token")]
    fresh = documents.with_row_index("_row")
    if known_scores is not None:
        fresh = fresh.join(known_scores.select("document_id"), on="document_id", how="anti")
    new_rows = fresh["_row"].to_list()
    fresh_scores = pl.concat(
        [
            fresh.select("document_id"),
            text_metrics(fresh["text"]),
            token_metrics(
                [encoded[i] for i in new_rows],
                # A noisy twin belongs to its original's half.
                fresh.select(pl.coalesce("twin_of", "document_id")).to_series().to_list(),
                language_model,
            ),
        ],
        how="horizontal",
    ).select("document_id", "n_bytes", "n_tokens", *content)
    scores = fresh_scores
    if known_scores is not None:
        scores = pl.concat([known_scores.select(fresh_scores.columns), fresh_scores])
    scores = scores.unique("document_id", keep="first")
    near_duplicate = np.zeros(documents.height)
    # Twins apart: the flag of an original is the same in a pool that has no twins.
    for part in documents.with_row_index("_row").partition_by("domain", "augmented"):
        near_duplicate[part["_row"].to_numpy()] = near_duplicates(part["text"])
    return (
        documents.drop("text")
        .join(scores, on="document_id", how="left", maintain_order="left")
        .with_columns(
            near_duplicate=pl.Series(near_duplicate),
            bytes_per_token=pl.col("n_bytes") / pl.col("n_tokens").clip(1),
        )
    )


def add_noisy_twins(documents: pl.DataFrame, *, seed: int) -> pl.DataFrame:
    """Append a noisy twin of each document: a fifth of its characters replaced by random ones.

    Args:
        documents: the reader's frame.
        seed: of the noise; a twin depends on it and on its document alone.

    Returns:
        The frame with columns `augmented` and `twin_of`, twins after the originals of a domain.
    """
    alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz     0123456789.,;:!?-()[]{}<>=+*/#@&%"))
    twins = []
    for text, identity in documents.select("text", "document_id").iter_rows():
        rng = np.random.default_rng([seed, int(identity[:15], 16)])
        letters = np.array(list(text))
        replaced = rng.random(len(letters)) < 0.2
        letters[replaced] = rng.choice(alphabet, int(replaced.sum()))
        twins.append("".join(letters))
    twin_frame = documents.with_columns(
        text=pl.Series(twins, dtype=pl.String),
        twin_of=pl.col("document_id"),
        document_id=pl.Series([document_id(t) for t in twins], dtype=pl.String),
        augmented=pl.lit(True),
    )
    originals = documents.with_columns(
        twin_of=pl.lit(None, dtype=pl.String), augmented=pl.lit(False)
    )
    return pl.concat([originals, twin_frame.select(originals.columns)]).sort(
        "domain", "augmented", "document_id"
    )
