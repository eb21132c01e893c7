"""Tests that an effect model can fail: do mixtures matter at all, and do pool states?

Both look at predictions for runs whose pool state was left out of the fit, and both compare within
states, since only gains count. Each state gives one correlation over its runs, centred by the state
(so that no state decides alone), and the mean of the states' correlations is tested:

    mixtures_matter   of the outcome with the prediction
    states_matter     of what the blind prediction misses with what covariates add to it. The blind
                      prediction is the estimator's own, averaged over the covariates of the states
                      of the fold; covariates add the prediction by the state's own, less that.

The second is the comparison of squared errors with and without covariates, less the part that the
larger model loses to noise even where covariates say nothing. Source: T. E. Clark and K. D. West,
Approximately normal tests for equal predictive accuracy in nested models, Journal of Econometrics
138 (2007), section 2. Blind predictions by a second fit would shrink the shares' effect otherwise
and so pass or fail without any effect of states; averages of one fit don't.

Estimators are fitted on outcomes minus the mean of their state: what sets a whole state apart
moves no gain, and is no noise to them then.

Without an effect both means are 0. Their standard error is that of independent states times
sqrt(2): two states of different folds meet twice, each once as the one left out, in the same
product of their outcomes, so that the variance of the sum is up to twice that of independent terms
(for a linear estimator the sum is a quadratic form y'Hy without diagonal blocks). Rates of false
passes are measured by causalmix_pipeline_tests/benchmarks/placebo_rates.py.

A test that isn't passed doesn't prove that there's no effect: few runs can't tell (`core.power`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from causalmix_pipeline.core.effects import EffectEstimator, assign_folds, center_by_state
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Probability of a pass without an effect. At 1%, 2 or more of 20 placebos pass in 2% of trials.
LEVEL = 0.01

#: Fewest states of two runs or more that are tested: with fewer the t test leans on normality.
MINIMUM_TESTED_STATES = 8

#: The name under which the weighted sum of the tasks is told.
OBJECTIVE = "weighted objective"


@dataclass(frozen=True)
class Trial:
    """One test of one task.

    Attributes:
        check: `mixtures_matter` or `states_matter`.
        task: the task's name, or `weighted objective`.
        estimate: mean over states of the correlation, -1 to 1. None where it can't be told, as
            are the next two.
        se: its standard error, whole states being the sampled unit.
        p_value: one-sided; how often as much is seen without an effect.
        passed: whether `p_value` is below 1%; None where it can't be told.
        reason: why it can't be told; empty where it can.
    """

    check: str
    task: str
    estimate: float | None = None
    se: float | None = None
    p_value: float | None = None
    passed: bool | None = None
    reason: str = ""


def falsify(
    make: Callable[[], EffectEstimator],
    runs: RunTable,
    weights_T: Sequence[float] | np.ndarray,
    *,
    prediction_NT: np.ndarray | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> list[Trial]:
    """Put an estimator to both tests, for each task and for the weighted objective.

    The estimator should be fixed beforehand: one that was chosen because its predictions of these
    runs were best passes more often than it should.

    Args:
        make: returns a fresh estimator that uses covariates; one fit is made per fold.
        runs: the proxy runs.
        weights_T: weight of each task in the objective, >= 0; shape (T,).
        prediction_NT: out-of-fold predictions, in the order of `runs`, by which mixtures are judged
            where states can't be: by runs without covariates, or all of one state.
        n_folds: folds of whole states.
        seed: of the folds.

    Returns:
        For each test a row per task, then the objective.
    """
    blind_NT = None
    if not _why_no_states(runs):
        try:
            prediction_NT, blind_NT = _predict_both(make, runs, n_folds, seed)
        except EstimationError as error:
            reason = str(error)
            return [
                *_untold("mixtures_matter", runs, reason),
                *_untold("states_matter", runs, reason),
            ]
    return [
        *mixtures_matter(runs, prediction_NT, weights_T),
        *states_matter(runs, prediction_NT, blind_NT, weights_T),
    ]


def _predict_both(
    make: Callable[[], EffectEstimator], runs: RunTable, n_folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold predictions by the state's own covariates, and by those of its whole fold."""
    runs = replace(runs, outcome_NT=_centered(runs, runs.outcome_NT))
    own_NT, blind_NT = np.empty_like(runs.outcome_NT), np.empty_like(runs.outcome_NT)
    fold_N = assign_folds(runs, n_folds, seed)
    for fold in np.unique(fold_N):
        estimator = make().fit(runs.subset(fold_N != fold))
        rows = np.flatnonzero(fold_N == fold)
        states, first = np.unique(runs.state_ids[rows], return_index=True)
        total_MT = np.zeros((len(rows), len(runs.tasks)))
        for state, i in zip(states, first, strict=True):
            predicted_MT = estimator.predict(runs.state_NDP[rows[i]], runs.mixture_ND[rows])
            own_M = runs.state_ids[rows] == state
            own_NT[rows[own_M]] = predicted_MT[own_M]
            total_MT += predicted_MT
        blind_NT[rows] = total_MT / len(states)
    return own_NT, blind_NT


def mixtures_matter(
    runs: RunTable, prediction_NT: np.ndarray | None, weights_T: Sequence[float] | np.ndarray
) -> list[Trial]:
    """Test whether out-of-fold predictions go along with outcomes within pool states.

    Where all runs are of one state, the unit is the mixture instead of the state.

    Args:
        runs: the proxy runs.
        prediction_NT: predictions while the run's state was left out; shape (N, T). None where
            there are none.
        weights_T: weight of each task in the objective; shape (T,).
    """
    reason = _why_no_contrasts(runs)
    if not reason and prediction_NT is None:
        reason = "there are no predictions of left-out runs"
    if reason or prediction_NT is None:
        return _untold("mixtures_matter", runs, reason)
    return _test(
        "mixtures_matter",
        runs,
        _with_objective(_centered(runs, runs.outcome_NT), weights_T),
        _with_objective(_centered(runs, prediction_NT), weights_T),
    )


def states_matter(
    runs: RunTable,
    prediction_NT: np.ndarray | None,
    blind_NT: np.ndarray | None,
    weights_T: Sequence[float] | np.ndarray,
) -> list[Trial]:
    """Test whether covariates tell what a blind prediction misses within unseen pool states.

    Args:
        runs: the proxy runs.
        prediction_NT: out-of-fold predictions with covariates; shape (N, T).
        blind_NT: those of the same fits on average over the covariates of other states; (N, T).
        weights_T: weight of each task in the objective; shape (T,).
    """
    reason = _why_no_states(runs)
    if not reason and (prediction_NT is None or blind_NT is None):
        reason = "there are no predictions with and without covariates"
    if reason or prediction_NT is None or blind_NT is None:
        return _untold("states_matter", runs, reason)
    missed_NT = _centered(runs, runs.outcome_NT - blind_NT)
    added_NT = _centered(runs, prediction_NT - blind_NT)
    return _test(
        "states_matter",
        runs,
        _with_objective(missed_NT, weights_T),
        _with_objective(added_NT, weights_T),
    )


def frame_rows(trials: Sequence[Trial]) -> list[dict]:
    """The trials as rows, fit for JSON."""
    return [asdict(trial) for trial in trials]


def describe(trial: Trial) -> str:
    """One line for people: what was found, or why it can't be told."""
    if trial.estimate is None:
        return f"{trial.task}: can't be told, {trial.reason}"
    return (
        f"{trial.task}: mean correlation of left-out runs {trial.estimate:.2f} +- {trial.se:.2f} "
        f"(p {trial.p_value:.2g})"
    )


def _with_objective(values_NT: np.ndarray, weights_T: Sequence[float] | np.ndarray) -> np.ndarray:
    """Append the weighted sum of the tasks; shape (N, T + 1)."""
    return np.column_stack([values_NT, values_NT @ np.asarray(weights_T, dtype=float)])


def _units(runs: RunTable) -> np.ndarray:
    """What is left out as a whole: the state, or the mixture where there is one state."""
    return runs.groups if runs.n_groups > 1 else runs.repeat_of_N


def _n_tested(runs: RunTable) -> int:
    """Number of units that have something to compare."""
    _, count_S = np.unique(_units(runs), return_counts=True)
    return int((count_S >= _least_runs(runs)).sum())


def _least_runs(runs: RunTable) -> int:
    """Runs that a unit needs to have something to compare."""
    return 2 if runs.n_groups > 1 else 1


def _why_no_contrasts(runs: RunTable) -> str:
    tested = _n_tested(runs)
    if tested >= MINIMUM_TESTED_STATES:
        return ""
    return (
        f"only {tested} "
        + ("pool states have two runs or more" if runs.n_states > 1 else "mixtures were run")
        + f", and {MINIMUM_TESTED_STATES} are needed"
    )


def _why_no_states(runs: RunTable) -> str:
    if not runs.covariates:
        return "the runs have no covariates"
    if runs.n_states == 1:
        return "all runs are of one pool state"
    return _why_no_contrasts(runs)


def _untold(check: str, runs: RunTable, reason: str) -> list[Trial]:
    return [Trial(check, task, reason=reason) for task in (*runs.tasks, OBJECTIVE)]


def _centered(runs: RunTable, values_NT: np.ndarray) -> np.ndarray:
    return center_by_state(values_NT, runs.groups)


def _sums(runs: RunTable, value_NU: np.ndarray) -> np.ndarray:
    """Sums over the runs of each unit that has something to compare; shape (S, U)."""
    _, inverse_N, count_S = np.unique(_units(runs), return_inverse=True, return_counts=True)
    sum_SU = np.zeros((len(count_S), value_NU.shape[1]))
    np.add.at(sum_SU, inverse_N, value_NU)
    return sum_SU[count_S >= _least_runs(runs)]


def _test(check: str, runs: RunTable, first_NU: np.ndarray, second_NU: np.ndarray) -> list[Trial]:
    """Test that the mean over states of their correlation is above 0."""
    from scipy.stats import t as t_distribution

    product_SU = _sums(runs, first_NU * second_NU)
    size_SU = np.sqrt(_sums(runs, first_NU**2) * _sums(runs, second_NU**2))
    # A state in which either never varies has no correlation, and speaks for none.
    ratio_SU = np.divide(product_SU, size_SU, out=np.zeros_like(size_SU), where=size_SU > 0)
    n_states = len(ratio_SU)
    trials = []
    for ratio_S, task in zip(ratio_SU.T, (*runs.tasks, OBJECTIVE), strict=True):
        mean, se = float(ratio_S.mean()), float(np.sqrt(2 / n_states) * ratio_S.std(ddof=1))
        if se > 0:
            p_value = float(t_distribution.sf(mean / se, n_states - 1))
        else:
            p_value = 0.0 if mean > 0 else 1.0
        trials.append(Trial(check, task, mean, se, p_value, p_value < LEVEL))
    return trials
