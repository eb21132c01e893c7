from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable


@pytest.fixture(scope="module")
def runs() -> RunTable:
    return SyntheticPool.draw(3, 2, 2).run_table(5, 2, n_repeats=2)


def changed(array: np.ndarray, index: tuple, value: float) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def same(first: RunTable, second: RunTable) -> bool:
    names = ("domains", "covariates", "tasks", "run_ids")
    arrays = ("state_ids", "state_NDP", "mixture_ND", "outcome_NT", "repeat_of_N")
    return all(getattr(first, n) == getattr(second, n) for n in names) and all(
        np.array_equal(getattr(first, n), getattr(second, n)) for n in arrays
    )


def test_a_frame_and_back_is_the_same_table(runs):
    assert same(RunTable.from_frame(runs.to_frame()), runs)


def test_a_table_on_disk_and_back_is_the_same_table(runs, tmp_path):
    import polars as pl

    runs.to_frame().write_parquet(tmp_path / "runs.parquet")

    assert same(RunTable.from_frame(pl.read_parquet(tmp_path / "runs.parquet")), runs)


def test_a_table_without_covariates_comes_back_with_none():
    blind = SyntheticPool.draw(3, 0, 2).run_table(4, 2)

    back = RunTable.from_frame(blind.to_frame())

    assert back.covariates == ()
    assert back.state_NDP.shape == (8, 3, 0)


def test_a_domain_whose_name_starts_like_another_keeps_its_covariates():
    """`a__b` begins with the prefix of domain `a`."""
    odd = replace(SyntheticPool.draw(3, 2, 1).run_table(4, 2), domains=("a", "a__b", "c"))

    assert same(RunTable.from_frame(odd.to_frame()), odd)


def test_a_subset_takes_positions_or_a_mask(runs):
    mask = np.arange(runs.n_runs) < 3

    assert same(runs.subset(mask), runs.subset([0, 1, 2]))
    assert runs.subset([2, 0]).run_ids == ("run_00002", "run_00000")


def test_sorting_undoes_any_row_order(runs):
    shuffled = runs.subset(np.random.default_rng(0).permutation(runs.n_runs))

    assert same(shuffled.sorted_by_run(), runs)


def test_tasks_are_selected_by_name(runs):
    second = runs.select_tasks(["task_1"])

    assert second.tasks == ("task_1",)
    assert np.array_equal(second.outcome_NT[:, 0], runs.outcome_NT[:, 1])


def test_an_unknown_task_is_refused(runs):
    with pytest.raises(EstimationError, match=r"task_0, task_1.*got poetry"):
        runs.select_tasks(["poetry"])


def test_distinct_states_come_with_their_covariates(runs):
    ids, state_SDP = runs.distinct_states()

    assert ids.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(state_SDP[runs.state_ids], runs.state_NDP)
    assert (runs.n_runs, runs.n_states) == (14, 5)


def test_covariate_columns_are_domain_by_domain(runs):
    assert runs.covariate_columns[:3] == (
        "domain_0__covariate_0",
        "domain_0__covariate_1",
        "domain_1__covariate_0",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_outcome_that_is_no_number_is_refused_with_run_and_task(runs, value):
    with pytest.raises(EstimationError, match=rf"outcome task_1 of run run_00003.*got {value}"):
        replace(runs, outcome_NT=changed(runs.outcome_NT, (3, 1), value))


def test_a_covariate_that_is_no_number_is_refused_by_name(runs):
    with pytest.raises(EstimationError, match="domain_2__covariate_1 of run run_00001"):
        replace(runs, state_NDP=changed(runs.state_NDP, (1, 2, 1), np.nan))


def test_a_missing_outcome_in_a_frame_is_refused(runs):
    import polars as pl

    frame = runs.to_frame().with_columns(pl.lit(None, pl.Float64).alias("outcome__task_0"))

    with pytest.raises(EstimationError, match=r"outcome task_0 of run run_00000.*\(14 such"):
        RunTable.from_frame(frame)


@pytest.mark.parametrize("share", [0.9, -0.2])
def test_a_mixture_off_the_simplex_is_refused(runs, share):
    with pytest.raises(EstimationError, match=r"mixture of run run_00002 .*sum"):
        replace(runs, mixture_ND=changed(runs.mixture_ND, (2, 0), share))


def test_a_negative_share_is_refused_although_the_sum_is_one(runs):
    mixture_ND = runs.mixture_ND.copy()
    mixture_ND[2] = [-0.1, 0.6, 0.5]

    with pytest.raises(EstimationError, match=r"least share -0\.1"):
        replace(runs, mixture_ND=mixture_ND)


def test_a_run_id_used_twice_is_refused(runs):
    with pytest.raises(EstimationError, match=r"run_ids.*'run_00000' 2 times"):
        replace(runs, run_ids=("run_00000", *runs.run_ids[:-1]))


def test_arrays_of_other_runs_are_refused(runs):
    with pytest.raises(EstimationError, match=r"outcome_NT must have shape \(14, 2\).*\(13, 2\)"):
        replace(runs, outcome_NT=runs.outcome_NT[1:])


def test_two_covariate_values_for_one_state_are_refused(runs):
    with pytest.raises(EstimationError, match="run_00001 differs from run run_00000 of state 0"):
        replace(runs, state_NDP=changed(runs.state_NDP, (1, 0, 0), 9.0))


def test_a_frame_without_its_columns_is_refused(runs):
    with pytest.raises(EstimationError, match="needs the columns run_id"):
        RunTable.from_frame(runs.to_frame().drop("run_id"))


def test_a_frame_that_lacks_one_domains_covariate_is_refused(runs):
    with pytest.raises(EstimationError, match="domain_1__covariate_0"):
        RunTable.from_frame(runs.to_frame().drop("state__domain_1__covariate_0"))


def test_runs_of_several_sources_come_back_from_a_frame_with_their_labels(runs):
    label_N = tuple("team_b" if state > 2 else "own" for state in runs.state_ids)
    mixed = replace(runs, source_N=label_N, observational_sources=("team_b", "gone"))

    back = RunTable.from_frame(mixed.to_frame())

    assert back.source_N == label_N
    assert back.sources == ("own", "team_b")
    assert back.observational_sources == ("team_b",)
    assert back.subset(np.array(label_N) == "own").observational_sources == ()


def test_a_frame_of_own_runs_has_no_further_column(runs):
    assert not {"source", "randomised"} & set(runs.to_frame().columns)
    assert runs.sources == ("own",)


def test_own_runs_may_be_observational(runs):
    table = replace(runs, observational_sources=("own",))

    assert RunTable.from_frame(table.to_frame()).observational_sources == ("own",)


def test_a_state_belongs_to_one_source(runs):
    label_N = ("team_b", *("own",) * (runs.n_runs - 1))

    with pytest.raises(EstimationError, match="must have the same source, but run"):
        replace(runs, source_N=label_N)
    with pytest.raises(EstimationError, match=r"source_N must have 14 labels, got 1"):
        replace(runs, source_N=("team_b",))


def test_a_state_with_more_mixtures_counts_for_several():
    pool = SyntheticPool.draw(3, 2, 1)
    runs = pool.run_table(9, 2, n_repeats=3)
    assert len(runs.weighed_states()) == 9  # repeats tell no more of a state

    few = runs.subset(np.isin(runs.state_ids, [0, 1, 2]) | (np.arange(runs.n_runs) % 2 == 0))
    assert len(few.weighed_states()) == 9 + 3  # three states with 2 mixtures where 1 is usual
