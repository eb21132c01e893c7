"""Effects and recommendations from a table of runs: frames in, frames out; no Dagster, no proxies.

    model = fit(ratios, metrics, covariates)
    predict(model, ratios, covariates)
    recommend(model, pools)

Gains are weighted means over metrics in the metrics' own units, so metrics should have like units.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import (
    ESTIMATOR_NAMES,
    CombinedEstimator,
    choose_estimator,
    fit_chosen,
)
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.run_tables import (
    ROUNDING,
    import_runs,
    open_table,
    read_mixtures,
    read_states,
    shared_key,
)
from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value, write_value
from causalmix_pipeline.core.belief import confounding, noise_floor, overlap
from causalmix_pipeline.core.effects import MINIMUM_RUNS, Z90, assign_folds
from causalmix_pipeline.core.errors import ConfigError, EstimationError, PoolError
from causalmix_pipeline.core.mixture import dirichlet_design, project_to_box
from causalmix_pipeline.core.policy import POLICIES, Constraints, weighted_gain
from causalmix_pipeline.core.policy import recommend as apply_policy
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.work import InProcess

#: What `auto` chooses from. The first has standard errors, which the stack borrows.
AUTO_WITH_STATE = (
    "response_surface",
    "response_surface_blind",
    "structured_ridge",
    "lightgbm_state",
    "regmix",
    "extra_trees",
    "log_linear",
    "stack",
)
AUTO_BLIND = ("response_surface_blind", "regmix", "extra_trees", "log_linear", "stack")

#: Standard errors taken off the gain before `optimum` maximises it.
CONFIDENCE_Z = 1.0

#: Part of the trust radius that is left where a pool is only nearly within reach.
EXTRAPOLATING_RADIUS = 0.5

#: Candidates of the search for the optimum; mixtures carried on, steps tried from each (or one per
#: domain, if there are more), rounds; and how many of the best are compared by a stack's stepwise
#: members too.
N_CANDIDATES, N_STARTS, N_STEPS, N_ROUNDS, N_FINAL = 384, 8, 8, 10, 48

#: Folds of whole pool states, as `choose_estimator` makes them.
N_FOLDS = 5

#: Runs up to which processes take longer to start than the fits.
FEW_RUNS = 96

#: Version of what `Model.save` writes.
FORMAT = 1

#: A frame or a CSV or Parquet file.
TableSource = pl.DataFrame | Path | str


@dataclass(frozen=True, eq=False)
class Model:
    """What `fit` learned, and what it learned it from.

    Attributes:
        runs: the runs in canonical order; outcomes are larger-is-better.
        sign_T: -1 where a metric is a loss.
        weights_T: weight of each metric in the gain; sums to 1.
        seed: of folds, fits and searches.
        chosen: the estimator that answers, per metric.
        parameters: its hyper-parameters, by estimator.
        interval_factors: what standard errors are multiplied by, per metric.
        scores: a row per estimator and metric, of runs of unseen states.
        out_of_fold_NT: what the chosen estimator predicts of each run left out; outcomes.
        tokens_D: tokens of the domains, where all runs have the same.
        notes: what was left out or changed in the tables.
    """

    runs: RunTable
    sign_T: np.ndarray
    weights_T: np.ndarray
    seed: int
    chosen: dict[str, str]
    parameters: dict[str, dict]
    interval_factors: dict[str, float]
    scores: pl.DataFrame
    out_of_fold_NT: np.ndarray
    tokens_D: np.ndarray | None
    notes: tuple[str, ...]

    @cached_property
    def estimator(self) -> CombinedEstimator:
        """The chosen estimators, conditioned on all runs without a new search."""
        return fit_chosen(self.runs, self.chosen, self.seed, self.parameters, self.interval_factors)

    @cached_property
    def weighted(self) -> tuple[CombinedEstimator, np.ndarray]:
        """The estimators of the metrics that count, and their weights."""
        counted = [t for t, w in zip(self.runs.tasks, self.weights_T, strict=True) if w > 0]
        if len(counted) == len(self.runs.tasks):
            return self.estimator, self.weights_T
        fitted = fit_chosen(
            self.runs.select_tasks(counted),
            {task: self.chosen[task] for task in counted},
            self.seed,
            self.parameters,
            {task: self.interval_factors[task] for task in counted},
        )
        return fitted, self.weights_T[self.weights_T > 0]

    def save(self, folder: Path | str) -> None:
        """Write the model as tables and JSON; no code is stored, and `load` fits again."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        out_of_fold = pl.DataFrame(self.out_of_fold_NT, schema=list(self.runs.tasks))
        frames = {"runs": self.runs.to_frame(), "scores": self.scores, "out_of_fold": out_of_fold}
        for name, frame in frames.items():
            write_value(folder / f"{name}.parquet", frame)
        value = {
            "format": FORMAT,
            "digests": {name: content_digest(frame) for name, frame in frames.items()},
            "sign": self.sign_T.tolist(),
            "weights": self.weights_T.tolist(),
            "seed": self.seed,
            "chosen": self.chosen,
            "parameters": self.parameters,
            "interval_factors": self.interval_factors,
            "tokens": None if self.tokens_D is None else self.tokens_D.tolist(),
            "notes": list(self.notes),
        }
        value["digest"] = content_digest(value)
        from causalmix_pipeline.adapters.blobs import write_atomically

        text = json.dumps(value, indent=1, ensure_ascii=False)
        write_atomically(folder / "model.json", text.encode())

    @classmethod
    def load(cls, folder: Path | str) -> "Model":
        """Read what `save` wrote.

        Raises:
            ConfigError: if the folder holds no model, or one of another format.
            EstimationError: if a file was damaged or changed.
        """
        folder = Path(folder)
        path = folder / "model.json"
        if not path.is_file():
            raise ConfigError(
                f"--model must be a folder that `causalmix fit` wrote, got {folder}, which has no "
                "model.json: fit first."
            )
        damaged = f"{folder} was damaged or changed by hand; fit again"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            digest = value.pop("digest")
        except (ValueError, KeyError, AttributeError) as error:
            raise EstimationError(f"{path} can't be read ({error}): {damaged}.") from error
        if value.get("format") != FORMAT:
            raise ConfigError(
                f"{path} must have format {FORMAT}, got {value.get('format')}: fit again."
            )
        if content_digest(value) != digest:
            raise EstimationError(f"{path} isn't what was written: {damaged}.")
        frames = {}
        for name, expected in value["digests"].items():
            try:
                frames[name] = read_value(folder / f"{name}.parquet")
            except (PoolError, FileNotFoundError) as error:
                raise EstimationError(
                    f"{folder / name}.parquet can't be read: {damaged}."
                ) from error
            if content_digest(frames[name]) != expected:
                raise EstimationError(f"{folder / name}.parquet is of another fit: {damaged}.")
        return cls(
            runs=RunTable.from_frame(frames["runs"]),
            sign_T=np.array(value["sign"]),
            weights_T=np.array(value["weights"]),
            seed=value["seed"],
            chosen=value["chosen"],
            parameters=value["parameters"],
            interval_factors=value["interval_factors"],
            scores=frames["scores"],
            out_of_fold_NT=frames["out_of_fold"].to_numpy(),
            tokens_D=None if value["tokens"] is None else np.array(value["tokens"]),
            notes=tuple(value["notes"]),
        )

    def observational_r2(self) -> float | None:
        """How well the covariates tell the mixture, out of fold; None without covariates."""
        return confounding(self.runs, seed=self.seed).r2 if self.runs.covariates else None

    def noise(self) -> pl.DataFrame:
        """What mixtures do against what seeds do; see `core.belief.noise_floor`."""
        return noise_floor(self.runs)


# ---------------------------------------------------------------------------- fit


def fit(
    ratios: TableSource,
    metrics: TableSource,
    covariates: TableSource | None = None,
    *,
    minimize: Sequence[str] | None = None,
    maximize: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    estimator: str = "auto",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Learn from a table of runs what mixtures do.

    Args:
        ratios: a row per run: `run` and a share for each domain.
        metrics: a row per run: `run` and a value for each metric; a missing value is refused.
        covariates: a row per run: `run` and `<domain>__<covariate>`; without, all pools are alike.
        minimize: metrics that are losses; alone, the others are scores.
        maximize: metrics where more is better; all others are losses.
        weights: of metrics in the gain, scaled to sum 1; one that isn't named counts 0. None counts
            all alike.
        estimator: a name, or `auto`, which chooses per metric by cross-validation in which no pool
            state is split.
        seed: of folds, fits and searches.
        on_progress: called with the number of fits done and of all.

    Raises:
        ConfigError: for an option that names no metric or estimator.
        EstimationError: for tables that carry no estimate; says where and what to do.
    """
    imported = import_runs(
        open_table(ratios, "ratios"),
        open_table(metrics, "metrics"),
        None if covariates is None else open_table(covariates, "covariates"),
        minimize=minimize or (),
        maximize=maximize or (),
    )
    runs = imported.runs
    _check_folds(runs, seed)
    weights_T = _weights(runs.tasks, weights)
    names = _candidates(estimator, runs)
    choice = choose_estimator(
        runs,
        names,
        N_FOLDS,
        seed,
        backend=LocalWorkers() if runs.n_runs > FEW_RUNS else InProcess(),
        search_all=True,
        needs_interval=True,
        on_progress=on_progress,
    )
    chosen = choice.chosen
    if estimator != "auto":
        chosen = {task: estimator for task in runs.tasks}
    scores = choice.frame.with_columns(
        chosen=pl.col("estimator") == pl.col("task").replace_strict(chosen)
    )
    factors = dict(
        scores.filter("chosen").select("task", pl.col("interval_factor").fill_null(1.0)).iter_rows()
    )
    fitted = fit_chosen(runs, chosen, seed, choice.parameters, factors)
    model = Model(
        runs=runs,
        sign_T=imported.sign_T,
        weights_T=weights_T,
        seed=seed,
        chosen=chosen,
        parameters=fitted.parameters()["members"],
        interval_factors=factors,
        scores=scores,
        out_of_fold_NT=np.column_stack(
            [choice.validations[chosen[t]].prediction_NT[:, i] for i, t in enumerate(runs.tasks)]
        ),
        tokens_D=imported.tokens_D,
        notes=imported.notes,
    )
    model.__dict__["estimator"] = fitted
    return model


def _check_folds(runs: RunTable, seed: int) -> None:
    """Refuse tables from which too few runs are left to fit on when a fold is left out."""
    fold_N = assign_folds(runs, N_FOLDS, seed)
    least = runs.n_runs - int(np.bincount(fold_N).max())
    if least < MINIMUM_RUNS:
        raise EstimationError(
            f"the tables have {runs.n_runs} runs; without the largest fold of whole pool states "
            f"only {least} are left to fit on, and {MINIMUM_RUNS} are needed: add runs."
        )


def _candidates(estimator: str, runs: RunTable) -> tuple[str, ...]:
    auto = AUTO_WITH_STATE if runs.covariates else AUTO_BLIND
    if estimator in ("auto", "stack"):
        return auto
    if estimator not in ESTIMATOR_NAMES:
        raise ConfigError(
            f"estimator must be auto or one of {', '.join(ESTIMATOR_NAMES)}, got {estimator!r}."
        )
    return (estimator,)


def _weights(tasks: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray:
    if not weights:
        return np.full(len(tasks), 1 / len(tasks))
    unknown = [name for name in weights if name not in tasks]
    if unknown:
        raise ConfigError(
            f"weights must name metrics of the table ({', '.join(tasks)}), got "
            f"{', '.join(unknown)}: correct the name."
        )
    weights_T = np.array([float(weights.get(task, 0.0)) for task in tasks])
    if not (np.isfinite(weights_T) & (weights_T >= 0)).all() or not weights_T.any():
        raise ConfigError(
            f"weights must be numbers >= 0, one of them above 0, got {dict(weights)}: name a "
            "metric "
            "in maximize where more is better."
        )
    return weights_T / weights_T.sum()


# ---------------------------------------------------------------------------- predict


def predict(
    model: Model, ratios: TableSource, covariates: TableSource | None = None
) -> pl.DataFrame:
    """Predict each metric of each row, in the metric's own units and sign.

    Args:
        model: from `fit` or `Model.load`.
        ratios: `run` and a share for each of the model's domains.
        covariates: `run` and `<domain>__<covariate>`; needed if the model was fitted with some.

    Returns:
        `run` and a column per metric, in the order of `ratios`.

    Raises:
        EstimationError: if tables lack or add domains, runs or covariates.
    """
    runs = model.runs
    table = open_table(ratios, "ratios")
    known = open_table(covariates, "covariates") if covariates is not None else None
    key = shared_key([table] if known is None or not runs.covariates else [table, known])
    ids, mixture_MD = read_mixtures(table, runs.domains, key=key)
    state_MDP = np.empty((len(ids), len(runs.domains), 0))
    if runs.covariates:
        if known is None:
            raise EstimationError(
                "the model was fitted with covariates "
                f"({', '.join(runs.covariates)} of each domain), so predictions need them, got "
                "none: "
                "pass the covariates of these runs."
            )
        state_ids, state_SDP, _ = read_states(known, runs.domains, runs.covariates, key=key)
        row_of = {name: row for row, name in enumerate(state_ids)}
        lacking = [name for name in ids if name not in row_of]
        if lacking:
            raise EstimationError(
                f"{known.name} must have a row for every run of {table.name}, but lacks "
                f"{lacking[0]!r} ({len(lacking)} such runs): add it."
            )
        state_MDP = state_SDP[[row_of[name] for name in ids]]
    outcome_MT = np.empty((len(ids), len(runs.tasks)))
    flat_MC = state_MDP.reshape(len(ids), -1)
    _, group_M = np.unique(flat_MC, axis=0, return_inverse=True) if flat_MC.size else (
        None, np.zeros(len(ids), dtype=int))  # fmt: skip
    for group in np.unique(group_M):
        rows = np.flatnonzero(group_M.ravel() == group)
        outcome_MT[rows] = model.estimator.predict(state_MDP[rows[0]], mixture_MD[rows])
    values_MT = outcome_MT * model.sign_T
    columns = {task: values_MT[:, t] for t, task in enumerate(runs.tasks)}
    return pl.DataFrame({"run": ids, **columns})


# ---------------------------------------------------------------------------- recommend


def recommend(
    model: Model,
    pools: TableSource | None = None,
    *,
    policy: str = "optimum",
    reference: str | Path | Mapping[str, float] = "equal",
    constraints: Path | str | Mapping[str, Any] | None = None,
) -> pl.DataFrame:
    """Recommend a mixture for each pool.

    Args:
        model: from `fit` or `Model.load`.
        pools: `pool`, `<domain>__<covariate>` and perhaps `<domain>__tokens`. Not needed where the
            model was fitted without covariates.
        policy: `optimum`, or the paper's `search`, which is slower.
        reference: what gains are measured from: `equal`, `natural` (token shares), a file, or
            shares by domain. A file is YAML or JSON with a share for each domain, or a CSV with a
            column for each and one row.
        constraints: YAML file or mapping with any of `least_share`, `most_share` (a number, or one
            by domain), `frozen` (shares by domain), `trust_radius` (nats), `budget_tokens`,
            `max_epochs`.

    Returns:
        A row per pool: `pool`, a share for each domain, `gain`, `gain_lower`, `gain_upper` (a 90%
        interval; null where none can be told), `verdict`. An `unsupported` pool gets the reference,
        or the nearest mixture that is allowed, and no gain; for an `extrapolating` one half the
        trust radius is left.

    Raises:
        ConfigError: for options that can't be met.
        EstimationError: for pools without the model's covariates.
    """
    if policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    domains = model.runs.domains
    names, state_MDP, tokens_MD = _pools(model, pools)
    rules = _read_mapping(constraints, "constraints", CONSTRAINT_NAMES)
    wanted = _Wanted(model, policy, [
        _constraints(rules, domains, reference_D, None if tokens_MD is None else tokens_MD[m])
        for m, reference_D in enumerate(_references(reference, domains, names, tokens_MD))
    ])  # fmt: skip
    # Made once, before the threads ask for them.
    _ = model.weighted, _candidates_of(len(domains), model.seed)
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        rows = list(threads.map(wanted.row, range(len(names)), state_MDP))
    schema = {"pool": pl.String, **dict.fromkeys(domains, pl.Float64), "gain": pl.Float64,
              "gain_lower": pl.Float64, "gain_upper": pl.Float64, "verdict": pl.String}  # fmt: skip
    return pl.DataFrame(
        [(name, *row) for name, row in zip(names, rows, strict=True)], schema=schema, orient="row"
    )


#: Keys of a constraints file.
CONSTRAINT_NAMES = (
    "least_share",
    "most_share",
    "frozen",
    "trust_radius",
    "budget_tokens",
    "max_epochs",
)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """A recommendation for each pool, given what each must keep to."""

    model: Model
    policy: str
    constraints: list[Constraints]

    def row(self, index: int, state_DP: np.ndarray) -> tuple:
        """Shares, gain, its bounds and the verdict."""
        runs, constraints = self.model.runs, self.constraints[index]
        verdict = "supported"
        if runs.covariates:
            verdict = overlap(state_DP, runs.distinct_states()[1]).verdict
        if verdict == "unsupported":
            lower_D, upper_D = constraints.box(runs.domains)
            kept_D = project_to_box(constraints.reference_D, lower_D, upper_D)
            moved = bool(np.abs(kept_D - constraints.reference_D).max() > 1e-9)
            mixture_D = kept_D if moved else constraints.reference_D
            return (*mixture_D.tolist(), None if moved else 0.0, None, None, verdict)
        if verdict == "extrapolating" and constraints.trust_radius is not None:
            radius = constraints.trust_radius * EXTRAPOLATING_RADIUS
            constraints = replace(constraints, trust_radius=radius)
        mixture_D, gain, se = best_mixture(self.model, state_DP, constraints, self.policy)
        bounds = (gain - Z90 * se, gain + Z90 * se) if math.isfinite(se) else (None, None)
        return (*mixture_D.tolist(), gain, *bounds, verdict)


@dataclass(frozen=True, eq=False)
class _Smooth:
    """The part of an estimator that a search can ask often."""

    whole: CombinedEstimator

    @property
    def task_correlation_TT(self) -> np.ndarray:
        return self.whole.task_correlation_TT

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray):
        return self.whole.smooth_gain(state_DP, mixture_MD, reference_D)


def best_mixture(
    model: Model, state_DP: np.ndarray, constraints: Constraints, policy: str = "optimum"
) -> tuple[np.ndarray, float, float]:
    """The mixture, its weighted gain over the reference, and the gain's standard error.

    `optimum` follows `core.policy` with fewer candidates: 100 pools take seconds. A stack's
    stepwise members are asked about the last candidates only: their steps mislead a search, and
    cost most.
    """
    estimator, weights_T = model.weighted
    domains, reference_D = model.runs.domains, constraints.reference_D
    if policy != "optimum":
        found = apply_policy(
            policy, estimator, state_DP, weights_T, constraints, domains=domains, seed=model.seed
        )
        return found.mixture_D, found.gain, found.gain_se
    smooth: Any = _Smooth(estimator)
    start_MD = constraints.project(reference_D[None], domains)
    if np.isnan(smooth.gain(state_DP, start_MD, reference_D).mean_MT).any():
        smooth = estimator

    def score(asked: Any, mixture_MD: np.ndarray) -> np.ndarray:
        mean_M, se_M = weighted_gain(asked, state_DP, mixture_MD, reference_D, weights_T)
        return mean_M - CONFIDENCE_Z * np.nan_to_num(se_M)

    mixture_MD = constraints.project(
        np.vstack([start_MD, _spread(reference_D, model.seed)]), domains
    )
    value_M = score(smooth, mixture_MD)
    rng = np.random.default_rng([model.seed, 1])
    step = 0.1
    for _ in range(N_ROUNDS):
        best = np.argsort(-value_M, kind="stable")[:N_STARTS]
        n_steps = max(N_STEPS, len(domains))
        noise = rng.normal(scale=step, size=(N_STARTS, n_steps, len(domains)))
        moved = (mixture_MD[best][:, None] + noise[: len(best)]).reshape(-1, len(domains))
        moved = constraints.project(moved, domains)
        mixture_MD = np.vstack([mixture_MD, moved])
        value_M = np.concatenate([value_M, score(smooth, moved)])
        step *= 0.6
    best = np.argsort(-value_M, kind="stable")[:N_FINAL]
    # The start stays in the race: a stack that sees no gain anywhere keeps the reference.
    last_MD = np.vstack([mixture_MD[best], mixture_MD[:1]])
    winner_D = last_MD[int(np.argmax(score(estimator, last_MD)))]
    gain_M, se_M = weighted_gain(estimator, state_DP, winner_D[None], reference_D, weights_T)
    return winner_D, float(gain_M[0]), float(se_M[0])


@lru_cache(maxsize=4)
def _candidates_of(n_domains: int, seed: int) -> np.ndarray:
    return dirichlet_design(N_CANDIDATES, n_domains, strength_range=(0.3, 3.0), seed=seed)


def _spread(reference_D: np.ndarray, seed: int) -> np.ndarray:
    """Candidates all over the simplex, every second one pulled towards the reference."""
    candidates = _candidates_of(len(reference_D), seed).copy()
    pull = np.linspace(0.1, 0.9, N_CANDIDATES // 2)[:, None]
    candidates[::2] = pull * candidates[::2] + (1 - pull) * reference_D
    return candidates


def _pools(
    model: Model, pools: TableSource | None
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Names, covariates (M, D, P) and tokens (M, D) of the pools."""
    runs = model.runs
    own = None if model.tokens_D is None else model.tokens_D[None]
    if pools is None:
        if runs.covariates:
            raise EstimationError(
                f"the model was fitted with covariates ({', '.join(runs.covariates)} of each "
                "domain), so a recommendation needs those of the pool, got none: pass pools."
            )
        return ["all"], np.empty((1, len(runs.domains), 0)), own
    table = open_table(pools, "pools")
    names, state_MDP, tokens_MD = read_states(table, runs.domains, runs.covariates, key="pool")
    if tokens_MD is None and own is not None:
        tokens_MD = np.repeat(own, len(names), axis=0)
    return names, state_MDP, tokens_MD


def _references(
    reference: str | Path | Mapping[str, float],
    domains: Sequence[str],
    names: Sequence[str],
    tokens_MD: np.ndarray | None,
) -> np.ndarray:
    """The reference mixture of each pool; shape (M, D)."""
    if isinstance(reference, str) and reference == "equal":
        return np.full((len(names), len(domains)), 1 / len(domains))
    if isinstance(reference, str) and reference == "natural":
        if tokens_MD is None:
            raise ConfigError(
                "reference natural needs the tokens of each domain, got none: add columns "
                "<domain>__tokens to the pools, or take another reference."
            )
        return tokens_MD / tokens_MD.sum(axis=1, keepdims=True)
    if not isinstance(reference, Mapping) and not Path(reference).is_file():
        raise ConfigError(
            f"reference must be equal, natural or a file, got {reference}: no such file."
        )
    if not isinstance(reference, Mapping) and Path(reference).suffix.lower() in (
        ".csv",
        ".parquet",
    ):
        table = open_table(reference, "reference")
        key = pl.Series("run", [f"row {i + 1}" for i in range(table.frame.height)])
        frame = table.frame.select(c for c in table.value_columns if c != "pool")
        _, mixture_MD = read_mixtures(replace(table, frame=frame.with_columns(key)), domains)
        if len(mixture_MD) != 1:
            raise ConfigError(f"{table.name} must have one row, got {len(mixture_MD)}: keep one.")
        return np.repeat(mixture_MD, len(names), axis=0)
    shares = _read_mapping(reference, "reference", domains)
    mixture_D = np.array([_number(shares.get(d, 0.0), f"reference: {d}") for d in domains])
    if mixture_D.min() < 0 or abs(mixture_D.sum() - 1) > ROUNDING:
        raise ConfigError(
            f"reference must be shares >= 0 that sum to 1 within {ROUNDING:g}, got "
            f"{mixture_D.tolist()} with sum {mixture_D.sum():.6g}: divide each by the sum."
        )
    return np.repeat((mixture_D / mixture_D.sum())[None], len(names), axis=0)


def _constraints(
    rules: Mapping[str, Any],
    domains: Sequence[str],
    reference_D: np.ndarray,
    tokens_D: np.ndarray | None,
) -> Constraints:
    lower_D = _by_domain(rules, "least_share", 0.0, domains)
    upper_D = _by_domain(rules, "most_share", 1.0, domains)
    frozen = _read_mapping(rules.get("frozen"), "constraints: frozen", domains)
    for domain, share in frozen.items():
        d = list(domains).index(domain)
        lower_D[d] = upper_D[d] = _number(share, f"constraints: frozen: {domain}", most=1.0)
    if tokens_D is not None:  # a domain without text can't be trained on
        upper_D = np.where(np.asarray(tokens_D) > 0, upper_D, 0.0)
    budget = rules.get("budget_tokens")
    if budget is not None and not _number(budget, "constraints: budget_tokens") > 0:
        raise ConfigError(f"constraints: budget_tokens must be above 0, got {budget!r}.")
    if budget is not None and tokens_D is None:
        raise ConfigError(
            "constraints: budget_tokens needs the tokens of each domain, got none: add columns "
            "<domain>__tokens to the pools, or drop budget_tokens."
        )
    radius = rules.get("trust_radius")
    kept = Constraints(
        reference_D,
        lower_D,
        upper_D,
        trust_radius=None if radius is None else _number(radius, "constraints: trust_radius"),
        budget_tokens=None if budget is None else _number(budget, "constraints: budget_tokens"),
        available_D=tokens_D,
        max_epochs=_number(rules.get("max_epochs", 4.0), "constraints: max_epochs"),
    )
    kept.box(domains)  # refuses what no mixture can meet
    return kept


def _by_domain(
    rules: Mapping[str, Any], name: str, default: float, domains: Sequence[str]
) -> np.ndarray:
    given = rules.get(name)
    if given is None:
        return np.full(len(domains), default)
    field = f"constraints: {name}"
    if not isinstance(given, Mapping):
        return np.full(len(domains), _number(given, field, most=1.0))
    given = _read_mapping(given, field, domains)
    return np.array([_number(given.get(d, default), f"{field}: {d}", most=1.0) for d in domains])


def _read_mapping(
    source: Path | str | Mapping[str, Any] | None, field: str, names: Sequence[str]
) -> dict[str, Any]:
    """A mapping, or the one in a YAML or JSON file, with no other keys than `names`."""
    if source is None:
        return {}
    value: Any = source
    if isinstance(source, str | Path):
        import yaml

        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"{field} must be a YAML file, got {path}: no such file.")
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{field}: {path} can't be read as YAML: {error}") from error
        field = f"{field} ({path.name})"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field} must be names with values, got {value!r}.")
    unknown = [str(name) for name in value if name not in names]
    if unknown:
        raise ConfigError(
            f"{field} must name only {', '.join(names)}, got {', '.join(unknown)}: correct the "
            "name."
        )
    return dict(value)


def _number(value: Any, field: str, most: float = math.inf) -> float:
    if isinstance(value, str):  # YAML reads 1e9 as text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        limit = f" and {most:g}" if math.isfinite(most) else " and finite"
        raise ConfigError(f"{field} must be a number between 0{limit}, got {value!r}.")
    if not math.isfinite(value):
        raise ConfigError(f"{field} must be a finite number, got {value!r}.")
    return float(value)
