"""The project's estimators fitted on each stage of staged runs, and what follows a stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from causalmix_pipeline.adapters.estimators import CombinedEstimator, calibration_of, fit_chosen
from causalmix_pipeline.core.effects import EffectEstimator, score_folds
from causalmix_pipeline.core.gain_calibration import GainCalibration
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stage_effects import (
    CheckpointModel,
    Make,
    StagePart,
    part_stages,
    predict_part,
)
from causalmix_pipeline.core.stage_schedule import StageModel
from causalmix_pipeline.core.stages import StagedRuns


@dataclass(frozen=True, eq=False)
class StageFits:
    """What a schedule is chosen from.

    Attributes:
        models: of each stage.
        rolls: of the checkpoint after each stage but the last.
        tasks: those that have a weight or a guard rail.
        weights_T: their weights.
    """

    models: list[StageModel]
    rolls: list[CheckpointModel]
    tasks: tuple[str, ...]
    weights_T: np.ndarray


class Remembering:
    """Makes estimators for stages; hyper-parameters are searched once a stage and set of runs."""

    def __init__(self, chosen: Mapping[str, str], seed: int) -> None:
        """Remember nothing yet; `chosen` names the estimator of each task."""
        self.chosen, self.seed = dict(chosen), seed
        self.known: dict[tuple, Mapping] = {}

    def __call__(self, stage: int, runs: RunTable) -> EffectEstimator:
        """An unfitted estimator."""
        return CombinedEstimator(self.chosen, self.seed, self.parameters(stage, runs))

    def parameters(self, stage: int, runs: RunTable) -> Mapping:
        """The hyper-parameters of a stage, searched on these runs the first time."""
        key = (stage, runs.covariates, runs.run_ids)  # without a fold's runs, nothing of theirs
        if key not in self.known:
            fitted = CombinedEstimator(self.chosen, self.seed).fit(runs)
            self.known[key] = fitted.parameters()["members"]
        return self.known[key]


def fit_stages(
    staged: StagedRuns,
    chosen: Mapping[str, str],
    weights: Mapping[str, float],
    guarded: Collection[str] = (),
    *,
    seed: int = 0,
    checkpoint: bool = True,
) -> StageFits:
    """Fit each stage's effects, the other stages' taken out, and the checkpoints' losses.

    Args:
        staged: the runs.
        chosen: name of the estimator that answers, by task.
        weights: weight of each task.
        guarded: tasks with a guard rail.
        seed: of folds and estimators.
        checkpoint: whether the effects of later stages may depend on the checkpoint; they don't
            where some losses weren't measured, and no checkpoint is predicted then.
    """
    tasks = tuple(t for t in staged.runs.tasks if weights.get(t, 0) > 0 or t in guarded)
    staged = replace(staged, runs=staged.runs.select_tasks(tasks))
    measured = not staged.unmeasured()
    checkpoint = checkpoint and measured
    make = Remembering({task: chosen[task] for task in tasks}, seed)
    parts = part_stages(staged, make, seed=seed)
    make.known.clear()  # searched while the outcomes still held the other stages' effects
    models = []
    for stage, part in enumerate(parts):
        table = staged.table(stage, part.table.outcome_NT, checkpoint=checkpoint)
        calibration = _calibration(part, table, stage, make)
        estimator = fit_chosen(table, make.chosen, seed, make.parameters(stage, table), calibration)
        models.append(StageModel(stage, table, estimator))
    return StageFits(
        models,
        [CheckpointModel.fit(staged, k, seed) for k in range(staged.n_stages - 1) if measured],
        tasks,
        np.array([float(weights.get(task, 0)) for task in tasks]),
    )


def _calibration(
    part: StagePart, table: RunTable, stage: int, make: Make
) -> dict[str, GainCalibration]:
    """How far gains hold on unseen pool states.

    With checkpoints no two runs have the same state, so standard errors are judged without them.
    """
    found = calibration_of(score_folds(part.table, part.fold_N, part.folds).frame)
    if table.covariates == part.table.covariates:
        return found
    own = predict_part(table, part.fold_N, lambda: make(stage, table))
    slopes = calibration_of(score_folds(table, own.fold_N, own.folds).frame)
    return {task: replace(slopes[task], factor=found[task].factor) for task in found}
