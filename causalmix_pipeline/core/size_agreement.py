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
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import without_size

#: Effects at another size, over those at the first, that count as alike.
ALIKE = (0.5, 2.0)

#: Fewest pool states of a size: with fewer, the states' spread can't be told.
FEWEST_STATES = 8


@dataclass(frozen=True)
class SizeComparison:
    """How far effects found at one size hold at another, on runs of states not fitted on.

    Attributes:
        task: what is measured; the objective where tasks were weighted.
        fitted_at: log2 parameters of the proxies whose runs were fitted.
        asked_at: of those whose contrasts within states were predicted.
        n_states: pool states of the other size; one less are the t quantile's degrees of freedom.
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
        margin = _t90(self.n_states) * self.ratio_se
        return self.agreement_low > 0 and self.ratio + margin >= low and self.ratio - margin <= high


def compare_sizes(
    make: Callable[[], EffectEstimator], runs: RunTable, weights_T: np.ndarray, *, seed: int = 0
) -> list[SizeComparison]:
    """Fit at the size that has most runs, and predict the contrasts within states of each other.

    No run is trained for it. Predictions of left-out states shrink towards no effect, so the slope
    of what came on what was predicted is divided by the same slope at the first size, where states
    are left out by turns. Standard errors are the jackknife's over states.

    Args:
        make: returns a fresh, unfitted estimator.
        runs: proxy runs of two sizes or more.
        weights_T: weight of each task in the objective, sum 1; shape (T,).
        seed: of folds.

    Returns:
        For each other size the objective, then each task.

    Raises:
        EstimationError: if there is one size, or a size has too few pool states.
    """
    size_N = runs.size_N
    assert size_N is not None
    _check_sizes(runs, size_N)
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
            found.append(
                SizeComparison(
                    task, first, size, away.n_states, *_ratio(same, other, t),
                    *_agreement(other, t), _rank(same, t),
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


def _check_sizes(runs: RunTable, size_N: np.ndarray) -> None:
    sizes = np.unique(size_N)
    if len(sizes) < 2:
        raise EstimationError(
            "runs must be of two sizes to compare them, got one: others diverged or aren't trained "
            "yet; materialise proxy_runs."
        )
    for size in sizes:
        n_states = len(np.unique(runs.state_ids[size_N == size]))
        if n_states < FEWEST_STATES:
            raise EstimationError(
                f"a size needs {FEWEST_STATES} pool states to be compared, got {n_states} at "
                f"{2**size:,.0f} parameters: raise its share in proxy.sizes, or design.n_runs."
            )


def _t90(n_states: int) -> float:
    """Half the width of a 90% interval in standard errors over that many states."""
    from scipy.stats import t as t_distribution

    return float(t_distribution.ppf(0.95, n_states - 1))


def _jackknife(left_out_S: np.ndarray) -> float:
    """Standard error of a figure, from its values without each state."""
    n_states = len(left_out_S)
    return float(np.sqrt((n_states - 1) / n_states * ((left_out_S - left_out_S.mean()) ** 2).sum()))


def _ratio(same: _Contrasts, other: _Contrasts, t: int) -> tuple[float, float]:
    """Slope at the other size over that at the first, and its standard error."""

    def slope(contrasts: _Contrasts) -> tuple[float, float]:
        product_S2 = contrasts.products(t)
        both = product_S2.sum(axis=0)
        rest_S2 = both - product_S2
        if not both[1] > 0 or not (rest_S2[:, 1] > 0).all():
            return math.nan, math.nan
        return float(both[0] / both[1]), _jackknife(rest_S2[:, 0] / rest_S2[:, 1])

    (at_other, error), (at_same, error_same) = slope(other), slope(same)
    if not at_same > 0:  # nothing was found at the first size
        return math.nan, math.nan
    ratio = at_other / at_same
    return ratio, math.hypot(error, ratio * error_same) / at_same


def _agreement(contrasts: _Contrasts, t: int) -> tuple[float, float, float]:
    """Rank correlation with its 90% interval over states."""
    rows_of_S, rank = contrasts.rows_of_S, _rank(contrasts, t)
    rests = [np.concatenate(rows_of_S[:s] + rows_of_S[s + 1 :]) for s in range(len(rows_of_S))]
    error = _jackknife(np.array([_rank(contrasts, t, rows) for rows in rests]))
    margin = _t90(len(rows_of_S)) * error
    return rank, max(rank - margin, -1.0), min(rank + margin, 1.0)


def _rank(contrasts: _Contrasts, t: int, rows: np.ndarray | slice = slice(None)) -> float:
    return spearman(contrasts.predicted_NT[rows, t], contrasts.observed_NT[rows, t])
