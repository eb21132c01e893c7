"""What the effect model says of domains and covariates, made readable."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.cate_tree import grow_cate_tree, tree_leaves
from causalmix_pipeline.adapters.estimators import fit_chosen
from causalmix_pipeline.adapters.interpretation_html import Interpretation
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.pictures import effect_map, markdown_table, svg_picture
from causalmix_pipeline.assets.recommendation import weights_of
from causalmix_pipeline.core.belief import reach_of
from causalmix_pipeline.core.gain_calibration import read_calibration
from causalmix_pipeline.core.interpretation import (
    STEP,
    Effects,
    covariate_importance,
    effect_curves,
    rank_covariates,
    triangle,
)
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.resources.frame_store import VALUES
from causalmix_pipeline.resources.project import Project

#: Covariates listed in the metadata.
LISTED = 8


def effects_of(
    runs: RunTable, cate_model: Mapping, weights_T: np.ndarray, reference_D: np.ndarray
) -> Effects:
    """The effect model of the tasks that count, conditioned on the runs again."""
    counted = [task for task, weight in zip(runs.tasks, weights_T, strict=True) if weight > 0]
    estimator = fit_chosen(
        runs.select_tasks(counted),
        {task: cate_model["chosen"][task] for task in counted},
        cate_model["seed"],
        cate_model["parameters"],
        read_calibration(cate_model["calibration"]),
    )
    return Effects(estimator, weights_T[weights_T > 0], reference_D)


@dg.asset(dagster_type=VALUES, group_name="effects", kinds={"econml"}, code_version="1")
def cate_interpretation(
    project: dg.ResourceParam[Project], run_table: pl.DataFrame, cate_model: dict
) -> dg.MaterializeResult:
    """Which kinds of pools want which domains, and which covariates decide it.

    A small tree over the pool states of the runs, and how far each covariate moves the effect of
    each domain: the gain, in outcome units, of 5 points more of it than in the equal mixture.
    Stale when the run table, the effect model or task weights change; the live pool plays no part.
    """
    runs = RunTable.from_frame(run_table)
    weights_T = weights_of(project.settings, runs)
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    effects, states = effects_of(runs, cate_model, weights_T, equal_D), runs.distinct_states()[1]
    importance_CD = covariate_importance(effects, states, seed=cate_model["seed"])
    value = {
        "domains": list(runs.domains),
        "columns": list(runs.covariate_columns),
        "weights": weights_T.tolist(),
        "step": STEP,
        "tree": grow_cate_tree(effects, states, seed=cate_model["seed"]),
        "importance": importance_CD.tolist(),
    }
    listed = [runs.covariate_columns[c] for c in rank_covariates(importance_CD)[:LISTED]]
    cells_CD = importance_CD[rank_covariates(importance_CD)[:LISTED]]
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "effects explained by the tree": value["tree"]["explained"],
            "kinds of pools": markdown_table(leaf_rows(value)),
            "what moves the effect of each domain": svg_picture(
                effect_map(cells_CD, listed, runs.domains), "importance of covariates"
            ),
        },
    )


def leaf_rows(value: Mapping[str, Any]) -> list[dict]:
    """A row per leaf of the tree: its kind of pool, its states, what to add and what that gains."""
    domains, columns = value["domains"], value["columns"]
    rows = []
    for path, leaf in tree_leaves(value["tree"]["root"]):
        best = int(np.argmax(leaf["effects"]))
        questions = [f"{columns[c]} {sign} {threshold:.3g}" for c, sign, threshold in path]
        rows.append(
            {"add": domains[best], "gain": leaf["effects"][best], "states": leaf["n_states"]}
            | {f"question {i + 1}": questions[i] if i < len(path) else "" for i in range(3)}
        )
    return rows


def live_interpretation(
    runs: RunTable,
    cate_model: Mapping,
    cate_interpretation: Mapping,
    recommended: Mapping,
    live_covariates: pl.DataFrame,
    weights_T: np.ndarray,
) -> Interpretation:
    """Effects on the live pool, beside the tree and the importance of covariates.

    Those two are left out where they were made with other task weights. Where no gain can be
    promised, no curve is drawn.
    """
    shares = recommended["mixtures"]
    reference_D, best_D = np.array(shares["reference"]), np.array(shares["recommended"])
    reach = reach_of(runs, live_covariates.select(runs.covariates).to_numpy())
    effects = effects_of(runs, cate_model, weights_T, reference_D)
    effects, state_DP = replace(effects, doubt=reach.doubt), reach.edge_DP
    most_D = runs.mixture_ND.max(axis=0)
    is_promised = recommended["verdict"] != "unsupported"
    is_current = np.allclose(cate_interpretation["weights"], weights_T)
    importance_CD = np.array(cate_interpretation["importance"])
    return Interpretation(
        domains=runs.domains,
        columns=runs.covariate_columns,
        reference_name="reference",
        curves={"live pool": effect_curves(effects, state_DP, runs.domains, most_D)}
        if is_promised
        else {},
        triangle=triangle(effects, state_DP, best_D) if is_promised else None,
        mixture_D=best_D,
        reference_D=reference_D,
        run_mixture_ND=runs.mixture_ND,
        tree=cate_interpretation["tree"] if is_current else None,
        importance_CD=importance_CD if is_current else None,
    )
