"""What `causalmix fit` and `causalmix recommend` cost, by number of runs and of domains.

    python -m causalmix_pipeline_tests.benchmarks.cost [cells ...] [--pools 20] [--out costs.csv]

A cell is `runs x domains x tasks`, as 512x6x2, with 4 covariates a domain and 4 mixtures a pool
state; without cells 128x6x2, 512x6x2, 2048x6x2, 512x17x2 and 512x40x2. Tables are drawn from
`adapters/synthetic.py`. Each command runs in a process of its own, as a user starts it: wall
seconds, CPU seconds with all children, and the peak of the memory that the process tree holds at
one time (resident, read every fifth of a second, so pages that processes share count more than
once; Linux only). `fit` includes its checks and learning curve.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.synthetic import SyntheticPool

CELLS = ("128x6x2", "512x6x2", "2048x6x2", "512x17x2", "512x40x2")
N_COVARIATES, MIXTURES_PER_STATE = 4, 4

#: Seconds between two looks at the memory.
LOOK_SECONDS = 0.2


def write_tables(folder: Path, cell: str, n_pools: int) -> None:
    """Write the tables of a cell as a user would have them."""
    n_runs, n_domains, n_tasks = (int(part) for part in cell.split("x"))
    pool = SyntheticPool.draw(n_domains, N_COVARIATES, n_tasks, seed=1)
    runs = pool.run_table(n_runs // MIXTURES_PER_STATE, MIXTURES_PER_STATE, seed=2)
    named = pl.DataFrame({"run": list(runs.run_ids)})
    flat_NC = runs.state_NDP.reshape(runs.n_runs, -1)
    tables = {
        "ratios": (named, runs.mixture_ND, runs.domains),
        "metrics": (named, runs.outcome_NT, runs.tasks),
        "covariates": (named, flat_NC, runs.covariate_columns),
        "pools": (
            pl.DataFrame({"pool": [f"pool_{i}" for i in range(n_pools)]}),
            pool.draw_states(n_pools, np.random.default_rng(3)).reshape(n_pools, -1),
            runs.covariate_columns,
        ),
    }
    for name, (key, values, columns) in tables.items():
        frame = pl.DataFrame(values, schema=list(columns), orient="row")
        pl.concat([key, frame], how="horizontal").write_csv(folder / f"{name}.csv")


def measure(arguments: list[str], folder: Path) -> dict[str, float]:
    """Run `causalmix` in a folder; its costs.

    Raises:
        RuntimeError: if the command fails; says what it printed.
    """
    before, began, peak = os.times(), time.perf_counter(), 0
    with (folder / "printed.txt").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "causalmix_pipeline.cli", *arguments],
            cwd=folder,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(LOOK_SECONDS)
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise RuntimeError((folder / "printed.txt").read_text())
    cpu = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return {"wall_seconds": wall, "cpu_seconds": cpu, "peak_megabytes": peak / 2**20}


def resident_bytes(root: int) -> int:
    """Memory of a process and all below it."""
    parents, resident = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            pages = int((folder / "statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended between two looks.
        parents[int(folder.name)] = int(after_name[1])
        resident[int(folder.name)] = pages * os.sysconf("SC_PAGE_SIZE")

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return sum(size for pid, size in resident.items() if below(pid))


def measure_cell(cell: str, n_pools: int) -> list[dict]:
    """Costs of both commands for one cell."""
    fit = ["fit", "--ratios", "ratios.csv", "--metrics", "metrics.csv", "--covariates"]
    fit += ["covariates.csv", "--maximize", ",".join(_tasks(cell)), "--out", "model"]
    recommend = ["recommend", "--model", "model", "--pools", "pools.csv", "--out", "best.csv"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(folder, cell, n_pools)
        return [
            {"runs x domains x tasks": cell, "command": arguments[0], **measure(arguments, folder)}
            for arguments in (fit, recommend)
        ]


def _tasks(cell: str) -> list[str]:
    return [f"task_{t}" for t in range(int(cell.split("x")[2]))]


def main() -> None:
    """Print a row per cell and command, as soon as each cell is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", nargs="*", default=list(CELLS))
    parser.add_argument("--pools", type=int, default=20)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    with pl.Config(tbl_rows=100, float_precision=1, tbl_hide_dataframe_shape=True):
        for cell in asked.cells:
            rows += measure_cell(cell, asked.pools)
            print(pl.DataFrame(rows[-2:]), flush=True)
        print(pl.DataFrame(rows))
    if asked.out:
        pl.DataFrame(rows).write_csv(asked.out)


if __name__ == "__main__":
    main()
