"""Near-duplicates against exact Jaccard similarities, planted neighbours and a slow search."""

from __future__ import annotations

import time

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.near_duplicates import (
    N_BANDS,
    N_PERMUTATIONS,
    MinHashScorer,
    band_hashes,
    flag_near_duplicates,
    signature_arrays,
    signatures,
)
from causalmix_pipeline_tests.adapters.scored_frames import HARD_TEXTS, frame_of


def arrays_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    scored = MinHashScorer().score(frame_of(*texts))
    return signature_arrays(scored["bands"], scored["sketch"])


def flags_of(texts: list[str]) -> list[bool]:
    return flag_near_duplicates(*arrays_of(texts)).tolist()


def shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[j : j + 5]) for j in range(max(len(words) - 4, 1))}


def planted(jaccard: float, rng: np.random.Generator, n: int = 400) -> tuple[str, str]:
    """Two texts whose word 5-grams have about this Jaccard similarity: they share a beginning."""
    words = [f"w{i}" for i in rng.integers(0, 10**6, 2 * n)]
    shared = round(2 * jaccard * n / (1 + jaccard))
    return " ".join(words[:n]), " ".join([*words[:shared], *words[n : 2 * n - shared]])


# Signatures


@pytest.mark.parametrize("jaccard", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_signatures_agree_as_often_as_the_exact_similarity_says(jaccard):
    """60 pairs of 128 rows: a standard error below .006."""
    rng = np.random.default_rng(int(100 * jaccard))
    pairs = [planted(jaccard, rng) for _ in range(60)]
    digests = signatures(pl.Series([text for pair in pairs for text in pair]))
    exact = np.mean([len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
                     for a, b in pairs])  # fmt: skip

    assert (digests[::2] == digests[1::2]).mean() == pytest.approx(exact, abs=0.02)
    sketches = arrays_of([text for pair in pairs for text in pair])[1]
    equal = (sketches[::2] == sketches[1::2]).mean()
    assert (equal - 1 / 256) / (1 - 1 / 256) == pytest.approx(exact, abs=0.02)


def test_a_signature_depends_on_its_document_alone_and_stays_what_it_was():
    """Kept signatures are compared with new ones: a change needs a new version."""
    texts = ["one two three four five six", *HARD_TEXTS, "seven"]
    bands, sketches = arrays_of(texts)

    for i in (0, 3, len(texts) - 1):
        alone = arrays_of([texts[i]])
        np.testing.assert_array_equal(alone[0][0], bands[i])
        np.testing.assert_array_equal(alone[1][0], sketches[i])
    assert [int(bands[0, 0]), *sketches[0, :3].tolist()] == PINNED


PINNED = [2374542109593794294, 121, 176, 145]


def test_a_band_is_equal_where_its_eight_rows_are():
    digests = np.random.default_rng(0).integers(0, 2**32, (2, N_PERMUTATIONS), dtype=np.uint32)
    digests[1, 8:24] = digests[0, 8:24]
    bands = band_hashes(digests)

    assert np.flatnonzero(bands[0] == bands[1]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "other", "is_equal"),
    [
        ("a b  c", "a\nb c", True),
        ("a b c", "a b C", False),
        ("a bc", "ab c", False),
        ("a b c d e f", "a b c d e f a b c d", False),
        ("", "  ", True),
    ],
)
def test_words_are_what_stands_between_white_space(text, other, is_equal):
    found = signatures(pl.Series([text, other]))

    assert (found[0] == found[1]).all() == is_equal


# Flags


@pytest.mark.parametrize(("jaccard", "low", "high"), [(0.6, 0, 1), (0.9, 38, 40), (1.0, 40, 40)])
def test_planted_neighbours_are_flagged_by_their_similarity(jaccard, low, high):
    rng = np.random.default_rng(0)
    texts = [text for _ in range(20) for text in planted(jaccard, rng)]

    assert low <= sum(flags_of(texts)) <= high


def test_documents_without_a_neighbour_stay_unflagged():
    rng = np.random.default_rng(1)
    texts = [planted(0.0, rng)[0] for _ in range(30)]
    flags = flags_of([*texts, texts[7].replace(" ", "  ")])

    assert np.flatnonzero(flags).tolist() == [7, 30]


def test_documents_shorter_than_five_words_compare_as_a_whole():
    assert flags_of(["yes it is", "yes  it is", "no it is", "no"]) == [True, True, False, False]


def slow_flags(bands: np.ndarray, sketches: np.ndarray) -> np.ndarray:
    """Every pair compared."""
    flags = np.zeros(len(bands), dtype=bool)
    for i in range(len(bands)):
        share = (sketches[i] == sketches).mean(axis=1)
        near = (share - 1 / 256) / (1 - 1 / 256) >= 0.8
        near &= (bands[i] == bands).any(axis=1)
        near[i] = False
        flags[i] = near.any()
    return flags


def random_signatures(
    n: int, rng: np.random.Generator, values: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    digests = rng.integers(0, values, (n, N_PERMUTATIONS), dtype=np.uint32)
    return band_hashes(digests), digests.astype(np.uint8)


def families(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Groups of one to six signatures that differ in a tenth to a third of the rows."""
    digests = rng.integers(0, 2**32, (n, N_PERMUTATIONS), dtype=np.uint32)
    parent = np.arange(n) - np.arange(n) % rng.integers(1, 7, n)
    changed = rng.random((n, N_PERMUTATIONS)) < rng.uniform(0.05, 0.35, n)[:, None]
    digests = np.where(changed, digests, digests[parent])
    return band_hashes(digests), (digests & 0xFF).astype(np.uint8)


def test_flags_are_those_of_comparing_every_pair():
    bands, sketches = families(3000, np.random.default_rng(2))
    found = flag_near_duplicates(bands, sketches)

    assert 300 < found.sum() < 2700
    np.testing.assert_array_equal(found, slow_flags(bands, sketches))


def test_similarity_without_a_common_band_is_not_enough():
    bands, sketches = random_signatures(2, np.random.default_rng(0))
    sketches[1] = sketches[0]

    assert flag_near_duplicates(bands, sketches).tolist() == [False, False]


@pytest.mark.parametrize(("n_equal", "is_near"), [(102, False), (103, True)])
def test_the_estimate_is_corrected_for_equality_by_chance(n_equal, is_near):
    """103 of 128: (.8047 - 1/256) / (1 - 1/256) = .8039; 102 of 128 give .7961."""
    bands, sketches = random_signatures(2, np.random.default_rng(0))
    bands[1, 5] = bands[0, 5]
    sketches[1] = sketches[0] + 1
    sketches[1, :n_equal] = sketches[0, :n_equal]

    assert flag_near_duplicates(bands, sketches).tolist() == [is_near] * 2


def crowded(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All share one band and little else; a hundred have a copy."""
    bands, sketches = random_signatures(n, rng)
    bands[:, 3] = 77
    sketches[:100] = sketches[100:200]
    return bands, sketches


def test_copies_are_found_in_a_crowded_bucket():
    found = flag_near_duplicates(*crowded(2000, np.random.default_rng(3)))

    assert found[:200].all()
    assert not found[200:].any()


def test_a_family_in_a_crowded_bucket_is_found_by_its_other_bands():
    rng = np.random.default_rng(4)
    bands, sketches = crowded(2000, rng)
    sketches[1001] = sketches[1000]
    sketches[1001, :8] += 1
    bands[1001, 4:] = bands[1000, 4:]
    found = flag_near_duplicates(bands, sketches)

    assert found[1000]
    assert found[1001]


def test_the_order_of_documents_does_not_change_their_flags():
    rng = np.random.default_rng(5)
    for bands, sketches in (families(2000, rng), crowded(2000, rng), near_crowd(1500, rng)):
        found = flag_near_duplicates(bands, sketches)
        order = rng.permutation(len(found))
        np.testing.assert_array_equal(
            flag_near_duplicates(bands[order], sketches[order]), found[order]
        )


def near_crowd(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One bucket of documents about as similar as the threshold: many are alike, not all."""
    bands, sketches = random_signatures(n, rng)
    bands[:, 0] = 5
    changed = rng.random((n, N_PERMUTATIONS)) < 0.105
    sketches = np.where(changed, sketches, sketches[0])
    return bands, sketches


def test_forty_thousand_documents_in_one_bucket_take_little_time():
    bands, sketches = crowded(40_000, np.random.default_rng(6))
    flag_near_duplicates(bands[:300], sketches[:300])
    started = time.process_time()
    flag_near_duplicates(bands, sketches)

    assert time.process_time() - started < 2  # all pairs: 800 million


@pytest.mark.parametrize("n", [0, 1])
def test_few_documents_have_no_neighbour(n):
    bands, sketches = arrays_of(["only one"][:n])

    assert bands.shape == (n, N_BANDS)
    assert flag_near_duplicates(bands, sketches).tolist() == [False] * n
