from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import (
    EffectEstimator,
    Gain,
    StateScaler,
    assign_folds,
    center_by_state,
    check_runs,
    cross_validate,
    flag_outliers,
    jackknife_se,
    permute_mixtures,
    permute_states,
    r_squared,
    spearman,
)
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

POOL = SyntheticPool.draw(4, 2, 2, seed=3)


class Oracle:
    """Knows the truth and the noise; records which states it was fitted on."""

    name = "oracle"
    task_correlation_TT = np.eye(2)

    def __init__(self, noise: float = 0.3):
        self.noise_variance_T = np.full(2, noise**2)
        self.seen: list[set[int]] = []

    def fit(self, runs: RunTable) -> "Oracle":
        self.seen.append(set(runs.state_ids.tolist()))
        return self

    def predict(self, state_DP, mixture_MD):
        return POOL.expected_outcome(state_DP, mixture_MD)

    def gain(self, state_DP, mixture_MD, reference_D):
        mean_MT = POOL.expected_gain(state_DP, mixture_MD, reference_D)
        return Gain(mean_MT, np.zeros_like(mean_MT))

    def parameters(self):
        return {}


@pytest.fixture(scope="module")
def runs() -> RunTable:
    return POOL.run_table(40, 4, noise=0.3, seed=1)


def test_the_oracle_is_an_effect_estimator():
    assert isinstance(Oracle(), EffectEstimator)


def test_cross_validation_of_the_truth_is_limited_by_seed_noise_alone(runs):
    """With noise .3 on a signal of 1, R2 within states is near 1 - .09 / (signal + .09)."""
    scored = cross_validate(Oracle, runs)

    expected_T = 1 - 0.09 / runs_variance_within(runs)
    assert scored.frame["r2_within"].to_numpy() == pytest.approx(expected_T, abs=0.03)
    assert (scored.frame["spearman_within"] > 0.9).all()
    assert scored.name == "oracle"


def runs_variance_within(runs: RunTable) -> np.ndarray:
    centered_NT = center_by_state(runs.outcome_NT, runs.state_ids)
    return (centered_NT**2).sum(axis=0) / (runs.n_runs - runs.n_states)


def test_intervals_of_the_truth_cover_nine_gains_in_ten(runs):
    coverage = cross_validate(Oracle, runs).frame["coverage_90"]

    assert coverage.to_numpy() == pytest.approx(0.9, abs=0.06)


def test_intervals_that_forget_the_noise_cover_less(runs):
    """The line that adds seed noise to the interval is what makes coverage right."""
    assert cross_validate(lambda: Oracle(noise=0.05), runs).frame["coverage_90"].max() < 0.5


def test_without_standard_errors_there_is_no_coverage(runs):
    class Silent(Oracle):
        def gain(self, state_DP, mixture_MD, reference_D):
            mean_MT = POOL.expected_gain(state_DP, mixture_MD, reference_D)
            return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    frame = cross_validate(Silent, runs).frame

    assert frame["coverage_90"].is_null().all()
    assert frame["n_gains"].to_list() == [0, 0]


def test_a_fold_never_splits_a_state(runs):
    oracle = Oracle()

    scored = cross_validate(lambda: oracle, runs, n_folds=4)

    for fold, seen in enumerate(oracle.seen):
        assert not seen & set(runs.state_ids[scored.fold_N == fold].tolist())
    assert len(oracle.seen) == 4


def test_folds_follow_the_state_and_not_the_row(runs):
    order = np.random.default_rng(0).permutation(runs.n_runs)

    assert np.array_equal(assign_folds(runs, 5, 7)[order], assign_folds(runs.subset(order), 5, 7))


def test_row_order_does_not_change_the_scores(runs):
    order = np.random.default_rng(0).permutation(runs.n_runs)

    first, second = cross_validate(Oracle, runs), cross_validate(Oracle, runs.subset(order))

    assert np.array_equal(first.prediction_NT[order], second.prediction_NT)
    assert first.frame["coverage_90"].to_list() == second.frame["coverage_90"].to_list()


def test_a_single_state_is_folded_by_mixture(runs):
    """Imported runs have one state; runs that differ only by seed still stay together."""
    one = POOL.run_table(1, 20, n_repeats=5)

    fold_N = assign_folds(one, 5, 0)

    assert len(np.unique(fold_N)) == 5
    assert all(len(np.unique(fold_N[one.repeat_of_N == cell])) == 1 for cell in range(20))


def test_one_fold_is_refused(runs):
    with pytest.raises(EstimationError, match="n_folds 1"):
        assign_folds(runs, 1, 0)


def test_too_few_runs_are_refused(runs):
    with pytest.raises(EstimationError, match="at least 12 proxy runs, got 8"):
        check_runs(runs.subset(np.arange(8)))


def test_too_few_states_are_refused(runs):
    with pytest.raises(EstimationError, match="at least 3 pool states, got 2"):
        check_runs(POOL.run_table(2, 8), minimum_states=3)


def test_a_mixture_that_never_varies_is_refused(runs):
    constant = replace(runs, mixture_ND=np.full_like(runs.mixture_ND, 0.25))

    with pytest.raises(EstimationError, match=r"must vary.*0\.25"):
        check_runs(constant)


def test_a_diverged_outcome_is_refused_with_run_and_task(runs):
    """EconML accepts 1e30 in silence."""
    outcome_NT = runs.outcome_NT.copy()
    outcome_NT[7, 1] = -1e30

    with pytest.raises(EstimationError, match=r"outcome task_1 of run run_00007.*got -1e\+30"):
        check_runs(replace(runs, outcome_NT=outcome_NT))


def test_outliers_can_be_listed_and_left_out(runs):
    outcome_NT = runs.outcome_NT.copy()
    outcome_NT[7, 1], outcome_NT[9, 0] = 1e30, 1e9
    broken = replace(runs, outcome_NT=outcome_NT)

    flagged = flag_outliers(broken)

    assert flagged["run_id"].to_list() == ["run_00007", "run_00009"]
    check_runs(broken.subset([i not in (7, 9) for i in range(runs.n_runs)]))


def test_an_outlier_is_found_where_most_outcomes_are_equal(runs):
    outcome_NT = np.zeros_like(runs.outcome_NT)
    outcome_NT[:40, 0] = np.linspace(0.1, 1, 40)
    outcome_NT[5, 0] = 1e6

    assert flag_outliers(replace(runs, outcome_NT=outcome_NT))["run_id"].to_list() == ["run_00005"]


def test_a_wide_unit_makes_no_outlier_where_most_outcomes_are_equal(runs):
    """More than half at zero: the median distance is 0 and can't be the yardstick."""
    outcome_NT = np.zeros_like(runs.outcome_NT)
    outcome_NT[:40, 0] = np.linspace(100, 1000, 40)

    assert flag_outliers(replace(runs, outcome_NT=outcome_NT)).height == 0


def test_good_runs_have_no_outlier(runs):
    assert flag_outliers(runs).height == 0


def test_permuted_states_keep_states_whole_and_change_nothing_else(runs):
    placebo = permute_states(runs, np.random.default_rng(0))

    assert np.array_equal(placebo.mixture_ND, runs.mixture_ND)
    assert not np.array_equal(placebo.state_NDP, runs.state_NDP)
    own, other = runs.distinct_states()[1], placebo.distinct_states()[1]
    assert np.array_equal(np.sort(own, axis=0), np.sort(other, axis=0))


def test_permuted_mixtures_stay_in_their_state(runs):
    placebo = permute_mixtures(runs, np.random.default_rng(0))

    assert not np.array_equal(placebo.mixture_ND, runs.mixture_ND)
    for state in range(3):
        rows = runs.state_ids == state
        assert sorted(map(tuple, runs.mixture_ND[rows])) == sorted(
            map(tuple, placebo.mixture_ND[rows])
        )


def test_the_scaler_standardises_distinct_states_and_drops_constants(runs):
    state_NDP = runs.state_NDP.copy()
    state_NDP[:, 2, 1] = 5.0
    table = replace(runs, state_NDP=state_NDP)

    scaler = StateScaler.fit(table.distinct_states()[1])

    scaled_SDP = scaler.transform(table.distinct_states()[1])
    assert scaler.dropped(table) == ("domain_2__covariate_1",)
    assert np.allclose(scaled_SDP.mean(axis=0), 0)
    assert np.allclose(np.delete(scaled_SDP.std(axis=0).ravel(), 5), 1)
    assert scaler.transform(np.full((4, 2), 99.0))[2, 1] == 0


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    first_N, second_N = rng.integers(0, 5, 50).astype(float), rng.normal(size=50)

    assert spearman(first_N, second_N) == pytest.approx(spearmanr(first_N, second_N).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_the_jackknife_of_a_mean_is_the_textbook_standard_error():
    values_N = np.random.default_rng(0).normal(size=30)

    found = jackknife_se(lambda i: float(values_N[i].mean()), np.arange(30))

    assert found == pytest.approx(values_N.std(ddof=1) / np.sqrt(30))
    assert np.isnan(jackknife_se(lambda i: 0.0, np.array([0, 0, 1])))


def test_r_squared_by_hand():
    assert r_squared(np.array([1.0, -1.0]), np.array([1.0, 0.0])) == pytest.approx(0.5)
    assert np.isnan(r_squared(np.full(4, 3.0), np.zeros(4), center=3.0))


def test_centring_takes_each_states_own_mean_off():
    centered = center_by_state(np.array([[1.0], [3.0], [10.0]]), np.array([4, 4, 9]))

    assert centered.ravel().tolist() == [-1.0, 1.0, 0.0]
