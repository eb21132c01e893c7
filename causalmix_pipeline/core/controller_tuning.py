"""Settings of controllers that are tried before they are compared: the paper's, and drawn ones.

A random search: the default of the paper comes first, each further setting is drawn by a seed from
the ranges below, so that more draws leave the first ones as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.core.actor_critic import RLScheduler
from causalmix_pipeline.core.controllers import ControllerConfig, DoReMi, OnlineBandit
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.rival_gains import BASE, gains_over
from causalmix_pipeline.core.rivals import (
    Lane,
    Read,
    Score,
    Size,
    Track,
    Train,
    controlled_entrant,
    lanes_of,
    run_lanes,
    static_entrant,
)

#: Controllers that can be compared, by name. A schedule isn't searched, it is recommended.
CONTROLLERS: dict[str, type[ControllerConfig]] = {
    each.kind: each for each in (OnlineBandit, DoReMi, RLScheduler)
}

#: Draws for each setting that is wanted: a range of few values has few different ones.
MOST_DRAWS = 20

#: Pool states that settings are tried on, and seeds of each.
TUNING_STATES, TUNING_SEEDS = 4, 2


@dataclass(frozen=True)
class LogRange:
    """Numbers drawn uniformly on the log scale, to three digits; or 1 less such a number."""

    low: float
    high: float
    from_one: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        """One of the numbers."""
        drawn = float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        return float(f"{1 - drawn if self.from_one else drawn:.3g}")


#: What of each controller is searched: numbers of a range, or one of some values. No setting has
#: more probes than the default, so that none costs more.
RANGES: dict[str, dict[str, LogRange | tuple]] = {
    "online_bandit": {
        "memory": ("average", "sum"),
        "smoothing": LogRange(0.01, 1.0, from_one=True),
        "blocks": (10, 25, 50, 100, 200),
    },
    "doremi": {
        "step_size": LogRange(0.05, 20.0),
        "smoothing": LogRange(1e-4, 0.3),
        "blocks": (25, 50),
    },
    "rl_scheduler": {
        "learning_rate": LogRange(1e-4, 3e-2),
        "discount": (0.0, 0.5, 0.8, 0.95),
        "averaging": (0.0, 0.5, 0.8),
        "noise": (0.0, 0.02, 0.1),
        "warmup": (0.0, 0.1, 0.3),
        "floor": (0.02, 0.1, 0.3),
        "updates": (8, 32),
        "blocks": (25, 50),
    },
}


def make_controller(kind: str, given: Mapping[str, Any]) -> ControllerConfig:
    """A controller by its name, with some settings; the others have the paper's values.

    Raises:
        ConfigError: if the name or a setting isn't known, or a setting breaks its rule.
    """
    if kind not in CONTROLLERS:
        raise ConfigError(
            f"compare.controllers must be among {', '.join(CONTROLLERS)}, got {kind!r}: correct "
            "the name."
        )
    known = [each.name for each in fields(CONTROLLERS[kind])]
    odd = [name for name in given if name not in known]
    if odd:
        raise ConfigError(
            f"compare.controllers.{kind} must have settings among {', '.join(known)}, got "
            f"{odd[0]!r}: correct the name."
        )
    place = f"compare.controllers.{kind}"
    check_values(place, given, {each.name: each.default for each in fields(CONTROLLERS[kind])})
    try:
        return CONTROLLERS[kind](**given)
    except ConfigError as error:
        raise ConfigError(str(error).replace("controller.", f"{place}.", 1)) from error


def check_values(place: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that each value is of the kind of its default.

    Args:
        place: where the values stand in the settings.
        given: values by name.
        defaults: the default of each.

    Raises:
        ConfigError: naming the first that isn't.
    """
    for name, value in given.items():
        default = defaults[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, float):
            rule, holds = "a finite number", is_number and math.isfinite(value)
        elif isinstance(default, int) and not isinstance(default, bool):
            rule, holds = "a whole number", is_number and isinstance(value, int)
        else:
            rule = {bool: "true or false", str: "text"}[type(default)]
            holds = isinstance(value, type(default))
        if not holds:
            yaml = "; YAML takes 1e-4 for text, so write 1.0e-4" if isinstance(value, str) else ""
            raise ConfigError(
                f"{place}.{name} must be {rule}, got {value!r}: its default is {default!r}{yaml}."
            )


def draw_settings(
    kind: str, given: Mapping[str, Any], n: int, *, seed: int
) -> list[ControllerConfig]:
    """The settings to try of a controller: first those of the paper, then drawn ones.

    Args:
        kind: name of the controller.
        given: settings that stay as they are in all of them.
        n: how many different ones, at least 1; fewer where there are no more.
        seed: of the draws.
    """
    found = {make_controller(kind, given): None}
    for number in range(1, MOST_DRAWS * n):
        if len(found) == n:
            break
        rng = np.random.default_rng([seed, number, *kind.encode()])
        values = {
            name: each.draw(rng)
            if isinstance(each, LogRange)
            else each[int(rng.integers(len(each)))]
            for name, each in RANGES[kind].items()
        }
        values |= given
        if values.get("memory") == "sum" and "smoothing" not in given:  # it smooths nothing
            del values["smoothing"]
        found.setdefault(make_controller(kind, values))
    return list(found)


def run_cost(
    controller: ControllerConfig | None, config: ProxyConfig | PretrainedConfig, n_domains: int
) -> float:
    """What a controlled run costs at most, in static runs of its size; 1 without a controller.

    A probe ends each block but the last. It is a forward pass, two with a reference, or with
    gradients a training pass; the reference is a static run more.
    """
    if controller is None:
        return 1.0
    probes = (len(controller.ends(config.steps)) - 1) * n_domains * controller.n_probed
    probed = probes * config.sequence_length / config.tokens
    if controller.needs_gradients:
        return 1.0 + probed
    frozen = isinstance(config, PretrainedConfig) and config.method == "lora"
    forwards = 2 if frozen else 3  # forward passes that cost as much as training
    if controller.needs_reference:
        return 2.0 + 2 * probed / forwards
    return 1.0 + probed / forwards


def n_settings(
    controller: ControllerConfig,
    config: ProxyConfig | PretrainedConfig,
    n_domains: int,
    *,
    tuning_runs: float,
) -> int:
    """How many settings can be tried, 1 at least, which is the default and tried nowhere.

    Args:
        controller: with its default settings.
        config: of the runs that settings are tried by.
        n_domains: D.
        tuning_runs: what the search may cost, in static runs.
    """
    cost = run_cost(controller, config, n_domains) + isinstance(controller, DoReMi)
    return max(1, int(tuning_runs // (TUNING_STATES * TUNING_SEEDS * cost)))


@dataclass(frozen=True, eq=False)
class Tuning:
    """What a search over the settings of controllers found.

    Attributes:
        chosen: by controller, the settings with the fewest diverged runs, and of those the
            largest mean gain over equal.
        trials: a row per controller and setting tried: number, settings, gain over equal, se,
            diverged runs, tokens, chosen.
        tokens: by controller, the training tokens of all its trials.
    """

    chosen: dict[str, ControllerConfig]
    trials: list[dict[str, Any]]
    tokens: dict[str, float]


def tuning_lanes(
    drawn: Mapping[str, Sequence[ControllerConfig]],
    starts: Mapping[str, np.ndarray],
    track: Track,
    size: Size,
) -> list[Lane]:
    """The runs that try settings of controllers, and those of the equal mixture beside them.

    Args:
        drawn: by controller, its settings; a single one isn't tried.
        starts: by controller, the mixture that it starts from on each state; (M, D).
        track: states and seeds that no comparison is made on.
        size: of the runs.
    """
    tried = {kind: settings for kind, settings in drawn.items() if len(settings) > 1}
    if not tried:
        return []
    n_domains = next(iter(starts.values())).shape[1]
    entrants = [static_entrant(BASE, np.full(n_domains, 1 / n_domains))]
    entrants += [
        controlled_entrant(f"{kind}/{number}", settings, starts[kind])
        for kind, of_kind in tried.items()
        for number, settings in enumerate(of_kind)
    ]
    return lanes_of(entrants, track, [size])


def tune(
    drawn: Mapping[str, Sequence[ControllerConfig]],
    starts: Mapping[str, np.ndarray],
    track: Track,
    size: Size,
    *,
    train: Train,
    score: Score,
) -> Tuning:
    """Try settings of controllers and choose the best of each; see `tuning_lanes`.

    The first of a controller's settings wins a tie, and where none has an outcome.
    """
    lanes = tuning_lanes(drawn, starts, track, size)
    outcomes = run_lanes(lanes, train, score) if lanes else None
    chosen, trials, tokens = {}, [], {}
    for kind, settings in drawn.items():
        rows = [{"gain": None, "se": None, "diverged": 0, "tokens": 0.0} for _ in settings]
        if outcomes is not None and len(settings) > 1:
            rows = _trial_rows(outcomes, kind, len(settings))
        best = min(range(len(rows)), key=lambda n: (*_rank(rows[n]), n))
        chosen[kind], tokens[kind] = settings[best], sum(row["tokens"] for row in rows)
        trials += [
            {"controller": kind, "number": n, "settings": asdict(settings[n]), **row,
             "chosen": n == best}
            for n, row in enumerate(rows)
        ]  # fmt: skip
    return Tuning(chosen, trials, tokens)


class NotTrained(LookupError):
    """A run has no record."""


def tuned_already(
    drawn: Mapping[str, Sequence[ControllerConfig]],
    starts: Mapping[str, np.ndarray],
    track: Track,
    size: Size,
    *,
    read: Read,
    score: Score,
) -> Tuning | None:
    """What `tune` finds where every trial is trained; None where one isn't."""

    def records(specs: Sequence[ProxySpec]) -> list[ProxyRecord]:
        found = [record for record in map(read, specs) if record is not None]
        if len(found) < len(specs):
            raise NotTrained
        return found

    try:
        return tune(drawn, starts, track, size, train=records, score=score)
    except NotTrained:
        return None


def _trial_rows(outcomes: pl.DataFrame, kind: str, n: int) -> list[dict[str, Any]]:
    gains = {row["entrant"]: row for row in gains_over(outcomes, BASE).to_dicts()}
    cost = pl.col("tokens") + pl.col("search_tokens")
    sums = outcomes.group_by("entrant").agg(
        tokens=cost.sum(), diverged=pl.col("outcome").null_count().cast(pl.Int64)
    )
    sum_of = {row["entrant"]: row for row in sums.to_dicts()}
    names = [f"{kind}/{number}" for number in range(n)]
    return [
        {key: gains[name][key] for key in ("gain", "se")}
        | {key: sum_of[name][key] for key in ("diverged", "tokens")}
        for name in names
    ]


def _rank(row: Mapping[str, Any]) -> tuple[int, float]:
    """Smaller is better: a setting that mostly diverges doesn't win by its one survivor."""
    return row["diverged"], np.inf if row["gain"] is None else -row["gain"]
