"""What a team could do instead: each rival trained on new pool states, and what each gained.

A rival is a mixture for each state, and perhaps a controller that changes it while it trains. All
read the same tokens of the same states with the same seeds. DoReMi is its whole protocol
(arXiv 2305.10429): a run at the smallest size finds the mixture, which then trains static runs of
every size. What a rival's search cost is counted beside its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from causalmix_pipeline.core.controllers import ControllerConfig, DoReMi
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.tasks import Direction, outcome_of

#: Trains the specs that lack a record, each once, and returns the records of all in their order.
Train = Callable[[Sequence[ProxySpec]], Sequence[ProxyRecord]]
#: A run's record where it's trained already, else None.
Read = Callable[[ProxySpec], ProxyRecord | None]
#: A run's weighted outcome, larger is better; None where it diverged.
Score = Callable[[ProxyRecord], float | None]

#: Added to the data seed of a run that is priced and never trained.
NEVER_SEEDS_FROM = 2**40


@dataclass(frozen=True)
class Size:
    """A model that rivals are trained as.

    Attributes:
        name: such as 32x1.
        config: model and recipe.
        flops_a_token: floating-point operations of training on a token.
    """

    name: str
    config: ProxyConfig | PretrainedConfig
    flops_a_token: float = 1.0


@dataclass(frozen=True)
class Track:
    """Pool states that rivals train on, the same for all of them.

    Attributes:
        state_hashes: M states.
        seeds: data seeds of each state.
        tokens_hash: token store of the states.
        eval_hash: what is scored.
        engine: what trains.
    """

    state_hashes: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens_hash: str
    eval_hash: str
    engine: str

    def spec(
        self,
        state: int,
        seed: int,
        mixture_D: np.ndarray,
        config: ProxyConfig | PretrainedConfig,
        controller: ControllerConfig | None = None,
    ) -> ProxySpec:
        """A run on one of the states."""
        return ProxySpec(
            state_hash=self.state_hashes[state],
            tokens_hash=self.tokens_hash,
            eval_hash=self.eval_hash,
            mixture=tuple(np.asarray(mixture_D, dtype=float).tolist()),
            data_seed=seed,
            config=config,
            engine=self.engine,
            controller=controller,
        )


@dataclass(frozen=True, eq=False)
class Entrant:
    """A rival.

    Attributes:
        name: of the rival.
        mixture_MD: mixture of each state, or where its controller starts.
        controllers: of each state; None trains the mixture as it is.
    """

    name: str
    mixture_MD: np.ndarray
    controllers: tuple[ControllerConfig | None, ...]


def static_entrant(name: str, mixture_MD: np.ndarray) -> Entrant:
    """A rival that keeps its mixture; one mixture (D,) for all states, or one for each (M, D)."""
    mixture_MD = np.atleast_2d(mixture_MD)
    return Entrant(name, mixture_MD, (None,) * len(mixture_MD))


def controlled_entrant(name: str, controller: ControllerConfig, start_MD: np.ndarray) -> Entrant:
    """A rival whose controller starts from a mixture of each state."""
    return Entrant(name, start_MD, (controller,) * len(start_MD))


@dataclass(frozen=True)
class Lane:
    """A run of a rival.

    Attributes:
        entrant: name of the rival.
        size: name of the size.
        state: number of the pool state.
        seed: of the data.
        spec: the run; with a finder its mixture isn't known before that has ended.
        finder: the run that finds the mixture.
    """

    entrant: str
    size: str
    state: int
    seed: int
    spec: ProxySpec
    finder: ProxySpec | None = None

    def settled(self, found: ProxyRecord) -> ProxySpec:
        """The run, once its finder has ended; `found` is the finder's record, or the run's own.

        A finder that diverged before any block found nothing: it stays the lane's only run.
        """
        if self.finder is None:
            return self.spec
        shares = (found.control or {}).get("mean_shares")
        if shares is None:
            return self.finder
        mean_D = np.array(shares, dtype=float)
        return replace(self.spec, mixture=tuple((mean_D / mean_D.sum()).tolist()))


def lanes_of(
    entrants: Sequence[Entrant],
    track: Track,
    sizes: Sequence[Size],
    *,
    found_at: Size | None = None,
) -> list[Lane]:
    """The runs of rivals: each on every state, with every seed, at every size.

    Args:
        entrants: the rivals; a mixture of one row is that of all states.
        track: states and seeds.
        sizes: of the runs.
        found_at: size at which DoReMi finds its mixture; None takes the first.
    """
    finder_config = (found_at or sizes[0]).config
    lanes = []
    for size in sizes:
        for entrant in entrants:
            for state in range(len(track.state_hashes)):
                row = state if len(entrant.mixture_MD) > 1 else 0
                mixture_D, controller = entrant.mixture_MD[row], entrant.controllers[row]
                for seed in track.seeds:
                    finder = None
                    if isinstance(controller, DoReMi):
                        finder = track.spec(state, seed, mixture_D, finder_config, controller)
                    own = None if finder is not None else controller
                    spec = track.spec(state, seed, mixture_D, size.config, own)
                    lanes.append(Lane(entrant.name, size.name, state, seed, spec, finder))
    return lanes


def nothing_read(spec: ProxySpec) -> ProxyRecord | None:
    """What a store without a record has of a run."""
    return None


def price_specs(lanes: Sequence[Lane], read: Read = nothing_read) -> list[ProxySpec]:
    """Specs that cost what the lanes do; runs whose mixture isn't found yet have a stand-in."""
    found = []
    for lane in lanes:
        record = None if lane.finder is None else read(lane.finder)
        if lane.finder is None:
            found.append(lane.spec)
        elif record is None:
            found += [lane.finder, untrained(lane.spec)]
        else:
            found += [lane.finder, lane.settled(record)]
    return found


def untrained(spec: ProxySpec) -> ProxySpec:
    """A run of the same cost that nobody trains, for its price."""
    return replace(spec, data_seed=spec.data_seed + NEVER_SEEDS_FROM)


def run_lanes(lanes: Sequence[Lane], train: Train, score: Score) -> pl.DataFrame:
    """Train lanes and tell what they gave; what is in the store already isn't trained again.

    Returns:
        A row per lane: entrant, size, state, seed, outcome (null where it diverged), tokens (its
        own, with those of probes; 0 where its finder found nothing to train) and search_tokens
        (its finder's).
    """
    firsts = train([lane.finder or lane.spec for lane in lanes])
    finals = [lane.settled(first) for lane, first in zip(lanes, firsts, strict=True)]
    records = train(finals) if any(lane.finder for lane in lanes) else firsts
    rows = [
        {
            "entrant": lane.entrant,
            "size": lane.size,
            "state": lane.state,
            "seed": lane.seed,
            "outcome": score(record),
            "tokens": 0.0 if spec == lane.finder else run_tokens(record, spec),
            "search_tokens": run_tokens(first, lane.finder) if lane.finder else 0.0,
        }
        for lane, first, spec, record in zip(lanes, firsts, finals, records, strict=True)
    ]
    return pl.DataFrame(rows, schema_overrides={"outcome": pl.Float64, "search_tokens": pl.Float64})


def run_tokens(record: ProxyRecord, spec: ProxySpec) -> float:
    """Training tokens of the same cost as all that a run computed."""
    return float(spec.config.tokens if record.control is None else record.control["total_tokens"])


def weighted_score(
    weights: Mapping[str, float], directions: Mapping[str, Direction] | None = None
) -> Score:
    """What tells a run's weighted outcome: weights are divided by their sum."""
    wanted = {task: weight for task, weight in weights.items() if weight > 0}
    total = sum(wanted.values())

    def score(record: ProxyRecord) -> float | None:
        outcomes = [outcome_of(record, task, directions) for task in wanted]
        if any(outcome is None for outcome in outcomes):
            return None
        pairs = zip(wanted.values(), outcomes, strict=True)
        return sum(weight * outcome for weight, outcome in pairs if outcome is not None) / total

    return score
