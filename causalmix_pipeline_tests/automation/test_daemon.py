"""A real daemon: a changed pool remakes the live side, trains nothing; equal content, nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.resources.instance import dagster_home, ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_pool

#: The project's definitions, their sensors 15 times as often as the settings allow.
FAST = """
from pathlib import Path
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.settings_file import load_settings
settings = load_settings({config!r})
often = settings.automation.model_copy(update={{"sensor_interval_seconds": 2}})
defs = build_definitions(Path({config!r}), settings.model_copy(update={{"automation": often}}))
"""


def wait_for(what: Callable[[], bool], process: subprocess.Popen, log, seconds: float = 90) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < ends, log.read_text()[-3000:]
        time.sleep(0.5)


def made_since(instance: dg.DagsterInstance, cursor: int) -> list[str]:
    names = [*LIVE_SIDE_NAMES, "proxy_plan", "proxy_runs", "run_table", "cate_model"]
    found = []
    for name in [*names, "validation_runs", "rivals"]:
        records = dg.AssetRecordsFilter(asset_key=dg.AssetKey(name), after_storage_id=cursor)
        found += [name] * len(instance.fetch_materializations(records, limit=20).records)
    return found


@contextmanager
def daemon_of(config: Path) -> Iterator[tuple[dg.DagsterInstance, subprocess.Popen, Path]]:
    """A daemon at work on a project: the instance, the process and its log."""
    root, settings = config.parent, load_settings(config)
    (root / "fast.py").write_text(FAST.format(config=str(config)))
    log = root / "daemon.log"
    environment = os.environ | {
        "DAGSTER_HOME": str(dagster_home(settings.data_path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "dagster._daemon", "run", "-f", str(root / "fast.py")]
    with (
        ensure_instance(settings.data_path) as instance,
        open(log, "w") as sink,
        subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        ) as daemon,
    ):
        try:
            yield instance, daemon, log
        finally:
            os.killpg(daemon.pid, signal.SIGTERM)
            daemon.wait(30)


def proxy_runs_of(config: Path) -> list[Path]:
    return sorted((config.parent / "data" / "run_store" / "runs").rglob("*.json"))


@pytest.mark.timeout(800)
def test_a_daemon_remakes_the_live_side_of_a_changed_pool_and_nothing_of_an_equal_one(finished):
    before = proxy_runs_of(finished)
    with daemon_of(finished) as (instance, daemon, log):
        _story(instance, load_settings(finished), daemon, log)
    assert proxy_runs_of(finished) == before


@pytest.mark.timeout(900)
def test_a_daemon_makes_new_pools_and_then_only_the_one_that_changed(finished):
    """Its sensor makes the partitions; a third pool isn't there, and stops neither."""
    raw = yaml.safe_load(finished.read_text())
    live = {"web-2026w47": "live", "longcot": "cot", "absent": "nowhere"}
    finished.write_text(yaml.safe_dump(raw | {"pools": {"experiment": "experiment", "live": live}}))
    write_pool(finished.parent / "cot", n=26, seed=4)
    before = proxy_runs_of(finished)
    with daemon_of(finished) as (instance, daemon, log):
        _story_of_two(instance, load_settings(finished), daemon, log)
    assert proxy_runs_of(finished) == before
    assert read_value(finished.parent / "data/assets/recommended_mixture/longcot.parquet")


def _story_of_two(instance, settings, daemon, log) -> None:
    pools, last = ("web-2026w47", "longcot"), ("training_export", "report")

    def made() -> list[tuple[str, str]]:
        found = []
        for name in LIVE_SIDE_NAMES:
            records = dg.AssetRecordsFilter(asset_key=dg.AssetKey(name), after_storage_id=cursor)
            page = instance.fetch_materializations(records, limit=50).records
            found += [(name, record.partition_key) for record in page]
        return found

    def is_idle() -> bool:
        return not instance.get_runs_count(dg.RunsFilter(statuses=list(IN_PROGRESS_RUN_STATUSES)))

    cursor = instance.event_log_storage.get_maximum_record_id()
    wanted = {(name, pool) for name in last for pool in pools}
    wait_for(lambda: wanted <= set(made()), daemon, log, 600)
    wait_for(is_idle, daemon, log)
    assert sorted(made()) == sorted((n, pool) for n in LIVE_SIDE_NAMES for pool in pools)
    versions = [observed_version(instance, LIVE_POOL, pool) for pool in pools]

    n_runs, cursor = instance.get_runs_count(), instance.event_log_storage.get_maximum_record_id()
    path = settings.live_location("longcot") / "math" / "short.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-8]) + "\n")
    wait_for(lambda: {(n, "longcot") for n in last} <= set(made()), daemon, log, 420)
    wait_for(is_idle, daemon, log)

    assert sorted(made()) == sorted((name, "longcot") for name in LIVE_SIDE_NAMES)  # each once
    assert observed_version(instance, LIVE_POOL, "web-2026w47") == versions[0]
    assert observed_version(instance, LIVE_POOL, "longcot") != versions[1]
    runs = instance.get_runs(limit=instance.get_runs_count() - n_runs)
    assert {run.tags["dagster/partition"] for run in runs} == {"longcot"}
    assert all(run.status == dg.DagsterRunStatus.SUCCESS for run in runs)


def _story(instance, settings, daemon, log) -> None:
    n_runs = instance.get_runs_count()
    cursor = instance.event_log_storage.get_maximum_record_id()
    first = observed_version(instance, LIVE_POOL)

    def ticks() -> int:
        states = [s for s in instance.all_instigator_state() if s.name == "live_pool_sensor"]
        found = [
            instance.get_ticks(s.instigator_origin_id, s.selector_id, limit=50) for s in states
        ]
        return sum(map(len, found))

    wait_for(lambda: ticks() >= 2, daemon, log)
    path = settings.live_path / "math" / "short.jsonl"
    text = path.read_text()
    path.write_text(text)  # the same content, another time
    before = ticks()
    wait_for(lambda: ticks() >= before + 4, daemon, log)
    assert instance.get_runs_count() == n_runs
    assert observed_version(instance, LIVE_POOL) == first

    path.write_text("\n".join(text.splitlines()[:-8]) + "\n")
    wanted = {"training_export", "report"}
    wait_for(lambda: wanted <= set(made_since(instance, cursor)), daemon, log, 420)
    assert observed_version(instance, LIVE_POOL) != first
    assert sorted(made_since(instance, cursor)) == sorted(LIVE_SIDE_NAMES)  # each once
    wait_for(
        lambda: not instance.get_runs_count(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])),
        daemon,
        log,
    )
    steps = {
        step.step_key
        for run in instance.get_runs(limit=instance.get_runs_count() - n_runs)
        for step in instance.get_run_step_stats(run.run_id)
    }
    assert not [step for step in steps if "proxy" in step]
