"""A model learned from a table of runs: how it's fitted, saved and asked for predictions."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import (
    ESTIMATOR_NAMES,
    CombinedEstimator,
    calibration_of,
    choose_estimator,
    fit_chosen,
)
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.run_tables import import_runs, read_mixtures
from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value, write_value
from causalmix_pipeline.adapters.state_tables import read_states
from causalmix_pipeline.adapters.table_files import open_table, shared_key
from causalmix_pipeline.core.belief import confounding, noise_floor
from causalmix_pipeline.core.effects import MINIMUM_RUNS, assign_folds
from causalmix_pipeline.core.errors import ConfigError, EstimationError, PoolError
from causalmix_pipeline.core.gain_calibration import GainCalibration, read_calibration
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

#: Folds of whole pool states, as `choose_estimator` makes them.
N_FOLDS = 5

#: Runs of which as many as a fit needs are left when a fold of equal size is left out.
LEAST_RUNS = -(-MINIMUM_RUNS * N_FOLDS // (N_FOLDS - 1))

#: Runs up to which processes take longer to start than the fits.
FEW_RUNS = 96

#: Version of what `Model.save` writes.
FORMAT = 3

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
        calibration: what gains are corrected by, per metric.
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
    calibration: dict[str, GainCalibration]
    scores: pl.DataFrame
    out_of_fold_NT: np.ndarray
    tokens_D: np.ndarray | None
    notes: tuple[str, ...]

    @cached_property
    def estimator(self) -> CombinedEstimator:
        """The chosen estimators, conditioned on all runs without a new search."""
        return fit_chosen(self.runs, self.chosen, self.seed, self.parameters, self.calibration)

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
            self.calibration,
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
            "calibration": {task: one.to_dict() for task, one in self.calibration.items()},
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
            calibration=read_calibration(value["calibration"]),
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
    calibration = calibration_of(scores.filter("chosen"))
    fitted = fit_chosen(runs, chosen, seed, choice.parameters, calibration)
    model = Model(
        runs=runs,
        sign_T=imported.sign_T,
        weights_T=weights_T,
        seed=seed,
        chosen=chosen,
        parameters=fitted.parameters()["members"],
        calibration=calibration,
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
            f"the tables have {runs.n_runs} runs; without the largest fold of whole "
            f"{'pool states' if runs.covariates else 'mixtures'} only {least} are left to fit on, "
            f"and {MINIMUM_RUNS} are needed: add runs, {LEAST_RUNS} in all at the least."
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
