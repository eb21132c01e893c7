"""Tables of runs made elsewhere, read into `core.runs.RunTable`.

Read are OLMix's form (`ratios.csv`: run, name, index, a column per domain; `metrics.csv`: run,
name, index, a column per metric), RegMix's (the same with `index` alone), and Parquet of either
form; covariates come as `run, <domain>__<covariate>...`. Runs, domains and metrics are matched by
name, never by position, and brought into one order (names and run ids sorted), so that permuting
rows or columns changes no result. Every refusal names file, column, row and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.state_tables import (
    common_tokens,
    drop_constant,
    read_covariates,
)
from causalmix_pipeline.adapters.table_files import (
    Table,
    numbers,
    row_ids,
    rows_by_id,
    shared_key,
)
from causalmix_pipeline.core.belief import MINIMUM_OVERLAP_STATES
from causalmix_pipeline.core.effects import MINIMUM_RUNS, OUTLIER_LIMIT, flag_outliers
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Columns of a recommendation besides the domains.
RESULT_COLUMNS = ("pool", "baseline", "gain", "gain_lower", "gain_upper", "verdict", "cost")

#: Least and largest tolerance of a row's sum around 1. Between them it's what rounding can do: half
#: a unit of the last decimal in each domain. RegMix's shares, rounded to .001 over 17 domains, sum
#: to .996-1.003. Shares within it are divided by their sum.
ROUNDING, COARSE_ROUNDING = 0.005, 0.05

#: Share below zero that still counts as rounding.
_NEGATIVE = -1e-9


@dataclass(frozen=True, eq=False)
class ImportedRuns:
    """Runs from tables.

    Attributes:
        runs: in canonical order; outcomes are larger-is-better.
        sign_T: what an outcome is multiplied by to be in the metric's own sign: -1 for a loss.
        notes: what was left out or changed, in plain words.
        tokens_D: tokens of each domain where all runs agree on them, else None.
    """

    runs: RunTable
    sign_T: np.ndarray
    notes: tuple[str, ...]
    tokens_D: np.ndarray | None


def import_runs(
    ratios: Table,
    metrics: Table,
    covariates: Table | None = None,
    *,
    minimize: Sequence[str] = (),
    maximize: Sequence[str] = (),
) -> ImportedRuns:
    """Join the tables by run and check them.

    Runs with equal covariates are one pool state; runs with equal state and mixture are repeats.
    Runs without a row of metrics are left out, and said; a missing value is refused.

    Args:
        ratios: shares of the domains.
        metrics: what was measured of each run.
        covariates: what was known of each run's pool.
        minimize: metrics that are losses; all that aren't in `maximize` are.
        maximize: metrics where more is better.

    Raises:
        ConfigError: for directions of unknown metrics.
        EstimationError: for tables that carry no estimate; says where and what to do.
    """
    notes: list[str] = []
    key = shared_key([ratios, metrics, *([covariates] if covariates else [])])
    domains = sorted(ratios.value_columns)
    if len(domains) < 2:
        raise EstimationError(
            f"{ratios.name} must have a column of shares for at least 2 domains, got "
            f"{', '.join(domains) or 'none'}: with one domain there is nothing to mix."
        )
    taken = [name for name in domains if name in RESULT_COLUMNS]
    if taken:
        raise EstimationError(
            f"{ratios.name}: column {taken[0]!r} is also a column of the recommendations: rename "
            "the domain."
        )
    tasks = sorted(metrics.value_columns)
    if not tasks:
        raise EstimationError(f"{metrics.name} must have at least one column with a metric.")
    sign_T = _signs(tasks, minimize, maximize)
    share_of = rows_by_id(ratios, key)
    metric_of = rows_by_id(metrics, key)
    run_ids = sorted(set(share_of) & set(metric_of))
    notes += say_left_out(ratios, metrics, set(share_of), set(metric_of))
    if len(run_ids) < MINIMUM_RUNS:
        raise EstimationError(
            f"an effect needs at least {MINIMUM_RUNS} runs that are in both {ratios.name} and "
            f"{metrics.name}, got {len(run_ids)}: add runs, or give the same run the same "
            f"{key!r} in both."
        )
    rows_N = [share_of[run] for run in run_ids]
    mixture_ND = _mixtures(ratios, domains, key, rows_N, notes)
    metric_NT = numbers(metrics, tasks, key, [metric_of[run] for run in run_ids])
    _refuse_constant(metrics, tasks, metric_NT)
    names, state_NDP = (), np.empty((len(run_ids), len(domains), 0))
    if covariates is not None:
        names, state_NDP = read_covariates(covariates, domains, key, run_ids)
    tokens_D = common_tokens(names, state_NDP)
    names, state_NDP = drop_constant(domains, names, state_NDP, notes)
    constant = [d for d, ptp in zip(domains, np.ptp(mixture_ND, axis=0), strict=True) if ptp == 0]
    notes += [
        f"{ratios.name}: the share of {d!r} never varies, so its effect can't be told"
        for d in constant
    ]
    runs = table_of((domains, names, tasks), run_ids, state_NDP, mixture_ND, metric_NT * sign_T)
    if names and runs.n_states < MINIMUM_OVERLAP_STATES:
        raise EstimationError(
            f"{covariates.name if covariates else 'covariates'} must tell at least "
            f"{MINIMUM_OVERLAP_STATES} pool states apart, got {runs.n_states}: add runs of other "
            "pools, or leave the covariates out."
        )
    refuse_outliers(runs, runs, metrics, key, metric_of, sign_T)
    return ImportedRuns(runs, sign_T, tuple(notes), tokens_D)


def table_of(
    names: tuple[Sequence[str], Sequence[str], Sequence[str]],
    run_ids: Sequence[str],
    state_NDP: np.ndarray,
    mixture_ND: np.ndarray,
    outcome_NT: np.ndarray,
) -> RunTable:
    """A run table whose states and repeats are told by their values, in the order of the run ids.

    Args:
        names: of domains, covariates and tasks.
        run_ids: N of them, no two alike.
        state_NDP: covariates; equal ones to the twelfth decimal are one state, with the values of
            its first run.
        mixture_ND: shares; equal ones in one state are repeats.
        outcome_NT: larger is better.
    """
    order_N = np.argsort(np.array(run_ids, dtype=object), kind="stable")
    state_NDP, mixture_ND = state_NDP[order_N], mixture_ND[order_N]
    state_N = _cells(state_NDP.reshape(len(run_ids), -1))
    _, first, inverse = np.unique(state_N, return_index=True, return_inverse=True)
    domains, covariates, tasks = names
    return RunTable(
        domains=tuple(domains),
        covariates=tuple(covariates),
        tasks=tuple(tasks),
        run_ids=tuple(run_ids[int(i)] for i in order_N),
        state_ids=state_N,
        state_NDP=state_NDP[first][inverse.ravel()],
        mixture_ND=mixture_ND,
        outcome_NT=outcome_NT[order_N],
        repeat_of_N=_cells(np.column_stack([state_N, mixture_ND])),
    )


def _signs(tasks: Sequence[str], minimize: Sequence[str], maximize: Sequence[str]) -> np.ndarray:
    for option, names in (("minimize", minimize), ("maximize", maximize)):
        unknown = [name for name in names if name not in tasks]
        if unknown:
            raise ConfigError(
                f"{option} must name metrics of the table ({', '.join(tasks)}), got "
                f"{', '.join(unknown)}: correct the name."
            )
    both = sorted(set(minimize) & set(maximize))
    if both:
        raise ConfigError(f"minimize and maximize both name {', '.join(both)}: keep one of them.")
    if minimize and not maximize:
        return np.array([-1.0 if task in minimize else 1.0 for task in tasks])
    return np.array([1.0 if task in maximize else -1.0 for task in tasks])


def say_left_out(
    ratios: Table, metrics: Table, share_ids: set[str], metric_ids: set[str]
) -> list[str]:
    """Notes on runs that only one of the tables has."""
    notes = []
    for here, there, ids in (
        (ratios, metrics, share_ids - metric_ids),
        (metrics, ratios, metric_ids - share_ids),
    ):
        if ids:
            some = ", ".join(sorted(ids)[:3])
            notes.append(
                f"{len(ids)} runs of {here.name} aren't in {there.name} and were left out: {some}"
                + ("..." if len(ids) > 3 else "")
            )
    return notes


def _refuse_constant(metrics: Table, tasks: Sequence[str], metric_NT: np.ndarray) -> None:
    for t, task in enumerate(tasks):
        value_N = metric_NT[:, t]
        if np.ptp(value_N) <= 1e-12 * np.abs(value_N).max():
            raise EstimationError(
                f"{metrics.name}: column {task!r} must vary between runs, got {value_N[0]:g} in "
                "all "
                f"{len(value_N)}: drop the column."
            )


def refuse_outliers(
    runs: RunTable,
    known: RunTable,
    metrics: Table,
    key: str,
    row_of: dict[str, int],
    sign_T: np.ndarray,
) -> None:
    """Refuse runs with outcomes far off the known ones', which may be the same runs."""
    scored = runs if known is runs else None
    if scored is None:
        names = (*(f"known/{run}" for run in known.run_ids), *runs.run_ids)
        outcome_NT = np.concatenate([known.outcome_NT, runs.outcome_NT])
        mixture_ND = np.concatenate([known.mixture_ND, runs.mixture_ND])
        state_NDP = np.concatenate([known.state_NDP, runs.state_NDP])
        axes = (runs.domains, runs.covariates, runs.tasks)
        scored = table_of(axes, names, state_NDP, mixture_ND, outcome_NT)
    found = flag_outliers(scored).filter(pl.col("run_id").is_in(list(runs.run_ids)))
    if found.height:
        run, task, outcome, score = found.row(0)
        value = outcome * sign_T[runs.tasks.index(task)]
        raise EstimationError(
            f"{metrics.name}: column {task!r} must lie within {OUTLIER_LIMIT:g} robust standard "
            f"deviations of its median, got {value:.6g} in row {row_of[run] + 1} ({key} "
            f"{run!r}) at "
            f"{score:.3g}, one of {found.height} such values: the run diverged. Drop it."
        )


def _cells(values_NC: np.ndarray) -> np.ndarray:
    """Number of each distinct row, by its values; shape (N,)."""
    if not values_NC.shape[1]:
        return np.zeros(len(values_NC), dtype=np.int64)
    # -0 and 0 are equal; the twelfth decimal of a share divided by its sum is not the user's.
    _, cell_N = np.unique(np.round(values_NC, 12) + 0.0, axis=0, return_inverse=True)
    return cell_N.ravel()


def read_mixtures(
    ratios: Table, domains: Sequence[str], *, key: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Return ids and mixtures of a table with these domains; shape (M, D).

    Args:
        ratios: the table.
        domains: the model's.
        key: column that names the rows; None takes what names a run.

    Raises:
        EstimationError: for missing or unknown domains, or rows that aren't mixtures.
    """
    key = key or shared_key([ratios])
    missing = [domain for domain in domains if domain not in ratios.frame.columns]
    unknown = [name for name in ratios.value_columns if name not in domains]
    if missing or unknown:
        raise EstimationError(
            f"{ratios.name} must have a column for each of the model's domains "
            f"({', '.join(domains)}) and no other, but "
            + " and ".join(
                f"{what} {', '.join(map(repr, names[:5]))}"
                for what, names in (("lacks", missing), ("has unknown", unknown))
                if names
            )
            + ": rename the columns, or add a domain that isn't used with shares 0."
        )
    rows = rows_by_id(ratios, key)
    return list(rows), _mixtures(ratios, domains, key, list(rows.values()), [])


def _mixtures(
    ratios: Table, domains: Sequence[str], key: str, rows: Sequence[int], notes: list[str]
) -> np.ndarray:
    """Shares of some rows, closed where they are only rounded; shape (rows, D)."""
    share_ND = numbers(ratios, domains, key, rows)
    ids = row_ids(ratios, key)
    bad = np.argwhere(share_ND < _NEGATIVE)
    if len(bad):
        row, column = bad[0]
        raise EstimationError(
            f"{ratios.name}: column {domains[column]!r} must hold shares >= 0, got "
            f"{share_ND[row, column]:g} in row {rows[row] + 1} ({key} {ids[rows[row]]!r}): "
            "correct it."
        )
    share_ND = np.clip(share_ND, 0.0, None)
    sum_N = share_ND.sum(axis=1)
    off_N = np.abs(sum_N - 1)
    tolerance = _tolerance(share_ND)
    bad = np.flatnonzero(off_N > tolerance + 1e-9)
    if len(bad):
        row = rows[bad[0]]
        raise EstimationError(
            f"{ratios.name}: the shares of a row must sum to 1 within {tolerance:g}, got "
            f"{sum_N[bad[0]]:.6g} in row {row + 1} ({key} {ids[row]!r}; {len(bad)} such rows), "
            "over the "
            f"columns {', '.join(domains[:4])}{'...' if len(domains) > 4 else ''}: divide "
            "percent by "
            "100 or counts by their sum, and drop columns that aren't domains."
        )
    rounded = int((off_N > 1e-6).sum())
    if rounded:
        notes.append(
            f"{ratios.name}: {rounded} of {len(rows)} rows sum to "
            f"{sum_N.min():.4g}-{sum_N.max():.4g}, "
            "taken as rounding and divided by their sum"
        )
    return share_ND / sum_N[:, None]


def _tolerance(share_ND: np.ndarray) -> float:
    """How far rounding can move a row's sum, given the decimals that the shares have."""
    for decimals in range(1, 6):
        if np.abs(share_ND - np.round(share_ND, decimals)).max() < 1e-9:
            rounding = 0.5 * 10**-decimals * share_ND.shape[1]
            return min(max(rounding, ROUNDING), COARSE_ROUNDING)
    return ROUNDING
