"""The data mixing law: a task's loss is c + k exp(b . t), whatever the pool state.

Since the shares sum to 1, k is a shift of all b, so c, b and a sign are fitted. Source: J. Ye et
al., Data mixing laws (arXiv 2403.16952); OLMix's default.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from causalmix_pipeline.core.effects import RELATIVE_FLOOR, Gain, check_runs
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Where the search starts: the constant lies this far below the best outcome seen, in ranges.
STARTS = (0.05, 0.5, 3.0)

#: Penalty on b per run, in squared standard deviations of the outcome: it decides only where runs
#: are too few to.
PENALTY = 1e-4

#: Largest exponent, so that a search step can't overflow.
_LARGEST = 30.0


class LogLinear:
    """The law for each task, fitted by least squares from several starts and both signs.

    It has no standard errors: `Gain.se_MT` is nan.
    """

    name = "log_linear"

    def __init__(self) -> None:
        """Set up an unfitted law; it draws no random number."""
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable, parameters: Mapping | None = None) -> LogLinear:
        """Find c, b and the sign of each task, or reuse them.

        Raises:
            EstimationError: if `check_runs` refuses the runs, or `parameters` were made for other
                tasks or domains.
        """
        check_runs(runs)
        runs = runs.sorted_by_run()
        if parameters is None:
            laws = [_fit_law(runs.mixture_ND, outcome_N) for outcome_N in runs.outcome_NT.T]
        else:
            laws = [_reuse(parameters, task, runs.domains) for task in runs.tasks]
        self._constant_T = np.array([law[0] for law in laws])
        self._size_T = np.array([law[1] for law in laws])
        self._slope_TD = np.array([law[2] for law in laws])
        self._domains, self._tasks = runs.domains, runs.tasks
        self.task_correlation_TT = np.ones((len(runs.tasks),) * 2)
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture; shape (M, T)."""
        exponent_MT = np.atleast_2d(mixture_MD) @ self._slope_TD.T
        return self._constant_T + self._size_T * np.exp(np.minimum(exponent_MT, _LARGEST))

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return differences of predictions; their standard errors are unknown (nan)."""
        both = self.predict(state_DP, np.vstack([reference_D, mixture_MD]))
        mean_MT = both[1:] - both[0]
        return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    def parameters(self) -> dict:
        """Return c, k and b by task, for `fit(runs, parameters=...)`."""
        return {
            "laws": {
                task: {
                    "c": float(self._constant_T[t]),
                    "k": float(self._size_T[t]),
                    "b": dict(zip(self._domains, self._slope_TD[t].tolist(), strict=True)),
                }
                for t, task in enumerate(self._tasks)
            }
        }


def _fit_law(mixture_ND: np.ndarray, outcome_N: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Constant, signed size and slopes of the best fit."""
    mean, deviation = float(outcome_N.mean()), float(outcome_N.std())
    if deviation <= RELATIVE_FLOOR * (1 + abs(mean)):
        return mean, 0.0, np.zeros(mixture_ND.shape[1])
    standard_N = (outcome_N - mean) / deviation
    found = [
        (*_search(mixture_ND, sign * standard_N, start), sign)
        for sign in (-1.0, 1.0)
        for start in STARTS
    ]
    _, constant, slope_D, sign = min(found, key=lambda fit: fit[0])
    return mean + sign * deviation * constant, sign * deviation, slope_D


def _search(
    mixture_ND: np.ndarray, value_N: np.ndarray, start: float
) -> tuple[float, float, np.ndarray]:
    """Cost, c and b of value = c + exp(b . t), from c a little below the least value."""
    from scipy.optimize import least_squares

    weight = np.sqrt(PENALTY * len(value_N))
    n_domains = mixture_ND.shape[1]

    def parts(point: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(mixture_ND @ point[1:], _LARGEST))

    def residuals(point: np.ndarray) -> np.ndarray:
        pull_D = weight * (point[1:] - point[1:].mean())
        return np.concatenate([point[0] + parts(point) - value_N, pull_D])

    def jacobian(point: np.ndarray) -> np.ndarray:
        top = np.column_stack([np.ones(len(value_N)), parts(point)[:, None] * mixture_ND])
        pull_DD = weight * (np.eye(n_domains) - 1 / n_domains)
        return np.vstack([top, np.column_stack([np.zeros(n_domains), pull_DD])])

    constant = value_N.min() - start * np.ptp(value_N)
    slope_D = np.linalg.lstsq(mixture_ND, np.log(value_N - constant), rcond=1e-8)[0]
    start_point = np.concatenate([[constant], slope_D])
    fit = least_squares(residuals, start_point, jac=jacobian, max_nfev=200)  # pyright: ignore[reportArgumentType]
    return float(fit.cost), float(fit.x[0]), fit.x[1:]


def _reuse(
    parameters: Mapping, task: str, domains: tuple[str, ...]
) -> tuple[float, float, np.ndarray]:
    law = parameters.get("laws", {}).get(task)
    if law is None or set(law["b"]) != set(domains):
        raise EstimationError(
            f"parameters must hold the law of task {task} for the domains {', '.join(domains)}, "
            "got "
            f"{', '.join(law['b']) if law else 'none'}: fit without them."
        )
    return law["c"], law["k"], np.array([law["b"][domain] for domain in domains])
