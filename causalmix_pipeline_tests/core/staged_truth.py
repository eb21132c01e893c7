"""Staged runs with a known truth: what each stage's mixture does, and what it leaves."""

from __future__ import annotations

import numpy as np

from causalmix_pipeline.core.design import DesignPlan, make_design
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stages import StagedRuns

DOMAINS = ("a", "b", "c", "d")
#: Effect of sqrt(share) of each domain in each of three stages: another domain is best in each.
EFFECT_SD = np.array([[0.1, -0.2, 0.1, 0.5], [-0.3, 0.6, -0.2, -0.3], [0.4, 0.0, 0.2, 0.1]])


def staged_truth(
    kind: str = "order", *, n_stages: int = 2, n_runs: int = 96, seed: int = 0, noise: float = 0.02
) -> StagedRuns:
    """Runs on four domains, two covariates each, and two tasks.

    Args:
        kind: `order`: each stage has effects of its own. `mean`: only the mean mixture counts.
            `sum`: each stage has the same effects. `recency`: the same, and later ones weigh more.
        n_stages: at most 3.
        n_runs: without the noise panel.
        seed: of design and noise.
        noise: standard deviation of outcomes.
    """
    rng = np.random.default_rng(seed)
    design = make_design(DesignPlan(n_runs=n_runs, stages=n_stages, seed=seed), len(DOMAINS))
    assert design.stage_mixture_NSD is not None
    mixture_NSD = design.stage_mixture_NSD
    state_MDP = rng.normal(size=(design.state_N.max() + 1, len(DOMAINS), 2))
    state_NDP = state_MDP[design.state_N]
    effect_NSD = np.stack([effect_at(state_NDP, k, kind) for k in range(n_stages)], axis=1)
    root_NSD = np.sqrt(design.mixture_ND[:, None] if kind == "mean" else mixture_NSD)
    outcome_N = -3 + 0.1 * state_NDP.sum((1, 2)) + (root_NSD * effect_NSD).sum((1, 2))
    n_all = len(outcome_N)
    runs = RunTable(
        domains=DOMAINS,
        covariates=("p", "q"),
        tasks=("first", "second"),
        run_ids=tuple(f"r{i:04d}" for i in range(n_all)),
        state_ids=design.state_N,
        state_NDP=state_NDP,
        mixture_ND=design.mixture_ND,
        outcome_NT=outcome_N[:, None] + noise * rng.normal(size=(n_all, 2)),
        repeat_of_N=design.cell_N,
    )
    return StagedRuns.of(
        runs, controls(mixture_NSD, rng), mixture_NSD.mean(1) * 2, mixture_NSD, first_loss=6.0
    )


def effect_at(state_DP: np.ndarray, stage: int, kind: str = "order") -> np.ndarray:
    """What sqrt(share) does in a stage, on pools in these states; shape (..., D)."""
    effect_D = EFFECT_SD[stage if kind == "order" else 0]
    weight = 0.5 + stage if kind == "recency" else 1.0
    return weight * (effect_D + 0.1 * (state_DP[..., 0] - state_DP[..., 1]))


def controls(mixture_NSD: np.ndarray, rng: np.random.Generator) -> list[dict]:
    """Records as schedules leave them: a domain's loss falls with what was read of it."""
    n_stages = mixture_NSD.shape[1]
    found = []
    for mixture_SD in mixture_NSD:
        read_SD = mixture_SD.cumsum(axis=0) / n_stages
        loss_SD = 5 - 2 * np.sqrt(read_SD) + 0.02 * rng.normal(size=read_SD.shape)
        path = [
            {"tokens": (1000 * mixture_SD[k]).round().tolist()}
            | ({"probe_loss": loss_SD[k].tolist()} if k + 1 < n_stages else {})
            for k in range(n_stages)
        ]
        found.append({"path": path})
    return found
