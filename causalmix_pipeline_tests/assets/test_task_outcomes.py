"""Tasks of every kind become outcomes of real runs; documents that overlap are left out."""

import json
import math

import dagster as dg
import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.design import read_harness_tasks, read_task_questions
from causalmix_pipeline.assets.proxy import records_frame, records_of
from causalmix_pipeline.automation.staleness import refresh
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.proxy_runs import ProxyRecord
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_project

TASKS = [
    {"name": "math", "path": "eval/math.jsonl"},
    {"name": "pick", "path": "eval/pick.jsonl", "kind": "choice"},
    {"name": "write", "path": "eval/write.jsonl", "kind": "exact", "max_new_tokens": 4},
]


def write_questions(root) -> None:
    pick = [{"prompt": "seven equals", "choices": ["digit", "coffee"], "answer": 0}] * 3
    write = [{"prompt": "return self", "answer": "class"}] * 2
    for name, rows in {"pick": pick, "write": write}.items():
        (root / "eval" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def project(tmp_path):
    """A tiny project with a task of each kind; its first document of each pool is a task's."""
    design = {"n_runs": 8, "mixtures_per_state": 2, "noise_panel": {"mixtures": 2, "seeds": 2}}
    path = write_project(tmp_path, tasks=TASKS, quality={"exclude_overlap": True}, design=design)
    write_questions(tmp_path)
    held_out = (tmp_path / "eval" / "math.jsonl").read_text().splitlines()[0]
    for pool in ("experiment", "live"):
        file = tmp_path / pool / "math" / "short.jsonl"
        file.write_text(held_out + "\n" + file.read_text())
    return path


def value(path, name: str):
    return read_value(path.parent / "data" / "assets" / f"{name}.parquet")


def test_a_task_of_each_kind_is_an_outcome_of_every_run(project):
    settings = load_settings(project)
    with ensure_instance(settings.data_path) as instance:
        for pool in (EXPERIMENT_POOL, LIVE_POOL):
            observe_pool(instance, settings, pool)
        wanted = dg.AssetSelection.assets("run_table").upstream()
        refresh(build_definitions(project), instance, wanted)
    runs, table = value(project, "proxy_runs"), RunTable.from_frame(value(project, "run_table"))

    assert table.tasks == ("math", "pick", "write")
    assert table.n_runs == 10  # 8 and a panel of 2 x 1
    np.testing.assert_array_equal(table.outcome_NT[:, 0], -runs["bits_per_byte__math"])
    np.testing.assert_array_equal(table.outcome_NT[:, 1], runs["score__pick"])
    assert ((table.outcome_NT[:, 1] > 0) & (table.outcome_NT[:, 1] < 1)).all()
    assert len(set(table.outcome_NT[:, 1].tolist())) > 5  # graded: moves with every weight
    assert "nats_per_token__pick" not in runs.columns
    documents = value(project, "experiment_documents")
    assert documents.height == 180  # the planted one is gone
    quarantine = read_value(project.parent / "data" / "quarantine" / "experiment_pool.parquet")
    assert quarantine.select("file", "row", "reason").rows() == [
        ("math/short.jsonl", 0, "overlaps task math: 13 words in a row")
    ]


RECORD = ProxyRecord("k", {}, {"a": 1.0}, {"a": 2.0}, [3.0], False, 1.0, {"q": 0.5})


def test_a_score_that_a_diverged_run_lacks_is_null_and_comes_back_as_none():
    lost = ProxyRecord("l", {}, {}, {}, [math.nan], True, 1.0)
    design = pl.DataFrame({"proxy_run_id": ["k", "l"], "state_id": [0, 0], "cell": [0, 1]})
    frame = records_frame([RECORD, lost], design)
    back = records_of(frame, ["a", "q"])

    assert frame["score__q"].to_list() == [0.5, None]
    assert (back[0].bits_per_byte, back[0].scores) == ({"a": 1.0}, {"q": 0.5})
    assert (back[1].bits_per_byte, back[1].scores) == ({}, {})


def test_the_harness_takes_pretrained_models_only(tmp_path):
    task = {"name": "h", "path": "eval", "kind": "lm_eval", "harness_task": "sums"}
    path = write_project(tmp_path, tasks=[TASKS[0], task])

    with pytest.raises(ConfigError, match=r"must have proxy\.pretrained set, got null"):
        read_harness_tasks(Project(config_file=str(path)))


def test_questions_that_are_not_there_name_the_task(tmp_path):
    path = write_project(tmp_path, tasks=TASKS)

    with pytest.raises(PoolError, match=r"tasks\[1\]\.path must be .*pick\.jsonl.*put questions"):
        read_task_questions(Project(config_file=str(path)))
