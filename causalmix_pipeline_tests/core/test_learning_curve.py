import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.lightgbm_surface import LightGBMSurface
from causalmix_pipeline.adapters.structured_ridge import StructuredRidge
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import cross_validate
from causalmix_pipeline.core.learning_curve import PARTS, _levels, learning_curve
from causalmix_pipeline.core.runs import RunTable

POOL = SyntheticPool.draw(6, 4, 2, seed=3)
WEIGHTS_T = np.array([1.0, 0.0])


def ridge(runs):
    return make_estimator("structured_ridge").fit(runs)


def curve(n_states: int, mixtures: int = 4, weights_T=WEIGHTS_T, pool=POOL):
    return learning_curve(ridge, pool.run_table(n_states, mixtures, seed=1), weights_T)


def test_more_states_raise_r2_and_the_error_bars_say_how_surely():
    found = curve(64)
    assert found is not None
    table = found.table

    assert table["n_runs"].to_list() == [64, 128, 192, 256, 512]
    assert table["r2"][0] < table["r2"][3] < table["r2"][4] <= 1
    assert (table["r2_se"] > 0).all()


def test_the_last_size_is_the_cross_validation_of_all_runs():
    runs = POOL.run_table(64, 4, seed=1)
    scores = cross_validate(lambda: make_estimator("structured_ridge"), runs, n_folds=4).frame

    found = curve(64)

    assert found is not None
    assert found.table["r2"][3] == pytest.approx(scores["r2_within"][0])


def test_twice_the_runs_reach_what_was_expected():
    half, whole = curve(32), curve(64)
    assert half is not None and whole is not None

    expected, error = half.table["r2"][4], half.table["r2_se"][4]

    assert abs(whole.table["r2"][3] - expected) < 2 * np.hypot(error, whole.table["r2_se"][3])


def test_a_curve_of_either_kind_is_carried_on_exactly():
    parts = np.array(PARTS)

    by_root = _levels(0.1 + 0.2 / np.sqrt(parts), 1.0)[-2]
    by_one = _levels(0.1 + 0.2 / parts, 1.0)[-1]

    assert by_root == pytest.approx(0.9 - 0.2 / np.sqrt(2))
    assert by_one == pytest.approx(0.9 - 0.2 / 2)


def test_the_sentence_names_both_ends():
    found = curve(64)
    assert found is not None

    assert "doubling the runs to 512 is expected to take R2" in found.describe()


def test_one_run_a_state_is_judged_over_all_runs():
    found = curve(128, mixtures=1)
    assert found is not None

    assert found.table["r2"][3] > 0.2


def test_without_covariates_mixtures_take_the_place_of_states():
    runs = SyntheticPool.draw(4, 0, 1, seed=1).run_table(1, 96)

    found = learning_curve(
        lambda some: LightGBMSurface(n_trees=30).fit(some), runs, np.array([1.0])
    )

    assert found is not None
    assert found.table["r2"][3] > found.table["r2"][0]


def test_few_states_tell_nothing():
    assert curve(16) is None
    assert curve(20) is None


def test_states_of_which_most_have_one_run_give_no_curve():
    """A quarter of the states can then be a handful of runs."""
    pool = SyntheticPool.draw(3, 2, 1, seed=1)
    many, single = pool.run_table(4, 20, seed=1), pool.run_table(20, 1, seed=2)
    runs = RunTable(
        many.domains, many.covariates, many.tasks,
        tuple(f"run_{i:03d}" for i in range(100)),
        np.append(many.state_ids, single.state_ids + 100),
        np.concatenate([many.state_NDP, single.state_NDP]),
        np.vstack([many.mixture_ND, single.mixture_ND]),
        np.vstack([many.outcome_NT, single.outcome_NT]),
        np.append(many.repeat_of_N, single.repeat_of_N + 1000),
    )  # fmt: skip

    assert learning_curve(lambda r: StructuredRidge().fit(r), runs, np.ones(1)) is None
