"""What Dagster, the store and scheduling cost beside the training of a study of short runs.

    python -m causalmix_pipeline_tests.benchmarks.study_overhead

A tiny project with 104 proxy runs of about one CPU second each is trained twice: through the real
asset `proxy_runs`, and by the backend alone on a copy of its inputs. Each share is of the CPU
seconds that the runs themselves took, so that other work on the machine doesn't count; the share
of idle worker time is of the workers' wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.design import specs_of
from causalmix_pipeline.automation.staleness import materialise, refresh
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_project


def cpu_and_wall(work: Callable[[], Any]) -> tuple[float, float, float]:
    """CPU seconds of this process and of its children that end meanwhile, and wall seconds."""

    def now() -> tuple[float, float, float]:
        mine = resource.getrusage(resource.RUSAGE_SELF)
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (
            mine.ru_utime + mine.ru_stime,
            theirs.ru_utime + theirs.ru_stime,
            time.perf_counter(),
        )

    before = now()
    work()
    own, children, wall = (b - a for a, b in zip(before, now(), strict=True))
    return own, children, wall


def shares(
    own: float, children: float, wall: float, records: list[ProxyRecord], workers: int, size: int
) -> dict[str, float]:
    """Seconds of a study, by where they went."""
    training = sum(record.cpu_seconds for record in records)
    in_stacks = sum(record.seconds for record in records) / size
    return {
        "wall": wall,
        "training CPU": training,
        "other CPU of workers": children - training,
        "CPU of the driver": own,
        "wall x workers / wall of stacks - 1": wall * workers / in_stacks - 1,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=104, help="proxy runs, panel included")
    parser.add_argument("--steps", type=int, default=700, help="steps a run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = write_project(
            root,
            design={
                "n_runs": args.runs - 4,
                "mixtures_per_state": 4,
                "noise_panel": {"mixtures": 4, "seeds": 2},
            },
            proxy={
                "preset": "tests",
                "overrides": {"vocab_size": 384, "sequence_length": 32, "steps": args.steps},
            },
            backend={"workers": args.workers},
        )
        print(json.dumps(measure(root, config, args.workers), indent=1))


def measure(root: Path, config: Path, workers: int) -> dict[str, Any]:
    """Train the study of a project both ways."""
    settings, definitions = load_settings(config), build_definitions(config)
    project = Project(config_file=str(config))
    size = settings.proxy.models_per_stack
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        refresh(definitions, instance, dg.AssetSelection.assets("proxy_plan").upstream())
        shutil.copytree(settings.run_store_root, root / "alone")
        keys = [dg.AssetKey("proxy_runs")]
        by_dagster = cpu_and_wall(lambda: materialise(definitions, instance, keys))
    design = read_value(settings.data_path / "assets" / "mixture_design.parquet")
    specs: list[ProxySpec] = specs_of(project, design)
    alone = RunStore(root / "alone")
    backend = LocalBackend(alone, models_per_stack=size, workers=LocalWorkers(workers))
    by_backend = cpu_and_wall(lambda: backend.train(specs, lambda records: None))
    import torch

    start = cpu_and_wall(  # workers load torch to read the function
        lambda: LocalWorkers(workers).run(torch.is_tensor, range(workers), lambda *_: None)
    )
    dagster_records = [r for s in specs if (r := project.run_store.get(s.key)) is not None]
    records = [r for s in specs if (r := alone.get(s.key)) is not None]
    training = sum(record.cpu_seconds for record in records)
    training_there = sum(record.cpu_seconds for record in dagster_records)
    beside = by_backend[0] + by_backend[1] - training
    beside_there = by_dagster[0] + by_dagster[1] - training_there
    return {
        "runs": len(specs),
        "CPU seconds a run": training / len(specs),
        "share of training CPU": {
            "worker start (torch is loaded)": start[1] / training,
            "store and scheduling": (beside - start[1]) / training,
            "Dagster": (beside_there - beside) / training,
            "all but worker start": (beside_there - start[1]) / training_there,
        },
        "through Dagster": shares(*by_dagster, dagster_records, workers, size),
        "backend alone": shares(*by_backend, records, workers, size),
        "worker start": {"CPU": start[1], "wall": start[2]},
    }


if __name__ == "__main__":
    main()
