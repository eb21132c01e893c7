import numpy as np
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import center_by_state


def test_outcomes_vary_by_one_over_mixtures():
    pool = SyntheticPool.draw(5, 3, 4, seed=1)
    mixture_MD = np.random.default_rng(1).dirichlet(np.ones(5), 2000)

    outcome_MT = pool.expected_outcome(np.zeros((5, 3)), mixture_MD)

    assert outcome_MT.std(axis=0) == pytest.approx(1, rel=0.15)


def test_the_gain_of_the_reference_is_zero():
    pool = SyntheticPool.draw(3, 2, 2)
    share_D = np.array([0.5, 0.3, 0.2])

    assert pool.expected_gain(np.ones((3, 2)), share_D, share_D) == pytest.approx(0)


def test_without_a_state_effect_the_gain_is_the_same_in_every_state():
    pool = SyntheticPool.draw(3, 2, 2, state_effect=0.0)
    share_D, equal_D = np.array([0.5, 0.3, 0.2]), np.full(3, 1 / 3)

    gains = [pool.expected_gain(s, share_D, equal_D) for s in (np.zeros((3, 2)), np.ones((3, 2)))]

    assert gains[0] == pytest.approx(gains[1])


def test_runs_are_the_truth_plus_the_noise_asked_for():
    pool = SyntheticPool.draw(4, 2, 2, seed=3)
    runs = pool.run_table(50, 4, noise=0.3, seed=5)

    truth_NT = np.vstack(
        [pool.expected_outcome(s, t) for s, t in zip(runs.state_NDP, runs.mixture_ND, strict=True)]
    )

    assert (runs.outcome_NT - truth_NT).std() == pytest.approx(0.3, rel=0.1)


def test_repeated_runs_share_state_and_mixture_and_differ_in_outcome():
    runs = SyntheticPool.draw(4, 2, 1).run_table(5, 2, n_repeats=3)

    rows = np.flatnonzero(runs.repeat_of_N == 2)

    assert len(rows) == 3
    assert len(np.unique(runs.mixture_ND[rows], axis=0)) == 1
    assert len(np.unique(runs.outcome_NT[rows])) == 3
    assert runs.n_runs == 16


def test_the_same_seed_gives_the_same_runs_and_another_seed_others():
    pool = SyntheticPool.draw(4, 2, 1)

    first, again, other = (pool.run_table(5, 2, seed=seed) for seed in (1, 1, 2))

    assert np.array_equal(first.outcome_NT, again.outcome_NT)
    assert not np.array_equal(first.mixture_ND, other.mixture_ND)


def test_confounded_mixtures_lean_to_good_domains():
    pool = SyntheticPool.draw(4, 2, 1, seed=2)
    runs = pool.run_table(100, 4, confounding=2.0)

    quality_ND = center_by_state(
        (runs.state_NDP * pool.direction_DP).sum(axis=2), np.zeros(runs.n_runs)
    )

    assert np.corrcoef(quality_ND.ravel(), runs.mixture_ND.ravel())[0, 1] > 0.3
