"""Estimators by name, the choice between them per task, and the one that combines the choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.econml_forest import COORDINATES, CausalForest
from causalmix_pipeline.adapters.extra_trees import ExtraTrees
from causalmix_pipeline.adapters.gp_surface import ResponseSurface
from causalmix_pipeline.adapters.lightgbm_surface import LightGBMSurface
from causalmix_pipeline.adapters.log_linear import LogLinear
from causalmix_pipeline.adapters.stacked_estimator import (
    StackedEstimator,
    fit_member,
    stack_folds,
    stack_weights,
)
from causalmix_pipeline.adapters.structured_ridge import StructuredRidge
from causalmix_pipeline.core.effects import (
    CrossValidation,
    EffectEstimator,
    FoldPrediction,
    Gain,
    assign_folds,
    has_contrasts,
    join_folds,
    predict_fold,
    score_folds,
)
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.gain_calibration import GainCalibration, calibrated
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.work import InProcess, WorkBackend

#: Every estimator's name, as a config writes it.
ESTIMATOR_NAMES = (
    "response_surface",
    "response_surface_blind",
    "structured_ridge",
    "causal_forest",
    "causal_forest_log",
    "causal_forest_raw",
    "causal_forest_ilr",
    "regmix",
    "lightgbm_state",
    "extra_trees",
    "log_linear",
    "stack",
)

#: Estimators whose fit searches hyper-parameters for seconds, and keeps them by task.
SEARCHED = ("response_surface", "response_surface_blind", "log_linear")


def make_estimator(name: str, seed: int = 0) -> EffectEstimator:
    """Return a fresh, unfitted estimator.

    Args:
        name: one of `ESTIMATOR_NAMES`.
        seed: of whatever it draws; RegMix's trees use no random number.

    Raises:
        ConfigError: if the name is unknown.
    """
    if name == "response_surface":
        return ResponseSurface(seed=seed)
    if name == "response_surface_blind":
        return ResponseSurface(blind=True, seed=seed)
    if name == "structured_ridge":
        return StructuredRidge()
    for coordinates, forest in COORDINATES.items():
        if name == forest:
            return CausalForest(coordinates=coordinates, seed=seed)
    if name in ("regmix", "lightgbm_state"):
        return LightGBMSurface(with_state=name == "lightgbm_state", seed=seed)
    if name == "extra_trees":
        return ExtraTrees(seed=seed)
    if name == "log_linear":
        return LogLinear()
    if name == "stack":
        return StackedEstimator(lambda member: make_estimator(member, seed), seed=seed)
    raise ConfigError(
        f"estimator must be one of {', '.join(ESTIMATOR_NAMES)}, got {name!r}: choose one of them."
    )


@dataclass(frozen=True, eq=False)
class EstimatorChoice:
    """Which estimator answers for which task, and the scores that decided it.

    Attributes:
        chosen: name of the estimator per task.
        frame: one row per estimator and task: `estimator`, the columns of `CrossValidation.frame`,
            and `chosen`.
        validations: the out-of-fold predictions per estimator.
        parameters: what `fit_chosen` can reuse, by estimator: the weights of a stack and, where
            they were asked for, hyper-parameters searched on all runs.
    """

    chosen: dict[str, str]
    frame: pl.DataFrame
    validations: dict[str, CrossValidation]
    parameters: dict[str, dict] = field(default_factory=dict)

    @property
    def calibration(self) -> dict[str, GainCalibration]:
        """What each task's gains are corrected by; see `core.gain_calibration`."""
        return calibration_of(self.frame.filter("chosen"))


def calibration_of(scores: pl.DataFrame) -> dict[str, GainCalibration]:
    """What the scores of the estimators that answer say of their gains, by task."""
    names = ["task", "interval_factor", "gain_slope", "gain_slope_se"]
    rows = scores.select(names).with_columns(pl.col("interval_factor").fill_null(1.0)).iter_rows()
    return {task: GainCalibration(*parts) for task, *parts in rows}


def choose_estimator(
    runs: RunTable,
    names: Sequence[str] = ESTIMATOR_NAMES,
    n_folds: int = 5,
    seed: int = 0,
    *,
    backend: WorkBackend | None = None,
    search_all: bool = False,
    needs_interval: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> EstimatorChoice:
    """Choose per task by R2 within unseen pool states, from the runs alone.

    Where few runs have a partner in their state, `r2` over all runs decides. Equal scores go to
    the name that comes first, and so do tasks that no estimator predicts better than their mean.
    A `stack` is made of all the others that are named, and costs no further fit.

    Args:
        runs: the proxy runs.
        names: estimators to compare; those that need covariates fail on runs without.
        n_folds: folds of whole states.
        seed: of the folds and the estimators.
        backend: where the fits are made; None makes them here.
        search_all: whether to search hyper-parameters on all runs too, for `parameters`.
        needs_interval: whether only estimators with standard errors may answer, if one has some.
        on_progress: called with the number of fits done and of all.

    Raises:
        ConfigError: if `names` is empty or has an unknown name.
        EstimationError: if an estimator refuses the runs.
    """
    if not names:
        raise ConfigError(
            f"estimators must name at least one of {', '.join(ESTIMATOR_NAMES)}, got none: add one."
        )
    names = tuple(dict.fromkeys(names))
    members = tuple(name for name in names if name != "stack") or names
    fold_N = assign_folds(runs, n_folds, seed)
    folds_of, parameters = _fit_all(
        runs, members, fold_N, seed, backend or InProcess(), search_all, on_progress
    )
    if "stack" in names and members != names:
        kept = {name: parameters[name] for name in members if name in parameters}
        folds_of["stack"] = [stack_folds(runs, fold_N, folds_of)]
        whole = {name: score_folds(runs, fold_N, folds_of[name]) for name in members}
        weights = stack_weights(runs, {name: v.prediction_NT for name, v in whole.items()})
        parameters["stack"] = {"weights": weights, "members": kept}
    validations = {name: score_folds(runs, fold_N, folds_of[name]) for name in names}
    chosen, within = {}, has_contrasts(runs)
    for t, task in enumerate(runs.tasks):
        scores = np.array([_score(validations[name], t, within=within) for name in names])
        known = np.array(
            [np.isfinite(join_folds(folds_of[name]).noise_NT[:, t]).any() for name in names]
        )
        if needs_interval and known.any():
            scores = np.where(known, scores, -np.inf)
        # What predicts no better than the mean is no reason to leave the first name.
        chosen[task] = names[int(np.argmax(scores))] if scores.max() > 0 else names[0]
    frame = pl.concat(
        validation.frame.select(
            pl.lit(name).alias("estimator"),
            pl.all(),
            (pl.col("task").replace_strict(chosen) == name).alias("chosen"),
        )
        for name, validation in validations.items()
    )
    return EstimatorChoice(chosen, frame, validations, parameters)


#: Stands for a fit on all runs, of which the hyper-parameters are kept.
_WHOLE = -1


@dataclass(frozen=True, eq=False)
class _Fit:
    """One fit for the choice: an estimator, and the fold that's left out."""

    name: str
    seed: int
    runs: RunTable
    fold_N: np.ndarray
    fold: int


def _fit_one(fit: _Fit) -> FoldPrediction | dict:
    """Predict the fold, or search hyper-parameters on all runs."""

    def make() -> EffectEstimator:
        return make_estimator(fit.name, fit.seed)

    if fit.fold == _WHOLE:
        return make().fit(fit.runs).parameters()
    return predict_fold(make, fit.runs, fit.fold_N, fit.fold)


def _fit_all(
    runs: RunTable,
    names: Sequence[str],
    fold_N: np.ndarray,
    seed: int,
    backend: WorkBackend,
    search_all: bool,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, list[FoldPrediction]], dict[str, dict]]:
    """Out-of-fold predictions, and hyper-parameters of a search on all runs."""
    folds = [int(fold) for fold in np.unique(fold_N)]
    fits = [
        _Fit(name, seed, runs, fold_N, fold)
        for name in names
        for fold in [*([_WHOLE] if search_all and name in SEARCHED else []), *folds]
    ]
    results: dict[int, FoldPrediction | dict] = {}

    def on_done(index: int, result: FoldPrediction | dict) -> None:
        results[index] = result
        if on_progress is not None:
            on_progress(len(results), len(fits))

    backend.run(_fit_one, fits, on_done)
    folds_of: dict[str, list[FoldPrediction]] = {name: [] for name in names}
    parameters: dict[str, dict] = {}
    for index, fit in enumerate(fits):
        result = results[index]
        if isinstance(result, dict):
            parameters[fit.name] = result
        else:
            folds_of[fit.name].append(result)
    return folds_of, parameters


def fit_chosen(
    runs: RunTable,
    chosen: Mapping[str, str],
    seed: int = 0,
    parameters: Mapping[str, Mapping] | None = None,
    calibration: Mapping[str, GainCalibration] | None = None,
) -> CombinedEstimator:
    """Fit each task's chosen estimator on all runs.

    Args:
        runs: the proxy runs.
        chosen: estimator name per task; every task of the runs, no other.
        seed: of the estimators.
        parameters: `parameters()["members"]` of an earlier fit on these runs; an estimator that
            can reuse its own isn't searched again.
        calibration: what to correct each task's gains by; nothing where there is none.

    Raises:
        EstimationError: if a task has no choice, or a choice has no task.
    """
    if set(chosen) != set(runs.tasks):
        raise EstimationError(
            f"the choice must name exactly the tasks {', '.join(runs.tasks)}, got "
            f"{', '.join(chosen) or 'none'}: choose again on these runs."
        )
    return CombinedEstimator(chosen, seed, parameters, calibration).fit(runs)


class CombinedEstimator:
    """One estimator per task behind the same interface.

    Errors of tasks that different estimators answer for count as fully correlated.
    """

    name = "combined"

    def __init__(
        self,
        chosen: Mapping[str, str],
        seed: int = 0,
        parameters: Mapping[str, Mapping] | None = None,
        calibration: Mapping[str, GainCalibration] | None = None,
    ):
        """Set up unfitted estimators; `chosen` gives the name per task."""
        self.chosen = dict(chosen)
        self.seed = seed
        self._known = dict(parameters or {})
        self._calibration_of = dict(calibration or {})
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable) -> CombinedEstimator:
        """Fit each estimator on the tasks that chose it."""
        n_tasks = len(runs.tasks)
        self._calibration = [self._calibration_of.get(t, GainCalibration()) for t in runs.tasks]
        self._equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
        self._members: list[tuple[list[int], EffectEstimator]] = []
        self.task_correlation_TT = np.ones((n_tasks, n_tasks))
        self.noise_variance_T = np.full(n_tasks, np.nan)
        self.needs_trust_region = False
        self.name = "+".join(dict.fromkeys(self.chosen.values()))
        for name in dict.fromkeys(self.chosen.values()):
            columns = [t for t, task in enumerate(runs.tasks) if self.chosen[task] == name]
            tasks = [runs.tasks[t] for t in columns]
            member = make_estimator(name, self.seed)
            fit_member(member, runs.select_tasks(tasks), self._known.get(name))
            self.task_correlation_TT[np.ix_(columns, columns)] = member.task_correlation_TT
            self.noise_variance_T[columns] = getattr(member, "noise_variance_T", np.nan)
            self.needs_trust_region |= getattr(member, "needs_trust_region", False)
            self._members.append((columns, member))
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture; shape (M, T)."""
        return self._gather([m.predict(state_DP, mixture_MD) for _, m in self._members])

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return each task's gain by its own estimator, corrected."""
        asks = [member.gain for _, member in self._members]
        return self._calibrated(asks, state_DP, mixture_MD, reference_D)

    def smooth_gain(
        self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray
    ) -> Gain:
        """Return gains without the stepwise members of a stack: quicker, for a search."""
        asks = [
            member.smooth_gain if isinstance(member, StackedEstimator) else member.gain
            for _, member in self._members
        ]
        return self._calibrated(asks, state_DP, mixture_MD, reference_D)

    @property
    def forest(self) -> CausalForest | None:
        """The causal forest, where it answers for every task; policies may ask for its effects."""
        members = [member for _, member in self._members]
        return members[0] if len(members) == 1 and isinstance(members[0], CausalForest) else None

    def _calibrated(
        self, asks: list, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray
    ) -> Gain:
        gains = [ask(state_DP, mixture_MD, reference_D) for ask in asks]
        mean_MT = self._gather([gain.mean_MT for gain in gains])
        se_MT = self._gather([gain.se_MT for gain in gains])
        above_T = np.zeros(mean_MT.shape[1])
        if np.abs(reference_D - self._equal_D).max() > 1e-12:
            over_equal = [ask(state_DP, reference_D[None], self._equal_D).mean_MT for ask in asks]
            above_T = self._gather(over_equal)[0]
        mean_MT, se_MT = calibrated(mean_MT, se_MT, above_T, self._calibration)
        # Rounding would make a gain of nothing, with an interval that excludes 0.
        same_M1 = np.abs(np.atleast_2d(mixture_MD) - reference_D).max(axis=1, keepdims=True) < 1e-12
        unknown_MT = np.where(np.isnan(se_MT), np.nan, 0.0)
        return Gain(np.where(same_M1, 0.0, mean_MT), np.where(same_M1, unknown_MT, se_MT))

    def parameters(self) -> dict:
        """Return the choice and each member's own parameters."""
        return {
            "chosen": self.chosen,
            "members": {member.name: member.parameters() for _, member in self._members},
        }

    def _gather(self, parts: list[np.ndarray]) -> np.ndarray:
        order = np.argsort([t for columns, _ in self._members for t in columns])
        return np.hstack(parts)[:, order]


def _score(validation: CrossValidation, t: int, *, within: bool) -> float:
    row = validation.frame.row(t, named=True)
    score = row["r2_within"] if within and not np.isnan(row["r2_within"]) else row["r2"]
    return -np.inf if np.isnan(score) else score
