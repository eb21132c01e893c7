"""Mixtures for other task weights: the right points, inside the constraints, near the best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.core.mixture import is_on_simplex, kl_divergence
from causalmix_pipeline.core.policy import Constraints, recommend
from causalmix_pipeline.core.what_if import (
    MOST_MOVED,
    MOST_POINTS,
    mixtures_for,
    moved_tasks,
    weight_points,
)
from causalmix_pipeline_tests.core.test_policy import DOMAINS, EQUAL_D, NO_STATE, RootEstimator

TRUTH = RootEstimator([[3, 1, 0.2], [0.2, 1, 3]])
OWN_T = np.array([0.7, 0.3])


def solved(constraints: Constraints, weights_WT: np.ndarray, **more) -> np.ndarray:
    best = recommend(
        "optimum", TRUTH, NO_STATE, weights_WT[0], constraints, domains=DOMAINS, **more
    )
    return mixtures_for(
        weights_WT,
        TRUTH,
        NO_STATE,
        constraints,
        domains=DOMAINS,
        recommended_D=best.mixture_D,
        tasks=more.get("tasks", ()),
    )


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda w: sum(w) > 0.1),
    st.integers(2, 60),
)
def test_points_are_task_weights_with_the_own_ones_first(weights, n_domains):
    weights_T = np.array(weights) / sum(weights)
    if not moved_tasks(weights_T):
        return

    points_WT = weight_points(weights_T, n_domains)

    assert points_WT[0] == pytest.approx(weights_T)
    assert points_WT.sum(axis=1) == pytest.approx(1)
    assert points_WT.min() >= 0
    assert len(points_WT) <= max(MOST_POINTS, MOST_MOVED + 1)
    assert len(np.unique(points_WT.round(9), axis=0)) == len(points_WT)


def test_weights_move_of_tasks_that_count_and_of_others_where_one_alone_does():
    assert moved_tasks(np.array([0.2, 0.0, 0.8])) == [2, 0]
    assert moved_tasks(np.array([0.0, 1.0, 0.0])) == [1, 0, 2]
    assert moved_tasks(np.array([1.0])) == []
    assert len(moved_tasks(np.full(9, 1 / 9))) == MOST_MOVED


def test_many_domains_get_fewer_points():
    weights_T = np.full(6, 1 / 6)

    assert len(weight_points(weights_T, 40)) == 7
    assert len(weight_points(weights_T, 5)) > 10


def test_many_tasks_get_fewer_points():
    assert len(weight_points(np.full(10, 0.1), 3)) == MOST_MOVED + 1
    assert len(weight_points(np.full(3, 1 / 3), 3)) > 20


def test_each_mixture_is_nearly_the_best_for_its_weights():
    weights_WT = weight_points(OWN_T, 3)
    free = Constraints.simplex_only(EQUAL_D)

    mixture_WD = solved(free, weights_WT)

    for weights_T, mixture_D in zip(weights_WT, mixture_WD, strict=True):
        square_D = (weights_T @ TRUTH.theta_TD) ** 2  # the known best of sums of roots
        best_D = square_D / square_D.sum()
        value, best = (float(weights_T @ TRUTH.predict(NO_STATE, m[None])[0])
                       for m in (mixture_D, best_D))  # fmt: skip
        assert value == pytest.approx(best, abs=2e-3)


def test_every_mixture_keeps_to_the_constraints_and_guard_rails():
    tight = Constraints(
        EQUAL_D,
        np.full(3, 0.05),
        np.full(3, 0.6),
        trust_radius=0.1,
        guard_rails={"second": 0.1},
    )
    weights_WT = weight_points(OWN_T, 3)

    mixture_WD = solved(tight, weights_WT, tasks=("first", "second"))

    assert all(is_on_simplex(mixture_D) for mixture_D in mixture_WD)
    assert mixture_WD.min() >= 0.05 - 1e-9 and mixture_WD.max() <= 0.6 + 1e-9
    assert kl_divergence(mixture_WD, EQUAL_D).max() <= 0.1 + 1e-6
    loss_W = -TRUTH.gain(NO_STATE, mixture_WD, EQUAL_D).mean_MT[:, 1]
    assert loss_W.max() <= 0.1 + 1e-6


def test_the_same_seed_gives_the_same_mixtures_and_the_first_is_the_recommended_one():
    weights_WT = weight_points(OWN_T, 3)
    free = Constraints.simplex_only(EQUAL_D)
    best = recommend("optimum", TRUTH, NO_STATE, OWN_T, free, domains=DOMAINS)

    first, again = solved(free, weights_WT), solved(free, weights_WT)

    assert (first == again).all()
    assert (first[0] == best.mixture_D).all()
