"""Regret and coverage of every estimator and baseline on pools with a known truth.

    python -m causalmix_pipeline_tests.benchmarks.regret --out FILE.jsonl [--seeds 100:110]
        [--cells randomised:256,confounded:256,...] [--families ...] [--methods ...]

A cell is a family of `simulator`, a design, a number of runs and a seed. Every method gets the same
tables and names a mixture for 20 new pools, through the functions that the command line calls;
where the design is randomised, also for 20 that are out of support.
Regret is what its mixture loses to the best one in truth, in standard deviations of the weighted
outcome over random mixtures. Covered: the true gain lies inside the 90% interval that came with
the mixture. Above: it is no less than the lower end. Cells that are in FILE are not run again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline import tables
from causalmix_pipeline.adapters.baseline_mixtures import regmix_mixture
from causalmix_pipeline.adapters.run_tables import import_runs
from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.core.mixture import dirichlet_design
from causalmix_pipeline_tests.benchmarks.simulator import (
    DOMAINS,
    FAMILIES,
    METRICS,
    N_DOMAINS,
    WEIGHTS_T,
    Tables,
    World,
    draw_pools,
    draw_runs,
    pools_frame,
)

#: New pools of each cell, and standard deviations by which those out of support are moved.
N_POOLS, SHIFT = 20, 2.5

#: Radius of the causal forest's trust region, nats; chosen on seeds that no table uses.
FOREST_RADIUS = 0.8

CELLS = ("randomised:256", "randomised:512", "confounded:256", "hidden:256")
METHODS = ("equal", "regmix", "lightgbm_state", "log_linear", "extra_trees", "structured_ridge",
           "response_surface_blind", "response_surface", "causal_forest", "auto")  # fmt: skip

EQUAL_D = np.full(N_DOMAINS, 1 / N_DOMAINS)


def fit(world: World, runs: Tables, method: str, seed: int) -> tables.Model:
    """Fit as the command line does."""
    direction: dict[str, Any] = {"minimize" if world.is_loss else "maximize": METRICS}
    return tables.fit(
        runs.ratios, runs.metrics, runs.covariates, estimator=method, seed=seed,
        weights=dict(zip(METRICS, WEIGHTS_T.tolist(), strict=True)), **direction,
    )  # fmt: skip


def recommend(
    world: World, runs: Tables, method: str, seed: int, pools: dict[str, np.ndarray]
) -> dict[str, pl.DataFrame]:
    """What the method names for each set of pools; columns as `tables.recommend` has them."""
    shares = dict(zip(DOMAINS, EQUAL_D.tolist(), strict=True))
    if method == "regmix":
        table = import_runs(
            *(open_table(frame, name) for frame, name in ((runs.ratios, "ratios"),
                                                          (runs.metrics, "metrics"))), None,
            minimize=METRICS if world.is_loss else (), maximize=() if world.is_loss else METRICS,
        ).runs  # fmt: skip
        mixture_D = regmix_mixture(table, EQUAL_D, WEIGHTS_T, seed=seed)
        shares = dict(zip(DOMAINS, mixture_D.tolist(), strict=True))
    if method in ("equal", "regmix"):
        unknown = {n: pl.lit(None, pl.Float64) for n in ("gain", "gain_lower", "gain_upper")}
        return {
            name: pl.DataFrame([shares] * len(states)).with_columns(**unknown, verdict=pl.lit(""))
            for name, states in pools.items()
        }
    model = fit(world, runs, method, seed)
    rules = {"trust_radius": FOREST_RADIUS} if method == "causal_forest" else None
    return {
        name: tables.recommend(model, pools_frame(states), constraints=rules)
        for name, states in pools.items()
    }


def judge(world: World, states: np.ndarray, named: pl.DataFrame) -> dict[str, Any]:
    """Hold what was named against the truth; means over the pools."""
    rng = np.random.default_rng(5)
    wide_MD = dirichlet_design(4000, N_DOMAINS, strength_range=(0.2, 3.0), seed=5)
    random_MD = rng.dirichlet(np.ones(N_DOMAINS), size=1000)
    rows = []
    for state_DP, row in zip(states, named.iter_rows(named=True), strict=True):
        mixture_D = np.array([row[d] for d in DOMAINS])
        value = float(world.weighted(state_DP, mixture_D)[0])
        best = max(float(world.weighted(state_DP, wide_MD).max()), value)
        scale = float(world.weighted(state_DP, random_MD).std())
        gain = value - float(world.weighted(state_DP, EQUAL_D)[0])
        told = row["gain_lower"] is not None
        rows.append({
            "regret": (best - value) / scale,
            "gain": gain / scale,
            "promised": row["gain"] / scale if row["gain"] is not None else None,
            "covered": row["gain_lower"] <= gain <= row["gain_upper"] if told else None,
            "above": gain >= row["gain_lower"] if told else None,
            "width": (row["gain_upper"] - row["gain_lower"]) / scale if told else None,
            "supported": row["verdict"] == "supported",
            "unsupported": row["verdict"] == "unsupported",
        })  # fmt: skip
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return {name: frame[name].cast(pl.Float64).mean() for name in frame.columns}


def run_cell(
    family: str, design: str, n_runs: int, seed: int, methods: Sequence[str]
) -> Iterator[dict]:
    """A row for each method and set of pools."""
    world = World.draw(family, seed)
    runs = draw_runs(world, design, n_runs, seed)
    pools = {design: draw_pools(N_POOLS, seed)}
    if design == "randomised":
        pools["out of support"] = draw_pools(N_POOLS, seed, SHIFT)
    for method in methods:
        began = time.perf_counter()
        named = recommend(world, runs, method, seed, pools)
        seconds = time.perf_counter() - began
        for name, states in pools.items():
            yield {
                "family": family, "design": name, "n_runs": n_runs, "seed": seed,
                "method": method, "seconds": seconds, **judge(world, states, named[name]),
            }  # fmt: skip


def summary(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds, standard errors of regret, and regret over RegMix's."""
    cell = ["family", "design", "n_runs"]
    mean = rows.group_by(*cell, "method", maintain_order=True).agg(
        pl.len().alias("seeds"),
        pl.col("regret").mean(),
        (pl.col("regret").std() / pl.len().sqrt()).alias("se"),
        *(pl.col(n).mean() for n in ("gain", "promised", "covered", "above", "width", "supported",
                                     "unsupported", "seconds")),
    )  # fmt: skip
    base = mean.filter(method="regmix").select(*cell, pl.col("regret").alias("base"))
    return (
        mean.join(base, on=cell, how="left")
        .with_columns(over_regmix=pl.col("regret") / pl.col("base"))
        .drop("base")
    )


def main(arguments: Sequence[str]) -> None:
    """Run what is missing in the file, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="100:110")
    listed = partial(str.split, sep=",")
    parser.add_argument("--cells", type=listed, default=CELLS)
    parser.add_argument("--families", type=listed, default=tuple(FAMILIES))
    parser.add_argument("--methods", type=listed, default=METHODS)
    options = parser.parse_args(arguments)
    first, last = (int(part) for part in options.seeds.split(":"))
    done = [json.loads(line) for line in options.out.open()] if options.out.exists() else []
    known = {(r["family"], r["design"], r["n_runs"], r["seed"], r["method"]) for r in done}
    cells = [
        (family, design, int(n), seed)
        for seed in range(first, last)
        for design, n in (cell.split(":") for cell in options.cells)
        for family in options.families
    ]
    began = time.monotonic()
    for index, cell in enumerate(cells):
        missing = [m for m in options.methods if (*cell, m) not in known]
        with options.out.open("a") as out:
            for row in run_cell(*cell, missing):
                out.write(json.dumps(row) + "\n")
        left = (time.monotonic() - began) / (index + 1) * (len(cells) - index - 1)
        print(f"{index + 1} of {len(cells)} cells, about {left:.0f} s left", file=sys.stderr)
    found = [json.loads(line) for line in options.out.open()]
    rows = pl.DataFrame(found, infer_schema_length=None)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, float_precision=3, tbl_width_chars=200,
                   tbl_hide_dataframe_shape=True):  # fmt: skip
        for (design, n_runs), part in summary(rows).group_by(
            "design", "n_runs", maintain_order=True
        ):
            print(f"{design}, {n_runs} runs")
            print(part.drop("design", "n_runs"))


if __name__ == "__main__":
    main(sys.argv[1:])
