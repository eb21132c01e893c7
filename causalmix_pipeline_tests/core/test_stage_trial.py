"""The placebo that tells whether the stage matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.core.stage_trial import StageTrial, stage_matters
from causalmix_pipeline_tests.core.staged_truth import staged_truth

HALF = np.array([0.5, 0.5])


def test_the_order_is_found_where_stages_have_effects_of_their_own():
    trial = stage_matters(staged_truth("order"), HALF, 19)

    assert trial.passed
    assert trial.p == pytest.approx(0.05)
    assert trial.added > 0.3
    assert trial.r2_own - trial.r2_scaled > 0.1
    assert trial.p_own < 0.01
    assert trial.describe().startswith("The stage matters: the order of the mixtures adds +0.")
    assert "effects of each stage's own add +0." in trial.describe()


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_order_is_not_found_where_stages_are_alike(kind):
    trials = [stage_matters(staged_truth(kind, seed=s, n_runs=64), HALF, 19) for s in range(10)]

    assert sum(trial.passed for trial in trials) <= 2
    assert np.mean([trial.p for trial in trials]) > 0.2
    assert "isn't shown to matter" in max(trials, key=lambda trial: trial.p).describe()


@pytest.mark.parametrize(
    ("added", "p", "passed"), [(0.1, 0.05, True), (0.1, 0.06, False), (-0.1, 0.02, False)]
)
def test_it_matters_where_the_order_adds_something_and_more_than_placebos(added, p, passed):
    trial = StageTrial(0.5, 0.5 + added, p, 49, 0.6, 0.7, 0.01)

    assert trial.passed == trial.has_order == passed
    assert trial.added == pytest.approx(added)


def test_later_stages_that_weigh_more_but_want_the_same_mixture_do_not_pass():
    trials = [
        stage_matters(staged_truth("recency", seed=s, n_runs=128, noise=0.1), HALF, 19, seed=s)
        for s in range(5)
    ]

    assert all(trial.has_order for trial in trials)
    assert sum(trial.has_own_effects for trial in trials) <= 1
    assert not all(trial.passed for trial in trials)
    words = next(trial for trial in trials if not trial.passed).describe()
    assert words.startswith("The stage isn't shown to matter for the mixture")
    assert "aren't shown to want different mixtures" in words


def test_the_test_is_of_the_objective():
    """The second task alone has an order; the objective that doesn't want it has none."""
    ordered, alike = staged_truth("order"), staged_truth("sum")
    outcome_NT = np.column_stack([alike.runs.outcome_NT[:, 0], ordered.runs.outcome_NT[:, 1]])
    staged = replace(ordered, runs=replace(ordered.runs, outcome_NT=outcome_NT))

    assert stage_matters(staged, np.array([0.0, 1.0]), 19).passed
    assert not stage_matters(staged, np.array([1.0, 0.0]), 19).passed


def test_a_placebo_permutes_the_stages_of_each_run_and_keeps_repeats_alike():
    staged = staged_truth(n_stages=3)
    placebo = staged.permuted(np.random.default_rng(0))

    moved_N = (placebo.mixture_NSD != staged.mixture_NSD).any(axis=(1, 2))
    assert 0.6 < moved_N.mean() < 1
    np.testing.assert_allclose(placebo.mixture_NSD.mean(1), staged.mixture_NSD.mean(1))
    for cell in np.unique(staged.runs.repeat_of_N):
        same = placebo.mixture_NSD[staged.runs.repeat_of_N == cell]
        assert (same == same[0]).all()


def test_with_few_pool_states_nothing_is_told():
    trial = stage_matters(staged_truth(n_runs=16), HALF, 19)

    assert not trial.passed
    assert trial.describe() == (
        "Whether the stage matters can't be told: 4 pool states have two runs, 7 are needed."
    )
