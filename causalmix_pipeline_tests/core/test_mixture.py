"""The simplex: mixtures come out as mixtures, nearest, inside the region, in any domain order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import (
    check_mixture,
    dirichlet_design,
    is_on_simplex,
    kl_divergence,
    project_to_box,
    shrink_into_trust_region,
    sobol_uniforms,
)

#: No deadline: the machine that runs the tests may be busy.
property_of = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
SHARES = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))


@st.composite
def mixtures(draw: st.DrawFn, n_domains: int) -> np.ndarray:
    """A mixture that may have shares of 0."""
    shares = np.array(draw(st.lists(SHARES, min_size=n_domains, max_size=n_domains)))
    return np.full(n_domains, 1 / n_domains) if shares.sum() == 0 else shares / shares.sum()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A point anywhere, and bounds that some mixture satisfies (that one is within them)."""
    n_domains = draw(st.integers(2, 6))
    inside_D = draw(mixtures(n_domains))
    widths = st.lists(st.floats(0, 1), min_size=n_domains, max_size=n_domains)
    lower_D = inside_D * (1 - np.array(draw(widths)))
    upper_D = inside_D + (1 - inside_D) * np.array(draw(widths))
    points = st.lists(st.floats(-5, 5), min_size=n_domains, max_size=n_domains)
    return np.array(draw(points)), lower_D, upper_D


def nearest_by_enumeration(
    point_D: np.ndarray, lower_D: np.ndarray, upper_D: np.ndarray
) -> np.ndarray:
    """Solve the quadratic program by trying every set of bounds that may be active."""
    best_D, best = point_D, np.inf
    for places in itertools.product((0, 1, 2), repeat=len(point_D)):
        place_D = np.array(places)
        free_D = place_D == 2
        candidate_D = np.choose(place_D, [lower_D, upper_D, point_D])
        if free_D.any():
            candidate_D[free_D] += (1 - candidate_D.sum()) / free_D.sum()
        inside = (candidate_D >= lower_D - 1e-9).all() and (candidate_D <= upper_D + 1e-9).all()
        distance = ((candidate_D - point_D) ** 2).sum()
        if inside and abs(candidate_D.sum() - 1) < 1e-9 and distance < best:
            best_D, best = candidate_D, distance
    return best_D


@property_of
@given(boxes())
def test_a_projection_is_a_mixture_between_its_bounds(box):
    point_D, lower_D, upper_D = box

    projected_D = project_to_box(point_D, lower_D, upper_D)

    assert projected_D.sum() == pytest.approx(1.0, abs=1e-9)
    assert (projected_D >= lower_D - 1e-12).all()
    assert (projected_D <= upper_D + 1e-12).all()


@property_of
@given(boxes(), st.data())
def test_no_mixture_between_the_bounds_is_nearer_than_the_projection(box, data):
    """The projection of a point on a convex set makes an obtuse angle with every point of it."""
    point_D, lower_D, upper_D = box
    projected_D = project_to_box(point_D, lower_D, upper_D)
    other_D = project_to_box(data.draw(mixtures(len(point_D))), lower_D, upper_D)

    assert (point_D - projected_D) @ (other_D - projected_D) <= 1e-8


def test_the_projection_solves_the_quadratic_program():
    rng = np.random.default_rng(1)
    for _ in range(30):
        inside_D = rng.dirichlet(np.ones(4))
        lower_D = inside_D * rng.uniform(0, 1, 4)
        upper_D = inside_D + (1 - inside_D) * rng.uniform(0, 1, 4)
        point_D = rng.normal(0.3, 0.5, 4)

        by_hand_D = nearest_by_enumeration(point_D, lower_D, upper_D)

        np.testing.assert_allclose(project_to_box(point_D, lower_D, upper_D), by_hand_D, atol=1e-8)


@property_of
@given(boxes())
def test_a_mixture_between_its_bounds_stays_where_it_is(box):
    point_D, lower_D, upper_D = box
    projected_D = project_to_box(point_D, lower_D, upper_D)

    again_D = project_to_box(projected_D, lower_D, upper_D)

    np.testing.assert_allclose(again_D, projected_D, atol=1e-9)


@property_of
@given(boxes(), st.randoms())
def test_the_order_of_domains_does_not_change_a_projection(box, random):
    point_D, lower_D, upper_D = box
    order = np.array(random.sample(range(len(point_D)), len(point_D)))

    permuted = project_to_box(point_D[order], lower_D[order], upper_D[order])

    np.testing.assert_allclose(
        permuted, project_to_box(point_D, lower_D, upper_D)[order], atol=1e-9
    )


def test_rows_are_projected_one_by_one():
    points = np.random.default_rng(0).normal(size=(5, 3))
    lower_D, upper_D = np.array([0.1, 0.0, 0.0]), np.array([0.5, 0.6, 1.0])

    together = project_to_box(points, lower_D, upper_D)

    for point, row in zip(points, together, strict=True):
        np.testing.assert_array_equal(row, project_to_box(point, lower_D, upper_D))


@property_of
@given(st.integers(2, 6).flatmap(lambda d: st.tuples(mixtures(d), mixtures(d))), st.floats(1e-4, 2))
def test_a_trust_region_is_never_left(pair, radius):
    mixture_D, reference_D = pair
    moved_D = shrink_into_trust_region(mixture_D, reference_D, reference_D, radius)

    assert is_on_simplex(moved_D, tolerance=1e-12)
    assert kl_divergence(moved_D, reference_D) <= radius * (1 + 1e-12)


@property_of
@given(mixtures(4), st.floats(1e-3, 0.5))
def test_a_mixture_moves_no_farther_than_the_border_of_the_region(mixture_D, radius):
    reference_D = np.full(4, 0.25)
    moved_D = shrink_into_trust_region(mixture_D, reference_D, reference_D, radius)

    if kl_divergence(mixture_D, reference_D) <= radius:
        np.testing.assert_allclose(moved_D, mixture_D, atol=1e-15)
    else:
        assert kl_divergence(moved_D, reference_D) == pytest.approx(radius, rel=1e-6)


def test_the_divergence_is_the_sum_by_hand():
    mixture_D, reference_D = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])

    assert kl_divergence(mixture_D, reference_D) == pytest.approx(np.log(2))
    assert kl_divergence(reference_D, reference_D) == 0.0


def test_a_domain_that_the_reference_lacks_is_infinitely_far():
    reference_D = np.array([1.0, 0.0])
    both = np.array([[1.0, 0.0], [0.999, 0.001]])

    np.testing.assert_array_equal(kl_divergence(both, reference_D), [0.0, np.inf])


@property_of
@given(mixtures(5), mixtures(5))
def test_a_divergence_is_never_negative(mixture_D, reference_D):
    assert kl_divergence(mixture_D, reference_D) >= 0


@pytest.mark.parametrize(
    ("shares", "shown"),
    [
        ([0.5, 0.6], "sum 1.1"),
        ([1.5, -0.5], "-0.5"),
        ([float("nan"), 1.0], "nan"),
        ([float("inf"), 0.0], "inf"),
        ([0.0, 0.0], "sum 0"),
    ],
)
def test_shares_off_the_simplex_are_refused_with_their_sum(shares, shown):
    with pytest.raises(ConfigError, match=r"policy\.reference must be shares >= 0 .*" + shown):
        check_mixture(np.array(shares), field="policy.reference")


def test_a_rounded_mixture_is_normalised_exactly():
    checked_D = check_mixture([0.3333333, 0.3333333, 0.3333334 + 5e-7], field="policy.reference")

    assert checked_D.sum() == pytest.approx(1.0, abs=1e-15)


def test_one_bad_row_is_enough_to_be_off_the_simplex():
    rows = np.array([[0.5, 0.5], [0.5, 0.4]])

    assert is_on_simplex(rows[:1])
    assert not is_on_simplex(rows)


@property_of
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_a_longer_design_begins_with_the_shorter_one(n, more, seed):
    short = dirichlet_design(n, 4, strength_range=(0.4, 3.0), seed=seed)
    long = dirichlet_design(n + more, 4, strength_range=(0.4, 3.0), seed=seed)

    assert short.tobytes() == long[:n].tobytes()
    assert is_on_simplex(long, tolerance=1e-12)


def test_another_seed_gives_another_design():
    first, second = (dirichlet_design(8, 3, strength_range=(1, 1), seed=seed) for seed in (0, 1))

    assert np.abs(first - second).max() > 0.05


@pytest.mark.parametrize("strength", [0.4, 1.0, 3.0])
def test_each_share_has_the_marginal_of_a_dirichlet(strength):
    """A share of a symmetric Dirichlet over D domains is Beta(a, a (D - 1))."""
    design = dirichlet_design(1024, 4, strength_range=(strength, strength), seed=3)

    for share_N in design.T:
        assert kstest(share_N, beta(strength, 3 * strength).cdf).pvalue > 0.2


def test_the_design_runs_from_sparse_to_flat():
    design = dirichlet_design(512, 4, strength_range=(0.2, 20.0), seed=0)
    largest_N = design.max(axis=1)

    assert (largest_N > 0.8).mean() > 0.05
    assert (largest_N < 0.4).mean() > 0.3


def test_points_spread_more_evenly_than_chance():
    """256 scrambled Sobol points have one in each of 256 equal intervals, in every dimension."""
    points = sobol_uniforms(256, 5, seed=7)

    assert ((points > 0) & (points < 1)).all()
    for column in points.T:
        assert len(np.unique(np.floor(column * 256))) == 256


@pytest.mark.parametrize(
    "strengths", [(0.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))]
)
def test_impossible_strengths_are_refused(strengths):
    with pytest.raises(ConfigError, match=r"design\.strength_range must be 0 < least"):
        dirichlet_design(4, 3, strength_range=strengths, seed=0)
