"""What a comparison of rivals trains: new pool states, each rival's mixtures, settings to try."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.baseline_mixtures import make_baselines
from causalmix_pipeline.adapters.model_tokens import describe_model
from causalmix_pipeline.adapters.rivals import (
    COMPARED_FROM,
    TUNED_FROM,
    NewStates,
    draw_new_states,
)
from causalmix_pipeline.assets.design import proxy_config, specs_of, state_sampler
from causalmix_pipeline.assets.recommendation import choose_mixture, weights_of
from causalmix_pipeline.assets.sizes import with_target
from causalmix_pipeline.assets.stages import choose_schedule, staged_runs
from causalmix_pipeline.assets.validation import larger_config
from causalmix_pipeline.core.controller_tuning import (
    TUNING_SEEDS,
    TUNING_STATES,
    Tuning,
    draw_settings,
    make_controller,
    n_settings,
    run_cost,
    tuning_lanes,
)
from causalmix_pipeline.core.controllers import ControllerConfig, DoReMi, Schedule
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.rival_gains import BASE, OURS
from causalmix_pipeline.core.rivals import (
    Entrant,
    Lane,
    Size,
    Track,
    controlled_entrant,
    lanes_of,
    price_specs,
    static_entrant,
)
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.resources.progress import Progress
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: First data seeds of the comparison, and of the search over settings; the design's are drawn.
COMPARED_SEEDS_FROM, TUNED_SEEDS_FROM = 900_000, 800_000

#: Rivals whose mixture is made of the design's own runs, as ours is.
FROM_THE_DESIGN = (OURS, "schedule", "grid", "regmix", "log_linear")

#: Rivals made of each pool state and the design's runs; fixed shares and controllers come on top.
MADE = (OURS, BASE, "natural", "grid", "regmix", "log_linear")

#: Recommends a schedule for a pool state, from a row per domain of it, its baselines and what is
#: recommended for it; None where that stays the static mixture.
ScheduleOf = Callable[[pl.DataFrame, pl.DataFrame, Mapping[str, Any]], Schedule | None]


@dataclass(frozen=True, eq=False)
class Contest:
    """What there is to train before the controllers' settings are chosen.

    Attributes:
        domains: D names.
        sizes: the smallest first.
        track: pool states and seeds of the comparison.
        tuned_track: those that settings are tried on.
        entrants: the rivals that have no settings to choose.
        drawn: by controller, the settings to try.
        starts: by controller, where it starts on each state of the comparison; (M, D).
        tuned_starts: and on each that settings are tried on.
        design_tokens: training tokens of the design's runs, in those of the smallest size.
    """

    domains: tuple[str, ...]
    sizes: tuple[Size, ...]
    track: Track
    tuned_track: Track
    entrants: tuple[Entrant, ...]
    drawn: dict[str, list[ControllerConfig]]
    starts: dict[str, np.ndarray]
    tuned_starts: dict[str, np.ndarray]
    design_tokens: float

    def lanes(self, chosen: Mapping[str, ControllerConfig]) -> list[Lane]:
        """Every run of the comparison, the controllers with these settings."""
        controlled = [
            controlled_entrant(kind, controller, self.starts[kind])
            for kind, controller in chosen.items()
        ]
        return lanes_of([*self.entrants, *controlled], self.track, self.sizes)

    def to_price(self) -> list[ProxySpec]:
        """Specs that cost what all of it does; settings that aren't chosen yet cost the first's."""
        tried = tuning_lanes(self.drawn, self.tuned_starts, self.tuned_track, self.sizes[0])
        first = {kind: settings[0] for kind, settings in self.drawn.items()}
        return price_specs([*tried, *self.lanes(first)])

    def search_tokens(self, tuning: Tuning) -> dict[str, float]:
        """Training tokens of what each rival searches once, whatever the number of pools."""
        return dict.fromkeys(FROM_THE_DESIGN, self.design_tokens) | tuning.tokens


def sizes_of(settings: Settings, config: ProxyConfig | PretrainedConfig) -> tuple[Size, ...]:
    """The proxy's own size and the larger one; a pretrained proxy's alone."""
    if isinstance(config, PretrainedConfig):
        return (Size(config.model.rstrip("/").rpartition("/")[2], config, flops_a_token(config)),)
    given = settings.compare.larger
    larger = replace(config, **given) if given else larger_config(config)
    names = [f"{each.hidden}x{each.layers}" for each in (config, larger)]
    if names[0] == names[1]:
        names[1] += ", larger"
    both = zip(names, (config, larger), strict=True)
    return tuple(Size(name, each, flops_a_token(each)) for name, each in both)


def flops_a_token(config: ProxyConfig | PretrainedConfig) -> float:
    """Floating-point operations of training on a token."""
    if isinstance(config, ProxyConfig):
        return config.flops / config.tokens
    facts = describe_model(config.model)
    flops = config.flops(facts.n_parameters, layers=facts.layers, hidden=facts.hidden)
    return flops / config.tokens


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
    policy, natural_D = settings.policy, state["natural_share"].to_numpy()
    fixed = policy.fixed_mixture
    made = make_baselines(
        runs,
        weights_of(settings, runs),
        natural_D,
        None if fixed is None else np.array([fixed.get(domain, 0.0) for domain in runs.domains]),
        seed=settings.seed,
    )
    frame = pl.DataFrame({"domain": runs.domains, **made, "reference": made[policy.reference]})
    none = pl.DataFrame(schema={"run_id": pl.String})
    return frame, choose_mixture(for_states(settings), runs, cate_model, state, frame, none)


def for_states(settings: Settings) -> Settings:
    """The settings with each pool state's own tokens as budget: the planned run's are another's."""
    policy = settings.policy.model_copy(update={"budget_tokens": None})
    return settings.model_copy(update={"policy": policy})


def schedules_of(
    project: Project, run_table: pl.DataFrame, mixture_design: pl.DataFrame, cate_model: dict
) -> ScheduleOf | None:
    """What recommends a schedule, where the design has stages; None where it has none."""
    if project.settings.design.stages == 1:
        return None
    settings, staged = for_states(project.settings), staged_runs(project, run_table, mixture_design)

    def schedule_of(
        state: pl.DataFrame, baselines: pl.DataFrame, choice: Mapping[str, Any]
    ) -> Schedule | None:
        found = choose_schedule(settings, staged, cate_model, state, baselines, choice)
        return None if found["recommended"] == "static" else Schedule(stages=found["stages"])

    return schedule_of


def entrants_of(
    settings: Settings,
    runs: RunTable,
    cate_model: dict,
    states: NewStates,
    *,
    tell: Callable[[str], None],
    schedule_of: ScheduleOf | None = None,
) -> list[Entrant]:
    """The rivals that have no settings to choose, on each pool state.

    Args:
        settings: policy and weights.
        runs: the run table.
        cate_model: the effect model.
        states: of the comparison.
        tell: takes lines of progress; a state takes seconds.
        schedule_of: recommends a schedule; None where none is.
    """
    progress = Progress(len(states.frames), "new pool states with their mixtures", tell)
    made, schedules = [], []
    for frame in [with_target(settings, frame) for frame in states.frames]:
        baselines, choice = recommend_for_state(settings, runs, cate_model, frame)
        made.append(choice["mixtures"])
        schedules.append(schedule_of(frame, baselines, choice) if schedule_of else None)
        progress.add(1)
    found = [static_entrant(name, np.array([each[name] for each in made])) for name in MADE]
    fixed_D = fixed_shares(settings, runs.domains)
    if fixed_D is not None:
        found.insert(3, static_entrant("fixed", fixed_D))
    if any(schedules):  # where none is recommended, the static mixture stands in for it
        found.insert(1, Entrant("schedule", found[0].mixture_MD, tuple(schedules)))
    return found


def stand_ins(settings: Settings, states: NewStates) -> list[Entrant]:
    """Rivals that cost what `entrants_of` does, known at once: mixtures that no other run has."""
    n_states, n_domains = states.natural_MD.shape
    fixed_D = fixed_shares(settings, states.frames[0]["domain"].to_list())
    names = [*MADE, "fixed"] if fixed_D is not None else MADE
    equal_MD = np.full((n_states, n_domains), 1 / n_domains)
    tilts = [1e-6 * (number + 1) * np.eye(n_domains)[0] for number in range(len(names))]
    return [
        static_entrant(name, (equal_MD + tilt_D) / (1 + tilt_D.sum()))
        for name, tilt_D in zip(names, tilts, strict=True)
    ]


def prepare_contest(
    project: Project,
    tokenizer: dict,
    experiment_documents: pl.DataFrame,
    mixture_design: pl.DataFrame,
    make_entrants: Callable[[NewStates], Sequence[Entrant]],
    *,
    n_states: int,
    n_seeds: int,
) -> Contest:
    """Draw the new pool states, make each rival's mixtures, and draw the settings to try."""
    settings, domains = project.settings, tokenizer["domains"]
    design = specs_of(project, mixture_design)
    sizes = sizes_of(settings, proxy_config(project, design[0].tokens_hash))

    def track(first: int, n: int, first_seed: int, seeds: int) -> tuple[NewStates, Track]:
        states = draw_new_states(
            project.run_store,
            experiment_documents,
            domains,
            project.state_ranges,
            first=first,
            n=n,
            seed=project.design_plan.seed,
            covariates=settings.covariates,
            sampler=state_sampler(project, tokenizer, experiment_documents),
        )
        numbers = tuple(first_seed + settings.seed + k for k in range(seeds))
        one = design[0]
        return states, Track(states.hashes, numbers, one.tokens_hash, one.eval_hash, one.engine)

    compared, on_compared = track(COMPARED_FROM, n_states, COMPARED_SEEDS_FROM, n_seeds)
    tuned, on_tuned = track(TUNED_FROM, TUNING_STATES, TUNED_SEEDS_FROM, TUNING_SEEDS)
    drawn = settings_to_try(settings, sizes[0].config, len(domains), len(design))
    return Contest(
        domains=tuple(domains),
        sizes=sizes,
        track=on_compared,
        tuned_track=on_tuned,
        entrants=tuple(make_entrants(compared)),
        drawn=drawn,
        starts=starts_of(drawn, compared.natural_MD),
        tuned_starts=starts_of(drawn, tuned.natural_MD),
        design_tokens=tokens_of(design, sizes[0]),
    )


def settings_to_try(
    settings: Settings, config: ProxyConfig | PretrainedConfig, n_domains: int, n_design: int
) -> dict[str, list[ControllerConfig]]:
    """By controller, the settings that its share of training can try; one is tried nowhere."""
    compare, found = settings.compare, {}
    runs = n_design if compare.tuning_runs is None else compare.tuning_runs
    for kind, given in compare.controllers.items():
        first = make_controller(kind, given)
        n = n_settings(first, config, n_domains, tuning_runs=runs)
        found[kind] = draw_settings(kind, given, n, seed=settings.seed)
    return found


def starts_of(
    drawn: Mapping[str, Sequence[ControllerConfig]], natural_MD: np.ndarray
) -> dict[str, np.ndarray]:
    """Where each controller starts: DoReMi from the natural mixture, as in the paper, or equal."""
    equal_MD = np.full(natural_MD.shape, 1 / natural_MD.shape[1])
    return {
        kind: natural_MD if isinstance(settings[0], DoReMi) else equal_MD
        for kind, settings in drawn.items()
    }


def tokens_of(specs: Sequence[ProxySpec], size: Size) -> float:
    """Training tokens of runs, in those of a size; probes count."""
    return sum(
        run_cost(spec.controller, spec.config, len(spec.mixture))
        * spec.config.tokens
        * (flops_a_token(spec.config) / size.flops_a_token)
        for spec in {spec.key: spec for spec in specs}.values()
    )
