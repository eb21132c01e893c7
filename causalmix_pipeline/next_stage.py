"""The mixture of the next stage of a running training, from its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.checkpoint_file import Checkpoint, read_checkpoint
from causalmix_pipeline.assets.stages import (
    OVER_STATIC,
    fit_project_stages,
    stage_objective,
    stage_row,
    unmeasured_sentence,
)
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.stage_schedule import (
    StageChoice,
    StageObjective,
    choose_stage,
    state_at,
)
from causalmix_pipeline.core.stages import StagedRuns
from causalmix_pipeline.resources.settings import Settings

#: Part of a stage by which a checkpoint may lie off the stage's start.
AT_BOUNDARY = 0.05


@dataclass(frozen=True, eq=False)
class NextStage:
    """What to train on next.

    Attributes:
        row: stage (counted from 1), mixture, gain with its interval, verdict.
        domains: of the mixture.
        note: what there is to know of how it was chosen; may be empty.
    """

    row: dict[str, Any]
    domains: list[str]
    note: str


def recommend_next(
    settings: Settings,
    path: Path,
    *,
    stage_table: pl.DataFrame,
    cate_model: Mapping[str, Any],
    live_covariates: pl.DataFrame,
    baselines: pl.DataFrame,
    schedule: Mapping[str, Any],
) -> NextStage:
    """Choose the mixture of the stage that starts at a checkpoint.

    Where the checkpoint is out of reach of the proxies' own, the pool alone decides; where no
    schedule is recommended, it's the static mixture.

    Args:
        settings: of the project.
        path: of the checkpoint's file.
        stage_table: the asset's value, and so the others.
        cate_model: which estimators answer.
        live_covariates: of the live pool.
        baselines: with the reference.
        schedule: whether the stage matters, and the static mixture.

    Raises:
        ConfigError: if the file breaks a rule, lacks what the stage needs, or isn't of the end of
            a stage.
    """
    staged = StagedRuns.from_frame(stage_table)
    domains, n_stages = list(staged.runs.domains), staged.n_stages
    checkpoint = read_checkpoint(path, domains)
    stage = _stage_at(path, checkpoint.fraction, n_stages)
    static = {
        "stage": stage + 1, "fraction": stage / n_stages, "mixture": schedule["static"],
        "gain": None, "low": None, "high": None, "verdict": "static",
    }  # fmt: skip
    if schedule["recommended"] == "static":
        reason = _why_static(schedule)
        return NextStage(static, domains, f"{reason} So the static mixture is kept.")
    tried = (False,) if staged.unmeasured() else (True, False)
    if True in tried:
        _check_told(path, checkpoint, staged, stage)
    live_DP = live_covariates.select(staged.runs.covariates).to_numpy()
    for uses in tried:
        fits = fit_project_stages(settings, staged, cate_model, checkpoint=uses)
        reference_D = baselines["reference"].to_numpy()
        objective = stage_objective(settings, fits, n_stages, live_covariates, reference_D)
        choice = _choose(fits.models[stage], live_DP, checkpoint, schedule["static"], objective)
        if choice.reach.verdict != "unsupported" or stage == 0:
            break
    note = unmeasured_sentence(staged)
    if choice.reach.verdict == "unsupported":
        note = "The live pool is out of the proxy runs' reach: the reference is kept."
    elif not uses and not note:
        note = (
            f"{path.name}: the proxies' checkpoints at this stage are far from it: chosen by the "
            "pool alone."
        )
    return NextStage(stage_row(choice, n_stages), domains, note)


def _stage_at(path: Path, fraction: float, n_stages: int) -> int:
    """The stage that starts at this fraction, counted from 0."""
    stage = min(round(fraction * n_stages), n_stages - 1)
    if abs(fraction * n_stages - stage) > AT_BOUNDARY:
        boundaries = ", ".join(f"{k / n_stages:.3g}" for k in range(n_stages))
        raise ConfigError(
            f"{path.name}: fraction must be where a stage starts ({boundaries}), got "
            f"{fraction:g}: ask at the end of a stage."
        )
    return stage


def _why_static(schedule: Mapping[str, Any]) -> str:
    """Why no schedule is recommended."""
    if not schedule["stage_matters"]:
        return schedule["sentence"]
    gain, low, high = (schedule[name] for name in OVER_STATIC)
    if low is None or high is None:
        return "The live pool is out of reach of what proxy runs tell of stages."
    return (
        f"A schedule isn't surely better than the static mixture: its gain over it is {gain:+.4g}, "
        f"90% interval {low:+.4g} to {high:+.4g}."
    )


def _choose(
    model: Any,
    live_DP: np.ndarray,
    checkpoint: Checkpoint,
    static: list[float],
    objective: StageObjective,
) -> StageChoice:
    """The stage's mixture, within the tokens that are left."""
    if checkpoint.tokens_D is not None and checkpoint.fraction > 0:
        limits = objective.constraints
        budget = float(checkpoint.tokens_D.sum()) / checkpoint.fraction / objective.n_stages
        assert limits.available_D is not None
        left_D = np.maximum(limits.available_D - checkpoint.tokens_D / limits.max_epochs, 0)
        left = replace(limits, budget_tokens=budget, available_D=left_D)
        objective = replace(objective, constraints=left)
    state = state_at(model, live_DP, checkpoint.loss_D, checkpoint.slope_D)
    return choose_stage(model, state, np.array(static), objective)


def _check_told(path: Path, checkpoint: Checkpoint, staged: StagedRuns, stage: int) -> None:
    """Refuse a checkpoint without what the stage's effects depend on."""
    told = {"checkpoint_loss": checkpoint.loss_D, "checkpoint_slope": checkpoint.slope_D}
    for name in staged.checkpoint_covariates(stage):
        if told[name] is None:
            column = name.removeprefix("checkpoint_")
            raise ConfigError(
                f"{path.name}: {column} must be given for each domain before stage {stage + 1} of "
                f"{staged.n_stages}, got none for some: measure it on training text of the domain."
            )
