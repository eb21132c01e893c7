"""The tests that can fail and the learning curve, with estimators quick enough for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.adapters.estimators import fit_chosen, make_estimator
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.falsification import Trial, falsify
from causalmix_pipeline.core.learning_curve import LearningCurve, learning_curve
from causalmix_pipeline.core.runs import RunTable

#: Estimator of the tests that can fail: quick, and fixed before the runs are seen.
TRIAL_ESTIMATOR = "structured_ridge"

#: Most values (runs x runs x tasks) of covariances that one fit of the surface may have: 512 runs
#: of 6 tasks take 10 s for the forty fits.
MOST_COVARIANCES = 2_000_000


@dataclass(frozen=True, eq=False)
class MoreRuns:
    """A learning curve and the estimator that it was measured with."""

    estimator: str
    curve: LearningCurve


def run_trials(
    runs: RunTable, weights_T: np.ndarray, prediction_NT: np.ndarray, seed: int = 0
) -> list[Trial]:
    """Test whether mixtures and pool states matter; see `core.falsification.falsify`."""
    return falsify(
        lambda: make_estimator(TRIAL_ESTIMATOR, seed),
        runs,
        weights_T,
        prediction_NT=prediction_NT,
        seed=seed,
    )


def more_runs(
    runs: RunTable,
    weights_T: Sequence[float] | np.ndarray,
    parameters: Mapping[str, Mapping],
    seed: int = 0,
) -> MoreRuns | None:
    """Measure what twice the runs would bring; tasks of weight 0 are left out.

    Args:
        runs: the proxy runs.
        weights_T: weight of each task in the objective; shape (T,).
        parameters: what `CombinedEstimator.parameters()["members"]` holds.
        seed: of folds, random parts and the estimator.

    Returns:
        None where there are too few runs, or no quick estimator.
    """
    weights_T = np.asarray(weights_T, dtype=float)
    counted = runs.select_tasks(
        [task for task, w in zip(runs.tasks, weights_T, strict=True) if w > 0]
    )
    quick = quick_fit(counted, parameters, seed)
    if quick is None:
        return None
    name, fit = quick
    curve = learning_curve(fit, counted, weights_T[weights_T > 0], seed=seed)
    return None if curve is None else MoreRuns(name, curve)


def quick_fit(
    runs: RunTable, parameters: Mapping[str, Mapping], seed: int = 0
) -> tuple[str, Callable[[RunTable], EffectEstimator]] | None:
    """Return the name of an estimator and how to fit it on some of the runs without a search.

    The response surface where its hyper-parameters are known, alone or in a stack, and the runs are
    not too many; else the ridge, which needs covariates.

    Args:
        runs: all runs, of the tasks that count.
        parameters: what `CombinedEstimator.parameters()["members"]` holds.
        seed: of the estimator.

    Returns:
        None where there's neither.
    """
    name = "response_surface" if runs.covariates else "response_surface_blind"
    stacked = parameters.get("stack", {}).get("members", {})
    known = next((p[name] for p in (parameters, stacked) if _covers(p.get(name), runs)), None)
    if known is not None and runs.n_runs**2 * len(runs.tasks) <= MOST_COVARIANCES:
        kept = {name: known}
    elif runs.covariates:
        name, kept = "structured_ridge", {}
    else:
        return None
    chosen = dict.fromkeys(runs.tasks, name)
    return name, lambda some: fit_chosen(some, chosen, seed, kept)


def _covers(known: Mapping | None, runs: RunTable) -> bool:
    """Whether hyper-parameters of each task are there."""
    return known is not None and set(runs.tasks) <= set(known["hyper_parameters"])
