"""Which documents are like the held-out text of a task, by the token pairs of that text.

A domain may hold text that serves a task and text that doesn't, and the usual metrics don't tell
them apart: puzzles and a manual of a library are both math. What a model gains on the task depends
on how much of the domain serves it, so that share is a covariate (`log2_task_like_<task>`).
Documents are chosen by target text through n-gram models in R. C. Moore and W. Lewis, ACL 2010, and
S. M. Xie et al., arXiv 2302.03169. Unlike there the pool's own frequencies are left out: under
these, damaged text is as unlikely as it is under the task's, and would look like it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.text_scores import float_columns
from causalmix_pipeline.adapters.token_scores import PoolLanguageModel, write_whole_folder
from causalmix_pipeline.adapters.tokenizer import encode_texts, vocab_size_of
from causalmix_pipeline.core.covariates import TASK_LIKE_PREFIX, weighted_quantile
from causalmix_pipeline.core.errors import ScoringError

#: Tokens of the pieces that a task's text is cut into, and fewest pieces of it.
PIECE_TOKENS, FEWEST_PIECES = 128, 8

#: Share of a task's own text that counts as like the rest of it.
OWN_SHARE = 0.95


@dataclass(frozen=True, eq=False)
class TaskPairs:
    """Token pairs of a task's text, and how surprising its own text is under the rest of it.

    Attributes:
        bits_VV: bits of a token given the one before, mean of the models of both halves of the
            text; shape (V, V), float32.
        most_bits: a document with at most as many bits a token is like the text: `OWN_SHARE` of the
            text's own pieces have, under the half that they aren't in.
    """

    bits_VV: np.ndarray
    most_bits: float

    @classmethod
    def fit(cls, task: str, encoded: Sequence[np.ndarray], vocab_size: int) -> TaskPairs:
        """Count the pairs of a task's text.

        Args:
            task: its name, for messages.
            encoded: token ids of its documents; their order doesn't matter.
            vocab_size: V.

        Raises:
            ScoringError: if the text is too short to tell what is like it.
        """
        documents = sorted(encoded, key=lambda ids: ids.tobytes())
        pieces = [
            [part for part in _pieces(ids) if len(part) >= PIECE_TOKENS // 2] for ids in documents
        ]
        of_document = [parts for parts in pieces if parts]
        if len(of_document) == 1:  # a single text is divided itself
            of_document = [[part] for part in of_document[0]]
        n_pieces = sum(map(len, of_document))
        if n_pieces < FEWEST_PIECES:
            raise ScoringError(
                f"covariates: task {task} needs {FEWEST_PIECES} pieces of {PIECE_TOKENS} tokens or "
                f"more of held-out text to tell what is like it, got {n_pieces}: give it more "
                f"text, or take log2_{TASK_LIKE_PREFIX}{task} off the list."
            )
        halves = [[p for parts in of_document[h::2] for p in parts] for h in (0, 1)]
        tables = [PoolLanguageModel.fit(half, vocab_size).bits_tables()[1] for half in halves]
        bits = [
            mean_bits(piece, tables[1 - h][None])[0]
            for h, half in enumerate(halves)
            for piece in half
        ]
        sizes = np.array([len(piece) for half in halves for piece in half], dtype=float)
        return cls((tables[0] + tables[1]) / 2, weighted_quantile(np.array(bits), sizes, OWN_SHARE))


def mean_bits(tokens: np.ndarray, bits_TVV: np.ndarray) -> np.ndarray:
    """Bits a token of one document under each table; infinite without a pair; shape (T,)."""
    if len(tokens) < 2:
        return np.full(len(bits_TVV), np.inf)
    ids = tokens.astype(np.int64)
    return bits_TVV[:, ids[:-1], ids[1:]].mean(axis=1, dtype=float)


def _pieces(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[i : i + PIECE_TOKENS] for i in range(0, len(ids), PIECE_TOKENS)]


@dataclass(frozen=True)
class TaskLikeScorer:
    """Whether a document is like a task's text: `task_like_<task>`, 1 or 0.

    Attributes:
        folder: holds `tokenizer.json`, `bits.npy` (T, V, V) and `tasks.json` (names and most bits);
            every worker must reach it. Those of a machine share the tables' memory.
        content_hash: of all three.
        tasks: names, in the order of the tables.
    """

    folder: Path
    content_hash: str
    tasks: tuple[str, ...]

    @classmethod
    def write(
        cls, folder: Path, tokenizer_json: str, texts: Mapping[str, Sequence[str]]
    ) -> TaskLikeScorer:
        """Write what scoring needs into a new folder below `folder`, whole or not at all.

        Args:
            folder: where such folders are kept.
            tokenizer_json: the pool's byte-level BPE.
            texts: held-out documents of each task.

        Raises:
            ScoringError: if a task has too little text.
        """
        vocab_size = vocab_size_of(tokenizer_json)
        fitted = {}
        for task, of_task in sorted(texts.items()):
            distinct = {document_id(text): text for text in of_task}
            fitted[task] = TaskPairs.fit(
                task, encode_texts(tokenizer_json, list(distinct.values())), vocab_size
            )
        bits_TVV = np.stack([pairs.bits_VV for pairs in fitted.values()])
        most_bits = {task: pairs.most_bits for task, pairs in fitted.items()}
        parts = (tokenizer_json.encode(), bits_TVV.tobytes(), json.dumps(most_bits).encode())
        content_hash = _digest(parts)
        final = folder / f"task-pairs-{content_hash}"

        def fill(building: Path) -> None:
            (building / "tokenizer.json").write_bytes(parts[0])
            (building / "tasks.json").write_bytes(parts[2])
            np.save(building / "bits.npy", bits_TVV)

        if not final.exists():
            write_whole_folder(final, fill)
        return cls(final, content_hash, tuple(fitted))

    @property
    def key(self) -> str:
        """Name and version, with the hash of the tokenizer and the tables."""
        return f"task_like-v1-{self.content_hash}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return tuple(TASK_LIKE_PREFIX + task for task in self.tasks)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Encode documents and hold them against each task's text.

        Raises:
            ScoringError: if the folder is absent or holds something else.
        """
        tokenizer_json, bits_TVV, most_T = _load(self.folder, self.content_hash)
        encoded = encode_texts(tokenizer_json, documents["text"].to_list())
        like_NT = np.zeros((len(encoded), len(self.tasks)))
        for n, tokens in enumerate(encoded):
            like_NT[n] = mean_bits(tokens, bits_TVV) <= most_T
        return documents.select("document_id", *float_columns(like_NT, self.metrics))


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _load(folder: Path, content_hash: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Tokenizer, tables and most bits, once per process; checked against damage."""
    try:
        tokenizer, tasks = ((folder / f"{n}.json").read_bytes() for n in ("tokenizer", "tasks"))
        bits_TVV = np.asarray(np.load(folder / "bits.npy", mmap_mode="r"))
        found = _digest((tokenizer, bits_TVV.tobytes(), tasks))
    except (OSError, ValueError) as error:
        found = f"nothing readable ({type(error).__name__}: {error})"
    if found != content_hash:
        raise ScoringError(
            f"task_likeness: {folder} must hold the token pairs {content_hash}, undamaged; it "
            f"holds {found}. Remove the folder and profile again; workers must reach it."
        )
    return tokenizer.decode(), bits_TVV, np.array(list(json.loads(tasks).values()))
