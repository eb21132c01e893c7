"""Dagster's instance of a project: its home in `data/`, and runs whose process died.

Runs that the CLI makes in its own process have no worker that the daemon could look after. Each
carries the id and start time of its process, so that a run whose process is gone can be closed and
its concurrency slots given back.
"""

import os
import socket
from importlib import resources
from pathlib import Path

import dagster as dg

#: Tag of a run: host, process id and start time of the process that executes it.
PROCESS_TAG = "causalmix/process"

_OPEN = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def dagster_home(data_path: Path) -> Path:
    """Dagster's home of a project, as an absolute path."""
    return data_path.resolve() / "dagster_home"


def ensure_home(data_path: Path) -> Path:
    """Make Dagster's home with its `dagster.yaml`; a file that is there is left as it is."""
    home = dagster_home(data_path)
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    if not config.exists():
        template = resources.files("causalmix_pipeline.resources") / "dagster.yaml"
        temporary = config.with_name(f".dagster.yaml.{os.getpid()}.tmp")
        temporary.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
        os.replace(temporary, config)
    return home


def ensure_instance(data_path: Path) -> dg.DagsterInstance:
    """Open Dagster's instance in `data/dagster_home`, made at the first call; use it in `with`."""
    return dg.DagsterInstance.from_config(str(ensure_home(data_path)))


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


def close_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark open runs whose process is gone as failed, and give their concurrency slots back.

    Returns:
        Ids of the runs that were closed.
    """
    closed = []
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_OPEN)):
        tag = run.tags.get(PROCESS_TAG)
        if tag is None or is_process_alive(tag):
            continue
        instance.report_run_failed(
            run,
            f"The process of this run ({tag}) is gone: it was killed, or the machine restarted.",
        )
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        closed.append(run.run_id)
    return closed
