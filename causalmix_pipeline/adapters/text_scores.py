"""Metrics of characters and words: kinds of characters, compression, connectives, style.

Compression as a measure of repetition: Lempel-Ziv, zlib level 6. Discourse markers after the Penn
Discourse Treebank's explicit connectives.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl

#: Explicit connectives: words that link statements logically.
LOGICAL_WORDS = (
    "because", "therefore", "thus", "hence", "however", "although", "though", "unless", "since",
    "whereas", "while", "if", "then", "else", "so", "but", "otherwise", "moreover", "furthermore",
    "consequently", "nevertheless", "instead", "finally", "first", "second", "next", "when",
)  # fmt: skip

_SURROGATES = range(0xD800, 0xE000)


@lru_cache(maxsize=1)
def character_kinds() -> np.ndarray:
    r"""Kinds of each Unicode code point, as the regular expressions of Polars know them.

    Returns:
        Shape (0x110000,), uint8, a sum of bits of `compiled_scores`: LETTER (`\p{L}`), DIGIT
        (`\p{Nd}`), BLANK (`\s`), WORD (`\w`), SPLITS (where `str.split` splits).
    """
    from causalmix_pipeline.adapters import compiled_scores as compiled

    letters = ["" if c in _SURROGATES else chr(c) for c in range(0x110000)]
    column = pl.Series(letters)
    kinds = np.zeros(len(letters), dtype=np.uint8)
    for bit, pattern in (
        (compiled.LETTER, r"\p{L}"),
        (compiled.DIGIT, r"\p{Nd}"),
        (compiled.BLANK, r"\s"),
        (compiled.WORD, r"\w"),
    ):
        kinds += column.str.contains(pattern).to_numpy().astype(np.uint8) * np.uint8(bit)
    kinds += np.array([c.isspace() for c in letters], dtype=np.uint8) * np.uint8(compiled.SPLITS)
    kinds.setflags(write=False)
    return kinds


def utf8_bytes(text: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Texts as one array of UTF-8 bytes, and their borders in it.

    Returns:
        uint8, one byte longer than the texts; int64, shape (n + 1,).
    """
    joined = "".join([*text.to_list(), "\0"]).encode("utf-8")
    offsets = np.zeros(len(text) + 1, dtype=np.int64)
    np.cumsum(text.str.len_bytes().to_numpy(), out=offsets[1:])
    return np.frombuffer(joined, dtype=np.uint8), offsets


def float_columns(values: np.ndarray, names: tuple[str, ...]) -> list[pl.Series]:
    """Columns of an array, null where it has NaN."""
    return [
        pl.Series(name, np.ascontiguousarray(values[:, i]), dtype=pl.Float64).fill_nan(None)
        for i, name in enumerate(names)
    ]


@dataclass(frozen=True)
class CharacterScorer:
    """Bytes of a document, and the shares of its characters by kind.

    `n_bytes` (UTF-8); `letter_share`, `digit_share` (decimal digits of any script), `blank_share`
    (white space), `symbol_share` (all others), shares of characters, 0 for an empty text.
    """

    @property
    def key(self) -> str:
        """Name and version."""
        return "characters-v1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return "n_bytes", "letter_share", "digit_share", "blank_share", "symbol_share"

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Count the characters of documents."""
        from causalmix_pipeline.adapters.compiled_scores import count_characters

        text_B, offsets = utf8_bytes(documents["text"])
        counts = count_characters(text_B, offsets, character_kinds())
        shares = counts[:, 1:] / np.maximum(counts[:, :1], 1)
        return documents.select(
            "document_id",
            pl.Series("n_bytes", np.diff(offsets), dtype=pl.Int64),
            *float_columns(shares, self.metrics[1:]),
        )


@dataclass(frozen=True)
class CompressionScorer:
    """`compress_ratio`: bytes after zlib at level 6 over UTF-8 bytes.

    Above 1 for short texts: zlib adds a head and a checksum.
    """

    @property
    def key(self) -> str:
        """Name and version."""
        return "compression-v1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("compress_ratio",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Compress documents."""
        raws = map(str.encode, documents["text"].to_list())
        ratios = [len(zlib.compress(raw, 6)) / max(len(raw), 1) for raw in raws]
        return documents.select(
            "document_id", pl.Series("compress_ratio", ratios, dtype=pl.Float64)
        )


@dataclass(frozen=True)
class LogicalWordsScorer:
    r"""`logical_words`: connectives (`LOGICAL_WORDS`) per 100 words (`\w+`), 0 without a word."""

    @property
    def key(self) -> str:
        """Name and version."""
        return "logical-words-v1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("logical_words",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Count the connectives of documents."""
        from causalmix_pipeline.adapters.compiled_scores import count_markers

        text_B, offsets = utf8_bytes(documents["text"])
        markers = np.array([fnv1a(word) for word in LOGICAL_WORDS], dtype=np.uint64)
        counts = count_markers(text_B, offsets, character_kinds(), markers)
        rates = 100 * counts[:, 1:] / np.maximum(counts[:, :1], 1)
        return documents.select("document_id", *float_columns(rates, self.metrics))


def fnv1a(word: str) -> int:
    """FNV-1a hash of a word's code points, 64 bits."""
    value = 0xCBF29CE484222325
    for letter in word:
        value = (value ^ ord(letter)) * 0x100000001B3 % 2**64
    return value


@dataclass(frozen=True)
class StyleScorer:
    """`writing_style_composite`, a composite of simple signs, and `unique_line_ratio`.

    The composite is the mean of four shares in 0..1 that are high in clean prose and, somewhat
    lower, in clean code: distinct lines among all that aren't blank; letters and blanks among the
    characters; words of 2 to 12 letters among the words; HD-D of the lower-cased words (see
    `lexical_scores`), left out of the mean under 42 words. It is not a trained rater's score: it
    sees noise, boilerplate and repetition, not quality. Null without a word.

    `unique_line_ratio`: the first of the four; null where every line is blank.
    """

    @property
    def key(self) -> str:
        """Name and version."""
        return "style-v1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return "writing_style_composite", "unique_line_ratio"

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Measure the signs of documents."""
        from causalmix_pipeline.adapters.compiled_scores import style_signs

        text_B, offsets = utf8_bytes(documents["text"].str.to_lowercase())
        signs = style_signs(text_B, offsets, character_kinds())
        n_signs = 4 - np.isnan(signs[:, 3])
        composite = np.nan_to_num(signs).sum(axis=1) / n_signs
        composite[np.isnan(signs[:, 2])] = np.nan  # no word
        both = np.column_stack([composite, signs[:, 0]])
        return documents.select("document_id", *float_columns(both, self.metrics))
