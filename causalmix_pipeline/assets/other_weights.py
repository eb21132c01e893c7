"""What the mixture would be if the tasks counted differently: what the report's sliders show."""

from collections.abc import Mapping

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.asked_estimator import fit_asked
from causalmix_pipeline.adapters.estimators import fit_chosen
from causalmix_pipeline.adapters.what_if_html import WhatIf
from causalmix_pipeline.assets.recommendation import constraints_of, weights_of
from causalmix_pipeline.core.belief import reach_of
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.gain_calibration import read_calibration
from causalmix_pipeline.core.policy import weighted_gain
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.what_if import mixtures_for, moved_tasks, weight_points
from causalmix_pipeline.resources.settings import Settings


def other_weights(
    settings: Settings,
    runs: RunTable,
    cate_model: Mapping,
    recommended: Mapping,
    live_covariates: pl.DataFrame,
) -> WhatIf | None:
    """Mixtures for other weights of the tasks, under the same limits, and their gains.

    None where there is nothing to choose: one task, or a pool that keeps the reference mixture.
    None too for policies other than `optimum`, whose mixtures these aren't.

    Args:
        settings: whose policy and seed.
        runs: the run table with its top-ups.
        cate_model: which estimators answer.
        recommended: the value of `recommended_mixture`.
        live_covariates: of the live pool.
    """
    weights_T = weights_of(settings, runs)
    is_other = recommended["policy"] != "optimum"
    if is_other or recommended["verdict"] == "unsupported" or not moved_tasks(weights_T):
        return None
    domains, seed = runs.domains, settings.seed
    calibration = read_calibration(cate_model["calibration"])
    reach = reach_of(runs, live_covariates.select(runs.covariates).to_numpy())
    reference_D = np.array(recommended["mixtures"]["reference"])
    constraints = constraints_of(settings, live_covariates, reference_D)
    constraints = constraints.doubted(reach.pool_doubt, domains)
    points_WT = weight_points(weights_T, len(domains))
    ever = dict(zip(runs.tasks, points_WT.max(axis=0).tolist(), strict=True))
    parameters = cate_model["parameters"]
    asked = fit_asked(
        runs,
        cate_model["chosen"],
        ever,
        constraints.guard_rails,
        seed=seed,
        parameters=parameters,
        calibration=calibration,
    )
    mixture_WD = mixtures_for(
        points_WT[:, [runs.tasks.index(task) for task in asked.tasks]],
        asked.estimator,
        reach.edge_DP,
        constraints,
        domains=domains,
        tasks=asked.tasks,
        recommended_D=np.array(recommended["mixtures"]["recommended"]),
        confidence_z=settings.policy.confidence_z,
        seed=seed,
    )
    estimator = asked.estimator
    if asked.tasks != tuple(runs.tasks):
        estimator = fit_chosen(runs, cate_model["chosen"], seed, parameters, calibration)
    gain = estimator.gain(reach.edge_DP, mixture_WD, reference_D)
    total = [
        weighted_gain(estimator, reach.edge_DP, mixture_D[None], reference_D, weights_T)
        for mixture_D, weights_T in zip(mixture_WD, points_WT, strict=True)
    ]
    return WhatIf(
        tasks=runs.tasks,
        moved=tuple(moved_tasks(weights_T)),
        weights_WT=points_WT,
        mixture_WD=mixture_WD,
        gain_WT3=with_ends(gain.mean_MT, gain.se_MT * reach.doubt),
        total_W3=with_ends(
            np.array([mean[0] for mean, _ in total]),
            np.array([se[0] for _, se in total]) * reach.doubt,
        ),
    )


def with_ends(gain: np.ndarray, se: np.ndarray) -> np.ndarray:
    """Gains with the ends of their 90% intervals; shape (..., 3)."""
    return np.stack([gain, gain - Z90 * se, gain + Z90 * se], axis=-1)
