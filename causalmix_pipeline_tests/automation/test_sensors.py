"""The pool sensor: quiet before it reads, silent about equal content, never a run."""

import itertools
import json
import os
import random
import shutil

import dagster as dg
import pytest

from causalmix_pipeline.automation import sensors
from causalmix_pipeline.automation.sensors import (
    look_at_pools,
    make_condition_sensor,
    make_pool_sensor,
    read_cursor,
)
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.resources.live_pools import PARTITIONS_NAME
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG, LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_pool, write_project

QUIET, INTERVAL = 60, 30


class Watch:
    """A sensor's life: looks at times of our choosing, and events that reach the instance."""

    def __init__(self, settings, instance):
        self.settings, self.instance, self.cursor = settings, instance, None
        self.problems: list[str] = []

    def look(self, now: float) -> dg.SensorResult:
        result, self.problems = look_at_pools(self.instance, self.settings, self.cursor, now)
        assert not result.run_requests
        self.cursor = result.cursor
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        return result

    def look_until(self, start: float, end: float) -> list[dg.AssetObservation]:
        """Look every interval, and return all that was observed."""
        found = []
        for now in range(int(start), int(end) + 1, INTERVAL):
            found += self.look(now).asset_events
        return found

    def said(self, now: float) -> str:
        reason = self.look(now).skip_reason
        return "" if reason is None else reason.skip_message


def watch_over(path, instance) -> Watch:
    """A watch of a project whose pools were observed."""
    watch = Watch(load_settings(path), instance)
    watch.look_until(2000, 2000 + QUIET)
    for name in watch.settings.live_pools:
        assert observed_version(instance, LIVE_POOL, name)
    return watch


@pytest.fixture
def watch(tmp_path):
    path = write_project(tmp_path, automation={"quiet_seconds": QUIET})
    with dg.DagsterInstance.ephemeral() as instance:
        yield watch_over(path, instance)


@pytest.fixture
def watch_of_two(tmp_path):
    pools = {"experiment": "experiment", "live": {"web-2026w47": "live", "longcot": "cot"}}
    path = write_project(tmp_path, pools=pools, automation={"quiet_seconds": QUIET})
    write_pool(tmp_path / "cot", n=24, seed=3)
    with dg.DagsterInstance.ephemeral() as instance:
        yield watch_over(path, instance)


def change(settings, text: str, *, pool: str | None = None) -> None:
    path = settings.live_location(pool) / "math" / "short.jsonl"
    path.write_text(text)


def test_an_unchanged_pool_is_not_read_again(watch, monkeypatch):
    monkeypatch.setattr(sensors, "pool_fingerprint", None)

    assert "as before" in watch.said(5000)


def test_a_changed_pool_is_observed_with_its_fingerprint_once_it_is_quiet(watch):
    before = observed_version(watch.instance, LIVE_POOL)
    change(watch.settings, '{"text": "new", "group": "a"}\n')

    assert "quiet, in 60 s" in watch.said(5010)
    assert "quiet, in 30 s" in watch.said(5040)
    (event,) = watch.look(5070).asset_events

    assert event.asset_key == LIVE_POOL
    assert event.partition is None
    assert event.tags[DATA_VERSION_TAG] not in (None, before)
    assert observed_version(watch.instance, LIVE_POOL) == event.tags[DATA_VERSION_TAG]
    assert event.metadata["files"].value == 6


def test_a_file_that_still_grows_starts_the_wait_again(watch):
    change(watch.settings, "half")
    watch.look(5010)
    watch.look(5040)
    change(watch.settings, '{"text": "whole", "group": "a"}\n')

    assert "quiet, in 60 s" in watch.said(5070)


def test_a_hundred_changes_in_ten_seconds_are_one_observation(watch):
    found = []
    for i in range(100):
        change(watch.settings, f'{{"text": "number {i}", "group": "a"}}\n')
        found += watch.look(5000 + i / 10).asset_events
    assert found == []

    found = watch.look_until(5020, 5400)

    assert len(found) == 1
    assert found[0].tags[DATA_VERSION_TAG] == observed_version(watch.instance, LIVE_POOL)


@pytest.mark.parametrize("seconds", [10, 5_000 + 3_600, 5_000 + 365 * 86_400])
def test_the_time_that_a_file_carries_neither_hurries_nor_blocks(watch, seconds):
    """`rsync -t` keeps old times; a foreign clock may run an hour or a year ahead."""
    path = watch.settings.live_path / "math" / "short.jsonl"
    path.write_text('{"text": "odd", "group": "a"}\n')
    os.utime(path, (seconds, seconds))

    assert "quiet" in watch.said(5000)
    assert len(watch.look_until(5030, 5060)) == 1


@pytest.mark.parametrize("jump", [-3_600, -365 * 86_400, 3_600, 365 * 86_400])
def test_a_clock_that_jumps_costs_an_interval_at_most_and_reads_nothing_early(watch, jump):
    change(watch.settings, '{"text": "jump", "group": "a"}\n')
    start = 400 * 86_400
    assert watch.look(start).asset_events == []

    assert watch.look(start + jump + INTERVAL).asset_events == []
    found = watch.look_until(start + jump + 2 * INTERVAL, start + jump + QUIET + INTERVAL)

    assert len(found) == 1


def test_whatever_clock_and_pool_do_no_content_is_lost_and_none_is_told_twice(watch):
    """Random changes, damage to the cursor and clock jumps; then a rest."""
    rng, now, told = random.Random(5), 5_000.0, []
    for step in range(300):
        now = max(now + rng.choice([30, 30, 30, 31, 5, -3_600, 86_400]), 0)
        if rng.random() < 0.3:
            change(watch.settings, f'{{"text": "{rng.randrange(5)}", "group": "a"}}\n')
        if rng.random() < 0.05:
            watch.cursor = rng.choice([None, "", watch.cursor[: step % 40], "[]"])
        told += [event.tags[DATA_VERSION_TAG] for event in watch.look(now).asset_events]
    told += [e.tags[DATA_VERSION_TAG] for e in watch.look_until(now, now + 10 * INTERVAL)]

    assert len(told) > 5
    assert all(a != b for a, b in itertools.pairwise(told))
    assert told[-1] == sensors.pool_fingerprint(watch.settings.live_path)


def test_a_file_of_the_same_size_and_time_but_other_content_is_seen(watch):
    path = watch.settings.live_path / "math" / "short.jsonl"
    before, times = path.read_text(), path.stat()
    other = path.with_name(".short.tmp")
    other.write_text(before.replace("g0", "g9"))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert path.stat().st_size == times.st_size

    assert len(watch.look_until(5000, 5060)) == 1


def test_a_pool_that_changes_while_it_is_read_is_not_told(watch, monkeypatch):
    fingerprint = sensors.pool_fingerprint

    def read_and_change(location):
        found = fingerprint(location)
        change(watch.settings, '{"text": "later", "group": "a"}\n')
        return found

    change(watch.settings, '{"text": "first", "group": "a"}\n')
    watch.look_until(5000, 5030)
    monkeypatch.setattr(sensors, "pool_fingerprint", read_and_change)
    assert "while it was read" in watch.said(5060)
    monkeypatch.setattr(sensors, "pool_fingerprint", fingerprint)

    (event,) = watch.look_until(5090, 5150)

    assert event.tags[DATA_VERSION_TAG] == fingerprint(watch.settings.live_path)


def test_a_file_removed_while_it_is_read_is_a_change_like_any_other(watch, monkeypatch):
    def vanish(location):
        raise FileNotFoundError(location)

    change(watch.settings, '{"text": "first", "group": "a"}\n')
    watch.look_until(5000, 5030)
    monkeypatch.setattr(sensors, "pool_fingerprint", vanish)

    assert "while it was read" in watch.said(5060)


def test_a_file_written_again_with_the_same_content_is_no_event(watch):
    os.utime(watch.settings.live_path / "math" / "short.jsonl", (6000, 6000))
    watch.look_until(6000, 6030)

    result = watch.look(6060)

    assert result.asset_events == []
    assert "same content" in result.skip_reason.skip_message
    assert "as before" in watch.said(6200)


def test_a_change_that_is_taken_back_is_no_event(watch):
    original = (watch.settings.live_path / "math" / "short.jsonl").read_text()
    change(watch.settings, "other")
    watch.look(5001)
    change(watch.settings, original)

    assert watch.look_until(5003, 5100) == []


def test_a_removed_file_is_a_change(watch):
    (watch.settings.live_path / "math" / "short.jsonl").unlink()

    (event,) = watch.look_until(5000, 5060)

    assert event.metadata["files"].value == 5


def test_a_missing_pool_fails_the_tick_with_the_way_out(watch):
    os.rename(watch.settings.live_path, watch.settings.live_path.with_name("gone"))

    with pytest.raises(PoolError, match="is not a folder"):
        watch.look(5000)


@pytest.mark.parametrize(
    "cursor",
    [
        "", "{", "[]", "null", "7", '"x"', '{"version": 2}', '{"version": 2, "seen": 3}',
        '{"version": 2, "seen": [["", [1, 2, 3, 4]]]}', '{"version": 2, "seen": [["", "abcd"]]}',
        '{"version": 2, "seen": [["", ["a", "b", -5, 1e99]]]}',
        '{"version": 1, "seen": [["", ["", "", 99, 0]]]}',
        '{"done": "3cd0f45a4a5d1e6f"}', '{"done": null, "stat": "a", "since": 99999999999}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_or_old_cursor_counts_as_none(watch, cursor):
    """What was observed is still known, so nothing is told twice, and nothing is missed."""
    assert read_cursor(cursor) == {}
    watch.cursor = cursor
    assert watch.look_until(5000, 5060) == []

    watch.cursor = cursor
    change(watch.settings, '{"text": "new", "group": "a"}\n')

    assert len(watch.look_until(6000, 6060)) == 1


def test_the_cursor_stays_small(watch):
    change(watch.settings, "x")
    watch.look(5001)

    assert len(watch.cursor) < 90
    assert json.loads(watch.cursor)["version"] == sensors.CURSOR_VERSION


def test_the_cursor_of_fifty_pools_is_bounded_and_forgets_those_that_left(tmp_path):
    names = [f"{i:02d}-{'long-name' * 6}"[:60] for i in range(50)]
    pools = {"experiment": "experiment", "live": {name: "live" for name in names}}
    path = write_project(tmp_path, pools=pools, automation={"quiet_seconds": QUIET})
    with dg.DagsterInstance.ephemeral() as instance:
        watch = watch_over(path, instance)
        assert len(watch.cursor) < 50 * 125
        pools["live"] = {name: "live" for name in names[:2]}
        watch.settings = load_settings(write_project(tmp_path, pools=pools))

        watch.look(5000)

    assert set(read_cursor(watch.cursor)) == set(names[:2])


def test_a_change_of_one_pool_is_an_observation_of_its_partition_alone(watch_of_two):
    names = ["web-2026w47", "longcot"]
    before = [observed_version(watch_of_two.instance, LIVE_POOL, name) for name in names]
    assert len(set(before)) == 2
    change(watch_of_two.settings, '{"text": "new", "group": "a"}\n', pool="longcot")

    (event,) = watch_of_two.look_until(5000, 5060)

    assert event.partition == "longcot"
    after = [observed_version(watch_of_two.instance, LIVE_POOL, name) for name in names]
    assert after[0] == before[0]
    assert after[1] == event.tags[DATA_VERSION_TAG] != before[1]
    assert observed_version(watch_of_two.instance, LIVE_POOL) is None


def test_each_pool_waits_for_its_own_quiet(watch_of_two):
    for now in range(5000, 5090, INTERVAL):
        change(watch_of_two.settings, f'{{"text": "{now}", "group": "a"}}\n', pool="web-2026w47")
        if now == 5000:
            change(watch_of_two.settings, '{"text": "new", "group": "a"}\n', pool="longcot")
        events = watch_of_two.look(now).asset_events

    assert [event.partition for event in events] == ["longcot"]


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_missing_or_empty_pool_is_named_and_does_not_stop_the_others(watch_of_two, how):
    settings = watch_of_two.settings
    shutil.rmtree(settings.live_location("web-2026w47"))
    if how == "empty":
        settings.live_location("web-2026w47").mkdir()
    change(settings, '{"text": "new", "group": "a"}\n', pool="longcot")
    watch_of_two.look_until(5000, 5030)

    result = watch_of_two.look(5060)

    assert [event.partition for event in result.asset_events] == ["longcot"]
    (problem,) = watch_of_two.problems
    assert "The live pool web-2026w47 can't be read" in problem
    assert problem in result.skip_reason.skip_message


def test_slow_reading_of_one_pool_leaves_the_others_to_the_next_look(watch_of_two, monkeypatch):
    monkeypatch.setattr(sensors, "READ_SECONDS", -1.0)
    change(watch_of_two.settings, '{"text": "new", "group": "a"}\n', pool="longcot")
    assert watch_of_two.look_until(5000, 5060) == []
    assert "at the next look" in watch_of_two.said(5090)
    monkeypatch.undo()

    assert len(watch_of_two.look(5120).asset_events) == 1


def test_the_sensor_adds_partitions_and_names_those_that_left_the_settings(watch_of_two, tmp_path):
    instance = watch_of_two.instance
    assert set(instance.get_dynamic_partitions(PARTITIONS_NAME)) == {"web-2026w47", "longcot"}
    was = observed_version(instance, LIVE_POOL, "web-2026w47")
    pools = {"experiment": "experiment", "live": {"longcot": "cot", "web-2026w48": "live"}}
    watch_of_two.settings = load_settings(write_project(tmp_path, pools=pools))

    result = watch_of_two.look(9000)

    assert sorted(instance.get_dynamic_partitions(PARTITIONS_NAME)) == ["longcot", "web-2026w48"]
    assert "web-2026w47 isn't in pools.live any more" in result.skip_reason.skip_message
    assert observed_version(instance, LIVE_POOL, "web-2026w47") == was  # its history stays


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
