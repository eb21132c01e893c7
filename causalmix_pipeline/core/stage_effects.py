"""Effects of each stage's mixture, and the checkpoint that the stages before it leave.

The outcome is taken as a sum: what the pool gives, and what each stage's mixture gains over the
equal one. Stages are drawn independently, so each one's part can be learned from its own mixtures
once the others' are taken out (backfitting), by out-of-fold predictions so that no run's noise is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import (
    EffectEstimator,
    FoldPrediction,
    StateScaler,
    assign_folds,
    join_folds,
    predict_fold,
)
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stages import StagedRuns

#: Rounds of backfitting; stages drawn independently need no third one.
SWEEPS = 2

#: Penalties tried for the next checkpoint's losses, per run.
_ROLL_PENALTIES = tuple(10.0 ** np.arange(-4, 1.1, 0.5))

#: Returns an unfitted estimator for a stage, counted from 0, to be fitted on runs like these.
Make = Callable[[int, RunTable], EffectEstimator]


@dataclass(frozen=True, eq=False)
class StagePart:
    """A stage's mixtures, and the outcomes without what the other stages do.

    Attributes:
        table: to fit the stage's effects on.
        fold_N: the fold in which each run was left out.
        folds: what was predicted of the runs of each fold.
    """

    table: RunTable
    fold_N: np.ndarray
    folds: list[FoldPrediction]


def part_stages(
    staged: StagedRuns, make: Make, *, n_folds: int = 5, seed: int = 0
) -> list[StagePart]:
    """Take the other stages' effects out of the outcomes, for each stage.

    Args:
        staged: the runs.
        make: an estimator for each stage.
        n_folds: folds of whole pool states.
        seed: of the folds.
    """
    fold_N = assign_folds(staged.runs, n_folds, seed)
    gains = [np.zeros_like(staged.runs.outcome_NT) for _ in range(staged.n_stages)]
    parts: list[StagePart] = []
    for _ in range(SWEEPS):
        parts = []
        for stage in range(staged.n_stages):
            others = sum(gain for k, gain in enumerate(gains) if k != stage)
            table = staged.table(stage, staged.runs.outcome_NT - others)
            part = predict_part(table, fold_N, lambda own=stage, t=table: make(own, t))
            joined = join_folds(part.folds)
            gains[stage] = joined.prediction_NT - joined.level_NT
            parts.append(part)
    return parts


def predict_part(
    table: RunTable, fold_N: np.ndarray, make: Callable[[], EffectEstimator]
) -> StagePart:
    """Predict each run of a stage's table by a fit without its pool state."""
    folds = [predict_fold(make, table, fold_N, fold) for fold in np.unique(fold_N)]
    return StagePart(table, fold_N, folds)


def predict_staged(
    staged: StagedRuns,
    make: Make,
    *,
    checkpoint: bool = False,
    n_folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Outcomes predicted of runs whose pool state nothing has seen, backfitting included; (N, T).

    Args:
        staged: the runs.
        make: an estimator for each stage.
        checkpoint: whether the checkpoint is among the covariates of later stages.
        n_folds: folds of whole pool states.
        seed: of the folds.
    """
    runs, fold_N = staged.runs, assign_folds(staged.runs, n_folds, seed)
    predicted_NT = np.zeros_like(runs.outcome_NT)
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    for fold in np.unique(fold_N):
        inside, seen = np.flatnonzero(fold_N == fold), staged.subset(fold_N != fold)
        parts = part_stages(seen, make, n_folds=n_folds, seed=seed)
        for stage, part in enumerate(parts):
            own = seen.table(stage, part.table.outcome_NT, checkpoint=checkpoint)
            estimator = make(stage, own).fit(own)
            asked = staged.table(stage, checkpoint=checkpoint)
            for n in inside:
                mixtures_MD = np.stack([equal_D, asked.mixture_ND[n]])
                level_T, at_T = estimator.predict(asked.state_NDP[n], mixtures_MD)
                predicted_NT[n] += at_T - (1 - 1 / staged.n_stages) * level_T
    return predicted_NT


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """The losses of the next checkpoint: a ridge on the pool, the losses before and the mixture.

    Attributes:
        stage: the stage that leads there, counted from 0.
        r2: share of the variance that it explains of left-out pool states.
    """

    stage: int
    r2: float
    _scaler: StateScaler
    _mean_F: np.ndarray
    _scale_F: np.ndarray
    _next_mean_D: np.ndarray
    _coefficient_FD: np.ndarray

    @classmethod
    def fit(cls, staged: StagedRuns, stage: int, seed: int = 0) -> CheckpointModel:
        """Learn from the runs; the penalty is chosen by the error on left-out pool states."""
        runs = staged.runs
        scaler = StateScaler.fit(runs.distinct_states()[1])
        loss_ND = staged.loss_NSD[:, stage] if stage else None
        inputs_NF = _inputs(scaler.transform(runs.state_NDP), staged.mixture_NSD[:, stage], loss_ND)
        mean_F, scale_F = inputs_NF.mean(0), inputs_NF.std(0)
        scaled_NF = (inputs_NF - mean_F) / np.where(scale_F > 0, scale_F, 1.0)
        next_ND = staged.loss_NSD[:, stage + 1]
        fold_N = assign_folds(runs, 5, seed)
        errors = [_fold_error(scaled_NF, next_ND, fold_N, penalty) for penalty in _ROLL_PENALTIES]
        coefficient_FD = _ridge(scaled_NF, next_ND, _ROLL_PENALTIES[int(np.argmin(errors))])
        total = float(((next_ND - next_ND.mean(0)) ** 2).sum())
        r2 = 1 - min(errors) / total if total > 0 else float("nan")
        return cls(stage, r2, scaler, mean_F, scale_F, next_ND.mean(0), coefficient_FD)

    def predict(
        self, state_DP: np.ndarray, mixture_D: np.ndarray, loss_D: np.ndarray | None
    ) -> np.ndarray:
        """Losses (D,) after the stage, of a pool, the stage's mixture and the losses before it."""
        loss_ND = None if self.stage == 0 or loss_D is None else loss_D[None]
        inputs_F = _inputs(self._scaler.transform(state_DP)[None], mixture_D[None], loss_ND)[0]
        scaled_F = (inputs_F - self._mean_F) / np.where(self._scale_F > 0, self._scale_F, 1.0)
        return self._next_mean_D + scaled_F @ self._coefficient_FD


def _inputs(
    scaled_NDP: np.ndarray, mixture_ND: np.ndarray, loss_ND: np.ndarray | None
) -> np.ndarray:
    columns = [np.sqrt(np.clip(mixture_ND, 0, None)), scaled_NDP.reshape(len(mixture_ND), -1)]
    return np.hstack(columns if loss_ND is None else [*columns, loss_ND])


def _ridge(scaled_NF: np.ndarray, target_ND: np.ndarray, penalty: float) -> np.ndarray:
    """Coefficients of centred inputs, shape (F, D)."""
    gram_FF = scaled_NF.T @ scaled_NF + penalty * len(scaled_NF) * np.eye(scaled_NF.shape[1])
    return np.linalg.solve(gram_FF, scaled_NF.T @ (target_ND - target_ND.mean(0)))


def _fold_error(
    scaled_NF: np.ndarray, target_ND: np.ndarray, fold_N: np.ndarray, penalty: float
) -> float:
    """Squared error on left-out folds."""
    error = 0.0
    for fold in np.unique(fold_N):
        seen, inside = fold_N != fold, fold_N == fold
        middle_F = scaled_NF[seen].mean(0)
        coefficient_FD = _ridge(scaled_NF[seen] - middle_F, target_ND[seen], penalty)
        predicted = target_ND[seen].mean(0) + (scaled_NF[inside] - middle_F) @ coefficient_FD
        error += float(((target_ND[inside] - predicted) ** 2).sum())
    return error
