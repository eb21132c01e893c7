"""Which documents an expensive scorer sees: a fixed sample of each source, by content hash."""

from __future__ import annotations

import polars as pl

from causalmix_pipeline.core.errors import ConfigError

#: Bytes of text that are counted as one token where no exact count is at hand.
BYTES_PER_TOKEN = 4


def sample_documents(
    documents: pl.DataFrame, *, budget_tokens: int, max_tokens: int = 512
) -> pl.DataFrame:
    """The documents to score: per domain and source the lowest ids, until the budget is spent.

    An id is a hash of the content, so the lowest ids are a random sample that stays the same when
    other documents come or go. A domain's budget is shared out to its sources by their tokens, so
    the plain mean over a domain's sampled documents stays an estimate of the domain's mean. The
    document that crosses the budget is the last one in, so each source has at least one.

    Args:
        documents: `document_id`, `domain`, `source`, `n_bytes` and, where known, `n_tokens`; other
            columns are kept.
        budget_tokens: tokens to score in each domain, > 0.
        max_tokens: tokens at which the scorer cuts a document, so it costs no more; > 0.

    Returns:
        The chosen rows in their given order.

    Raises:
        ConfigError: if the budget or the cut isn't positive.
    """
    for name, value in (("lm_budget_tokens", budget_tokens), ("lm_max_tokens", max_tokens)):
        if value <= 0:
            raise ConfigError(f"profile.{name} must be > 0, got {value}. Leave it out or raise it.")
    cost = (pl.col("n_bytes") / BYTES_PER_TOKEN).ceil()
    if "n_tokens" in documents.columns:
        cost = pl.coalesce("n_tokens", cost)
    strata = ["domain", "source"]
    return (
        documents.with_row_index("_row")
        .with_columns(_cost=cost.clip(1, max_tokens).cast(pl.Float64))
        .sort("document_id")
        .with_columns(
            _spent_before=(pl.col("_cost").cum_sum() - pl.col("_cost")).over(strata),
            _share=pl.col("_cost").sum().over(strata) / pl.col("_cost").sum().over("domain"),
        )
        .filter(pl.col("_spent_before") < budget_tokens * pl.col("_share"))
        .sort("_row")
        .select(documents.columns)
    )
