"""The estimator that a policy asks: of the tasks that count, and no others.

A search asks for thousands of gains, so tasks without weight and guard rail are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.adapters.estimators import fit_chosen
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.gain_calibration import GainCalibration
from causalmix_pipeline.core.runs import RunTable


@dataclass(frozen=True, eq=False)
class Asked:
    """An estimator fitted on some of the tasks.

    Attributes:
        estimator: fitted on them.
        tasks: their names, in the estimator's order.
        weights_T: their weights; 0 for one that only has a guard rail.
    """

    estimator: EffectEstimator
    tasks: tuple[str, ...]
    weights_T: np.ndarray


def fit_asked(
    runs: RunTable,
    chosen: Mapping[str, str],
    weights: Mapping[str, float],
    guarded: Collection[str] = (),
    *,
    seed: int = 0,
    parameters: Mapping[str, Mapping] | None = None,
    calibration: Mapping[str, GainCalibration] | None = None,
) -> Asked:
    """Fit the chosen estimators of the tasks that have a weight or a guard rail.

    Args:
        runs: the proxy runs.
        chosen: name of the estimator that answers, by task.
        weights: weight of each task.
        guarded: tasks with a guard rail.
        seed: of the estimators.
        parameters: as `fit_chosen` takes them.
        calibration: as `fit_chosen` takes them.
    """
    tasks = tuple(t for t in runs.tasks if weights.get(t, 0) > 0 or t in guarded)
    wanted = {task: chosen[task] for task in tasks}
    weights_T = np.array([float(weights.get(task, 0)) for task in tasks])
    selected = runs.select_tasks(tasks)
    estimator = fit_chosen(selected, wanted, seed, parameters, calibration)
    return Asked(estimator, tasks, weights_T)
