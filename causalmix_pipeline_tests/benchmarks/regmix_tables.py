"""Compare estimators on RegMix's public run tables (17 domains, no covariates).

    python -m causalmix_pipeline_tests.benchmarks.regmix_tables FOLDER [runs ...]

FOLDER holds train_mixture_1m.csv, train_pile_loss_1m.csv and the two of test; it is not part of
the project, and without it the script says so and stops. Prints Spearman x100 on the 256 test runs
after fitting the first 512 (or `runs`) training runs, per target and as the mean of the targets.
"""

import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.core.effects import spearman
from causalmix_pipeline.core.runs import RunTable

ESTIMATORS = ("response_surface_blind", "regmix")


def read_runs(folder: Path, part: str) -> RunTable:
    """Return one of the two tables; losses negated, shares divided by their rounded sum."""
    mixtures = pl.read_csv(folder / f"{part}_mixture_1m.csv")
    losses = pl.read_csv(folder / f"{part}_pile_loss_1m.csv")
    joined = mixtures.join(losses, on="index", how="inner", validate="1:1").sort("index")
    domains = [name for name in mixtures.columns if name != "index"]
    tasks = [name for name in losses.columns if name != "index"]
    share_ND = joined.select(domains).to_numpy()
    mixture_ND = share_ND / share_ND.sum(axis=1, keepdims=True)
    _, cell_N = np.unique(mixture_ND, axis=0, return_inverse=True)
    return RunTable(
        domains=tuple(name.removeprefix("train_the_pile_") for name in domains),
        covariates=(),
        tasks=tuple(
            name.removeprefix("metric/the_pile_").removesuffix("_val_loss") for name in tasks
        ),
        run_ids=tuple(f"{part}_{i:04d}" for i in joined["index"]),
        state_ids=np.zeros(joined.height, dtype=int),
        state_NDP=np.empty((joined.height, len(domains), 0)),
        mixture_ND=mixture_ND,
        outcome_NT=-joined.select(tasks).to_numpy(),
        repeat_of_N=cell_N.ravel(),
    )


def main(arguments: list[str]) -> None:
    """Print the table."""
    folder = Path(arguments[0]) if arguments else None
    if folder is None or not (folder / "train_mixture_1m.csv").is_file():
        print(f"no RegMix tables in {folder}: nothing measured.")
        return
    train, test = read_runs(folder, "train"), read_runs(folder, "test")
    no_state_DP = test.state_NDP[0]
    for n_runs in [int(n) for n in arguments[1:]] or [train.n_runs]:
        rows = []
        for name in ESTIMATORS:
            began = time.perf_counter()
            estimator = make_estimator(name, seed=42).fit(train.subset(np.arange(n_runs)))
            predicted_NT = estimator.predict(no_state_DP, test.mixture_ND)
            seconds = time.perf_counter() - began
            scores = [
                100 * spearman(test.outcome_NT[:, t], predicted_NT[:, t])
                for t in range(len(test.tasks))
            ]
            mean_score = 100 * spearman(test.outcome_NT.mean(axis=1), predicted_NT.mean(axis=1))
            error_T = ((test.outcome_NT - predicted_NT) ** 2).sum(axis=0)
            total_T = ((test.outcome_NT - test.outcome_NT.mean(axis=0)) ** 2).sum(axis=0)
            named = dict(zip(test.tasks, scores, strict=True))
            rows.append(
                {"estimator": name, "mean of 13": float(np.mean(scores)), "their mean": mean_score}
                | {"R2": float(np.mean(1 - error_T / total_T)), "seconds": seconds}
                | named
            )
        print(f"{n_runs} training runs, Spearman x100 on {test.n_runs} test runs")
        table = pl.DataFrame(rows).transpose(include_header=True, column_names="estimator")
        with pl.Config(tbl_rows=30, float_precision=3, tbl_hide_dataframe_shape=True):
            print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
