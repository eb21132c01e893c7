"""Lexical diversity against the lexicalrichness package and counts by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.lexical_scores import LexicalScorer, VocdScorer
from causalmix_pipeline_tests.adapters.scored_frames import frame_of

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def richness(text: str):
    from lexicalrichness import LexicalRichness

    return LexicalRichness(text, preprocessor=None, tokenizer=words_of)


def sample(n_words: int, n_types: int, seed: int) -> str:
    """Words by a falling law, as in text."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, n_types + 1)
    drawn = rng.choice(n_types, n_words, p=share / share.sum())
    return ", ".join(f"Wört{i}" if i % 2 else f"w{i}" for i in drawn)


def diversity(text: str) -> dict:
    return LexicalScorer().score(frame_of(text)).row(0, named=True)


def vocd_of(text: str) -> float | None:
    return VocdScorer().score(frame_of(text))["vocd_d"][0]


@SLOW
@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=120))
def test_mtld_is_that_of_lexicalrichness(words):
    text = " ".join(words)

    assert diversity(text)["mtld"] == pytest.approx(richness(text).mtld(), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_words", [42, 43, 200, 3000])
def test_mtld_and_hdd_of_longer_texts_are_those_of_lexicalrichness(n_words, seed):
    text = sample(n_words, 400, seed)
    found = diversity(text)

    assert found["mtld"] == pytest.approx(richness(text).mtld(), rel=1e-12)
    assert found["hdd"] == pytest.approx(richness(text).hdd(42), rel=1e-9)


@pytest.mark.parametrize(("text", "by_hand"), [("a b c", 1.0), ("a A b", 2 / 3), ("a", 1.0)])
def test_hdd_of_a_short_text_is_its_type_token_ratio(text, by_hand):
    assert diversity(text)["hdd"] == pytest.approx(by_hand)


def test_words_are_lower_cased_and_cut_at_signs():
    assert diversity("One,two;ONE two")["hdd"] == diversity("one two one two")["hdd"]


@pytest.mark.parametrize("text", ["", " \n", "!?", "😀"])
def test_a_text_without_a_word_has_no_diversity(text):
    found = diversity(text)

    assert (found["mtld"], found["hdd"]) == (None, None)


def test_documents_of_a_batch_do_not_touch_each_other():
    texts = [sample(n, 60, n) for n in (80, 3, 500, 41, 90)]
    together = LexicalScorer().score(frame_of(*texts))

    for i, text in enumerate(texts):
        assert together.row(i, named=True) == diversity(text)


# vocd-D


@pytest.mark.parametrize("seed", range(5))
def test_vocd_is_that_of_lexicalrichness_within_its_random_error(seed):
    text = sample(400, 300, seed)
    theirs = [richness(text).vocd(iterations=1, seed=s) for s in range(6)]

    error = np.std(theirs, ddof=1) * np.sqrt(1 / 6 + 1 / 3)
    assert abs(vocd_of(text) - np.mean(theirs)) < 4 * error


def test_vocd_finds_the_diversity_of_a_text_that_follows_the_curve():
    """Words drawn evenly from few types: D solves ratio(n) = D/n (sqrt(1 + 2n/D) - 1)."""
    from scipy.optimize import curve_fit

    rng = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in rng.integers(0, 80, 20_000))
    sizes = np.arange(35, 51)
    ratios = 80 * (1 - (1 - 1 / 80) ** sizes) / sizes  # expected share of different words
    fitted, _ = curve_fit(lambda n, d: d / n * (np.sqrt(1 + 2 * n / d) - 1), sizes, ratios, p0=50)

    assert vocd_of(text) == pytest.approx(fitted[0], rel=0.03)


def test_vocd_depends_on_the_document_alone():
    texts = [sample(n, 100, n) for n in (70, 300, 60)]
    together = VocdScorer().score(frame_of(*texts))["vocd_d"].to_list()

    assert together == [vocd_of(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "is_defined"),
    [
        ("a b " * 25, True),
        ("a b " * 24 + "a", False),  # 49 words
        (" ".join(f"w{i}" for i in range(60)), False),  # no word twice
        ("", False),
    ],
)
def test_vocd_is_null_where_it_is_not_defined(text, is_defined):
    assert (vocd_of(text) is not None) == is_defined
