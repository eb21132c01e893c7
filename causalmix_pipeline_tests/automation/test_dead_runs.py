"""Runs whose process was killed are closed by the daemon's sensor, retries that wait are not."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster._core.storage.schedules.schema import AssetDaemonAssetEvaluationsTable

from causalmix_pipeline.automation.dead_runs import EVALUATION_DAYS, make_dead_run_sensor
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import (
    PROCESS_TAG,
    ensure_instance,
    is_process_alive,
    process_tag,
)
from causalmix_pipeline.resources.settings import Settings


@dg.asset
def quick() -> None:
    """Anything."""


JOB = dg.Definitions([quick], jobs=[dg.define_asset_job("job", selection=[quick])])


@pytest.fixture
def instance(tmp_path):
    with ensure_instance(tmp_path) as instance:
        yield instance


@pytest.fixture
def gone() -> str:
    """The tag of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        tag = process_tag(process.pid)
    assert not is_process_alive(tag)
    return tag


def open_run(instance: dg.DagsterInstance, tag: str, **parents: str) -> dg.DagsterRun:
    return instance.create_run_for_job(
        JOB.resolve_job_def("job"),
        status=dg.DagsterRunStatus.STARTED,
        tags={PROCESS_TAG: tag},
        **parents,
    )


def look(instance: dg.DagsterInstance) -> str:
    with dg.build_sensor_context(instance) as context:
        reason = make_dead_run_sensor(Settings())(context)
    assert isinstance(reason, dg.SkipReason)
    return str(reason.skip_message)


def test_a_run_whose_process_is_gone_is_closed_and_a_living_one_goes_on(instance, gone):
    dead, alive = open_run(instance, gone), open_run(instance, process_tag())

    assert dead.run_id in look(instance)

    statuses = {run.run_id: run.status for run in instance.get_runs()}
    assert statuses[dead.run_id] == dg.DagsterRunStatus.FAILURE
    assert statuses[alive.run_id] == dg.DagsterRunStatus.STARTED
    assert look(instance) == "Every open run is alive."


def test_a_retry_that_has_the_tag_of_the_run_it_repeats_is_left_alone(instance, gone):
    """Dagster copies tags to the retry; its own process writes its own tag when it begins."""
    dead = open_run(instance, gone)
    look(instance)
    retry = open_run(instance, gone, root_run_id=dead.run_id, parent_run_id=dead.run_id)

    look(instance)

    left = instance.get_run_by_id(retry.run_id)
    assert left is not None and left.status == dg.DagsterRunStatus.STARTED


def test_every_run_of_the_project_writes_down_its_process(finished):
    defs = build_definitions(finished)
    with ensure_instance(finished.parent / "data") as instance:
        job = defs.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("live_covariates")]
        )
        run = instance.get_run_by_id(result.run_id)

        assert run is not None and run.tags[PROCESS_TAG] == process_tag()


def test_evaluations_of_the_conditions_are_kept_for_a_week(instance):
    eager = dg.Definitions(
        [
            quick.map_asset_specs(
                lambda spec: spec.replace_attributes(
                    automation_condition=dg.AutomationCondition.eager()
                )
            )
        ]
    )
    with dg.DagsterInstance.ephemeral() as other:
        keys = dg.AssetSelection.assets("quick")
        asked = dg.evaluate_automation_conditions(eager, other, asset_selection=keys)
    found = [result.serializable_evaluation.with_run_ids(set()) for result in asked.results]
    table, storage = AssetDaemonAssetEvaluationsTable, instance.schedule_storage
    for number in range(10):
        storage.add_auto_materialize_asset_evaluations(number, found)
        made = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=number, hours=-1)
        with storage.connect() as connection:
            connection.execute(
                table.update().where(table.c.evaluation_id == number).values(create_timestamp=made)
            )

    look(instance)

    left = storage.get_auto_materialize_asset_evaluations(dg.AssetKey("quick"), limit=20)
    assert [record.evaluation_id for record in left] == list(range(EVALUATION_DAYS, -1, -1))


def test_the_sensor_is_on_where_the_project_is_loaded(finished):
    sensor = build_definitions(finished).resolve_sensor_def("dead_runs")

    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
