"""From effects and the live pool's state to a mixture, its rivals, its export and its report."""

import math
from collections.abc import Sequence
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import fit_chosen, make_estimator
from causalmix_pipeline.assets.pictures import markdown_table, share_bars
from causalmix_pipeline.core.belief import UNSUPPORTED_FACTOR, Overlap, overlap
from causalmix_pipeline.core.effects import Z90, EffectEstimator
from causalmix_pipeline.core.mixture import dirichlet_design
from causalmix_pipeline.core.policy import Constraints, Recommendation, recommend, weighted_gain
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.resources.exporter import FolderExporter, build_manifest
from causalmix_pipeline.resources.frame_store import FRAME, VALUES, content_digest
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: Candidates of the RegMix baseline, and how many of the best are averaged (arXiv 2407.01492).
REGMIX_CANDIDATES = 100_000
REGMIX_BEST = 128

#: Proxy runs offered where the live pool is out of reach of the runs (METHOD, section 6).
TOP_UP_RUNS = 16

#: Part of the trust radius that is left where the live pool is only nearly within reach.
EXTRAPOLATING_RADIUS = 0.5


def regmix_mixture(
    runs: RunTable, natural_D: np.ndarray, weights_T: np.ndarray, *, seed: int
) -> np.ndarray:
    """RegMix's mixture: the mean of the best candidates around the natural mixture.

    Source: arXiv 2407.01492; Dirichlet candidates whose strength is log-uniform in .1-5.
    """
    wanted = [task for task, weight in zip(runs.tasks, weights_T, strict=True) if weight > 0]
    estimator = make_estimator("regmix", seed).fit(runs.select_tasks(wanted))
    rng = np.random.default_rng([seed, 2])
    strength_M = np.exp(rng.uniform(np.log(0.1), np.log(5.0), REGMIX_CANDIDATES))
    alpha_MD = strength_M[:, None] * len(natural_D) * np.maximum(natural_D, 1e-3)
    gamma_MD = np.maximum(rng.standard_gamma(alpha_MD), 1e-300)
    candidate_MD = gamma_MD / gamma_MD.sum(axis=1, keepdims=True)
    score_M = estimator.predict(runs.state_NDP[0], candidate_MD) @ weights_T[weights_T > 0]
    best = np.argsort(-score_M, kind="stable")[:REGMIX_BEST]
    return candidate_MD[best].mean(axis=0)


def weights_of(settings: Settings, runs: RunTable) -> np.ndarray:
    """Weight of each task in the order of the run table, sum 1; shape (T,)."""
    weights_T = np.array([settings.task_weights.get(task, 0.0) for task in runs.tasks])
    return weights_T / weights_T.sum()


@dg.asset(dagster_type=FRAME, group_name="recommendation", kinds={"lightgbm"}, code_version="1")
def baseline_mixtures(
    project: dg.ResourceParam[Project], live_covariates: pl.DataFrame, run_table: pl.DataFrame
) -> dg.MaterializeResult:
    """One row per domain, one column per baseline: equal, natural, RegMix and the reference.

    What the recommended mixture is held against. Stale when the live pool's token shares, the run
    table, or task weights change.
    """
    runs, settings = RunTable.from_frame(run_table), project.settings
    natural_D = live_covariates["natural_share"].to_numpy()
    equal_D = np.full(len(natural_D), 1 / len(natural_D))
    fixed = settings.policy.fixed_mixture or {}
    mixtures = {
        "equal": equal_D,
        "natural": natural_D,
        "regmix": regmix_mixture(runs, natural_D, weights_of(settings, runs), seed=settings.seed),
        "fixed": np.array([fixed.get(domain, 0.0) for domain in runs.domains]),
    }
    mixtures["reference"] = mixtures[settings.policy.reference]
    if not fixed:
        del mixtures["fixed"]
    frame = pl.DataFrame({"domain": runs.domains, **mixtures})
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={"shares": markdown_table(frame.to_dicts())},
        check_results=[on_simplex("baselines_sum_to_one", frame)],
    )
