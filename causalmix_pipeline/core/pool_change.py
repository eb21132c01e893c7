"""What changed between two profiles of a pool: documents in and out, covariates that moved.

A pool is taken for a sample of the documents it could hold, so that a covariate has a standard
error, and a move is held against it. A document that both pools hold is the same draw, so it
counts with the difference of its two weights: what is common cancels. With the influence
u_i = w_i (x_i - mean) / sum w of document i on a token-weighted mean (w = tokens x copies),

    se(mean) = sqrt(sum u_i^2)      se(difference) = sqrt(sum (u_i after - u_i before)^2)

with u_i = 0 where the pool doesn't hold the document. Source: W. G. Cochran, Sampling Techniques,
chapter 6 (the ratio estimator's linearised variance).
Other covariates have influences of their own:

    quantile          w_i (share - [x_i <= q]) / (density at q * sum w), the density from the
                      quantiles a standard error of the share below and above (Woodruff's interval)
    duplicate_share   it is the token-weighted mean of 1 - 1 / copies
    log2_tokens       n_i / (sum n * ln 2), each document there or not by chance (Poisson): a pool
                      that swapped documents may differ in size by what the swap explains
    sample_compress_ratio   none: the documents don't tell it, so there is no standard error
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.covariates import (
    LEAST_LIKE,
    LOG_TASK_LIKE_PREFIX,
    QUANTILES,
    CovariateMeter,
    base_of,
    sample_ratios,
    weighted_quantile,
)
from causalmix_pipeline.core.errors import PoolError

#: Differences and standard errors below this share of the values, or of the documents' standard
#: deviation, are the dust of adding up in another order.
DUST = 1e-12


@dataclass(frozen=True, eq=False)
class PoolChange:
    """The difference between two profiles of a pool.

    Attributes:
        documents: one row per domain: `domain`, `documents_before`, `documents_after`,
            `documents_in`, `documents_out`, `documents_kept` (distinct documents), `tokens_before`,
            `tokens_after`, `tokens_in`, `tokens_out` (copies counted; a kept document with more
            copies brings the tokens of the further ones).
        covariates: one row per domain and covariate, largest move first; see `to_frame`.
    """

    documents: pl.DataFrame
    covariates: pl.DataFrame

    def to_frame(self) -> pl.DataFrame:
        """The moves of the covariates, largest effect first.

        Returns:
            Columns `domain`, `covariate`, `before`, `after`, `difference` and its `se` (units of
            the covariate), `effect` (difference over the scale) and its `effect_se`, `z`
            (difference over its standard error; infinite where that is 0 and something moved).
            Null where a pool has no value or there is no scale or standard error.
        """
        return self.covariates

    def moved(self, min_z: float = 3.0) -> pl.DataFrame:
        """The rows of `to_frame` that are at least `min_z` standard errors from no move."""
        return self.covariates.filter(pl.col("z").abs() >= min_z)


def compare_profiles(
    before: pl.DataFrame,
    after: pl.DataFrame,
    domains: Sequence[str],
    covariates: Sequence[str],
    *,
    scale_DP: np.ndarray | None = None,
) -> PoolChange:
    """Compare two documents frames of a pool.

    Args:
        before: a documents frame: a row per distinct document of a domain; augmented ones are left
            out. Metrics may be null where only a sample was scored.
        after: a later one.
        domains: D domains.
        covariates: P names.
        scale_DP: size of one unit of effect, the experiment's normaliser; without it, the standard
            deviation of the documents, token-weighted, mean variance of both pools (`log2_tokens`
            has none).

    Raises:
        PoolError: if a domain has no document in one of the pools, or a metric is missing.
    """
    frames = [_originals(before, domains, "before"), _originals(after, domains, "after")]
    meters = [CovariateMeter.of(frame, domains, covariates) for frame in frames]
    copies = [frame["copies"].to_numpy().astype(float) for frame in frames]
    values = [
        meter.measure(np.arange(len(times)), times, sample_ratios(frame, domains))
        for meter, times, frame in zip(meters, copies, frames, strict=True)
    ]
    partner_N = _partners(frames[0], frames[1])
    se_DP, spread_DP = np.full((2, len(domains), len(covariates)), np.nan)
    for d in range(len(domains)):
        rows = [np.flatnonzero(meter.domain_N == d) for meter in meters]
        place_n = np.searchsorted(rows[0], partner_N[rows[1]])
        kept_n = partner_N[rows[1]] >= 0
        for p in range(len(covariates)):
            old, new = (
                _influence(meter, times, part, p)
                for meter, times, part in zip(meters, copies, rows, strict=True)
            )
            if old is None or new is None:
                continue
            new.influence_n[kept_n] -= old.influence_n[place_n[kept_n]]
            old.influence_n[place_n[kept_n]] = 0.0
            se_DP[d, p] = np.sqrt(np.sum(new.influence_n**2) + np.sum(old.influence_n**2))
            spread_DP[d, p] = np.sqrt((old.variance + new.variance) / 2)
    unit_DP = spread_DP if scale_DP is None else np.asarray(scale_DP, dtype=float)
    size_DP = np.fmax(np.fmax(np.abs(values[0]), np.abs(values[1])), spread_DP)
    difference_DP = _without_dust(values[1] - values[0], size_DP)
    se_DP = _without_dust(se_DP, size_DP)
    columns_DP = {
        "before": values[0],
        "after": values[1],
        "difference": difference_DP,
        "se": se_DP,
        "effect": _ratio(difference_DP, unit_DP),
        "effect_se": _ratio(se_DP, unit_DP),
        "z": _ratio(difference_DP, se_DP),
    }
    return PoolChange(
        _count_documents(frames[0], frames[1], domains),
        _moves(domains, covariates, columns_DP),
    )


def covariate_errors(
    documents: pl.DataFrame, domains: Sequence[str], covariates: Sequence[str]
) -> np.ndarray:
    """Standard errors of a pool's covariates, its documents taken for a sample.

    Args:
        documents: the documents frame; augmented documents are left out, those without a value of
            a metric don't count for it.
        domains: D domains.
        covariates: P names.

    Returns:
        Shape (D, P), in the units of the covariates; nan for `sample_compress_ratio` and where a
        domain has fewer than two documents with a value.

    Raises:
        PoolError: if a domain has no document, or a metric is missing.
    """
    frame = _originals(documents, domains, "measured")
    meter = CovariateMeter.of(frame, domains, covariates)
    copies_N = frame["copies"].to_numpy().astype(float)
    se_DP = np.full((len(domains), len(covariates)), np.nan)
    for d in range(len(domains)):
        rows = np.flatnonzero(meter.domain_N == d)
        for p in range(len(covariates)):
            found = _influence(meter, copies_N, rows, p)
            if found is not None:
                se_DP[d, p] = np.sqrt(np.sum(found.influence_n**2))
    return se_DP


@dataclass(frozen=True, eq=False)
class _Influence:
    """Of the documents of a domain on a covariate; and the documents' variance."""

    influence_n: np.ndarray
    variance: float


def _influence(
    meter: CovariateMeter, copies_N: np.ndarray, rows: np.ndarray, p: int
) -> _Influence | None:
    """None where there is no standard error: fewer than two values, or not of documents."""
    name = meter.covariates[p]
    tokens_n = meter.n_tokens_N[rows]
    if name == "sample_compress_ratio":
        return None
    if name == "log2_tokens":
        return _Influence(tokens_n / (tokens_n.sum() * np.log(2)), float("nan"))
    if name == "duplicate_share":
        value_n = 1.0 - 1.0 / copies_N[rows]
    else:
        value_n = meter.values_NB[rows, meter.column_P[p]]
    known_n = ~np.isnan(value_n)
    weight_n = np.where(known_n, tokens_n * copies_N[rows], 0.0)
    if known_n.sum() < 2 or weight_n.sum() <= 0:
        return None
    weight_n /= weight_n.sum()
    value_n = np.where(known_n, value_n, 0.0)
    deviation_n = np.where(known_n, value_n - weight_n @ value_n, 0.0)
    variance = float(weight_n @ deviation_n**2)
    if name == base_of(name):
        return _Influence(weight_n * deviation_n, variance)
    if name.startswith(LOG_TASK_LIKE_PREFIX):
        steepness = 1 / ((LEAST_LIKE + float(weight_n @ value_n)) * np.log(2))
        return _Influence(weight_n * deviation_n * steepness, variance * steepness**2)
    share = next(share for ending, share in QUANTILES.items() if name.endswith(ending))
    return _Influence(_quantile_influence(value_n, weight_n, share), variance)


def _quantile_influence(value_n: np.ndarray, weight_n: np.ndarray, share: float) -> np.ndarray:
    """Influence on a quantile; weights sum to 1 and are 0 where there is no value."""
    value_n = np.where(weight_n > 0, value_n, np.nan)
    below_n = value_n <= weighted_quantile(value_n, weight_n, share)
    on_share_n = weight_n * (share - below_n)
    half = float(np.sqrt(np.sum(on_share_n**2)))
    low, high = max(share - half, 0.0), min(share + half, 1.0)
    apart = weighted_quantile(value_n, weight_n, high) - weighted_quantile(value_n, weight_n, low)
    return on_share_n * apart / max(high - low, DUST)


def _originals(documents: pl.DataFrame, domains: Sequence[str], which: str) -> pl.DataFrame:
    """The documents that aren't augmented; refuses a pool without any of a domain."""
    frame = documents.filter(~pl.col("augmented"))
    counts = dict(frame.group_by("domain").agg(pl.len()).iter_rows())
    missing = [domain for domain in domains if not counts.get(domain)]
    if missing:
        raise PoolError(
            f"domain {missing[0]!r} must have documents in both pools, got none in the pool "
            f"{which} (its domains: {', '.join(sorted(counts)) or 'none'}): add documents, or "
            "remove the domain from `domains`."
        )
    assert not frame.select("domain", "document_id").is_duplicated().any(), which
    return frame


def _partners(before: pl.DataFrame, after: pl.DataFrame) -> np.ndarray:
    """Of each document after, its row before; -1 for a new one."""
    rows = before.select("domain", "document_id").with_row_index("row")
    found = after.select("domain", "document_id").join(
        rows, on=["domain", "document_id"], how="left", maintain_order="left"
    )
    return found["row"].cast(pl.Int64).fill_null(-1).to_numpy()


def _count_documents(
    before: pl.DataFrame, after: pl.DataFrame, domains: Sequence[str]
) -> pl.DataFrame:
    old, new = (
        frame.select("domain", "document_id", (pl.col("n_tokens") * pl.col("copies")).alias(name))
        for frame, name in ((before, "old"), (after, "new"))
    )
    both = old.join(new, on=["domain", "document_id"], how="full", coalesce=True)
    was, now = pl.col("old").is_not_null(), pl.col("new").is_not_null()
    gained = pl.col("new").fill_null(0) - pl.col("old").fill_null(0)
    counts = both.group_by("domain").agg(
        documents_before=was.sum(),
        documents_after=now.sum(),
        documents_in=(now & ~was).sum(),
        documents_out=(was & ~now).sum(),
        documents_kept=(was & now).sum(),
        tokens_before=pl.col("old").sum(),
        tokens_after=pl.col("new").sum(),
        tokens_in=gained.clip(lower_bound=0).sum(),
        tokens_out=-gained.clip(upper_bound=0).sum(),
    )
    integers = pl.all().exclude("domain").cast(pl.Int64)
    order = pl.DataFrame({"domain": list(domains)})
    return order.join(counts, on="domain", how="left", maintain_order="left").with_columns(integers)


def _moves(
    domains: Sequence[str], covariates: Sequence[str], columns_DP: dict[str, np.ndarray]
) -> pl.DataFrame:
    names = {
        "domain": [domain for domain in domains for _ in covariates],
        "covariate": list(covariates) * len(domains),
    }
    values = {name: values_DP.ravel() for name, values_DP in columns_DP.items()}
    frame = pl.DataFrame(names | values).with_columns(pl.col(list(values)).fill_nan(None))
    return frame.sort(pl.col("effect").abs(), descending=True, nulls_last=True, maintain_order=True)


def _without_dust(values: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) <= DUST * size, 0.0, values)


def _ratio(value: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Value over unit; 0 where nothing moved, infinite where something did and the unit is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((value == 0) & (unit == 0), 0.0, value / unit)
