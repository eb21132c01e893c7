import json

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import choose_estimator, fit_chosen, make_estimator
from causalmix_pipeline.adapters.stacked_estimator import (
    StackedEstimator,
    stack_folds,
    stack_weights,
)
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import FoldPrediction, assign_folds, center_by_state
from causalmix_pipeline.core.errors import EstimationError

POOL = SyntheticPool.draw(3, 2, 2, seed=1)
EQUAL_D = np.full(3, 1 / 3)
STATE_DP = POOL.draw_states(1, np.random.default_rng(9))[0]
MIXTURE_MD = np.random.default_rng(8).dirichlet(np.ones(3), size=6)
MEMBERS = ("structured_ridge", "regmix", "log_linear")


@pytest.fixture(scope="module")
def runs():
    return POOL.run_table(16, 4, noise=0.1, seed=4)


@pytest.fixture(scope="module")
def stack(runs):
    return StackedEstimator(make_estimator, MEMBERS).fit(runs)


def test_weights_are_those_of_the_least_squared_error_on_the_simplex(runs):
    """Against a search over a fine grid of the simplex."""
    rng = np.random.default_rng(0)
    truth = runs.outcome_NT
    members = {
        name: truth + rng.normal(0, s, truth.shape)
        for name, s in zip("abc", (1, 1, 2), strict=True)
    }

    weights = stack_weights(runs, members)

    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 201)
                     for b in np.linspace(0, 1 - a, max(round(200 * (1 - a)) + 1, 1))])  # fmt: skip
    for t, task in enumerate(runs.tasks):
        error_KN = np.stack(
            [center_by_state(truth - p, runs.state_ids)[:, t] for p in members.values()]
        )
        best = grid[np.argmin(((grid @ error_KN) ** 2).sum(axis=1))]
        found = [weights[task].get(name, 0.0) for name in members]
        assert sum(found) == pytest.approx(1)
        np.testing.assert_allclose(found, best, atol=0.006)


def test_a_useless_member_gets_nothing_but_the_first_is_always_named(runs):
    truth = runs.outcome_NT
    bad = np.random.default_rng(1).normal(size=truth.shape)

    weights = stack_weights(runs, {"lends_its_error": bad, "right": truth + 0.01, "bad": bad[::-1]})

    assert weights["task_0"] == {"lends_its_error": 0.0, "right": 1.0}


def test_gains_are_weighted_sums_and_errors_are_borrowed(runs, stack):
    gain = stack.gain(STATE_DP, MIXTURE_MD, EQUAL_D)
    assert any(len([w for w in weights.values() if w]) > 1 for weights in stack.weights.values())
    for t, task in enumerate(runs.tasks):
        fitted = {name: make_estimator(name).fit(runs) for name in stack.weights[task]}
        mean = sum(
            weight * fitted[name].gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT[:, t]
            for name, weight in stack.weights[task].items()
        )
        np.testing.assert_allclose(gain.mean_MT[:, t], mean)
        # The ridge alone has standard errors: all others count with its.
        ridge = fitted["structured_ridge"].gain(STATE_DP, MIXTURE_MD, EQUAL_D)
        np.testing.assert_allclose(gain.se_MT[:, t], ridge.se_MT[:, t])
        smooth = stack.smooth_gain(STATE_DP, MIXTURE_MD, EQUAL_D)
        assert np.isfinite(smooth.mean_MT).all()


def test_kept_parameters_give_the_same_stack_to_the_bit(runs, stack):
    kept = json.loads(json.dumps(stack.parameters()))

    again = StackedEstimator(make_estimator).fit(runs, parameters=kept)

    expected = stack.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT
    assert again.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT.tolist() == expected.tolist()
    with pytest.raises(EstimationError, match="none of task_0, task_1"):
        StackedEstimator(make_estimator).fit(runs, parameters={"weights": {}})


def test_a_fold_is_predicted_by_weights_found_without_it(runs):
    """A member that is right everywhere but in one fold is believed there: the fold isn't seen."""
    fold_N = assign_folds(runs, 4, 0)
    unknown_NT = np.full(runs.outcome_NT.shape, np.nan)
    noise_NT = np.random.default_rng(0).normal(size=runs.outcome_NT.shape)
    inside = fold_N == 2
    fooled_NT = runs.outcome_NT + 9 * noise_NT * inside[:, None] + 1e-3 * noise_NT
    members = {
        name: [FoldPrediction(name, values_NT, values_NT, unknown_NT, unknown_NT, values_NT)]
        for name, values_NT in (("fooled", fooled_NT), ("poor", runs.outcome_NT + noise_NT[::-1]))
    }

    stacked = stack_folds(runs, fold_N, members)

    np.testing.assert_array_equal(stacked.prediction_NT[inside], fooled_NT[inside])
    assert not np.allclose(stacked.prediction_NT[~inside], fooled_NT[~inside])


def test_the_choice_hands_the_weights_to_the_fit(runs):
    choice = choose_estimator(runs, (*MEMBERS, "stack"), search_all=True)
    fitted = fit_chosen(runs, dict.fromkeys(runs.tasks, "stack"), 0, choice.parameters)

    kept = fitted.parameters()["members"]["stack"]
    assert kept["weights"] == choice.parameters["stack"]["weights"]
    assert set(choice.parameters) == {"log_linear", "stack"}
    assert set(choice.frame["estimator"]) == {*MEMBERS, "stack"}


def test_only_estimators_with_intervals_answer_if_asked(runs):
    """The forest may score better; without a standard error it can't answer for a gain."""
    free = choose_estimator(runs, ("extra_trees", "response_surface_blind"))
    asked = choose_estimator(runs, ("extra_trees", "response_surface_blind"), needs_interval=True)

    assert "extra_trees" in free.chosen.values()
    assert set(asked.chosen.values()) == {"response_surface_blind"}
