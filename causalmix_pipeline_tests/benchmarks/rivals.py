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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.baseline_mixtures import make_baselines
from causalmix_pipeline.adapters.estimators import (
    ESTIMATOR_NAMES,
    choose_estimator,
    fit_chosen,
)
from causalmix_pipeline.adapters.experiment import keep_states, measure_states
from causalmix_pipeline.adapters.local_backend import engine_name
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.rivals import describe_state
from causalmix_pipeline.adapters.staged_fits import fit_stages
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
from causalmix_pipeline.core.controllers import ControllerConfig, Schedule
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.gain_calibration import Z90
from causalmix_pipeline.core.policy import Constraints, recommend
from causalmix_pipeline.core.pool_state import (
    Membership,
    StateRanges,
    draw_state,
    index_documents,
)
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
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
from causalmix_pipeline.core.stage_schedule import StageObjective, joint_over_static, roll_schedule
from causalmix_pipeline.core.stages import StagedRuns
from causalmix_pipeline_tests.benchmarks.stage_matters import staged_runs
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
#: Of a schedule.
STAGES = 2


@dataclass(frozen=True)
class Asked:
    """On how much mixtures are tried, and the device that the larger size is trained on."""

    n_states: int
    seeds: int
    large_device: str


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


def places_of(
    bench: Bench, first: int, n_states: int, covariates: Sequence[str] = DEFAULT_COVARIATES
) -> Places:
    """New states: the first half natural, the second planted."""
    memberships: list[Membership] = []
    for m in range(n_states):
        ranges = STATES["natural" if m < n_states // 2 else "planted"]
        index = index_documents(bench.documents, bench.domains, ranges)
        memberships.append(draw_state(index, ranges, state_id=first + m, seed=0)[1])
    names = bench.normaliser.covariates
    values_MDP = measure_states(bench.documents, bench.domains, names, memberships, bench.sampler)
    columns = [names.index(name) for name in covariates]
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
    """Trains what is missing on the device of its engine, with a line of progress."""

    def trained(specs: Sequence[ProxySpec]) -> list[ProxyRecord]:
        for device in ("cpu", "cuda"):
            own = [spec for spec in specs if spec.engine == engine_name(device)]
            if own:
                train(on_device(bench, device), own, f"{label}, {device}")
        return [record for spec in specs if (record := bench.store.get(spec.key))]

    return trained


def on_device(bench: Bench, device: str) -> Bench:
    """The same, its runs trained there."""
    return replace(bench, backend=replace(bench.backend, device=device))


def lanes_at(
    entrants: Sequence[Entrant], track: Track, sizes: Sequence[Size], device: str
) -> list[Lane]:
    """Runs state by state, those of the last size on a device of their own.

    What is there after half the time is half of the states.
    """
    engines = {size.name: track.engine for size in sizes} | {sizes[-1].name: engine_name(device)}
    lanes = [
        replace(lane, spec=replace(lane.spec, engine=engines[lane.size]))
        for lane in lanes_of(entrants, track, sizes)
    ]
    return sorted(lanes, key=lambda lane: lane.state)


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


@dataclass(frozen=True, eq=False)
class Ours:
    """What is recommended for each state.

    Attributes:
        chosen: the estimator that answers, by task.
        mixture_MD: the mixtures.
        promised_M: their promised gains over equal.
        se_M: standard errors of these, seed noise left out.
    """

    chosen: dict[str, str]
    mixture_MD: np.ndarray
    promised_M: np.ndarray
    se_M: np.ndarray


def recommended(
    bench: Bench, runs: RunTable, places: Places, names: Sequence[str] = ESTIMATOR_NAMES
) -> Ours:
    """Recommend a mixture for each state, without limits, as its rivals have none."""
    weights_T = weights_of(OBJECTIVE, bench.tasks)
    choice = choose_estimator(
        runs, names, backend=LocalWorkers(), search_all=True, needs_interval=True
    )
    print(choice.chosen)
    estimator = fit_chosen(
        runs, choice.chosen, 0, parameters=choice.parameters, calibration=choice.calibration
    )
    found = [
        recommend(
            "optimum", estimator, state_DP, weights_T, free_of_limits(bench),
            domains=bench.domains, unconstrained_too=False,
        )
        for state_DP in places.state_MDP
    ]  # fmt: skip
    return Ours(
        choice.chosen,
        np.array([f.mixture_D for f in found]),
        np.array([f.gain for f in found]),
        np.array([f.gain_se for f in found]),
    )


def free_of_limits(bench: Bench) -> Constraints:
    """Any mixture may be recommended; gains are over the equal one."""
    return Constraints.simplex_only(np.full(len(bench.domains), 1 / len(bench.domains)))


def scheduled(bench: Bench, staged: StagedRuns, ours: Ours, places: Places) -> Entrant:
    """A schedule for each state, whatever the trial of stages says of it."""
    weights = dict(zip(bench.tasks, weights_of(OBJECTIVE, bench.tasks).tolist(), strict=True))
    fits = fit_stages(staged, ours.chosen, weights)
    objective = StageObjective(fits.tasks, fits.weights_T, free_of_limits(bench), staged.n_stages)
    rolled = [
        roll_schedule(fits.models, fits.rolls, state_DP, static_D, objective)
        for state_DP, static_D in zip(places.state_MDP, ours.mixture_MD, strict=True)
    ]
    over_M = np.array([joint_over_static(choices)[0] for choices in rolled])
    print(f"schedule promised over static: {over_M.mean():.4f} bits per byte")
    schedules = tuple(
        Schedule(tuple((1 / staged.n_stages, tuple(c.mixture_D.tolist())) for c in choices))
        for choices in rolled
    )
    return Entrant("schedule", ours.mixture_MD, schedules)


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
    bench: Bench,
    runs: RunTable,
    staged: StagedRuns,
    places: Places,
    tuned: Mapping[str, ControllerConfig],
    ours: Ours,
) -> list[Entrant]:
    """All that is compared."""
    static, starts = static_rivals(bench, runs, places), starts_of(places)
    return [
        *(static_entrant(name, mixture_MD) for name, mixture_MD in static.items()),
        static_entrant("recommended", ours.mixture_MD),
        scheduled(bench, staged, ours, places),
        *(controlled_entrant(kind, each, starts[kind]) for kind, each in tuned.items()),
    ]


def compare(
    bench: Bench,
    runs: RunTable,
    staged: StagedRuns,
    tuning: Tuning,
    sizes: Sequence[Size],
    asked: Asked,
) -> pl.DataFrame:
    """Train everything on new states, and say what each gained and cost."""
    places = places_of(bench, NEW_FROM, asked.n_states)
    track = track_of(bench, places, NEW_SEEDS_FROM, asked.seeds)
    ours = recommended(bench, runs, places)
    entrants = entrants_of(bench, runs, staged, places, tuning.chosen, ours)
    parts = [
        run_lanes(
            lanes_at(entrants, track, sizes[: 1 + i], asked.large_device if i else "cpu"),
            trainer(bench, size.name),
            score_of(bench),
        ).filter(size=size.name)
        for i, size in enumerate(sizes)
    ]
    outcomes = pl.concat(parts).with_columns(
        kind=pl.when(pl.col("state") < asked.n_states // 2)
        .then(pl.lit("natural"))
        .otherwise(pl.lit("planted"))
    )
    outcomes.write_csv(bench.store.root / f"rivals_runs_{runs.n_runs}.csv")  # type: ignore[operator]
    show(promises_held(outcomes.filter(size=sizes[0].name), ours))
    design = float(runs.n_runs * sizes[0].config.tokens)
    search: dict[str, float] = {
        name: design for name in ("recommended", "grid", "regmix", "log_linear")
    }
    # What it is held against, the static mixture, needs the other design.
    search["schedule"] = design + staged.runs.n_runs * sizes[0].config.tokens
    tables = [
        rival_table(part, sizes, search | tuning.tokens).with_columns(states_of=pl.lit(kind))
        for kind, part in [
            ("all", outcomes),
            *((kind, outcomes.filter(kind=kind)) for kind in ("natural", "planted")),
        ]
    ]
    return pl.concat(tables)


def promises_held(outcomes: pl.DataFrame, ours: Ours, entrant: str = "recommended") -> pl.DataFrame:
    """What was promised for each state over equal, and what was there.

    Returns:
        A row per state: promised; realised, the mean over seeds, with its se; inside, whether the
        90% interval of the promise, with this se, reaches it; above, whether its lower end does.
    """
    pair = ["state", "seed"]
    equal = outcomes.filter(entrant="equal").select(*pair, equal="outcome")
    gain = pl.col("outcome") - pl.col("equal")
    realised = (
        outcomes.filter(entrant=entrant)
        .join(equal, on=pair)
        .group_by("state")
        .agg(realised=gain.mean(), se=gain.std() / gain.len().sqrt())
        .sort("state")
    )
    # Few seeds tell little of each state's own noise, so it is that of all.
    noise = pl.col("se").pow(2).mean().sqrt()
    short = pl.col("promised") - pl.col("realised")
    reach = Z90 * (pl.col("promised_se").pow(2) + noise.pow(2)).sqrt()
    asked = realised["state"].to_numpy()
    return realised.with_columns(
        promised=pl.Series(ours.promised_M[asked]), promised_se=pl.Series(ours.se_M[asked])
    ).with_columns(inside=short.abs() <= reach, above=short <= reach)


def sizes_compared(
    bench: Bench,
    runs: RunTable,
    large: Size,
    n_runs: int,
    asked: Asked,
) -> pl.DataFrame:
    """What mixtures gain at the larger size that its own design recommends, or the small one's."""
    assert isinstance(large.config, ProxyConfig)
    own = run_design(
        on_device(bench, asked.large_device),
        DesignPlan(n_runs=n_runs),
        large.config,
        DEFAULT_COVARIATES,
    )
    places = places_of(bench, NEW_FROM, asked.n_states)
    equal_D = np.full(len(bench.domains), 1 / len(bench.domains))
    by_small = recommended(bench, runs, places)
    # By the same estimators, so that only the runs differ.
    by_own = recommended(bench, own, places, sorted({*by_small.chosen.values()}))
    entrants = [
        static_entrant("equal", equal_D),
        static_entrant("recommended", by_own.mixture_MD),
        static_entrant("recommended by the small size", by_small.mixture_MD),
    ]
    track = track_of(bench, places, NEW_SEEDS_FROM, asked.seeds)
    lanes = lanes_at(entrants, track, [large], asked.large_device)
    outcomes = run_lanes(lanes, trainer(bench, large.name), score_of(bench))
    small = size_of(ProxyConfig())
    cost = runs.n_runs * small.config.tokens * small.flops_a_token / large.flops_a_token
    search = {
        "recommended": float(own.n_runs * large.config.tokens),
        "recommended by the small size": cost,
    }
    return rival_table(outcomes, [large], search)


def show(table: pl.DataFrame) -> None:
    """Print a whole table."""
    with pl.Config(
        tbl_rows=-1, tbl_cols=-1, float_precision=4, fmt_str_lengths=90, tbl_width_chars=240
    ):
        print(table)


def main() -> None:
    """Run one of the parts and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["tune", "compare", "size"])
    parser.add_argument("--pool", type=Path, default=Path("data/demo"), help="the demo pool")
    parser.add_argument("--out", type=Path, default=Path("data/study"), help="run store, tables")
    parser.add_argument("--runs", type=int, default=160, help="proxy runs of the design")
    parser.add_argument(
        "--rival-runs",
        type=int,
        default=0,
        help="whose compute each controller's search and the schedule's design get; 0: --runs",
    )
    parser.add_argument("--large-runs", type=int, default=128, help="of the larger size's design")
    parser.add_argument("--states", type=int, default=16, help="new pool states")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", choices=["small", "both"], default="both")
    parser.add_argument("--large", default=json.dumps(LARGE), help="the larger model's recipe")
    parser.add_argument("--large-device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    bench = prepare(args.pool, "first", args.out, BOTH, args.workers)
    large = replace(ProxyConfig(), **json.loads(args.large))
    asked = Asked(args.states, args.seeds, args.large_device)
    small, plan = ProxyConfig(), DesignPlan(n_runs=args.runs)
    runs = run_design(bench, plan, small, DEFAULT_COVARIATES)
    rival_runs = args.rival_runs or args.runs
    if args.what != "size":
        tuning = tuned_controllers(bench, rival_runs)
        trials = pl.DataFrame(
            [{**row, "settings": json.dumps(row["settings"])} for row in tuning.trials]
        )
        trials.write_csv(args.out / f"rivals_tuning_{rival_runs}.csv")
        show(trials)
    if args.what == "compare":
        plan = replace(plan, n_runs=rival_runs, stages=STAGES)
        in_stages = run_design(bench, plan, small, DEFAULT_COVARIATES)
        staged = staged_runs(bench, in_stages, math.log(small.vocab_size))
        sizes = [size_of(small), *([size_of(large)] if args.sizes == "both" else [])]
        table = compare(bench, runs, staged, tuning, sizes, asked)
        table.write_csv(args.out / f"rivals_{args.runs}.csv")
        show(table)
    if args.what == "size":
        table = sizes_compared(bench, runs, size_of(large), args.large_runs, asked)
        table.write_csv(args.out / f"rivals_size_{args.runs}.csv")
        show(table)


if __name__ == "__main__":
    main()
