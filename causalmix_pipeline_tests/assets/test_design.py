"""Held-out text is read whole or refused; what the design's table says is what it holds."""

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.assets.design import (
    covariate_reach,
    design_of,
    domains_of,
    read_task_texts,
    read_text_column,
    share_reach,
)
from causalmix_pipeline.core.design import Design
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline_tests.conftest import write_project


def test_each_task_has_its_own_text(project_file):
    texts = read_task_texts(Project(config_file=str(project_file)))

    assert {task: len(found) for task, found in texts.items()} == {"math": 20, "code": 20}
    assert set(texts["math"]).isdisjoint(texts["code"])


def test_settings_without_a_task_are_refused(tmp_path):
    path = write_project(tmp_path, tasks=[])

    with pytest.raises(ConfigError, match="tasks must hold at least one task, got none"):
        read_task_texts(Project(config_file=str(path)))


def test_a_missing_text_names_the_task(project_file):
    (project_file.parent / "eval" / "code.jsonl").unlink()

    with pytest.raises(PoolError, match=r"tasks\[1\]\.path must be .*code\.jsonl"):
        read_task_texts(Project(config_file=str(project_file)))


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "half', "must hold text in column 'text'"), ('{"body": "x"}', "'text'"),
     ('{"text": "  "}', "got none"), ('{"text": null}', "got none")],
)  # fmt: skip
def test_text_that_is_not_clean_is_refused(tmp_path, content, message):
    """It decides every outcome, so nothing of it is left out in silence."""
    path = tmp_path / "task.jsonl"
    path.write_text(content + "\n")

    with pytest.raises(PoolError, match=message):
        read_text_column(path, "text")


def test_parquet_is_read_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "task.parquet"
    pl.DataFrame({"text": ["a", "b"]}).write_parquet(path)
    assert read_text_column(path, "text") == ["a", "b"]

    path.write_bytes(b"PAR1")
    with pytest.raises(PoolError, match="must hold text"):
        read_text_column(path, "text")


def test_a_design_comes_back_from_its_table():
    table = pl.DataFrame(
        {
            "state_id": [0, 1],
            "cell": [0, 1],
            "data_seed": [5, 6],
            "share__math": [0.2, 0.7],
            "share__a b|c": [0.8, 0.3],
        }
    )

    design = design_of(table)

    assert domains_of(table) == ["math", "a b|c"]
    assert design.mixture_ND.tolist() == [[0.2, 0.8], [0.7, 0.3]]
    assert design.data_seed_N.tolist() == [5, 6]


def test_the_reach_of_shares_and_covariates_is_told():
    design = Design(
        np.zeros(3), np.array([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]), np.zeros(3), np.zeros(3)
    )
    states = pl.DataFrame({"state_id": [0, 1, 2], "mtld": [1.0, 2.0, 4.0], "hes": [3.0, 5.0, 7.0]})

    assert share_reach(design, ["a", "b"])[0] == {
        "domain": "a",
        "least": 0.1,
        "median": 0.5,
        "largest": 0.9,
        "0 to 1": "·█······█·····█·",
    }
    told = covariate_reach(states, ["hes", "mtld", "ifd"])
    assert [row["covariate"] for row in told] == ["hes", "mtld"]
    assert told[1]["largest"] == 4.0
    assert told[1]["least to largest"] == "█··█·····█"
