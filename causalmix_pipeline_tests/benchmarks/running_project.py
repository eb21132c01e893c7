"""A project with a real daemon and webserver of Dagster, started, looked at and killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from causalmix_pipeline.adapters.pool_files import pool_fingerprint
from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value
from causalmix_pipeline.automation.conditions import LIVE_SIDE
from causalmix_pipeline.automation.staleness import refresh, stale_assets
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import PROCESS_TAG, dagster_home, ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.benchmarks.cost import resident_bytes

OPEN = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

#: Definitions whose sensors look as often as the benchmark wants; the settings allow 30 s.
CODE = """
from pathlib import Path
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.settings_file import load_settings
settings = load_settings({config!r})
often = settings.automation.model_copy(
    update={{"sensor_interval_seconds": {interval}, "quiet_seconds": {quiet}}}
)
defs = build_definitions(Path({config!r}), settings.model_copy(update={{"automation": often}}))
"""


class RunningProject:
    """The daemon and the webserver of a finished project; use `running`."""

    def __init__(self, config: Path, *, interval: int, quiet: int, logs: Path):
        self.config, self.settings = config, load_settings(config)
        self.logs, self.port = logs, free_port()
        self._code = logs / "fast_definitions.py"
        self._code.write_text(CODE.format(config=str(config), interval=interval, quiet=quiet))
        self._processes: dict[str, subprocess.Popen] = {}
        self.defs = build_definitions(config)

    def start(self, name: str) -> None:
        """Start `daemon` or `webserver` as a session of its own, as a service manager does."""
        commands = {
            "daemon": ["dagster._daemon", "run", "-f", str(self._code)],
            "webserver": ["dagster_webserver", "-h", "127.0.0.1", "-p", str(self.port), "-f",
                          str(self._code)],
        }  # fmt: skip
        home = dagster_home(self.settings.data_path)
        with open(self.logs / f"{name}.log", "ab") as sink:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", *commands[name]],
                cwd=self.logs,
                env=os.environ | {"DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1"},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def kill(self, name: str, *, all_below: bool) -> None:
        """SIGKILL a process, or all of its session: code server and runs too."""
        process = self._processes[name]
        (os.killpg if all_below else os.kill)(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End everything in order, then by force."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def is_up(self) -> bool:
        """Whether both run."""
        return all(process.poll() is None for process in self._processes.values())

    def open_runs(self, instance: dg.DagsterInstance) -> Sequence[dg.DagsterRun]:
        """Runs that haven't ended."""
        return instance.get_runs(dg.RunsFilter(statuses=OPEN))

    def kill_a_run(self, instance: dg.DagsterInstance) -> str | None:
        """SIGKILL the process of an open run; its id, or None where none is open."""
        for run in self.open_runs(instance):
            tag = run.tags.get(PROCESS_TAG)
            if tag and run.status == dg.DagsterRunStatus.STARTED:
                try:
                    os.kill(int(tag.rsplit(":", 2)[1]), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                return run.run_id
        return None

    def is_settled(self, instance: dg.DagsterInstance) -> bool:
        """Whether the pool was read as it is now and nothing is stale or under way."""
        if observed_version(instance, LIVE_POOL) != pool_fingerprint(self.settings.live_path):
            return False
        found = stale_assets(self.defs, instance, LIVE_SIDE)
        return not found.reasons and not self.open_runs(instance)

    def resident(self) -> dict[str, float]:
        """Megabytes of the daemon, the webserver and all below them that isn't a run."""
        return {
            name: resident_bytes(process.pid) / 2**20
            for name, process in self._processes.items()
            if process.poll() is None
        }


@contextmanager
def running(config: Path, *, interval: int, quiet: int, logs: Path) -> Iterator[RunningProject]:
    """Start a finished project's daemon and webserver; both are gone afterwards."""
    project = RunningProject(config, interval=interval, quiet=quiet, logs=logs)
    try:
        project.start("daemon")
        project.start("webserver")
        yield project
    finally:
        project.stop()


def wait_until(what: Callable[[], bool], seconds: float, every: float = 1.0) -> bool:
    """Wait for something; whether it came true in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if what():
            return True
        time.sleep(every)
    return what()


def true_recommendation(config: Path, scratch: Path) -> str:
    """Digest of the recommendation that a copy of the project makes of the pool from scratch."""
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(config.parent, copy, ignore=shutil.ignore_patterns("dagster_home", "scratch"))
    settings = load_settings(copy / config.name)
    with ensure_instance(settings.data_path) as instance:
        refresh(build_definitions(copy / config.name), instance, LIVE_SIDE)
    return recommendation(settings)


def recommendation(settings: Settings) -> str:
    """Digest of the recommendation that stands."""
    return content_digest(read_value(Path(settings.assets_root) / "recommended_mixture.parquet"))


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
