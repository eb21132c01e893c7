from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.belief import (
    EDGE_SCORE,
    confounding,
    gain_interval,
    noise_floor,
    overlap,
    placebo,
    reach_of,
)
from causalmix_pipeline.core.effects import Gain
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline_tests.core.staged_truth import staged_truth

POOL = SyntheticPool.draw(6, 4, 2, seed=1)
STATES_SDP = POOL.draw_states(64, np.random.default_rng(0))


def shifted(size: float, domains: slice, n_states: int = 100) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    states_MDP = POOL.draw_states(n_states, rng)
    states_MDP[:, domains] += size * rng.choice([-1, 1], size=states_MDP[:, domains].shape)
    return list(states_MDP)


def share_of(verdict: str, states: list[np.ndarray]) -> float:
    return float(np.mean([overlap(s, STATES_SDP).verdict == verdict for s in states]))


def test_states_of_the_same_kind_are_supported():
    """By construction 5% of the runs' own states are not; new ones somewhat more."""
    assert share_of("supported", shifted(0.0, slice(0, 6))) >= 0.85


def test_checkpoints_of_one_pool_are_no_neighbours_and_new_pools_stay_near():
    """Each run is a state of its own; by the distances to its twins new pools were far."""
    rng = np.random.default_rng(0)
    pool_MDP = rng.normal(size=(40 + 40, 4, 5))
    new = [np.column_stack([pool_DP, rng.normal(size=4)]) for pool_DP in pool_MDP[40:]]
    group_S = np.repeat(np.arange(40), 6)
    loss_SD1 = rng.normal(size=(len(group_S), 4, 1))
    twins_SDP = np.concatenate([pool_MDP[group_S], loss_SD1], axis=2)

    def far(groups: np.ndarray | None) -> float:
        verdicts = [overlap(state_DP, twins_SDP, group_S=groups).verdict for state_DP in new]
        return float(np.mean([verdict != "supported" for verdict in verdicts]))

    assert far(group_S) <= 0.15
    assert far(None) >= 0.4
    alone = overlap(new[0], twins_SDP, group_S=np.arange(len(twins_SDP)))
    assert alone.score == pytest.approx(overlap(new[0], twins_SDP).score)
    assert overlap(new[0] + 20, twins_SDP, group_S=group_S).verdict == "unsupported"


def test_the_checkpoints_of_staged_runs_are_told_by_their_pool():
    runs = staged_truth(n_runs=64).table(1, checkpoint=True)
    state_DP = runs.state_NDP[0] + 0.5
    groups = overlap(state_DP, runs.state_NDP, group_S=runs.groups)

    assert reach_of(runs, state_DP).score == groups.score
    assert reach_of(replace(runs, group_N=None), state_DP).score != groups.score


def test_states_of_one_pool_count_as_one_where_few_are_refused():
    with pytest.raises(EstimationError, match="at least 7 distinct pool states, got 4"):
        overlap(STATES_SDP[0], STATES_SDP[:16], group_S=np.repeat(np.arange(4), 4))


def test_a_far_shift_of_every_domain_is_unsupported():
    assert share_of("unsupported", shifted(6.0, slice(0, 6))) == 1.0
    assert share_of("extrapolating", shifted(2.0, slice(0, 6))) >= 0.9


def test_a_far_shift_of_one_domain_does_not_drown_among_the_others():
    """A distance over all 24 dimensions calls 3 standard deviations in one domain supported."""
    far = shifted(3.0, slice(2, 3))

    assert share_of("supported", far) <= 0.02
    assert share_of("unsupported", shifted(9.0, slice(2, 3))) == 1.0
    assert {int(np.argmax(overlap(s, STATES_SDP).domain_score_D)) for s in far} == {2}


def test_effects_are_read_at_the_state_itself_within_reach_and_at_an_edge_beyond():
    near, far = shifted(0.0, slice(0, 6))[0], shifted(5.0, slice(0, 6))[0]
    edge_DP = overlap(far, STATES_SDP).edge_DP

    assert (overlap(near, STATES_SDP).edge_DP == near).all()
    assert overlap(edge_DP, STATES_SDP).score == pytest.approx(EDGE_SCORE, abs=1e-3)
    toward_DP = (edge_DP - STATES_SDP.mean(axis=0)) / (far - STATES_SDP.mean(axis=0))
    assert np.ptp(toward_DP) < 1e-6


def test_doubt_grows_with_the_distance_and_is_none_within_reach():
    near, far = (overlap(shifted(by, slice(0, 6))[0], STATES_SDP) for by in (0.0, 3.0))

    assert near.doubt == 1
    assert far.doubt == far.score > 2


def test_a_shift_of_two_is_told_from_none():
    """Area under the curve of the score, one domain shifted by 2 standard deviations."""
    calm = np.array([overlap(s, STATES_SDP).score for s in shifted(0.0, slice(0, 6))])
    moved = np.array([overlap(s, STATES_SDP).score for s in shifted(2.0, slice(0, 1))])

    assert (calm[:, None] < moved).mean() > 0.85


def test_overlap_does_not_depend_on_units_or_domain_order():
    state_DP = shifted(1.0, slice(0, 2))[0]
    order = np.array([3, 0, 5, 1, 4, 2])

    score = overlap(state_DP, STATES_SDP).score

    assert overlap(100 * state_DP + 7, 100 * STATES_SDP + 7).score == pytest.approx(score)
    assert overlap(state_DP[order], STATES_SDP[:, order]).score == pytest.approx(score)


def test_the_drift_table_says_what_is_outside_the_runs_reach():
    state_DP = STATES_SDP.mean(axis=0)
    state_DP[1, 2] = 50.0
    domains = tuple("abcdef")

    drift = overlap(state_DP, STATES_SDP, domains, ("w", "x", "y", "z")).drift

    outside = drift.filter(~pl.col("inside"))
    assert outside.select("domain", "covariate", "value").rows() == [("b", "y", 50.0)]
    assert outside["z"][0] == pytest.approx(50 / STATES_SDP[:, 1, 2].std(), rel=0.1)
    assert drift.height == 24


def test_a_covariate_that_never_varied_but_has_moved_is_extrapolating():
    states_SDP = STATES_SDP.copy()
    states_SDP[:, 0, 0] = 0.0
    state_DP = states_SDP[3].copy()
    assert overlap(state_DP, states_SDP).verdict == "supported"
    state_DP[0, 0] = 0.3

    found = overlap(state_DP, states_SDP)

    assert found.verdict == "extrapolating"
    assert found.drift["z"][0] is None
    assert not found.drift["inside"][0]


def test_overlap_refuses_few_states_other_shapes_and_missing_values():
    with pytest.raises(EstimationError, match="at least 7 distinct pool states, got 6"):
        overlap(STATES_SDP[0], STATES_SDP[:6])
    with pytest.raises(EstimationError, match=r"\(6, 3\) against \(6, 4\)"):
        overlap(STATES_SDP[0][:, :3], STATES_SDP)
    with pytest.raises(EstimationError, match="finite"):
        overlap(np.full((6, 4), np.nan), STATES_SDP)


def test_the_noise_floor_finds_the_planted_variances():
    runs = POOL.run_table(64, 4, noise=0.5, n_repeats=100, seed=2)

    floor = noise_floor(runs)

    assert floor["seed_variance"].to_numpy() == pytest.approx(0.25, rel=0.2)
    assert floor["seed_df"].to_list() == [200, 200]
    assert floor["mixture_df"].to_list() == [192, 192]
    assert floor["above_noise"].all()
    clean = noise_floor(POOL.run_table(64, 4, noise=0.0, seed=2))["mixture_variance"].to_numpy()
    assert floor["mixture_variance"].to_numpy() == pytest.approx(clean, rel=0.15)


def test_pure_noise_is_above_its_floor_one_time_in_twenty():
    runs = POOL.run_table(16, 4, n_repeats=20, seed=3)
    noise_NT = np.random.default_rng(0).normal(size=(runs.n_runs, 100))
    tasks = tuple(f"noise_{t}" for t in range(100))

    floor = noise_floor(replace(runs, tasks=tasks, outcome_NT=noise_NT))

    assert floor["above_noise"].sum() <= 12
    assert floor["ratio"].median() < 0.2


def test_without_repeated_runs_the_floor_is_unknown():
    floor = noise_floor(POOL.run_table(16, 4))

    assert floor["seed_variance"].is_null().all()
    assert floor["above_noise"].is_null().all()


def test_a_random_design_is_not_observational():
    found = confounding(POOL.run_table(64, 4, seed=5))

    assert not found.observational
    assert found.r2 < 0.05


def test_mixtures_that_follow_the_state_are_observational():
    found = confounding(POOL.run_table(64, 4, confounding=2.0, seed=5))

    assert found.observational
    assert found.r2 > 0.3


def test_without_covariates_nothing_can_be_observed():
    assert confounding(SyntheticPool.draw(3, 0, 1).run_table(8, 4)).r2 == 0.0


def test_the_real_correlation_stands_above_both_placebos():
    """Without covariates' meaning less is left; without the mixtures' nothing is."""
    runs = POOL.run_table(40, 4, seed=6)

    table = placebo(lambda: make_estimator("structured_ridge"), runs)

    assert (table["real"] > 0.8).all()
    assert (table["real"] > table["states_permuted"] + 0.05).all()
    assert (table["mixtures_permuted"].abs() < 0.3).all()


def test_a_ninety_percent_interval_is_1_645_standard_errors_wide():
    low_MT, high_MT = gain_interval(Gain(np.array([[1.0]]), np.array([[2.0]])))

    assert low_MT[0, 0] == pytest.approx(1 - 1.6449 * 2, abs=1e-3)
    assert high_MT[0, 0] == pytest.approx(1 + 1.6449 * 2, abs=1e-3)


def test_a_level_outside_zero_to_one_is_refused():
    with pytest.raises(EstimationError, match="got 90"):
        gain_interval(Gain(np.zeros((1, 1)), np.ones((1, 1))), level=90)


def test_between_two_kinds_of_pools_nothing_is_near():
    """Pulled from beyond one kind to the mean of both, a state ends where no run has been."""
    rng = np.random.default_rng(3)
    kinds = np.concatenate([rng.normal(at, 1, size=(20, 2, 2)) for at in (-10, 10)])

    for far in (13.0, 14.0, 40.0):
        edge_DP = overlap(np.full((2, 2), far), kinds).edge_DP
        assert overlap(edge_DP, kinds).score <= EDGE_SCORE + 1e-6
        assert edge_DP.mean() > 8


def test_a_state_off_the_way_to_the_mean_is_pulled_to_the_nearest_of_the_runs():
    """On a ring of states neither the mean nor the way to it is near any."""
    angle_S = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = 10 * np.stack([np.cos(angle_S), np.sin(angle_S)], axis=1)[:, None, :]
    ring = ring[np.abs(angle_S - 1.0) > 0.6]  # a gap, and the state looks through it
    state_DP = 30 * np.array([[np.cos(1.0), np.sin(1.0)]])

    edge_DP = overlap(state_DP, ring).edge_DP
    assert overlap(edge_DP, ring).score <= EDGE_SCORE + 1e-6
