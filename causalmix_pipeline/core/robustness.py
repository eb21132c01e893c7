"""How strong a hidden confounder would have to be to explain a gain away.

No test finds a confounder that isn't among the covariates. What can be said is how much of the
outcome and of the mixture it would have to explain. With t the statistic of the regression
coefficient of the treatment and df its residual degrees of freedom,

    f = |t| / sqrt(df),    robustness value = (sqrt(f^4 + 4 f^2) - f^2) / 2

is the partial R2, with the treatment and with the outcome alike and given all controls, that brings
the estimate to zero; with f less t* / sqrt(df - 1) in place of f, t* being the critical value, it
brings the lower bound to zero. Source: C. Cinelli and C. Hazlett, Making sense of sensitivity:
extending omitted variable bias, Journal of the Royal Statistical Society B 82 (2020), section 4.2
and its equation for the bound.

Here the treatment is how far a run's sqrt(shares) lie along the direction from the reference to the
mixture; the controls are the other directions of sqrt(shares) and the covariates. The model is
linear and alike in all states: the gain is an average, and only its robustness is of interest. A
direction that was chosen on the same runs looks more robust than it is. Where the state doesn't
tell the mixture by design, nothing hidden can either, and the value is for information only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import RELATIVE_FLOOR, EffectEstimator, StateScaler
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Level of the two-sided interval whose lower bound is asked about: 90%, as everywhere.
ALPHA = 0.10

#: Most controls, as a part of the runs; beyond, the covariates' first principal components.
CONTROL_SHARE = 0.25

#: The part of the runs' own mixtures whose mean stands for a recommended mixture.
BEST_SHARE = 0.05


@dataclass(frozen=True)
class Robustness:
    """What a hidden confounder needs to explain a gain away.

    Attributes:
        gain: of the mixture over the reference, by the linear model; weighted mean over tasks.
        se: its standard error.
        df: residual degrees of freedom.
        value: partial R2 with treatment and outcome that brings the gain to zero, 0 to 1; 0 where
            there's no gain.
        value_lower: the same for the lower bound of the 90% interval; at most `value`.
        n_controls: controls that were partialled out.
        mixture: the mixture asked about, by domain.
    """

    gain: float
    se: float
    df: int
    value: float
    value_lower: float
    n_controls: int
    mixture: dict[str, float]


def robustness(
    runs: RunTable,
    mixture_D: np.ndarray,
    reference_D: np.ndarray,
    weights_T: Sequence[float] | np.ndarray,
) -> Robustness:
    """Find the robustness value of the gain of a mixture over a reference.

    Args:
        runs: the proxy runs.
        mixture_D: the mixture recommended; shape (D,).
        reference_D: the one that it's compared with; shape (D,).
        weights_T: weight of each task in the gain; shape (T,).

    Raises:
        EstimationError: if both mixtures are alike, too few runs are left, or no run moves in this
            direction.
    """
    runs = runs.sorted_by_run()
    step_D = np.sqrt(np.clip(mixture_D, 0, None)) - np.sqrt(np.clip(reference_D, 0, None))
    length = float(np.linalg.norm(step_D))
    if length < RELATIVE_FLOOR:
        raise EstimationError(
            "mixture_D must differ from reference_D, got the same mixture twice: there is no gain "
            "to explain away."
        )
    root_ND = np.sqrt(np.clip(runs.mixture_ND, 0, None))
    treatment_N = root_ND @ step_D / length**2
    other_NK = root_ND @ _orthogonal_to(step_D / length)
    controls_NK = _basis(np.column_stack([other_NK, _state_controls(runs, other_NK.shape[1])]))
    outcome_N = runs.outcome_NT @ np.asarray(weights_T, dtype=float)
    left_N, moved_N = (_partial_out(values, controls_NK) for values in (outcome_N, treatment_N))
    df = runs.n_runs - 2 - controls_NK.shape[1]
    if df < 2 or moved_N @ moved_N <= RELATIVE_FLOOR * (treatment_N @ treatment_N):
        raise EstimationError(
            f"{runs.n_runs} runs must vary along the direction recommended with at least 2 degrees "
            f"of freedom left, got {df} and a variance of {moved_N @ moved_N:.3g}: add runs."
        )
    gain = float(moved_N @ left_N / (moved_N @ moved_N))
    error_N = left_N - gain * moved_N
    se = float(np.sqrt((error_N @ error_N) / df / (moved_N @ moved_N)))
    value, value_lower = robustness_values(gain / se if se > 0 else np.inf * np.sign(gain), df)
    shares = {name: float(s) for name, s in zip(runs.domains, mixture_D, strict=True)}
    return Robustness(gain, se, df, value, value_lower, controls_NK.shape[1], shares)


def robustness_values(t: float, df: int) -> tuple[float, float]:
    """Return the partial R2 that brings the estimate, and its lower bound, to zero.

    Args:
        t: the statistic of a gain; where it isn't above 0 both are 0.
        df: residual degrees of freedom, at least 2.
    """
    from scipy.stats import t as t_distribution

    strength = max(t, 0.0) / np.sqrt(df)
    critical = float(t_distribution.ppf(1 - ALPHA / 2, df - 1)) / np.sqrt(df - 1)
    return _value(float(strength)), _value(float(max(strength - critical, 0.0)))


def best_of_runs(
    estimator: EffectEstimator,
    runs: RunTable,
    reference_D: np.ndarray,
    weights_T: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Return the mean of the runs' mixtures with the best predicted gain in the mean pool state.

    It stands for a recommended mixture where none was made, and lies among those that were tried.

    Args:
        estimator: fitted on the tasks of `weights_T`.
        runs: the proxy runs.
        reference_D: what gains are measured from; shape (D,).
        weights_T: weight of each task of the estimator; shape (T,).

    Returns:
        The mean of the best 5%, at least one; shape (D,).
    """
    state_DP = runs.distinct_states()[1].mean(axis=0)
    mixture_MD = np.unique(runs.mixture_ND, axis=0)
    gain_M = estimator.gain(state_DP, mixture_MD, reference_D).mean_MT @ np.asarray(weights_T)
    n_best = max(1, round(BEST_SHARE * len(mixture_MD)))
    return mixture_MD[np.argsort(-gain_M, kind="stable")[:n_best]].mean(axis=0)


def _value(strength: float) -> float:
    if np.isinf(strength):
        return 1.0
    square = strength**2
    # The same as (sqrt(f^4 + 4 f^2) - f^2) / 2, without the difference of two large numbers.
    return float(2 * square / (np.sqrt(square**2 + 4 * square) + square)) if square > 0 else 0.0


def _orthogonal_to(direction_D: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the other directions; shape (D, D - 1)."""
    return np.linalg.svd(direction_D[None])[2][1:].T


def _state_controls(runs: RunTable, n_taken: int) -> np.ndarray:
    """Return standardised covariates, or their first principal components; shape (N, K)."""
    if not runs.covariates:
        return np.empty((runs.n_runs, 0))
    scaler = StateScaler.fit(runs.distinct_states()[1])
    state_NK = scaler.transform(runs.state_NDP)[:, scaler.kept_DP]
    most = max(int(CONTROL_SHARE * runs.n_runs) - n_taken, 1)
    if state_NK.shape[1] <= most:
        return state_NK
    left_NK, size_K, _ = np.linalg.svd(state_NK - state_NK.mean(axis=0), full_matrices=False)
    return left_NK[:, :most] * size_K[:most]


def _basis(controls_NK: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the centred controls; what others imply is left out."""
    left_NK, size_K, _ = np.linalg.svd(controls_NK - controls_NK.mean(axis=0), full_matrices=False)
    return left_NK[:, size_K > 1e-8 * size_K.max(initial=0.0)]


def _partial_out(values_N: np.ndarray, basis_NK: np.ndarray) -> np.ndarray:
    centered_N = values_N - values_N.mean()
    return centered_N - basis_NK @ (basis_NK.T @ centered_N)
