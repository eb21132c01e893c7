"""Runs whose domains, covariates and metrics are settled: of another source, or a top-up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from causalmix_pipeline.adapters.run_tables import (
    ImportedRuns,
    read_mixtures,
    refuse_outliers,
    say_left_out,
    table_of,
)
from causalmix_pipeline.adapters.state_tables import read_states, refuse_lacking
from causalmix_pipeline.adapters.table_files import Table, numbers, rows_by_id, shared_key
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable


def read_further_runs(
    ratios: Table,
    metrics: Table,
    covariates: Table | None,
    names: tuple[Sequence[str], Sequence[str], Sequence[str]],
    sign_T: np.ndarray,
    known: RunTable | None = None,
) -> ImportedRuns:
    """Read runs whose domains, covariates and metrics are settled: of another source, or a top-up.

    Args:
        ratios: shares of exactly these domains, by name.
        metrics: exactly these metrics, by name.
        covariates: covariates of each run's pool, at least these; None where there are none.
        names: domains, covariates and metrics, whose order the table gets.
        sign_T: -1 where a metric is a loss.
        known: earlier runs, on whose scale values count as broken; None takes these runs' own.

    Raises:
        EstimationError: if a table lacks or adds a name, has a value that can't be, or no run is
            in both; says where and what to do.
    """
    domains, covariate_names, tasks = names
    wanted = covariates if covariate_names else None
    if covariate_names and covariates is None:
        raise EstimationError(
            f"{ratios.name} must come with the covariates {', '.join(covariate_names)} of each "
            "domain, got none: effects depend on the pool, so pass what was measured of each "
            "run's pool."
        )
    key = shared_key([ratios, metrics, *([wanted] if wanted else [])])
    _refuse_other_metrics(metrics, tasks)
    share_ids, mixture_MD = read_mixtures(ratios, domains, key=key)
    share_of = {run: row for row, run in enumerate(share_ids)}
    metric_of = rows_by_id(metrics, key)
    run_ids = sorted(set(share_of) & set(metric_of))
    if not run_ids:
        raise EstimationError(
            f"{ratios.name} and {metrics.name} must have runs in common, got none: give the same "
            f"run the same {key!r} in both."
        )
    metric_NT = numbers(metrics, tasks, key, [metric_of[run] for run in run_ids])
    state_NDP = np.empty((len(run_ids), len(domains), 0))
    if wanted:
        state_ids, state_SDP, _ = read_states(
            wanted, domains, covariate_names, key=key, known=known
        )
        state_of = {run: row for row, run in enumerate(state_ids)}
        refuse_lacking(wanted, key, [run for run in run_ids if run not in state_of])
        state_NDP = state_SDP[[state_of[run] for run in run_ids]]
    mixture_ND = mixture_MD[[share_of[run] for run in run_ids]]
    runs = table_of(names, run_ids, state_NDP, mixture_ND, metric_NT * sign_T)
    refuse_outliers(runs, known or runs, metrics, key, metric_of, sign_T)
    notes = say_left_out(ratios, metrics, set(share_of), set(metric_of))
    return ImportedRuns(runs, sign_T, tuple(notes), None)


def _refuse_other_metrics(metrics: Table, tasks: Sequence[str]) -> None:
    missing = [task for task in tasks if task not in metrics.frame.columns]
    unknown = [name for name in metrics.value_columns if name not in tasks]
    if missing or unknown:
        raise EstimationError(
            f"{metrics.name} must have a column for each of the metrics {', '.join(tasks)} and no "
            "other, but "
            + " and ".join(
                f"{what} {', '.join(map(repr, some[:5]))}"
                for what, some in (("lacks", missing), ("has unknown", unknown))
                if some
            )
            + ": rename or drop the columns, or measure the metric."
        )
