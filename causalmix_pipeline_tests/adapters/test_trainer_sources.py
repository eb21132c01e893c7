from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.profiler import PoolSpec
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


def test_a_source_counts_each_document_once_however_often_the_pool_repeats_it():
    documents = pl.DataFrame(
        {
            "domain": ["a", "a", "b"],
            "file": ["a.jsonl", "a2.jsonl", "b.jsonl"],
            "row": [0, 0, 0],
            "copies": [1, 3, 1],
            "n_tokens": [10, 20, 7],
        }
    )

    a, b = pool_sources(documents, ["a", "b"], np.array([0.25, 0.75]))

    assert (a.rows, a.n_tokens, a.mean_tokens) == (2, 30, 15)
    assert a.files == (SourceFile("a.jsonl", 1), SourceFile("a2.jsonl", 1))
    assert (b.id, b.share, b.rows) == ("b", 0.75, 1)


def test_a_file_whose_documents_leave_a_gap_is_no_file_of_its_domain():
    """Seen without opening it: row 1 was refused, left out or repeats another."""
    documents = pl.DataFrame(
        {
            "domain": ["a", "a", "b"],
            "file": ["a", "a", "b"],
            "row": [0, 2, 0],
            "n_tokens": [1, 1, 1],
        }
    )

    a, b = pool_sources(documents, ["a", "b"], np.array([0.5, 0.5]))

    assert (a.files, b.files) == ((), (SourceFile("b", 1),))


def test_the_pools_own_files_are_named_where_each_holds_one_domain(tmp_path):
    pool = write_pool(tmp_path / "pool", LABELS)
    sources = pool_sources(documents_of(pool), LABELS, np.array(mixture_of(4)))

    placed = placed_sources(sources, pool, tmp_path / "out")

    assert [file.path for file in placed[1].files] == [
        str(tmp_path / "pool" / "01-one.jsonl"), str(tmp_path / "pool" / "01-two.jsonl"),
    ]  # fmt: skip
    assert placed[1].builder == "json"
    assert not is_placed_below(tmp_path / "out", placed[1])


def test_files_of_several_domains_are_never_named(tmp_path):
    pool = write_pool(tmp_path / "pool", LABELS, apart=False)
    sources = pool_sources(documents_of(pool), LABELS, np.array(mixture_of(4)))

    placed = placed_sources(sources, pool, tmp_path / "out")

    assert [file.path for file in placed[1].files] == [
        str(tmp_path / "out" / "domains" / "code" / "part-00000.jsonl")
    ]
    assert is_placed_below(tmp_path / "out", placed[1])


def rows_of(label: str, n: int, first: int = 0) -> list[dict]:
    """Documents of a domain, all different."""
    return [{"text": f"{label} text {i}", "domain": label} for i in range(first, first + n)]


#: Rows of one file that a trainer would read with the 20 documents of `a`.
FURTHER_ROWS = {
    "a domain that is left out, after them": rows_of("a", 20) + rows_of("left out", 20),
    "a domain that is left out, before them": rows_of("left out", 20) + rows_of("a", 20),
    "refused rows after them": rows_of("a", 20) + [{"text": " ", "domain": "a"}] * 2,
    "refused rows among them": rows_of("a", 9)
    + [{"text": " ", "domain": "a"}] * 2
    + rows_of("a", 11, 9),
    "repeats after them": rows_of("a", 20) + rows_of("a", 5),
    "repeats among them": rows_of("a", 9) + rows_of("a", 5) + rows_of("a", 11, 9),
}


def written_as(kind: str, path: Path, rows: list[dict]) -> None:
    """Write rows as a pool's file."""
    frame, path = pl.DataFrame(rows), path.with_suffix(f".{kind}")
    {"jsonl": frame.write_ndjson, "csv": frame.write_csv, "parquet": frame.write_parquet}[kind](
        path
    )


def placed_with(tmp_path, kind: str, rows: list[dict]) -> tuple[Source, ...]:
    """Sources of `a`, of whose domains only `a` and `b` are read, and of `b` beside it."""
    (tmp_path / "pool").mkdir()
    written_as(kind, tmp_path / "pool" / "a", rows)
    written_as(kind, tmp_path / "pool" / "b", rows_of("b", 20))
    pool = PoolSpec(tmp_path / "pool", ColumnMap(domain="domain"))
    documents = documents_of(pool).filter(pl.col("domain") != "left out")
    sources = pool_sources(documents, ["a", "b"], np.array([0.5, 0.5]))
    assert [source.rows for source in sources] == [20, 20]
    return placed_sources(sources, pool, tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("rows", FURTHER_ROWS.values(), ids=FURTHER_ROWS.keys())
def test_a_file_with_rows_that_arent_of_the_domain_is_never_named(tmp_path, rows, kind):
    placed = placed_with(tmp_path, kind, rows)

    assert all(is_placed_below(tmp_path / "out", source) for source in placed)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_with_nothing_but_documents_of_the_domain_is_named(tmp_path, kind):
    placed = placed_with(tmp_path, kind, rows_of("a", 20))

    assert [s.files[0].path for s in placed] == [
        str(tmp_path / "pool" / f"{name}.{kind}") for name in "ab"
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_that_was_damaged_since_is_never_named(tmp_path, kind):
    pool = write_pool(tmp_path / "pool", ["a"])
    path = tmp_path / "pool" / f"broken.{kind}"
    written_as(kind, path, rows_of("a", 20))
    path.write_bytes(path.read_bytes()[:200])
    source = Source("a", "a", 1.0, 20, 60, (SourceFile(path.name, 20),))

    (placed,) = placed_sources([source], pool, tmp_path / "out")

    assert is_placed_below(tmp_path / "out", placed)


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a\n.jsonl", "a.jsonl.gz", "a.feather"])
def test_a_file_that_a_loader_would_misread_is_never_named(tmp_path, name):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    sources = pool_sources(documents_of(pool), ["a", "b"], np.array([0.5, 0.5]))
    (tmp_path / "pool" / "00-one.jsonl").rename(tmp_path / "pool" / name)
    moved = replace(sources[0], files=(SourceFile(name, 20),))

    placed = placed_sources([moved, sources[1]], pool, tmp_path / "out")

    assert all(is_placed_below(tmp_path / "out", source) for source in placed)


def test_only_a_source_with_a_share_and_a_row_is_drawn():
    assert Source("a", "a", 0.5, 3, 30).is_drawn
    assert not Source("a", "a", 0.0, 3, 30).is_drawn
    assert not Source("a", "a", 0.5, 0, 0).is_drawn
