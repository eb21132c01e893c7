"""New pool states of the experiment pool, which no proxy run has seen, for rivals to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import DomainSampler, keep_states, measure_states
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.pool_state import (
    Membership,
    StateRanges,
    draw_state,
    index_documents,
)

#: Numbers of the first states that rivals are compared on, and that their settings are tried on.
#: A design's own are numbered from 0, and has 50,000 at most.
COMPARED_FROM, TUNED_FROM = 1_000_000, 2_000_000


@dataclass(frozen=True, eq=False)
class NewStates:
    """Pool states, kept for the workers.

    Attributes:
        hashes: name of each.
        frames: of each, a row per domain: domain, tokens, natural_share and each covariate.
    """

    hashes: tuple[str, ...]
    frames: tuple[pl.DataFrame, ...]

    @property
    def natural_MD(self) -> np.ndarray:
        """Token shares of each state."""
        return np.array([frame["natural_share"].to_numpy() for frame in self.frames])


def draw_new_states(
    store: RunStore,
    documents: pl.DataFrame,
    domains: Sequence[str],
    ranges: StateRanges,
    *,
    first: int,
    n: int,
    seed: int,
    covariates: Sequence[str],
    sampler: DomainSampler | None = None,
) -> NewStates:
    """Draw pool states as a design does, by numbers that no design has, and keep them.

    Args:
        store: where workers read them.
        documents: the experiment pool's documents frame.
        domains: D domains.
        ranges: how far the states reach.
        first: number of the first state.
        n: how many.
        seed: the design's.
        covariates: to measure.
        sampler: gives the text whose compression is measured.

    Raises:
        PoolError: if a covariate has no value in some domain.
    """
    index = index_documents(documents, domains, ranges)
    members = [draw_state(index, ranges, state_id=first + m, seed=seed)[1] for m in range(n)]
    values_MDP = measure_states(documents, domains, covariates, members, sampler)
    if not np.isfinite(values_MDP).all():
        lacking = ~np.isfinite(values_MDP).all(axis=(0, 1))
        raise PoolError(
            f"covariates must have a value in every domain of a new pool state, got none of "
            f"{covariates[int(np.flatnonzero(lacking)[0])]!r} in some: take it off the list."
        )
    frames = [
        describe_state(documents, domains, member).hstack(
            pl.DataFrame(values_DP, schema=list(covariates))
        )
        for member, values_DP in zip(members, values_MDP, strict=True)
    ]
    return NewStates(tuple(keep_states(store, documents, domains, members)), tuple(frames))


def describe_state(
    documents: pl.DataFrame, domains: Sequence[str], member: Membership
) -> pl.DataFrame:
    """One row per domain: distinct tokens, and the token share with copies."""
    chosen = documents.select("domain", "n_tokens")[member.rows.tolist()]
    read = pl.col("n_tokens") * pl.col("copies")
    counted = (
        chosen.with_columns(copies=pl.Series(member.copies))
        .group_by("domain")
        .agg(tokens=pl.col("n_tokens").sum(), read=read.sum())
    )
    frame = pl.DataFrame({"domain": list(domains)}).join(
        counted, on="domain", how="left", maintain_order="left"
    )
    return frame.with_columns(
        pl.col("tokens").fill_null(0),
        natural_share=pl.col("read").fill_null(0) / pl.col("read").sum(),
    ).drop("read")
