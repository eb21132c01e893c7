"""The front of two tasks whose trade-off is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pareto import pareto_front
from causalmix_pipeline_tests.core.test_policy import DOMAINS, EQUAL_D, NO_STATE, RootEstimator

TASKS = ("first", "second", "third")
#: Each task learns from its own domain alone, by the square root of its share.
APART = RootEstimator([[1, 0, 0], [0, 1, 0], [0, 0, 1]])


def front(estimator=APART, first="first", second="second", **changes):
    constraints = replace(Constraints.simplex_only(EQUAL_D), **changes)
    return pareto_front(
        estimator, NO_STATE, first, second, constraints, domains=DOMAINS, tasks=TASKS
    )


def test_the_front_is_that_of_the_closed_form():
    """The optimum for weights w gives shares w squared: the gains lie on a quarter circle."""
    found = front()
    own_2 = found.select("gain_first", "gain_second").to_numpy() + np.sqrt(1 / 3)

    np.testing.assert_allclose(np.hypot(*own_2.T), 1.0, atol=2e-3)
    assert found.height == 21
    assert found["gain_first"].is_sorted()
    assert found["gain_second"].is_sorted(descending=True)
    assert own_2[0] == pytest.approx([0, 1], abs=0.05)
    assert own_2[-1] == pytest.approx([1, 0], abs=0.05)


def test_tasks_that_want_the_same_have_one_point():
    found = front(RootEstimator([[1, 0, 0], [2, 0, 0], [0, 0, 1]]))
    gains = found.select("gain_first", "gain_second").to_numpy()

    assert np.ptp(gains, axis=0).max() < 1e-4
    assert found["a"].to_numpy() == pytest.approx(1, abs=1e-4)


def test_the_front_keeps_to_the_constraints_and_to_guard_rails_of_other_tasks():
    found = front(upper_D=np.full(3, 0.5), guard_rails={"third": 0.1})
    shares = found.select(DOMAINS).to_numpy()

    assert shares.max() <= 0.5 + 1e-9
    assert (np.sqrt(shares[:, 2]) - np.sqrt(1 / 3)).min() >= -0.1 - 1e-9


def test_standard_errors_come_with_the_gains_or_are_null():
    known = front(RootEstimator(APART.theta_TD.tolist(), se=0.1))
    unknown = front(RootEstimator(APART.theta_TD.tolist(), se=float("nan")))

    distance = np.abs(known.select(DOMAINS).to_numpy() - EQUAL_D).sum(axis=1)
    np.testing.assert_allclose(known["gain_first_se"].to_numpy(), 0.1 * distance)
    assert unknown["gain_second_se"].null_count() == unknown.height


@pytest.mark.parametrize(("first", "second"), [("first", "speed"), ("first", "first")])
def test_a_pair_that_is_none_is_refused(first, second):
    with pytest.raises(ConfigError, match="pareto must name two metrics"):
        front(first=first, second=second)
