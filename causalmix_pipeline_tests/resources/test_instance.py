"""Dagster's home, and runs whose process is gone."""

import os
import signal
import subprocess
import sys
import time

import dagster as dg
import pytest
import yaml

from causalmix_pipeline.resources.instance import (
    PROCESS_TAG,
    close_dead_runs,
    ensure_home,
    ensure_instance,
    is_process_alive,
    process_tag,
)


def test_the_home_is_made_once_and_an_edited_file_is_kept(tmp_path):
    home = ensure_home(tmp_path / "data")
    config = yaml.safe_load((home / "dagster.yaml").read_text())
    assert config["telemetry"]["enabled"] is False
    assert config["run_monitoring"]["free_slots_after_run_end_seconds"] > 0
    assert config["run_monitoring"]["max_runtime_seconds"] > 0

    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")

    ensure_home(tmp_path / "data")
    assert (home / "dagster.yaml").read_text() == "telemetry:\n  enabled: false\n"


def test_the_instance_follows_the_template(tmp_path):
    with ensure_instance(tmp_path) as instance:
        assert instance.run_monitoring_enabled
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 1
        assert instance.is_persistent


def test_a_process_is_told_from_a_later_one_with_the_same_id():
    mine = process_tag()

    assert is_process_alive(mine)
    assert not is_process_alive(mine[:-1] + ("1" if mine[-1] != "1" else "2"))
    assert is_process_alive("another-host:1:1")


def test_a_process_that_ended_is_not_alive():
    ended = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    tag = process_tag(ended.pid)
    assert is_process_alive(tag)

    ended.kill()
    ended.wait()

    assert not is_process_alive(tag)


KILLED = """
import sys, time
from pathlib import Path
import dagster as dg
from causalmix_pipeline.resources.instance import PROCESS_TAG, ensure_instance, process_tag

@dg.asset(pool="proxy_training")
def slow():
    Path(sys.argv[1], "started").touch()
    time.sleep(600)

if __name__ == "__main__":
    with ensure_instance(Path(sys.argv[1])) as instance:
        dg.materialize([slow], instance=instance, tags={PROCESS_TAG: process_tag()})
"""


@dg.asset(pool="proxy_training")
def quick() -> None:
    """Needs the slot that a killed run may still hold."""


def claimed(instance: dg.DagsterInstance) -> int:
    info = instance.event_log_storage.get_concurrency_info("proxy_training")
    return len(info.claimed_slots)


def test_a_killed_run_is_closed_and_its_slot_is_free_again(tmp_path):
    """Without it the next run waits for the slot for ever."""
    (tmp_path / "killed.py").write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "killed.py"), str(tmp_path)],
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.1)
    with ensure_instance(tmp_path) as instance:
        assert close_dead_runs(instance) == []  # it still runs
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        run = instance.get_runs()[0]
        assert run.status == dg.DagsterRunStatus.STARTED
        assert claimed(instance) == 1

        assert close_dead_runs(instance) == [run.run_id]

        closed = instance.get_run_by_id(run.run_id)
        assert closed is not None
        assert closed.status == dg.DagsterRunStatus.FAILURE
        assert claimed(instance) == 0
        assert close_dead_runs(instance) == []
        assert dg.materialize([quick], instance=instance).success


def test_a_run_of_the_daemon_is_left_to_its_monitor(tmp_path):
    """It carries no process tag: its worker may be on another machine."""
    with ensure_instance(tmp_path) as instance:
        job = dg.define_asset_job("job", selection=[quick])
        defs = dg.Definitions([quick], jobs=[job])
        run = instance.create_run_for_job(
            defs.resolve_job_def("job"), status=dg.DagsterRunStatus.STARTED
        )
        assert PROCESS_TAG not in run.tags

        assert close_dead_runs(instance) == []


@pytest.mark.skipif(not os.path.exists("/proc/1/stat"), reason="needs /proc")
def test_a_process_of_another_user_is_alive():
    assert is_process_alive(process_tag(1))
