"""Near-duplicates: MinHash signatures of documents (rensa), and the search for neighbours.

Signatures are scored once per document and kept; the search reads them alone. 128 permutations of
runs of five words; 16 bands of 8 rows; a kept signature is the lowest byte of each row.
Sources: Broder 1997; Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", section 3.4
(bands); Li & Koenig 2010, "b-bit minwise hashing" (the lowest byte, and the correction for it).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.text_scores import character_kinds, utf8_bytes

N_PERMUTATIONS = 128
N_BANDS = 16
SHINGLE_WORDS = 5

#: Jaccard similarity of the sets of five words at which two documents are near-duplicates.
NEAR_DUPLICATE_JACCARD = 0.8

#: Bytes of two sketches that are equal by chance alone.
CHANCE = 1 / 256

#: Members up to which all pairs of a bucket are compared.
MOST_COMPARED = 64

_SEED = 42


@dataclass(frozen=True)
class MinHashScorer:
    """`bands` (16 hashes of 8 rows, 8 bytes each, little-endian) and `sketch` (128 bytes).

    Words are what stands between white space, as `str.split` finds them; a document of fewer than
    five is one shingle.
    """

    @property
    def key(self) -> str:
        """Name and version, with the version of rensa, whose permutations the values depend on."""
        return "minhash-v1-" + version("rensa").lower().replace(".", "-")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return "bands", "sketch"

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Sign documents."""
        digests = signatures(documents["text"])
        bands = band_hashes(digests).astype("<u8").tobytes()
        sketches = (digests & 0xFF).astype(np.uint8).tobytes()
        return documents.select(
            "document_id",
            pl.Series("bands", _cut(bands, 8 * N_BANDS), dtype=pl.Binary),
            pl.Series("sketch", _cut(sketches, N_PERMUTATIONS), dtype=pl.Binary),
        )


def _cut(raw: bytes, length: int) -> list[bytes]:
    return [raw[start : start + length] for start in range(0, len(raw), length)]


def signatures(text: pl.Series) -> np.ndarray:
    """MinHash signatures; shape (n, 128), uint32."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    from causalmix_pipeline.adapters.compiled_scores import shingle_hashes

    text_B, offsets = utf8_bytes(text)
    hashes, borders = shingle_hashes(text_B, offsets, character_kinds(), SHINGLE_WORDS)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, borders, N_PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(text), N_PERMUTATIONS)


def band_hashes(digests: np.ndarray) -> np.ndarray:
    """One hash of each band; shape (n, 16), uint64."""
    n_rows = N_PERMUTATIONS // N_BANDS
    rows = digests.reshape(len(digests), N_BANDS, n_rows).astype(np.uint64)
    hashes = np.zeros((len(digests), N_BANDS), dtype=np.uint64)
    for r in range(n_rows):
        hashes = (hashes ^ rows[:, :, r]) * np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def signature_arrays(bands: pl.Series, sketch: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of two kept columns: (n, 16) uint64 and (n, 128) uint8."""
    return (
        np.frombuffer(b"".join(bands.to_list()), dtype="<u8").reshape(-1, N_BANDS),
        np.frombuffer(b"".join(sketch.to_list()), dtype=np.uint8).reshape(-1, N_PERMUTATIONS),
    )


def flag_near_duplicates(bands: np.ndarray, sketches: np.ndarray) -> np.ndarray:
    """Flag documents with a neighbour: one band is equal and the estimated Jaccard is .8 or more.

    The estimate is (share of equal bytes - 1/256) / (1 - 1/256), standard error about .035 at .8.
    Two documents of Jaccard .8 share a band with chance .95, of .9 with .9999.

    All pairs of a bucket of at most 64 documents are compared. In a larger one documents stand in
    the order of their content; each is compared with the one before it and with the first 64 that
    have different sketches. What may be missed there: two documents that are alike only to each
    other, both behind the first 64, and in the large bucket alone. Equal sketches are never missed.

    Args:
        bands: shape (n, 16), uint64.
        sketches: shape (n, 128), uint8.

    Returns:
        Shape (n,), booleans; they don't depend on the order of the rows.
    """
    from causalmix_pipeline.adapters.compiled_scores import flag_buckets, hash_sketches

    sketches = np.ascontiguousarray(sketches)
    by_content = np.argsort(hash_sketches(sketches))
    sketches = sketches[by_content]
    least_equal = int(
        np.ceil(N_PERMUTATIONS * (NEAR_DUPLICATE_JACCARD * (1 - CHANCE) + CHANCE) - 1e-9)
    )
    flags = np.zeros(len(sketches), dtype=bool)
    for b in range(N_BANDS):
        band = bands[by_content, b].astype(np.uint64)
        flag_buckets(flags, band, np.argsort(band), sketches, least_equal, MOST_COMPARED)
    result = np.empty_like(flags)
    result[by_content] = flags
    return result
