"""The Pareto front of two tasks: what one must give for the other, inside the constraints.

The weight of the first task is swept from 0 to 1, and the optimum is sought for each. So the front
is that of weighted sums: points in a dent of it, which no weights prefer, are not found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.effects import EffectEstimator, Gain
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.optimum import find_optimum
from causalmix_pipeline.core.policy import ask

#: Weights that are swept.
N_POINTS = 21


def pareto_front(
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    first: str,
    second: str,
    constraints: Constraints,
    *,
    domains: Sequence[str],
    tasks: Sequence[str],
    n_points: int = N_POINTS,
    confidence_z: float = 1.0,
    seed: int = 0,
) -> pl.DataFrame:
    """The mixtures of which none is better in both tasks.

    Args:
        estimator: fitted on these two tasks, and on those with a guard rail.
        state_DP: the pool's covariates.
        first: name of a task.
        second: name of another.
        constraints: what the mixtures must respect; gains are measured from their reference.
        domains: names of the columns.
        tasks: names of the estimator's tasks.
        n_points: weights to sweep, at least 2.
        confidence_z: standard errors taken off the weighted gain before it is maximised.
        seed: of the searches.

    Returns:
        A column for each domain, then `gain_first`, `gain_first_se`, `gain_second`,
        `gain_second_se` (null where there is none), from the best in the second task to the best
        in the first; at most `n_points` rows.

    Raises:
        ConfigError: if the tasks are unknown or the same, or no mixture is allowed.
    """
    for name in (first, second):
        if name not in tasks:
            raise ConfigError(
                f"pareto must name two metrics of {', '.join(tasks)}, got {name}: correct the name."
            )
    if first == second or n_points < 2:
        raise ConfigError(
            f"pareto must name two metrics and n_points >= 2, got {first}, {second} and "
            f"{n_points}: name another, or ask for more points."
        )
    pair = [list(tasks).index(first), list(tasks).index(second)]
    mixture_MD = _sweep(
        estimator, state_DP, pair, constraints, domains, tasks, n_points, confidence_z, seed
    )
    gain = estimator.gain(state_DP, mixture_MD, constraints.reference_D)
    return _frame(mixture_MD, gain, pair, domains)


def _sweep(
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    pair: list[int],
    constraints: Constraints,
    domains: Sequence[str],
    tasks: Sequence[str],
    n_points: int,
    confidence_z: float,
    seed: int,
) -> np.ndarray:
    """The optimum for each weight, both ends first: they tell the scale of each gain."""

    def best(weight_2: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
        weights_T = np.zeros(len(tasks))
        weights_T[pair] = weight_2
        question = ask(estimator, state_DP, weights_T, constraints, tasks, confidence_z)
        judges = (question.quick_judge(), question.judge)
        return find_optimum(*judges, constraints, domains, seed, starts).mixture_D

    ends = [best(np.array([0.0, 1.0]), []), best(np.array([1.0, 0.0]), [])]
    gain_MT = estimator.gain(state_DP, np.stack(ends), constraints.reference_D).mean_MT[:, pair]
    scale_2 = np.ptp(gain_MT, axis=0)
    scale_2 = np.where(scale_2 > 0, scale_2, 1.0)
    found = [ends[0]]
    for share in np.linspace(0, 1, n_points)[1:-1]:
        found.append(best(np.array([share, 1 - share]) / scale_2, [found[-1], *ends]))
    return np.stack([*found, ends[1]])


def _frame(
    mixture_MD: np.ndarray, gain: Gain, pair: list[int], domains: Sequence[str]
) -> pl.DataFrame:
    """Those that no other beats in one gain without losing in the other, each once."""
    gain_M2, se_M2 = gain.mean_MT[:, pair], gain.se_MT[:, pair]
    beaten = [
        bool(((gain_M2 >= gain_2).all(axis=1) & (gain_M2 > gain_2).any(axis=1)).any())
        for gain_2 in gain_M2
    ]
    columns = {name: mixture_MD[:, d] for d, name in enumerate(domains)}
    for i, name in enumerate(("gain_first", "gain_second")):
        columns |= {name: gain_M2[:, i], f"{name}_se": se_M2[:, i]}
    frame = pl.DataFrame(columns).filter(~pl.Series(beaten))
    frame = frame.with_columns(pl.col("gain_first_se", "gain_second_se").fill_nan(None))
    kept = frame.unique(["gain_first", "gain_second"], maintain_order=True)
    return kept.sort("gain_first", "gain_second", descending=[False, True])
