"""Document metrics against sums by hand and against zlib, near-duplicates against planted ones."""

from __future__ import annotations

import zlib

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.document_scores import (
    CrossFittedModel,
    PoolLanguageModel,
    add_noisy_twins,
    document_id,
    fold_of,
    near_duplicates,
    score_documents,
    text_metrics,
    token_metrics,
)
from causalmix_pipeline.core.pool_state import METRICS

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.uint32)


def metrics_of(text: str) -> dict:
    return text_metrics(pl.Series([text])).row(0, named=True)


# Of the text


def test_characters_are_counted_by_kind():
    found = metrics_of("Äb1 ٣!\n")  # two letters, two digits (one Arabic), two blanks, one symbol

    assert found["letter_share"] == pytest.approx(2 / 7)
    assert found["digit_share"] == pytest.approx(2 / 7)
    assert found["symbol_share"] == pytest.approx(1 / 7)
    assert found["n_bytes"] == 9


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(UNICODE)
def test_shares_are_those_of_a_slow_count(text):
    import unicodedata

    found = metrics_of(text)
    kinds = [unicodedata.category(c) for c in text]

    assert found["n_bytes"] == len(text.encode())
    assert found["compress_ratio"] == len(zlib.compress(text.encode(), 6)) / len(text.encode())
    assert 0 <= found["letter_share"] + found["digit_share"] + found["symbol_share"] <= 1 + 1e-12
    if text.isascii():
        assert found["letter_share"] == pytest.approx(sum(k[0] == "L" for k in kinds) / len(text))
        assert found["digit_share"] == pytest.approx(sum(k == "Nd" for k in kinds) / len(text))


def test_a_long_text_is_compressed_at_level_6():
    text = " ".join(str(i * i % 997) for i in range(3000))
    sizes = {level: len(zlib.compress(text.encode(), level)) for level in (1, 6)}

    assert sizes[1] != sizes[6]
    assert metrics_of(text)["compress_ratio"] == sizes[6] / len(text)


def test_repeated_text_compresses():
    assert metrics_of("abc " * 200)["compress_ratio"] < 0.05
    assert metrics_of("q8#Zt!4x")["compress_ratio"] > 1


@pytest.mark.parametrize(
    ("text", "by_hand"),
    [
        ("If it rains, then we stay because we must.", 3 / 9),
        ("BECAUSE", 1.0),
        ("nothing of the sort here", 0.0),
        ("soup thenceforth iffy", 0.0),  # whole words only
        ("!!!", 0.0),
    ],
)
def test_connectives_are_counted_per_hundred_words(text, by_hand):
    assert metrics_of(text)["logical_words"] == pytest.approx(100 * by_hand)


# Of the token ids

COUNTED = [ids(0, 1, 1, 2), ids(1, 1)]
MODEL = PoolLanguageModel.fit(COUNTED, 4)
BOTH = CrossFittedModel((MODEL, MODEL))
ANY_ID = "0" * 32


def test_tokens_and_pairs_are_counted_inside_documents():
    assert MODEL.unigram_V.tolist() == [1, 4, 1, 0]
    by_hand = np.zeros((4, 4), int)
    by_hand[0, 1], by_hand[1, 1], by_hand[1, 2] = 1, 2, 1  # none from document 1 into document 2
    np.testing.assert_array_equal(MODEL.bigram_VV, by_hand)


def test_bits_are_those_of_the_formula_by_hand():
    """Token 1 has 3 pairs and 2 followers: 3/5 of the counts, 2/5 of the unigrams plus one."""
    bits_V, bits_VV = MODEL.bits_tables()

    np.testing.assert_allclose(bits_V, -np.log2(np.array([2, 5, 2, 1]) / 10), rtol=1e-6)
    assert bits_VV[1, 1] == pytest.approx(-np.log2(3 / 5 * 2 / 3 + 2 / 5 * 5 / 10), rel=1e-6)
    assert bits_VV[1, 3] == pytest.approx(-np.log2(2 / 5 * 1 / 10), rel=1e-6)
    np.testing.assert_allclose(bits_VV[3], bits_V, rtol=1e-6)  # never seen: unigrams alone


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=5))
def test_probabilities_sum_to_one_after_every_token(documents):
    bits_V, bits_VV = PoolLanguageModel.fit([ids(*d) for d in documents], 6).bits_tables()

    assert (2.0 ** -bits_V.astype(float)).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose((2.0 ** -bits_VV.astype(float)).sum(axis=1), 1, atol=1e-5)


def test_token_metrics_are_the_sums_by_hand():
    bits_V, bits_VV = MODEL.bits_tables()
    found = token_metrics([ids(1, 1, 2, 2)], [ANY_ID], BOTH).row(0, named=True)

    assert found["n_tokens"] == 4
    assert found["token_entropy"] == pytest.approx(1.0)
    assert found["unique_bigram_ratio"] == 1.0
    assert found["unigram_cross_entropy"] == pytest.approx((bits_V[1] + bits_V[2]) / 2)
    by_hand = (bits_VV[1, 1] + bits_VV[1, 2] + bits_VV[2, 2]) / 3
    assert found["bigram_cross_entropy"] == pytest.approx(by_hand)


def test_a_document_is_scored_by_the_half_that_it_is_not_in():
    """Its own counts would make it look easier than an unseen document of the same kind."""
    own, other = ids(1, 2, 1, 2, 1, 2), ids(3, 3, 3, 3)
    model = CrossFittedModel.fit([own, other], ["0" * 32, "1" * 32], 4)
    scored = token_metrics([own], ["0" * 32], model).row(0, named=True)
    bits_V, bits_VV = PoolLanguageModel.fit([other], 4).bits_tables()

    assert scored["unigram_cross_entropy"] == pytest.approx(bits_V[[1, 2]].mean())
    assert scored["bigram_cross_entropy"] == pytest.approx(
        (3 * bits_VV[1, 2] + 2 * bits_VV[2, 1]) / 5
    )


def test_documents_fall_into_two_halves_of_about_equal_size():
    folds = [fold_of(document_id(str(i))) for i in range(400)]

    assert 150 < sum(folds) < 250


def test_repetition_shows_in_entropy_and_pairs():
    found = token_metrics([ids(2, 2, 2, 2, 2)], [ANY_ID], BOTH).row(0, named=True)

    assert found["token_entropy"] == 0
    assert found["unique_bigram_ratio"] == 1 / 4


@pytest.mark.parametrize("tokens", [ids(), ids(3)])
def test_a_document_without_pairs_has_finite_metrics(tokens):
    assert np.isfinite(token_metrics([tokens], [ANY_ID], BOTH).to_numpy()).all()


# Near-duplicates


def planted(jaccard: float, rng: np.random.Generator, n: int = 400) -> tuple[str, str]:
    """Two texts whose word 5-grams have about this Jaccard similarity: they share a beginning."""
    words = [f"w{i}" for i in rng.integers(0, 10**6, 2 * n)]
    shared = round(2 * jaccard * n / (1 + jaccard))
    return " ".join(words[:n]), " ".join([*words[:shared], *words[n : 2 * n - shared]])


@pytest.mark.parametrize(("jaccard", "low", "high"), [(0.6, 0, 1), (0.9, 38, 40), (1.0, 40, 40)])
def test_planted_neighbours_are_flagged_by_their_similarity(jaccard, low, high):
    rng = np.random.default_rng(0)
    texts = [text for _ in range(20) for text in planted(jaccard, rng)]

    assert low <= near_duplicates(pl.Series(texts)).sum() <= high


def test_documents_without_a_neighbour_stay_unflagged():
    rng = np.random.default_rng(1)
    texts = [planted(0.0, rng)[0] for _ in range(30)]
    flags = near_duplicates(pl.Series([*texts, texts[7].replace(" ", "  ")]))

    assert np.flatnonzero(flags).tolist() == [7, 30]


def test_documents_shorter_than_five_words_compare_as_a_whole():
    flags = near_duplicates(pl.Series(["yes it is", "yes  it is", "no it is", "no"]))

    assert flags.tolist() == [True, True, False, False]


# All together


def make_documents(texts: dict[str, list[str]]) -> pl.DataFrame:
    """The reader's frame, without the columns that scoring doesn't read."""
    rows = [
        {
            "document_id": document_id(text),
            "domain": domain,
            "augmented": False,
            "twin_of": None,
            "text": text,
        }
        for domain, part in texts.items()
        for text in part
    ]
    return pl.DataFrame(rows).sort("domain", "document_id")


def encode(documents: pl.DataFrame) -> list[np.ndarray]:
    """Words by length: enough of a tokenizer."""
    return [ids(*(len(word) % 4 for word in text.split())) for text in documents["text"]]


POOL = make_documents({"b": ["one two three", "four five"], "a": ["six", "one two three", "x  y"]})


def test_every_metric_is_there_and_finite_and_the_text_is_gone():
    scored = score_documents(POOL, encode(POOL), BOTH)

    assert {"n_bytes", "n_tokens", *METRICS} <= set(scored.columns)
    assert "text" not in scored.columns
    assert np.isfinite(scored.select(METRICS).to_numpy()).all()
    assert scored["document_id"].to_list() == POOL["document_id"].to_list()
    by_hand = scored["n_bytes"] / scored["n_tokens"]
    assert scored["bytes_per_token"].to_list() == by_hand.to_list()


def test_known_documents_are_looked_up_and_new_ones_computed():
    full = score_documents(POOL, encode(POOL), BOTH)
    marked = full.head(2).with_columns(token_entropy=pl.lit(77.0))
    again = score_documents(POOL, encode(POOL), BOTH, known_scores=marked)

    is_known = pl.col("document_id").is_in(marked["document_id"].to_list())
    assert again.filter(is_known)["token_entropy"].unique().to_list() == [77.0]
    assert again.filter(~is_known).equals(full.filter(~is_known))


def test_a_pool_that_is_known_whole_needs_no_tokens():
    full = score_documents(POOL, encode(POOL), BOTH)

    assert score_documents(POOL, [], BOTH, known_scores=full).equals(full)


def test_the_order_of_documents_does_not_change_their_scores():
    """Near-duplicates are flagged by domain: a shuffled frame must not shift the flags."""
    texts = [f"{i} lorem ipsum dolor sit amet {i * 3} consectetur" for i in range(20)]
    pool = make_documents({"b": [*texts, texts[4].replace(" ", "  ")], "a": texts[4:8]})
    shuffled = pool[np.random.default_rng(0).permutation(pool.height).tolist()]
    key = ["domain", "document_id"]
    in_order = score_documents(pool, encode(pool), BOTH).sort(key)

    assert in_order["near_duplicate"].sum() == 2
    assert score_documents(shuffled, encode(shuffled), BOTH).sort(key).equals(in_order)


def test_a_domain_is_searched_for_neighbours_by_itself():
    pool = make_documents(
        {"a": ["one two three four five six"], "b": ["one two three four five  six"]}
    )

    assert score_documents(pool, encode(pool), BOTH)["near_duplicate"].sum() == 0


# Noisy twins


def with_twins(pool: pl.DataFrame, seed: int = 3) -> pl.DataFrame:
    return add_noisy_twins(pool.drop("augmented", "twin_of"), seed=seed)


def test_a_twin_has_a_fifth_of_its_characters_replaced():
    text = "x" * 5000
    twin = with_twins(make_documents({"a": [text]})).filter("augmented")["text"][0]

    assert len(twin) == len(text)
    assert sum(a != b for a, b in zip(text, twin, strict=True)) / 5000 == pytest.approx(
        0.2, abs=0.03
    )


def test_a_twin_depends_on_its_document_and_the_seed_alone():
    alone = with_twins(make_documents({"a": ["one two three"]})).filter("augmented")
    among = with_twins(POOL).filter("augmented", domain="a", twin_of=alone["twin_of"][0])

    assert among["text"].to_list() == alone["text"].to_list()
    other = with_twins(make_documents({"a": ["one two three"]}), seed=4).filter("augmented")
    assert other["text"].to_list() != alone["text"].to_list()


def test_twins_follow_the_originals_of_their_domain():
    frame = with_twins(POOL)

    assert frame["domain"].to_list() == ["a"] * 6 + ["b"] * 4
    assert frame["augmented"].to_list() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    assert frame["twin_of"].drop_nulls().sort().to_list() == POOL["document_id"].sort().to_list()
    assert all(
        document_id(text) == i for text, i in frame.select("text", "document_id").iter_rows()
    )


def test_twins_do_not_make_their_originals_near_duplicates():
    """A short document's twin can be the document itself; a live pool has no twins at all."""
    pool = make_documents({"a": [f"{i}" for i in range(40)]})
    scored = score_documents(with_twins(pool), encode(with_twins(pool)), BOTH)

    assert scored.filter(~pl.col("augmented"))["near_duplicate"].sum() == 0


@pytest.mark.parametrize("text", ["", "a", "naïve", "𝄞", "\x00"])
def test_a_document_is_named_by_its_content(text):
    assert len(document_id(text)) == 32
    assert document_id(text) != document_id(text + " ")
