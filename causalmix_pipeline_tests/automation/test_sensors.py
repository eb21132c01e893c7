"""The pool sensor: quiet before it reads, silent about equal content, never a run."""

import json
import os

import dagster as dg
import pytest

from causalmix_pipeline.automation.sensors import (
    look_at_pool,
    make_condition_sensor,
    make_pool_sensor,
)
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG, LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_project


class Watch:
    """A sensor's life: looks at times of our choosing, and events that reach the instance."""

    def __init__(self, settings, instance):
        self.settings, self.instance, self.cursor = settings, instance, None

    def look(self, now: float) -> dg.SensorResult:
        result = look_at_pool(self.instance, self.settings, self.cursor, now)
        assert not result.run_requests
        self.cursor = result.cursor
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        return result


@pytest.fixture
def watch(tmp_path):
    settings = load_settings(write_project(tmp_path, automation={"quiet_seconds": 60}))
    set_times(settings, 1000)
    with dg.DagsterInstance.ephemeral() as instance:
        watch = Watch(settings, instance)
        watch.look(2000)
        watch.look(2060)
        assert observed_version(instance, LIVE_POOL)
        yield watch


def set_times(settings, seconds: float) -> None:
    for path in settings.live_path.rglob("*.jsonl"):
        os.utime(path, (seconds, seconds))


def change(settings, text: str, seconds: float) -> None:
    path = settings.live_path / "math" / "short.jsonl"
    path.write_text(text)
    os.utime(path, (seconds, seconds))


def test_an_unchanged_pool_is_not_read_again(watch, monkeypatch):
    monkeypatch.setattr("causalmix_pipeline.automation.sensors.pool_fingerprint", None)

    result = watch.look(5000)

    assert "as before" in result.skip_reason.skip_message


def test_a_changed_pool_is_observed_with_its_fingerprint_once_it_is_quiet(watch):
    before = observed_version(watch.instance, LIVE_POOL)
    change(watch.settings, '{"text": "new", "group": "a"}\n', 5000)

    assert "quiet" in watch.look(5010).skip_reason.skip_message
    assert "quiet" in watch.look(5050).skip_reason.skip_message
    (event,) = watch.look(5071).asset_events

    assert event.asset_key == LIVE_POOL
    assert event.tags[DATA_VERSION_TAG] not in (None, before)
    assert observed_version(watch.instance, LIVE_POOL) == event.tags[DATA_VERSION_TAG]
    assert event.metadata["files"].value == 6


def test_a_file_that_still_grows_starts_the_wait_again(watch):
    change(watch.settings, "half", 5000)
    watch.look(5010)
    change(watch.settings, '{"text": "whole", "group": "a"}\n', 5065)

    assert "quiet" in watch.look(5071).skip_reason.skip_message


def test_a_file_copied_with_an_old_time_waits_too(watch):
    """`cp -p` and `rsync -t` keep the time of the original: the look must count."""
    change(watch.settings, '{"text": "old", "group": "a"}\n', 10)

    assert "quiet" in watch.look(5000).skip_reason.skip_message
    assert watch.look(5060).asset_events


def test_a_clock_that_runs_ahead_delays_but_does_not_block(watch):
    change(watch.settings, '{"text": "ahead", "group": "a"}\n', 99_000)

    watch.look(5000)

    assert "quiet" in watch.look(5100).skip_reason.skip_message
    assert watch.look(99_060).asset_events


def test_a_file_written_again_with_the_same_content_is_no_event(watch):
    set_times(watch.settings, 6000)
    watch.look(6001)

    result = watch.look(6100)

    assert result.asset_events == []
    assert "same content" in result.skip_reason.skip_message
    assert "as before" in watch.look(6200).skip_reason.skip_message


def test_a_change_that_is_taken_back_is_no_event(watch):
    path = watch.settings.live_path / "math" / "short.jsonl"
    original = path.read_text()
    change(watch.settings, "other", 5000)
    watch.look(5001)
    change(watch.settings, original, 5002)
    watch.look(5003)

    assert watch.look(5100).asset_events == []


def test_a_removed_file_is_a_change(watch):
    (watch.settings.live_path / "math" / "short.jsonl").unlink()
    watch.look(5000)

    (event,) = watch.look(5060).asset_events

    assert event.metadata["files"].value == 5


def test_a_missing_pool_fails_the_tick_with_the_way_out(watch):
    os.rename(watch.settings.live_path, watch.settings.live_path.with_name("gone"))

    with pytest.raises(PoolError, match="is not a folder"):
        watch.look(5000)


def test_the_cursor_stays_small(watch):
    change(watch.settings, "x", 5000)
    watch.look(5001)

    assert len(watch.cursor) < 120
    assert set(json.loads(watch.cursor)) == {"done", "stat", "since"}


def test_the_sensor_looks_through_the_instance_it_is_given(tmp_path):
    settings = load_settings(write_project(tmp_path))  # no quiet time
    sensor = make_pool_sensor(settings)
    with dg.DagsterInstance.ephemeral() as instance, dg.build_sensor_context(instance) as context:
        data = sensor.evaluate_tick(context)

    assert [event.asset_key for event in data.asset_events] == [LIVE_POOL]
    assert data.run_requests == []


def test_both_sensors_run_from_the_start_and_as_often_as_the_settings_say(tmp_path):
    path = write_project(tmp_path, automation={"sensor_interval_seconds": 45})

    for sensor in (
        make_pool_sensor(load_settings(path)),
        make_condition_sensor(load_settings(path)),
    ):
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
        assert sensor.minimum_interval_seconds == 45
