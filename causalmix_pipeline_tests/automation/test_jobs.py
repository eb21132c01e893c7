"""The daily refresh starts what is stale and nothing else; adopting a pool is a job."""

import json

import dagster as dg
import pytest

from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.automation.jobs import adopt_experiment_pool
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import (
    DATA_VERSION_TAG,
    EXPERIMENT_POOL,
    LIVE_POOL,
    observed_version,
)
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings


@pytest.fixture
def instance(project_file):
    with ensure_instance(load_settings(project_file).data_path) as instance:
        yield instance


def tick(project_file, instance):
    schedule = build_definitions(project_file).get_repository_def().schedule_defs[0]
    with dg.build_schedule_context(instance) as context:
        return schedule.evaluate_tick(context)


def report_as_made(project_file, instance) -> None:
    """Report each asset of the live side as made from what is there now."""
    graph = build_definitions(project_file).resolve_asset_graph()
    for key in graph.toposorted_asset_keys:
        node = graph.get(key)
        tags = {DATA_VERSION_TAG: "1"}
        if node.code_version:
            tags["dagster/code_version"] = node.code_version
        for parent in node.parent_keys:
            version = observed_version(instance, parent) or "1"
            tags[f"dagster/input_data_version/{parent.to_user_string()}"] = version
        if node.is_materializable:
            instance.report_runless_asset_event(dg.AssetMaterialization(key, tags=tags))


def test_the_schedule_observes_the_pool_and_asks_for_the_whole_live_side_at_first(
    project_file, instance
):
    data = tick(project_file, instance)

    assert observed_version(instance, LIVE_POOL)
    (request,) = data.run_requests
    assert {key.to_user_string() for key in request.asset_selection} == set(LIVE_SIDE_NAMES)


def test_the_schedule_skips_a_day_without_a_change(project_file, instance):
    tick(project_file, instance)
    report_as_made(project_file, instance)

    data = tick(project_file, instance)

    assert data.run_requests == []
    assert "Nothing" in data.skip_message


def test_the_schedule_asks_for_what_a_changed_pool_reaches(project_file, instance):
    tick(project_file, instance)
    report_as_made(project_file, instance)
    with open(project_file.parent / "live" / "math" / "short.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more", "group": "z"}) + "\n")

    (request,) = tick(project_file, instance).run_requests

    assert {key.to_user_string() for key in request.asset_selection} == set(LIVE_SIDE_NAMES)


def test_the_schedule_runs_daily_at_the_hour_of_the_settings(project_file):
    schedule = build_definitions(project_file).get_repository_def().schedule_defs[0]

    assert schedule.cron_schedule == "0 5 * * *"
    assert schedule.execution_timezone == "UTC"
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING


def test_adopting_observes_the_experiment_pool_once(project_file, instance):
    resources = {"project": Project(config_file=str(project_file))}

    for _ in range(2):
        adopt_experiment_pool.execute_in_process(instance=instance, resources=resources)

    assert len(instance.fetch_observations(EXPERIMENT_POOL, limit=5).records) == 1
    assert load_settings(project_file).experiment_path.is_dir()
