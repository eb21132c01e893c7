"""What a few further runs at a pool out of reach are worth.

    python -m causalmix_pipeline_tests.benchmarks.top_ups [--seeds 0:3] [--runs 512]
        [--estimator response_surface] [--families ...]

For each family of `simulator` and seed a model is fitted on randomised runs, then some pools whose
covariates are all moved by 2.5 standard deviations are topped up one by one, through the functions
that the command line calls. Regret is that of the mixture the model likes best, whatever its
verdict, in standard deviations of the weighted outcome over random mixtures.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import polars as pl

from causalmix_pipeline import tables
from causalmix_pipeline.core.belief import overlap, reach_of
from causalmix_pipeline.core.policy import Constraints
from causalmix_pipeline.table_recommendations import best_mixture
from causalmix_pipeline.top_ups import condition, plan_top_up
from causalmix_pipeline_tests.benchmarks.regret import EQUAL_D, SHIFT, fit
from causalmix_pipeline_tests.benchmarks.simulator import (
    DOMAINS,
    FAMILIES,
    METRICS,
    NOISE,
    World,
    draw_pools,
    draw_runs,
    pools_frame,
)

#: Further runs at a pool, and pools of each world.
SIZES, N_POOLS = (0, 8, 16, 64), 3


def topped_up(
    world: World, model: tables.Model, state_DP: np.ndarray, n_runs: int, seed: int
) -> tables.Model:
    """The model after the planned runs at a pool were trained."""
    if not n_runs:
        return model
    pool = pools_frame(state_DP[None])
    plan = plan_top_up(model, pool, n_runs, seed)
    if not plan.height:  # within reach after all
        return model
    outcome_NT = world.outcome(state_DP, plan.select(DOMAINS).to_numpy())
    outcome_NT = outcome_NT + np.random.default_rng(seed).normal(0, NOISE, size=outcome_NT.shape)
    values_NT = 8.0 - outcome_NT if world.is_loss else outcome_NT
    run = plan.select("run")
    covariates = run.join(pool.drop("pool"), how="cross")
    return condition(
        model, plan, run.hstack(pl.DataFrame(values_NT, schema=[*METRICS])), covariates
    )


def regret(world: World, model: tables.Model, state_DP: np.ndarray) -> float:
    """What the mixture that the model likes best loses to the best one."""
    wide_MD = np.random.default_rng(5).dirichlet(np.full(len(DOMAINS), 0.6), size=4000)
    free = Constraints(EQUAL_D, np.zeros(len(DOMAINS)), np.ones(len(DOMAINS)))
    chosen_D = best_mixture(model, state_DP, free)[0]
    value = float(world.weighted(state_DP, chosen_D)[0])
    best = max(float(world.weighted(state_DP, wide_MD).max()), value)
    return (best - value) / float(world.weighted(state_DP, wide_MD).std())


def run_world(family: str, seed: int, n_runs: int, estimator: str) -> list[dict]:
    """A row for each pool and number of further runs."""
    world = World.draw(family, seed)
    model = fit(world, draw_runs(world, "randomised", n_runs, seed), estimator, seed)
    rows = []
    for pool, state_DP in enumerate(draw_pools(N_POOLS, seed, SHIFT)):
        for size in SIZES:
            more = topped_up(world, model, state_DP, size, seed)
            rows.append({
                "family": family, "seed": seed, "pool": pool, "runs": size,
                "regret": regret(world, more, state_DP),
                "distance": overlap(state_DP, more.runs.weighed_states()).score,
                "supported": reach_of(more.runs, state_DP).verdict == "supported",
            })  # fmt: skip
    return rows


def main(arguments: Sequence[str]) -> None:
    """Print regret by family and number of further runs, and over all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0:3")
    parser.add_argument("--runs", type=int, default=512)
    parser.add_argument("--estimator", default="response_surface")
    parser.add_argument("--families", type=lambda text: text.split(","), default=tuple(FAMILIES))
    options = parser.parse_args(arguments)
    first, last = (int(part) for part in options.seeds.split(":"))
    rows = []
    for family in options.families:
        for seed in range(first, last):
            rows += run_world(family, seed, options.runs, options.estimator)
            print(f"{family}, seed {seed}: done", file=sys.stderr)
    frame = pl.DataFrame(rows)
    with pl.Config(tbl_rows=-1, float_precision=3, tbl_hide_dataframe_shape=True):
        for part in (frame, frame.with_columns(family=pl.lit("all"))):
            mean = part.group_by("family", "runs", maintain_order=True).agg(
                pl.col("regret", "distance", "supported").cast(pl.Float64).mean(),
                (pl.col("regret").std() / pl.len().sqrt()).alias("se"),
            )
            base = mean.filter(runs=0).select("family", pl.col("regret").alias("before"))
            print(mean.join(base, on="family").with_columns(
                cut=1 - pl.col("regret") / pl.col("before")).drop("before"))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
