"""Pool states: what a pool is before anything is mixed, and the sub-pools a design trains on.

A pool state is a multiset of documents per domain; `covariates` measures it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.covariates import METRICS
from causalmix_pipeline.core.errors import ConfigError, PoolError

#: States whose spread defines the unit of a covariate; fixed, so that growing the design
#: leaves the scale alone.
N_REFERENCE_STATES = 256


@dataclass(frozen=True)
class StateRanges:
    """How far the drawn pool states reach, each domain on its own.

    Attributes:
        blend_sources: draw the share of each source (one source alone in half of the draws).
        size_range: least and largest share of a domain's capacity, log-uniform, in (0, 1].
            The capacity is the mean number of tokens of the domain's sources.
        tilt_metric: document metric whose exp-tilt prefers some documents.
        tilt_sd: standard deviation of the tilt, in log-odds per standard deviation of the metric.
        repetition: share of draws in which a part of the documents is repeated to size.
        noise: share of draws in which some documents are replaced by their noisy twins.
    """

    blend_sources: bool = True
    size_range: tuple[float, float] = (0.1, 1.0)
    tilt_metric: str = "compress_ratio"
    tilt_sd: float = 0.0
    repetition: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        low, high = self.size_range
        if not 0 < low <= high <= 1:
            raise ConfigError(
                "design.states.size_range must be 0 < least <= largest <= 1, "
                f"got {list(self.size_range)}."
            )
        if self.tilt_metric not in METRICS:
            raise ConfigError(
                f"design.states.tilt_metric must be one of {', '.join(METRICS)}; "
                f"got {self.tilt_metric!r}."
            )


@dataclass(frozen=True)
class DomainDraw:
    """The state of one domain: what part of its documents a sub-pool holds, and how often."""

    source_shares: tuple[float, ...]
    size_share: float
    tilt: float
    unique_share: float
    noise_share: float


@dataclass(frozen=True, eq=False)
class DomainIndex:
    """The documents of one domain as arrays; `rows` point into the documents frame."""

    domain: str
    rows: np.ndarray  # (n,) original documents
    twin_rows: np.ndarray  # (n,) noisy twin of each, -1 without one
    source: np.ndarray  # (n,) source code
    sources: tuple[str, ...]
    n_tokens: np.ndarray  # (n,)
    tilt_score: np.ndarray  # (n,) standardised tilt metric

    @property
    def capacity(self) -> float:
        """Tokens of a state at full size: the mean over the domain's sources."""
        return float(self.n_tokens.sum()) / len(self.sources)


@dataclass(frozen=True, eq=False)
class Membership:
    """A pool state as a multiset of documents.

    Attributes:
        rows: rows of the documents frame, ascending; shape (n,).
        copies: how often each document occurs, >= 1; shape (n,).
    """

    rows: np.ndarray
    copies: np.ndarray

    def content_hash(self, document_ids: Sequence[str], domain_numbers: Sequence[int]) -> str:
        """Name the state by its domains' documents and their copies, whatever frame they stand in.

        Args:
            document_ids: id of each row of the documents frame.
            domain_numbers: of each row, the place of its domain in the order of the mixture's
                shares: the same documents divided otherwise among the domains are another state.
        """
        lines = sorted(
            f"{domain_numbers[row]} {document_ids[row]} {n_copies}"
            for row, n_copies in zip(self.rows.tolist(), self.copies.tolist(), strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def index_documents(
    documents: pl.DataFrame, domains: Sequence[str], ranges: StateRanges
) -> list[DomainIndex]:
    """Index the usable documents of an experiment pool by domain.

    Raises:
        PoolError: if a domain has no document.
    """
    frame = documents.with_row_index("_row")
    twins = frame.filter(pl.col("augmented")).select("domain", "twin_of", twin_row="_row")
    originals = frame.filter(~pl.col("augmented")).join(
        twins,
        left_on=["domain", "document_id"],
        right_on=["domain", "twin_of"],
        how="left",
        maintain_order="left",
    )
    index = []
    for domain in domains:
        part = originals.filter(pl.col("domain") == domain)
        if part.height == 0:
            raise PoolError(
                f"experiment pool: domain {domain!r} has no usable document. Add documents or "
                "remove it from `domains`."
            )
        sources = tuple(sorted(part["source"].unique().to_list()))
        code = {name: i for i, name in enumerate(sources)}
        score = part[ranges.tilt_metric].fill_null(part[ranges.tilt_metric].mean()).to_numpy()
        spread = score.std()
        index.append(
            DomainIndex(
                domain=domain,
                rows=part["_row"].to_numpy().astype(np.int64),
                twin_rows=part["twin_row"].cast(pl.Int64).fill_null(-1).to_numpy(),
                source=np.array([code[s] for s in part["source"].to_list()]),
                sources=sources,
                n_tokens=part["n_tokens"].to_numpy().astype(np.int64),
                tilt_score=(score - score.mean()) / (spread if spread > 0 else 1.0),
            )
        )
    return index


def draw_domain(n_sources: int, ranges: StateRanges, rng: np.random.Generator) -> DomainDraw:
    """Draw the state of one domain. Every draw uses the same number of random numbers."""
    kind, size, tilt = rng.random(), rng.random(), rng.standard_normal()
    flat = rng.dirichlet(np.ones(n_sources))
    alone = rng.integers(n_sources)
    repeated, unique = rng.random(), rng.choice([0.6, 0.3, 0.08])
    noisy, noise = rng.random(), rng.uniform(0.1, 0.9)
    if not ranges.blend_sources:
        shares = np.full(n_sources, 1.0 / n_sources)
    elif kind < 0.5:
        shares = np.eye(n_sources)[alone]
    else:
        shares = flat
    low, high = ranges.size_range
    return DomainDraw(
        source_shares=tuple(float(s) for s in shares),
        size_share=float(low * (high / low) ** size),
        tilt=float(ranges.tilt_sd * tilt),
        unique_share=float(unique) if repeated < ranges.repetition else 1.0,
        noise_share=float(noise) if noisy < ranges.noise else 0.0,
    )


def draw_state(
    index: Sequence[DomainIndex], ranges: StateRanges, *, state_id: int, seed: int
) -> tuple[list[DomainDraw], Membership]:
    """Draw pool state number `state_id`; the same whatever other states are drawn.

    Args:
        index: the experiment pool's documents, a domain each.
        ranges: how far the states reach.
        state_id: number of the state, >= 0.
        seed: the design's seed.

    Returns:
        The draw of each domain, and the documents of the state.
    """
    rng = np.random.default_rng([seed, state_id])
    draws, rows, copies = [], [], []
    for domain in index:
        draw = draw_domain(len(domain.sources), ranges, rng)
        domain_rows, domain_copies = _choose_documents(domain, draw, rng)
        draws.append(draw)
        rows.append(domain_rows)
        copies.append(domain_copies)
    all_rows, all_copies = np.concatenate(rows), np.concatenate(copies)
    order = np.argsort(all_rows, kind="stable")
    return draws, Membership(all_rows[order], all_copies[order])


def _choose_documents(
    domain: DomainIndex, draw: DomainDraw, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample documents without replacement, then repeat them to size."""
    # Gumbel keys: the top k are a sample without replacement with odds exp(tilt * score).
    keys = draw.tilt * domain.tilt_score + rng.gumbel(size=len(domain.rows))
    as_twin = rng.random(len(domain.rows)) < draw.noise_share
    chosen, copies = [], []
    wanted_S = np.array(draw.source_shares) * draw.size_share * domain.capacity
    # A tiny domain keeps one document at least.
    main = int(np.argmax(wanted_S))
    wanted_S[main] = max(wanted_S[main], 1.0)
    for s, wanted in enumerate(wanted_S.tolist()):
        if wanted < 1:
            continue
        members = np.flatnonzero(domain.source == s)
        ranked = members[np.argsort(-keys[members], kind="stable")]
        running = np.cumsum(domain.n_tokens[ranked])
        n_unique = int(np.searchsorted(running, wanted * draw.unique_share)) + 1
        ranked = ranked[:n_unique]
        if draw.unique_share < 1:
            times = _repeat_to(domain.n_tokens[ranked], wanted)
        else:
            times = np.ones(len(ranked), dtype=np.int64)
        chosen.append(ranked)
        copies.append(times)
    picked, times = np.concatenate(chosen), np.concatenate(copies)
    twins = domain.twin_rows[picked]
    rows = np.where(as_twin[picked] & (twins >= 0), twins, domain.rows[picked])
    return rows, times


def _repeat_to(n_tokens: np.ndarray, wanted: float) -> np.ndarray:
    """Copies of each document so that the whole list, read in a circle, fills `wanted` tokens."""
    whole, rest = divmod(wanted, float(n_tokens.sum()))
    extra = np.cumsum(n_tokens) <= rest
    return np.maximum(int(whole) + extra.astype(np.int64), 1)
