"""The effect model: which estimator answers for which task, and how far to believe it."""

from collections.abc import Mapping, Sequence

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.estimators import (
    CombinedEstimator,
    choose_estimator,
    fit_chosen,
    make_estimator,
)
from causalmix_pipeline.adapters.experiment import collect_runs
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.design import STATE_COLUMNS, design_of, domains_of, state_values
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.assets.proxy import records_of
from causalmix_pipeline.core.belief import OBSERVATIONAL_R2, confounding, noise_floor, placebo
from causalmix_pipeline.core.covariate_choice import choose_covariates
from causalmix_pipeline.core.power import Experiment, power_table
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.resources.frame_store import VALUES
from causalmix_pipeline.resources.progress import progress_teller
from causalmix_pipeline.resources.project import Project


@dg.asset(dagster_type=VALUES, group_name="effects", kinds={"econml", "lightgbm"}, code_version="1")
def cate_model(project: dg.ResourceParam[Project], run_table: pl.DataFrame) -> dg.MaterializeResult:
    """Which estimator answers for each task, and every estimator's score on unseen pool states.

    Chosen by cross-validation whose folds never split a pool state. Kept as choice, seed and
    fitted parameters: what uses it is conditioned on the run table again, which takes a second.
    Stale when the run table or the list of estimators changes.
    """
    runs, seed = RunTable.from_frame(run_table), project.settings.seed
    choice = choose_estimator(runs, project.settings.estimators, seed=seed)
    chosen = [choice.validations[choice.chosen[task]] for task in runs.tasks]
    value = {
        "chosen": choice.chosen,
        "seed": seed,
        "parameters": fit_chosen(
            runs, choice.chosen, seed, parameters=choice.parameters
        ).parameters()["members"],
        "interval_factors": choice.interval_factors,
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
            "R2 within unseen states": float(best["r2_within"].mean()),  # pyright: ignore[reportArgumentType]
            "Spearman on unseen states": float(best["spearman"].mean()),  # pyright: ignore[reportArgumentType]
            "largest factor on standard errors": max(choice.interval_factors.values()),
            "scores": markdown_table(
                choice.frame.select("estimator", "task", "r2_within", "spearman", "chosen")
                .sort("task", "estimator")
                .to_dicts()
            ),
        },
    )


@dg.asset(
    dagster_type=VALUES,
    group_name="effects",
    kinds={"python"},
    code_version="2",
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
            description="Predictions for unseen states are better than with shuffled mixtures.",
        ),
    ],
)
def cate_checks(
    project: dg.ResourceParam[Project], run_table: pl.DataFrame, cate_model: dict
) -> dg.MaterializeResult:
    """How far to believe the effect model: noise floor, confounding, placebo, per task.

    Stale when the run table or the effect model changes.
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
    }
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "R2 of the mixture given the state": mixing.r2,
            "noise floor": markdown_table(
                floor.select("task", "mixture_variance", "seed_variance", "ratio").to_dicts()
            ),
            f"what {cells} runs can tell": markdown_table(power_rows(seen)),
            "smallest gain found, by runs": markdown_table(
                [{"task": row["task"], **row["curve"]} for row in seen]
            ),
            "correlation with outcomes within states": markdown_table(trial.to_dicts()),
        },
        check_results=list(belief_checks(value, project.settings.task_weights)),
    )


def power_rows(power: Sequence[Mapping]) -> list[dict]:
    """The table of `core.power` without its curve, names in words."""
    names = {
        "task": "task",
        "seed_sd": "seed sd",
        "ratio": "mixtures / seeds",
        "smallest_gain": "smallest gain",
        "in_reach": "gain in reach",
        "detection": "probability to find it",
        "runs_needed": "runs needed",
    }
    return [{word: row[name] for name, word in names.items()} for row in power]


def belief_checks(value: Mapping, weights: Mapping[str, float]) -> list[dg.AssetCheckResult]:
    """Turn what was found into the three checks; each only warns: a person may know better."""
    wanted = [task for task, weight in weights.items() if weight > 0]
    drowned = [
        row["task"]
        for row in value["noise_floor"]
        if row["task"] in wanted and row["above_noise"] is False
    ]
    lost = [
        row["task"]
        for row in value["placebo"]
        if row["task"] in wanted and not row["real"] > row["mixtures_permuted"]
    ]
    passed = {
        "above_the_noise_floor": (
            not drowned,
            {"tasks in the noise": ", ".join(drowned) or "none"},
        ),
        "randomised": (
            value["treatment_r2"] <= OBSERVATIONAL_R2,
            {"R2": value["treatment_r2"], "limit": OBSERVATIONAL_R2},
        ),
        "beats_placebo": (not lost, {"tasks no better": ", ".join(lost) or "none"}),
    }
    return [
        dg.AssetCheckResult(
            check_name=name, passed=ok, severity=dg.AssetCheckSeverity.WARN, metadata=metadata
        )
        for name, (ok, metadata) in passed.items()
    ]


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
    runs = collect_runs(
        records_of(proxy_runs, eval_tasks["tasks"]),
        design_of(mixture_design),
        state_values(pool_states, len(domains), names),
        domains=domains,
        covariates=names,
        tasks=eval_tasks["tasks"],
        directions=project.settings.task_directions,
    )
    wanted = [task for task, weight in project.settings.task_weights.items() if weight > 0]
    tell = progress_teller(context.log.info)
    seed = project.settings.seed
    choice = choose_covariates(
        runs.select_tasks([task for task in runs.tasks if task in wanted]),
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
