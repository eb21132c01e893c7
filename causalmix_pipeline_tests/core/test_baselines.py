"""Baselines, each where the best mixture is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.core import baselines
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import dirichlet_design, is_on_simplex
from causalmix_pipeline.core.runs import RunTable

ONE = np.ones(1)


def table(outcome, mixture_ND, tasks=("score",), states=1, state_offset=0.0) -> RunTable:
    """Runs of a known outcome (N, T); states differ by an offset alone."""
    n_runs, n_domains = mixture_ND.shape
    state_ids = np.arange(n_runs) % states
    outcome_NT = outcome(mixture_ND) + state_offset * state_ids[:, None]
    return RunTable(
        domains=tuple("abcdef"[:n_domains]),
        covariates=("x",),
        tasks=tasks,
        run_ids=tuple(f"run{i:04d}" for i in range(n_runs)),
        state_ids=state_ids,
        state_NDP=np.repeat(state_ids[:, None, None], n_domains, axis=1).astype(float),
        mixture_ND=mixture_ND,
        outcome_NT=outcome_NT,
        repeat_of_N=np.arange(n_runs),
    )


def design(n_runs: int, n_domains: int) -> np.ndarray:
    return dirichlet_design(n_runs, n_domains, strength_range=(0.4, 3.0), seed=1)


def test_equal_natural_and_fixed_are_what_they_say():
    assert baselines.equal(4).tolist() == [0.25] * 4
    assert baselines.natural(np.array([1, 3])).tolist() == [0.25, 0.75]
    assert baselines.fixed(np.array([0.2, 0.8])).tolist() == [0.2, 0.8]
    with pytest.raises(ConfigError, match="natural needs tokens"):
        baselines.natural(np.zeros(3))
    with pytest.raises(ConfigError, match="fixed mixture must be shares"):
        baselines.fixed(np.array([0.5, 0.6]))


@pytest.mark.parametrize("n_steps", [1, 2, 4, 7])
def test_a_mixture_snaps_to_the_nearest_point_of_the_lattice(n_steps):
    mixture_ND = design(200, 3)
    axis = np.arange(n_steps + 1)
    points = np.array([(i, j, n_steps - i - j) for i in axis for j in axis if i + j <= n_steps])

    snapped = baselines.snap(mixture_ND, n_steps)

    assert (snapped.sum(axis=1) == n_steps).all()
    distance = np.square(mixture_ND[:, None] * n_steps - points[None]).sum(axis=2)
    reached = np.square(mixture_ND * n_steps - snapped).sum(axis=1)
    np.testing.assert_allclose(reached, distance.min(axis=1), atol=1e-9)


def test_the_grid_finds_the_lattice_point_that_is_best_in_truth():
    target_D = np.array([0.5, 0.25, 0.25])
    runs = table(lambda t: -np.square(t - target_D).sum(axis=1)[:, None], design(400, 3))

    np.testing.assert_allclose(baselines.grid(runs, ONE, 4), target_D)
    assert is_on_simplex(baselines.grid(runs, ONE))


def test_the_grid_compares_within_pool_states():
    """One state is far better than the others whatever the mixture, and has odd mixtures."""
    target_D = np.array([0.5, 0.5, 0.0])
    runs = table(
        lambda t: -np.square(t - target_D).sum(axis=1)[:, None],
        design(400, 3),
        states=40,
        state_offset=10.0,
    )

    np.testing.assert_allclose(baselines.grid(runs, ONE, 4), target_D)


def test_regmix_averages_the_candidates_that_are_predicted_best():
    wanted_D = np.array([0.6, 0.3, 0.1])

    best_D = baselines.regmix(
        lambda t: -np.abs(t - wanted_D).sum(axis=1)[:, None], np.full(3, 1 / 3), ONE, seed=0
    )

    np.testing.assert_allclose(best_D, wanted_D, atol=0.02)


def test_the_log_linear_law_is_maximised_less_its_divergence_from_natural():
    """Without an effect it's natural; a linear gain of slope s tilts natural by exp(s/penalty)."""
    natural_D = np.array([0.5, 0.3, 0.2])
    slope_D = np.array([0.0, 0.1, -0.05])
    options = {"natural_D": natural_D, "weights_T": ONE, "scale": 1.0}

    flat_D = baselines.log_linear(lambda t: np.zeros((len(t), 1)), **options)
    tilted_D = baselines.log_linear(lambda t: (t @ slope_D)[:, None], **options)

    by_hand_D = natural_D * np.exp(slope_D / baselines.KL_PENALTY)
    np.testing.assert_allclose(flat_D, natural_D, atol=1e-3)
    np.testing.assert_allclose(tilted_D, by_hand_D / by_hand_D.sum(), atol=3e-3)


def losses(mixture_ND: np.ndarray) -> np.ndarray:
    """Minus the loss of each domain, by the law."""
    laws = [(1.0, 2.0, 0.2, 0.6, 0.4), (2.0, 1.0, 0.05, 0.8, 0.3), (0.3, 0.0, 1.0, 1.0, 0.5)]
    return -np.column_stack(
        [baselines.saturation(mixture_ND[:, d], *law) for d, law in enumerate(laws)]
    )


def test_dmo_finds_the_optimum_of_its_own_law():
    runs = table(losses, design(120, 3), tasks=("a", "b", "c"))
    weights_T = np.array([0.5, 0.3, 0.2])
    candidates = np.random.default_rng(0).dirichlet(np.ones(3), 20_000)

    best_D = baselines.dmo(runs, weights_T)

    best_value = float((losses(best_D[None]) @ weights_T)[0])
    assert best_value >= float((losses(candidates) @ weights_T).max()) - 1e-3


def test_dmo_takes_the_metrics_it_is_told():
    runs = replace(table(losses, design(120, 3), tasks=("a", "b", "c")), tasks=("x", "y", "z"))
    weights_T = np.array([0.5, 0.3, 0.2])

    told_D = baselines.dmo(runs, weights_T, {"a": "x", "b": "y", "c": "z"})

    same = table(losses, design(120, 3), tasks=("a", "b", "c"))
    np.testing.assert_allclose(told_D, baselines.dmo(same, weights_T))
    with pytest.raises(ConfigError, match=r"dmo needs a metric of each domain, got none for a, b"):
        baselines.dmo(runs, weights_T)
    with pytest.raises(ConfigError, match="dmo needs a metric of a domain with a weight"):
        baselines.dmo(same, np.zeros(3))
