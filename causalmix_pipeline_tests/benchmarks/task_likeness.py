"""Whether it helps to know how much of a domain is like the tasks' text, on new pool states.

    python -m causalmix_pipeline_tests.benchmarks.task_likeness

The same proxy runs are fitted with the usual covariates, and with `log2_task_like_<task>` of each
wanted task besides. Both recommend a mixture for states that nothing has seen, half of them
natural, half planted; these are trained, with what knows no state. Kept in the run store.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

from causalmix_pipeline.core.covariates import LOG_TASK_LIKE_PREFIX
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.rival_gains import gains_over
from causalmix_pipeline.core.rivals import run_lanes, static_entrant
from causalmix_pipeline_tests.benchmarks.rivals import (
    BOTH,
    OBJECTIVE,
    lanes_at,
    places_of,
    promises_held,
    recommended,
    score_of,
    show,
    size_of,
    static_rivals,
    track_of,
    trainer,
)
from causalmix_pipeline_tests.benchmarks.state_matters import (
    DEFAULT_COVARIATES,
    OBJECTIVES,
    out_of_fold,
    prepare,
    run_design,
)

#: The estimator that answers, chosen on the same runs by `rivals`.
ESTIMATOR = "response_surface"
KINDS = ("all", "natural", "planted")


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("data/demo"), help="the demo pool")
    parser.add_argument("--out", type=Path, default=Path("data/study"), help="run store")
    parser.add_argument("--runs", type=int, default=160, help="proxy runs of the design")
    parser.add_argument("--states", type=int, default=16, help="new pool states")
    parser.add_argument("--first-state", type=int, default=70_000)
    parser.add_argument("--first-seed", type=int, default=930_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    wanted = [*(OBJECTIVES[OBJECTIVE] or ())]
    bench = prepare(args.pool, "first", args.out, BOTH, args.workers, like=wanted)
    like = (*DEFAULT_COVARIATES, *(LOG_TASK_LIKE_PREFIX + task for task in wanted))
    small, plan = ProxyConfig(), DesignPlan(n_runs=args.runs)
    ours, entrants = {}, []
    for label, covariates in (("usual covariates", DEFAULT_COVARIATES), ("task-like too", like)):
        runs = run_design(bench, plan, small, covariates)
        out_of_fold(runs.select_tasks(wanted), (ESTIMATOR,), seed=0)
        places = places_of(bench, args.first_state, args.states, covariates)
        ours[label] = recommended(bench, runs, places, [ESTIMATOR])
        if not entrants:
            rivals = static_rivals(bench, runs, places)
            names = ("equal", "natural", "fixed", "regmix")
            entrants = [static_entrant(name, rivals[name]) for name in names]
        entrants.append(static_entrant(label, ours[label].mixture_MD))
    track = track_of(bench, places, args.first_seed, args.seeds)
    lanes = lanes_at(entrants, track, [size_of(small)], "cpu")
    outcomes = run_lanes(lanes, trainer(bench, "new states"), score_of(bench))
    kind = pl.when(pl.col("state") < args.states // 2).then(pl.lit("natural"))
    outcomes = outcomes.with_columns(kind=kind.otherwise(pl.lit("planted")))
    for name in KINDS:
        part = outcomes if name == "all" else outcomes.filter(kind=name)
        print(f"{name}: gain over equal, over RegMix, and over the usual covariates")
        for over in ("equal", "regmix", "usual covariates"):
            show(gains_over(part, over))
    for label, each in ours.items():
        print(label)
        held = promises_held(outcomes, each, label)
        show(held)
        show(held.select(pl.col("promised", "realised", "inside", "above").cast(float).mean()))


if __name__ == "__main__":
    main()
