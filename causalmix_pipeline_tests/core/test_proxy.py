"""The proxy's configuration: derived sizes by hand, the schedule, and every refusal."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.proxy import ProxyConfig


def test_defaults_are_the_demos_proxy():
    config = ProxyConfig()

    assert (config.hidden, config.layers, config.steps) == (32, 1, 1000)
    assert config.intermediate == 88
    assert config.windows == 4000
    assert config.tokens == 512_000


@pytest.mark.parametrize(("hidden", "width"), [(2, 8), (32, 88), (64, 168), (96, 256), (128, 344)])
def test_the_feed_forward_width_is_the_multiple_of_8_nearest_to_8_thirds(hidden, width):
    assert ProxyConfig(hidden=hidden).intermediate == width


def test_parameters_and_flops_agree_with_a_count_by_hand():
    config = ProxyConfig(hidden=8, layers=2, vocab_size=10, sequence_length=4, steps=3)
    matrices = 8 * 24 + 8 * 8 + 3 * 8 * 24
    per_token = 6 * (10 * 8 + 2 * matrices) + 12 * 2 * 8 * 4

    assert config.n_parameters == 10 * 8 + 2 * (matrices + 24 + 8 + 8) + 8
    assert config.flops == 3 * 4 * 4 * per_token


def test_the_rate_rises_to_its_peak_and_falls_to_its_last_share():
    config = ProxyConfig(steps=100, learning_rate=1.0, warmup_share=0.1, final_lr_share=0.2)
    rates = [config.learning_rate_at(step) for step in range(100)]

    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < rate for rate, later in pairwise(rates[10:]))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_or_two_steps_has_a_rate(steps):
    config = ProxyConfig(steps=steps)

    assert 0 < config.learning_rate_at(steps - 1) <= config.learning_rate


def test_a_configuration_survives_json():
    config = ProxyConfig(hidden=64, heads=2, betas=(0.8, 0.99))

    assert ProxyConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_is_described():
    assert all(len(text) > 10 for text in ProxyConfig.describe().values())
    assert set(ProxyConfig.describe()) == set(ProxyConfig(bf16=True).to_dict())


def test_a_field_that_came_later_names_no_run_anew_at_its_default():
    assert "bf16" not in ProxyConfig().to_dict()
    assert ProxyConfig(**ProxyConfig(bf16=True).to_dict()).bf16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, r"proxy\.hidden must be >= 1, got 0"),
        ({"layers": 0}, r"proxy\.layers must be >= 1, got 0"),
        ({"heads": 0}, r"proxy\.heads must be >= 1, got 0"),
        ({"batch_size": 0}, r"proxy\.batch_size must be >= 1, got 0"),
        ({"steps": -3}, r"proxy\.steps must be >= 1, got -3"),
        ({"vocab_size": 1}, r"proxy\.vocab_size must be >= 2, got 1"),
        ({"sequence_length": 1}, r"proxy\.sequence_length must be >= 2, got 1"),
        ({"hidden": 33}, r"proxy\.hidden must be a multiple of 2 x heads \(2\), got 33"),
        ({"heads": 3}, r"multiple of 2 x heads \(6\), got 32"),
        ({"learning_rate": 0.0}, r"proxy\.learning_rate must be finite and > 0, got 0\.0"),
        ({"learning_rate": float("nan")}, r"proxy\.learning_rate .* got nan"),
        ({"init_std": -0.1}, r"proxy\.init_std must be finite and > 0, got -0\.1"),
        ({"grad_clip": float("inf")}, r"proxy\.grad_clip must be finite and > 0, got inf"),
        ({"weight_decay": -1.0}, r"proxy\.weight_decay must be finite and >= 0, got -1\.0"),
        ({"warmup_share": 1.0}, r"proxy\.warmup_share must be in \[0, 1\), got 1\.0"),
        ({"final_lr_share": 1.5}, r"proxy\.final_lr_share must be in \[0, 1\], got 1\.5"),
        ({"betas": (0.9,)}, r"proxy\.betas must be two numbers in \[0, 1\), got \(0\.9,\)"),
        ({"betas": (0.9, 1.0)}, r"proxy\.betas must be two numbers .* got \(0\.9, 1\.0\)"),
        ({"init_seed": -1}, r"proxy\.init_seed must be >= 0, got -1"),
        ({"rope_theta": 1.0}, r"proxy\.rope_theta must be finite and > 1, got 1\.0"),
    ],
)
def test_a_field_that_breaks_its_rule_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ProxyConfig(**change)
