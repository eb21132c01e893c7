"""Proxies of several sizes: which pool state gets which, and how far a model's size is from them.

All mixtures of a pool state are trained at one size, so contrasts within a state stay free of it.
The size is a covariate of the run table, log2 of the number of parameters, the same in each
domain: estimators find how effects change with it, and answer for a size that is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from causalmix_pipeline.core.runs import SIZE_COVARIATE, RunTable
from causalmix_pipeline.core.sources import join_sources

#: Fewest pool states of a size: below it, a size can't be told from the states it happened to get.
FEWEST_STATES = 3

#: Doublings by which two sizes may differ and count as one.
SAME_SIZE = 0.05

#: Least span of the sizes trained that distances are compared with, in doublings: with sizes that
#: are nearer to each other, or one alone, effects are still read on by that much at most.
LEAST_SPAN = 1.0

#: Steps by which states walk through the sizes: of all, the golden ratio's fill any first states
#: most evenly.
_GOLDEN = (math.sqrt(5) - 1) / 2

#: Keeps the draw of sizes apart from those of states and mixtures.
_SEED_PLACE = 2**33


def log2_parameters(n_parameters: float) -> float:
    """A model's size in doublings, as `SIZE_COVARIATE` has it."""
    return math.log2(n_parameters)


def sizes_of_states(n_states: int, shares: Sequence[float], *, seed: int) -> np.ndarray:
    """Which size each pool state is trained at: 0 for the recipe's own, k for the k-th further.

    A state's size depends on its number and the shares alone, so it stays when states are added.
    Any first states have each size about as often as its share says.

    Args:
        n_states: M.
        shares: of each further size, > 0, sum below 1; the rest is the recipe's own size.
        seed: the design's.

    Returns:
        Shape (M,), integers.
    """
    start = np.random.default_rng([seed, _SEED_PLACE]).uniform()
    place_M = (start + _GOLDEN * np.arange(n_states)) % 1
    size_M = np.searchsorted(np.cumsum(shares), place_M, side="right") + 1
    return np.where(size_M > len(shares), 0, size_M)


@dataclass(frozen=True)
class SizeReach:
    """How far a model's size is from those of the runs, in doublings of its parameters.

    Attributes:
        asked: log2 of the parameters of the model that is asked for.
        least: of the smallest proxy.
        most: of the largest proxy.
    """

    asked: float
    least: float
    most: float

    @property
    def span(self) -> float:
        """Doublings from the smallest to the largest proxy, 1 at least."""
        return max(self.most - self.least, LEAST_SPAN)

    @property
    def distance(self) -> float:
        """Doublings beyond the sizes trained; 0 within."""
        beyond = max(self.asked - self.most, self.least - self.asked)
        return beyond if beyond > SAME_SIZE else 0.0

    @property
    def read_at(self) -> float:
        """The size that effects are read at: the one asked for, at most one span beyond the runs'.

        Read on without end, gains grew at sizes where the true ones shrank.
        """
        return float(np.clip(self.asked, self.least - self.span, self.most + self.span))

    @property
    def doubt(self) -> float:
        """What standard errors of gains are multiplied by: 1 within, and half more for each span.

        Simulated with effects that shrink by 0 to 20% a doubling, each domain's at its own rate,
        and sizes two doublings apart: of the mixtures that looked best, 90% intervals of the
        response surface held the true gain in 88% to 95% at 1 to 6 doublings beyond, and so
        widened in 98% or more; read at the largest size trained, in 72% to 90%.
        """
        return 1.0 + 0.5 * self.distance / self.span

    def to_dict(self) -> dict[str, float]:
        """Plain values, in parameters and doublings."""
        return {
            "parameters": 2**self.asked,
            "least_parameters": 2**self.least,
            "most_parameters": 2**self.most,
            "read_at_parameters": 2**self.read_at,
            "doublings_beyond": self.distance,
            "doubt": self.doubt,
        }


def size_words(verdict: str, size: Mapping[str, Any] | None) -> str | None:
    """What a verdict means where the size of the model alone is out of reach; None elsewhere.

    Args:
        verdict: of pool and size together.
        size: what `SizeReach.to_dict` gave, and `pool_verdict`; None where sizes aren't told.
    """
    if size is None or verdict != "extrapolating" or size["pool_verdict"] != "supported":
        return None
    return "proxy runs have seen pools like this one, but no model of this size"


def size_sentence(size: Mapping[str, Any]) -> str:
    """What model the mixture is for, and how far that is from the proxies."""
    least, most = (f"{size[name]:,.0f}" for name in ("least_parameters", "most_parameters"))
    start = f"For a model of {size['parameters']:,.0f} parameters; proxies had {least} to {most}"
    if not size["doublings_beyond"]:
        return f"{start}."
    read_at, width = size["read_at_parameters"], f"{size['doubt']:.2f} times as wide."
    doublings = f"{start}, {size['doublings_beyond']:.1f} doublings away"
    if math.isclose(read_at, size["parameters"]):
        return f"{doublings}, so the interval is {width}"
    return f"{doublings}: effects are read at {read_at:,.0f}, and the interval is {width}"


def size_reach(runs: RunTable, state_DP: np.ndarray) -> SizeReach | None:
    """How far the size in a state's covariates is from the runs'; None where sizes aren't told."""
    if (size_N := runs.size_N) is None:
        return None
    column = runs.covariates.index(SIZE_COVARIATE)
    return SizeReach(float(state_DP[0, column]), float(size_N.min()), float(size_N.max()))


def at_size(covariates: Sequence[str], state_DP: np.ndarray, size: float) -> np.ndarray:
    """The same pool for a model of another size; as it is where sizes aren't told."""
    state_DP = np.array(state_DP, dtype=float)
    if SIZE_COVARIATE in covariates:
        state_DP[:, list(covariates).index(SIZE_COVARIATE)] = size
    return state_DP


def nearest_size(sizes: Sequence[float], asked: float) -> int:
    """Position of the size nearest to the one asked for; the smaller of two as near."""
    return min(range(len(sizes)), key=lambda k: (abs(sizes[k] - asked), sizes[k]))


def at_trained_size(runs: RunTable, state_DP: np.ndarray) -> np.ndarray:
    """The same pool for the nearest size that was trained; as it is where sizes aren't told."""
    reach = size_reach(runs, state_DP)
    if reach is None or runs.size_N is None:
        return state_DP
    sizes = np.unique(runs.size_N).tolist()
    return at_size(runs.covariates, state_DP, sizes[nearest_size(sizes, reach.asked)])


def without_size(runs: RunTable) -> RunTable:
    """The runs as if their size weren't known; a pool trained at two sizes is one state again."""
    if SIZE_COVARIATE not in runs.covariates:
        return runs
    column = runs.covariates.index(SIZE_COVARIATE)
    state_NDP = np.delete(runs.state_NDP, column, axis=2)
    _, source_N = np.unique(runs.sources_of_runs, return_inverse=True)
    told_NC = np.column_stack([source_N, state_NDP.reshape(runs.n_runs, -1)])
    if state_NDP.shape[2]:
        _, state_N = np.unique(told_NC, axis=0, return_inverse=True)
    else:
        state_N = runs.state_ids
    return replace(
        runs,
        covariates=tuple(name for name in runs.covariates if name != SIZE_COVARIATE),
        state_ids=state_N.ravel(),
        state_NDP=state_NDP,
    )


def on_one_level(runs: RunTable) -> RunTable:
    """The runs on the level of the commonest size, for what can't tell sizes apart.

    A larger proxy's losses lie lower, and a method that sees only mixtures would give them the
    credit. Levels are taken off as those of imported runs are; see `core.sources.join_sources`.
    """
    if runs.size_N is None:
        return runs
    kinds = list(zip(runs.sources_of_runs, runs.size_N.tolist(), strict=True))
    (common, _), *others = Counter(kinds).most_common()
    blind = replace(without_size(runs), observational_sources=())
    if not others:
        return blind
    same_N = np.array([kind == common for kind in kinds])
    own = replace(blind.subset(same_N), source_N=None)
    names = [f"{source} at {size:g}" for source, size in kinds]
    away = [name for name, same in zip(names, same_N, strict=True) if not same]
    rest = replace(_own_states(blind.subset(~same_N), away), source_N=tuple(away))
    level = replace(join_sources(own, rest).runs, source_N=None)
    place = {run: i for i, run in enumerate(level.run_ids)}
    return level.subset([place[run] for run in runs.run_ids])


def _own_states(runs: RunTable, labels: Sequence[str]) -> RunTable:
    """The runs with states that no two labels share."""
    _, label_N = np.unique(np.array(labels), return_inverse=True)
    told_NC = np.column_stack([label_N, runs.state_ids])
    _, state_N = np.unique(told_NC, axis=0, return_inverse=True)
    return replace(runs, state_ids=state_N.ravel())
