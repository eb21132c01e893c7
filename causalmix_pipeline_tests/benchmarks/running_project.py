"""Projects with a real daemon and webserver of Dagster, started, looked at and killed."""

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
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.frame_store import value_path
from causalmix_pipeline.resources.instance import OPEN, PROCESS_TAG, dagster_home, ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.benchmarks.cost import resident_bytes

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


class FinishedProject:
    """A project whose experiment is done."""

    def __init__(self, config: Path):
        self.config, self.settings = config, load_settings(config)
        self.defs = build_definitions(config)

    def is_settled(self, instance: dg.DagsterInstance) -> bool:
        """Whether the pool was read as it is now and nothing is stale or under way."""
        observed = observed_version(instance, asset_key(self.settings, LIVE_POOL))
        if observed != pool_fingerprint(self.settings.live_path):
            return False
        return not stale_assets(self.defs, instance, LIVE_SIDE).reasons and not open_runs(instance)

    def recommendation(self) -> str:
        """Digest of the recommendation that stands."""
        key = asset_key(self.settings, "recommended_mixture")
        return content_digest(read_value(value_path(self.settings.assets_root, key)))

    def true_recommendation(self, scratch: Path) -> str:
        """Digest of the recommendation that a copy of the project makes of the pool from scratch.

        The copy keeps Dagster's home to itself, in SQLite.
        """
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        ignored = shutil.ignore_patterns("dagster_home", "scratch")
        shutil.copytree(self.config.parent, copy, ignore=ignored)
        found = FinishedProject(copy / self.config.name)
        with ensure_instance(found.settings.data_path) as instance:
            refresh(found.defs, instance, LIVE_SIDE)
        return found.recommendation()


class Services:
    """The daemon and the webserver of projects that share an instance; use `running`."""

    def __init__(self, projects: Sequence[FinishedProject], interval: int, quiet: int, logs: Path):
        self.projects, self.logs, self.port = projects, logs, free_port()
        self.home = dagster_home(projects[0].settings.data_path)
        self._processes: dict[str, subprocess.Popen] = {}
        self._code: list[str] = []
        for i, project in enumerate(projects):
            code = logs / f"fast_definitions_{i}.py"
            config = str(project.config)
            code.write_text(CODE.format(config=config, interval=interval, quiet=quiet))
            self._code += ["-f", str(code)]

    def start(self, name: str) -> None:
        """Start `daemon` or `webserver` as a session of its own, as a service manager does."""
        commands = {
            "daemon": ["dagster._daemon", "run"],
            "webserver": ["dagster_webserver", "-h", "127.0.0.1", "-p", str(self.port)],
        }
        with open(self.logs / f"{name}.log", "ab") as sink:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", *commands[name], *self._code],
                cwd=self.logs,
                env=os.environ | {"DAGSTER_HOME": str(self.home), "OMP_NUM_THREADS": "1"},
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

    def resident(self) -> dict[str, float]:
        """Megabytes of the daemon, the webserver and all below them that isn't a run."""
        return {
            name: resident_bytes(process.pid) / 2**20
            for name, process in self._processes.items()
            if process.poll() is None
        }


def open_runs(instance: dg.DagsterInstance) -> Sequence[dg.DagsterRun]:
    """Runs that haven't ended."""
    return instance.get_runs(dg.RunsFilter(statuses=list(OPEN)))


def kill_a_run(instance: dg.DagsterInstance) -> str | None:
    """SIGKILL the process of an open run; its id, or None where none is open."""
    for run in open_runs(instance):
        tag = run.tags.get(PROCESS_TAG)
        if tag and run.status == dg.DagsterRunStatus.STARTED:
            try:
                os.kill(int(tag.rsplit(":", 2)[1]), signal.SIGKILL)
            except ProcessLookupError:
                continue
            return run.run_id
    return None


@contextmanager
def running(
    projects: Sequence[FinishedProject], *, interval: int, quiet: int, logs: Path
) -> Iterator[Services]:
    """Start the daemon and webserver of finished projects; both are gone afterwards."""
    services = Services(projects, interval, quiet, logs)
    try:
        services.start("daemon")
        services.start("webserver")
        yield services
    finally:
        services.stop()


def wait_until(what: Callable[[], bool], seconds: float, every: float = 1.0) -> bool:
    """Wait for something; whether it came true in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if what():
            return True
        time.sleep(every)
    return what()


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
