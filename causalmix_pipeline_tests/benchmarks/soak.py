"""A soak: the pool changes at random, runs and the daemon are killed at random; what is left?

    python -m causalmix_pipeline_tests.benchmarks.soak [--minutes 30] [--changes 60] [--kills 10]
        [--config CAUSALMIX.yaml | --postgres] [--seed 0] [--interval 5] [--quiet 5]

Works on a copy of the project of `--config`, which must be finished and keep its pool as JSONL;
without it a tiny project is made. With `--postgres` two are made, as two code locations on one
PostgreSQL server of the benchmark's own, and changed in turn. Real daemon, webserver and
processes; Linux only. Sensors look every `--interval` seconds (a project's least is 30), so that
more happens in the time.

Four times on the way and at the end the pool rests until the project has settled; then the
recommendation must be the one that a copy of the project makes of the same pool from scratch. At
the end: no proxy was trained, no asset was made twice of the same inputs, no run is open, no slot
is taken. Exit status 1 if one of these doesn't hold.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
import polars as pl
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage

from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.automation.staleness import CODE_VERSION_TAG, INPUT_VERSION_TAG, refresh
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.asset_keys import asset_key, assets_named
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.serving_settings import Instance
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline.workspace import ON_REQUEST
from causalmix_pipeline_tests.benchmarks.running_project import (
    FinishedProject,
    Services,
    kill_a_run,
    open_runs,
    running,
    wait_until,
)
from causalmix_pipeline_tests.conftest import write_project
from causalmix_pipeline_tests.postgres_server import postgres_server

#: Pauses in which the project must settle, besides the last; and the longest wait for it, seconds.
PAUSES, LONGEST_WAIT = 4, 600

#: What is killed, in turn, in random order.
KILLS = ("run", "daemon", "run", "daemon and all below it", "webserver")


class PoolChanger:
    """Changes a pool of JSONL files at random; remembers how it was at the start."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.first = {path: path.read_text().splitlines() for path in folder.rglob("*.jsonl")}
        self.extra: list[Path] = []

    def change(self) -> str:
        """Change something; in a word, what."""
        kinds = [self.drop_lines, self.add_lines, self.restore, self.write_again, self.in_pieces]
        kinds += [self.new_file, self.delete_file]
        kind = self.random.choice(kinds)
        kind(self.random.choice(sorted(self.first)))
        return kind.__name__

    def drop_lines(self, path: Path) -> None:
        """Lose a tenth to a half of a file's documents."""
        lines = self.first[path]
        kept = self.random.sample(lines, int(len(lines) * self.random.uniform(0.5, 0.9)))
        write_lines(path, kept)

    def add_lines(self, path: Path) -> None:
        """Documents that nobody has seen."""
        write_lines(path, [*path.read_text().splitlines(), *self.changed_lines(path, 10)])

    def restore(self, path: Path) -> None:
        """The file as it was at the start: a content that was seen before."""
        write_lines(path, self.first[path])

    def write_again(self, path: Path) -> None:
        """The same content, another time."""
        path.write_bytes(path.read_bytes())

    def in_pieces(self, path: Path) -> None:
        """A slow copy that can be read half-way."""
        with open(path, "a") as sink:
            for line in self.changed_lines(path, 6):
                sink.write(line + "\n")
                sink.flush()
                time.sleep(0.5)

    def new_file(self, path: Path) -> None:
        """Another source of a domain."""
        target = path.with_name(f"extra_{len(self.extra)}.jsonl")
        write_lines(target, self.changed_lines(path, 15))
        self.extra.append(target)

    def delete_file(self, path: Path) -> None:
        """Take an extra source away again; where there is none, some lines."""
        if self.extra:
            self.extra.pop().unlink()
        else:
            self.drop_lines(path)

    def changed_lines(self, path: Path, n: int) -> list[str]:
        """Documents made new by a number in their text."""
        lines = self.random.choices(self.first[path], k=n)
        return [
            line.replace('"text": "', f'"text": "{self.random.random():.9f} ', 1) for line in lines
        ]


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a file whole, as most tools do: not atomically."""
    path.write_text("\n".join(lines) + "\n")


def tiny_project(folder: Path, **overrides: object) -> Path:
    """Make and finish a project of 18 proxies of 30 steps; its settings file."""
    folder.mkdir()
    config = write_project(folder, **overrides)
    settings = load_settings(config)
    with ensure_instance(settings.data_path, settings.instance) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        wanted = dg.AssetSelection.all() - assets_named(*ON_REQUEST)
        refresh(build_definitions(config), instance, wanted)
    return config


class Soak:
    """What happened, and what it cost."""

    def __init__(self, services: Services, instance: dg.DagsterInstance, scratch: Path):
        self.services, self.instance, self.scratch = services, instance, scratch
        self.began = time.monotonic()
        self.events: list[tuple[float, str]] = []
        self.costs: list[dict[str, float]] = []
        self.broken: list[str] = []

    def tell(self, what: str) -> None:
        """Note and print what happened."""
        minutes = (time.monotonic() - self.began) / 60
        self.events.append((minutes, what))
        print(f"{minutes:6.1f} min  {what}", flush=True)

    def look(self) -> None:
        """Note memory and the size of Dagster's home and database."""
        size = sum(p.stat().st_size for p in self.services.home.rglob("*") if p.is_file())
        minutes = (time.monotonic() - self.began) / 60
        self.costs.append({
            "minutes": minutes,
            **self.services.resident(),
            "home": size / 2**20,
            "database": database_bytes(self.instance) / 2**20,
            "runs": float(self.instance.get_runs_count()),
        })  # fmt: skip

    def kill(self, what: str) -> None:
        """Kill and, where it isn't a run, start again."""
        if what == "run":
            killed: list[str] = []

            def found() -> bool:
                run = kill_a_run(self.instance)
                killed.extend([run] if run else [])
                return bool(run)

            wait_until(found, 60, every=0.1)
            self.tell(f"killed run {killed[0][:8]}" if killed else "no run to kill in 60 s")
            return
        name = what.split()[0]
        self.services.kill(name, all_below="below" in what)
        self.tell(f"killed the {what}")
        time.sleep(2)
        self.services.start(name)

    def pause(self) -> None:
        """Wait until all has settled, and hold each recommendation against the truth."""
        began, projects = time.monotonic(), self.services.projects
        settled = wait_until(
            lambda: all(one.is_settled(self.instance) for one in projects), LONGEST_WAIT
        )
        waited = time.monotonic() - began
        if not settled:
            self.broken.append(f"not settled after {waited:.0f} s")
            self.tell(self.broken[-1])
            return
        right = [one.true_recommendation(self.scratch) == one.recommendation() for one in projects]
        if not all(right):
            self.broken.append("a recommendation isn't that of the pool")
        self.tell(f"settled after {waited:.0f} s; the recommendation is right: {all(right)}")

    def check_end(self, cursor: int, runs_before: list[str]) -> None:
        """What must hold after all."""
        if proxy_files(self.services.projects) != runs_before:
            self.broken.append("proxies were trained")
        for project in self.services.projects:
            twice = Counter(name for name, _ in made_twice(self.instance, project, cursor))
            self.broken += [
                f"{name} made {n} times of the same inputs" for name, n in twice.items()
            ]
        self.broken += [f"run {run.run_id} is open" for run in open_runs(self.instance)]
        storage = self.instance.event_log_storage
        for key in storage.get_concurrency_keys():
            info = storage.get_concurrency_info(key)
            if info.claimed_slots or info.pending_steps:
                self.broken.append(f"slots of {key} are taken: {info}")
        if not self.services.is_up():
            self.broken.append("the daemon or the webserver has ended")


def database_bytes(instance: dg.DagsterInstance) -> int:
    """Size of the database; 0 where it's files of Dagster's home."""
    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        return 0
    with storage.connect() as connection:
        if connection.dialect.name != "postgresql":
            return 0
        return connection.exec_driver_sql(
            "SELECT pg_database_size(current_database())"
        ).scalar_one()


def proxy_files(projects: Sequence[FinishedProject]) -> list[str]:
    """Finished proxy runs of projects, by file and time."""
    roots = [Path(RunStore(project.settings.run_store_root).root) / "runs" for project in projects]
    return sorted(
        f"{path} {path.stat().st_mtime_ns}"
        for root in roots
        for path in root.rglob("*")
        if path.is_file()
    )


def made_twice(
    instance: dg.DagsterInstance, project: FinishedProject, cursor: int
) -> Iterator[tuple[str, tuple]]:
    """Assets that were made twice in a row of the same inputs by the same code."""
    for name in LIVE_SIDE_NAMES:
        key = asset_key(project.settings, name)
        wanted = dg.AssetRecordsFilter(asset_key=key, after_storage_id=cursor)
        records = instance.fetch_materializations(wanted, limit=5000, ascending=True).records
        before = None
        for record in records:
            tags = (record.asset_materialization and record.asset_materialization.tags) or {}
            chosen = {k: v for k, v in tags.items() if k.startswith(INPUT_VERSION_TAG)}
            inputs = (tags.get(CODE_VERSION_TAG), *sorted(chosen.items()))
            if inputs == before:
                yield name, inputs
            before = inputs


def soak(configs: Sequence[Path], scratch: Path, asked: argparse.Namespace) -> Soak:
    """Run it on projects that share an instance."""
    chance = random.Random(asked.seed)
    projects = [FinishedProject(config) for config in configs]
    settings = projects[0].settings
    changers = [
        PoolChanger(Path(one.settings.live_path), asked.seed + i) for i, one in enumerate(projects)
    ]
    kills = [KILLS[i % len(KILLS)] for i in range(asked.kills)]
    actions = ["change"] * asked.changes + [f"kill {what}" for what in kills]
    chance.shuffle(actions)
    timing = {"interval": asked.interval, "quiet": asked.quiet}
    with (
        ensure_instance(settings.data_path, settings.instance) as instance,
        running(projects, **timing, logs=scratch) as services,
    ):
        cursor = instance.event_log_storage.get_maximum_record_id() or 0
        found = Soak(services, instance, scratch)
        before, seconds = proxy_files(projects), asked.minutes * 60
        pauses = {len(actions) * (k + 1) // (PAUSES + 1) for k in range(PAUSES)}
        time.sleep(20)  # the code is loaded
        if not services.is_up():
            raise RuntimeError((scratch / "daemon.log").read_text()[-3000:])
        found.look()
        for i, action in enumerate(actions):
            if action == "change":
                found.tell(chance.choice(changers).change())
            else:
                found.kill(action.removeprefix("kill "))
            if i + 1 in pauses:
                found.pause()
            found.look()
            left = seconds - (time.monotonic() - found.began)
            time.sleep(max(left, 0) / (len(actions) - i) * chance.uniform(0.2, 1.4))
        found.pause()
        found.look()
        found.check_end(cursor, before)
    return found


def report(found: Soak) -> None:
    """Print what happened, what it cost, and what is broken."""
    with pl.Config(tbl_rows=100, float_precision=1, tbl_hide_dataframe_shape=True):
        costs = pl.DataFrame(found.costs)
        rows = costs.gather_every(max(costs.height // 10, 1)).vstack(costs.tail(1))
        print(rows)
    counts = Counter(what for _, what in found.events)
    print("\n".join(f"{n:4d} x {what}" for what, n in sorted(counts.items())))
    print("\n".join(f"BROKEN: {what}" for what in found.broken) or "All of it holds.")


def main() -> int:
    """Soak, print, and say by the exit status whether all holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--changes", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--quiet", type=int, default=5)
    asked = parser.parse_args()
    if asked.config and asked.postgres:
        parser.error("--postgres makes its own projects: leave --config out")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak_")))
        if asked.config:
            shutil.copytree(asked.config.parent, scratch / "project")
            configs = [scratch / "project" / asked.config.name]
        elif asked.postgres:
            os.environ[Instance().postgres_env] = stack.enter_context(postgres_server())
            shared = {"instance": {"storage": "postgres"}}
            names = ("first", "second")
            configs = [tiny_project(scratch / name, project=name, **shared) for name in names]
        else:
            configs = [tiny_project(scratch / "project")]
        found = soak(configs, scratch, asked)
        report(found)
        return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
