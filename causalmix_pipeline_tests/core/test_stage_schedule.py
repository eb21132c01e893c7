"""Effects of each stage without the others', the next checkpoint, and a mixture for each stage."""

from __future__ import annotations

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import CombinedEstimator
from causalmix_pipeline.adapters.staged_fits import Remembering, StageFits, fit_stages
from causalmix_pipeline.adapters.structured_ridge import StructuredRidge
from causalmix_pipeline.core.effects import center_by_state, cross_validate, r_squared
from causalmix_pipeline.core.policy import Constraints
from causalmix_pipeline.core.stage_effects import CheckpointModel, part_stages, predict_staged
from causalmix_pipeline.core.stage_schedule import (
    StageObjective,
    choose_stage,
    joint_gain,
    joint_over_static,
    roll_schedule,
    state_at,
)
from causalmix_pipeline_tests.core.staged_truth import effect_at, staged_truth

EQUAL_D = np.full(4, 0.25)
LIVE_DP = np.zeros((4, 2))
STAGED = staged_truth(n_stages=3, n_runs=128)


def make(stage, runs):
    return StructuredRidge()


@pytest.fixture(scope="module")
def fits() -> StageFits:
    chosen = dict.fromkeys(STAGED.runs.tasks, "structured_ridge")
    return fit_stages(STAGED, chosen, {"first": 1.0})


def objective(fits: StageFits, **changes) -> StageObjective:
    constraints = Constraints(EQUAL_D, np.zeros(4), np.ones(4), **changes)
    return StageObjective(fits.tasks, fits.weights_T, constraints, 3)


def true_gain(mixtures) -> float:
    """Of a schedule over equal shares in each stage."""
    parts = [
        effect_at(LIVE_DP, k) @ (np.sqrt(mixture_D) - np.sqrt(EQUAL_D))
        for k, mixture_D in enumerate(mixtures)
    ]
    return float(np.sum(parts))


def within(staged, prediction_NT) -> float:
    group_N = staged.runs.groups
    outcome_NT, said_NT = (
        center_by_state(values, group_N) for values in (staged.runs.outcome_NT, prediction_NT)
    )
    return r_squared(outcome_NT.ravel(), said_NT.ravel())


def test_stages_tell_outcomes_of_unseen_pools_that_their_mean_does_not():
    staged = staged_truth(n_runs=64)
    by_mean = cross_validate(StructuredRidge, staged.runs).prediction_NT

    by_stages = predict_staged(staged, make)

    assert within(staged, by_mean) < 0.5
    assert by_stages == pytest.approx(staged.runs.outcome_NT, abs=0.8)  # its level too
    assert within(staged, by_stages) > 0.75
    assert within(staged, predict_staged(staged, make, checkpoint=True)) > 0.6


def test_where_only_the_mean_counts_stages_tell_no_more():
    staged = staged_truth("mean", n_runs=64)
    by_mean = cross_validate(StructuredRidge, staged.runs).prediction_NT

    assert within(staged, predict_staged(staged, make)) < within(staged, by_mean) + 0.02


def test_the_other_stages_are_taken_out_by_predictions_that_did_not_see_the_run():
    """With them in, a stage's own mixtures explain a part of the outcome; without, nearly all."""
    staged = staged_truth()
    plain = cross_validate(StructuredRidge, staged.table(1)).frame["r2_within"].mean()

    part = part_stages(staged, make)[1]

    parted = cross_validate(StructuredRidge, part.table).frame["r2_within"].mean()
    assert parted > 0.9 > plain + 0.1  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    np.testing.assert_array_equal(part.table.mixture_ND, staged.mixture_NSD[:, 1])


def test_the_next_checkpoint_follows_from_the_mixture_and_the_losses_before():
    first, second = (CheckpointModel.fit(STAGED, stage) for stage in (0, 1))
    mixture_D = np.array([0.7, 0.1, 0.1, 0.1])

    loss_D = first.predict(LIVE_DP, mixture_D, None)
    later_D = second.predict(LIVE_DP, EQUAL_D, loss_D)

    assert min(first.r2, second.r2) > 0.8
    expected_D = 5 - 2 * np.sqrt(mixture_D / 3)
    assert loss_D == pytest.approx(expected_D, abs=0.1)
    assert later_D == pytest.approx(5 - 2 * np.sqrt((mixture_D + EQUAL_D) / 3), abs=0.2)


def test_the_schedule_truly_gains_nearly_what_is_to_be_had_and_promises_no_more(fits):
    best = [np.maximum(effect_at(LIVE_DP, k), 0) ** 2 for k in range(3)]
    to_be_had = true_gain([square_D / square_D.sum() for square_D in best])
    static_D = np.array([0.3, 0.2, 0.1, 0.4])

    choices = roll_schedule(fits.models, fits.rolls, LIVE_DP, static_D, objective(fits))

    gain, se = joint_gain(choices)
    realised = true_gain([choice.mixture_D for choice in choices])
    assert realised > 0.9 * to_be_had
    assert abs(gain - realised) < 2 * se
    assert [choice.stage for choice in choices] == [0, 1, 2]
    assert choices[0].loss_D is None
    np.testing.assert_array_equal(
        choices[1].loss_D, fits.rolls[0].predict(LIVE_DP, choices[0].mixture_D, None)
    )
    over_static, over_se = joint_over_static(choices)
    assert 0 < over_se < 3 * se
    assert over_static == pytest.approx(realised - true_gain([static_D] * 3), abs=0.1)


def test_standard_errors_of_stages_add_up_as_they_are(fits):
    """By the root of the sum of squares, 90% intervals covered half of the true gains."""
    choices = roll_schedule(fits.models, fits.rolls, LIVE_DP, EQUAL_D, objective(fits))

    assert joint_gain(choices)[1] == pytest.approx(sum(choice.gain_se for choice in choices))
    over, over_se = joint_over_static(choices)  # here the static mixture is the reference
    assert (over, over_se) == pytest.approx(joint_gain(choices))


def test_each_stage_keeps_to_the_constraints(fits):
    limits = {"trust_radius": 0.05, "guard_rails": {"first": 0.0}}

    choices = roll_schedule(fits.models, fits.rolls, LIVE_DP, EQUAL_D, objective(fits, **limits))

    for choice in choices:
        assert (choice.mixture_D * np.log(4 * choice.mixture_D)).sum() <= 0.05 + 1e-6


def test_a_pool_out_of_reach_gets_the_reference_and_no_promise(fits):
    choices = roll_schedule(fits.models, fits.rolls, LIVE_DP + 50, EQUAL_D, objective(fits))

    assert [choice.reach.verdict for choice in choices] == ["unsupported"] * 3
    assert all((choice.mixture_D == EQUAL_D).all() for choice in choices)
    assert np.isnan(joint_gain(choices)[0])


def test_a_checkpoint_that_no_proxy_had_is_out_of_reach(fits):
    near_D, far_D = STAGED.loss_NSD[:, 1].mean(0), np.full(4, 1.0)
    for loss_D, verdict in ((near_D, "supported"), (far_D, "unsupported")):
        state = state_at(fits.models[1], LIVE_DP, loss_D, None)

        choice = choose_stage(fits.models[1], state, EQUAL_D, objective(fits))

        assert choice.reach.verdict == verdict


def test_hyper_parameters_are_searched_without_the_other_stages_effects():
    """On outcomes with them in, another penalty is the best."""
    staged = staged_truth(n_runs=32)
    chosen = {"first": "response_surface"}  # it is the one that reuses what was searched
    model = fit_stages(staged, chosen, {"first": 1.0}, checkpoint=False).models[0]

    searched = CombinedEstimator(chosen, 0).fit(model.table).parameters()["members"]
    raw = staged.table(0).select_tasks(("first",))
    assert model.estimator.parameters()["members"] == searched  # pyright: ignore[reportAttributeAccessIssue]
    assert CombinedEstimator(chosen, 0).fit(raw).parameters()["members"] != searched


def test_without_a_folds_runs_hyper_parameters_are_searched_anew():
    staged = staged_truth(n_runs=64, noise=0.1)
    make = Remembering({"first": "structured_ridge", "second": "structured_ridge"}, 0)
    first, rest = staged.table(0), staged.subset(np.arange(20, 60)).table(0)

    for table in (first, rest, rest):
        make(0, table)

    assert len(make.known) == 2


def test_tasks_without_a_say_are_not_fitted(fits):
    assert fits.tasks == ("first",)
    assert all(model.table.tasks == ("first",) for model in fits.models)
