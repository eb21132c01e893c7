"""Simpler ways to a mixture, which the recommended one is held against.

Each needs nothing but a table of runs, and none knows the pool's state. What learns by an outside
library comes in as a function (`adapters.baseline_mixtures`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import comb

import numpy as np

from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.effects import center_by_state, has_contrasts
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import check_mixture, kl_divergence
from causalmix_pipeline.core.optimum import find_optimum
from causalmix_pipeline.core.runs import RunTable

#: Candidates of RegMix, how many of the best are averaged, and the range of their Dirichlet
#: strength (arXiv 2407.01492).
REGMIX_CANDIDATES, REGMIX_BEST, REGMIX_STRENGTH = 100_000, 128, (0.1, 5.0)

#: Least natural share: a domain without text would have no candidate, or an infinite divergence.
LEAST_NATURAL = 1e-3

#: Runs that a point of the grid shall have on average.
RUNS_A_POINT = 4

#: Penalty of `log_linear` on the divergence from the natural mixture: standard deviations of the
#: runs' weighted outcome a nat. OLMix leaves its own to the user.
KL_PENALTY = 0.1

#: Bounds of `dmo`'s k, a and b, and where each search starts; shares stand for tokens.
DMO_BOUNDS = ((1e-4, 0.1, 0.01), (10.0, 1.0, 5.0))
DMO_STARTS = ((0.1, 0.5, 0.3), (1.0, 0.9, 1.0), (0.01, 0.9, 0.1))

#: Expected outcome of mixtures (M, D) on each task: (M, T), larger is better.
Predict = Callable[[np.ndarray], np.ndarray]


def equal(n_domains: int) -> np.ndarray:
    """The same share of each domain; shape (D,)."""
    return np.full(n_domains, 1 / n_domains)


def natural(tokens_D: np.ndarray) -> np.ndarray:
    """The pool's own token shares; shape (D,)."""
    tokens_D = np.asarray(tokens_D, dtype=float)
    if not (tokens_D >= 0).all() or not tokens_D.sum() > 0:
        raise ConfigError(
            f"natural needs tokens >= 0 of each domain, one above 0, got {tokens_D.tolist()}: "
            "correct them."
        )
    return tokens_D / tokens_D.sum()


def fixed(shares_D: np.ndarray) -> np.ndarray:
    """A mixture tuned by hand, checked; shape (D,)."""
    return check_mixture(shares_D, field="fixed mixture")


def grid(runs: RunTable, weights_T: np.ndarray, n_steps: int | None = None) -> np.ndarray:
    """The best point of a simplex lattice of proxy runs.

    Runs seldom lie on a lattice, so each counts for the lattice point nearest to it; the point with
    the highest mean of weighted outcomes wins. Outcomes are taken within pool states, where states
    have several mixtures. A point with a single lucky run can win: so it is with grids.

    Args:
        runs: the proxy runs.
        weights_T: weight of each task.
        n_steps: shares are multiples of 1 / n_steps; None for the finest lattice with some
            `RUNS_A_POINT` runs a point, 2 at least.
    """
    n_domains = len(runs.domains)
    if n_steps is None:
        n_steps = 2
        while comb(n_domains + n_steps, n_steps + 1) * RUNS_A_POINT <= runs.n_runs:
            n_steps += 1
    point_ND = snap(runs.mixture_ND, n_steps)
    points, inverse_N = np.unique(point_ND, axis=0, return_inverse=True)
    value_N = within_states(runs) @ weights_T
    inverse_N = inverse_N.ravel()
    mean_C = np.bincount(inverse_N, value_N) / np.bincount(inverse_N)
    return points[int(np.argmax(mean_C))] / n_steps


def snap(mixture_ND: np.ndarray, n_steps: int) -> np.ndarray:
    """Whole steps that sum to `n_steps`, nearest to each mixture; largest remainders go up."""
    scaled_ND = mixture_ND * n_steps
    floor_ND = np.floor(scaled_ND + 1e-9)
    missing_N = np.rint(n_steps - floor_ND.sum(axis=1)).astype(int)
    rank_ND = np.argsort(np.argsort(floor_ND - scaled_ND, axis=1, kind="stable"), axis=1)
    return (floor_ND + (rank_ND < missing_N[:, None])).astype(int)


def within_states(runs: RunTable) -> np.ndarray:
    """Outcomes with the differences between pool states taken out, where runs allow it; (N, T)."""
    if not has_contrasts(runs):
        return runs.outcome_NT
    return center_by_state(runs.outcome_NT, runs.groups) + runs.outcome_NT.mean(axis=0)


def regmix(
    predict: Predict, natural_D: np.ndarray, weights_T: np.ndarray, *, seed: int
) -> np.ndarray:
    """RegMix: the mean of the candidates around the natural mixture that are predicted best.

    Source: arXiv 2407.01492; Dirichlet candidates whose strength is log-uniform in .1-5.

    Args:
        predict: LightGBM fitted on the mixtures of the runs alone.
        natural_D: token shares.
        weights_T: weight of each task.
        seed: of the candidates.
    """
    rng = np.random.default_rng([seed, 2])
    low, high = np.log(REGMIX_STRENGTH)
    strength_M = np.exp(rng.uniform(low, high, REGMIX_CANDIDATES))
    alpha_MD = strength_M[:, None] * len(natural_D) * np.maximum(natural_D, LEAST_NATURAL)
    gamma_MD = np.maximum(rng.standard_gamma(alpha_MD), 1e-300)
    candidate_MD = gamma_MD / gamma_MD.sum(axis=1, keepdims=True)
    best = np.argsort(-(predict(candidate_MD) @ weights_T), kind="stable")[:REGMIX_BEST]
    return candidate_MD[best].mean(axis=0)


def log_linear(
    predict: Predict,
    natural_D: np.ndarray,
    weights_T: np.ndarray,
    *,
    scale: float,
    seed: int = 0,
) -> np.ndarray:
    """The optimum of the laws c + k exp(b . t) less a penalty on KL(t || natural).

    Source: J. Ye et al., Data mixing laws (arXiv 2403.16952); the penalised optimum is OLMix's.

    Args:
        predict: the laws, fitted on the runs.
        natural_D: token shares.
        weights_T: weight of each task.
        scale: standard deviation of the runs' weighted outcome, the unit of `KL_PENALTY`.
        seed: of the search.
    """
    prior_D = np.maximum(natural_D, LEAST_NATURAL)
    prior_D = prior_D / prior_D.sum()

    def value(mixture_MD: np.ndarray) -> np.ndarray:
        penalty_M = KL_PENALTY * scale * kl_divergence(mixture_MD, prior_D)
        return predict(mixture_MD) @ weights_T - penalty_M

    return _best_on_simplex(value, prior_D, seed)


def dmo(
    runs: RunTable,
    weights_T: np.ndarray,
    metric_of: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """The optimum of a saturation law for each domain's own loss.

    L_d = C (N_d + k (N - N_d)^a)^(-b) + E, where N_d are the domain's tokens: what it learns of
    itself, and less of all others. For a <= 1 the weighted sum of laws is convex. A table has
    shares, not tokens, so N is 1, which changes C and k alone. Source: Y. Li, Z. Liu, E. Xing, Data
    Mixing Optimization for Supervised Fine-Tuning (arXiv 2508.11953), which makes 4 D + 1 runs for
    it; here it learns from those at hand.

    Args:
        runs: the proxy runs.
        weights_T: weight of each task.
        metric_of: by domain, the task that measures it; None takes the one of the same name.
        seed: of the search.

    Raises:
        ConfigError: if a domain has no task, or no task of a domain has a weight. The law is one of
            a domain's own loss: for others there is none.
    """
    metric_of = dict(metric_of or {name: name for name in runs.domains if name in runs.tasks})
    lacking = [name for name in runs.domains if metric_of.get(name) not in runs.tasks]
    if lacking:
        raise ConfigError(
            f"dmo needs a metric of each domain, got none for {', '.join(lacking)} among "
            f"{', '.join(runs.tasks)}: name metrics like their domains, or leave dmo out."
        )
    task_D = np.array([runs.tasks.index(metric_of[name]) for name in runs.domains])
    weight_D = np.asarray(weights_T, dtype=float)[task_D]
    if not (weight_D > 0).any():
        raise ConfigError(
            f"dmo needs a metric of a domain with a weight, got none above 0 for "
            f"{', '.join(runs.domains)}: weigh one, or leave dmo out."
        )
    loss_NT = -within_states(runs)
    laws = [
        _fit_saturation(runs.mixture_ND[:, d], loss_NT[:, t]) if weight_D[d] > 0 else None
        for d, t in enumerate(task_D)
    ]

    def value(mixture_MD: np.ndarray) -> np.ndarray:
        total_M = np.zeros(len(mixture_MD))
        for d, law in enumerate(laws):
            if law is not None:
                total_M -= weight_D[d] * saturation(mixture_MD[:, d], *law)
        return total_M

    return _best_on_simplex(value, equal(len(runs.domains)), seed)


def saturation(
    share_M: np.ndarray, size: float, floor: float, k: float, a: float, b: float
) -> np.ndarray:
    """The law's loss, size (share + k (1 - share)^a)^(-b) + floor; shape (M,)."""
    share_M = np.clip(share_M, 0.0, 1.0)
    return size * (share_M + k * (1 - share_M) ** a) ** (-b) + floor


def _fit_saturation(
    share_N: np.ndarray, loss_N: np.ndarray
) -> tuple[float, float, float, float, float]:
    """Size >= 0, floor, k, a and b of the least squares; the first two follow from the others."""
    from scipy.optimize import least_squares

    scale = float(loss_N.std()) or 1.0

    def linear(shape: np.ndarray) -> tuple[float, float]:
        unit_N = saturation(share_N, 1.0, 0.0, *np.exp(shape))
        centered_N = unit_N - unit_N.mean()
        spread = float(centered_N @ centered_N)
        size = max(float(centered_N @ loss_N) / spread, 0.0) if spread > 0 else 0.0
        return size, float(loss_N.mean() - size * unit_N.mean())

    def residuals(shape: np.ndarray) -> np.ndarray:
        return (saturation(share_N, *linear(shape), *np.exp(shape)) - loss_N) / scale

    bounds = (np.log(DMO_BOUNDS[0]), np.log(DMO_BOUNDS[1]) + 1e-12)
    fits = [least_squares(residuals, np.log(start), bounds=bounds) for start in DMO_STARTS]
    best = min(fits, key=lambda fit: fit.cost).x
    k, a, b = (float(value) for value in np.exp(best))
    return (*linear(best), k, a, b)


def _best_on_simplex(
    value: Callable[[np.ndarray], np.ndarray], start_D: np.ndarray, seed: int
) -> np.ndarray:
    """The mixture of the highest value."""
    domains = [f"domain {d + 1}" for d in range(len(start_D))]

    def judge(mixture_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return value(mixture_MD), np.full(len(mixture_MD), -np.inf)

    constraints = Constraints.simplex_only(start_D)
    return find_optimum(judge, judge, constraints, domains, seed).mixture_D
