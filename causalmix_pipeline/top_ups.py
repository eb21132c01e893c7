"""A few further runs at pools that are out of reach, and the model conditioned on them.

    plan = plan_top_up(model, pools)         # train these, measure them
    model = condition(model, ratios, metrics, covariates)

A pool out of reach has no run near its state; a handful there tell more than hundreds elsewhere.
Estimators and hyper-parameters stay those of the fit: the further runs are conditioned on, which
takes seconds.
"""

import hashlib
from dataclasses import replace

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import fit_chosen
from causalmix_pipeline.adapters.further_runs import read_further_runs
from causalmix_pipeline.adapters.run_tables import table_of
from causalmix_pipeline.adapters.state_tables import read_states
from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.core.belief import TOP_UP_RUNS, reach_of
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.mixture import dirichlet_design
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.sources import refuse_turned_signs
from causalmix_pipeline.core.top_up import TOP_UP
from causalmix_pipeline.table_model import Model, TableSource


def plan_top_up(
    model: Model, pools: TableSource, n_runs: int = TOP_UP_RUNS, seed: int | None = None
) -> pl.DataFrame:
    """Mixtures to train at each pool that isn't supported, spread by the design's own rule.

    Args:
        model: from `fit` or `Model.load`.
        pools: `pool`, `<domain>__<covariate>` and perhaps `<domain>__tokens`.
        n_runs: runs for each such pool, at least 1.
        seed: of the mixtures; None takes the model's.

    Returns:
        Columns `pool`, `run` and a share for each domain; `run` is new to the model, and a later
        plan for the same pool goes on where this one ends. No row if all pools are supported.

    Raises:
        ConfigError: if `n_runs` is below 1, or the model has no covariates.
        EstimationError: for pools without the model's covariates.
    """
    runs = model.runs
    if n_runs < 1:
        raise ConfigError(f"runs must be at least 1, got {n_runs}: {TOP_UP_RUNS} are usual.")
    if not runs.covariates:
        raise ConfigError(
            "a top-up needs a model with covariates, got one without: all pools are alike to it, "
            "so add runs of any pool and fit again."
        )
    table = open_table(pools, "pools")
    names, state_MDP, tokens_MD = read_states(
        table, runs.domains, runs.covariates, key="pool", known=runs
    )
    rows: list[tuple] = []
    for m, pool in enumerate(names):
        if reach_of(runs, state_MDP[m]).pool_verdict != "supported":
            tokens_D = None if tokens_MD is None else tokens_MD[m]
            rows += _planned(model, pool, n_runs, tokens_D, seed)
    domains = dict.fromkeys(runs.domains, pl.Float64)
    schema = {"pool": pl.String, "run": pl.String, **domains}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _planned(
    model: Model,
    pool: str,
    n_runs: int,
    tokens_D: np.ndarray | None,
    seed: int | None,
) -> list[tuple]:
    """Rows for one pool, after those that the model already has of it."""
    before = [r.removeprefix(f"{TOP_UP}/{pool}/") for r in model.runs.run_ids]
    start = 1 + max((int(number) for number in before if number.isdecimal()), default=-1)
    key = f"{model.seed if seed is None else seed}/{pool}"
    own_seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    mixture_ND = dirichlet_design(
        start + n_runs,
        len(model.runs.domains),
        strength_range=DesignPlan().strength_range,
        seed=own_seed,
    )[start:]
    if tokens_D is not None:  # a domain without text can't be trained on
        mixture_ND = np.where(tokens_D > 0, mixture_ND, 0.0)
        mixture_ND = mixture_ND / mixture_ND.sum(axis=1, keepdims=True)
    return [
        (pool, f"{TOP_UP}/{pool}/{start + i:03d}", *mixture_D.tolist())
        for i, mixture_D in enumerate(mixture_ND)
    ]


def condition(
    model: Model,
    ratios: TableSource,
    metrics: TableSource,
    covariates: TableSource | None = None,
) -> Model:
    """The model conditioned on further runs; estimators and hyper-parameters stay.

    Args:
        model: from `fit` or `Model.load`; it isn't changed.
        ratios: `run` and a share for each of the model's domains; a plan's column `pool` is left
            aside.
        metrics: `run` and the model's metrics, in the same units and signs.
        covariates: `run` and `<domain>__<covariate>` of the pool each run was trained on; needed
            where the model has some. Runs with equal covariates are of one state.

    Returns:
        A model that answers, saves and loads like any. Its scores are still those of the fit; what
        it holds as out-of-fold predictions of the further runs is what the model said of them
        before it had seen them.

    Raises:
        EstimationError: if tables lack or add a name, a run isn't new, or a value can't be; says
            where and what to do.
    """
    runs = model.runs
    table = open_table(ratios, "ratios")
    table = replace(table, frame=table.frame.drop("pool", strict=False))
    found = read_further_runs(
        table,
        open_table(metrics, "metrics"),
        None if covariates is None else open_table(covariates, "covariates"),
        (runs.domains, runs.covariates, runs.tasks),
        model.sign_T,
        known=runs,
    )
    new = found.runs
    _refuse_known(runs, new, table.name)
    everything = table_of(
        (runs.domains, runs.covariates, runs.tasks),
        (*runs.run_ids, *new.run_ids),
        np.concatenate([runs.state_NDP, new.state_NDP]),
        np.concatenate([runs.mixture_ND, new.mixture_ND]),
        np.concatenate([runs.outcome_NT, new.outcome_NT]),
    )
    out_of_fold_NT = np.concatenate([model.out_of_fold_NT, _predicted(model, new)])
    row_of = {run: row for row, run in enumerate((*runs.run_ids, *new.run_ids))}
    note = (
        f"conditioned on {new.n_runs} further runs of {new.n_states} pool states; estimators and "
        "scores are those of the fit"
    )
    conditioned = replace(
        model,
        runs=replace(everything, observational_sources=runs.observational_sources),
        out_of_fold_NT=out_of_fold_NT[[row_of[run] for run in everything.run_ids]],
        notes=(*model.notes, *found.notes, note),
    )
    # Fitted now, so that runs that no estimator can take are refused before anything is saved.
    conditioned.__dict__["estimator"] = fit_chosen(
        conditioned.runs, model.chosen, model.seed, model.parameters, model.calibration
    )
    return conditioned


def _refuse_known(runs: RunTable, new: RunTable, table: str) -> None:
    known = sorted(set(runs.run_ids) & set(new.run_ids))
    if known:
        raise EstimationError(
            f"{table} must name runs that the model hasn't seen, got run {known[0]!r} "
            f"({len(known)} such runs): drop them, or name new runs otherwise."
        )
    refuse_turned_signs(runs, new)


def _predicted(model: Model, new: RunTable) -> np.ndarray:
    """What the model says of runs that it hasn't seen; outcomes, shape (N, T)."""
    outcome_NT = np.empty_like(new.outcome_NT)
    for state in np.unique(new.state_ids):
        rows = np.flatnonzero(new.state_ids == state)
        state_DP, mixture_MD = new.state_NDP[rows[0]], new.mixture_ND[rows]
        outcome_NT[rows] = model.estimator.predict(state_DP, mixture_MD)
    return outcome_NT
