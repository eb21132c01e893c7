"""Dagster's instance: its file and database, dead runs, taken slots, the daemon, older values."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
from dagster._core.scheduler.instigation import InstigatorState
from dagster._core.storage.dagster_run import RunRecord
from sqlalchemy.exc import SQLAlchemyError

from causalmix_pipeline.automation.staleness import CODE_VERSION_TAG
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.doctor_files import size_of
from causalmix_pipeline.findings import Finding
from causalmix_pipeline.resources.home_config import is_ours, next_config
from causalmix_pipeline.resources.instance import (
    PROCESS_TAG,
    close_dead_runs,
    dagster_home,
    dead_runs,
    ensure_home,
    is_process_alive,
)
from causalmix_pipeline.resources.postgres import require_postgres
from causalmix_pipeline.resources.settings import Settings

#: Seconds since a daemon's last sign of life after which it isn't running; it gives one each 30 s.
DAEMON_SECONDS = 150

#: Seconds after which a run that waits, starts or ends without a daemon never will.
WAITING_SECONDS = 900

#: Days that log and output of a run are kept, and megabytes below which older ones don't matter. A
#: whole refresh writes about 1 MB.
KEPT_DAYS, OLD_MEGABYTES = 90, 50

_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_FINISHED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]

_UNBEGUN = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.CANCELING,
]


def check_instance(config: Path, settings: Settings, stack: ExitStack) -> Iterator[Finding]:
    """All checks of the instance; `stack` keeps it open until findings are mended."""
    home = dagster_home(settings.data_path)
    if not (home / "dagster.yaml").exists():
        yield Finding("instance", "ok", "not made yet; the first command makes it")
        return
    found = check_home_config(settings, home)
    yield found
    if found.level != "ok" and found.mend is None:
        return
    try:
        if settings.instance.storage == "postgres":
            require_postgres(settings.instance)
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(home)))
        yield check_schema(instance)
        yield from check_opened(instance, home)
    except (dg.DagsterError, ConfigError, SQLAlchemyError) as error:
        yield Finding("instance", "wrong", str(error).strip().splitlines()[0])
        return
    yield from check_definitions(config, settings, instance)


def check_opened(instance: dg.DagsterInstance, home: Path) -> Iterator[Finding]:
    """All checks of what the database holds."""
    yield check_size(instance, home)
    yield from check_daemon(instance)
    yield check_dead_runs(instance)
    yield from check_waiting_runs(instance)
    yield check_slots(instance)
    yield from check_compute_logs(instance, home)
    yield from check_old_runs(instance, home)


def check_home_config(settings: Settings, home: Path) -> Finding:
    """`dagster.yaml` against the settings and the shipped template."""
    path = home / "dagster.yaml"
    there = path.read_text(encoding="utf-8")
    try:
        wanted = next_config(there, settings.instance, path)
    except ConfigError as error:
        return Finding("dagster.yaml", "wrong", str(error))
    if wanted == there:
        state = "as shipped" if is_ours(there) else "edited by hand, so it's kept as it is"
        return Finding("dagster.yaml", "ok", f"{state}; {settings.instance.storage}")

    def mend() -> str:
        ensure_home(settings.data_path, settings.instance)
        return f"Wrote {path} as shipped, for {settings.instance.storage}."

    detail = "of an earlier version or for another storage, and unedited; --mend replaces it"
    return Finding("dagster.yaml", "warning", detail, mend)


def is_daemon_alive(instance: dg.DagsterInstance) -> bool:
    """Tell whether a daemon gave a sign of life just now."""
    return time.time() - _last_sign(instance) < DAEMON_SECONDS


def _last_sign(instance: dg.DagsterInstance) -> float:
    beats = instance.get_daemon_heartbeats().values()
    return max((beat.timestamp for beat in beats), default=0.0)


def check_schema(instance: dg.DagsterInstance) -> Finding:
    """The database's tables against what the installed Dagster wants."""
    storages = (instance.run_storage, instance.event_log_storage, instance.schedule_storage)
    versions = [storage.alembic_version() for storage in storages if storage is not None]
    if all(found == wanted for found, wanted in filter(None, versions)):
        return Finding("database", "ok", "its tables are those of the installed Dagster")

    def mend() -> str:
        from alembic.util.exc import CommandError

        if is_daemon_alive(instance):
            raise ConfigError("a daemon works on the database: stop it first.")
        try:
            instance.upgrade()
        except CommandError as error:
            raise ConfigError(
                f"its tables are of a newer Dagster ({error}): install that version again."
            ) from error
        return "Migrated the tables to those of the installed Dagster."

    detail = "its tables are of another Dagster; --mend migrates them, so back them up first"
    return Finding("database", "wrong", detail, mend)


def check_size(instance: dg.DagsterInstance, home: Path) -> Finding:
    """How much Dagster keeps."""
    logs = size_of(home / "storage") / 1e6
    files = size_of(home) / 1e6 - logs
    runs = instance.get_runs_count()
    return Finding(
        "instance", "ok", f"{runs} runs, {files:.1f} MB of files, {logs:.1f} MB of runs' output"
    )


def check_daemon(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Whether a daemon runs, and what it complains of."""
    beats, silent = instance.get_daemon_heartbeats(), time.time() - _last_sign(instance)
    if not beats:
        yield Finding("daemon", "ok", "never started here; causalmix ui starts it")
        return
    if silent >= DAEMON_SECONDS:
        ago = f"{silent / 60:.0f} minutes" if silent < 7200 else f"{silent / 3600:.0f} hours"
        yield Finding(
            "daemon",
            "warning",
            f"not running since {ago}, so no sensor looks at anything: causalmix ui starts it",
        )
        return
    errors = [(beat.daemon_type, error) for beat in beats.values() for error in beat.errors or ()]
    for kind, error in errors:
        message = error.message.strip().splitlines()[0][:300]
        yield Finding("daemon", "warning", f"{kind.lower()}: {message}")
    if not errors:
        yield Finding("daemon", "ok", "running")


def check_dead_runs(instance: dg.DagsterInstance) -> Finding:
    """Open runs whose process is gone."""
    dead = dead_runs(instance)
    if not dead:
        return Finding("dead runs", "ok", "the process of every open run is there")
    names = ", ".join(run.run_id[:8] for run, _ in dead)

    def mend() -> str:
        closed = close_dead_runs(instance)
        return f"Closed {len(closed)} whose process is gone, and freed their slots: {names}."

    return Finding("dead runs", "wrong", f"the process of {names} is gone; --mend closes", mend)


def check_waiting_runs(instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Runs that wait for a daemon that isn't there; with one, its monitor looks after them."""
    if is_daemon_alive(instance):
        return
    queued = _idle(instance, [dg.DagsterRunStatus.QUEUED])
    if queued:
        detail = f"{_names(queued)} are queued and no daemon runs: causalmix ui starts them"
        yield Finding("waiting runs", "warning", detail)
    stuck = _idle(instance, _UNBEGUN)
    if not stuck:
        return

    def mend() -> str:
        for record in stuck:
            run = instance.get_run_by_id(record.dagster_run.run_id)
            if run is not None and run.status in _UNBEGUN:
                instance.report_run_failed(run, "It neither began nor ended, and no daemon runs.")
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        return f"Closed {_names(stuck)}, which neither began nor ended."

    detail = f"{_names(stuck)} neither begin nor end, and no daemon runs; --mend closes them"
    yield Finding("stuck runs", "warning", detail, mend)


def _idle(instance: dg.DagsterInstance, statuses: list[dg.DagsterRunStatus]) -> list[RunRecord]:
    """Runs that didn't move for long; none whose process lives."""
    records = instance.get_run_records(dg.RunsFilter(statuses=statuses))
    before = time.time() - WAITING_SECONDS
    dead = {run.run_id for run, _ in dead_runs(instance)}
    return [
        record
        for record in records
        if record.update_timestamp.timestamp() < before
        and record.dagster_run.run_id not in dead
        and not _lives(record.dagster_run)
    ]


def _lives(run: dg.DagsterRun) -> bool:
    tag = run.tags.get(PROCESS_TAG)
    return tag is not None and is_process_alive(tag)


def _names(records: list[RunRecord]) -> str:
    return ", ".join(record.dagster_run.run_id[:8] for record in records)


def check_slots(instance: dg.DagsterInstance) -> Finding:
    """Concurrency slots that ended or deleted runs still hold, or wait for."""
    storage, holders = instance.event_log_storage, set()
    for key in storage.get_concurrency_keys():
        info = storage.get_concurrency_info(key)
        holders |= {slot.run_id for slot in info.claimed_slots}
        holders |= {step.run_id for step in info.pending_steps}
    runs = {name: instance.get_run_by_id(name) for name in holders}
    ended = sorted(name for name, run in runs.items() if run is None or run.is_finished)
    if not ended:
        return Finding("slots", "ok", "every slot that is taken is of a run that goes on")
    names = ", ".join(name[:8] for name in ended)

    def mend() -> str:
        for name in ended:
            storage.free_concurrency_slots_for_run(name)
        return f"Freed the slots of {names}."

    return Finding("slots", "wrong", f"{names} ended and still hold slots; --mend frees them", mend)


def check_compute_logs(instance: dg.DagsterInstance, home: Path) -> Iterator[Finding]:
    """Output of runs that were deleted."""
    folders = [
        folder
        for folder in (home / "storage").glob("*")
        if _RUN_ID.fullmatch(folder.name) and [p.name for p in folder.iterdir()] == ["compute_logs"]
    ]
    kept = home / "history" / "runs"  # of before the runs went to PostgreSQL
    left = [
        folder
        for folder in folders
        if not instance.has_run(folder.name) and not (kept / f"{folder.name}.db").exists()
    ]
    if not left:
        return

    def mend() -> str:
        for folder in left:
            if not instance.has_run(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        return f"Removed the output of {len(left)} deleted runs."

    size = sum(map(size_of, left)) / 1e6
    detail = f"{len(left)} folders ({size:.1f} MB) of deleted runs; --mend removes them"
    yield Finding("runs' output", "warning", detail, mend)


def check_old_runs(instance: dg.DagsterInstance, home: Path) -> Iterator[Finding]:
    """Log and output of runs that ended long ago; the history of assets is elsewhere and stays.

    On a PostgreSQL server the log is in a table, which is left to whoever looks after the server.
    """
    before = datetime.now(UTC) - timedelta(days=KEPT_DAYS)
    ended = dg.RunsFilter(statuses=_FINISHED, updated_before=before)
    files = [
        path
        for record in instance.get_run_records(ended)
        for path in (
            home / "history" / "runs" / f"{record.dagster_run.run_id}.db",
            home / "storage" / record.dagster_run.run_id,
        )
        if path.exists()
    ]
    size = sum(map(size_of, files)) / 1e6
    if size < OLD_MEGABYTES:
        return

    def mend() -> str:
        for path in files:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return f"Removed log and output of runs that ended {KEPT_DAYS} days ago: {size:.0f} MB."

    detail = (
        f"{size:.0f} MB of log and output of runs that ended {KEPT_DAYS} days ago; --mend removes "
        "them, and leaves runs and the history of assets"
    )
    yield Finding("old runs", "warning", detail, mend)


def check_definitions(
    config: Path, settings: Settings, instance: dg.DagsterInstance
) -> Iterator[Finding]:
    """Sensors that are switched off, and values of older code or other settings."""
    from causalmix_pipeline.definitions import build_definitions

    defs = build_definitions(config, settings)
    repository = defs.get_repository_def()
    known = {thing.name for thing in (*repository.sensor_defs, *repository.schedule_defs)}
    states = instance.all_instigator_state()
    stopped = [s for s in states if s.status.value == "STOPPED" and s.name in known]
    off = sorted({_name_of(s, settings) for s in stopped})
    if off:
        detail = f"{', '.join(off)} are switched off: switch them on in the UI, under Automation"
        yield Finding("sensors", "warning", detail)
    graph, older = defs.resolve_asset_graph(), []
    for key in sorted(graph.materializable_asset_keys, key=str):
        event = instance.get_latest_materialization_event(key)
        made = event.asset_materialization if event else None
        version = (made.tags or {}).get(CODE_VERSION_TAG) if made else None
        if version is not None and version != graph.get(key).code_version:
            older.append(key.to_user_string())
    if older:
        detail = f"made by other code or with other settings: {', '.join(older)}; causalmix status"
        yield Finding("values", "warning", detail)


def _name_of(state: InstigatorState, settings: Settings) -> str:
    """A sensor's name, and where it is: projects that share an instance have the same sensors."""
    if settings.project is None:
        return state.name
    origin = state.origin.repository_origin.code_location_origin
    return f"{state.name} of {origin.location_name}"
