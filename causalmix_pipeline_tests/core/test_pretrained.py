"""What a fine-tuning recipe allows, and what follows from it."""

import re

import pytest

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig


def config_of(**changes) -> PretrainedConfig:
    values = {"model": "m", "weights_hash": "h", "tokens": 100_000, "sequence_length": 512}
    return PretrainedConfig(**values | changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("method", "prefix"),
        ("tokens", 511),
        ("sequence_length", 1),
        ("batch_sequences", 0),
        ("micro_batch", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("warmup_share", 1.0),
        ("final_lr_share", -0.1),
        ("weight_decay", -1.0),
        ("betas", (0.9, 1.0)),
        ("grad_clip", float("inf")),
        ("lora_rank", 0),
        ("lora_alpha", 0.0),
        ("checkpoint_steps", 0),
        ("init_seed", -1),
    ],
)
def test_a_broken_rule_names_the_field_and_the_value(field, value):
    with pytest.raises(
        ConfigError, match=rf"proxy\.{field} must be .*got .*{re.escape(str(value))}"
    ):
        config_of(**{field: value})


def test_a_run_has_as_many_steps_as_its_tokens_need():
    assert config_of(tokens=16 * 512 * 3).steps == 3
    assert config_of(tokens=16 * 512 * 3 + 1).steps == 4


def test_a_held_out_window_and_its_first_token_fit_into_a_sequence_and_a_thousand_tokens():
    assert config_of().eval_length == 511
    assert config_of(sequence_length=16_384).eval_length == 1024


def test_the_rate_follows_the_same_curve_as_that_of_small_proxies():
    fine_tuned = config_of(tokens=40 * 16 * 512, learning_rate=0.02, warmup_share=0.1)
    small = ProxyConfig(steps=40)

    assert fine_tuned.steps == 40
    for step in range(40):
        assert fine_tuned.learning_rate_at(step) == small.learning_rate_at(step)
    assert fine_tuned.learning_rate_at(9, steps=10) == pytest.approx(0.002)


def test_operations_are_six_for_each_weight_and_token_and_those_of_the_attention():
    run = config_of(tokens=36_000_000, sequence_length=2048)

    flops = run.flops(494_000_000, layers=24, hidden=896)

    assert flops == pytest.approx(36e6 * (6 * 494e6 + 12 * 24 * 896 * 2048))


def test_low_rank_additions_cost_a_third_less():
    full, lora = config_of(), config_of(method="lora")

    assert lora.flops(10, layers=1, hidden=2) == pytest.approx(
        full.flops(10, layers=1, hidden=2) * 4 / 6
    )


def test_a_run_is_named_by_what_is_learned_not_by_where_the_model_is_or_what_fits():
    same = config_of(
        model="elsewhere", micro_batch=8, gradient_checkpointing=True, checkpoint_steps=5
    )

    assert same.to_dict() == config_of().to_dict()
    assert config_of(weights_hash="other").to_dict() != config_of().to_dict()
    assert config_of(learning_rate=2e-5).to_dict() != config_of().to_dict()


def test_every_field_is_described():
    assert all(PretrainedConfig.describe().values())
