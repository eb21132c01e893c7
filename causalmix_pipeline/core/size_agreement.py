"""How far effects found at one size of proxies hold at another, without further runs.

Contrasts within a pool state are free of the level of its size. So what is fitted at one size
predicts those of another, and rank agreement and the ratio of effects follow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import (
    EffectEstimator,
    center_by_state,
    cross_validate,
    spearman,
)
from causalmix_pipeline.core.gain_calibration import Z90
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import without_size

#: Effects at another size, over those at the first, that count as alike.
ALIKE = (0.5, 2.0)

#: Draws of pool states behind intervals.
BOOTSTRAPS = 400


@dataclass(frozen=True)
class SizeComparison:
    """How far effects found at one size hold at another, on runs of states not fitted on.

    Attributes:
        task: what is measured; the objective where tasks were weighted.
        fitted_at: log2 parameters of the proxies whose runs were fitted.
        asked_at: of those whose contrasts within states were predicted.
        n_states: pool states of the other size.
        ratio: effects at the other size over those at the first.
        ratio_se: its standard error, states being the sampled unit.
        agreement: rank correlation, within states, of what was predicted with what came.
        agreement_low: lower end of its 90% interval.
        agreement_high: upper end.
        agreement_same: the same at the first size itself, its states left out by turns.
    """

    task: str
    fitted_at: float
    asked_at: float
    n_states: int
    ratio: float
    ratio_se: float
    agreement: float
    agreement_low: float
    agreement_high: float
    agreement_same: float

    @property
    def agrees(self) -> bool:
        """Whether mixtures rank alike, and effects aren't surely below half or above twice."""
        low, high = ALIKE
        return (
            self.agreement_low > 0
            and self.ratio + Z90 * self.ratio_se >= low
            and self.ratio - Z90 * self.ratio_se <= high
        )


def compare_sizes(
    make: Callable[[], EffectEstimator], runs: RunTable, weights_T: np.ndarray, *, seed: int = 0
) -> list[SizeComparison]:
    """Fit at the size that has most runs, and predict the contrasts within states of each other.

    No run is trained for it. Predictions of left-out states shrink towards no effect, so the slope
    of what came on what was predicted is divided by the same slope at the first size, where states
    are left out by turns.

    Args:
        make: returns a fresh, unfitted estimator.
        runs: proxy runs of two sizes or more.
        weights_T: weight of each task in the objective, sum 1; shape (T,).
        seed: of folds and of the draws of states behind intervals.

    Returns:
        For each other size the objective, then each task.

    Raises:
        EstimationError: if the first size has too few runs or states to fit.
    """
    size_N = runs.size_N
    assert size_N is not None
    (first, _), *others = Counter(size_N.tolist()).most_common()
    home = without_size(runs.subset(size_N == first))
    left_out_NT = cross_validate(make, home, seed=seed).prediction_NT
    fitted = make().fit(home)
    same = _Contrasts.of(home, left_out_NT, weights_T)
    found = []
    for size, _ in sorted(others):
        away = without_size(runs.subset(size_N == size))
        predicted_NT = np.vstack(
            [
                fitted.predict(state_DP, mixture_D[None])
                for state_DP, mixture_D in zip(away.state_NDP, away.mixture_ND, strict=True)
            ]
        )
        other = _Contrasts.of(away, predicted_NT, weights_T)
        for t, task in enumerate(("objective", *runs.tasks)):
            rng = np.random.default_rng([seed, t])
            found.append(
                SizeComparison(
                    task, first, size, away.n_states, *_ratio(same, other, t, rng),
                    *_agreement(other, t, rng), _rank(same, t),
                )
            )  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class _Contrasts:
    """Outcomes and predictions less the mean of their state; the first column is the objective."""

    observed_NT: np.ndarray
    predicted_NT: np.ndarray
    rows_of_S: list[np.ndarray]

    @classmethod
    def of(cls, runs: RunTable, predicted_NT: np.ndarray, weights_T: np.ndarray) -> _Contrasts:
        def centered(value_NT: np.ndarray) -> np.ndarray:
            both_NT = np.column_stack([value_NT @ weights_T, value_NT])
            return center_by_state(both_NT, runs.state_ids)

        rows = [np.flatnonzero(runs.state_ids == state) for state in np.unique(runs.state_ids)]
        return cls(centered(runs.outcome_NT), centered(predicted_NT), rows)

    def products(self, t: int) -> np.ndarray:
        """Of each state, prediction times outcome and prediction squared, summed; shape (S, 2)."""
        x_N, y_N = self.predicted_NT[:, t], self.observed_NT[:, t]
        return np.array([(x_N[rows] @ y_N[rows], x_N[rows] @ x_N[rows]) for rows in self.rows_of_S])


def _ratio(
    same: _Contrasts, other: _Contrasts, t: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Slope at the other size over that at the first, and its standard error."""

    def slopes(contrasts: _Contrasts) -> tuple[float, np.ndarray]:
        product_S2 = contrasts.products(t)
        n_states = len(product_S2)
        drawn_B2 = product_S2[rng.integers(n_states, size=(BOOTSTRAPS, n_states))].sum(axis=1)
        sums = np.vstack([product_S2.sum(axis=0), drawn_B2])
        slope_B = sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan)
        return float(slope_B[0]), slope_B[1:]

    (slope, drawn_B), (slope_same, drawn_same_B) = slopes(other), slopes(same)
    if not slope_same > 0:  # nothing was found at the first size
        return math.nan, math.nan
    low, high = np.nanquantile(drawn_B / drawn_same_B, [0.05, 0.95])
    return slope / slope_same, float(high - low) / (2 * Z90)


def _agreement(
    contrasts: _Contrasts, t: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Rank correlation with its 90% interval over draws of states."""
    n_states = len(contrasts.rows_of_S)
    drawn = [
        _rank(contrasts, t, np.concatenate([contrasts.rows_of_S[s] for s in states]))
        for states in rng.integers(n_states, size=(BOOTSTRAPS, n_states))
    ]
    low, high = np.nanquantile(drawn, [0.05, 0.95])
    return _rank(contrasts, t), float(low), float(high)


def _rank(contrasts: _Contrasts, t: int, rows: np.ndarray | slice = slice(None)) -> float:
    return spearman(contrasts.predicted_NT[rows, t], contrasts.observed_NT[rows, t])
