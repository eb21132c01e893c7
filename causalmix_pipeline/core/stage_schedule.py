"""A mixture for each stage: offline with predicted checkpoints, or for the next stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from causalmix_pipeline.core.belief import Overlap, reach_of
from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.policy import recommend, weighted_gain
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stage_effects import CheckpointModel


@dataclass(frozen=True, eq=False)
class StageModel:
    """What is known of a stage.

    Attributes:
        stage: counted from 0.
        table: what the estimator was fitted on, for how near a pool is to it.
        estimator: of the stage's effects.
    """

    stage: int
    table: RunTable
    estimator: EffectEstimator


@dataclass(frozen=True, eq=False)
class StageObjective:
    """What a schedule is chosen by.

    Attributes:
        tasks: names of the estimators' tasks.
        weights_T: their weights.
        constraints: what the mixture of each stage keeps to; guard rails are of the whole run.
        n_stages: S.
        policy: `optimum` or `search`; `analytical` has no closed form for stages.
        confidence_z: standard errors taken off gains.
        seed: of candidates.
    """

    tasks: tuple[str, ...]
    weights_T: np.ndarray
    constraints: Constraints
    n_stages: int
    policy: str = "optimum"
    confidence_z: float = 1.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class StageChoice:
    """The mixture of a stage.

    Attributes:
        stage: counted from 0.
        mixture_D: its shares.
        gain: part of the run's gain over the reference in every stage; nan where unknown.
        gain_se: its standard error.
        over_static: its gain over the static mixture in this stage; nan where unknown.
        over_static_se: its standard error.
        reach: how near pool and checkpoint are to those of the runs.
        loss_D: losses at the stage's start that it was chosen at; None where none are known.
    """

    stage: int
    mixture_D: np.ndarray
    gain: float
    gain_se: float
    over_static: float
    over_static_se: float
    reach: Overlap
    loss_D: np.ndarray | None = None


def choose_stage(
    model: StageModel, state_DP: np.ndarray, static_D: np.ndarray, objective: StageObjective
) -> StageChoice:
    """Choose the mixture of one stage.

    Where pool or checkpoint are out of the runs' reach, the reference is kept.

    Args:
        model: of the stage.
        state_DP: covariates of the pool, and of the checkpoint where the model has them.
        static_D: the mixture to compare with.
        objective: what to choose by.

    Raises:
        ConfigError: if no mixture satisfies the constraints.
    """
    table, reach = model.table, reach_of(model.table, state_DP)
    constraints = objective.constraints.doubted(reach.pool_doubt, table.domains)
    rails = {task: most / objective.n_stages for task, most in constraints.guard_rails.items()}
    constraints = replace(constraints, guard_rails=rails)
    if reach.verdict == "unsupported":
        mixture_D, _ = constraints.nearest_reference(table.domains)
        return StageChoice(model.stage, mixture_D, np.nan, np.nan, np.nan, np.nan, reach)
    choice = recommend(
        objective.policy,
        model.estimator,
        reach.edge_DP,
        objective.weights_T,
        constraints,
        domains=table.domains,
        tasks=objective.tasks,
        confidence_z=objective.confidence_z,
        seed=objective.seed,
        unconstrained_too=False,
    )
    over_M, over_se_M = weighted_gain(
        model.estimator, reach.edge_DP, choice.mixture_D[None], static_D, objective.weights_T
    )
    return StageChoice(
        model.stage,
        choice.mixture_D,
        choice.gain,
        choice.gain_se * reach.doubt,
        float(over_M[0]),
        float(over_se_M[0]) * reach.doubt,
        reach,
    )


def state_at(
    model: StageModel,
    state_DP: np.ndarray,
    loss_D: np.ndarray | None,
    slope_D: np.ndarray | None,
) -> np.ndarray:
    """Covariates of the pool, with those of the checkpoint that the model has; (D, P')."""
    added = len(model.table.covariates) - state_DP.shape[1]
    columns = [column for column in (loss_D, slope_D)[:added] if column is not None]
    assert len(columns) == added
    return np.column_stack([state_DP, *columns])


def roll_schedule(
    models: Sequence[StageModel],
    rolls: Sequence[CheckpointModel],
    state_DP: np.ndarray,
    static_D: np.ndarray,
    objective: StageObjective,
) -> list[StageChoice]:
    """Choose stage by stage, each at the checkpoint that the stages before are predicted to leave.

    Args:
        models: of each stage.
        rolls: what follows after each stage but the last.
        state_DP: covariates of the pool.
        static_D: the mixture to compare with.
        objective: what to choose by.
    """
    choices: list[StageChoice] = []
    loss_D = slope_D = None
    for model in models:
        state = state_at(model, state_DP, loss_D, slope_D)
        choices.append(replace(choose_stage(model, state, static_D, objective), loss_D=loss_D))
        if model.stage < len(rolls):
            next_D = rolls[model.stage].predict(state_DP, choices[-1].mixture_D, loss_D)
            slope_D = None if loss_D is None else (next_D - loss_D) * objective.n_stages
            loss_D = next_D
    return choices


def joint_gain(choices: Sequence[StageChoice]) -> tuple[float, float]:
    """Gain of a whole schedule over the reference in every stage, and its standard error.

    Standard errors are added as they are. Each stage is fitted on the same runs, on outcomes
    without what the others were fitted to do, and each mixture is the best of its own fit, so
    their errors go the same way where a pool differs in what covariates don't see.
    """
    return _joined([(choice.gain, choice.gain_se) for choice in choices])


def joint_over_static(choices: Sequence[StageChoice]) -> tuple[float, float]:
    """Gain of a whole schedule over the static mixture, and its standard error."""
    return _joined([(choice.over_static, choice.over_static_se) for choice in choices])


def _joined(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    gains, errors = zip(*parts, strict=True)
    return float(sum(gains)), float(sum(errors))
