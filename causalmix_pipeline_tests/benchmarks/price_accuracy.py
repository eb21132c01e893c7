"""How near the estimated time of proxy runs is to the real one.

Prices what a project's design has to train, trains it, and compares. The project's run store must
lack the runs: give a fresh copy of the project. Wants a quiet machine.

    python -m causalmix_pipeline_tests.benchmarks.price_accuracy --config causalmix.yaml
"""

import argparse
import time
from pathlib import Path

import dagster as dg

from causalmix_pipeline.assets.design import specs_of
from causalmix_pipeline.assets.plan import price_runs
from causalmix_pipeline.cli_output import new_console
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.workspace import open_workspace


def main() -> None:
    """Print estimate, real time and their ratio; also as processor time, for a busy machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="settings file of a project")
    config = parser.parse_args().config
    with open_workspace(config, new_console()) as work:
        work.bring_up_to_date(dg.AssetSelection.assets("mixture_design").upstream())
        project = Project(config_file=str(config.resolve()))
        specs = specs_of(project, work.value("mixture_design"))
        project.folder("calibrations.json").unlink(missing_ok=True)
        started = time.perf_counter()
        price = price_runs(project, specs)
        print(f"trial: {time.perf_counter() - started:.1f} s; {price['measured']}")
        estimate, n_runs = 3600 * price["hours"], price["to train"]
        print(f"estimate: {estimate:.1f} s for {n_runs} runs")
        cpu_seconds = []
        started = time.perf_counter()
        project.backend.train(
            specs, lambda records: cpu_seconds.extend(record.cpu_seconds for record in records)
        )
        real = time.perf_counter() - started
        print(f"real: {real:.1f} s; estimate over real: {estimate / real:.3f}")
        ratio = price["CPU seconds a run"] * len(cpu_seconds) / sum(cpu_seconds)
        print(f"processor seconds a run, estimate over real: {ratio:.3f}")


if __name__ == "__main__":
    main()
