"""Dagster's instance of a project: its home in `data/`, and runs whose process died.

Each run carries the id and start time of its process. Dagster doesn't notice that a run's process
was killed together with the server that started it, or that the CLI's was: such a run would stay
open for hours and keep others waiting. It is closed, and its concurrency slots are given back.
"""

import os
import socket
from pathlib import Path

import dagster as dg

from causalmix_pipeline.adapters.blobs import write_atomically
from causalmix_pipeline.resources.asset_keys import is_own_run
from causalmix_pipeline.resources.home_config import next_config
from causalmix_pipeline.resources.postgres import require_postgres
from causalmix_pipeline.resources.serving_settings import Instance
from causalmix_pipeline.resources.settings import Settings

#: Tag of a run: host, process id and start time of the process that executes it.
PROCESS_TAG = "causalmix/process"

#: What a run is until it ended.
OPEN = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


def dagster_home(data_path: Path) -> Path:
    """Dagster's home of a project, as an absolute path."""
    return data_path.resolve() / "dagster_home"


def ensure_home(data_path: Path, wanted: Instance | None = None) -> Path:
    """Make Dagster's home with its `dagster.yaml`, or bring an unedited one up to date.

    Args:
        data_path: the project's data folder.
        wanted: where runs are to be kept; None leaves it as it is, SQLite at first.

    Raises:
        ConfigError: if the file was edited and names another storage than is wanted, or if
            PostgreSQL is wanted and can't be used.
    """
    home = dagster_home(data_path)
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    there = config.read_text(encoding="utf-8") if config.exists() else None
    text = next_config(there, wanted, config)
    if wanted is not None and wanted.storage == "postgres":
        require_postgres(wanted)
    if text != there:
        write_atomically(config, text.encode())
    return home


def ensure_instance(data_path: Path, wanted: Instance | None = None) -> dg.DagsterInstance:
    """Open Dagster's instance, made at the first call; use it in `with`.

    Args:
        data_path: the project's data folder, in which its home is.
        wanted: where runs are to be kept; None leaves it as it is, SQLite at first.

    Raises:
        ConfigError: as for `ensure_home`.
    """
    return dg.DagsterInstance.from_config(str(ensure_home(data_path, wanted)))


def process_tag(pid: int | None = None) -> str:
    """Name a process for good: `host:pid:start`, since ids are used again."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()}:{pid}:{_start_time(pid)}"


def _start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where it's gone or untold."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def is_process_alive(tag: str) -> bool:
    """Tell whether the process of a tag still runs; True for one on another host."""
    host, pid, start = tag.rsplit(":", 2)
    if host != socket.gethostname():
        return True
    if start:
        return _start_time(int(pid)) == start
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _own_process_tag(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str | None:
    """The process of a run; a retry that hasn't begun still has the tag of the run it repeats."""
    tag = run.tags.get(PROCESS_TAG)
    parent = instance.get_run_by_id(run.parent_run_id) if tag and run.parent_run_id else None
    return None if parent and parent.tags.get(PROCESS_TAG) == tag else tag


def dead_runs(instance: dg.DagsterInstance) -> list[tuple[dg.DagsterRun, str]]:
    """Open runs whose process is gone, each with the tag of its process."""
    begun = [status for status in OPEN if status != dg.DagsterRunStatus.QUEUED]
    tagged = [
        (run, _own_process_tag(instance, run))
        for run in instance.get_runs(filters=dg.RunsFilter(statuses=begun))
    ]
    return [(run, tag) for run, tag in tagged if tag is not None and not is_process_alive(tag)]


def close_dead_runs(instance: dg.DagsterInstance, settings: Settings | None = None) -> list[str]:
    """Mark open runs whose process is gone as failed, and give their concurrency slots back.

    Args:
        instance: keeps the runs.
        settings: the project whose runs are closed; None closes those of any.

    Returns:
        Ids of the runs that were closed.
    """
    closed = []
    for run, tag in dead_runs(instance):
        if settings is not None and not is_own_run(settings, run):
            continue
        instance.report_run_failed(
            run,
            f"The process of this run ({tag}) is gone: it was killed, or the machine restarted.",
        )
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        closed.append(run.run_id)
    return closed
