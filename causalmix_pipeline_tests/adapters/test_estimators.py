import json

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import (
    ESTIMATOR_NAMES,
    CombinedEstimator,
    choose_estimator,
    fit_chosen,
    make_estimator,
)
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.errors import ConfigError, EstimationError

POOL = SyntheticPool.draw(4, 2, 3, seed=1)
EQUAL_D = np.full(4, 0.25)
STATE_DP = POOL.draw_states(1, np.random.default_rng(9))[0]
MIXTURE_MD = np.random.default_rng(8).dirichlet(np.ones(4), size=10)
FAST = ("structured_ridge", "regmix")


@pytest.fixture(scope="module")
def runs():
    return POOL.run_table(20, 4, noise=0.1, seed=4)


@pytest.mark.parametrize("name", ESTIMATOR_NAMES)
def test_every_name_makes_an_estimator_of_that_name(name):
    made = make_estimator(name, seed=3)

    assert made.name == name
    assert isinstance(made, EffectEstimator)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"response_surface_blind.*got 'oracle'"):
        make_estimator("oracle")


def test_the_choice_is_the_best_r2_within_unseen_states(runs):
    choice = choose_estimator(runs, FAST)

    by_name = choice.frame.pivot(on="estimator", index="task", values="r2_within")
    for row in by_name.iter_rows(named=True):
        best = max(FAST, key=lambda name: row[name])
        assert choice.chosen[row["task"]] == best
    assert choice.frame.height == 6
    assert choice.frame["chosen"].sum() == 3


def test_where_the_state_matters_an_estimator_that_sees_it_is_chosen(runs):
    choice = choose_estimator(runs, FAST)

    assert set(choice.chosen.values()) == {"structured_ridge"}


def test_with_one_mixture_a_state_the_score_over_all_runs_decides():
    single = POOL.run_table(60, 1, noise=0.1)

    choice = choose_estimator(single, FAST)

    assert choice.frame["r2_within"].is_nan().all()
    assert set(choice.chosen.values()) == {"structured_ridge"}


def test_no_name_is_refused(runs):
    with pytest.raises(ConfigError, match="at least one"):
        choose_estimator(runs, ())


def test_kept_parameters_give_the_same_fit_to_the_bit(runs):
    """A refresh conditions the model on the runs again; it doesn't search again."""
    chosen = {"task_0": "response_surface", "task_1": "structured_ridge", "task_2": "regmix"}
    fitted = fit_chosen(runs, chosen)
    kept = json.loads(json.dumps(fitted.parameters()["members"]))
    kept["response_surface"]["hyper_parameters"]["task_0"]["noise"] *= 2

    again = fit_chosen(runs, chosen, parameters=fitted.parameters()["members"])
    other = fit_chosen(runs, chosen, parameters=kept)

    gain = fitted.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT
    assert again.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT.tolist() == gain.tolist()
    assert other.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT[:, 0].tolist() != gain[:, 0].tolist()


def test_gains_are_corrected_by_what_held_out_runs_show(runs):
    """Standard errors grow by the factor, gains over the equal mixture shrink by the slope."""
    choice = choose_estimator(runs, ("structured_ridge",))
    plain = fit_chosen(runs, choice.chosen).gain(STATE_DP, MIXTURE_MD, EQUAL_D)
    fitted = fit_chosen(runs, choice.chosen, calibration=choice.calibration)
    gain = fitted.gain(STATE_DP, MIXTURE_MD, EQUAL_D)

    for t, row in enumerate(choice.frame.to_dicts()):
        assert (row["interval_factor"] > 1) == (row["coverage_90"] < 0.9)
        above_M = np.maximum(plain.mean_MT[:, t], 0)
        shrunk_M = np.minimum(plain.mean_MT[:, t], 0) + row["gain_slope"] * above_M
        np.testing.assert_allclose(gain.mean_MT[:, t], shrunk_M)
        se_M = np.hypot(row["interval_factor"] * plain.se_MT[:, t], row["gain_slope_se"] * above_M)
        np.testing.assert_allclose(gain.se_MT[:, t], se_M)


def test_corrected_gains_over_two_references_differ_by_what_parts_the_references(runs):
    choice = choose_estimator(runs, ("structured_ridge",))
    fitted = fit_chosen(runs, choice.chosen, calibration=choice.calibration)
    other_D = np.array(MIXTURE_MD[3])

    over_equal = fitted.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT
    over_other = fitted.gain(STATE_DP, MIXTURE_MD, other_D).mean_MT

    np.testing.assert_allclose(over_other, over_equal - over_equal[3], atol=1e-9)


def test_each_task_is_answered_by_its_own_choice(runs):
    chosen = {"task_0": "regmix", "task_1": "structured_ridge", "task_2": "regmix"}

    combined = fit_chosen(runs, chosen, seed=42)

    assert isinstance(combined, EffectEstimator)
    assert isinstance(combined, CombinedEstimator)
    gain = combined.gain(STATE_DP, MIXTURE_MD, EQUAL_D)
    for t, name in enumerate(chosen.values()):
        alone = make_estimator(name, seed=42).fit(runs)
        expected = alone.gain(STATE_DP, MIXTURE_MD, EQUAL_D)
        assert gain.mean_MT[:, t] == pytest.approx(expected.mean_MT[:, t])
        assert np.isnan(gain.se_MT[:, t]).all() == (name == "regmix")
        predicted_M = combined.predict(STATE_DP, MIXTURE_MD)[:, t]
        assert predicted_M == pytest.approx(alone.predict(STATE_DP, MIXTURE_MD)[:, t])


def test_tasks_of_different_estimators_count_as_fully_correlated(runs):
    chosen = dict(zip(runs.tasks, ("regmix", "structured_ridge", "structured_ridge"), strict=True))

    combined = fit_chosen(runs, chosen)

    assert combined.task_correlation_TT[0].tolist() == [1, 1, 1]
    assert combined.task_correlation_TT[1, 2] < 1
    assert combined.parameters()["chosen"] == chosen
    assert set(combined.parameters()["members"]) == {"regmix", "structured_ridge"}


def test_a_choice_for_other_tasks_is_refused(runs):
    with pytest.raises(EstimationError, match="exactly the tasks task_0, task_1, task_2, got math"):
        fit_chosen(runs, {"math": "regmix"})
