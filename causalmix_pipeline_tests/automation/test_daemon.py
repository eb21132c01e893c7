"""A real daemon: a changed pool remakes the live side, trains nothing; equal content, nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import dagster as dg
import pytest

from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.resources.instance import dagster_home, ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings_file import load_settings

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
    for name in [*names, "validation_runs"]:
        records = dg.AssetRecordsFilter(asset_key=dg.AssetKey(name), after_storage_id=cursor)
        found += [name] * len(instance.fetch_materializations(records, limit=20).records)
    return found


@pytest.mark.timeout(800)
def test_a_daemon_remakes_the_live_side_of_a_changed_pool_and_nothing_of_an_equal_one(finished):
    root, settings = finished.parent, load_settings(finished)
    (root / "fast.py").write_text(FAST.format(config=str(finished)))
    log = root / "daemon.log"
    environment = os.environ | {
        "DAGSTER_HOME": str(dagster_home(settings.data_path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "dagster._daemon", "run", "-f", str(root / "fast.py")]
    runs_before = sorted((settings.data_path / "run_store" / "runs").rglob("*.json"))
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
            _story(instance, settings, daemon, log)
        finally:
            os.killpg(daemon.pid, signal.SIGTERM)
            daemon.wait(30)
    assert sorted((settings.data_path / "run_store" / "runs").rglob("*.json")) == runs_before


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
