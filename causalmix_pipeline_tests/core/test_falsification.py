from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.structured_ridge import StructuredRidge
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import cross_validate, permute_mixtures, permute_states
from causalmix_pipeline.core.falsification import (
    OBJECTIVE,
    describe,
    falsify,
    mixtures_matter,
    states_matter,
)

WEIGHTS_T = (0.5, 0.5)
SEEDS = range(8)


def ridge():
    return make_estimator("structured_ridge")


def drawn(seed: int, n_states: int = 64, state_effect: float = 0.7):
    pool = SyntheticPool.draw(6, 4, 2, seed=seed, state_effect=state_effect)
    return pool.run_table(n_states, 4, seed=100 + seed)


def objective(runs, check: str):
    trials = falsify(ridge, runs, WEIGHTS_T)
    return next(trial for trial in trials if (trial.check, trial.task) == (check, OBJECTIVE))


def passes(tables, check: str) -> int:
    return sum(objective(runs, check).passed is True for runs in tables)


def test_real_runs_pass_both_tests_for_each_task():
    trials = falsify(ridge, drawn(0), WEIGHTS_T)

    assert [(trial.check, trial.task) for trial in trials] == [
        (check, task)
        for check in ("mixtures_matter", "states_matter")
        for task in ("task_0", "task_1", OBJECTIVE)
    ]
    assert all(trial.passed for trial in trials)


def test_with_permuted_mixtures_mixtures_do_not_matter():
    """Chance passes 1 of 100 tables; more than 1 of these 8 is no chance."""
    tables = [permute_mixtures(drawn(s), np.random.default_rng(s)) for s in SEEDS]

    assert passes(tables, "mixtures_matter") <= 1


def test_with_permuted_covariates_states_do_not_matter_but_mixtures_do():
    tables = [permute_states(drawn(s), np.random.default_rng(s)) for s in SEEDS]

    assert passes(tables, "states_matter") == 0
    assert passes(tables[:2], "mixtures_matter") == 2


def test_a_main_effect_of_the_state_is_no_effect_on_what_mixtures_do():
    assert passes([drawn(s, state_effect=0.0) for s in SEEDS], "states_matter") == 0


def test_p_values_of_random_predictions_are_spread_as_chance_would():
    """Independent states need no sqrt(2), so chance passes less often than it may."""
    runs = drawn(1)
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=runs.outcome_NT.shape) for _ in range(200)]

    p_values = np.array([mixtures_matter(runs, f, WEIGHTS_T)[-1].p_value for f in noise])

    assert 0.3 < np.median(p_values) < 0.7
    assert (p_values < 0.05).mean() <= 0.05


def test_the_correlation_is_the_mean_over_states_by_hand():
    runs = drawn(2, n_states=10)
    prediction_NT = np.random.default_rng(1).normal(size=runs.outcome_NT.shape)

    trial = mixtures_matter(runs, prediction_NT, WEIGHTS_T)[0]

    by_hand = [
        np.corrcoef(runs.outcome_NT[runs.state_ids == s, 0], prediction_NT[runs.state_ids == s, 0])
        for s in range(10)
    ]
    assert trial.estimate == pytest.approx(np.mean([c[0, 1] for c in by_hand]))


def test_one_run_a_state_cannot_be_told():
    runs = SyntheticPool.draw(6, 4, 2, seed=1).run_table(64, 1)

    for trial in falsify(ridge, runs, WEIGHTS_T):
        assert trial.passed is None
        assert "0 pool states have two runs" in describe(trial)


def test_without_covariates_states_cannot_be_told_but_mixtures_can():
    runs = SyntheticPool.draw(4, 0, 2, seed=1).run_table(1, 64)
    blind_NT = cross_validate(lambda: make_estimator("regmix"), runs).prediction_NT

    trials = falsify(ridge, runs, WEIGHTS_T, prediction_NT=blind_NT)

    assert [trial.passed for trial in trials] == [True] * 3 + [None] * 3
    assert "no covariates" in describe(trials[-1])
    assert mixtures_matter(runs, None, WEIGHTS_T)[0].passed is None


def test_predictions_that_never_vary_do_not_pass():
    runs = drawn(3)
    flat_NT = np.ones_like(runs.outcome_NT)

    trials = mixtures_matter(runs, flat_NT, WEIGHTS_T) + states_matter(
        runs, flat_NT, flat_NT, WEIGHTS_T
    )

    assert not any(trial.passed for trial in trials)


def test_the_order_of_the_runs_changes_nothing():
    runs = drawn(4, n_states=16)
    order = np.random.default_rng(0).permutation(runs.n_runs)

    first = falsify(ridge, runs, WEIGHTS_T)
    second = falsify(ridge, runs.subset(order), WEIGHTS_T)

    for a, b in zip(first, second, strict=True):
        assert a.p_value == pytest.approx(b.p_value, rel=1e-6)


def test_what_sets_a_whole_state_apart_changes_nothing():
    runs = drawn(5, n_states=16)
    offset_N = np.random.default_rng(0).normal(0, 20, size=16)[runs.state_ids]
    moved = replace(runs, outcome_NT=runs.outcome_NT + offset_N[:, None])

    first, second = (falsify(ridge, table, WEIGHTS_T) for table in (runs, moved))

    for a, b in zip(first, second, strict=True):
        assert a.p_value == pytest.approx(b.p_value, rel=1e-5)


def test_the_units_of_a_task_change_nothing():
    runs = drawn(5, n_states=16)
    scaled = replace(runs, outcome_NT=runs.outcome_NT * [10.0, 0.1] + 7)

    first, second = (falsify(ridge, table, WEIGHTS_T)[0].p_value for table in (runs, scaled))

    assert first == pytest.approx(second, rel=1e-6)


def test_runs_that_no_estimator_takes_are_said_not_to_tell():
    """Centred by state, seeds of one mixture lie so close that other runs look diverged."""
    pool = SyntheticPool.draw(3, 2, 1, seed=1)
    runs = pool.run_table(100, 2, noise=0.0, seed=4)
    mixture_ND, outcome_NT = runs.mixture_ND.copy(), runs.outcome_NT.copy()
    rng = np.random.default_rng(0)
    for first in range(0, 140, 2):
        mixture_ND[first + 1] = mixture_ND[first]
        outcome_NT[first + 1] = outcome_NT[first] + rng.normal(0, 1e-4, size=1)
    runs = replace(runs, mixture_ND=mixture_ND, outcome_NT=outcome_NT)

    trials = falsify(StructuredRidge, runs, [1.0])
    assert {trial.passed for trial in trials} == {None}
    assert all("diverged" in trial.reason for trial in trials)
