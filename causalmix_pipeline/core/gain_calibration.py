"""How far predicted gains hold on runs of unseen pool states, and what is corrected for it.

Two things go wrong, and both show in cross-validation. Standard errors can be too small: `factor`
widens them. And gains can be promised too high, most of all where a policy looks for the highest:
`slope` is by what gains over the equal mixture have to be multiplied, and its own standard error
counts in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalmix_pipeline.core.runs import RunTable

#: Half-width of a two-sided 90% normal interval, in standard errors.
Z90 = 1.6448536269514722

#: Most that standard errors are multiplied by: beyond it, no interval says anything.
WIDEST = 100.0

#: Share of the held-out gains, those of the runs that promise most, that must be inside as well:
#: a recommendation is picked for its promise. On 25 simulated worlds of 512 runs intervals of the
#: recommended mixtures so covered 91% instead of 87%, of 256 runs 89% instead of 88%.
PROMISING = 0.2

#: Fewest of them that count.
FEWEST_PROMISING = 20

#: Fewest held-out runs with a predicted gain that tell how far gains hold.
FEWEST_GAINS = 12

#: Standard deviation of slopes around 1, before any is measured. With .2, gains of simulated pools
#: were promised without bias, and 90% intervals covered 89% of them; .15-.5 hardly differ.
PRIOR_DEVIATION = 0.2

#: Least slope: below it, hardly anything of a gain was there.
LEAST_SLOPE = 0.2


@dataclass(frozen=True)
class GainCalibration:
    """What is corrected in the gains of a task.

    Attributes:
        factor: 1 or more; multiplies the standard error.
        slope: at most 1; multiplies what is gained over the equal mixture. Losses stay.
        slope_se: standard error of the slope.
    """

    factor: float = 1.0
    slope: float = 1.0
    slope_se: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return {"factor": self.factor, "slope": self.slope, "slope_se": self.slope_se}


def read_calibration(values: Mapping[str, Mapping[str, Any]]) -> dict[str, GainCalibration]:
    """What `GainCalibration.to_dict` wrote, by task."""
    return {task: GainCalibration(**value) for task, value in values.items()}


def widening(
    error_M: np.ndarray, variance_M: np.ndarray, noise_M: np.ndarray, promise_M: np.ndarray
) -> float:
    """By what standard errors must grow so that 90% of held-out gains are inside; 1 or more.

    Args:
        error_M: distance of each observed gain from the predicted; one or more.
        variance_M: variance of the predicted gain.
        noise_M: variance of the seed noise in the observed one; it doesn't grow.
        promise_M: what was predicted, over the equal mixture, of the better of the two runs. Of
            those that promise most 90% must be inside too, if they aren't too few.
    """
    factor = _factor(error_M, variance_M, noise_M)
    best_M = promise_M >= np.quantile(promise_M, 1 - PROMISING)
    if best_M.sum() < FEWEST_PROMISING:
        return factor
    return max(factor, _factor(error_M[best_M], variance_M[best_M], noise_M[best_M]))


def _factor(error_M: np.ndarray, variance_M: np.ndarray, noise_M: np.ndarray) -> float:
    """By what standard errors must grow so that 90% of these gains are inside."""

    def covered(factor: float) -> float:
        return float(np.mean(error_M <= Z90 * np.sqrt(factor**2 * variance_M + noise_M)))

    if covered(1.0) >= 0.9:
        return 1.0
    low, high = 1.0, WIDEST
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if covered(middle) >= 0.9 else (middle, high)
    return high


def slope_of_gains(
    outcome_N: np.ndarray,
    prediction_N: np.ndarray,
    level_N: np.ndarray,
    runs: RunTable,
    *,
    within_states: bool,
) -> tuple[float, float]:
    """Regress outcomes on predicted gains over the equal mixture, those above 0 on their own.

    Args:
        outcome_N: outcomes of one task; shape (N,).
        prediction_N: what was predicted of them, their state left out; shape (N,).
        level_N: what was predicted of the equal mixture in the same state; shape (N,).
        runs: the runs, for their states and repeated mixtures.
        within_states: whether to compare runs of one state alone. Else the predicted level is
            regressed on as well.

    Returns:
        The slope of gains above 0, at most 1, and its standard error. Both are those after the
        measured slope has met a prior around 1; the measured one's error is robust to what runs
        of one state share (A. C. Cameron and D. L. Miller, Journal of Human Resources 50, 2015).
        Where too few runs have a gain, they are the prior's.
    """
    gain_N = prediction_N - level_N
    if min((gain_N > 0).sum(), (gain_N < 0).sum()) < FEWEST_GAINS:
        return 1.0, PRIOR_DEVIATION
    columns = [np.maximum(gain_N, 0), np.minimum(gain_N, 0)]
    if within_states:
        _, group_N = np.unique(runs.groups, return_inverse=True)
        inputs_NC = _centered(np.column_stack(columns), group_N)
        output_N = _centered(outcome_N[:, None], group_N)[:, 0]
    else:
        inputs_NC = np.column_stack([*columns, level_N])
        inputs_NC = inputs_NC - inputs_NC.mean(axis=0)
        output_N = outcome_N - outcome_N.mean()
    inverse_CC = np.linalg.pinv(inputs_NC.T @ inputs_NC)
    slope_C = inverse_CC @ inputs_NC.T @ output_N
    pull_NC = inputs_NC * (output_N - inputs_NC @ slope_C)[:, None]
    cluster_N = runs.groups if runs.n_groups > 1 else runs.repeat_of_N
    _, cluster_N = np.unique(cluster_N, return_inverse=True)
    pull_GC = np.zeros((cluster_N.max() + 1, pull_NC.shape[1]))
    np.add.at(pull_GC, cluster_N, pull_NC)
    # The usual correction for few groups.
    few = len(pull_GC) / max(len(pull_GC) - inputs_NC.shape[1], 1)
    variance = few * float((inverse_CC @ (pull_GC.T @ pull_GC) @ inverse_CC)[0, 0])
    trust = PRIOR_DEVIATION**2 / (PRIOR_DEVIATION**2 + variance)
    slope = 1 + trust * (float(slope_C[0]) - 1)
    return float(np.clip(slope, LEAST_SLOPE, 1.0)), float(np.sqrt(trust * variance))


def calibrated(
    mean_MT: np.ndarray,
    se_MT: np.ndarray,
    reference_gain_T: np.ndarray,
    calibration: list[GainCalibration],
) -> tuple[np.ndarray, np.ndarray]:
    """Gains over a reference mixture and their standard errors, corrected.

    Args:
        mean_MT: gains over the reference, as predicted; shape (M, T).
        se_MT: their standard errors; shape (M, T).
        reference_gain_T: gain of the reference over the equal mixture, as predicted; shape (T,).
        calibration: of each task.
    """
    factor_T, slope_T, slope_se_T = (
        np.array([getattr(task, name) for task in calibration])
        for name in ("factor", "slope", "slope_se")
    )
    over_equal_MT = mean_MT + reference_gain_T
    above_MT = np.maximum(over_equal_MT, 0) - np.maximum(reference_gain_T, 0)
    doubt_MT = above_MT * slope_se_T
    return mean_MT - (1 - slope_T) * above_MT, np.sqrt((factor_T * se_MT) ** 2 + doubt_MT**2)


def _centered(values_NC: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    sums = np.zeros((group_N.max() + 1, values_NC.shape[1]))
    np.add.at(sums, group_N, values_NC)
    return values_NC - (sums / np.bincount(group_N)[:, None])[group_N]
