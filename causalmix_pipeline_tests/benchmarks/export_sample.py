"""What a materialised sample of a large pool costs: seconds and peak memory, with its counts.

A generated pool (`generated_pool`) is read once into a documents frame as wide as that of a
profile, a token taken for each four characters. Then a fresh process chooses documents for an
uneven mixture with one domain at 0, writes the sample, and reads it again: rows by document, and
tokens by domain, must be those of the manifest. Memory is the most resident memory of that
process, the frame included; the reading back comes after it was looked at. Run:

    OMP_NUM_THREADS=1 python -m causalmix_pipeline_tests.benchmarks.export_sample --pool FOLDER
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.export_sample import write_sample
from causalmix_pipeline.adapters.exporter import make_export
from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.pool_files import pool_files
from causalmix_pipeline.adapters.pool_reader import read_batches
from causalmix_pipeline.adapters.profiler import PoolSpec

#: Characters that count as a token.
TOKEN_CHARS = 4

#: Metrics that the frame of a profile has for each document.
N_METRICS = 24


def documents_of(pool: PoolSpec) -> pl.DataFrame:
    """The documents of a pool, without text."""
    parts = []
    for file in pool_files(pool.location):
        for batch in read_batches(file, pool.columns, pool.rules):
            n_tokens = pl.col("text").str.len_chars().cast(pl.Int64) // TOKEN_CHARS + 1
            parts.append(batch.documents.with_columns(n_tokens=n_tokens).drop("text"))
    frame = pl.concat(parts)
    return frame.unique(["domain", "document_id"], keep="first", maintain_order=True).with_columns(
        copies=pl.lit(1, dtype=pl.Int64),
        augmented=pl.lit(False),
        **{f"metric_{i}": pl.col("n_tokens") / (i + 1) for i in range(N_METRICS)},
    )


def measure(pool: PoolSpec, frame_file: Path, out: Path, passes: float, kind: str) -> dict:
    """Write a sample of some times the pool's tokens, in this process, and check it."""
    began = time.perf_counter()
    frame = pl.read_parquet(frame_file)
    domains = sorted(frame["domain"].unique())
    weight_D = np.array([0.0, *range(1, len(domains))])
    budget = int(passes * frame["n_tokens"].to_numpy().sum())
    export = make_export(
        weight_D / weight_D.sum(), domains, frame, budget_tokens=budget, seed=0,
        verdict="supported", fingerprints={}, columns=pool.columns,
    )  # fmt: skip
    chosen = time.perf_counter()
    write_sample(out, export, pool, kind=kind, by_domain=False)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, tokens = Counter(), Counter()
    for path in sorted((out / "sample").glob("part-*")):
        read = pl.read_ndjson if kind == "jsonl" else pl.read_parquet
        part = read(path).select("document_id", "domain", n=pl.col("text").str.len_chars())
        rows.update(part["document_id"].to_list())
        counts = part.group_by("domain").agg((pl.col("n") // TOKEN_CHARS + 1).sum())
        tokens.update(dict(counts.iter_rows()))
    wanted = Counter(
        dict(export.manifest.group_by("document_id").agg(pl.col("copies").sum()).iter_rows())
    )
    worst = max(abs(tokens[d] - w * budget) for d, w in zip(domains, export.mixture_D, strict=True))
    return {
        "passes": passes,
        "kind": kind,
        "documents of the pool": frame.height,
        "rows of the sample": rows.total(),
        "tokens of the sample": tokens.total(),
        "gigabytes": sum(p.stat().st_size for p in (out / "sample").iterdir()) / 1e9,
        "seconds to choose": round(chosen - began, 1),
        "seconds to write": round(ended - chosen, 1),
        "peak megabytes": peak // 1024,
        "repeats counted": rows == wanted,
        "worst domain off by tokens": float(worst),
        "longest document": int(frame["n_tokens"].to_numpy().max()),
    }


def main() -> None:
    """Measure budgets below and above the pool, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--passes", type=float, nargs="+", default=[0.3, 1.0, 2.5])
    parser.add_argument("--kind", default="jsonl")
    parser.add_argument("--child", type=Path)
    asked = parser.parse_args()
    pool = PoolSpec(asked.pool, ColumnMap(domain="domain", source="source"))
    if asked.child is not None:
        out = asked.child.with_name("out")
        print(json.dumps(measure(pool, asked.child, out, asked.passes[0], asked.kind)))
        return
    folder = asked.pool.with_name(f"{asked.pool.name}_sample")
    folder.mkdir(exist_ok=True)
    frame_file = folder / "documents.parquet"
    if not frame_file.exists():
        documents_of(pool).write_parquet(frame_file)
    for passes in asked.passes:
        command = [sys.executable, "-m", __spec__.name, "--pool", str(asked.pool), "--passes",
                   str(passes), "--kind", asked.kind, "--child", str(frame_file)]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(json.dumps(json.loads(done.stdout), indent=1))


if __name__ == "__main__":
    main()
