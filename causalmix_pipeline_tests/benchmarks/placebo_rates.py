"""How often the tests of `core.falsification` pass, with effects and with placebos.

    python -m causalmix_pipeline_tests.benchmarks.placebo_rates [tables] [states ...]

For each number of states (4 mixtures in each; default 34, 64 and 128) and each of `tables` truths
of `adapters/synthetic.py` (default 20; 6 domains, 4 covariates each, 2 tasks of equal weight), the
share of tables in which the weighted objective passes: as they are, with mixtures permuted within
states, with covariates permuted between states, and where the truth has no effect of states on what
mixtures do (`state_effect` 0). The first test should pass on the first and fail on the second, the
second pass on the first and fail on the last two; asked for are 19 failures in 20.
"""

import sys

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.quick_fits import TRIAL_ESTIMATOR
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import permute_mixtures, permute_states
from causalmix_pipeline.core.falsification import OBJECTIVE, falsify
from causalmix_pipeline.core.runs import RunTable

WEIGHTS_T = (0.5, 0.5)


def tables_of(n_states: int, seed: int) -> dict[str, RunTable]:
    """The real table and its placebos."""
    rng = np.random.default_rng(seed)
    runs = SyntheticPool.draw(6, 4, 2, seed=seed).run_table(n_states, 4, seed=1000 + seed)
    calm = SyntheticPool.draw(6, 4, 2, state_effect=0.0, seed=seed)
    return {
        "real": runs,
        "mixtures permuted": permute_mixtures(runs, rng),
        "covariates permuted": permute_states(runs, rng),
        "no state effect": calm.run_table(n_states, 4, seed=1000 + seed),
    }


def passes(runs: RunTable, seed: int) -> dict[str, bool]:
    """Which tests the weighted objective passes."""
    trials = falsify(lambda: make_estimator(TRIAL_ESTIMATOR), runs, WEIGHTS_T, seed=seed)
    return {trial.check: bool(trial.passed) for trial in trials if trial.task == OBJECTIVE}


def measure(n_states: int, n_tables: int) -> pl.DataFrame:
    """Shares of tables that pass, a row per kind of table."""
    rows = [
        {"table": kind, **passes(runs, seed)}
        for seed in range(n_tables)
        for kind, runs in tables_of(n_states, seed).items()
    ]
    return (
        pl.DataFrame(rows)
        .group_by("table", maintain_order=True)
        .agg(pl.exclude("table").cast(pl.Float64).mean())
        .select(pl.lit(4 * n_states).alias("runs"), pl.all())
    )


def main(arguments: list[str]) -> None:
    """Print the shares."""
    n_tables = int(arguments[0]) if arguments else 20
    sizes = [int(size) for size in arguments[1:]] or [34, 64, 128]
    with pl.Config(tbl_rows=40, float_precision=2, tbl_hide_dataframe_shape=True):
        print(pl.concat(measure(size, n_tables) for size in sizes))


if __name__ == "__main__":
    main(sys.argv[1:])
