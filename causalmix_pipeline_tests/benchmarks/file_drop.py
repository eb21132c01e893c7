"""From new files in the demo's live pool to a new recommendation: where the time goes.

    python -m causalmix_pipeline_tests.benchmarks.file_drop --config data/demo.yaml
        [--interval 30] [--quiet 60]

Works on a copy of the project that `causalmix demo` left, with a real daemon and webserver. The
drop is the demo's own ("within reach"), and the scores of its documents are forgotten first. Work
is what runs do, from the start of a run's process to its end; the rest is waiting: for the pool to
be quiet and for sensors to look. Linux only.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.demo_pool import drop_into_live, reset_live
from causalmix_pipeline.automation.staleness import materialise
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observe_pool
from causalmix_pipeline_tests.benchmarks.running_project import (
    FinishedProject,
    Services,
    running,
    wait_until,
)

#: Longest wait for the project to settle, seconds.
LONGEST_WAIT = 900


def settle(services: Services, instance: dg.DagsterInstance) -> None:
    """Wait until the project has settled.

    Raises:
        TimeoutError: if it doesn't; says what the daemon printed.
    """
    project = services.projects[0]
    if not wait_until(lambda: project.is_settled(instance), LONGEST_WAIT):
        raise TimeoutError((services.logs / "daemon.log").read_text()[-3000:])


def run_rows(instance: dg.DagsterInstance, since: float) -> list[dict]:
    """What the runs since then spent, a row per start of a run's process and per step."""
    rows = []
    for record in instance.get_run_records(ascending=True, order_by="create_timestamp"):
        if record.create_timestamp.timestamp() < since or record.end_time is None:
            continue
        run, spent = record.dagster_run, 0.0
        for step in instance.get_run_step_stats(run.run_id):
            if step.start_time is None or step.end_time is None:
                continue  # skipped
            seconds = step.end_time - step.start_time
            spent += seconds
            rows.append({"run": run.run_id[:8], "what": step.step_key, "seconds": seconds})
        whole = record.end_time - record.create_timestamp.timestamp()
        rows.append({"run": run.run_id[:8], "what": "start and end of a run's process",
                     "seconds": whole - spent})  # fmt: skip
    return rows


def measure(config: Path, logs: Path, interval: int, quiet: int) -> pl.DataFrame:
    """Drop the files and wait; a row per step and kind of waiting."""
    project, demo = FinishedProject(config), config.parent / "demo"
    live = Path(project.settings.live_path)
    reset_live(demo, live)
    shutil.rmtree(project.settings.data_path / "scores", ignore_errors=True)
    with ensure_instance(project.settings.data_path) as instance:
        observe_pool(instance, project.settings, LIVE_POOL)
        materialise(project.defs, instance, [dg.AssetKey("live_documents")])
    with (
        ensure_instance(project.settings.data_path) as instance,
        running([project], interval=interval, quiet=quiet, logs=logs) as services,
    ):
        settle(services, instance)
        began = time.time()
        files = drop_into_live(demo, live, "within_reach")
        settle(services, instance)
        whole = time.time() - began
        rows = run_rows(instance, began)
    print(f"{len(files)} files dropped; {whole:.0f} s until everything was made.")
    work = pl.DataFrame(rows)
    total = sum(row["seconds"] for row in rows)
    waiting = pl.DataFrame({"what": ["work in all", "waiting for quiet and for sensors"],
                            "seconds": [total, whole - total]})  # fmt: skip
    parts = work.group_by("what").agg(pl.col("seconds").sum()).sort("seconds", descending=True)
    return pl.concat([parts, waiting])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--interval", type=int, default=30)
    parser.add_argument("--quiet", type=int, default=60)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drop_") as name:
        folder = Path(name) / "project"
        shutil.copytree(asked.config.parent, folder)
        found = measure(folder / asked.config.name, Path(name), asked.interval, asked.quiet)
    with pl.Config(tbl_rows=100, float_precision=1, tbl_hide_dataframe_shape=True,
                   fmt_str_lengths=60):  # fmt: skip
        print(found)


if __name__ == "__main__":
    main()
