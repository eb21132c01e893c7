"""What rivals gained over equal shares, and ours over each of them, with what they cost.

Gains are paired by pool state and seed. Seeds are averaged first: the states are what a standard
error is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from causalmix_pipeline.core.rivals import Size

#: Whose gains over each rival are told, and whom gains are measured from.
OURS, BASE = "recommended", "equal"


def gains_over(outcomes: pl.DataFrame, over: str) -> pl.DataFrame:
    """Gain of each rival over one of them, paired by state and seed, the seeds averaged first.

    Returns:
        A row per size and entrant: gain, se (over states; null for one), ahead (states with a gain
        above 0) and states (with a pair of outcomes).
    """
    pair = ["size", "state", "seed"]
    base = outcomes.filter(entrant=over).select(*pair, base="outcome")
    gain = pl.col("outcome") - pl.col("base")
    by_state = (
        outcomes.join(base, on=pair, how="left")
        .group_by("size", "entrant", "state", maintain_order=True)
        .agg(gain=gain.mean())
    )
    known = pl.col("gain").drop_nulls()
    return by_state.group_by("size", "entrant", maintain_order=True).agg(
        gain=known.mean(),
        se=known.std() / known.len().sqrt(),
        ahead=(known > 0).sum().cast(pl.Int64),
        states=known.len().cast(pl.Int64),
    )


def rival_table(
    outcomes: pl.DataFrame, sizes: Sequence[Size], search_tokens: Mapping[str, float]
) -> pl.DataFrame:
    """What each rival gave and cost at each size.

    Args:
        outcomes: as `run_lanes` returns them.
        sizes: the smallest first, at which searches are made.
        search_tokens: of each rival, the training tokens of what it searches once: the design, or
            the tuning of a controller; none for 0.

    Returns:
        A row per size and entrant: outcome, gain over equal with its se, ahead and states; ours,
        the recommended mixture's gain over it, with ours_se (null for itself and where nothing is
        recommended); diverged runs; run_tokens of a run; search_tokens once; state_search_tokens
        for each pool state; total_flops of the search and of one run on each state.
    """
    ours = gains_over(outcomes, OURS)
    kept = ours.select("size", "entrant", ours=-pl.col("gain"), ours_se="se")
    costs = outcomes.group_by("size", "entrant", maintain_order=True).agg(
        outcome=pl.col("outcome").mean(),
        diverged=pl.col("outcome").null_count().cast(pl.Int64),
        run_tokens=pl.col("tokens").mean(),
        state_search_tokens=pl.col("search_tokens").mean(),
        n=pl.col("state").n_unique(),
    )
    flops = {size.name: size.flops_a_token for size in sizes}
    key = ["size", "entrant"]
    table = (
        costs.join(gains_over(outcomes, BASE), on=key, maintain_order="left")
        .join(kept, on=key, maintain_order="left")
        .with_columns(
            search_tokens=pl.col("entrant").replace_strict(
                dict(search_tokens), default=0.0, return_dtype=pl.Float64
            ),
            per_token=pl.col("size").replace_strict(flops, return_dtype=pl.Float64),
        )
    )
    searched = pl.col("search_tokens") + pl.col("n") * pl.col("state_search_tokens")
    is_ours = pl.col("entrant") == OURS
    return table.select(
        *key,
        "outcome",
        "gain",
        "se",
        "ahead",
        "states",
        ours=pl.when(~is_ours).then("ours"),
        ours_se=pl.when(~is_ours).then("ours_se"),
        diverged="diverged",
        run_tokens="run_tokens",
        search_tokens="search_tokens",
        state_search_tokens="state_search_tokens",
        total_flops=searched * sizes[0].flops_a_token
        + pl.col("n") * pl.col("run_tokens") * pl.col("per_token"),
    )
