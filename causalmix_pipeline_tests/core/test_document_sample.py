"""The sample spends its budget, favours nobody, and stays put when the pool grows a little."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.document_sample import sample_documents
from causalmix_pipeline.core.errors import ConfigError


def pool(n: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "document_id": [rng.bytes(16).hex() for _ in range(n)],
            "domain": rng.choice(["math", "prose"], n),
            "source": rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]),
            "n_bytes": rng.integers(40, 4000, n),
        }
    )


def cost(documents: pl.DataFrame) -> pl.Series:
    return (documents["n_bytes"] / 4).ceil().clip(1, 512)


def test_each_domain_spends_its_budget_and_at_most_a_document_a_source_more():
    sample = sample_documents(pool(2000), budget_tokens=20_000)

    spent = sample.with_columns(cost=cost(sample)).group_by("domain").agg(pl.sum("cost"))
    assert spent["cost"].is_between(20_000, 20_000 + 3 * 512).all()


def test_sources_have_their_share_of_the_budget():
    documents = pool(2000)
    sample = sample_documents(documents, budget_tokens=60_000)

    def shares(part: pl.DataFrame) -> np.ndarray:
        part = part.with_columns(cost=cost(part)).filter(domain="math")
        spent = part.group_by("source").agg(pl.sum("cost")).sort("source")["cost"].to_numpy()
        return spent / spent.sum()

    np.testing.assert_allclose(shares(sample), shares(documents), atol=0.02)


def test_it_takes_the_lowest_ids_of_a_source():
    documents = pool(500)
    sample = sample_documents(documents, budget_tokens=5_000)

    for (domain, source), part in sample.group_by("domain", "source"):
        whole = documents.filter(domain=domain, source=source)["document_id"].sort()
        assert part["document_id"].sort().to_list() == whole[: part.height].to_list()


def test_one_hundredth_of_new_documents_changes_little():
    documents = pool(5000)
    grown = pl.concat([documents, pool(50, seed=1)])

    before = set(sample_documents(documents, budget_tokens=50_000)["document_id"])
    after = set(sample_documents(grown, budget_tokens=50_000)["document_id"])

    assert len(before & after) > 0.97 * len(before)


def test_the_order_of_the_rows_changes_nothing_and_is_kept():
    documents = pool(300)
    shuffled = documents.sample(fraction=1.0, shuffle=True, seed=3)

    sample = sample_documents(shuffled, budget_tokens=3_000)

    wanted = sample_documents(documents, budget_tokens=3_000)["document_id"].to_list()
    assert set(sample["document_id"]) == set(wanted)
    kept = shuffled.filter(pl.col("document_id").is_in(wanted))
    assert sample.equals(kept)


def test_a_small_budget_leaves_a_document_of_each_source_and_a_large_one_all():
    documents = pool(400)

    least = sample_documents(documents, budget_tokens=1)
    most = sample_documents(documents, budget_tokens=10**9)

    assert least.select("domain", "source").is_duplicated().sum() == 0
    assert least.height == documents.select("domain", "source").n_unique()
    assert most.equals(documents)


def test_known_token_counts_go_before_bytes_up_to_the_cut():
    documents = pl.DataFrame(
        {
            "document_id": ["0", "1", "2", "3"],
            "domain": "d",
            "source": "s",
            "n_bytes": 4_000,
            "n_tokens": [10, 9_999, None, 10],
        }
    )

    def kept(budget: int) -> list[str]:
        sample = sample_documents(documents, budget_tokens=budget, max_tokens=100)
        return sample["document_id"].to_list()

    assert kept(10) == ["0"]
    assert kept(110) == ["0", "1"]
    assert kept(111) == ["0", "1", "2"]
    assert kept(211) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "field"),
    [({"budget_tokens": 0}, "lm_budget_tokens"), ({"max_tokens": -1}, "lm_max_tokens")],
)
def test_a_budget_must_be_positive(options, field):
    with pytest.raises(ConfigError, match=rf"profile\.{field} must be > 0, got"):
        sample_documents(pool(3), **{"budget_tokens": 5, **options})
