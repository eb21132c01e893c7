"""The rivals that have no settings to choose: the mixture of each on new pool states."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.rivals import NewStates
from causalmix_pipeline.assets.recommendation import baselines_for, choose_mixture
from causalmix_pipeline.assets.sizes import with_target
from causalmix_pipeline.assets.stages import choose_schedule, staged_runs
from causalmix_pipeline.core.controllers import Schedule
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.rival_gains import BASE, OURS
from causalmix_pipeline.core.rivals import Entrant, Size, controlled_entrant, static_entrant
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.resources.progress import Progress
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: Rivals made of each pool state and the design's runs; fixed shares and controllers come on top.
#: What is recommended without the policy's limits is as free as ours' rivals are.
MADE = (OURS, "recommended_free", BASE, "natural", "grid", "regmix", "log_linear")

#: Digits of shares: another machine's last bits train no run again.
SHARE_DIGITS = 6

#: Recommends a schedule for a pool state, from settings, a row per domain of the state, its
#: baselines and what is recommended for it; None where that stays the static mixture.
ScheduleOf = Callable[[Settings, pl.DataFrame, pl.DataFrame, Mapping[str, Any]], Schedule | None]


def fixed_shares(settings: Settings, domains: Sequence[str]) -> np.ndarray | None:
    """The mixture tuned by hand: `policy.fixed_mixture`, else the tasks' weights.

    The latter only where each task that counts is named like a domain; None without either.
    """
    fixed = settings.policy.fixed_mixture
    if fixed is None:
        fixed = {task: weight for task, weight in settings.task_weights.items() if weight > 0}
        if not set(fixed) <= set(domains):
            return None
    shares_D = np.array([fixed.get(domain, 0.0) for domain in domains])
    return shares_D / shares_D.sum()


def recommend_for_state(
    settings: Settings, runs: RunTable, cate_model: dict, state: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The baselines of a pool state, a column each, and what is recommended for it."""
    frame = baselines_for(settings, runs, state["natural_share"].to_numpy())
    none = pl.DataFrame(schema={"run_id": pl.String})
    return frame, choose_mixture(settings, runs, cate_model, state, frame, none)


def for_size(settings: Settings, size: Size) -> Settings:
    """The settings with what a run reads as budget; of several sizes, each is asked for itself."""
    asked: dict[str, Any] = {"budget_tokens": size.config.tokens}
    if settings.proxy.sizes and isinstance(size.config, ProxyConfig):
        asked["target_parameters"] = float(size.config.n_parameters)
    policy = settings.policy.model_copy(update=asked)
    return settings.model_copy(update={"policy": policy})


def schedules_of(
    project: Project, run_table: pl.DataFrame, mixture_design: pl.DataFrame, cate_model: dict
) -> ScheduleOf | None:
    """What recommends a schedule, where the design has stages; None where it has none."""
    if project.settings.design.stages == 1:
        return None
    staged = staged_runs(project, run_table, mixture_design)

    def schedule_of(
        settings: Settings,
        state: pl.DataFrame,
        baselines: pl.DataFrame,
        choice: Mapping[str, Any],
    ) -> Schedule | None:
        found = choose_schedule(settings, staged, cate_model, state, baselines, choice)
        if found["recommended"] == "static":
            return None
        return Schedule(
            stages=tuple(
                (part, tuple(rounded(mixture).tolist())) for part, mixture in found["stages"]
            )
        )

    return schedule_of


def entrants_of(
    settings: Settings,
    runs: RunTable,
    cate_model: dict,
    states: NewStates,
    sizes: Sequence[Size],
    *,
    tell: Callable[[str], None],
    schedule_of: ScheduleOf | None = None,
) -> dict[str, tuple[Entrant, ...]]:
    """The rivals that have no settings to choose, on each pool state, by the name of the size.

    Args:
        settings: policy and weights.
        runs: the run table.
        cate_model: the effect model.
        states: of the comparison.
        sizes: each asked for itself; sizes that are asked for the same are asked for once.
        tell: takes lines of progress; a state takes seconds.
        schedule_of: recommends a schedule; None where none is.
    """
    asked = {size.name: for_size(settings, size) for size in sizes}
    same = {name: policy_key(each) for name, each in asked.items()}
    n_made = len({*same.values()}) * len(states.frames)
    progress = Progress(n_made, "new pool states with their mixtures", tell)
    made: dict[tuple, tuple[Entrant, ...]] = {}
    for name, key in same.items():
        if key not in made:
            made[key] = entrants_at(
                asked[name], runs, cate_model, states, progress, schedule_of=schedule_of
            )
    return {name: made[key] for name, key in same.items()}


def policy_key(settings: Settings) -> tuple:
    """What of the settings `for_size` changes."""
    return settings.policy.budget_tokens, settings.policy.target_parameters


def entrants_at(
    settings: Settings,
    runs: RunTable,
    cate_model: dict,
    states: NewStates,
    progress: Progress,
    *,
    schedule_of: ScheduleOf | None = None,
) -> tuple[Entrant, ...]:
    """The rivals of one size; see `entrants_of`."""
    made, schedules = [], []
    for frame in [with_target(settings, frame) for frame in states.frames]:
        baselines, choice = recommend_for_state(settings, runs, cate_model, frame)
        made.append(choice["mixtures"] | {"recommended_free": choice["unconstrained"]})
        schedules.append(schedule_of(settings, frame, baselines, choice) if schedule_of else None)
        progress.add(1)
    found = [
        static_entrant(name, np.array([rounded(each[name]) for each in made])) for name in MADE
    ]
    fixed_D = fixed_shares(settings, runs.domains)
    if fixed_D is not None:
        found.insert(MADE.index("natural") + 1, static_entrant("fixed", rounded(fixed_D)))
    if any(schedules):  # where none is recommended, the static mixture stands in for it
        found.insert(1, Entrant("schedule", found[0].mixture_MD, tuple(schedules)))
    return tuple(found)


def rounded(shares_D: Sequence[float] | np.ndarray) -> np.ndarray:
    """Shares to `SHARE_DIGITS`, sum 1."""
    kept_D = np.round(np.asarray(shares_D, dtype=float), SHARE_DIGITS)
    return kept_D / math.fsum(kept_D)


def stand_ins(
    settings: Settings, states: NewStates, sizes: Sequence[Size]
) -> dict[str, tuple[Entrant, ...]]:
    """Rivals that cost what `entrants_of` does, known at once: mixtures that no other run has."""
    n_states, n_domains = states.natural_MD.shape
    fixed_D = fixed_shares(settings, states.frames[0]["domain"].to_list())
    names = [*MADE, "fixed"] if fixed_D is not None else MADE
    equal_MD = np.full((n_states, n_domains), 1 / n_domains)
    tilts = [1e-6 * (number + 1) * np.eye(n_domains)[0] for number in range(len(names))]
    found = [
        static_entrant(name, (equal_MD + tilt_D) / (1 + tilt_D.sum()))
        for name, tilt_D in zip(names, tilts, strict=True)
    ]
    n_stages = settings.design.stages
    if n_stages > 1:
        stage = (1 / n_stages, tuple(equal_MD[0].tolist()))
        found.append(controlled_entrant("schedule", Schedule(stages=(stage,) * n_stages), equal_MD))
    return {size.name: tuple(found) for size in sizes}
