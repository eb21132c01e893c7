"""What a comparison of rivals trains: new pool states, each rival's mixtures, settings to try."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.model_tokens import describe_model
from causalmix_pipeline.adapters.rivals import (
    COMPARED_FROM,
    TUNED_FROM,
    NewStates,
    draw_new_states,
)
from causalmix_pipeline.assets.design import proxy_config, specs_of, state_sampler
from causalmix_pipeline.assets.entrants import rounded
from causalmix_pipeline.assets.validation import larger_config
from causalmix_pipeline.core.controller_tuning import (
    TUNING_SEEDS,
    TUNING_STATES,
    Tuning,
    draw_settings,
    make_controller,
    n_settings,
    run_cost,
    tuned_already,
    tuning_lanes,
)
from causalmix_pipeline.core.controllers import ControllerConfig, DoReMi
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.rival_gains import OURS
from causalmix_pipeline.core.rivals import (
    Entrant,
    Lane,
    Read,
    Score,
    Size,
    Track,
    controlled_entrant,
    lanes_of,
    price_specs,
)
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: First data seeds of the comparison, and of the search over settings; the design's are drawn.
COMPARED_SEEDS_FROM, TUNED_SEEDS_FROM = 900_000, 800_000

#: Rivals whose mixture is made of the design's own runs, as ours is.
FROM_THE_DESIGN = (OURS, "recommended_free", "schedule", "grid", "regmix", "log_linear")


@dataclass(frozen=True, eq=False)
class Contest:
    """What there is to train before the controllers' settings are chosen.

    Attributes:
        domains: D names.
        sizes: the smallest first.
        track: pool states and seeds of the comparison.
        tuned_track: those that settings are tried on.
        entrants: by name of the size, the rivals that have no settings to choose.
        drawn: by controller, the settings to try.
        starts: by controller, where it starts on each state of the comparison; (M, D).
        tuned_starts: and on each that settings are tried on.
        design_tokens: training tokens of the design's runs, in those of the smallest size.
    """

    domains: tuple[str, ...]
    sizes: tuple[Size, ...]
    track: Track
    tuned_track: Track
    entrants: dict[str, tuple[Entrant, ...]]
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
        return [
            lane
            for size in self.sizes
            for lane in lanes_of(
                [*self.entrants[size.name], *controlled],
                self.track,
                [size],
                found_at=self.sizes[0],
            )
        ]

    def to_price(self, read: Read, score: Score) -> list[ProxySpec]:
        """Specs that cost what all of it does; settings that aren't chosen yet cost the first's.

        Args:
            read: the record of a run; None where it has none.
            score: a run's weighted outcome, which settings are chosen by.
        """
        search = (self.drawn, self.tuned_starts, self.tuned_track, self.sizes[0])
        tuning = tuned_already(*search, read=read, score=score)
        first = {kind: settings[0] for kind, settings in self.drawn.items()}
        lanes = self.lanes(tuning.chosen if tuning else first)
        return price_specs([*tuning_lanes(*search), *lanes], read)

    def search_tokens(self, tuning: Tuning) -> dict[str, float]:
        """Training tokens of what each rival searches once, whatever the number of pools."""
        return dict.fromkeys(FROM_THE_DESIGN, self.design_tokens) | tuning.tokens


def sizes_of(settings: Settings, config: ProxyConfig | PretrainedConfig) -> tuple[Size, ...]:
    """The proxy's own size and the larger one; a pretrained proxy's alone.

    The larger one is `compare.larger`, else the largest of `proxy.sizes`, else twice as wide.
    """
    if isinstance(config, PretrainedConfig):
        return (Size(config.model.rstrip("/").rpartition("/")[2], config, flops_a_token(config)),)
    given = settings.compare.larger
    further = settings.proxy.size_configs()[1:]
    largest = max([config, *further], key=lambda each: each.n_parameters)
    larger = replace(config, **given) if given else largest
    if larger == config:
        larger = larger_config(config)
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


def prepare_contest(
    project: Project,
    tokenizer: dict,
    experiment_documents: pl.DataFrame,
    mixture_design: pl.DataFrame,
    make_entrants: Callable[[NewStates, Sequence[Size]], dict[str, tuple[Entrant, ...]]],
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
    design_tokens = tokens_of(design, sizes[0])
    design_runs = round(design_tokens / sizes[0].config.tokens)
    drawn = settings_to_try(settings, sizes[0].config, len(domains), design_runs)
    return Contest(
        domains=tuple(domains),
        sizes=sizes,
        track=on_compared,
        tuned_track=on_tuned,
        entrants=make_entrants(compared, sizes),
        drawn=drawn,
        starts=starts_of(drawn, compared.natural_MD),
        tuned_starts=starts_of(drawn, tuned.natural_MD),
        design_tokens=design_tokens,
    )


def settings_to_try(
    settings: Settings, config: ProxyConfig | PretrainedConfig, n_domains: int, design_runs: int
) -> dict[str, list[ControllerConfig]]:
    """By controller, the settings that its share of training can try; one is tried nowhere.

    Args:
        settings: `compare`.
        config: of the runs that settings are tried by.
        n_domains: D.
        design_runs: what the design cost, in static runs of that size.
    """
    compare, found = settings.compare, {}
    runs = design_runs if compare.tuning_runs is None else compare.tuning_runs
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
    natural_MD = np.array([rounded(natural_D) for natural_D in natural_MD])
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
