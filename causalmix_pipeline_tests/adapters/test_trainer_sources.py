from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.adapters.trainer_sources import (
    Source,
    SourceFile,
    domain_ids,
    is_placed_below,
    placed_sources,
    pool_sources,
)
from causalmix_pipeline_tests.adapters.exported_pool import (
    documents_of,
    mixture_of,
    write_pool,
)

LABELS = ["math", "code", "talk", "none"]


@given(st.lists(st.text(max_size=60), unique=True, max_size=8))
def test_ids_are_different_and_safe_whatever_the_labels(labels):
    ids = domain_ids(labels)

    assert len(set(ids)) == len(labels)
    for name in ids:
        assert name.isascii() and name == name.lower() and len(name) < 80
        assert name.replace("-", "").replace("_", "").isalnum() and name[0].isalnum()


def test_a_label_that_can_be_an_id_is_its_own():
    assert domain_ids(["code_reasoning", "Web pages!", "domain-01-web-pages"]) == [
        "code_reasoning", "domain-01-web-pages-x", "domain-01-web-pages",
    ]  # fmt: skip


def test_a_source_counts_rows_with_their_repeats_in_the_pool():
    documents = pl.DataFrame(
        {
            "domain": ["a", "a", "b"],
            "file": ["a.jsonl", "a2.jsonl", "b.jsonl"],
            "copies": [1, 3, 1],
            "n_tokens": [10, 20, 7],
        }
    )

    a, b = pool_sources(documents, ["a", "b"], np.array([0.25, 0.75]))

    assert (a.rows, a.n_tokens, a.mean_tokens) == (4, 70, 17.5)
    assert a.files == (SourceFile("a.jsonl", 1), SourceFile("a2.jsonl", 3))
    assert (b.id, b.share, b.rows) == ("b", 0.75, 1)


def test_the_pools_own_files_are_named_where_each_holds_one_domain(tmp_path):
    pool = write_pool(tmp_path / "pool", LABELS)
    sources = pool_sources(documents_of(pool), LABELS, np.array(mixture_of(4)))

    placed = placed_sources(sources, pool.location, tmp_path / "out")

    assert [file.path for file in placed[1].files] == [
        str(tmp_path / "pool" / "01-one.jsonl"), str(tmp_path / "pool" / "01-two.jsonl"),
    ]  # fmt: skip
    assert placed[1].builder == "json"
    assert not is_placed_below(tmp_path / "out", placed[1])


def test_files_of_several_domains_are_never_named(tmp_path):
    pool = write_pool(tmp_path / "pool", LABELS, apart=False)
    sources = pool_sources(documents_of(pool), LABELS, np.array(mixture_of(4)))

    placed = placed_sources(sources, pool.location, tmp_path / "out")

    assert [file.path for file in placed[1].files] == [
        str(tmp_path / "out" / "domains" / "code" / "part-00000.jsonl")
    ]
    assert is_placed_below(tmp_path / "out", placed[1])


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a\n.jsonl", "a.jsonl.gz", "a.feather"])
def test_a_file_that_a_loader_would_misread_is_never_named(tmp_path, name):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    sources = pool_sources(documents_of(pool), ["a", "b"], np.array([0.5, 0.5]))
    (tmp_path / "pool" / "00-one.jsonl").rename(tmp_path / "pool" / name)
    moved = replace(sources[0], files=(SourceFile(name, 20),))

    placed = placed_sources([moved, sources[1]], pool.location, tmp_path / "out")

    assert all(is_placed_below(tmp_path / "out", source) for source in placed)


def test_only_a_source_with_a_share_and_a_row_is_drawn():
    assert Source("a", "a", 0.5, 3, 30).is_drawn
    assert not Source("a", "a", 0.0, 3, 30).is_drawn
    assert not Source("a", "a", 0.5, 0, 0).is_drawn
