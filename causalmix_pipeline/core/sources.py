"""Runs from several sources in one table: names matched, ids kept apart, levels aligned.

Runs made elsewhere, with a larger proxy say, lie on another level of outcome. Only gains matter
here, so each imported source's level is estimated per task and taken off before anything is fitted:
otherwise whatever else differs between the sources, mixtures above all, would get the credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from causalmix_pipeline.core.effects import StateScaler
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import OWN, RunTable

#: Variance of one run's outcome that mixture and state don't explain, where they explain 1. On
#: synthetic pools the level of 96 confounded runs was off by .19 standard deviations (root mean
#: square; .22 with a variance of .1, .23 with 1), by .57 where sources were merely centred.
UNEXPLAINED = 0.3


@dataclass(frozen=True, eq=False)
class JoinedRuns:
    """Runs of all sources.

    Attributes:
        runs: own runs first, then each source's; outcomes on the level of the own ones.
        levels: a row per imported source and task: `source`, `task`, `runs`, `level` (what was
            taken off the outcomes, or what losses were divided by) and `of_a_loss`.
    """

    runs: RunTable
    levels: pl.DataFrame


def join_sources(own: RunTable, imported: RunTable) -> JoinedRuns:
    """Join own runs with imported ones, each source on the level of the own runs.

    The model is outcome = level of the source + what mixture and state explain + rest, with the
    levels free and all else random: linear in sqrt(share), in the covariates, and in sqrt(share)
    times the domain's own covariates. A level is its generalised least squares estimate, so that a
    source which tried other mixtures or pools keeps the difference that these make, and adding a
    constant to all outcomes of a source changes nothing. Where all outcomes of a task are losses
    (negative), it's done on their logs: a source's losses are off by a factor then, as those of
    another proxy are. Effects that differ in size between sources are left as they are.

    Args:
        own: the project's own runs.
        imported: runs of other sources, with the same domains, covariates and tasks in any order.

    Returns:
        The joined table, and the levels.

    Raises:
        EstimationError: if names differ, a source is called `own`, or a task is a loss here and
            not there.
    """
    if OWN in imported.sources:
        raise EstimationError(
            f"imported runs must have a source of another name than {OWN!r}, which are the "
            "project's: rename it in imported_runs."
        )
    joined = stack_runs([own, _in_order_of(own, imported)])
    refuse_turned_signs(own, joined)
    is_loss_T = (joined.outcome_NT < 0).all(axis=0)
    log_NT = -np.log(np.where(is_loss_T, -joined.outcome_NT, 1.0))
    value_NT = np.where(is_loss_T, log_NT, joined.outcome_NT)
    level_ST = _levels(joined, value_NT)
    of_run_N = [joined.sources.index(source) for source in joined.sources_of_runs]
    value_NT = value_NT - level_ST[of_run_N]
    outcome_NT = np.where(is_loss_T, -np.exp(-np.where(is_loss_T, value_NT, 0.0)), value_NT)
    outcome_NT[: own.n_runs] = own.outcome_NT  # to the last bit
    loss_ST = np.broadcast_to(is_loss_T, level_ST.shape)
    shown_ST = np.where(loss_ST, np.exp(-np.where(loss_ST, level_ST, 0.0)), level_ST)
    levels = pl.DataFrame(
        [
            (source, task, of_run_N.count(s), float(shown_ST[s, t]), bool(loss_ST[s, t]))
            for s, source in enumerate(joined.sources) if source != OWN
            for t, task in enumerate(joined.tasks)
        ],
        schema={"source": pl.String, "task": pl.String, "runs": pl.Int64, "level": pl.Float64,
                "of_a_loss": pl.Boolean}, orient="row",
    )  # fmt: skip
    return JoinedRuns(replace(joined, outcome_NT=outcome_NT), levels)


def stack_runs(tables: Sequence[RunTable]) -> RunTable:
    """Put tables with the same names in the same order below one another.

    States and cells of each get numbers of their own, so none is shared by two tables.
    """

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(table, name) for table in tables])

    return replace(
        tables[0],
        run_ids=tuple(run for table in tables for run in table.run_ids),
        state_ids=_apart([table.state_ids for table in tables]),
        state_NDP=joined("state_NDP"),
        mixture_ND=joined("mixture_ND"),
        outcome_NT=joined("outcome_NT"),
        repeat_of_N=_apart([table.repeat_of_N for table in tables]),
        source_N=tuple(source for table in tables for source in table.sources_of_runs),
        observational_sources=tuple(
            source for table in tables for source in table.observational_sources
        ),
    )


def _in_order_of(own: RunTable, other: RunTable) -> RunTable:
    """The other runs with names in the order of our own."""
    for name in ("domains", "covariates", "tasks"):
        ours, theirs = getattr(own, name), getattr(other, name)
        if set(ours) != set(theirs):
            raise EstimationError(
                f"imported runs must have the {name} of the project ({', '.join(ours) or 'none'}), "
                f"got {', '.join(theirs) or 'none'}: materialise imported_runs again."
            )
    domains = [other.domains.index(domain) for domain in own.domains]
    covariates = [other.covariates.index(name) for name in own.covariates]
    return replace(
        other.select_tasks(own.tasks),
        domains=own.domains,
        covariates=own.covariates,
        mixture_ND=other.mixture_ND[:, domains],
        state_NDP=other.state_NDP[:, domains][:, :, covariates],
    )


def _apart(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All numbers; those of the first table stay, each other's begin after the last."""
    numbers_N = np.asarray(parts[0])
    for part in parts[1:]:
        _, dense_N = np.unique(part, return_inverse=True)
        numbers_N = np.concatenate([numbers_N, numbers_N.max(initial=-1) + 1 + dense_N.ravel()])
    return numbers_N


def refuse_turned_signs(own: RunTable, others: RunTable) -> None:
    """Refuse losses with their sign turned: they'd count as gains.

    Raises:
        EstimationError: naming the task, the run and the value.
    """
    turned = np.argwhere((own.outcome_NT < 0).all(axis=0) & (others.outcome_NT > 0))
    if len(turned):
        run, task = turned[0]
        raise EstimationError(
            f"{others.tasks[task]} must be 0 or more in further runs, as in those before, since "
            f"less is better there, got {-others.outcome_NT[run, task]:.6g} in run "
            f"{others.run_ids[run]!r}: give the measure itself, without a turned sign."
        )


def _levels(runs: RunTable, value_NT: np.ndarray) -> np.ndarray:
    """Level of each source over that of the first, by generalised least squares; shape (S, T)."""
    design_NS = np.equal.outer(runs.sources_of_runs, runs.sources).astype(float)
    covariance_NN = _explained(runs) + UNEXPLAINED * np.eye(runs.n_runs)
    solved = np.linalg.solve(covariance_NN, np.hstack([design_NS, value_NT]))
    solved_NS, solved_NT = solved[:, : len(runs.sources)], solved[:, len(runs.sources) :]
    level_ST = np.linalg.solve(design_NS.T @ solved_NS, design_NS.T @ solved_NT)
    return level_ST - level_ST[0]


def _explained(runs: RunTable) -> np.ndarray:
    """Prior covariance of what mixture and state explain, about 1 for a run; shape (N, N)."""
    root_ND = np.sqrt(np.clip(runs.mixture_ND, 0, None))
    features = [root_ND - root_ND.mean(axis=0)]
    if runs.covariates:
        state_NDP = StateScaler.fit(runs.distinct_states()[1]).transform(runs.state_NDP)
        features += [state_NDP, state_NDP * root_ND[:, :, None]]
    total_NN = np.zeros((runs.n_runs, runs.n_runs))
    for part in features:
        flat_NC = part.reshape(runs.n_runs, -1)
        size = float((flat_NC**2).sum(axis=1).mean())
        total_NN += flat_NC @ flat_NC.T / (size * len(features) if size > 0 else 1.0)
    return total_NN
