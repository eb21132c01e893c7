"""Token metrics against sums by hand and a slow loop in numpy."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.document_ids import document_id, fold_of
from causalmix_pipeline.adapters.token_scores import (
    CrossFittedModel,
    PoolLanguageModel,
    TokenScorer,
    token_values,
)
from causalmix_pipeline.adapters.tokenizer import encode_texts, train_tokenizer, vocab_size_of
from causalmix_pipeline.core.errors import ScoringError
from causalmix_pipeline_tests.adapters.scored_frames import HARD_TEXTS, frame_of

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.uint32)


MODEL = PoolLanguageModel.fit([ids(0, 1, 1, 2), ids(1, 1)], 4)
NAMES = ("token_entropy", "unique_bigram_ratio", "unigram_cross_entropy", "bigram_cross_entropy")


def values_of(*tokens: int) -> dict:
    bits_V, bits_VV = MODEL.bits_tables()
    found = token_values([ids(*tokens)], [0], np.stack([bits_V]), np.stack([bits_VV]))
    return dict(zip(NAMES, found[0].tolist(), strict=True))


# The frequencies


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


@SLOW
@given(st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=5))
def test_probabilities_sum_to_one_after_every_token(documents):
    bits_V, bits_VV = PoolLanguageModel.fit([ids(*d) for d in documents], 6).bits_tables()

    assert (2.0 ** -bits_V.astype(float)).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose((2.0 ** -bits_VV.astype(float)).sum(axis=1), 1, atol=1e-5)


def test_documents_fall_into_two_halves_of_about_equal_size():
    folds = [fold_of(document_id(str(i))) for i in range(400)]

    assert 150 < sum(folds) < 250


# The metrics


def test_token_metrics_are_the_sums_by_hand():
    bits_V, bits_VV = MODEL.bits_tables()
    found = values_of(1, 1, 2, 2)

    assert found["token_entropy"] == pytest.approx(1.0)
    assert found["unique_bigram_ratio"] == 1.0
    assert found["unigram_cross_entropy"] == pytest.approx((bits_V[1] + bits_V[2]) / 2)
    by_hand = (bits_VV[1, 1] + bits_VV[1, 2] + bits_VV[2, 2]) / 3
    assert found["bigram_cross_entropy"] == pytest.approx(by_hand)


def test_repetition_shows_in_entropy_and_pairs():
    found = values_of(2, 2, 2, 2, 2)

    assert found["token_entropy"] == 0
    assert found["unique_bigram_ratio"] == 1 / 4


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_a_document_without_pairs_has_finite_metrics(tokens):
    assert all(np.isfinite(value) for value in values_of(*tokens).values())


@SLOW
@given(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=6))
def test_a_batch_has_the_values_of_a_slow_loop(documents):
    bits_V, bits_VV = MODEL.bits_tables()
    encoded = [ids(*d) for d in documents]
    found = token_values(encoded, [0] * len(encoded), bits_V[None], bits_VV[None])

    for row, tokens in zip(found, encoded, strict=True):
        n = len(tokens)
        share = np.unique(tokens, return_counts=True)[1] / max(n, 1)
        pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
        slow = [
            -(share * np.log2(share)).sum(),
            len(set(pairs)) / max(len(pairs), 1),
            np.mean([bits_V[t] for t in tokens]) if n else 0.0,
            np.mean([bits_VV[p] for p in pairs]) if pairs else 0.0,
        ]
        np.testing.assert_allclose(row, slow, rtol=1e-5, atol=1e-12)


# The scorer

TEXTS = [f"the cat number {i} sat on the mat, and the dog {i * 7} ran" for i in range(60)]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=320)


def fit(texts: list[str]) -> CrossFittedModel:
    names = [document_id(text) for text in texts]
    return CrossFittedModel.fit(encode_texts(TOKENIZER, texts), names, vocab_size_of(TOKENIZER))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> TokenScorer:
    return TokenScorer.write(tmp_path_factory.mktemp("tokens"), TOKENIZER, fit(TEXTS))


def test_a_document_is_scored_by_the_half_that_it_is_not_in(scorer):
    """Its own counts would make it look easier than an unseen document of the same kind."""
    text = TEXTS[0]
    tokens = encode_texts(TOKENIZER, [text])[0]
    halves = fit(TEXTS).halves
    scored = {
        half: scorer.score(frame_of(text, fold_ids=[f"{half}" * 32])).row(0, named=True)
        for half in (0, 1)
    }

    for half in (0, 1):
        bits_V, bits_VV = halves[1 - half].bits_tables()
        assert scored[half]["n_tokens"] == len(tokens)
        assert scored[half]["unigram_cross_entropy"] == pytest.approx(bits_V[tokens].mean())
        assert scored[half]["bigram_cross_entropy"] == pytest.approx(
            bits_VV[tokens[:-1], tokens[1:]].mean()
        )
    assert scored[0]["bigram_cross_entropy"] != scored[1]["bigram_cross_entropy"]


def test_counts_tokens_as_datatrove_does(scorer):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(TOKENIZER)
    tokenizer.encode_special_tokens = True
    texts = [text for text in HARD_TEXTS if text]
    found = scorer.score(frame_of(*texts))["n_tokens"].to_list()

    assert found == [len(tokenizer.encode(text).ids) for text in texts]


def test_a_scorer_is_small_and_scores_alike_where_it_is_sent(scorer):
    sent = pickle.dumps(scorer)

    assert len(sent) < 1000
    assert pickle.loads(sent).score(frame_of(*TEXTS)).equals(scorer.score(frame_of(*TEXTS)))


def test_the_key_names_the_tokenizer_and_the_counts(tmp_path):
    one = TokenScorer.write(tmp_path, TOKENIZER, fit(TEXTS))
    again = TokenScorer.write(tmp_path, TOKENIZER, fit(TEXTS))
    other_counts = TokenScorer.write(tmp_path, TOKENIZER, fit(TEXTS[:-1]))
    other_tokenizer = TokenScorer.write(tmp_path, TOKENIZER + " ", fit(TEXTS))

    assert one == again
    assert len({one.key, other_counts.key, other_tokenizer.key}) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        s.folder.name for s in (one, other_counts, other_tokenizer)
    )


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(ScoringError, match="gone can't be read"):
        TokenScorer(tmp_path / "gone", "0" * 32).score(frame_of("a"))


@pytest.mark.parametrize("name", ["tokenizer.json", "unigram_bits.npy", "bigram_bits.npy"])
def test_a_damaged_folder_is_refused(tmp_path, name):
    scorer = TokenScorer.write(tmp_path, TOKENIZER, fit(TEXTS))
    flip_last_byte(scorer.folder / name)

    with pytest.raises(ScoringError, match="undamaged"):
        scorer.score(frame_of("a"))


def test_a_folder_of_other_counts_is_refused(tmp_path):
    scorer = TokenScorer.write(tmp_path, TOKENIZER, fit(TEXTS))

    with pytest.raises(ScoringError, match="must hold the frequencies 000"):
        TokenScorer(scorer.folder, "0" * 32).score(frame_of("a"))


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
