"""Policies: they find a known best mixture, stay inside every constraint, and say what binds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.core.effects import EffectEstimator, Gain
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import dirichlet_design, is_on_simplex, kl_divergence
from causalmix_pipeline.core.policy import (
    SEARCH_CANDIDATES,
    Constraints,
    level_spread,
    recommend,
    weighted_gain,
)
from causalmix_pipeline.core.runs import RunTable

DOMAINS = ("a", "b", "c")
EQUAL_D = np.full(3, 1 / 3)
NO_STATE = np.zeros((3, 0))


class RootEstimator:
    """Known truth: outcome of task t is sum over domains of theta_td sqrt(share_d)."""

    name = "root"

    def __init__(self, theta_TD: list[list[float]], se: float = 0.0) -> None:
        self.theta_TD = np.array(theta_TD, dtype=float)
        self.se = se
        self.task_correlation_TT = np.eye(len(theta_TD))

    def fit(self, runs: RunTable) -> EffectEstimator:
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        return np.sqrt(mixture_MD) @ self.theta_TD.T

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        mean_MT = self.predict(state_DP, mixture_MD) - self.predict(state_DP, reference_D[None])
        distance_M = np.abs(mixture_MD - reference_D).sum(axis=1)
        return Gain(mean_MT, np.repeat(self.se * distance_M[:, None], mean_MT.shape[1], axis=1))

    def parameters(self) -> dict:
        return {}


def choose(estimator: RootEstimator, constraints: Constraints, policy: str = "optimum", **more):
    """Recommend for one task of weight 1 unless told otherwise."""
    weights_T = more.pop("weights_T", np.eye(len(estimator.theta_TD))[0])
    return recommend(policy, estimator, NO_STATE, weights_T, constraints, domains=DOMAINS, **more)


def free(reference_D: np.ndarray = EQUAL_D) -> Constraints:
    return Constraints.simplex_only(reference_D)


def test_the_fake_is_an_estimator():
    assert isinstance(RootEstimator([[1, 1, 1]]), EffectEstimator)


@pytest.mark.parametrize("theta", [[3, 2, 1], [1, 1, 1], [5, 0.5, 2]])
def test_the_optimum_is_that_of_the_closed_form(theta):
    """The maximum of theta . sqrt(t) on the simplex is t proportional to theta squared."""
    best = choose(RootEstimator([theta]), free())
    by_hand_D = np.square(theta) / np.square(theta).sum()

    np.testing.assert_allclose(best.mixture_D, by_hand_D, atol=0.01)
    known = np.linalg.norm(theta) - np.sum(theta) / np.sqrt(3)
    assert best.gain == pytest.approx(known, abs=1e-3)


def test_a_domain_that_harms_gets_nothing():
    best = choose(RootEstimator([[2, 1, -3]]), free())

    assert best.mixture_D[2] < 1e-3


def test_a_gain_shared_by_all_mixtures_keeps_the_reference():
    reference_D = np.array([0.2, 0.3, 0.5])
    best = choose(RootEstimator([[0, 0, 0]]), free(reference_D))

    np.testing.assert_allclose(best.mixture_D, reference_D, atol=1e-9)
    assert best.gain == 0


def test_uncertainty_pulls_the_optimum_to_the_reference():
    plain = choose(RootEstimator([[3, 2, 1]], se=0.3), free(), confidence_z=0.0)
    careful = choose(RootEstimator([[3, 2, 1]], se=0.3), free(), confidence_z=2.0)
    afraid = choose(RootEstimator([[3, 2, 1]], se=0.3), free(), confidence_z=50.0)

    distance = [np.abs(r.mixture_D - EQUAL_D).sum() for r in (plain, careful, afraid)]
    assert distance[0] > distance[1] > distance[2]
    np.testing.assert_allclose(afraid.mixture_D, EQUAL_D, atol=1e-9)


def test_an_estimator_without_standard_errors_is_maximised_by_its_mean():
    best = choose(RootEstimator([[3, 2, 1]], se=np.nan), free())

    np.testing.assert_allclose(best.mixture_D, np.array([9, 4, 1]) / 14, atol=0.01)
    assert np.isnan(best.gain_se)


def test_search_averages_the_best_hundred_of_its_candidates():
    best = choose(RootEstimator([[3, 2, 1]]), free(), policy="search", seed=5)
    candidates = dirichlet_design(SEARCH_CANDIDATES, 3, strength_range=(1.0, 1.0), seed=5)
    by_gain = np.argsort(-np.sqrt(candidates) @ [3, 2, 1])

    np.testing.assert_allclose(best.mixture_D, candidates[by_gain[:100]].mean(axis=0), atol=1e-8)
    np.testing.assert_allclose(best.mixture_D, np.array([9, 4, 1]) / 14, atol=0.03)


def test_one_seed_gives_one_mixture():
    first, again = (choose(RootEstimator([[3, 2, 1]]), free(), seed=4) for _ in range(2))

    np.testing.assert_array_equal(first.mixture_D, again.mixture_D)


CONSTRAINTS = Constraints(
    reference_D=np.array([0.5, 0.3, 0.2]),
    lower_D=np.array([0.05, 0.1, 0.0]),
    upper_D=np.array([0.9, 0.8, 0.6]),
    trust_radius=0.1,
    budget_tokens=1000.0,
    available_D=np.array([500.0, 100.0, 400.0]),
    max_epochs=4.0,
)


@pytest.mark.parametrize(
    ("policy", "theta"),
    [
        ("optimum", [9, 1, 0]),
        ("optimum", [0, 9, 1]),
        ("optimum", [1, 0, 9]),
        ("search", [0, 9, 1]),
    ],
)
def test_a_recommendation_is_inside_every_constraint(policy, theta):
    best = choose(RootEstimator([theta]), CONSTRAINTS, policy=policy)

    assert is_on_simplex(best.mixture_D, tolerance=1e-9)
    assert (best.mixture_D >= CONSTRAINTS.lower_D - 1e-12).all()
    assert (best.mixture_D <= CONSTRAINTS.upper_D + 1e-12).all()
    assert best.mixture_D[1] <= 0.4 + 1e-12  # 4 epochs of 100 tokens out of 1,000
    assert kl_divergence(best.mixture_D, CONSTRAINTS.reference_D) <= 0.1 + 1e-9
    assert best.slack["slack"].min() >= -1e-9


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0.005, 2.0))
def test_whatever_is_projected_ends_inside(point, radius):
    constraints = replace(CONSTRAINTS, trust_radius=radius)
    projected_D = constraints.project(np.array(point), DOMAINS)
    lower_D, upper_D = constraints.box(DOMAINS)

    assert is_on_simplex(projected_D, tolerance=1e-9)
    assert (projected_D >= lower_D - 1e-12).all()
    assert (projected_D <= upper_D + 1e-12).all()
    assert kl_divergence(projected_D, constraints.reference_D) <= radius + 1e-12


def test_the_order_of_domains_does_not_change_a_projection():
    order = np.array([2, 0, 1])
    permuted = Constraints(
        reference_D=CONSTRAINTS.reference_D[order],
        lower_D=CONSTRAINTS.lower_D[order],
        upper_D=CONSTRAINTS.upper_D[order],
        trust_radius=0.1,
        budget_tokens=1000.0,
        available_D=np.asarray(CONSTRAINTS.available_D)[order],
    )
    points = np.random.default_rng(0).normal(size=(20, 3))

    np.testing.assert_allclose(
        permuted.project(points[:, order], np.array(DOMAINS)[order].tolist()),
        CONSTRAINTS.project(points, DOMAINS)[:, order],
        atol=1e-9,
    )


def test_a_tighter_region_promises_less():
    gains = [
        choose(RootEstimator([[3, 1, 0]]), replace(free(), trust_radius=radius)).gain
        for radius in (0.01, 0.1, 1.0)
    ]

    assert 0 < gains[0] < gains[1] < gains[2]


def test_a_domain_outside_the_reference_does_not_freeze_the_rest():
    """Any share of it would be infinitely far, so it gets none and the others still move."""
    reference_D = np.array([0.5, 0.5, 0.0])
    best = choose(RootEstimator([[3, 1, 9]]), replace(free(reference_D), trust_radius=0.2))

    assert best.mixture_D[2] == 0
    assert best.mixture_D[0] == pytest.approx(0.8, abs=0.02)
    assert kl_divergence(best.mixture_D, reference_D) <= 0.2 + 1e-9


def test_the_slack_table_says_what_binds():
    best = choose(RootEstimator([[0, 9, 0]]), replace(CONSTRAINTS, trust_radius=5.0))
    binds = dict(zip(best.slack["constraint"], best.slack["binds"], strict=True))

    assert binds == {
        "a: least share": False,
        "a: most share": False,
        "b: least share": False,
        "b: most share": False,
        "b: tokens available": True,
        "c: most share": False,
        "trust region": False,
    }
    limit = best.slack.row(by_predicate=pl.col("constraint") == "b: tokens available", named=True)
    assert limit["limit"] == pytest.approx(0.4)
    assert limit["value"] == pytest.approx(0.4, abs=1e-3)


def test_without_constraints_the_slack_table_is_empty():
    assert free().slack(EQUAL_D, DOMAINS).is_empty()


def test_the_unconstrained_mixture_stands_beside_the_feasible_one():
    best = choose(RootEstimator([[3, 2, 1]]), replace(free(), trust_radius=0.01))

    np.testing.assert_allclose(best.unconstrained_D, np.array([9, 4, 1]) / 14, atol=0.01)
    assert best.unconstrained_gain > best.gain > 0


def test_weights_decide_between_tasks():
    estimator = RootEstimator([[1, 0, 0], [0, 1, 0]])
    first = choose(estimator, free(), weights_T=np.array([1.0, 0.0]))
    both = choose(estimator, free(), weights_T=np.array([0.5, 0.5]))

    assert first.mixture_D[0] > 0.99
    np.testing.assert_allclose(both.mixture_D, [0.5, 0.5, 0], atol=0.01)
    assert both.gain == pytest.approx(both.gain_T @ [0.5, 0.5])


def test_the_error_of_a_weighted_gain_follows_the_correlation_of_tasks():
    estimator = RootEstimator([[1, 0, 0], [0, 1, 0]], se=0.5)
    mixture_MD = np.array([[1.0, 0.0, 0.0]])
    se = 0.5 * np.abs(mixture_MD[0] - EQUAL_D).sum()
    weights_T = np.array([0.6, 0.4])

    apart = weighted_gain(estimator, NO_STATE, mixture_MD, EQUAL_D, weights_T)[1]
    estimator.task_correlation_TT = np.ones((2, 2))
    together = weighted_gain(estimator, NO_STATE, mixture_MD, EQUAL_D, weights_T)[1]

    assert apart[0] == pytest.approx(se * np.hypot(0.6, 0.4))
    assert together[0] == pytest.approx(se)


def test_a_task_without_weight_needs_no_standard_error():
    estimator = RootEstimator([[1, 0, 0], [0, 1, 0]], se=0.5)
    gain = estimator.gain(NO_STATE, EQUAL_D[None], EQUAL_D)
    gain.se_MT[:, 1] = np.nan
    estimator.gain = lambda *_: gain

    assert np.isfinite(
        weighted_gain(estimator, NO_STATE, EQUAL_D[None], EQUAL_D, np.array([1, 0]))[1]
    )


@pytest.mark.parametrize("radius", [None, 0.3])
def test_the_optimum_is_found_among_many_domains(radius):
    """By the closed form; inside a trust region no random mixture is better."""
    rng = np.random.default_rng(0)
    domains = [f"d{i}" for i in range(24)]
    theta_D = rng.exponential(size=24)
    estimator, equal_D = RootEstimator([theta_D.tolist()]), np.full(24, 1 / 24)
    constraints = replace(free(equal_D), trust_radius=radius)

    best = recommend(
        "optimum", estimator, np.zeros((24, 0)), np.ones(1), constraints, domains=domains
    )

    by_hand_D = theta_D**2 / (theta_D**2).sum()
    unbound = np.sqrt(by_hand_D) @ theta_D - np.sqrt(equal_D) @ theta_D
    if radius is None:
        assert best.gain == pytest.approx(unbound, abs=1e-3)
        return
    # Mixtures between the reference and the free optimum that lie on the border.
    path = constraints.project(
        equal_D + rng.uniform(size=(500, 1)) * (by_hand_D - equal_D), domains
    )
    along = (np.sqrt(path) - np.sqrt(equal_D)) @ theta_D
    assert along.max() - 1e-6 <= best.gain < unbound
    assert kl_divergence(best.mixture_D, equal_D) == pytest.approx(radius, abs=1e-3)


class SteppedStack(RootEstimator):
    """A smooth part that the search may ask, and a whole that differs from it."""

    n_whole = 0

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        self.n_whole += len(mixture_MD)
        gain = super().gain(state_DP, mixture_MD, reference_D)
        return Gain(gain.mean_MT + np.where(mixture_MD[:, :1] > 0.5, -9.0, 0.0), gain.se_MT)

    def smooth_gain(
        self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray
    ) -> Gain:
        return super().gain(state_DP, mixture_MD, reference_D)


def test_the_whole_estimator_is_asked_of_the_last_candidates_only_and_decides():
    estimator = SteppedStack([[5, 1, 1]])

    best = choose(estimator, free())

    assert estimator.n_whole < 100
    assert best.gain >= 0  # the reference was in the race to the end


# Guard rails

TASKS = ("first", "second", "third")
#: Each task learns from its own domain alone.
APART = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_gains_linear_in_the_shares_need_a_trust_region():
    """Without one the best mixture is a single domain, whatever the effects."""
    estimator = RootEstimator([[1.0, 0.5, 0.2]])
    estimator.needs_trust_region = True

    with pytest.raises(ConfigError, match=r"policy.trust_radius must be set .* got none"):
        choose(estimator, free())
    kept = replace(free(), trust_radius=0.1)
    assert choose(estimator, kept).mixture_D.max() < 0.9


def guarded(rails: dict[str, float], policy: str = "optimum", se: float = 0.0, **more):
    constraints = replace(free(), guard_rails=rails)
    return choose(RootEstimator(APART, se=se), constraints, policy, tasks=TASKS, **more)


@pytest.mark.parametrize("policy", ["optimum", "search"])
def test_a_guard_rail_of_a_task_without_weight_is_kept_to_and_binds(policy):
    """All to the first task but for what the second may not lose: sqrt(1/3) - .1 squared."""
    best = guarded({"second": 0.1}, policy)

    least = (np.sqrt(1 / 3) - 0.1) ** 2
    assert best.gain_T[1] >= -0.1 - 1e-9
    assert best.mixture_D[1] == pytest.approx(least, abs=0.02)
    row = best.slack.row(by_predicate=pl.col("constraint") == "second: guard rail", named=True)
    assert row["limit"] == 0.1
    assert row["value"] == pytest.approx(-best.gain_T[1])
    assert not best.only_reference
    if policy == "optimum":
        assert row["binds"]
        assert best.mixture_D[0] == pytest.approx(1 - least, abs=2e-3)


def test_a_loose_guard_rail_changes_nothing_and_does_not_bind():
    loose, none = guarded({"third": 5.0}), choose(RootEstimator(APART), free())

    assert loose.gain == pytest.approx(none.gain, abs=1e-6)
    assert not loose.slack["binds"].any()


def test_a_guard_rail_holds_for_the_lower_bound():
    plain = guarded({"second": 0.3}, se=0.1, confidence_z=0.0)
    careful = guarded({"second": 0.3}, se=0.1, confidence_z=2.0)

    assert careful.gain_T[1] - 2 * careful.gain_se_T[1] >= -0.3 - 1e-9
    assert careful.gain_T[1] > plain.gain_T[1] + 0.01


@pytest.mark.parametrize("policy", ["optimum", "search"])
def test_where_guard_rails_allow_nothing_else_the_reference_is_kept_and_it_is_said(policy):
    """Each task has a domain of its own, and none may lose: nothing can move."""
    best = guarded(dict.fromkeys(TASKS, 0.0), policy)

    np.testing.assert_allclose(best.mixture_D, EQUAL_D, atol=1e-9)
    assert best.only_reference
    assert best.gain == 0


@pytest.mark.parametrize(
    ("rails", "message"),
    [
        ({"speed": 0.1}, r"guard_rails must name tasks \(first, second, third\), got speed"),
        ({"first": -0.1}, r"guard_rails: first must be .* >= 0, got -0.1"),
    ],
)
def test_guard_rails_that_make_no_sense_are_refused(rails, message):
    with pytest.raises(ConfigError, match=message):
        guarded(rails)


def test_guard_rails_that_no_allowed_mixture_keeps_are_refused():
    constraints = replace(free(), guard_rails={"second": 0.0}, upper_D=np.array([1, 0.2, 1.0]))

    with pytest.raises(ConfigError, match=r"guard_rails: of \d+ mixtures .* none keeps them"):
        choose(RootEstimator(APART), constraints, tasks=TASKS)


# The closed form


class LogEstimator(RootEstimator):
    """Known truth: outcome of task t is sum over domains of theta_td log(share_d + .01)."""

    name = "causal_forest_log"
    coordinates = "log"
    log_offset = 0.01

    def effect(self, state_DP: np.ndarray) -> np.ndarray:
        return self.theta_TD.T

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        return np.log(mixture_MD + self.log_offset) @ self.theta_TD.T


WIDE = dirichlet_design(256, 3, strength_range=(0.4, 3.0), seed=1)
NARROW = dirichlet_design(256, 3, strength_range=(60.0, 200.0), seed=1)


def closed(theta_TD: list[list[float]], constraints: Constraints | None = None, **more):
    constraints = constraints or free()
    more = {"design_ND": WIDE} | more
    return choose(LogEstimator(theta_TD), constraints, "analytical", **more)


def test_analytical_shares_are_in_proportion_to_positive_effects():
    best = closed([[3, 1, -2], [0, 4, 0]], weights_T=np.array([0.5, 0.25]))

    np.testing.assert_allclose(best.mixture_D, np.array([1.5, 1.5, 0]) / 3)
    by_search = choose(LogEstimator([[3, 1, 2]]), free())
    np.testing.assert_allclose(closed([[3, 1, 2]]).mixture_D, by_search.mixture_D, atol=0.02)


def test_analytical_is_brought_into_the_constraints():
    best = closed([[3, 1, 0]], replace(free(), trust_radius=0.05, upper_D=np.array([0.4, 1, 1])))

    assert best.mixture_D[0] <= 0.4 + 1e-9
    assert kl_divergence(best.mixture_D, EQUAL_D) <= 0.05 + 1e-9
    np.testing.assert_allclose(best.unconstrained_D, [0.75, 0.25, 0])
    bound = closed(
        [[3, 1, 0], [0, 0, 1], [0, 0, 0]],
        replace(free(), guard_rails={"second": 0.2}),
        tasks=TASKS,
    )
    assert -0.2 - 1e-9 <= bound.gain_T[1] < -0.15


def test_analytical_refuses_a_design_that_does_not_tell_the_level():
    """A constant added to all effects moves no outcome of narrow runs, and all of the mixture."""
    with pytest.raises(ConfigError, match=r"identify the level of effects.*at least 0\.6, got 0\."):
        closed([[3, 1, 0]], design_ND=NARROW)


def level_error(design_ND: np.ndarray) -> float:
    """Error of the level of effects in a regression on log shares with noise, in its own sd."""
    rng = np.random.default_rng(0)
    coordinate_ND = np.log(design_ND + 0.01)
    columns = np.column_stack([coordinate_ND, np.ones(len(design_ND))])
    noise_NK = rng.normal(size=(len(design_ND), 400))
    return float(np.linalg.lstsq(columns, noise_NK, rcond=None)[0][:3].sum(axis=0).std())


@pytest.mark.parametrize("design_ND", [WIDE, NARROW, WIDE[:64]])
def test_the_error_of_the_level_is_what_its_spread_says(design_ND):
    told = 1 / (level_spread(design_ND, 0.01) * np.sqrt(len(design_ND)))

    assert level_error(design_ND) == pytest.approx(told, rel=0.15)


@pytest.mark.parametrize(
    ("estimator", "more", "message"),
    [
        (RootEstimator([[1, 1, 1]]), {"design_ND": WIDE}, "only causal_forest_log has, got root"),
        (LogEstimator([[1, 1, 1]]), {}, r"needs the mixtures of the runs"),
        (LogEstimator([[-1, 0, -2]]), {"design_ND": WIDE}, r"a positive effect .* take policy"),
    ],
)
def test_analytical_refuses_effects_that_give_no_mixture(estimator, more, message):
    with pytest.raises(ConfigError, match=message):
        choose(estimator, free(), "analytical", **more)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower_D": np.array([0.95, 0.0, 0.0])}, r"policy\.least_share of 'a' is 0\.95, above"),
        (
            {"lower_D": np.array([0.0, 0.5, 0.0])},
            r"policy\.least_share of 'b' is 0\.5.*\(0\.4, from",
        ),
        (
            {"lower_D": np.array([0.5, 0.3, 0.3])},
            r"policy\.least_share sums to 1\.1 over the domains",
        ),
        (
            {
                "max_epochs": 1.0,
                "budget_tokens": 999.0,
                "available_D": np.array([450.0, 100.0, 400.0]),
            },
            r"most shares of all domains sum to 0\.9\d*, below 1.*max_epochs \(1\)",
        ),
        (
            {"upper_D": np.array([0.2, 0.8, 0.6]), "trust_radius": 0.01},
            r"policy\.trust_radius is 0\.01 nats, but the nearest mixture .* is 0\.\d+ nats",
        ),
        (
            {"reference_D": np.array([0.6, 0.0, 0.4])},
            r"policy\.least_share of 'b' is 0\.1, above the most it can have \(0, from",
        ),
    ],
)
def test_constraints_that_no_mixture_meets_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        choose(RootEstimator([[1, 1, 1]]), replace(CONSTRAINTS, **changes))


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"policy\.name must be one of optimum, search, analytical, got 'best'"
    ):
        choose(RootEstimator([[1, 1, 1]]), free(), policy="best")


@pytest.mark.parametrize("weights", [[0.0], [-1.0], [np.nan], [np.inf]])
def test_weights_that_rank_nothing_are_refused(weights):
    with pytest.raises(ConfigError, match=r"^tasks: .*weights"):
        choose(RootEstimator([[1, 1, 1]]), free(), weights_T=np.array(weights))


def test_a_reference_off_the_simplex_is_refused():
    with pytest.raises(ConfigError, match=r"policy\.reference must be shares"):
        choose(RootEstimator([[1, 1, 1]]), free(np.array([0.5, 0.5, 0.5])))
