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
        gain_static: the same part of another mixture, that is compared with.
        reach: how near pool and checkpoint are to those of the runs.
        loss_D: losses at the stage's start that it was chosen at; None where none are known.
    """

    stage: int
    mixture_D: np.ndarray
    gain: float
    gain_se: float
    gain_static: float
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
        return StageChoice(model.stage, mixture_D, np.nan, np.nan, np.nan, reach)
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
    static_M, _ = weighted_gain(
        model.estimator,
        reach.edge_DP,
        static_D[None],
        constraints.reference_D,
        objective.weights_T,
    )
    error = choice.gain_se * reach.doubt
    return StageChoice(model.stage, choice.mixture_D, choice.gain, error, float(static_M[0]), reach)


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

    Stages are drawn independently, so errors of their effects hardly correlate.
    """
    gain = sum(choice.gain for choice in choices)
    return float(gain), float(np.sqrt(sum(choice.gain_se**2 for choice in choices)))
