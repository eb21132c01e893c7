"""What is planted is found: covariates, curves and the best of three domains."""

from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import Z90, Gain
from causalmix_pipeline.core.interpretation import (
    STEP,
    Effects,
    covariate_importance,
    effect_curves,
    extreme_states,
    move_share,
    rank_covariates,
    triangle,
)

#: Only two covariates matter: the second of domain 1, and the third of domain 3.
PLANTED = {(1, 1): 1.0, (3, 2): -1.0}
EQUAL_D = np.full(4, 0.25)


class Truth:
    """The synthetic pool itself as an estimator that is never wrong."""

    name = "truth"

    def __init__(self, pool: SyntheticPool):
        self.pool = pool
        self.task_correlation_TT = np.eye(len(pool.scale_T))

    def gain(self, state_DP, mixture_MD, reference_D):
        gain_MT = self.pool.expected_gain(state_DP, mixture_MD, reference_D)
        return Gain(gain_MT, np.full_like(gain_MT, 0.1))


def planted_pool() -> SyntheticPool:
    pool = SyntheticPool.draw(4, 3, 2, seed=2)
    direction_DP = np.zeros((4, 3))
    for place, value in PLANTED.items():
        direction_DP[place] = value
    return replace(pool, direction_DP=direction_DP, strength_TD=np.full((2, 4), 1.0))


POOL = planted_pool()
RUNS = POOL.run_table(24, 5, noise=0.1, seed=4)
STATES = RUNS.distinct_states()[1]
WEIGHTS = np.array([0.75, 0.25])


def truth(reference_D=EQUAL_D) -> Effects:
    return Effects(Truth(POOL), WEIGHTS, reference_D)  # pyright: ignore


@pytest.mark.parametrize("name", ["structured_ridge", "response_surface"])
def test_the_covariates_that_matter_rank_first_each_for_its_own_domain(name):
    effects = Effects(make_estimator(name).fit(RUNS), WEIGHTS, EQUAL_D)

    importance_CD = covariate_importance(effects, STATES)

    first, second, third = rank_covariates(importance_CD)[:3]
    assert {divmod(int(first), 3), divmod(int(second), 3)} == set(PLANTED)
    for d, p in PLANTED:
        assert importance_CD[3 * d + p].argmax() == d
    assert importance_CD[third].max() < 0.5 * importance_CD[second].max()


def test_covariates_without_effect_have_no_importance_at_all():
    importance_CD = covariate_importance(truth(), STATES)

    moved = [divmod(c, 3) for c in np.flatnonzero(importance_CD.max(axis=1) > 1e-12)]
    assert set(moved) == set(PLANTED)


def test_an_effect_is_the_gain_of_five_points_taken_from_the_others_in_proportion():
    reference_D = np.array([0.1, 0.2, 0.3, 0.4])

    effect_SD = truth(reference_D).of_domains(STATES[:2])

    more_D = np.array([0.1 * 0.75 / 0.8, 0.2 + STEP, 0.3 * 0.75 / 0.8, 0.4 * 0.75 / 0.8])
    expected = POOL.expected_gain(STATES[1], more_D[None], reference_D)[0] @ WEIGHTS
    assert effect_SD[1, 1] == pytest.approx(expected)


def test_a_domain_that_has_everything_leaves_it_to_the_others_alike():
    moved_MD = move_share(np.array([1.0, 0.0, 0.0]), 0, np.array([1.0, 0.4]))

    assert moved_MD.tolist() == pytest.approx(np.array([[1, 0, 0], [0.4, 0.3, 0.3]]))


def test_curves_pass_zero_at_the_reference_and_end_at_the_largest_share_seen():
    most_D = np.array([0.5, 0.6, 0.75, 1.0])

    curves = effect_curves(truth(), STATES[0], list("abcd"), most_D)

    assert [curve.domain for curve in curves] == list("abcd")
    assert [curve.share_M[-1] for curve in curves] == most_D.tolist()
    first = curves[0]
    assert first.gain_M[12] == pytest.approx(0, abs=1e-12)  # a share of .25
    half = Z90 * 0.1 * np.sqrt(0.75**2 + 0.25**2)
    assert first.high_M - first.gain_M == pytest.approx(half)
    assert first.gain_M - first.low_M == pytest.approx(half)


def test_the_triangle_takes_the_three_largest_shares_and_holds_the_others():
    mixture_D = np.array([0.1, 0.4, 0.2, 0.3])

    found = triangle(truth(), STATES[0], mixture_D)

    assert found is not None
    assert found.domains == (1, 3, 2)
    assert found.total == pytest.approx(0.9)
    cell = 7
    b, d, c = 0.9 * found.corners_M33[cell].mean(axis=0)
    expected = POOL.expected_gain(STATES[0], np.array([[0.1, b, c, d]]), EQUAL_D)[0] @ WEIGHTS
    assert found.gain_M[cell] == pytest.approx(expected)
    assert found.place(mixture_D) == pytest.approx(np.array([4, 3, 2]) / 9)
    assert np.isnan(found.place(np.array([1.0, 0, 0, 0]))).all()


def test_the_cells_of_the_triangle_fill_it_once():
    found = triangle(truth(), STATES[0], EQUAL_D)

    assert found is not None
    first_M2, second_M2, third_M2 = found.corners_M33[:, :, :2].transpose(1, 0, 2)
    one_M2, two_M2 = second_M2 - first_M2, third_M2 - first_M2
    area_M = np.abs(one_M2[:, 0] * two_M2[:, 1] - one_M2[:, 1] * two_M2[:, 0])
    assert area_M.sum() == pytest.approx(1)
    middle_M3 = found.corners_M33.mean(axis=1)
    assert len(np.unique(middle_M3.round(9), axis=0)) == len(middle_M3)
    assert middle_M3.min() > 0


def test_two_domains_have_no_triangle():
    assert triangle(truth(), STATES[0], np.array([0.5, 0.5])) is None


def test_the_states_with_least_and_most_of_a_covariate_are_found():
    low, high = extreme_states(STATES, 5)

    assert STATES[low, 1, 2] == STATES[:, 1, 2].min()
    assert STATES[high, 1, 2] == STATES[:, 1, 2].max()


def test_the_same_seed_gives_the_same_importance(monkeypatch):
    monkeypatch.setattr("causalmix_pipeline.core.interpretation.MOST_ASKED", 12 * 10)

    first, again, other = (covariate_importance(truth(), STATES, seed=s) for s in (1, 1, 2))

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)  # another sample of states
