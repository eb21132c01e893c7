"""The design: which pool states and mixtures get a proxy run.

States and mixtures are drawn independently of each other. N runs are N / 4 states x 4 mixtures:
contrasts within a state are free of anything else about the pool. Run i is the same whatever N
is, so growing N trains only the new runs. A small panel repeats a few mixtures with other seeds:
the noise floor.

With stages, a run has several mixtures, one after the other; each is drawn as a run's single one
would be, independently of the others. The run's mixture is then their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import staged_dirichlet_design

#: Most stages of a run. The mean of many random mixtures is nearly the equal one, in every run.
MOST_STAGES = 5


@dataclass(frozen=True)
class DesignPlan:
    """How many proxy runs to make and how they spread.

    Attributes:
        n_runs: distinct (pool state, mixture) pairs.
        mixtures_per_state: mixtures trained on each pool state.
        strength_range: Dirichlet concentrations of the mixtures, from sparse to flat.
        panel_mixtures: pairs that are repeated with other seeds.
        panel_seeds: seeds of each repeated pair, the first included.
        seed: of states, mixtures and data order.
        stages: equal parts of each run that have a mixture of their own; 1 to `MOST_STAGES`.
    """

    n_runs: int = 128
    mixtures_per_state: int = 4
    strength_range: tuple[float, float] = (0.4, 3.0)
    panel_mixtures: int = 4
    panel_seeds: int = 3
    seed: int = 0
    stages: int = 1

    def __post_init__(self) -> None:
        """Check the counts."""
        least = {"n_runs": 1, "mixtures_per_state": 1, "panel_seeds": 1, "panel_mixtures": 0,
                 "seed": 0}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"design.{name} must be >= {low}, got {getattr(self, name)}.")
        if not 1 <= self.stages <= MOST_STAGES:
            raise ConfigError(
                f"design.stages must be 1 to {MOST_STAGES}, got {self.stages}. Write 1 for one "
                "mixture a run."
            )

    @property
    def n_states(self) -> int:
        """Pool states that the runs need."""
        return -(-self.n_runs // self.mixtures_per_state)


@dataclass(frozen=True, eq=False)
class Design:
    """The proxy runs to make, one entry each; repeats of the noise panel come last.

    Attributes:
        state_N: pool state of each run.
        mixture_ND: mixture of each run; the mean over its stages where it has some.
        data_seed_N: seed of the run's order of domains.
        cell_N: index of the distinct (state, mixture) pair; repeats share it.
        stage_mixture_NSD: mixture of each stage of each run; None where a run has one mixture.
    """

    state_N: np.ndarray
    mixture_ND: np.ndarray
    data_seed_N: np.ndarray
    cell_N: np.ndarray
    stage_mixture_NSD: np.ndarray | None = None


def make_design(plan: DesignPlan, n_domains: int) -> Design:
    """List the proxy runs of a plan.

    Args:
        plan: counts, spread and seed.
        n_domains: D, >= 2.

    Raises:
        ConfigError: if there are fewer than two domains.
    """
    if n_domains < 2:
        raise ConfigError(
            f"domains must be at least 2 to have a mixture, got {n_domains}. Check "
            "pools.experiment and columns.domain."
        )
    stages_NSD = staged_dirichlet_design(
        plan.n_runs, plan.stages, n_domains, strength_range=plan.strength_range, seed=plan.seed
    )
    mixture_ND = stages_NSD[:, 0] if plan.stages == 1 else stages_NSD.mean(axis=1)
    # One panel pair per state, so that the floor isn't that of one state.
    panel = np.arange(plan.panel_mixtures) * plan.mixtures_per_state
    panel = panel[panel < plan.n_runs]
    repeats = np.arange(1, plan.panel_seeds)
    cell_N = np.concatenate([np.arange(plan.n_runs), np.repeat(panel, len(repeats))])
    repeat_N = np.concatenate([np.zeros(plan.n_runs, dtype=int), np.tile(repeats, len(panel))])
    seeds = [
        int(np.random.SeedSequence([plan.seed, int(cell), int(k)]).generate_state(1)[0])
        for cell, k in zip(cell_N, repeat_N, strict=True)
    ]
    return Design(
        state_N=cell_N // plan.mixtures_per_state,
        mixture_ND=mixture_ND[cell_N],
        data_seed_N=np.array(seeds, dtype=np.int64),
        cell_N=cell_N,
        stage_mixture_NSD=None if plan.stages == 1 else stages_NSD[cell_N],
    )
