"""The choice of covariates finds the planted ones, and its scores are those of cross-validation."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.structured_ridge import StructuredRidge
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.covariate_choice import (
    CovariateChoice,
    WithinSums,
    bootstrap_r2,
    choose_covariates,
    collinear_pairs,
    r2_within_by_state,
    variance_inflation,
    with_covariates,
)
from causalmix_pipeline.core.effects import center_by_state, cross_validate, jackknife_se, r_squared
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

POOL = SyntheticPool.draw(4, 2, 2, seed=3)
TRUE = POOL.run_table(40, 4, noise=0.3, seed=1)


def add_covariates(runs: RunTable, **columns_SD: np.ndarray) -> RunTable:
    """The runs with more covariates, given per distinct state and domain."""
    _, inverse_N = np.unique(runs.state_ids, return_inverse=True)
    more = [column_SD[inverse_N][:, :, None] for column_SD in columns_SD.values()]
    return replace(
        runs,
        covariates=(*runs.covariates, *columns_SD),
        state_NDP=np.concatenate([runs.state_NDP, *more], axis=2),
    )


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(TRUE.n_states, len(TRUE.domains)))


NOISY = add_covariates(TRUE, noise_a=noise(1), noise_b=noise(2), noise_c=noise(3))


@pytest.fixture(scope="module")
def choice() -> CovariateChoice:
    return choose_covariates(NOISY, StructuredRidge, seed=4)


def row_of(choice: CovariateChoice, kind: str, names: tuple[str, ...]) -> dict:
    rows = choice.table.filter(kind=kind).rows(named=True)
    return next(row for row in rows if row["covariates"] == list(names))


def test_covariates_that_matter_are_chosen_and_noise_is_not(choice):
    assert choice.chosen == TRUE.covariates
    assert choice.table.filter("chosen")["covariates"].to_list() == [list(TRUE.covariates)]


def test_covariates_of_other_states_are_no_better_than_none(choice):
    nothing = row_of(choice, "none", ())["r2_within"]

    assert row_of(choice, "permuted", choice.chosen)["r2_within"] < nothing + 0.02
    assert row_of(choice, "permuted", NOISY.covariates)["r2_within"] < nothing + 0.02
    assert row_of(choice, "forward", choice.chosen)["r2_within"] > nothing + 0.05


def test_nothing_is_chosen_where_nothing_helps():
    permuted = replace(NOISY, state_NDP=NOISY.state_NDP[:, :, 2:], covariates=("a", "b", "c"))

    assert choose_covariates(permuted, StructuredRidge, n_permutations=1).chosen == ()


def test_scores_and_errors_are_those_of_cross_validation(choice):
    """The mean over tasks, and its jackknife by hand; the same folds for every subset."""
    for names in (TRUE.covariates, NOISY.covariates):
        runs = with_covariates(NOISY, names)
        found = cross_validate(StructuredRidge, runs, seed=4)
        kind = "all" if names == NOISY.covariates else "forward"
        row = row_of(choice, kind, names)

        def mean_r2(rows, runs=runs, found=found):
            part = runs.subset(rows)
            sums = r2_within_by_state(part, found.prediction_NT[rows])
            return sums.r2

        assert row["r2_within"] == pytest.approx(found.frame["r2_within"].mean())
        assert row["r2_within_se"] == pytest.approx(jackknife_se(mean_r2, runs.state_ids))


def test_a_difference_of_subsets_is_surer_than_either_score(choice):
    row = row_of(choice, "all", NOISY.covariates)

    assert row["below_best_se"] < 0.7 * row["r2_within_se"]


def test_the_chosen_is_the_smallest_within_a_standard_error_of_the_best():
    """On these folds a subset with noise in it has the best score."""
    choice = choose_covariates(NOISY, StructuredRidge, seed=7, n_permutations=1)

    eligible = choice.table.filter("eligible")
    as_good = eligible.filter(pl.col("below_best") <= pl.col("below_best_se"))

    assert eligible["size"][0] > 2
    assert len(choice.chosen) == as_good["size"].min() == 2
    assert eligible["below_best"].min() == 0


def test_must_haves_are_in_whatever_is_chosen():
    choice = choose_covariates(
        NOISY, StructuredRidge, must_have=["noise_b"], max_covariates=2, n_permutations=1
    )

    assert "noise_b" in choice.chosen
    assert len(choice.chosen) <= 2
    eligible = choice.table.filter("eligible")["covariates"]
    assert all("noise_b" in names and len(names) <= 2 for names in eligible)


def test_progress_never_passes_its_total():
    seen = []

    choose_covariates(
        TRUE, StructuredRidge, n_permutations=1, on_progress=lambda *now: seen.append(now)
    )

    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= total for done, total in seen)


def test_covariates_that_never_vary_are_no_candidates():
    runs = add_covariates(TRUE, same=np.ones((TRUE.n_states, len(TRUE.domains))))

    choice = choose_covariates(runs, StructuredRidge, n_permutations=1)

    assert not choice.table["covariates"].explode().is_in(["same"]).any()
    assert choice.inflation.row(-1) == ("same", None, None)


def test_sums_of_states_give_the_score_and_its_bootstrap_by_hand():
    rng = np.random.default_rng(0)
    prediction_NT = TRUE.outcome_NT + rng.normal(0, 0.5, TRUE.outcome_NT.shape)
    sums = r2_within_by_state(TRUE, prediction_NT)

    low, high = bootstrap_r2(sums, 300, 7)

    states = np.unique(TRUE.state_ids)
    times_BS = np.random.default_rng(7).multinomial(len(states), [1 / len(states)] * len(states),
                                                    size=300)  # fmt: skip
    rows_of = [np.flatnonzero(TRUE.state_ids == state) for state in states]
    observed_NT, predicted_NT = (
        center_by_state(values_NT, TRUE.state_ids) for values_NT in (TRUE.outcome_NT, prediction_NT)
    )
    drawn = []
    for times_S in times_BS:
        rows = np.concatenate([np.tile(r, n) for r, n in zip(rows_of, times_S, strict=True)])
        tasks = zip(observed_NT[rows].T, predicted_NT[rows].T, strict=True)
        drawn.append(np.mean([r_squared(*task) for task in tasks]))
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.05, 0.95])))
    assert low < sums.r2 < high


def test_nine_bootstrap_intervals_in_ten_hold_the_r2():
    """States drawn from a population whose R2 within states is .75."""
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(400):
        error_ST, total_ST = rng.gamma(2, 0.5, (60, 1)), rng.gamma(2, 2, (60, 1))
        low, high = bootstrap_r2(WithinSums(error_ST, total_ST), 400)
        inside.append(low <= 0.75 <= high)

    assert np.mean(inside) == pytest.approx(0.9, abs=0.04)


def test_the_same_predictions_differ_by_nothing():
    sums = r2_within_by_state(TRUE, TRUE.outcome_NT * 0.5)

    assert bootstrap_r2(sums, 50, minus=sums) == (0.0, 0.0)


def test_covariates_that_say_the_same_are_paired_and_the_weaker_one_goes():
    first, second = (TRUE.distinct_states()[1][:, :, p] for p in range(2))
    runs = add_covariates(TRUE, curved=np.exp(2 * first), turned=-second)

    pairs = collinear_pairs(runs, prefer={TRUE.covariates[0]: 0.3, "curved": 0.5})

    assert sorted(pairs.select("first", "second", "drop").rows()) == sorted([
        (TRUE.covariates[0], "curved", TRUE.covariates[0]),
        (TRUE.covariates[1], "turned", "turned"),
    ])  # fmt: skip
    turned = pairs.row(by_predicate=pl.col("second") == "turned", named=True)
    assert (turned["pearson"], turned["spearman"]) == pytest.approx((1.0, 1.0))


def test_a_sum_of_others_is_inflated_though_no_pair_is_alike():
    first, second = (TRUE.distinct_states()[1][:, :, p] for p in range(2))
    total = first / first.std() + second / second.std() + 0.2 * noise(5)
    runs = add_covariates(TRUE, total=total, unrelated=noise(6))

    factors = dict(variance_inflation(runs).iter_rows())

    assert collinear_pairs(runs).height == 0
    assert factors["total"] > 20
    assert factors["unrelated"] < 1.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"must_have": ["age"]}, "covariates must be among .* got age"),
        ({"max_covariates": 0}, "max_covariates must be at least 1 .* got 0"),
        ({"max_covariates": 1, "must_have": TRUE.covariates}, "hold the 2 of must_have, got 1"),
    ],
)
def test_what_cannot_be_chosen_is_refused(change, message):
    with pytest.raises(EstimationError, match=message):
        choose_covariates(TRUE, StructuredRidge, **change)


def test_runs_whose_states_are_all_alike_are_refused():
    with pytest.raises(EstimationError, match="one that varies between pool states, got constant"):
        choose_covariates(with_covariates(TRUE, ()), StructuredRidge)


def test_states_with_one_mixture_each_are_refused():
    one_each = TRUE.subset(np.unique(TRUE.state_ids, return_index=True)[1])

    with pytest.raises(EstimationError, match="at least two mixtures per state"):
        choose_covariates(one_each, StructuredRidge)
