"""Likeness to a task's text in a whole tiny project: asked for later, it trains nothing."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.automation.staleness import refresh
from causalmix_pipeline.core.errors import ConfigError, ScoringError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.asset_keys import assets_named
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_project

pytestmark = pytest.mark.timeout(400)

WANTED = assets_named("recommended_mixture").upstream()
COVARIATES = ["log2_tokens", "bigram_cross_entropy"]
LIKE = ["log2_task_like_math", "log2_task_like_code"]


def bring_up(config: Path) -> set[str]:
    """Materialise what is stale, up to the recommendation; names of what was made."""
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        made = refresh(build_definitions(config), instance, WANTED)
    return {key.to_user_string() for key in made}


def value(config: Path, name: str):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def edit(config: Path, **sections) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | sections))


def test_asked_for_later_it_is_a_covariate_of_the_same_runs(tmp_path):
    config = write_project(
        tmp_path, covariates=COVARIATES, estimators=["structured_ridge"], backend={"workers": 1}
    )
    bring_up(config)
    n_records = Project(config_file=str(config)).run_store.n_records()

    edit(config, covariates=[*COVARIATES, *LIKE])
    made = bring_up(config)

    assert {"experiment_documents", "pool_states", "run_table", "live_covariates"} <= made
    assert Project(config_file=str(config)).run_store.n_records() == n_records
    assert RunTable.from_frame(value(config, "run_table")).covariates == (*COVARIATES, *LIKE)
    live = value(config, "live_covariates")
    # Domains come in the order of their names; talk has no task.
    assert live["domain"].to_list() == ["code", "math", "talk"]
    like_DT = 2 ** live.select(LIKE).to_numpy() - 0.01
    np.testing.assert_allclose(like_DT[2], 0, atol=1e-9)
    assert like_DT[1, 0] > 0.5 > like_DT[0, 0]
    assert like_DT[0, 1] > 0.5 > like_DT[1, 1]
    assert bring_up(config) == set()

    task = tmp_path / "eval" / "math.jsonl"
    task.write_text("\n".join(task.read_text().splitlines()[:-1]) + "\n")
    assert {"experiment_documents", "live_documents"} <= bring_up(config)


@pytest.mark.parametrize("name", ["log2_task_like_maths", "log2_task_like_quiz"])
def test_a_task_without_held_out_text_is_refused_by_its_name(tmp_path, name):
    config = write_project(tmp_path, covariates=[name])
    raw = yaml.safe_load(config.read_text())
    raw["tasks"].append({"name": "quiz", "path": "eval/math.jsonl", "kind": "choice"})
    config.write_text(yaml.safe_dump(raw))

    with pytest.raises(ConfigError, match=rf"{name} must name a task .*\(math, code\)"):
        load_settings(config)


def test_too_little_text_stops_the_profile_with_the_way_out(tmp_path):
    config = write_project(tmp_path, covariates=["log2_tokens", *LIKE])
    task = tmp_path / "eval" / "code.jsonl"
    task.write_text("\n".join(task.read_text().splitlines()[:3]) + "\n")

    with pytest.raises(ScoringError, match=r"task code needs 8 pieces .*log2_task_like_code off"):
        bring_up(config)
