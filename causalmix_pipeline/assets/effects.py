"""The effect model: which estimator answers for which task, and how far to believe it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import (
    CombinedEstimator,
    choose_estimator,
    fit_chosen,
    make_estimator,
)
from causalmix_pipeline.adapters.experiment import collect_runs
from causalmix_pipeline.adapters.quick_fits import more_runs, run_trials
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.checks_metadata import check_rows, power_metadata, trial_rows
from causalmix_pipeline.assets.design import STATE_COLUMNS, design_of, domains_of, state_values
from causalmix_pipeline.assets.pictures import markdown_table, number
from causalmix_pipeline.assets.proxy import records_of
from causalmix_pipeline.assets.sizes import with_sizes
from causalmix_pipeline.assets.small_pictures import Fit, fit_picture
from causalmix_pipeline.core.belief import OBSERVATIONAL_R2, confounding, noise_floor, placebo
from causalmix_pipeline.core.covariate_choice import choose_covariates
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.falsification import OBJECTIVE, frame_rows
from causalmix_pipeline.core.gain_calibration import read_calibration
from causalmix_pipeline.core.power import Experiment, power_table
from causalmix_pipeline.core.robustness import best_of_runs, robustness
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import SIZE_COVARIATE, on_one_level
from causalmix_pipeline.resources.frame_store import VALUES
from causalmix_pipeline.resources.progress import progress_teller
from causalmix_pipeline.resources.project import Project


@dg.asset(dagster_type=VALUES, group_name="effects", kinds={"econml", "lightgbm"}, code_version="4")
def cate_model(project: dg.ResourceParam[Project], run_table: pl.DataFrame) -> dg.MaterializeResult:
    """Which estimator answers for each task, and every estimator's score on unseen pool states.

    Chosen by cross-validation whose folds never split a pool state, from those with standard errors
    if there is one. Kept as choice, seed and fitted parameters: what uses it is conditioned on the
    run table again, which takes a second. Stale when the run table or the list of estimators
    changes.
    """
    runs, seed = RunTable.from_frame(run_table), project.settings.seed
    choice = choose_estimator(runs, project.settings.estimators, seed=seed, needs_interval=True)
    chosen = [choice.validations[choice.chosen[task]] for task in runs.tasks]
    value = {
        "chosen": choice.chosen,
        "seed": seed,
        "parameters": fit_chosen(
            runs, choice.chosen, seed, parameters=choice.parameters
        ).parameters()["members"],
        "calibration": {task: one.to_dict() for task, one in choice.calibration.items()},
        "scores": choice.frame.to_dicts(),
        "run_ids": list(runs.run_ids),
        "out_of_fold": {
            task: validation.prediction_NT[:, t].tolist()
            for t, (task, validation) in enumerate(zip(runs.tasks, chosen, strict=True))
        },
    }
    best = choice.frame.filter("chosen")
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "R2 within unseen states": number(float(best["r2_within"].mean())),  # pyright: ignore[reportArgumentType]
            "Spearman on unseen states": number(float(best["spearman"].mean())),  # pyright: ignore[reportArgumentType]
            "largest factor on standard errors": number(
                max(c.factor for c in choice.calibration.values())
            ),
            "least of a gain that holds": number(min(c.slope for c in choice.calibration.values())),
            "predicted (up) against observed (right) on unseen states": fit_picture(
                [
                    Fit(task, runs.outcome_NT[:, t], np.array(value["out_of_fold"][task]))
                    for t, task in enumerate(runs.tasks)
                ]
            ),
            "estimators on unseen states": markdown_table(estimator_rows(choice.frame)),
        },
    )


def estimator_rows(scores: pl.DataFrame) -> list[dict]:
    """A row per task and estimator, the chosen one of a task first, then by R2."""
    ordered = scores.sort("task", "chosen", "r2_within", descending=[False, True, True])
    return [
        {
            "task": row["task"],
            "estimator": row["estimator"],
            "R2 within": row["r2_within"],
            "± se": row["r2_within_se"],
            "Spearman": row["spearman"],
            "chosen": "chosen" if row["chosen"] else "",
        }
        for row in ordered.iter_rows(named=True)
    ]


@dg.asset(
    dagster_type=VALUES,
    group_name="effects",
    kinds={"python"},
    code_version="3",
    check_specs=[
        dg.AssetCheckSpec(
            "above_the_noise_floor",
            asset="cate_checks",
            description="Mixtures move each wanted task more than seeds do (F test at 5%).",
        ),
        dg.AssetCheckSpec(
            "randomised",
            asset="cate_checks",
            description="The pool state doesn't tell the mixture: the runs are an experiment.",
        ),
        dg.AssetCheckSpec(
            "beats_placebo",
            asset="cate_checks",
            description="Predictions for unseen states go along with outcomes (test at 1%).",
        ),
        dg.AssetCheckSpec(
            "state_matters",
            asset="cate_checks",
            description="Covariates tell what a blind prediction of unseen states misses (1%).",
        ),
    ],
)
def cate_checks(
    project: dg.ResourceParam[Project], run_table: pl.DataFrame, cate_model: dict
) -> dg.MaterializeResult:
    """How far to believe the effect model: what could fail, what can't be known, more runs' worth.

    Noise floor, confounding and placebo per task; tests of whether mixtures and pool states matter;
    how strong a hidden confounder must be to explain the gain away; R2 by number of runs. Stale
    when the run table, the effect model or the weights of the tasks change.
    """
    runs, seed = RunTable.from_frame(run_table), cate_model["seed"]
    floor, mixing = noise_floor(runs), confounding(runs, seed=seed)
    trial = placebo(lambda: CombinedEstimator(cate_model["chosen"], seed), runs, seed=seed)
    cells = len(set(runs.repeat_of_N.tolist()))
    per_state = project.design_plan.mixtures_per_state
    seen = power_table(floor, Experiment(cells, per_state, len(runs.domains) - 1))
    value = {
        "noise_floor": floor.to_dicts(),
        "power": seen,
        "treatment_r2": mixing.r2,
        "placebo": trial.to_dicts(),
        **(
            {"observational_sources": list(runs.observational_sources)}
            if runs.observational_sources
            else {}
        ),
        **effect_beliefs(runs, cate_model, project.settings.task_weights),
    }
    checks = belief_checks(value, project.settings.task_weights)
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "checks": markdown_table(check_rows(checks), length=90),
            "R2 of the mixture given the state": number(mixing.r2),
            **power_metadata(seen, cells),
            "correlation with outcomes within states": markdown_table(trial.to_dicts()),
            "do mixtures and states matter": markdown_table(trial_rows(value["falsification"])),
            "what a hidden confounder needs": markdown_table([value["robustness"]["shown"]]),
            "R2 within unseen states, by runs": markdown_table(value["learning_curve"]["table"]),
            "twice the runs": value["learning_curve"]["sentence"],
        },
        check_results=checks,
    )


def effect_beliefs(runs: RunTable, cate_model: Mapping, weights: Mapping[str, float]) -> dict:
    """The tests that can fail, the robustness value and the learning curve, fit for JSON."""
    seed, parameters = cate_model["seed"], cate_model["parameters"]
    weights_T = np.array([weights.get(task, 0.0) for task in runs.tasks])
    weights_T = weights_T / weights_T.sum()
    left_out_NT = np.column_stack([cate_model["out_of_fold"][task] for task in runs.tasks])
    more = more_runs(runs, weights_T, parameters, seed)
    return {
        "falsification": frame_rows(run_trials(on_one_level(runs), weights_T, left_out_NT, seed)),
        "robustness": _robustness(runs, cate_model, weights_T),
        "learning_curve": {
            "estimator": None if more is None else more.estimator,
            "table": [] if more is None else more.curve.table.to_dicts(),
            "sentence": "can't be told from so few runs" if more is None else more.curve.describe(),
        },
    }


def _robustness(runs: RunTable, cate_model: Mapping, weights_T: np.ndarray) -> dict:
    """Robustness of the gain of the runs' best mixtures over the equal one."""
    estimator = fit_chosen(
        runs,
        cate_model["chosen"],
        cate_model["seed"],
        cate_model["parameters"],
        read_calibration(cate_model["calibration"]),
    )
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    try:
        best_D = best_of_runs(estimator, runs, equal_D, weights_T)
        found = asdict(robustness(runs, best_D, equal_D, weights_T))
    except EstimationError as error:
        return {"shown": {"can't be told": str(error)}}
    names = {
        "gain": "gain over equal",
        "value": "partial R2 that takes the gain",
        "value_lower": "its lower bound",
    }
    return found | {"shown": {word: found[name] for name, word in names.items()}}


def belief_checks(value: Mapping, weights: Mapping[str, float]) -> list[dg.AssetCheckResult]:
    """Turn what was found into the four checks; each only warns: a person may know better.

    What can't be told doesn't pass.
    """
    wanted = [task for task, weight in weights.items() if weight > 0]
    drowned = [
        row["task"]
        for row in value["noise_floor"]
        if row["task"] in wanted and row["above_noise"] is False
    ]
    passed = {
        "above_the_noise_floor": (
            not drowned,
            {"tasks in the noise": ", ".join(drowned) or "none"},
        ),
        "randomised": (
            value["treatment_r2"] <= OBSERVATIONAL_R2 and not value.get("observational_sources"),
            {
                "R2": value["treatment_r2"],
                "limit": OBSERVATIONAL_R2,
                "sources not declared randomised": ", ".join(value.get("observational_sources", []))
                or "none",
            },
        ),
        "beats_placebo": _verdict(value["falsification"], "mixtures_matter", wanted),
        "state_matters": _verdict(value["falsification"], "states_matter", [OBJECTIVE]),
    }
    return [
        dg.AssetCheckResult(
            check_name=name, passed=ok, severity=dg.AssetCheckSeverity.WARN, metadata=metadata
        )
        for name, (ok, metadata) in passed.items()
    ]


def _verdict(trials: Sequence[Mapping], check: str, tasks: Sequence[str]) -> tuple[bool, dict]:
    """Whether all of the tasks pass a test, and what to say of those that don't."""
    asked = [row for row in trials if row["check"] == check and row["task"] in tasks]
    failed = [row["task"] for row in asked if row["passed"] is False]
    reasons = sorted({row["reason"] for row in asked if row["passed"] is None})
    metadata = {"not shown for": ", ".join(failed) or "none"}
    if reasons:
        metadata["can't be told"] = "; ".join(reasons)
    return all(row["passed"] for row in asked), metadata


#: Estimator of the search over covariates: some hundred fits in a minute or two.
CHOICE_ESTIMATOR = "structured_ridge"


@dg.asset(dagster_type=VALUES, group_name="effects", kinds={"python"}, code_version="1")
def covariate_choice(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    proxy_runs: pl.DataFrame,
    pool_states: pl.DataFrame,
    mixture_design: pl.DataFrame,
    eval_tasks: dict,
) -> dg.MaterializeResult:
    """Which covariates help: every subset tried, its R2 on unseen pool states and standard error.

    Made on request only (job `choose_covariates`); it proposes, `covariates` in the settings
    decides. Stale when proxy runs or pool states change.
    """
    domains = domains_of(mixture_design)
    names = [name for name in pool_states.columns if name not in STATE_COLUMNS]
    finite = pool_states.select(pl.col(names).is_finite().fill_null(False).all())
    names = [name for name in names if finite[name][0]]
    values_MDP = state_values(pool_states, len(domains), names)
    if project.settings.proxy.sizes:
        names = [*names, SIZE_COVARIATE]
    runs = collect_runs(
        records_of(proxy_runs, eval_tasks["tasks"]),
        design_of(mixture_design),
        with_sizes(project.settings, values_MDP, mixture_design),
        domains=domains,
        covariates=names,
        tasks=eval_tasks["tasks"],
        directions=project.settings.task_directions,
    )
    wanted = [task for task, weight in project.settings.task_weights.items() if weight > 0]
    tell = progress_teller(context.log.info)
    seed = project.settings.seed
    choice = choose_covariates(
        on_one_level(runs).select_tasks([task for task in runs.tasks if task in wanted]),
        lambda: make_estimator(CHOICE_ESTIMATOR, seed),
        seed=seed,
        on_progress=lambda done, total: tell("subsets tried, at most", done, total),
    )
    value = {
        "chosen": list(choice.chosen),
        "used": list(project.settings.covariates),
        "estimator": CHOICE_ESTIMATOR,
        "table": choice.table.to_dicts(),
        "collinear": choice.collinear.to_dicts(),
        "inflation": choice.inflation.to_dicts(),
    }
    shown = choice.table.with_columns(pl.col("covariates").list.join(", ")).head(8)
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "chosen": ", ".join(choice.chosen) or "none helps",
            "subsets": markdown_table(
                shown.select("kind", "size", "r2_within", "r2_within_se", "covariates").to_dicts()
            ),
            "collinear": markdown_table(choice.collinear.to_dicts()),
        },
    )
