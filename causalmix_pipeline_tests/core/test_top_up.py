"""A plan goes on where a state's finished runs end; its runs are stacked below the run table."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.belief import TOP_UP_RUNS, reach_of
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import OWN, RunTable
from causalmix_pipeline.core.top_up import (
    plan_top_up,
    stack_top_ups,
    top_up_frame,
    top_up_name,
)

POOL = SyntheticPool.draw(n_domains=4, n_covariates=2, n_tasks=2, seed=1)
RUNS = POOL.run_table(n_states=16, mixtures_per_state=4, noise=0.05, seed=2)
FAR_DP = RUNS.state_NDP[0] + 6.0


def trained(numbers, mixtures: dict[int, np.ndarray], state_DP=FAR_DP, diverged=()) -> pl.DataFrame:
    """The planned runs with these numbers, made; a diverged one has no outcome."""
    mixture_ND = np.array([mixtures[n] for n in numbers])
    outcome_NT = POOL.expected_outcome(state_DP, mixture_ND)
    return top_up_frame(
        RUNS,
        [top_up_name("abc", n) for n in numbers],
        np.repeat(state_DP[None], len(mixture_ND), axis=0),
        mixture_ND,
        [
            {task: None if n in diverged else row[t] for t, task in enumerate(RUNS.tasks)}
            for n, row in zip(numbers, outcome_NT.tolist(), strict=True)
        ],
    )


def plan(done: pl.DataFrame, state_DP: np.ndarray = FAR_DP, runs=RUNS) -> dict[int, np.ndarray]:
    """What is planned, however well the runs do."""
    return plan_top_up(reach_of(runs, FAR_DP), runs, done, state_DP, seed=3)


NONE = top_up_frame(RUNS, [], np.empty(0), np.empty(0), [])
FIRST = plan(NONE)


def test_a_supported_pool_needs_no_run():
    near_DP = RUNS.state_NDP[0]

    assert plan_top_up(reach_of(RUNS, near_DP), RUNS, NONE, near_DP, seed=3) == {}


def test_a_pool_out_of_reach_gets_mixtures_that_spread_over_the_simplex():
    mixture_ND = np.array(list(FIRST.values()))

    assert list(FIRST) == list(range(TOP_UP_RUNS))
    assert mixture_ND.sum(axis=1) == pytest.approx(1)
    assert mixture_ND.max(axis=0).min() > 0.5  # each domain leads in some


def test_a_plan_goes_on_where_the_finished_runs_of_the_state_end():
    later = plan(trained(range(TOP_UP_RUNS), FIRST))

    assert list(later) == list(range(TOP_UP_RUNS, 2 * TOP_UP_RUNS))


def test_runs_of_another_state_move_no_plan():
    done = trained(range(TOP_UP_RUNS), FIRST, state_DP=FAR_DP + 1)

    again = plan(done)

    assert list(again) == list(FIRST)
    assert all((again[n] == FIRST[n]).all() for n in FIRST)


def test_a_hole_left_by_a_kill_is_filled_and_a_diverged_run_is_not_tried_again():
    later = plan(trained([0, 2, 5], FIRST, diverged=[5]))

    assert list(later)[:4] == [1, 3, 4, 6]
    assert len(later) == TOP_UP_RUNS - 3  # with those finished, as many as were asked for


def test_the_stack_has_the_runs_below_on_one_state_of_our_own():
    done = trained(range(TOP_UP_RUNS), FIRST, diverged=[3])

    stacked = stack_top_ups(RUNS, done)

    further = stacked.subset(np.arange(RUNS.n_runs, stacked.n_runs))
    assert stacked.n_runs == RUNS.n_runs + TOP_UP_RUNS - 1
    assert (stacked.outcome_NT[: RUNS.n_runs] == RUNS.outcome_NT).all()
    assert stacked.n_states == RUNS.n_states + 1 and further.n_states == 1
    assert (further.state_NDP == FAR_DP).all()
    assert stacked.sources == (OWN,)


def test_no_top_up_leaves_the_run_table_as_it_is():
    assert stack_top_ups(RUNS, NONE) is RUNS
    assert stack_top_ups(RUNS, trained([0], FIRST, diverged=[0])) is RUNS


def test_a_top_up_brings_its_pool_within_reach():
    stacked = stack_top_ups(RUNS, trained(range(TOP_UP_RUNS), FIRST))

    before, after = reach_of(RUNS, FAR_DP), reach_of(stacked, FAR_DP)
    assert before.verdict != "supported"
    assert after.verdict == "supported" and after.score < before.score


def test_the_frame_is_that_of_a_run_table():
    frame = trained([1, 0], FIRST)

    assert frame["run_id"].to_list() == ["top_up/abc/000", "top_up/abc/001"]
    runs = RunTable.from_frame(frame)
    assert runs.domains == RUNS.domains and runs.covariates == RUNS.covariates
    assert runs.mixture_ND == pytest.approx(np.array([FIRST[0], FIRST[1]]))


def test_runs_of_a_state_at_two_sizes_have_names_of_their_own():
    assert top_up_name("abcdef" * 6, 7) == "top_up/abcdefabcdef/007"
    assert top_up_name("abcdef" * 6, 7, 16.0) == "top_up/abcdefabcdef@65536/007"


def test_a_run_table_without_covariates_takes_them_too():
    blind = replace(RUNS, covariates=(), state_NDP=np.empty((RUNS.n_runs, 4, 0)))
    done = top_up_frame(
        blind,
        ["top_up/abc/000"],
        np.empty((1, 4, 0)),
        FIRST[0][None],
        [dict.fromkeys(RUNS.tasks, 0.5)],
    )

    assert stack_top_ups(blind, done).n_runs == RUNS.n_runs + 1


def test_runs_collected_for_other_tasks_are_refused():
    fewer = RUNS.select_tasks(RUNS.tasks[:1])

    with pytest.raises(EstimationError, match=r"top_up_runs must have the tasks of run_table"):
        stack_top_ups(fewer, trained([0], FIRST))
