"""Byte-level BPE trained on the experiment pool, and the token store that proxies read.

The only module that imports `tokenizers`. Token ids are kept as one memory-mapped array over all
documents (uint16, uint32 for vocabularies above 65,536), so that no text is in the hot loop.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from causalmix_pipeline.core.errors import PoolError

#: Ends each document in a token stream; the first id of every tokenizer trained here.
END_OF_TEXT = "<|end|>"
END_ID = 0


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> str:
    """Train a byte-level BPE.

    Args:
        texts: documents; byte-level, so any text can be encoded afterwards.
        vocab_size: number of tokens, >= 257 (all bytes and the end of text).

    Returns:
        The tokenizer as JSON text.

    Raises:
        PoolError: if the vocabulary can't hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise PoolError(
            f"proxy.vocab_size must be >= 257 (256 bytes and the end of text), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def encode_texts(tokenizer_json: str, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode documents, without the end-of-text token.

    Returns:
        One uint32 array of token ids a document.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a document that spells the end of text is only text
    encoded = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer.encode_batch_fast(list(texts[start : start + 1000]))
        encoded.extend(np.array(e.ids, dtype=np.uint32) for e in batch)
    return encoded


def vocab_size_of(tokenizer_json: str) -> int:
    """Number of tokens of a tokenizer."""
    model = json.loads(tokenizer_json)["model"]
    return len(model["vocab"])


@dataclass(frozen=True)
class TokenStore:
    """Token ids of documents in one memory-mapped file.

    Attributes:
        folder: holds `tokens.bin`, `offsets.npy` and `ids.txt`.
    """

    folder: Path

    @classmethod
    def write(
        cls, folder: Path, document_ids: Sequence[str], encoded: Sequence[np.ndarray]
    ) -> TokenStore:
        """Write the store under its final name at once: it is whole or absent.

        An existing folder is left as it is: names are content hashes.
        """
        if folder.exists():
            return cls(folder)
        building = folder.with_name(f".{folder.name}.{os.getpid()}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        lengths = np.array([len(e) for e in encoded], dtype=np.int64)
        largest = max((int(e.max()) for e in encoded if len(e)), default=0)
        dtype = np.uint16 if largest < 2**16 else np.uint32
        with open(building / "tokens.bin", "wb") as file:
            for tokens in encoded:
                file.write(tokens.astype(dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        np.save(building / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        (building / "ids.txt").write_text("\n".join(document_ids))
        try:
            building.rename(folder)
        except OSError:
            # Another process wrote the same content first.
            shutil.rmtree(building)
            if not folder.exists():
                raise
        return cls(folder)

    def offsets(self) -> np.ndarray:
        """Start of each document in the token array; shape (n + 1,)."""
        return np.load(self.folder / "offsets.npy")

    def document_ids(self) -> list[str]:
        """Id of each document, in the order of the store."""
        return (self.folder / "ids.txt").read_text().split("\n")

    def positions(self, document_ids: np.ndarray) -> np.ndarray:
        """Where documents stand in the store.

        Args:
            document_ids: ids as ASCII bytes; repeats allowed.

        Raises:
            PoolError: if the store lacks one.
        """
        known = np.array(self.document_ids(), dtype="S")
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known, document_ids, sorter=order)
        found = order[np.minimum(place, len(known) - 1)]
        absent = known[found] != document_ids
        if absent.any():
            raise PoolError(
                f"{self.folder} lacks document {document_ids[absent][0].decode()} of a pool state. "
                "Materialise the experiment pool and the pool states again."
            )
        return found

    def tokens(self) -> np.ndarray:
        """All token ids, memory-mapped."""
        n_tokens = int(self.offsets()[-1])
        size = (self.folder / "tokens.bin").stat().st_size
        dtype = np.uint16 if size == 2 * n_tokens else np.uint32
        return np.memmap(self.folder / "tokens.bin", dtype=dtype, mode="r")


def cut_windows(
    tokens: np.ndarray, offsets: np.ndarray, documents: np.ndarray, length: int
) -> np.ndarray:
    """Join documents with end-of-text tokens and cut the stream into windows.

    Args:
        tokens: all token ids of the store.
        offsets: start of each document; shape (n + 1,).
        documents: positions of the documents in the store, in reading order, repeats allowed.
        length: predicted tokens a window, L.

    Returns:
        Shape (W, L + 1): window i predicts stream positions iL+1 .. iL+L. A stream shorter than
        one window is read in a circle, so W >= 1.
    """
    lengths = offsets[documents + 1] - offsets[documents]
    ends = np.cumsum(lengths + 1)
    stream = np.full(int(ends[-1]), END_ID, dtype=np.int32)
    starts = ends - lengths - 1
    for start, document, n in zip(
        starts.tolist(), documents.tolist(), lengths.tolist(), strict=True
    ):
        begin = int(offsets[document])
        stream[start : start + n] = tokens[begin : begin + n]
    if len(stream) < length + 1:
        stream = np.resize(stream, length + 1)
    n_windows = (len(stream) - 1) // length
    position = np.arange(n_windows)[:, None] * length + np.arange(length + 1)[None, :]
    return stream[position]
