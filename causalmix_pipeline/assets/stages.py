"""Where runs have stages: their rows, whether the stage matters, and a schedule if it does."""

import math
from collections.abc import Mapping
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.adapters.staged_fits import StageFits, fit_stages
from causalmix_pipeline.assets.design import design_of
from causalmix_pipeline.assets.pictures import by_domain_table, markdown_table, number
from causalmix_pipeline.assets.recommendation import (
    constraints_of,
    interval,
    known,
    simplex_check,
    weights_of,
)
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import OWN, RunTable
from causalmix_pipeline.core.stage_schedule import (
    StageChoice,
    StageObjective,
    joint_gain,
    joint_over_static,
    roll_schedule,
)
from causalmix_pipeline.core.stage_trial import StageTrial, stage_matters
from causalmix_pipeline.core.stages import StagedRuns
from causalmix_pipeline.resources.frame_store import FRAME, VALUES
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: Gain of a schedule over the static mixture, and the ends of its 90% interval.
OVER_STATIC = ("gain_over_static", "low_over_static", "high_over_static")


def staged_runs(
    project: Project, run_table: pl.DataFrame, mixture_design: pl.DataFrame
) -> StagedRuns:
    """The design's runs with what their records keep of their stages.

    Raises:
        EstimationError: if a run of the table has no record of its stages.
    """
    runs, design = RunTable.from_frame(run_table), design_of(mixture_design)
    assert design.stage_mixture_NSD is not None
    runs = runs.subset(np.array([source == OWN for source in runs.sources_of_runs]))
    row_of = {key: row for row, key in enumerate(mixture_design["proxy_run_id"])}
    records = [project.run_store.get(run_id) for run_id in runs.run_ids]
    found = [record for record in records if record is not None and record.control is not None]
    if len(found) < len(records):
        raise EstimationError(
            f"each run of run_table must have a record of its stages in the run store, got "
            f"{len(found)} of {len(records)}: materialise mixture_design, proxy_runs and run_table."
        )
    knows_nothing = project.settings.proxy.pretrained is None
    first_loss = math.log(found[0].spec["config"]["vocab_size"]) if knows_nothing else None
    return StagedRuns.of(
        runs,
        [record.control or {} for record in found],
        [record.epochs for record in found],
        design.stage_mixture_NSD[[row_of[run_id] for run_id in runs.run_ids]],
        first_loss,
    )


def unmeasured_sentence(staged: StagedRuns) -> str:
    """Why checkpoints aren't used; empty where they are."""
    told = ", ".join(f"{name} in {count} runs" for name, count in staged.unmeasured().items())
    if not told:
        return ""
    return (
        f"Checkpoints aren't used: runs don't measure a domain that they never read ({told} of "
        f"{staged.runs.n_runs}). Stages are chosen by the pool alone; a design.strength_range of "
        "larger numbers gives every domain a share."
    )


def trial_figures(trial: StageTrial) -> dict[str, float]:
    """What both tests found, for the check's metadata."""
    return {
        "added R2": trial.added,
        "p": trial.p,
        "added R2 of own effects": trial.r2_own - trial.r2_scaled,
        "p of own effects": trial.p_own,
    }


def trial_of(settings: Settings, staged: StagedRuns) -> StageTrial:
    """Whether the stage matters for the objective of the settings."""
    return stage_matters(staged, weights_of(settings, staged.runs), seed=settings.seed)


@dg.asset(
    dagster_type=FRAME,
    group_name="effects",
    kinds={"polars"},
    code_version="2",
    check_specs=[
        dg.AssetCheckSpec(
            "stage_matters",
            asset="stage_table",
            description="In which stage a mixture comes tells the outcome, more than placebos with "
            "permuted stages, and by effects of each stage's own, not by its weight alone (5% "
            "each). Where it doesn't, the static mixture is recommended.",
        )
    ],
)
def stage_table(
    project: dg.ResourceParam[Project], run_table: pl.DataFrame, mixture_design: pl.DataFrame
) -> dg.MaterializeResult:
    """One row per proxy run and stage: the pool, the checkpoint it started from, its mixture.

    A checkpoint is told by tokens and epochs of each domain so far, the losses of each domain and
    their slopes; outcomes are those of the run's end. Only where `design.stages` is above 1. Stale
    when the run table, the design or task weights change.
    """
    staged = staged_runs(project, run_table, mixture_design)
    trial, frame = trial_of(project.settings, staged), staged.to_frame()
    losses = {
        f"before stage {stage + 1}": [
            float(loss) for loss in staged.loss_NSD[:, stage].mean(axis=0)
        ]
        for stage in range(staged.n_stages)
        if np.isfinite(staged.loss_NSD[:, stage]).all()
    }
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "runs": float(staged.runs.n_runs),
            "stages": float(staged.n_stages),
            "does the stage matter": trial.describe(),
            **({"checkpoints": unmeasured_sentence(staged)} if staged.unmeasured() else {}),
            "mean loss, nats per token": by_domain_table(staged.runs.domains, losses, "checkpoint"),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="stage_matters",
                passed=trial.passed,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={
                    "in short": trial.describe(),
                    **({} if trial.reason else trial_figures(trial)),
                },
            )
        ],
    )


def fit_project_stages(
    settings: Settings, staged: StagedRuns, cate_model: Mapping[str, Any], *, checkpoint: bool
) -> StageFits:
    """Each stage's effects by the estimators that answer for the tasks."""
    return fit_stages(
        staged,
        cate_model["chosen"],
        settings.task_weights,
        settings.policy.guard_rails,
        seed=settings.seed,
        checkpoint=checkpoint,
    )


def stage_objective(
    settings: Settings,
    fits: StageFits,
    n_stages: int,
    live_covariates: pl.DataFrame,
    reference_D: np.ndarray,
) -> StageObjective:
    """What the settings want of each stage."""
    return StageObjective(
        tasks=fits.tasks,
        weights_T=fits.weights_T / fits.weights_T.sum(),
        constraints=constraints_of(settings, live_covariates, reference_D),
        n_stages=n_stages,
        policy="search" if settings.policy.name == "search" else "optimum",
        confidence_z=settings.policy.confidence_z,
        seed=settings.seed,
    )


def stage_row(choice: StageChoice, n_stages: int) -> dict[str, Any]:
    """A stage's mixture with its gain, as plain values; stages counted from 1."""
    return {
        "stage": choice.stage + 1,
        "fraction": choice.stage / n_stages,
        "mixture": choice.mixture_D.tolist(),
        **interval(choice.gain, choice.gain_se),
        "verdict": choice.reach.verdict,
        "checkpoint_loss": None if choice.loss_D is None else choice.loss_D.tolist(),
    }


def choose_schedule(
    settings: Settings,
    staged: StagedRuns,
    cate_model: Mapping[str, Any],
    live_covariates: pl.DataFrame,
    baselines: pl.DataFrame,
    recommended: Mapping[str, Any],
) -> dict[str, Any]:
    """The schedule with all that explains it; the static mixture where the stage doesn't matter."""
    runs, n_stages = staged.runs, staged.n_stages
    trial, static_D = trial_of(settings, staged), np.array(recommended["mixtures"]["recommended"])
    value: dict[str, Any] = {
        "domains": list(runs.domains),
        "stage_matters": trial.passed,
        "sentence": trial.describe(),
        "static": static_D.tolist(),
        "stages": [[1.0, static_D.tolist()]],
        "rows": [],
        "recommended": "static",
        "gain": recommended["gain"],
        "low": recommended["low"],
        "high": recommended["high"],
        **dict.fromkeys(OVER_STATIC),
        "checkpoint_r2": [],
        "note": unmeasured_sentence(staged),
    }
    if not trial.passed:
        return value
    live_DP = live_covariates.select(runs.covariates).to_numpy()
    tried = (False,) if staged.unmeasured() else (True, False)
    for checkpoint in tried:  # a predicted checkpoint may be out of reach, the pool not
        fits = fit_project_stages(settings, staged, cate_model, checkpoint=checkpoint)
        objective = stage_objective(
            settings, fits, n_stages, live_covariates, baselines["reference"].to_numpy()
        )
        choices = roll_schedule(fits.models, fits.rolls, live_DP, static_D, objective)
        gain, se = joint_gain(choices)
        if math.isfinite(gain):
            break
    ends = interval(*joint_over_static(choices))
    over_static = dict(zip(OVER_STATIC, ends.values(), strict=True))
    if not (ends["low"] or 0.0) > 0:
        return value | over_static
    return value | {
        "recommended": "schedule",
        "stages": [[1 / n_stages, choice.mixture_D.tolist()] for choice in choices],
        "rows": [stage_row(choice, n_stages) for choice in choices],
        **interval(gain, se),
        **over_static,
        "checkpoint_r2": [known(roll.r2) for roll in fits.rolls],
    }


@dg.asset(
    dagster_type=VALUES,
    group_name="recommendation",
    kinds={"python"},
    code_version="1",
    check_specs=[
        dg.AssetCheckSpec(
            "stages_sum_to_one",
            asset="recommended_schedule",
            blocking=True,
            description="The mixture of each stage has shares >= 0 that sum to 1.",
        )
    ],
)
def recommended_schedule(
    project: dg.ResourceParam[Project],
    stage_table: pl.DataFrame,
    cate_model: dict,
    live_covariates: pl.DataFrame,
    baseline_mixtures: pl.DataFrame,
    recommended_mixture: dict,
) -> dg.MaterializeResult:
    """A mixture for each stage of training on the live pool, and what the schedule should gain.

    Chosen stage by stage, each at the checkpoint that the ones before are predicted to leave. The
    static mixture, where the stage isn't shown to matter, the live pool is out of reach, or the 90%
    interval of the gain over it doesn't lie above 0. Only where `design.stages` is above 1. Stale
    when the stage table, the live covariates, the effect model, task weights or the policy change.
    """
    value = choose_schedule(
        project.settings,
        StagedRuns.from_frame(stage_table),
        cate_model,
        live_covariates,
        baseline_mixtures,
        recommended_mixture,
    )
    mixtures = {f"stage {i + 1}": shares for i, (_, shares) in enumerate(value["stages"])}
    metadata: dict[str, Any] = {
        "recommended": value["recommended"],
        "does the stage matter": value["sentence"],
        "shares": by_domain_table(
            value["domains"], {**mixtures, "static": value["static"]}, "mixture"
        ),
    }
    for name in ("gain", "low", "high", *OVER_STATIC):
        if value[name] is not None:
            metadata[name.replace("_", " ")] = number(value[name])
    if value["note"]:
        metadata["checkpoints"] = value["note"]
    if value["rows"]:
        hidden = ("mixture", "checkpoint_loss")
        rows = [{k: v for k, v in row.items() if k not in hidden} for row in value["rows"]]
        metadata["stages"] = markdown_table(rows)
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata=metadata,
        check_results=[
            simplex_check("stages_sum_to_one", [np.array(shares) for shares in mixtures.values()])
        ],
    )
