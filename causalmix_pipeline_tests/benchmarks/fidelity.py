"""What a proxy says about mixtures and pool states, and what of it holds for a larger model.

    python -m causalmix_pipeline_tests.benchmarks.fidelity scan --configs '{}' '{"steps": 2000}'
    python -m causalmix_pipeline_tests.benchmarks.fidelity carries-over
    python -m causalmix_pipeline_tests.benchmarks.fidelity frontier

`scan` trains recipes on the equal mixture, beside a bigram model of the same tokens, on states of
its own. `carries-over` fits on a design of proxy runs, recommends for new states, and trains the
recommended mixtures at the larger size. `frontier` trains mixtures of some of these states with
many recipes, and says how much of the larger model's gain each recipe would have found. Everything
is kept in the run store, so a stopped one goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from causalmix_pipeline.adapters.experiment import keep_states
from causalmix_pipeline.adapters.local_backend import engine_name
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.pool_state import Membership, draw_state, index_documents
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline_tests.benchmarks.state_matters import (
    DEFAULT_COVARIATES,
    FRESH_SEEDS_FROM,
    STATES,
    Bench,
    gain_table,
    prepare,
    realised,
    recommend_for_new_states,
    run_design,
    train,
    weights_of,
)

#: A model 8.1 times the proxy's size; its rate and first weights were scanned on states of their
#: own (`scan`).
LARGE = {"hidden": 104, "layers": 2, "heads": 2, "learning_rate": 0.003, "init_std": 0.04,
         "steps": 1500, "bf16": True}  # fmt: skip
#: First pool state of each experiment; the design's begin at 0.
CARRY_FROM, SCAN_FROM = 30_000, 40_000
#: First data seed of each experiment; the larger model's runs are those of `carries-over`.
SCAN_SEEDS, FRONTIER_SEEDS = 700_000, 800_000
#: Recipes of the frontier: what differs from the default proxy; `vocabulary` is the tokenizer's.
RECIPES: list[dict] = [
    {"steps": 250},
    {"steps": 500},
    {},
    {"steps": 2000},
    {"learning_rate": 0.01},
    {"hidden": 64, "layers": 2, "heads": 2, "learning_rate": 0.008},
    {"vocabulary": 512},
]
#: Mixtures of a frontier state: the first three are the same in all states.
SLOTS = ("equal", "response_surface_blind", "regmix", "response_surface", "random_1", "random_2")
N_COMMON = 3
OBJECTIVE = "wants"


def new_states(bench: Bench, first: int, n: int) -> list[Membership]:
    """Pool states that no design has."""
    index = index_documents(bench.documents, bench.domains, bench.ranges)
    return [draw_state(index, bench.ranges, state_id=first + m, seed=0)[1] for m in range(n)]


def specs_for(
    bench: Bench,
    hashes: Sequence[str],
    mixture_MSD: np.ndarray,
    config: ProxyConfig,
    seed: int,
) -> list[ProxySpec]:
    """A spec for each state and each of its mixtures, state by state."""
    return [
        ProxySpec(
            state_hash=state_hash,
            tokens_hash=bench.tokens_hash,
            eval_hash=bench.eval_hash,
            mixture=tuple(mixture_D.tolist()),
            data_seed=seed,
            config=config,
            engine=engine_name(),
        )
        for state_hash, mixture_SD in zip(hashes, mixture_MSD, strict=True)
        for mixture_D in mixture_SD
    ]


def score_of(bench: Bench, record: ProxyRecord) -> float:
    """Minus the weighted held-out loss of a run, bits per byte."""
    weights = weights_of(OBJECTIVE, bench.tasks)
    losses = [record.bits_per_byte[task] for task in bench.tasks]
    return -float(np.dot(weights, losses))


def bigram_nats(bench: Bench, spec: ProxySpec) -> float:
    """Held-out loss of a bigram model on the tokens that a run reads, mean over tasks.

    Absolute discounting by .75, backed off to unigrams with a count of one half added (Ney, Essen
    and Kneser 1994).

    Returns:
        Nats per token.
    """
    from causalmix_pipeline.adapters.run_feed import RunFeed

    feed = RunFeed(bench.store, spec)
    read = feed.windows[feed.order]  # (W, L + 1)
    pairs_VV = np.zeros((spec.config.vocab_size,) * 2)
    np.add.at(pairs_VV, (read[:, :-1].ravel(), read[:, 1:].ravel()), 1.0)
    unigram_V = pairs_VV.sum(0) + 0.5
    unigram_V /= unigram_V.sum()
    total_V1 = pairs_VV.sum(1, keepdims=True)
    spared_V1 = 0.75 * (pairs_VV > 0).sum(1, keepdims=True)
    share_VV = np.maximum(pairs_VV - 0.75, 0) + spared_V1 * unigram_V
    share_VV = np.where(total_V1 > 0, share_VV / np.maximum(total_V1, 1), unigram_V)
    windows = bench.store.evaluation(bench.eval_hash).windows.values()
    return float(np.mean([-np.log(share_VV[w[:, :-1], w[:, 1:]]).mean() for w in windows]))


def scan(bench: Bench, configs: Sequence[dict], n_states: int) -> pl.DataFrame:
    """Held-out loss of each recipe on the equal mixture, beside a bigram model's."""
    hashes = keep_states(
        bench.store, bench.documents, bench.domains, new_states(bench, SCAN_FROM, n_states)
    )
    equal = np.full((n_states, 1, len(bench.domains)), 1.0 / len(bench.domains))
    rows = []
    for changes in configs:
        config = replace(ProxyConfig(), **changes)
        specs = specs_for(bench, hashes, equal, config, SCAN_SEEDS)
        records = train(bench, specs, "scan")
        nats = [np.mean([r.nats_per_token[task] for task in bench.tasks]) for r in records]
        rows.append(
            {
                "recipe": json.dumps(changes),
                "held-out nats": float(np.mean(nats)),
                "bigram nats": float(np.mean([bigram_nats(bench, spec) for spec in specs])),
                "parameters": config.n_parameters,
                "CPU seconds": float(np.mean([r.cpu_seconds for r in records])),
            }
        )
        print(rows[-1], flush=True)
    return pl.DataFrame(rows)


def carries_over(
    bench: Bench, n_runs: int, n_states: int, seeds: int, large: ProxyConfig
) -> pl.DataFrame:
    """Realised gains of the recommended, the blind and RegMix's mixture at the larger size."""
    plan = DesignPlan(n_runs=n_runs)
    runs = run_design(bench, plan, ProxyConfig(), DEFAULT_COVARIATES)
    hashes, mixtures, promised = recommend_for_new_states(
        bench, runs, plan, n_states, (OBJECTIVE,), CARRY_FROM
    )
    print(f"promised: {promised[OBJECTIVE].mean():.4f} bits per byte", flush=True)
    frame = realised(
        bench, hashes, mixtures, large, objectives=(OBJECTIVE,), seeds=seeds, label="larger"
    )
    frame.write_csv(bench.store.root / "carries_over_runs.csv")  # type: ignore[operator]
    return gain_table(frame, f"{large.hidden}x{large.layers}")


@dataclass(frozen=True, eq=False)
class Pairs:
    """States and mixtures of the frontier.

    Attributes:
        memberships: M states.
        mixture_MSD: mixtures of each state, in the order of `SLOTS`.
    """

    memberships: list[Membership]
    mixture_MSD: np.ndarray


def frontier_pairs(bench: Bench, n_runs: int, n_states: int) -> Pairs:
    """Equal, what three estimators recommend, and random mixtures, on states of `carries-over`."""
    plan = DesignPlan(n_runs=n_runs)
    runs = run_design(bench, plan, ProxyConfig(), DEFAULT_COVARIATES)
    _, mixtures, _ = recommend_for_new_states(bench, runs, plan, n_states, (OBJECTIVE,), CARRY_FROM)
    rng = np.random.default_rng(CARRY_FROM)
    shape = (n_states, len(bench.domains))
    drawn = {slot: rng.dirichlet(np.ones(shape[1]), size=n_states) for slot in SLOTS[-2:]}
    chosen = [drawn[slot] if slot in drawn else mixtures[OBJECTIVE, slot] for slot in SLOTS]
    return Pairs(new_states(bench, CARRY_FROM, n_states), np.stack(chosen, axis=1))


def scores_at(
    bench: Bench, pairs: Pairs, config: ProxyConfig, seed: int
) -> tuple[np.ndarray, float]:
    """Train all pairs with a recipe, one seed.

    Returns:
        Scores, bits per byte, shape (M, S), and CPU seconds of a run.
    """
    hashes = keep_states(bench.store, bench.documents, bench.domains, pairs.memberships)
    specs = specs_for(bench, hashes, pairs.mixture_MSD, config, seed)
    records = train(bench, specs, f"{config.hidden}x{config.layers}, {config.steps} steps")
    score_MS = np.array([score_of(bench, record) for record in records])
    return score_MS.reshape(pairs.mixture_MSD.shape[:2]), float(
        np.mean([record.cpu_seconds for record in records])
    )


def agreement(proxy_MS: np.ndarray, large_MS: np.ndarray) -> dict[str, float]:
    """What a recipe's own choice among the mixtures gives at the larger size.

    Args:
        proxy_MS: scores by the recipe; M states, S mixtures as in `SLOTS`.
        large_MS: scores at the larger size.

    Returns:
        `rank`: Spearman correlation of the gains over equal; `gain`: mean gain over equal of the
        mixture that the recipe likes best in each state; `of best`: the same over what the best
        choice gives; `over blind`: its lead over the one common mixture that the recipe likes best.
    """
    proxy_gain_MS = proxy_MS - proxy_MS[:, :1]
    large_gain_MS = large_MS - large_MS[:, :1]
    states = np.arange(len(proxy_MS))
    chosen_M = large_gain_MS[states, proxy_MS.argmax(1)]
    blind_M = large_gain_MS[:, proxy_MS[:, :N_COMMON].mean(0).argmax()]
    return {
        "rank": float(spearmanr(proxy_gain_MS[:, 1:].ravel(), large_gain_MS[:, 1:].ravel())[0]),
        "gain": float(chosen_M.mean()),
        "of best": float(chosen_M.mean() / large_gain_MS.max(1).mean()),
        "over blind": float((chosen_M - blind_M).mean()),
    }


def frontier_row(proxy_MS: np.ndarray, large_MS: np.ndarray) -> dict[str, float]:
    """`agreement` with 90% bootstrap intervals over states."""
    rng = np.random.default_rng(0)
    found = agreement(proxy_MS, large_MS)
    draws = [
        agreement(proxy_MS[some], large_MS[some])
        for some in rng.integers(0, len(proxy_MS), (1000, len(proxy_MS)))
    ]
    row: dict[str, float] = {}
    for name, value in found.items():
        low, high = np.nanquantile([draw[name] for draw in draws], [0.05, 0.95])
        row |= {name: value, f"{name} low": float(low), f"{name} high": float(high)}
    return row


def frontier(
    bench: Bench, benches: dict[int, Bench], n_runs: int, n_states: int, large: ProxyConfig
) -> pl.DataFrame:
    """One row per recipe: its cost, and what of the larger model's gain it would have found."""
    pairs = frontier_pairs(bench, n_runs, n_states)
    large_MS, large_seconds = scores_at(bench, pairs, large, FRESH_SEEDS_FROM)
    gains = large_MS - large_MS[:, :1]
    print("gain over equal at the larger size, bits per byte:")
    print(dict(zip(SLOTS, gains.mean(0).round(4).tolist(), strict=True)), flush=True)
    rows = []
    for changes in RECIPES:
        recipe = dict(changes)
        vocabulary = recipe.pop("vocabulary", ProxyConfig().vocab_size)
        config = replace(ProxyConfig(), vocab_size=vocabulary, **recipe)
        proxy_MS, seconds = scores_at(benches[vocabulary], pairs, config, FRONTIER_SEEDS)
        rows.append(
            {
                "recipe": json.dumps(changes),
                "CPU seconds": seconds,
                "of the larger model's": seconds / large_seconds,
                **frontier_row(proxy_MS, large_MS),
            }
        )
        print({k: v if isinstance(v, str) else round(v, 3) for k, v in rows[-1].items()})
    return pl.DataFrame(rows)


def main() -> None:
    """Run one of the three and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["scan", "carries-over", "frontier"])
    parser.add_argument("--pool", type=Path, default=Path("data/demo"), help="the demo pool")
    parser.add_argument("--out", type=Path, default=Path("data/study"), help="run store, tables")
    parser.add_argument("--runs", type=int, default=480, help="proxy runs of the design")
    parser.add_argument("--new-states", type=int, help="carries-over 20, frontier 8, scan 4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", default=json.dumps(LARGE), help="the larger model's recipe")
    parser.add_argument("--configs", nargs="*", default=["{}"], help="recipes of a scan")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    large = replace(ProxyConfig(), **json.loads(args.large))
    bench = prepare(args.pool, "first", args.out, STATES["natural"], args.workers)
    if args.what == "scan":
        table = scan(bench, [json.loads(text) for text in args.configs], args.new_states or 4)
    elif args.what == "carries-over":
        table = carries_over(bench, args.runs, args.new_states or 20, args.seeds, large)
    else:
        sizes = {recipe["vocabulary"] for recipe in RECIPES if "vocabulary" in recipe}
        benches = {ProxyConfig().vocab_size: bench} | {
            size: prepare(args.pool, "first", args.out / f"vocabulary_{size}", STATES["natural"],
                          args.workers, vocab_size=size)
            for size in sizes
        }  # fmt: skip
        table = frontier(bench, benches, args.runs, args.new_states or 8, large)
    table.write_csv(args.out / f"{args.what.replace('-', '_')}.csv")
    with pl.Config(tbl_rows=-1, tbl_cols=-1, float_precision=4, fmt_str_lengths=90):
        print(table)


if __name__ == "__main__":
    main()
