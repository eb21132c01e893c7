"""Mixtures for other weights of the tasks, so that a reader can ask what another wish would bring.

Each is searched with the pieces of `core.optimum`, more shortly than the recommended mixture: from
the best of candidates that all weights share, a few steps of its programming.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import comb

import numpy as np

from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.effects import EffectEstimator, Gain
from causalmix_pipeline.core.optimum import candidates, polish
from causalmix_pipeline.core.policy import Question, ask

#: Most tasks whose weights can be moved; the heaviest, where there are more.
MOST_MOVED = 6
#: Points times domains, and times tasks that may count, about what a second or two of search can
#: do; and the most points.
POINTS_TIMES_DOMAINS, POINTS_TIMES_TASKS, MOST_POINTS = 240, 120, 40
#: Iterations of the search for each point, with few domains and with many.
FEW_DOMAINS, ITERATIONS, FEW_ITERATIONS = 16, 10, 6


def moved_tasks(weights_T: np.ndarray) -> list[int]:
    """Positions of the tasks whose weights can be moved, heaviest first; [] where none can.

    Those that count; where fewer than two do, those that are only reported as well.
    """
    order = np.argsort(-weights_T, kind="stable")
    counted = [int(t) for t in order if weights_T[t] > 0]
    chosen = counted if len(counted) > 1 else [int(t) for t in order]
    return chosen[:MOST_MOVED] if len(chosen) > 1 else []


def weight_points(weights_T: np.ndarray, n_domains: int) -> np.ndarray:
    """Task weights to make mixtures for, the given ones first; shape (W, T), each row sums to 1.

    Then those half-way to each task alone, each task alone, and the finest lattice for which there
    is room. Weights of tasks that can't be moved stay.
    """
    moved = moved_tasks(weights_T)
    own_V = weights_T[moved]
    total, n_moved = float(own_V.sum()), len(moved)
    n_asked = len(set(moved) | set(np.flatnonzero(weights_T).tolist()))
    most = min(POINTS_TIMES_DOMAINS // n_domains, POINTS_TIMES_TASKS // n_asked, MOST_POINTS)
    room = max(n_moved + 1, most)
    alone_VV = total * np.eye(n_moved)
    points_WV = np.vstack([own_V, (own_V + alone_VV) / 2])
    if room >= len(points_WV) + n_moved:
        points_WV = np.vstack([points_WV, alone_VV])
        fits = [n for n in range(2, 21) if comb(n + n_moved - 1, n) <= room - len(points_WV)]
        if fits:
            points_WV = np.vstack([points_WV, total * _lattice(n_moved, fits[-1])])
    _, first = np.unique(points_WV.round(9), axis=0, return_index=True)
    weights_WT = np.repeat(np.asarray(weights_T, dtype=float)[None], len(first), axis=0)
    weights_WT[:, moved] = points_WV[np.sort(first)]
    return weights_WT


def _lattice(n_parts: int, n_steps: int) -> np.ndarray:
    """All ways to divide 1 among parts in whole steps."""
    rows = []
    for bars in combinations(range(n_steps + n_parts - 1), n_parts - 1):
        edges = (-1, *bars, n_steps + n_parts - 1)
        rows.append([b - a - 1 for a, b in pairwise(edges)])
    return np.array(rows) / n_steps


def mixtures_for(
    weights_WT: np.ndarray,
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    constraints: Constraints,
    *,
    domains: Sequence[str],
    tasks: Sequence[str],
    recommended_D: np.ndarray,
    confidence_z: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """The best mixture found for each row of task weights.

    Args:
        weights_WT: weights of the estimator's tasks; the recommended mixture is that of the first.
        estimator: as `core.policy.recommend` takes it, as are the others.
        state_DP: the pool's covariates.
        constraints: what every mixture keeps to.
        domains: names, for messages.
        tasks: names of the estimator's tasks, for guard rails.
        recommended_D: the recommended mixture.
        confidence_z: standard errors taken off gains.
        seed: of the candidates.

    Returns:
        Mixtures, shape (W, D).
    """

    def question(weights_T: np.ndarray) -> Question:
        return ask(estimator, state_DP, weights_T, constraints, tasks, confidence_z)

    reference_D = constraints.reference_D
    quick = getattr(estimator, "smooth_gain", estimator.gain)
    if np.isnan(quick(state_DP, reference_D[None], reference_D).mean_MT).any():
        quick = estimator.gain
    tried_MD = constraints.project(candidates(constraints, seed, [recommended_D]), domains)
    gain = quick(state_DP, tried_MD, reference_D)
    iterations = ITERATIONS if len(domains) <= FEW_DOMAINS else FEW_ITERATIONS
    for weights_T in weights_WT[1:]:
        asked = question(weights_T)
        value_M, excess_M = asked.judge_gain(gain)
        best_D = tried_MD[_first(value_M, excess_M)]
        scale = float(np.ptp(value_M)) or 1.0
        judge = asked.quick_judge()
        found_1D = polish(judge, constraints, domains, best_D, scale, iterations)[None]
        tried_MD = np.vstack([tried_MD, found_1D])
        gain = _joined(gain, quick(state_DP, found_1D, reference_D))
    # Each is good for some weights, and may serve others better than what was found for them.
    last_MD = np.vstack([recommended_D, tried_MD[0], tried_MD[-len(weights_WT) + 1 :]])
    last = estimator.gain(state_DP, last_MD, reference_D)
    chosen = [_first(*question(weights_T).judge_gain(last)) for weights_T in weights_WT[1:]]
    return last_MD[[0, *chosen]]


def _first(value_M: np.ndarray, excess_M: np.ndarray) -> int:
    """The best of those that keep the guard rails, else the one that passes them least."""
    return int(np.lexsort((-value_M, np.maximum(excess_M, 0)))[0])


def _joined(some: Gain, more: Gain) -> Gain:
    return Gain(
        np.vstack([some.mean_MT, more.mean_MT]),
        np.vstack([some.se_MT, more.se_MT]),
    )
