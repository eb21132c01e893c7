"""The recommendation against its rivals, on new pool states of real text, at two model sizes.

    python -m causalmix_pipeline_tests.benchmarks.rivals tune
    python -m causalmix_pipeline_tests.benchmarks.rivals compare
    python -m causalmix_pipeline_tests.benchmarks.rivals size

`tune` tries settings of each controller on pool states of their own, with the compute of the
design's runs. `compare` trains the recommended mixture, what a team would train on otherwise, and
the controllers, on states that nothing has seen: half of them natural, half planted. `size` fits
a design of the larger model, and trains what it recommends beside what the small one recommends.
Everything is kept in the run store, so a stopped one goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.baseline_mixtures import make_baselines
from causalmix_pipeline.adapters.estimators import choose_estimator, fit_chosen
from causalmix_pipeline.adapters.experiment import keep_states, measure_states
from causalmix_pipeline.adapters.local_backend import engine_name
from causalmix_pipeline.adapters.rivals import describe_state
from causalmix_pipeline.core.controller_tuning import (
    CONTROLLERS,
    TUNING_SEEDS,
    TUNING_STATES,
    Tuning,
    draw_settings,
    make_controller,
    n_settings,
    tune,
)
from causalmix_pipeline.core.controllers import ControllerConfig
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.policy import Constraints, recommend
from causalmix_pipeline.core.pool_state import (
    Membership,
    StateRanges,
    draw_state,
    index_documents,
)
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.rival_gains import rival_table
from causalmix_pipeline.core.rivals import (
    Entrant,
    Lane,
    Score,
    Size,
    Track,
    Train,
    controlled_entrant,
    lanes_of,
    run_lanes,
    static_entrant,
    weighted_score,
)
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline_tests.benchmarks.state_matters import (
    DEFAULT_COVARIATES,
    OBJECTIVES,
    STATES,
    Bench,
    prepare,
    run_design,
    train,
    weights_of,
)

#: States of the design vary in everything that the natural and the planted ones vary in.
BOTH = StateRanges(
    blend_sources=True, size_range=(0.1, 1.0), tilt_sd=1.0, repetition=0.55, noise=0.6
)
#: A model 8.1 times the proxy's size; scanned apart, on states of their own.
LARGE = {"hidden": 104, "layers": 2, "heads": 2, "learning_rate": 0.004, "init_std": 0.04,
         "steps": 1000, "bf16": True}  # fmt: skip
#: First pool state and first data seed of each experiment; the design's states begin at 0.
NEW_FROM, TUNING_FROM = 50_000, 60_000
NEW_SEEDS_FROM, TUNING_SEEDS_FROM = 910_000, 710_000
OBJECTIVE = "wants"


@dataclass(frozen=True, eq=False)
class Places:
    """Pool states that mixtures are tried on.

    Attributes:
        hashes: M states, half natural, half planted.
        state_MDP: their covariates, scaled.
        natural_MD: token shares of their domains.
    """

    hashes: list[str]
    state_MDP: np.ndarray
    natural_MD: np.ndarray


def places_of(bench: Bench, first: int, n_states: int) -> Places:
    """New states: the first half natural, the second planted."""
    memberships: list[Membership] = []
    for m in range(n_states):
        ranges = STATES["natural" if m < n_states // 2 else "planted"]
        index = index_documents(bench.documents, bench.domains, ranges)
        memberships.append(draw_state(index, ranges, state_id=first + m, seed=0)[1])
    names = bench.normaliser.covariates
    values_MDP = measure_states(bench.documents, bench.domains, names, memberships, bench.sampler)
    columns = [names.index(name) for name in DEFAULT_COVARIATES]
    described = [describe_state(bench.documents, bench.domains, each) for each in memberships]
    return Places(
        keep_states(bench.store, bench.documents, bench.domains, memberships),
        bench.normaliser.scale(values_MDP)[:, :, columns],
        np.array([frame["natural_share"].to_numpy() for frame in described]),
    )


def track_of(bench: Bench, places: Places, first_seed: int, seeds: int) -> Track:
    """Where runs are made."""
    return Track(
        tuple(places.hashes),
        tuple(first_seed + s for s in range(seeds)),
        bench.tokens_hash,
        bench.eval_hash,
        engine_name(),
    )


def size_of(config: ProxyConfig) -> Size:
    """A size by its name."""
    return Size(f"{config.hidden}x{config.layers}", config, config.flops / config.tokens)


def trainer(bench: Bench, label: str) -> Train:
    """Trains what is missing, with a line of progress."""
    return lambda specs: train(bench, list(specs), label)


def score_of(bench: Bench) -> Score:
    """Minus the weighted loss, bits per byte."""
    weights = weights_of(OBJECTIVE, bench.tasks).tolist()
    return weighted_score(dict(zip(bench.tasks, weights, strict=True)))


def tuned_controllers(bench: Bench, n_runs: int) -> Tuning:
    """Settings of each controller, searched with the compute of `n_runs` static runs."""
    places = places_of(bench, TUNING_FROM, TUNING_STATES * TUNING_SEEDS)
    n_domains, config = len(bench.domains), ProxyConfig()
    drawn = {
        kind: draw_settings(
            kind,
            {},
            n_settings(make_controller(kind, {}), config, n_domains, tuning_runs=n_runs),
            seed=0,
        )
        for kind in CONTROLLERS
    }
    return tune(
        drawn,
        starts_of(places),
        track_of(bench, places, TUNING_SEEDS_FROM, 1),
        size_of(config),
        train=trainer(bench, "tuning"),
        score=score_of(bench),
    )


def recommended(bench: Bench, runs: RunTable, places: Places) -> tuple[np.ndarray, np.ndarray]:
    """The recommended mixture of each state (M, D), and its promised gain over equal (M,)."""
    weights_T = weights_of(OBJECTIVE, bench.tasks)
    choice = choose_estimator(runs)
    print(choice.chosen)
    estimator = fit_chosen(
        runs, choice.chosen, 0, parameters=choice.parameters, calibration=choice.calibration
    )
    equal_D = np.full(len(bench.domains), 1 / len(bench.domains))
    found = [
        recommend(
            "optimum", estimator, state_DP, weights_T, Constraints.simplex_only(equal_D),
            domains=bench.domains, unconstrained_too=False,
        )
        for state_DP in places.state_MDP
    ]  # fmt: skip
    return np.array([f.mixture_D for f in found]), np.array([f.gain for f in found])


def static_rivals(bench: Bench, runs: RunTable, places: Places) -> dict[str, np.ndarray]:
    """Mixtures (M, D) of everything that doesn't look at the pool's covariates."""
    weights_T = weights_of(OBJECTIVE, bench.tasks)
    wanted = OBJECTIVES[OBJECTIVE]
    assert wanted is not None
    fixed_D = np.array([wanted.get(domain, 0.0) for domain in bench.domains])
    made = [make_baselines(runs, weights_T, n_D, fixed_D) for n_D in places.natural_MD]
    names = ("equal", "natural", "fixed", "grid", "regmix", "log_linear")
    return {name: np.array([m[name] for m in made]) for name in names}


def starts_of(places: Places) -> dict[str, np.ndarray]:
    """Where controllers start: the reference of DoReMi from natural shares, others from equal."""
    equal_MD = np.full(places.natural_MD.shape, 1 / places.natural_MD.shape[1])
    return {kind: places.natural_MD if kind == "doremi" else equal_MD for kind in CONTROLLERS}


def entrants_of(
    bench: Bench, runs: RunTable, places: Places, tuned: Mapping[str, ControllerConfig]
) -> list[Entrant]:
    """All that is compared; ours without limits, as its rivals are."""
    mixture_MD, promised_M = recommended(bench, runs, places)
    print(f"promised over equal: {promised_M.mean():.4f} bits per byte")
    static, starts = static_rivals(bench, runs, places), starts_of(places)
    return [
        *(static_entrant(name, mixture_MD) for name, mixture_MD in static.items()),
        static_entrant("recommended", mixture_MD),
        *(controlled_entrant(kind, each, starts[kind]) for kind, each in tuned.items()),
    ]


def by_state(lanes: list[Lane]) -> list[Lane]:
    """State by state, so that what is there after half the time is half of the states."""
    return sorted(lanes, key=lambda lane: lane.state)


def compare(
    bench: Bench, runs: RunTable, tuning: Tuning, n_states: int, seeds: int, sizes: Sequence[Size]
) -> pl.DataFrame:
    """Train everything on new states, and say what each gained and cost."""
    places = places_of(bench, NEW_FROM, n_states)
    track = track_of(bench, places, NEW_SEEDS_FROM, seeds)
    entrants = entrants_of(bench, runs, places, tuning.chosen)
    parts = [
        run_lanes(
            by_state(lanes_of(entrants, track, [sizes[0], size] if size != sizes[0] else [size])),
            trainer(bench, size.name),
            score_of(bench),
        ).filter(size=size.name)
        for size in sizes
    ]
    outcomes = pl.concat(parts).with_columns(
        kind=pl.when(pl.col("state") < n_states // 2)
        .then(pl.lit("natural"))
        .otherwise(pl.lit("planted"))
    )
    outcomes.write_csv(bench.store.root / "rivals_runs.csv")  # type: ignore[operator]
    design = float(runs.n_runs * sizes[0].config.tokens)
    search = dict.fromkeys(("recommended", "grid", "regmix", "log_linear"), design)
    tables = [
        rival_table(part, sizes, search | tuning.tokens).with_columns(states_of=pl.lit(kind))
        for kind, part in [
            ("all", outcomes),
            *((kind, outcomes.filter(kind=kind)) for kind in ("natural", "planted")),
        ]
    ]
    return pl.concat(tables)


def sizes_compared(
    bench: Bench, runs: RunTable, large: Size, n_runs: int, n_states: int, seeds: int
) -> pl.DataFrame:
    """What mixtures gain at the larger size that its own design recommends, or the small one's."""
    assert isinstance(large.config, ProxyConfig)
    own = run_design(bench, DesignPlan(n_runs=n_runs), large.config, DEFAULT_COVARIATES)
    places = places_of(bench, NEW_FROM, n_states)
    equal_D = np.full(len(bench.domains), 1 / len(bench.domains))
    entrants = [
        static_entrant("equal", equal_D),
        static_entrant("recommended", recommended(bench, own, places)[0]),
        static_entrant("recommended by the small size", recommended(bench, runs, places)[0]),
    ]
    lanes = lanes_of(entrants, track_of(bench, places, NEW_SEEDS_FROM, seeds), [large])
    outcomes = run_lanes(by_state(lanes), trainer(bench, large.name), score_of(bench))
    small = size_of(ProxyConfig())
    cost = runs.n_runs * small.config.tokens * small.flops_a_token / large.flops_a_token
    search = {
        "recommended": float(own.n_runs * large.config.tokens),
        "recommended by the small size": cost,
    }
    return rival_table(outcomes, [large], search)


def show(table: pl.DataFrame) -> None:
    """Print a whole table."""
    with pl.Config(tbl_rows=-1, tbl_cols=-1, float_precision=4, fmt_str_lengths=90):
        print(table)


def main() -> None:
    """Run one of the parts and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["tune", "compare", "size"])
    parser.add_argument("--pool", type=Path, default=Path("data/demo"), help="the demo pool")
    parser.add_argument("--out", type=Path, default=Path("data/study"), help="run store, tables")
    parser.add_argument("--runs", type=int, default=160, help="proxy runs of the design")
    parser.add_argument("--large-runs", type=int, default=128, help="of the larger size's design")
    parser.add_argument("--states", type=int, default=16, help="new pool states")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", choices=["small", "both"], default="both")
    parser.add_argument("--large", default=json.dumps(LARGE), help="the larger model's recipe")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    bench = prepare(args.pool, "first", args.out, BOTH, args.workers)
    large = replace(ProxyConfig(), **json.loads(args.large))
    runs = run_design(bench, DesignPlan(n_runs=args.runs), ProxyConfig(), DEFAULT_COVARIATES)
    if args.what != "size":
        tuning = tuned_controllers(bench, args.runs)
        trials = pl.DataFrame(
            [{**row, "settings": json.dumps(row["settings"])} for row in tuning.trials]
        )
        trials.write_csv(args.out / "rivals_tuning.csv")
        show(trials)
    if args.what == "compare":
        sizes = [size_of(ProxyConfig()), *([size_of(large)] if args.sizes == "both" else [])]
        table = compare(bench, runs, tuning, args.states, args.seeds, sizes)
        table.write_csv(args.out / "rivals.csv")
        show(table)
    if args.what == "size":
        table = sizes_compared(
            bench, runs, size_of(large), args.large_runs, args.states, args.seeds
        )
        table.write_csv(args.out / "rivals_size.csv")
        show(table)


if __name__ == "__main__":
    main()
