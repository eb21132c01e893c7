"""Byte-level BPE trained on the experiment pool, and the token store that proxies read.

The only module that imports `tokenizers` and tiktoken. Token ids are kept as one memory-mapped
array over all documents (uint16, uint32 for vocabularies above 65,536), so that no text is in the
hot loop.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from causalmix_pipeline.core.errors import PoolError

#: File of a token store with the SHA-256 of each of the others.
MANIFEST = "manifest.json"

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

    Done by tiktoken with the tokenizer's own tokens: the same ids as `tokenizers` gives, several
    times faster. A document that spells the end of text is only text.

    Args:
        tokenizer_json: as `train_tokenizer` made it.
        texts: documents.

    Returns:
        One uint32 array of token ids a document.

    Raises:
        PoolError: if the tokenizer is of another kind.
    """
    encoder = _encoder(tokenizer_json)
    return [
        np.array(
            encoder.encode_ordinary(text)
            if len(text) < _LONGEST_BLANK
            else _encode_between_blanks(encoder, text),
            dtype=np.uint32,
        )
        for text in texts
    ]


#: GPT-2's words, as the byte-level pre-tokenizer cuts them.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

#: White space of this length is cut out before the pattern sees it: it fails on a million blanks.
_LONGEST_BLANK = 10_000
_BLANKS = re.compile(rf"[^\S\x1c-\x1f]{{{_LONGEST_BLANK},}}")


@lru_cache(maxsize=2)
def _encoder(tokenizer_json: str) -> Any:
    """The tokenizer as tiktoken has it, once per process."""
    import tiktoken

    rules = json.loads(tokenizer_json)
    words = rules.get("pre_tokenizer") or {}
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if (
        rules["model"].get("type") != "BPE"
        or rules.get("normalizer") is not None
        or {name: words.get(name) for name in expected} != expected
    ):
        raise PoolError(
            "The tokenizer must be a byte-level BPE as the experiment pool trains it, got model "
            f"{rules['model'].get('type')}, words {words}. Materialise the experiment pool again."
        )
    byte_of = _byte_of_letter()
    ranks = {
        bytes(byte_of[letter] for letter in token): rank
        for token, rank in rules["model"]["vocab"].items()
        if token != END_OF_TEXT
    }
    return tiktoken.Encoding("pool", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _encode_between_blanks(encoder: Any, text: str) -> list[int]:
    """Encode a text with its longest runs of white space cut out as the words that they are.

    A run is one word, without its last character where text follows: that one begins the next.
    """
    ids: list[int] = []
    start = 0
    for run in _BLANKS.finditer(text):
        end = run.end() if run.end() == len(text) else run.end() - 1
        ids += encoder.encode_ordinary(text[start : run.start()])
        ids += encoder._core_bpe.encode_single_piece(text[run.start() : end].encode("utf-8"))
        start = end
    return ids + encoder.encode_ordinary(text[start:])


def token_bytes(tokenizer_json: str) -> list[bytes]:
    """The bytes that each token of a byte-level BPE stands for; none for the end of text."""
    vocabulary, byte_of = json.loads(tokenizer_json)["model"]["vocab"], _byte_of_letter()
    tokens = [b""] * len(vocabulary)
    for letters, number in vocabulary.items():
        if letters != END_OF_TEXT:
            tokens[number] = bytes(byte_of[letter] for letter in letters)
    return tokens


def vocab_size_of(tokenizer_json: str) -> int:
    """Number of tokens of a tokenizer."""
    model = json.loads(tokenizer_json)["model"]
    return len(model["vocab"])


#: Document ids and their token ids, and perhaps how many leading tokens of each carry no loss.
TokenBatch = (
    tuple[Sequence[str], Sequence[np.ndarray]]
    | tuple[Sequence[str], Sequence[np.ndarray], Sequence[int]]
)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class TokenStore:
    """Token ids of documents in one memory-mapped file.

    Attributes:
        folder: holds `tokens.bin`, `offsets.npy`, `ids.txt`, `manifest.json` with their checksums,
            and `prompt.npy` where leading tokens of some documents carry no loss.
    """

    folder: Path

    @classmethod
    def write(
        cls,
        folder: Path,
        batches: Iterable[TokenBatch],
        vocab_size: int,
    ) -> TokenStore:
        """Write the store under its final name at once: it is whole or absent.

        An existing folder is left as it is: names are content hashes.

        Args:
            folder: of the store.
            batches: document ids, their token ids and prompts; any number, in any order.
            vocab_size: number of tokens; up to 65,536 fit into two bytes each.
        """
        if folder.exists():
            return cls(folder)
        building = folder.with_name(f".{folder.name}.{os.getpid()}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        lengths: list[int] = []
        prompts: list[int] = []
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        try:
            with (
                open(building / "tokens.bin", "wb") as tokens_file,
                open(building / "ids.txt", "w", encoding="ascii") as ids_file,
            ):
                for document_ids, encoded, *prompts_of in batches:
                    prompts += prompts_of[0] if prompts_of else [0] * len(document_ids)
                    for identity, tokens in zip(document_ids, encoded, strict=True):
                        tokens_file.write(tokens.astype(dtype).tobytes())
                        ids_file.write(f"\n{identity}" if lengths else identity)
                        lengths.append(len(tokens))
                for file in (tokens_file, ids_file):
                    file.flush()
                    os.fsync(file.fileno())
            np.save(building / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
            if any(prompts):
                np.save(building / "prompt.npy", np.array(prompts, dtype=np.int64))
            sums = {path.name: sha256_of(path) for path in sorted(building.iterdir())}
            (building / MANIFEST).write_text(json.dumps(sums, indent=1))
            building.rename(folder)
        except OSError:
            # Another process wrote the same content first.
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return cls(folder)

    def damaged_file(self) -> str | None:
        """Name of a file that isn't what was written; None if all are, or an old store can't tell.

        Reads everything once: about 20 ms for 20 MB.
        """
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            return None
        try:
            sums = json.loads(manifest.read_text())
            return next((n for n, s in sums.items() if sha256_of(self.folder / n) != s), None)
        except (OSError, ValueError, AttributeError):
            return MANIFEST

    def offsets(self) -> np.ndarray:
        """Start of each document in the token array; shape (n + 1,)."""
        return np.load(self.folder / "offsets.npy")

    def prompts(self) -> np.ndarray:
        """How many leading tokens of each document carry no loss; shape (n,)."""
        path = self.folder / "prompt.npy"
        return np.load(path) if path.exists() else np.zeros(len(self.offsets()) - 1, np.int64)

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
    tokens: np.ndarray,
    offsets: np.ndarray,
    documents: np.ndarray,
    length: int,
    *,
    end_id: int = END_ID,
) -> np.ndarray:
    """Join documents with end-of-text tokens and cut the stream into windows.

    Args:
        tokens: all token ids of the store.
        offsets: start of each document; shape (n + 1,).
        documents: positions of the documents in the store, in reading order, repeats allowed.
        length: predicted tokens a window, L.
        end_id: the end-of-text token.

    Returns:
        Shape (W, L + 1): window i predicts stream positions iL+1 .. iL+L. A stream shorter than
        one window is read in a circle, so W >= 1.
    """
    lengths = offsets[documents + 1] - offsets[documents]
    ends = np.cumsum(lengths + 1)
    stream = np.full(int(ends[-1]), end_id, dtype=np.int32)
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
