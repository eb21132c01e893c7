"""What is asked of an effect estimator, and how well one does on runs it hasn't seen.

An estimator is fitted on a `RunTable` and answers for a pool state it has never met: the outcome
of a mixture, and the gain of a mixture over a reference mixture with its standard error. Which one
answers is decided by `cross_validate`, whose folds never split a pool state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.gain_calibration import Z90, slope_of_gains, widening
from causalmix_pipeline.core.runs import SIZE_COVARIATE, RunTable

#: Fewest proxy runs that anything is fitted on: below it, shares and tasks can't be told apart
#: from noise (EconML itself accepts 8).
MINIMUM_RUNS = 12

#: Fewest distinct pool states for an estimator that uses covariates.
MINIMUM_STATES = 3

#: Largest distance of an outcome from the task's median, in robust standard deviations (1.4826
#: times the median absolute deviation). Real proxies stay below 10; a diverged one is far beyond.
OUTLIER_LIMIT = 50.0

#: Smallest standard deviation that counts as variation, relative to the size of the values.
RELATIVE_FLOOR = 1e-9


@dataclass(frozen=True, eq=False)
class Gain:
    """Gains of M mixtures over a reference mixture, larger is better.

    Attributes:
        mean_MT: predicted gain, in outcome units; shape (M, T).
        se_MT: standard error of the gain of the expected outcome (no seed noise); nan where the
            estimator has none; shape (M, T).
    """

    mean_MT: np.ndarray
    se_MT: np.ndarray


@runtime_checkable
class EffectEstimator(Protocol):
    """Learns from proxy runs how mixtures cause outcomes, given the pool state.

    Attributes:
        name: the estimator's name, as in a config.
        task_correlation_TT: correlation between tasks of the errors of one gain, for the standard
            error of a weighted sum of tasks; ones where unknown, which is conservative.
    """

    name: str
    task_correlation_TT: np.ndarray

    def fit(self, runs: RunTable) -> EffectEstimator:
        """Learn from runs and return itself."""
        ...

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture on a pool in this state; shape (M, T)."""
        ...

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return the gain of each mixture over the reference on a pool in this state."""
        ...

    def parameters(self) -> dict:
        """Return the fitted hyper-parameters, fit for JSON; a refit can reuse them."""
        ...


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Predictions for runs of unseen pool states, and how good they are.

    Attributes:
        name: the estimator's name.
        run_ids: the runs, in the order of the rows below; shape (N,).
        fold_N: the fold in which a run was left out; shape (N,).
        prediction_NT: expected outcome predicted while the run's state was left out; (N, T).
        frame: one row per task: `task`, `r2_within` (share of the variance within unseen states
            that is explained; outcome and prediction both centred by the state's own mean), `r2`
            (over all runs), `spearman`, `spearman_within` (of the centred values), each with `_se`
            (jackknife over states), `coverage_90` (share of observed gains over the state's first
            run inside their nominal 90% interval; null without standard errors), `interval_factor`
            (1 or more: by what standard errors must grow so that 90% are inside, of the most
            promising ones too), `n_gains`, `gain_slope` and `gain_slope_se` (see
            `core.gain_calibration`).
    """

    name: str
    run_ids: tuple[str, ...]
    fold_N: np.ndarray
    prediction_NT: np.ndarray
    frame: pl.DataFrame


def cross_validate(
    make: Callable[[], EffectEstimator], runs: RunTable, n_folds: int = 5, seed: int = 0
) -> CrossValidation:
    """Predict every run from a fit that never saw its pool state.

    A table with a single pool state (imported runs without covariates) is folded by mixture: runs
    that differ only by seed then stay together.

    Args:
        make: returns a fresh, unfitted estimator.
        runs: the proxy runs; order doesn't matter.
        n_folds: number of folds, at least 2; at most one per state is used.
        seed: decides which state goes into which fold.

    Returns:
        Out-of-fold predictions in the order of `runs`, and the table of scores.

    Raises:
        EstimationError: if there are fewer than two folds, or a fit refuses its runs.
    """
    fold_N = assign_folds(runs, n_folds, seed)
    folds = [predict_fold(make, runs, fold_N, fold) for fold in np.unique(fold_N)]
    return score_folds(runs, fold_N, folds)


@dataclass(frozen=True, eq=False)
class FoldPrediction:
    """What an estimator says of the runs it was fitted without.

    Attributes:
        name: the estimator's name.
        prediction_NT: expected outcomes; nan for runs of other folds; shape (N, T).
        gain_NT: gains over the first run of the same state; nan for that run and other folds.
        se_NT: their standard errors; nan where the estimator has none.
        noise_NT: variance of one run's outcome around its mean; nan where unknown.
        level_NT: expected outcome of the equal mixture in the run's state; nan for other folds.
    """

    name: str
    prediction_NT: np.ndarray
    gain_NT: np.ndarray
    se_NT: np.ndarray
    noise_NT: np.ndarray
    level_NT: np.ndarray


#: The arrays of a `FoldPrediction`.
FOLD_ARRAYS = ("prediction_NT", "gain_NT", "se_NT", "noise_NT", "level_NT")


def predict_fold(
    make: Callable[[], EffectEstimator], runs: RunTable, fold_N: np.ndarray, fold: int
) -> FoldPrediction:
    """Fit on the runs outside a fold, and predict those inside."""
    estimator = make().fit(runs.subset(fold_N != fold))
    noise_T = getattr(estimator, "noise_variance_T", np.full(len(runs.tasks), np.nan))
    shape = (len(FOLD_ARRAYS), *runs.outcome_NT.shape)
    prediction_NT, gain_NT, se_NT, noise_NT, level_NT = np.full(shape, np.nan)
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    for rows, state_DP in _rows_by_state(runs, fold_N == fold):
        asked_MD = np.vstack([equal_D, runs.mixture_ND[rows]])
        predicted_MT = estimator.predict(state_DP, asked_MD)
        level_NT[rows], prediction_NT[rows] = predicted_MT[0], predicted_MT[1:]
        gain = estimator.gain(state_DP, runs.mixture_ND[rows[1:]], runs.mixture_ND[rows[0]])
        gain_NT[rows[1:]], se_NT[rows[1:]] = gain.mean_MT, gain.se_MT
        noise_NT[rows] = noise_T
    return FoldPrediction(estimator.name, prediction_NT, gain_NT, se_NT, noise_NT, level_NT)


def join_folds(folds: Sequence[FoldPrediction]) -> FoldPrediction:
    """Put the predictions of all folds together."""
    parts = {}
    for name in FOLD_ARRAYS:
        first, *others = (getattr(fold, name) for fold in folds)
        parts[name] = first
        for other in others:
            parts[name] = np.where(np.isnan(parts[name]), other, parts[name])
    return FoldPrediction(folds[0].name, **parts)


def score_folds(
    runs: RunTable, fold_N: np.ndarray, folds: Sequence[FoldPrediction]
) -> CrossValidation:
    """Score the predictions of all folds; see `CrossValidation`."""
    joined = join_folds(folds)
    frame = _score_table(runs, joined, _errors(runs, fold_N, joined))
    return CrossValidation(joined.name, runs.run_ids, fold_N, joined.prediction_NT, frame)


def assign_folds(runs: RunTable, n_folds: int, seed: int) -> np.ndarray:
    """Return each run's fold, shape (N,); runs of one state share it, whatever the row order."""
    group_N = runs.groups if runs.n_groups > 1 else runs.repeat_of_N
    groups, inverse_N = np.unique(group_N, return_inverse=True)
    n_used = min(n_folds, len(groups))
    if n_used < 2:
        raise EstimationError(
            f"cross-validation needs n_folds >= 2 and as many pool states, got n_folds {n_folds} "
            f"and {len(groups)}: ask for more folds, or add proxy runs of other states."
        )
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    fold_of_group = np.empty(len(groups), dtype=np.int64)
    fold_of_group[shuffled] = np.arange(len(groups)) % n_used
    return fold_of_group[inverse_N]


def check_runs(
    runs: RunTable, *, minimum_runs: int = MINIMUM_RUNS, minimum_states: int = 1
) -> None:
    """Refuse runs that carry no estimate; what EconML and LightGBM would accept in silence.

    Args:
        runs: the proxy runs; non-finite values and mixtures off the simplex are refused by
            `RunTable` itself.
        minimum_runs: fewest runs.
        minimum_states: fewest distinct pool states; `MINIMUM_STATES` where covariates are used.

    Raises:
        EstimationError: if there are too few runs or states, if the mixture or an outcome never
            varies, or if an outcome lies so far off that its proxy must have diverged.
    """
    if runs.n_runs < minimum_runs:
        raise EstimationError(
            f"an effect needs at least {minimum_runs} proxy runs, got {runs.n_runs}: raise the "
            "number of runs in the design."
        )
    if runs.n_states < minimum_states:
        raise EstimationError(
            f"an effect of the pool state needs at least {minimum_states} pool states, got "
            f"{runs.n_states}: add runs of other states, or use response_surface_blind or regmix."
        )
    if np.ptp(runs.mixture_ND, axis=0).max() < RELATIVE_FLOOR:
        raise EstimationError(
            "the mixture must vary between proxy runs, but all "
            f"{runs.n_runs} have {np.round(runs.mixture_ND[0], 4).tolist()}: train other mixtures."
        )
    outliers = flag_outliers(runs)
    if outliers.height:
        run_id, task, value, score = outliers.row(0)
        raise EstimationError(
            f"outcome {task} of run {run_id} must lie within {OUTLIER_LIMIT:g} robust standard "
            f"deviations of the task's median, got {value:.6g} at {score:.3g} ({outliers.height} "
            "such values): the proxy diverged. Leave out the runs that flag_outliers lists, or "
            "train them again."
        )


def flag_outliers(runs: RunTable, limit: float = OUTLIER_LIMIT) -> pl.DataFrame:
    """List outcomes too far from their task's median to be a trained proxy's.

    Args:
        runs: the proxy runs.
        limit: largest distance in robust standard deviations. Where more than half of the
            outcomes are equal, the median non-zero distance stands for the deviation. Proxies of
            each size have a median of their own.

    Returns:
        Columns `run_id`, `task`, `value`, `robust_z`, worst first; no row if all is well.
    """
    rows = []
    for t, task in enumerate(runs.tasks):
        distance_N = np.abs(runs.outcome_NT[:, t] - _usual_N(runs, t))
        spread = np.median(distance_N)
        if spread == 0 and distance_N.any():
            spread = np.median(distance_N[distance_N > 0])
        score_N = distance_N / (1.4826 * spread) if spread > 0 else distance_N
        for i in np.flatnonzero(score_N > limit):
            rows.append((runs.run_ids[i], task, float(runs.outcome_NT[i, t]), float(score_N[i])))
    schema = {"run_id": pl.String, "task": pl.String, "value": pl.Float64, "robust_z": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("robust_z", descending=True)


def _usual_N(runs: RunTable, t: int) -> np.ndarray:
    """The task's median outcome among runs of the same size; shape (N,)."""
    size_N = np.zeros(runs.n_runs) if runs.size_N is None else runs.size_N
    _, kind_N = np.unique(size_N, return_inverse=True)
    median_K = [np.median(runs.outcome_NT[kind_N == k, t]) for k in range(kind_N.max() + 1)]
    return np.array(median_K)[kind_N]


def permute_states(runs: RunTable, rng: np.random.Generator) -> RunTable:
    """Give each pool state the covariates of another: a placebo in which the state can't matter."""
    ids, state_SDP = runs.distinct_states()
    order_S = rng.permutation(len(ids))
    state_NDP = state_SDP[order_S][np.searchsorted(ids, runs.state_ids)]
    if runs.size_N is not None:  # the size of the model is none of the pool's
        state_NDP[:, :, runs.covariates.index(SIZE_COVARIATE)] = runs.size_N[:, None]
    return replace(runs, state_NDP=state_NDP)


def permute_mixtures(runs: RunTable, rng: np.random.Generator) -> RunTable:
    """Shuffle the mixtures among the runs of each state: a placebo without any effect."""
    order_N = np.arange(runs.n_runs)
    for state in np.unique(runs.state_ids):
        rows = np.flatnonzero(runs.state_ids == state)
        order_N[rows] = rng.permutation(rows)
    return replace(runs, mixture_ND=runs.mixture_ND[order_N], repeat_of_N=runs.repeat_of_N[order_N])


def has_contrasts(runs: RunTable) -> bool:
    """Whether enough runs differ in mixture within a pool state to judge an estimator by them.

    A few repeated or paired runs aren't: a quarter of the runs, and 8, must have such a partner.
    """
    n_contrasts = len(np.unique(runs.repeat_of_N)) - runs.n_groups
    return runs.n_groups > 1 and n_contrasts >= max(8, runs.n_runs // 4)


def center_by_state(values_NT: np.ndarray, state_ids: np.ndarray) -> np.ndarray:
    """Return the values minus the mean of their own state; shape (N, T)."""
    _, inverse_N, count_S = np.unique(state_ids, return_inverse=True, return_counts=True)
    sum_ST = np.zeros((len(count_S), values_NT.shape[1]))
    np.add.at(sum_ST, inverse_N, values_NT)
    return values_NT - (sum_ST / count_S[:, None])[inverse_N]


@dataclass(frozen=True, eq=False)
class StateScaler:
    """Puts covariates on the scale of the distinct states of the runs.

    A covariate that never varies among them is dropped: it becomes 0 whatever its value, since
    the runs can't tell what it does.

    Attributes:
        mean_DP: mean over distinct states; shape (D, P).
        scale_DP: standard deviation over distinct states, 1 where dropped; shape (D, P).
        kept_DP: whether the covariate varies; shape (D, P).
    """

    mean_DP: np.ndarray
    scale_DP: np.ndarray
    kept_DP: np.ndarray

    @classmethod
    def fit(cls, state_SDP: np.ndarray) -> StateScaler:
        """Learn the scale from distinct states, shape (S, D, P)."""
        mean_DP, deviation_DP = state_SDP.mean(axis=0), state_SDP.std(axis=0)
        kept_DP = deviation_DP > RELATIVE_FLOOR * (1 + np.abs(mean_DP))
        return cls(mean_DP, np.where(kept_DP, deviation_DP, 1.0), kept_DP)

    def transform(self, state: np.ndarray) -> np.ndarray:
        """Return standard deviations from the mean, shape (..., D, P); 0 where dropped."""
        return np.where(self.kept_DP, (state - self.mean_DP) / self.scale_DP, 0.0)

    def dropped(self, runs: RunTable) -> tuple[str, ...]:
        """Return the names `<domain>__<covariate>` of what was dropped."""
        kept = self.kept_DP.ravel()
        return tuple(
            name for name, keep in zip(runs.covariate_columns, kept, strict=True) if not keep
        )


def spearman(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Return the rank correlation, ties sharing their mean rank; nan if either never varies."""
    from scipy.stats import rankdata

    first, second = (rank - rank.mean() for rank in (rankdata(first_N), rankdata(second_N)))
    size = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / size) if size > 0 else float("nan")


def jackknife_se(statistic: Callable[[np.ndarray], float], state_ids: np.ndarray) -> float:
    """Return the standard error of a statistic of rows when whole states are the sampled unit.

    Args:
        statistic: takes the positions of the rows kept.
        state_ids: the state of each row; shape (N,).

    Returns:
        The delete-one-state jackknife standard error; nan with fewer than three states.
    """
    states = np.unique(state_ids)
    if len(states) < 3:
        return float("nan")
    left_out = np.array([statistic(np.flatnonzero(state_ids != state)) for state in states])
    return float(np.sqrt((len(states) - 1) * np.mean((left_out - left_out.mean()) ** 2)))


def r_squared(observed_N: np.ndarray, predicted_N: np.ndarray, center: float = 0.0) -> float:
    """Return 1 - squared error over squared distance from `center`; nan if nothing varies."""
    total = float(np.sum((observed_N - center) ** 2))
    floor = (RELATIVE_FLOOR * (1 + abs(center))) ** 2 * max(len(observed_N), 1)
    if total <= floor:
        return float("nan")
    return 1.0 - float(np.sum((observed_N - predicted_N) ** 2)) / total


def _rows_by_state(runs: RunTable, mask_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    rows_of = [np.flatnonzero(mask_N & (runs.state_ids == s)) for s in np.unique(runs.state_ids)]
    by_run = [rows[np.argsort([runs.run_ids[i] for i in rows])] for rows in rows_of if len(rows)]
    return [(rows, runs.state_NDP[rows[0]]) for rows in by_run]


def _errors(runs: RunTable, fold_N: np.ndarray, joined: FoldPrediction) -> tuple[np.ndarray, ...]:
    """Errors of gains over the state's first run, and what they are judged by.

    Returns:
        Distance of the observed gain from the predicted, variance of the expected gain, variance
        of the two runs' seed noise, predicted gain over the equal mixture of the better of the
        two; shapes (N, T), nan where there is no gain or no error.
    """
    error_NT, promise_NT = np.full((2, *runs.outcome_NT.shape), np.nan)
    over_NT = joined.prediction_NT - joined.level_NT
    for fold in np.unique(fold_N):
        for rows, _ in _rows_by_state(runs, fold_N == fold):
            rise_MT = runs.outcome_NT[rows[1:]] - runs.outcome_NT[rows[0]]
            error_NT[rows[1:]] = rise_MT - joined.gain_NT[rows[1:]]
            promise_NT[rows[1:]] = np.maximum(over_NT[rows[1:]], over_NT[rows[0]])
    return np.abs(error_NT), joined.se_NT**2, 2 * joined.noise_NT, promise_NT


def _score_table(
    runs: RunTable,
    joined: FoldPrediction,
    errors_NT: tuple[np.ndarray, ...],
) -> pl.DataFrame:
    observed_NT, prediction_NT = runs.outcome_NT, joined.prediction_NT
    within_states = has_contrasts(runs)
    within_NT = center_by_state(observed_NT, runs.groups)
    predicted_within_NT = center_by_state(prediction_NT, runs.groups)
    rows = []
    for t, task in enumerate(runs.tasks):
        y, f = observed_NT[:, t], prediction_NT[:, t]
        yw, fw = within_NT[:, t], predicted_within_NT[:, t]
        parts_KM = np.stack([part_NT[:, t] for part_NT in errors_NT])
        error_M, variance_M, noise_M, promise_M = parts_KM[:, np.isfinite(parts_KM).all(axis=0)]
        statistics: dict[str, Callable[[np.ndarray], float]] = {
            "r2_within": lambda i, yw=yw, fw=fw: r_squared(yw[i], fw[i]),
            "r2": lambda i, y=y, f=f: r_squared(y[i], f[i], float(y[i].mean())),
            "spearman": lambda i, y=y, f=f: spearman(y[i], f[i]),
            "spearman_within": lambda i, yw=yw, fw=fw: spearman(yw[i], fw[i]),
        }
        row: dict[str, object] = {"task": task}
        for name, statistic in statistics.items():
            row[name] = statistic(np.arange(runs.n_runs))
            row[f"{name}_se"] = jackknife_se(statistic, runs.groups)
        known, half_M = len(error_M) > 0, Z90 * np.sqrt(variance_M + noise_M)
        row["coverage_90"] = float((error_M <= half_M).mean()) if known else None
        row["interval_factor"] = (
            widening(error_M, variance_M, noise_M, promise_M) if known else None
        )
        row["n_gains"] = len(error_M)
        row["gain_slope"], row["gain_slope_se"] = slope_of_gains(
            y, f, joined.level_NT[:, t], runs, within_states=within_states
        )
        rows.append(row)
    return pl.DataFrame(
        rows, schema_overrides={"coverage_90": pl.Float64, "interval_factor": pl.Float64}
    )
