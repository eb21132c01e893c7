"""LM metrics equal those of a plain loop over the library's model, whatever shares a batch."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from causalmix_pipeline.adapters.transformers_lm import (
    IfdScorer,
    LMScorer,
    encode,
    length_batches,
)
from causalmix_pipeline.core.errors import ConfigError, ScoringError
from causalmix_pipeline.core.scoring import Scorer
from causalmix_pipeline_tests.adapters.small_models import (
    TEXTS,
    save_model,
    save_tokenizer,
    small_lm,
    small_rater,
)

#: Where `causalmix fetch-scorer` puts the default model.
SMOLLM2 = Path(__file__).parents[2] / "data" / "scorers" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("lm") / "model", small_lm())


@pytest.fixture(scope="module")
def scorer(folder) -> LMScorer:
    return LMScorer.open(folder, max_tokens=96, device="cpu")


def frame(texts: list[str], prompt_chars: list[int] | None = None) -> pl.DataFrame:
    chars = prompt_chars or [0] * len(texts)
    return pl.DataFrame(
        {
            "document_id": [f"{i:032x}" for i in range(len(texts))],
            "fold_id": [f"{i:032x}" for i in range(len(texts))],
            "text": texts,
            "prompt_chars": chars,
        }
    )


def prompt_lengths() -> list[int]:
    """Two documents with a prompt, the rest plain."""
    return [max(text.find("\n\n") + 2, 2) if "\n\n" in text else 0 for text in TEXTS]


def token_values(folder: Path, text: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray, list]:
    """Loss and entropy (nats) of tokens 2..N by the library alone, and where those tokens start."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([tokens["input_ids"][:max_tokens]])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
    loss = -log_p.gather(1, ids[0, 1:, None])[:, 0]
    starts = [start for start, _ in tokens["offset_mapping"][1:max_tokens]]
    return loss.numpy(), -(log_p.exp() * log_p).sum(1).numpy(), starts


def by_hand(folder: Path, text: str, prompt_chars: int, max_tokens: int) -> list[float]:
    loss, entropy, starts = token_values(folder, text, max_tokens)
    output = [start >= prompt_chars for start in starts]
    threshold = np.percentile(entropy[output], 99.5)
    hes = sum(e for e, counts in zip(entropy, output, strict=True) if counts and e >= threshold)
    return [loss.mean() / np.log(2), hes / np.log(2), np.exp(loss[output].mean())]


def values(scores: pl.DataFrame) -> np.ndarray:
    return scores.drop("document_id").to_numpy()


@pytest.mark.parametrize("prompts", [[0] * len(TEXTS), prompt_lengths()])
def test_metrics_equal_a_plain_loop_over_the_library(scorer, folder, prompts):
    scores = scorer.score(frame(TEXTS, prompts))

    wanted = [by_hand(folder, *each, 96) for each in zip(TEXTS, prompts, strict=True)]
    np.testing.assert_allclose(values(scores), wanted, rtol=1e-4)
    assert scores.columns == ["document_id", *scorer.metrics]
    assert isinstance(scorer, Scorer)


def test_values_depend_on_no_other_document_of_the_batch(scorer):
    together = values(scorer.score(frame(TEXTS)))

    alone = np.concatenate([values(scorer.score(frame([text]))) for text in TEXTS])
    narrow = values(replace(scorer, batch_tokens=1).score(frame(TEXTS)))
    backwards = values(scorer.score(frame(TEXTS[::-1])))[::-1]
    for other in (alone, narrow, backwards):
        np.testing.assert_allclose(other, together, rtol=1e-5)


def test_the_same_documents_give_the_same_bits(scorer):
    first, second = scorer.score(frame(TEXTS)), scorer.score(frame(TEXTS))

    assert first.equals(second)


def test_a_prompt_changes_the_metrics_of_the_output_but_not_normalized_loss(scorer):
    plain, prompted = (scorer.score(frame(TEXTS[:1], [n])).row(0) for n in (0, 33))

    assert plain[1] == pytest.approx(prompted[1])
    assert plain[3] != pytest.approx(prompted[3], rel=1e-3)


def test_a_token_across_the_end_of_the_prompt_counts_as_prompt(scorer):
    tokenizer = scorer.load().tokenizer
    text = TEXTS[3]
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    place = next(i for i, (start, end) in enumerate(offsets) if i > 3 and end - start >= 3)

    inside = encode(tokenizer, text, offsets[place][0] + 1, 96)
    at_its_start = encode(tokenizer, text, offsets[place][0], 96)

    assert at_its_start.first_output == place
    assert inside.first_output == place + 1


def test_without_a_prompt_perplexity_is_two_to_the_normalized_loss(scorer):
    loss, _, perplexity = values(scorer.score(frame(TEXTS))).T

    np.testing.assert_allclose(perplexity, 2**loss, rtol=1e-6)


def test_a_long_document_counts_up_to_the_cut(scorer):
    offsets = scorer.load().tokenizer(TEXTS[3], return_offsets_mapping=True)["offset_mapping"]
    long, cut = TEXTS[3], TEXTS[3][: offsets[39][1]]

    scores = values(replace(scorer, max_tokens=40).score(frame([long, cut])))

    assert len(offsets) > 40
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)


def test_what_has_nothing_to_average_is_null(scorer):
    scores = scorer.score(frame(["", "a", TEXTS[0]], [0, 0, len(TEXTS[0])]))

    assert scores.row(0)[1:] == (None, None, None)
    assert scores.row(1)[1:] == (None, None, None)
    assert scores["normalized_loss"][2] is not None
    assert scores.row(2)[2:] == (None, None)


def test_no_documents_give_an_empty_result(scorer):
    assert scorer.score(frame(TEXTS[:1]).clear()).columns == ["document_id", *scorer.metrics]


def test_ifd_is_the_ratio_of_perplexities_with_and_without_the_prompt(scorer, folder):
    prompts = prompt_lengths()
    scores = IfdScorer(scorer).score(frame(TEXTS, prompts))

    for text, prompt_chars, ifd in zip(TEXTS, prompts, scores["ifd"], strict=True):
        if prompt_chars == 0:
            assert ifd is None
            continue
        loss, _, starts = token_values(folder, text, 96)
        given = loss[[start >= prompt_chars for start in starts]].mean()
        alone = token_values(folder, text[prompt_chars:], 96)[0].mean()
        assert ifd == pytest.approx(np.exp(given) / np.exp(alone), rel=1e-4)


def test_ifd_compares_the_same_text_where_a_document_is_cut(scorer):
    offsets = scorer.load().tokenizer(TEXTS[3], return_offsets_mapping=True)["offset_mapping"]
    ifd = IfdScorer(replace(scorer, max_tokens=40))
    prompt_chars = offsets[9][1]

    long = ifd.score(frame([TEXTS[3]], [prompt_chars]))["ifd"][0]
    cut = ifd.score(frame([TEXTS[3][: offsets[39][1]]], [prompt_chars]))["ifd"][0]

    assert long == pytest.approx(cut, rel=1e-6)


def test_ifd_is_null_where_the_cut_leaves_no_response(scorer):
    assert IfdScorer(scorer).score(frame([TEXTS[0]], [len(TEXTS[0])]))["ifd"][0] is None


def test_a_model_that_caps_its_logits_is_scored_by_its_own_logits(tmp_path):
    """Gemma 2 squashes logits after the output layer: the layer alone would give other values."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.4,
        final_logit_softcapping=3.0, max_position_embeddings=256,
    )  # fmt: skip
    folder = save_model(tmp_path / "capped", transformers.Gemma2ForCausalLM(config))
    scorer = LMScorer.open(folder, max_tokens=96, device="cpu")

    scores = values(scorer.score(frame(TEXTS)))

    assert not scorer.load().plain_head
    np.testing.assert_allclose(scores, [by_hand(folder, t, 0, 96) for t in TEXTS], rtol=1e-4)


def test_biases_and_a_vocabulary_wider_than_a_tile_are_scored_right(tmp_path):
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=1500, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, initializer_range=0.4, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    folder = save_model(tmp_path / "biased", model)
    scorer = LMScorer.open(folder, max_tokens=96, device="cpu")

    scores = values(scorer.score(frame(TEXTS)))

    assert scorer.load().plain_head
    np.testing.assert_allclose(scores, [by_hand(folder, t, 0, 96) for t in TEXTS], rtol=1e-4)


def test_the_key_follows_the_weights_the_cut_and_the_number_format(scorer, folder, tmp_path):
    other = LMScorer.open(save_model(tmp_path / "other", small_lm(seed=1)), max_tokens=96)
    copy = LMScorer.open(save_model(tmp_path / "copy", small_lm()), max_tokens=96, batch_tokens=7)
    keys = {
        scorer.key,
        other.key,
        replace(scorer, max_tokens=95).key,
        replace(scorer, dtype="bfloat16").key,
    }

    assert len(keys) == 4
    assert copy.key == scorer.key
    assert IfdScorer(scorer).key == scorer.key.replace("lm-v1", "ifd-v1")


def test_a_scorer_travels_to_another_process(scorer):
    assert pickle.loads(pickle.dumps(IfdScorer(scorer))) == IfdScorer(scorer)


def test_a_batch_is_of_like_length_and_within_its_budget():
    lengths = [500, 10, 12, 480, 11, 90, 0, 600]
    batches = list(length_batches(lengths, 1000))

    assert sorted(place for batch in batches for place in batch) == list(range(8))
    assert [sorted(lengths[place] for place in batch) for batch in batches] == [
        [0],
        [10, 11, 12],
        [90],
        [480, 500],
        [600],
    ]


def test_a_name_on_a_hub_is_refused():
    with pytest.raises(ConfigError, match=r"profile\.lm must be a folder .* got 'gpt2'"):
        LMScorer.open("gpt2")


def test_another_kind_of_model_is_refused(tmp_path):
    rater = save_model(tmp_path / "rater", small_rater(1))

    with pytest.raises(ConfigError, match=r"causal LM .* got BertForSequenceClassification"):
        LMScorer.open(rater)


def test_weights_that_can_run_code_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")

    with pytest.raises(ConfigError, match=r"profile\.lm must hold its weights as \*\.safetensors"):
        LMScorer.open(tmp_path)


def test_a_missing_gguf_file_is_refused(folder):
    with pytest.raises(ConfigError, match=r"lm_gguf_file .* got 'none\.gguf'"):
        LMScorer.open(folder, "none.gguf")


def test_weights_with_a_part_missing_are_refused(tmp_path):
    model = small_lm()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    save_tokenizer(tmp_path)

    with pytest.raises(ScoringError, match="would be random"):
        LMScorer.open(tmp_path, max_tokens=96, device="cpu").load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1}, r"lm_max_tokens must be >= 2, got 1"),
        ({"max_tokens": 257}, r"lm_max_tokens must be <= 256, .* got 257"),
        ({"dtype": "int8"}, r"lm_dtype must be .* got 'int8'"),
    ],
)
def test_settings_that_the_model_cannot_follow_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        LMScorer.open(folder, device="cpu", **options).load()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.1)])
def test_a_gpu_scores_as_the_cpu_does(scorer, dtype, tolerance):
    on_gpu = replace(scorer, device="cuda", dtype=dtype).score(frame(TEXTS))

    wanted = values(scorer.score(frame(TEXTS)))
    np.testing.assert_allclose(values(on_gpu)[:, 0], wanted[:, 0], rtol=tolerance)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="causalmix fetch-scorer hasn't been run")
def test_the_default_model_finds_english_easier_than_shuffled_english():
    text = "The cat sat on the mat and looked out of the window at the rain in the garden."
    shuffled = " ".join(np.random.default_rng(0).permutation(text.split()))

    loss = LMScorer.open(SMOLLM2, device="cpu").score(frame([text, shuffled]))["normalized_loss"]

    assert loss[0] < 0.7 * loss[1]
    np.testing.assert_allclose(loss[0], by_hand(SMOLLM2, text, 0, 512)[0], rtol=1e-4)
