"""Baselines that learn by a library: what they prefer is better in truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from causalmix_pipeline.adapters.baseline_mixtures import (
    log_linear_mixture,
    make_baselines,
    regmix_mixture,
)
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core import baselines
from causalmix_pipeline.core.mixture import is_on_simplex, kl_divergence
from causalmix_pipeline.core.runs import SIZE_COVARIATE

TRUTH = SyntheticPool.draw(n_domains=4, n_covariates=2, n_tasks=2, seed=1)
RUNS = TRUTH.run_table(n_states=24, mixtures_per_state=4, noise=0.05, n_repeats=4, seed=2)
EQUAL_D = np.full(4, 0.25)
FIRST = np.array([1.0, 0.0])


def mean_gain(mixture_D: np.ndarray) -> float:
    states = RUNS.distinct_states()[1]
    return np.mean([TRUTH.expected_gain(s, mixture_D[None], EQUAL_D)[0, 0] for s in states])


def test_regmix_prefers_what_its_trees_prefer(monkeypatch):
    monkeypatch.setattr(baselines, "REGMIX_CANDIDATES", 4000)

    best_D = regmix_mixture(RUNS, EQUAL_D, FIRST, seed=0)

    assert is_on_simplex(best_D)
    assert mean_gain(best_D) > 0


def test_the_log_linear_optimum_is_that_of_laws_that_are_true():
    """One task's law is best at a vertex; three that want different domains meet in between."""
    weights_T, slope_TD = np.array([0.5, 0.3, 0.2]), -4 * np.eye(3, 4)

    def truth(mixture_MD: np.ndarray) -> np.ndarray:
        return -np.exp(mixture_MD @ slope_TD.T)

    runs = replace(RUNS, tasks=tuple("xyz"), outcome_NT=truth(RUNS.mixture_ND))
    candidates = np.random.default_rng(0).dirichlet(np.ones(4), 20_000)
    scale = float((baselines.within_states(runs) @ weights_T).std())

    def value(mixture_MD: np.ndarray) -> np.ndarray:
        penalty_M = baselines.KL_PENALTY * scale * kl_divergence(mixture_MD, EQUAL_D)
        return truth(mixture_MD) @ weights_T - penalty_M

    best_D = log_linear_mixture(runs, EQUAL_D, weights_T, seed=0)

    assert value(best_D[None])[0] >= value(candidates).max() - 0.02 * scale
    assert best_D.max() < 0.6


def test_what_can_be_made_is_made(monkeypatch):
    monkeypatch.setattr(baselines, "REGMIX_CANDIDATES", 500)
    natural_D = np.array([0.4, 0.3, 0.2, 0.1])

    made = make_baselines(RUNS, FIRST)
    more = make_baselines(replace(RUNS, domains=(*RUNS.tasks, "c", "d")), FIRST, natural_D, EQUAL_D)
    full = replace(
        RUNS,
        tasks=RUNS.domains,
        outcome_NT=np.column_stack([RUNS.outcome_NT, RUNS.outcome_NT]),
    )

    assert list(made) == ["equal", "grid", "regmix", "log_linear"]
    assert list(more) == ["equal", "natural", "fixed", "grid", "regmix", "log_linear"]
    assert "dmo" in make_baselines(full, np.full(4, 0.25))
    for mixture_D in [*made.values(), *more.values()]:
        assert is_on_simplex(mixture_D)
    assert np.abs(more["regmix"] - made["regmix"]).max() > 0.01  # around natural, not equal


def test_larger_proxies_win_no_mixture_that_they_happened_to_get(monkeypatch):
    """With runs of two sizes, the baselines are those of runs on one level."""
    monkeypatch.setattr(baselines, "REGMIX_CANDIDATES", 2000)
    is_large_N = RUNS.state_ids % 3 == 0
    size_ND1 = np.repeat(np.where(is_large_N, 20.0, 17.0)[:, None, None], 4, axis=1)
    sized = replace(
        RUNS,
        covariates=(*RUNS.covariates, SIZE_COVARIATE),
        state_NDP=np.concatenate([RUNS.state_NDP, size_ND1], axis=2),
    )
    lifted = replace(sized, outcome_NT=RUNS.outcome_NT + 100 * is_large_N[:, None])

    first, second = make_baselines(sized, FIRST), make_baselines(lifted, FIRST)

    for name, mixture_D in first.items():
        assert np.abs(second[name] - mixture_D).max() < 0.02, name
    assert mean_gain(second["regmix"]) > 0
