"""What more runs are worth: R2 within unseen states by number of runs, and with twice as many.

`core.power` asks which gain a number of runs can tell from seed noise. This asks how well the
fitted model predicts, for states it hasn't seen, as it's given more states to learn from.

Folds never split a state. For each fold and size the estimator is fitted on a random part of the
other states, several times, and predicts the whole fold: all sizes are judged by the same runs.
What is left to learn is taken to fall as 1/n (the error of a model of fixed size) or as 1/sqrt(n)
(one whose detail grows with the runs). The rise expected of twice the runs is the mean of both, and
half their difference is part of its error. The rest of the errors is that of the states that were
drawn (jackknife over states) and of the random parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.effects import (
    MINIMUM_RUNS,
    MINIMUM_STATES,
    EffectEstimator,
    assign_folds,
    center_by_state,
    has_contrasts,
)
from causalmix_pipeline.core.runs import RunTable

#: Parts of the states that fits are given, the whole last.
PARTS = (0.25, 0.5, 0.75, 1.0)

#: Random parts drawn of each size but the whole.
N_DRAWS = 3

#: How the error falls with the number of runs: as n to the minus this.
EXPONENTS = (0.5, 1.0)

#: Fewest states or, without covariates, mixtures: a quarter of them in four folds is still 4.
MINIMUM_UNITS = 20


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """R2 of the weighted objective within unseen states, by number of runs.

    Attributes:
        table: a row per size: `part` of the states, `n_runs`, `r2` and its `r2_se`; the last row,
            `part` 2, is what twice the runs are expected to bring.
        within_states: whether R2 is of differences between runs of one state; else of all runs.
    """

    table: pl.DataFrame
    within_states: bool = True

    def describe(self) -> str:
        """One sentence on twice the runs."""
        now, then = (self.table.row(i, named=True) for i in (-2, -1))
        where = "within unseen states" if self.within_states else "on runs left out"
        return (
            f"doubling the runs to {then['n_runs']} is expected to take R2 {where} from "
            f"{now['r2']:.2f} +- {now['r2_se']:.2f} to {then['r2']:.2f} +- {then['r2_se']:.2f}"
        )


def learning_curve(
    fit: Callable[[RunTable], EffectEstimator],
    runs: RunTable,
    weights_T: np.ndarray,
    n_folds: int = 4,
    seed: int = 0,
) -> LearningCurve | None:
    """Measure R2 within unseen states at a quarter, half, three quarters and all of the states.

    Where few runs have a partner in their state, R2 over all runs is told instead.

    Args:
        fit: returns an estimator fitted on the runs it's given; 40 fits are made, so a quick one.
        runs: the proxy runs; without covariates mixtures take the place of states.
        weights_T: weight of each task in the objective; shape (T,).
        n_folds: folds of whole states.
        seed: of folds and random parts.

    Returns:
        The curve, or None where a quarter of the runs is too few to fit on.
    """
    runs = runs.sorted_by_run()
    unit_N = runs.groups if runs.n_groups > 1 else runs.repeat_of_N
    units, unit_N = np.unique(unit_N, return_inverse=True)
    if len(units) < max(MINIMUM_UNITS, MINIMUM_STATES) or runs.n_runs < 8 * MINIMUM_RUNS:
        return None
    smallest = np.sort(np.bincount(unit_N))[: round(PARTS[0] * (1 - 1 / n_folds) * len(units))]
    if smallest.sum() < MINIMUM_RUNS:  # the poorest quarter that may be drawn
        return None
    centers = runs.groups if has_contrasts(runs) else np.zeros(runs.n_runs, dtype=int)
    observed_N = _centered(runs.outcome_NT @ weights_T, centers)
    error_RCS = np.zeros((N_DRAWS, len(PARTS), len(units)))
    fold_N, rng = assign_folds(runs, n_folds, seed), np.random.default_rng(seed)
    predicted_RCN = np.empty((N_DRAWS, len(PARTS), runs.n_runs))
    for fold in np.unique(fold_N):
        inside = fold_N == fold
        others = np.unique(unit_N[~inside])
        for r in range(N_DRAWS):
            order = rng.permutation(others)
            for c, part in enumerate(PARTS):
                if part == 1.0 and r > 0:
                    predicted_RCN[r, c, inside] = predicted_RCN[0, c, inside]
                    continue
                taken = np.isin(unit_N, order[: round(part * len(order))])
                estimator = fit(runs.subset(taken))
                predicted_RCN[r, c, inside] = _predict(estimator, runs, inside) @ weights_T
    total_S = np.bincount(unit_N, observed_N**2, len(units))
    for r in range(N_DRAWS):
        for c in range(len(PARTS)):
            square_N = (observed_N - _centered(predicted_RCN[r, c], centers)) ** 2
            error_RCS[r, c] = np.bincount(unit_N, square_N, len(units))
    return LearningCurve(_table(error_RCS, total_S, runs.n_runs), has_contrasts(runs))


def _centered(values_N: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return center_by_state(values_N[:, None], centers)[:, 0]


def _predict(estimator: EffectEstimator, runs: RunTable, inside: np.ndarray) -> np.ndarray:
    rows_of = [np.flatnonzero(inside & (runs.state_ids == s)) for s in np.unique(runs.state_ids)]
    predicted_NT = np.empty(runs.outcome_NT.shape)
    for rows in rows_of:
        if len(rows):
            predicted_NT[rows] = estimator.predict(runs.state_NDP[rows[0]], runs.mixture_ND[rows])
    return predicted_NT[inside]


def _table(error_RCS: np.ndarray, total_S: np.ndarray, n_runs: int) -> pl.DataFrame:
    """R2 at each size and at twice the runs, with standard errors."""
    whole_E = _levels(error_RCS.mean(axis=0).sum(axis=1), total_S.sum())
    kept = [np.delete(np.arange(len(total_S)), s) for s in range(len(total_S))]
    left_out_SE = np.array(
        [_levels(error_RCS[:, :, k].mean(axis=0).sum(axis=1), total_S[k].sum()) for k in kept]
    )
    variance_E = (len(kept) - 1) * left_out_SE.var(axis=0)
    draws_RE = np.array([_levels(error_CS.sum(axis=1), total_S.sum()) for error_CS in error_RCS])
    variance_E += draws_RE.var(axis=0, ddof=1) / len(draws_RE)
    se_E = np.sqrt(variance_E)
    # The last two are twice the runs by either exponent.
    then, spread = whole_E[-2:].mean(), np.ptp(whole_E[-2:]) / 2
    # Their errors go along with each other.
    then_se = float(np.hypot(se_E[-2:].mean(), spread))
    parts = [*PARTS, 2.0]
    return pl.DataFrame(
        {
            "part": parts,
            "n_runs": [round(part * n_runs) for part in parts],
            "r2": [*whole_E[:-2].tolist(), min(float(then), 1.0)],
            "r2_se": [*se_E[:-2].tolist(), then_se],
        }
    )


def _levels(error_C: np.ndarray, total: float) -> np.ndarray:
    """R2 at each size, then at twice the runs by each exponent; shape (C + 2,)."""
    r2_C = 1 - error_C / total
    doubled = [r2_C[-1] + _slope(r2_C, power) * (1 - 2**-power) for power in EXPONENTS]
    return np.array([*r2_C, *doubled])


def _slope(r2_C: np.ndarray, power: float) -> float:
    """The b of R2 = a - b part^-power, by least squares."""
    left_C = np.array(PARTS) ** -power
    left_C = left_C - left_C.mean()
    return -float(left_C @ r2_C / (left_C @ left_C))
