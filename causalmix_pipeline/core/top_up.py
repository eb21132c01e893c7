"""Top-ups: a few runs at the state of a pool out of reach, and the run table with them.

They are trained by the recipe of the experiment's own runs, so they lie on the same level and are
stacked below these. A pool's plan goes on where its finished runs end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, islice

import numpy as np
import polars as pl

from causalmix_pipeline.core.belief import TOP_UP_RUNS, Overlap
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.mixture import dirichlet_design
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import at_trained_size
from causalmix_pipeline.core.sources import stack_runs

#: What the names of top-up runs begin with; the state and a number follow.
TOP_UP = "top_up"

#: Digits of the state's hash in a run's name.
STATE_DIGITS = 12


def top_up_name(state_hash: str, number: int, size: float | None = None) -> str:
    """The name of a run: `top_up/<state>/<number>`; with sizes `top_up/<state>@<parameters>/...`.

    Args:
        state_hash: of the live pool.
        number: of the run at this state and size.
        size: log2 parameters of its model; None where proxies have one size.
    """
    state = state_hash[:STATE_DIGITS] + ("" if size is None else f"@{2**size:.0f}")
    return f"{TOP_UP}/{state}/{number:03d}"


def stack_top_ups(runs: RunTable, top_up_runs: pl.DataFrame) -> RunTable:
    """The run table with the top-up runs that have every outcome below it.

    Args:
        runs: the run table.
        top_up_runs: as `top_up_frame` makes it; a diverged run has no outcome and is left out.

    Raises:
        EstimationError: if the top-up runs were collected for other domains, covariates or tasks.
    """
    finished = top_up_runs.drop_nulls()
    if not finished.height:
        return runs
    further = RunTable.from_frame(finished)
    for name in ("domains", "covariates", "tasks"):
        ours, theirs = getattr(runs, name), getattr(further, name)
        if ours != theirs:
            raise EstimationError(
                f"top_up_runs must have the {name} of run_table ({', '.join(ours) or 'none'}), "
                f"got {', '.join(theirs) or 'none'}: materialise top_up_runs again."
            )
    return stack_runs([runs, further])


def plan_top_up(
    reach: Overlap, runs: RunTable, top_up_runs: pl.DataFrame, state_DP: np.ndarray, *, seed: int
) -> dict[int, np.ndarray]:
    """The runs that would settle what can't be told of a pool now; none where it's supported.

    Args:
        reach: of the pool, seen from the run table with its top-ups.
        runs: the run table; names domains and covariates.
        top_up_runs: the top-up runs that are finished, of any state.
        state_DP: covariates of the pool; finished runs of this very state aren't planned again.
        seed: of the mixtures, which are the same for all states.

    Returns:
        Mixtures, shape (D,), by the number of the run; as many as fill up `TOP_UP_RUNS` or a
        multiple of it, so that one that was killed half-way trains the rest alone.
    """
    if reach.pool_verdict == "supported":  # a size out of reach isn't settled by runs at the pool
        return {}
    state_DP = at_trained_size(runs, state_DP)
    done = _numbers_at(top_up_runs, runs, state_DP)
    numbers = list(
        islice((n for n in count() if n not in done), TOP_UP_RUNS - len(done) % TOP_UP_RUNS)
    )
    mixture_MD = dirichlet_design(
        numbers[-1] + 1,
        len(runs.domains),
        strength_range=DesignPlan().strength_range,
        seed=seed + 1,
    )
    return {number: mixture_MD[number] for number in numbers}


def _numbers_at(top_up_runs: pl.DataFrame, runs: RunTable, state_DP: np.ndarray) -> set[int]:
    """Numbers of the runs that are finished at a state, told by its covariates."""
    if not top_up_runs.height:
        return set()
    columns = [f"state__{name}" for name in runs.covariate_columns]
    here_N = (top_up_runs.select(columns).to_numpy() == np.ravel(state_DP)).all(axis=1)
    names = top_up_runs["run_id"].filter(pl.Series(here_N)).to_list()
    return {int(name.rpartition("/")[2]) for name in names}


def top_up_frame(
    runs: RunTable,
    run_ids: Sequence[str],
    state_NDP: np.ndarray | Sequence[np.ndarray],
    mixture_ND: np.ndarray | Sequence[Sequence[float]],
    outcomes: Sequence[Mapping[str, float | None]],
) -> pl.DataFrame:
    """Top-up runs in the form of the run table, by name; outcomes of a diverged run are null.

    Args:
        runs: the run table; names domains, covariates and tasks.
        run_ids: N names, no two alike; for none, the frame has no column but these.
        state_NDP: covariates of the pool that each run was trained on.
        mixture_ND: shares.
        outcomes: of each run by task, larger is better; None for none.
    """
    if not run_ids:
        return pl.DataFrame(schema={"run_id": pl.String})
    flat_NC, mixture_ND = np.asarray(state_NDP).reshape(len(run_ids), -1), np.asarray(mixture_ND)
    state_N = _distinct(flat_NC)
    frame = pl.DataFrame(
        {
            "run_id": list(run_ids),
            "state_id": state_N,
            "repeat_of": _distinct(np.column_stack([state_N, mixture_ND])),
            **{f"share__{d}": mixture_ND[:, i] for i, d in enumerate(runs.domains)},
            **{f"state__{name}": flat_NC[:, c] for c, name in enumerate(runs.covariate_columns)},
            **{
                f"outcome__{task}": pl.Series([row[task] for row in outcomes], dtype=pl.Float64)
                for task in runs.tasks
            },
        }
    )
    return frame.sort("run_id")


def _distinct(value_NC: np.ndarray) -> np.ndarray:
    """Number of each distinct row; shape (N,)."""
    if not value_NC.shape[1]:
        return np.zeros(len(value_NC), dtype=np.int64)
    return np.unique(value_NC, axis=0, return_inverse=True)[1].ravel()
