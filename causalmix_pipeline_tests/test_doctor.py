"""Each fault that the doctor knows: planted, found, mended, gone; and nothing else is touched."""

import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._daemon.types import DaemonHeartbeat

from causalmix_pipeline import doctor
from causalmix_pipeline.adapters.sealed_frames import write_value
from causalmix_pipeline.automation.staleness import CODE_VERSION_TAG
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.doctor_files import check_leftovers, check_values
from causalmix_pipeline.doctor_instance import check_instance
from causalmix_pipeline.resources import home_config
from causalmix_pipeline.resources.instance import PROCESS_TAG, ensure_instance, process_tag
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline.workspace import hold_project
from causalmix_pipeline_tests.test_cli import call

DAY = 86_400

#: Where jobs and sensors that are planted come from.
ORIGIN = RemoteRepositoryOrigin(
    ManagedGrpcPythonEnvCodeLocationOrigin(LoadableTargetOrigin(python_file="x.py"), "x"),
    "__repository__",
)


@pytest.fixture
def sleeper():
    """A process that does nothing and lives."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def gone_pid() -> int:
    """The id of a process that ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.fixture
def data(project_file) -> Path:
    """The data folder of a project whose instance was made."""
    folder = load_settings(project_file).data_path
    with ensure_instance(folder):
        return folder


def looked(config: Path, what: str, *, mend: bool = False) -> list[doctor.Finding]:
    """Findings of one kind, the only one that is mended."""
    settings, found = load_settings(config), []
    with ExitStack() as stack:
        if what == "leftovers":
            findings = check_leftovers(settings)
        elif what.startswith("stored"):
            findings = check_values(settings)
        else:
            findings = check_instance(config, settings, stack)
        for one in findings:
            if one.what == what:
                found.append(doctor.mended(one) if mend and one.mend else one)
            elif found:  # the slow checks are the last
                break
    return found


def is_mended(config: Path, what: str, *, gone: bool = False) -> str:
    """Find a fault, mend it, see it ok or `gone`; what was said of the mending."""
    (found,) = looked(config, what)
    assert found.level in ("warning", "wrong"), found
    (done,) = looked(config, what, mend=True)
    assert done.level == "mended", done
    left = looked(config, what)
    assert left == [] if gone else all(one.level == "ok" for one in left)
    return done.detail


@dg.op
def nothing() -> None:
    """Do nothing."""


@dg.job
def some_job() -> None:
    """A job for runs that are planted."""
    nothing()


def plant_run(data: Path, status: dg.DagsterRunStatus, tags: dict | None = None, slot=False) -> str:
    """A run of a state, which perhaps holds the training slot."""
    with ensure_instance(data) as instance:
        run = instance.create_run_for_job(
            some_job,
            status=status,
            tags=tags,
            remote_job_origin=RemoteJobOrigin(ORIGIN, "some_job"),
        )
        if slot:
            instance.event_log_storage.set_concurrency_slots("proxy_training", 1)
            instance.event_log_storage.claim_concurrency_slot(
                "proxy_training", run.run_id, "nothing"
            )
        return run.run_id


def status_of(data: Path, run_id: str) -> dg.DagsterRunStatus:
    with ensure_instance(data) as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None
        return run.status


def n_claimed(data: Path) -> int:
    with ensure_instance(data) as instance:
        return len(instance.event_log_storage.get_concurrency_info("proxy_training").claimed_slots)


def age(path: Path, seconds: float) -> Path:
    """Make a file, or what is in a folder, older."""
    then = time.time() - seconds
    for place in (*path.rglob("*"), path):
        os.utime(place, (then, then))
    return path


def test_a_dead_run_is_closed_and_one_whose_process_lives_isnt(project_file, data, sleeper):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    dead = {PROCESS_TAG: process_tag(process.pid)}
    process.kill()
    process.wait()
    closed = plant_run(data, dg.DagsterRunStatus.STARTED, dead, slot=True)
    kept = plant_run(data, dg.DagsterRunStatus.STARTED, {PROCESS_TAG: process_tag(sleeper.pid)})

    assert closed[:8] in is_mended(project_file, "dead runs")

    assert status_of(data, closed) == dg.DagsterRunStatus.FAILURE
    assert status_of(data, kept) == dg.DagsterRunStatus.STARTED
    assert n_claimed(data) == 0


def test_a_slot_of_an_ended_run_is_freed(project_file, data):
    run_id = plant_run(data, dg.DagsterRunStatus.SUCCESS, slot=True)
    assert n_claimed(data) == 1

    assert run_id[:8] in is_mended(project_file, "slots")

    assert n_claimed(data) == 0


def test_a_slot_of_a_run_that_goes_on_is_left(project_file, data, sleeper):
    tags = {PROCESS_TAG: process_tag(sleeper.pid)}
    plant_run(data, dg.DagsterRunStatus.STARTED, tags, slot=True)

    assert [found.level for found in looked(project_file, "slots", mend=True)] == ["ok"]
    assert n_claimed(data) == 1


def make_idle(data: Path, run_id: str, seconds: float) -> None:
    with sqlite3.connect(data / "dagster_home" / "history" / "runs.db") as database:
        then = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - seconds))
        database.execute(
            "UPDATE runs SET update_timestamp = ? WHERE run_id = ?", (f"{then}.000000", run_id)
        )
    database.close()


def test_a_run_that_never_began_is_closed_where_no_daemon_is(project_file, data, sleeper):
    stuck = plant_run(data, dg.DagsterRunStatus.STARTING)
    young = plant_run(data, dg.DagsterRunStatus.STARTING)
    alive = plant_run(data, dg.DagsterRunStatus.STARTING, {PROCESS_TAG: process_tag(sleeper.pid)})
    queued = plant_run(data, dg.DagsterRunStatus.QUEUED)
    for run_id in (stuck, alive, queued):
        make_idle(data, run_id, 3600)

    assert stuck[:8] in is_mended(project_file, "stuck runs")
    (waiting,) = looked(project_file, "waiting runs")

    assert status_of(data, stuck) == dg.DagsterRunStatus.FAILURE
    assert status_of(data, young) == status_of(data, alive) == dg.DagsterRunStatus.STARTING
    assert status_of(data, queued) == dg.DagsterRunStatus.QUEUED
    assert queued[:8] in waiting.detail and "causalmix ui" in waiting.detail


def plant_beat(data: Path, ago: float) -> None:
    with ensure_instance(data) as instance:
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - ago, "SENSOR", "1", None))


def test_a_daemon_that_lives_looks_after_waiting_runs_itself(project_file, data):
    make_idle(data, plant_run(data, dg.DagsterRunStatus.STARTING), 3600)
    plant_beat(data, ago=1)

    assert looked(project_file, "stuck runs", mend=True) == []
    assert looked(project_file, "daemon") == [doctor.Finding("daemon", "ok", "running")]


def test_a_daemon_that_stopped_is_told_and_one_that_never_ran_is_no_fault(project_file, data):
    assert looked(project_file, "daemon")[0].level == "ok"

    plant_beat(data, ago=3 * 3600)

    (found,) = looked(project_file, "daemon")
    assert found.level == "warning"
    assert "not running since 3 hours" in found.detail and "causalmix ui" in found.detail


def test_a_sensor_that_was_switched_off_is_named(project_file, data):
    with ensure_instance(data) as instance:
        for name in ("live_pool_sensor", "one_that_went"):
            instance.add_instigator_state(
                InstigatorState(
                    RemoteInstigatorOrigin(ORIGIN, name),
                    InstigatorType.SENSOR,
                    InstigatorStatus.STOPPED,
                )
            )

    (found,) = looked(project_file, "sensors")

    assert found.level == "warning" and found.mend is None
    assert found.detail.startswith("live_pool_sensor are switched off")


def leftovers(data: Path, pid: int) -> list[Path]:
    """What writers of a process leave, in all ways, written to just now."""
    names = [
        f"assets/.report.parquet.{pid}.tmp",
        f"run_store/runs/ab/.abc.json.{pid}.writing",
        f"run_store/tokens/.0a1b.{pid}.building/tokens.bin",
        f"dagster_home/.dagster.yaml.{pid}.writing",
    ]
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("x" * 1000)
    return [data / n.removesuffix("/tokens.bin") for n in names]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    project_file, data, gone_pid, sleeper
):
    left = [age(path, 3600) for path in leftovers(data, gone_pid)]
    written_to_now = leftovers(data, gone_pid + 10**7)
    living = [age(path, 3600) for path in leftovers(data, sleeper.pid)]

    told = is_mended(project_file, "leftovers")

    assert told.startswith(f"Removed {len(left)}: ")
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in (*written_to_now, *living))


def test_what_names_no_process_is_left_over_after_a_day(project_file, data):
    names = ["run_store/scratch/k/.step-00000020.building", "run_store/tokens/.0a1b.fetching",
             "scorers/.fetch-x1y2", ".demo-abcdefgh", ".demo-abcdefgh-old"]  # fmt: skip
    for name in names:
        (data / name / "inside").mkdir(parents=True)
        age(data / name, 2 * DAY)
    young = data / "scorers" / ".fetch-young"
    young.mkdir()
    half = data / "scorers" / ".fetch-half"
    (half / "inside").mkdir(parents=True)
    os.utime(half, (0, 0))

    assert is_mended(project_file, "leftovers").startswith(f"Removed {len(names)}: ")

    assert young.exists() and half.exists()


def test_texts_of_a_killed_profile_go_unless_a_profile_is_at_work(project_file, data):
    import fcntl

    spool = data / "scratch" / "profile-abc"
    spool.mkdir(parents=True)
    (data / "scores").mkdir()
    with open(data / "scores" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [f.level for f in looked(project_file, "leftovers", mend=True)] == ["ok"]
        assert spool.exists()

    is_mended(project_file, "leftovers")

    assert not spool.exists()


def test_a_persons_files_are_never_leftovers(project_file, data, gone_pid):
    """A pool may lie below data_dir, and what is copied into it may have such a name."""
    names = [f"pool/math/.x.jsonl.{gone_pid}.tmp", "assets/my.tmp", "assets/.hidden"]
    mine = [data / name for name in (*names, "run_store/scratch/key/step-1")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        age(path, 9 * DAY)

    assert [f.level for f in looked(project_file, "leftovers", mend=True)] == ["ok"]
    assert all(path.exists() for path in mine)


def test_output_of_deleted_runs_goes_and_that_of_others_stays(project_file, data):
    kept = plant_run(data, dg.DagsterRunStatus.SUCCESS)
    storage = data / "dagster_home" / "storage"
    deleted = "0" * 8 + "-0000" * 3 + "-" + "0" * 12
    for run_id in (kept, deleted):
        (storage / run_id / "compute_logs").mkdir(parents=True)
        (storage / run_id / "compute_logs" / "x.err").write_text("text")

    (found,) = looked(project_file, "runs' output")
    assert "1 folders" in found.detail
    (done,) = looked(project_file, "runs' output", mend=True)

    assert done.level == "mended"
    assert (storage / kept).exists() and not (storage / deleted).exists()
    assert looked(project_file, "runs' output") == []


def test_log_and_output_of_runs_of_long_ago_go_once_they_take_room(project_file, data):
    home = data / "dagster_home"
    old, young, going = (
        plant_run(data, status)
        for status in (
            dg.DagsterRunStatus.SUCCESS,
            dg.DagsterRunStatus.FAILURE,
            dg.DagsterRunStatus.STARTED,
        )
    )
    places = []
    for run_id in (old, young, going):
        logs = [home / "history" / "runs" / f"{run_id}.db", home / "storage" / run_id / "x.err"]
        for path in logs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, 30_000_000)  # takes no room on the disk
        places.append(logs)
    for run_id in (old, going):
        make_idle(data, run_id, 100 * DAY)

    assert "60 MB" in is_mended(project_file, "old runs", gone=True)

    assert not any(path.exists() for path in places[0])
    assert all(path.exists() for logs in places[1:] for path in logs)
    assert status_of(data, old) == dg.DagsterRunStatus.SUCCESS


def test_a_damaged_value_is_named_with_the_way_out_and_left(project_file, data):
    path = data / "assets" / "run_table.parquet"
    write_value(path, pl.DataFrame({"x": list(range(1000))}))
    assert looked(project_file, "stored values")[0].detail == "1 as they were written"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    (found,) = looked(project_file, "stored value", mend=True)

    assert found.level == "wrong"
    assert str(path) in found.detail and "materialise the asset run_table again" in found.detail
    assert path.read_bytes() == bytes(content)


def test_values_of_older_code_are_named(project_file, data):
    with ensure_instance(data) as instance:
        instance.report_runless_asset_event(
            dg.AssetMaterialization("live_covariates", tags={CODE_VERSION_TAG: "0-older"})
        )

    (found,) = looked(project_file, "values")

    assert found.level == "warning"
    assert "live_covariates" in found.detail


def test_tables_of_an_earlier_dagster_are_migrated_but_not_under_a_daemon(project_file, data):
    path = data / "dagster_home" / "schedules" / "schedules.db"
    from alembic.script import ScriptDirectory
    from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage
    from dagster._core.storage.sql import get_alembic_config

    config = get_alembic_config(sqlite_schedule_storage.__file__)
    script = ScriptDirectory.from_config(config)
    head = script.get_revision("head")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (head.down_revision,))
    database.close()
    plant_beat(data, ago=1)

    (refused,) = looked(project_file, "database", mend=True)
    assert refused.level == "wrong" and "stop it first" in refused.detail
    plant_beat(data, ago=3600)

    is_mended(project_file, "database")


def test_a_database_that_cant_be_read_is_told(project_file, data):
    (data / "dagster_home" / "history" / "runs.db").write_bytes(b"no database" * 1000)

    (found,) = looked(project_file, "instance")

    assert found.level == "wrong" and "not a database" in found.detail


def test_an_unedited_template_of_an_earlier_version_is_replaced(project_file, data, monkeypatch):
    earlier = "telemetry:\n  enabled: false\n"
    path = data / "dagster_home" / "dagster.yaml"
    path.write_text(earlier)
    (edited,) = looked(project_file, "dagster.yaml", mend=True)
    assert edited.level == "ok" and "edited by hand" in edited.detail
    assert path.read_text() == earlier

    digest = hashlib.sha256(earlier.encode()).hexdigest()
    monkeypatch.setattr(home_config, "EARLIER_TEMPLATES", {digest})
    is_mended(project_file, "dagster.yaml")

    assert path.read_text() == home_config.template()


def test_an_edited_file_for_another_storage_is_wrong_and_kept(project_file, data):
    path = data / "dagster_home" / "dagster.yaml"
    path.write_text("telemetry: {enabled: false}\nstorage: {postgres: {postgres_url: {env: X}}}\n")

    (found,) = looked(project_file, "dagster.yaml", mend=True)

    assert found.level == "wrong" and "take the storage section off" in found.detail
    assert "storage" in path.read_text()


def test_packages_outside_their_declared_ranges_are_named(tmp_path, monkeypatch):
    info = tmp_path / "made_up-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: made_up\nVersion: 1.0\nProvides-Extra: ui\n"
        "Requires-Dist: numpy>=999\nRequires-Dist: never-made\nRequires-Dist: polars>=1\n"
        "Requires-Dist: rich<1; extra == 'ui'\nRequires-Dist: never-made-too; extra == 'ui'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    found = doctor.check_ranges("made_up")

    assert found.level == "wrong"
    for told in ("isn't >=999", "never-made isn't installed", "isn't <1"):
        assert told in found.detail
    assert "polars" not in found.detail and "too" not in found.detail


def test_versions_other_than_the_tested_ones_are_named(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"# pins\nnumpy==0.1\nnever-made==1.0\npolars=={pl.__version__}\n")

    (found,) = doctor.check_constraints(pins)

    assert found.level == "warning"
    assert "instead of 0.1" in found.detail and "polars" not in found.detail


def test_the_declared_packages_are_installed_here():
    assert doctor.check_ranges().level == "ok"


def test_a_full_disk_is_wrong(tmp_path):
    """A disk of 1 MB; needs the right to mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        found = doctor.check_disk(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

    assert found.level == "wrong" and "make room" in found.detail


def content_of(root: Path) -> dict[str, tuple]:
    """Content and time of every file; what SQLite writes while a file is open apart."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith(("-wal", "-shm", "-journal"))
    }


def test_without_mend_nothing_is_changed(project_file, data, gone_pid):
    plant_run(data, dg.DagsterRunStatus.SUCCESS, slot=True)
    make_idle(data, plant_run(data, dg.DagsterRunStatus.STARTING), 3600)
    for path in leftovers(data, gone_pid):
        age(path, 3600)
    before = content_of(project_file.parent)

    findings = doctor.examine(project_file)

    assert {"slots", "stuck runs", "leftovers"} <= {f.what for f in findings if f.mend}
    assert content_of(project_file.parent) == before


def test_without_an_instance_none_is_made(project_file):
    before = content_of(project_file.parent)

    assert looked(project_file, "instance")[0].detail.startswith("not made yet")
    assert content_of(project_file.parent) == before


def test_mending_waits_for_no_other_command(project_file, data):
    """Another process holds the project; a lock of this one wouldn't stop it."""
    code = (
        "import sys, time; from pathlib import Path; "
        "from causalmix_pipeline.workspace import hold_project\n"
        "with hold_project(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(data)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            with pytest.raises(ConfigError, match="another causalmix command"):
                doctor.examine(project_file, mend=True)
            assert doctor.examine(project_file)
        finally:
            process.kill()
    with hold_project(data):
        pass


def test_the_command_mends_and_says_so(project_file, data, gone_pid):
    for path in leftovers(data, gone_pid):
        age(path, 3600)

    status, text = call("doctor", "--config", str(project_file))
    assert status == 0 and "--mend removes" in " ".join(text.split())
    status, text = call("doctor", "--mend", "--config", str(project_file))

    assert status == 0
    assert "leftovers mended Removed 4:" in " ".join(text.split())


def test_a_device_that_is_not_there_is_named(tmp_path):
    from causalmix_pipeline.resources.project import visible_gpus
    from causalmix_pipeline_tests.conftest import write_project

    on_cpu = {f.what: f for f in doctor.examine(write_project(tmp_path))}
    on_gpu = {
        f.what: f for f in doctor.examine(write_project(tmp_path, backend={"device": "cuda"}))
    }

    assert (on_cpu["device"].level, on_cpu["device"].detail[:3]) == ("ok", "cpu")
    if visible_gpus():
        assert on_gpu["device"].level == "ok"
    else:
        assert on_gpu["device"].level == "wrong"
        assert "backend.device must be cpu or auto" in on_gpu["device"].detail
