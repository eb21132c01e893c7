"""Baselines of `core.baselines` with what they learn by: LightGBM and the log-linear law."""

from __future__ import annotations

import numpy as np

from causalmix_pipeline.adapters.lightgbm_surface import LightGBMSurface
from causalmix_pipeline.adapters.log_linear import LogLinear
from causalmix_pipeline.core import baselines
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import on_one_level


def make_baselines(
    runs: RunTable,
    weights_T: np.ndarray,
    natural_D: np.ndarray | None = None,
    fixed_D: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every baseline that can be made of these runs, by name.

    Args:
        runs: the proxy runs.
        weights_T: weight of each task.
        natural_D: token shares; None where tokens are unknown: RegMix and the log-linear law then
            take the equal mixture for it.
        fixed_D: a mixture tuned by hand.
        seed: of candidates and searches.

    Returns:
        `equal`, `natural` and `fixed` where given, `grid`, `regmix`, `log_linear`, and `dmo` where
        each domain has a task of its name, one of them with a weight.
    """
    runs = on_one_level(runs)  # they see mixtures alone, not that a larger proxy loses less
    equal_D = baselines.equal(len(runs.domains))
    mixtures = {"equal": equal_D}
    if natural_D is not None:
        mixtures["natural"] = baselines.natural(natural_D)
    if fixed_D is not None:
        mixtures["fixed"] = baselines.fixed(fixed_D)
    around_D = mixtures.get("natural", equal_D)
    mixtures["grid"] = baselines.grid(runs, weights_T)
    mixtures["regmix"] = regmix_mixture(runs, around_D, weights_T, seed=seed)
    mixtures["log_linear"] = log_linear_mixture(runs, around_D, weights_T, seed=seed)
    weight_of = dict(zip(runs.tasks, weights_T, strict=True))
    if all(d in weight_of for d in runs.domains) and any(weight_of[d] > 0 for d in runs.domains):
        mixtures["dmo"] = baselines.dmo(runs, weights_T, seed=seed)
    return mixtures


def regmix_mixture(
    runs: RunTable, natural_D: np.ndarray, weights_T: np.ndarray, *, seed: int
) -> np.ndarray:
    """RegMix's mixture, by LightGBM on the mixtures of the runs; see `core.baselines.regmix`."""
    weights_T = np.asarray(weights_T, dtype=float)
    wanted = [task for task, weight in zip(runs.tasks, weights_T, strict=True) if weight > 0]
    trees = LightGBMSurface(seed=seed).fit(runs.select_tasks(wanted))
    return baselines.regmix(
        lambda mixture_MD: trees.predict(runs.state_NDP[0], mixture_MD),
        natural_D,
        weights_T[weights_T > 0],
        seed=seed,
    )


def log_linear_mixture(
    runs: RunTable, natural_D: np.ndarray, weights_T: np.ndarray, *, seed: int
) -> np.ndarray:
    """The data mixing laws' mixture; see `core.baselines.log_linear`."""
    weights_T = np.asarray(weights_T, dtype=float)
    wanted = [task for task, weight in zip(runs.tasks, weights_T, strict=True) if weight > 0]
    laws = LogLinear().fit(runs.select_tasks(wanted))
    return baselines.log_linear(
        lambda mixture_MD: laws.predict(runs.state_NDP[0], mixture_MD),
        natural_D,
        weights_T[weights_T > 0],
        scale=float((baselines.within_states(runs) @ weights_T).std()),
        seed=seed,
    )
