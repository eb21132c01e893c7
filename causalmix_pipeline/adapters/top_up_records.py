"""Top-ups as they were planned: which runs, at which state of a live pool, kept before training.

The live pool goes on changing, so what was known of it when a run was planned is kept with the
plan; what the run came to is in the run store, under the key of its spec. Whatever is killed when,
a run that was trained is found again with its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value, write_value


@dataclass(frozen=True)
class TopUpPlan:
    """Runs planned at one state of a live pool.

    Attributes:
        state_hash: of the live pool as a pool state.
        domains: D names, in the order of mixtures and covariates.
        covariates: every covariate that was measured of the pool, by name; D values each.
        scorers: what they were measured by.
        eval_hash: evaluation of the runs.
        config: model and recipe of the runs, as JSON.
        code_version: of proxy training.
        numbers: of the runs, at this state.
        mixtures: of each run, D shares.
        keys: of each run's spec; names its record in the run store.
    """

    state_hash: str
    domains: list[str]
    covariates: dict[str, list[float]]
    scorers: list[str]
    eval_hash: str
    config: str
    code_version: int
    numbers: list[int]
    mixtures: list[list[float]]
    keys: list[str]

    def state(self, covariates: Sequence[str]) -> np.ndarray:
        """Covariates of the pool; shape (D, P)."""
        values = [self.covariates[name] for name in covariates]
        return np.array(values, dtype=float).reshape(len(values), len(self.domains)).T


def keep_top_up_plan(folder: Path, plan: TopUpPlan) -> None:
    """Keep a plan under the digest of its content, whole or not at all."""
    values = asdict(plan)
    write_value(folder / f"{content_digest(values)[:32]}.parquet", values)


def read_top_up_plans(folder: Path) -> list[TopUpPlan]:
    """Every plan that was kept, in an order that doesn't change.

    Raises:
        PoolError: if a plan's file was damaged.
    """
    return [TopUpPlan(**read_value(path)) for path in sorted(folder.glob("*.parquet"))]
