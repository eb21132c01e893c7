"""Catalogues of files: named by content and by how it was read, whole or absent."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from causalmix_pipeline.adapters.file_catalogues import Catalogues, catalogue_name
from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.pool_files import pool_files


def file_of(path: Path, text: str = "a"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return next(file for file in pool_files(path.parent) if file.url == str(path))


def put(catalogues: Catalogues, name: str, folder: Path, values: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    part = folder / "documents-000000.parquet"
    pl.DataFrame({"document_id": values}).write_parquet(part)
    catalogues.write(name, [part], len(values))


def test_a_name_follows_the_bytes_the_place_and_the_columns_but_not_the_time(tmp_path):
    names = [
        catalogue_name(file_of(tmp_path / "p" / "math" / "a.jsonl"), ColumnMap()),
        catalogue_name(file_of(tmp_path / "p" / "math" / "a.jsonl", "b"), ColumnMap()),
        catalogue_name(file_of(tmp_path / "q" / "code" / "a.jsonl"), ColumnMap()),
        catalogue_name(file_of(tmp_path / "p" / "math" / "b.jsonl"), ColumnMap()),
        catalogue_name(file_of(tmp_path / "p" / "math" / "a.jsonl"), ColumnMap(text="body")),
        catalogue_name(file_of(tmp_path / "p" / "math" / "a.jsonl"), ColumnMap(), 3),
    ]

    assert len(set(names)) == len(names)
    assert catalogue_name(file_of(tmp_path / "p" / "math" / "a.jsonl"), ColumnMap()) == names[0]


def test_a_catalogue_gives_back_its_rows(tmp_path):
    catalogues = Catalogues(tmp_path / "kept")
    put(catalogues, "x", tmp_path / "made", [1, 2])

    assert catalogues.n_rows("x") == 2
    assert catalogues.read("x", "documents")[0]["document_id"].to_list() == [1, 2]
    assert catalogues.read("x", "sample") == []
    assert catalogues.n_rows("y") is None


@pytest.mark.parametrize("part", ["documents-000000.parquet", "catalogue.json"])
def test_a_damaged_or_unfinished_catalogue_is_none_and_is_replaced(tmp_path, part):
    catalogues = Catalogues(tmp_path / "kept")
    put(catalogues, "x", tmp_path / "made", [1, 2])
    (tmp_path / "kept" / "x" / part).write_bytes(b"{")
    assert catalogues.n_rows("x") is None

    put(catalogues, "x", tmp_path / "made", [1, 2, 3])

    assert catalogues.n_rows("x") == 3


def test_catalogues_of_files_that_left_are_removed(tmp_path):
    catalogues = Catalogues(tmp_path / "kept")
    for name in ("x", "y"):
        put(catalogues, name, tmp_path / "made", [1])

    catalogues.keep_only(["y"])

    assert [folder.name for folder in (tmp_path / "kept").iterdir()] == ["y"]
