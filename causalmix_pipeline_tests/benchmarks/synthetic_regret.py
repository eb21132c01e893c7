"""Compare estimators where the truth is known: regret of what they recommend, and coverage.

    python -m causalmix_pipeline_tests.benchmarks.synthetic_regret [states] [truths] [names ...]

For each of `truths` synthetic pools, 4 mixtures in each of `states` states are run (seed noise .2,
the standard deviation over mixtures being 1). On 20 new states each estimator recommends the mean
of the best 24 of 2,000 Dirichlet candidates, by gain minus one standard error where there is one.
Task weights are .6, .2 and .2. Regret is what is lost to the best candidate in truth, in standard
deviations of the outcome over candidates (below 0 where the mean of 24 beats them all); coverage
is that of nominal 90% intervals of the true gain of 50 random candidates over the equal mixture.
"""

import sys
import time

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import ESTIMATOR_NAMES, make_estimator
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import Z90

N_DOMAINS, N_COVARIATES = 6, 4
WEIGHTS_T = np.array([0.6, 0.2, 0.2])


def measure(name: str, n_states: int, truth: int) -> dict:
    """Return the figures of one estimator on one truth."""
    pool = SyntheticPool.draw(N_DOMAINS, N_COVARIATES, len(WEIGHTS_T), seed=truth)
    runs = pool.run_table(n_states, 4, seed=1000 + truth)
    rng = np.random.default_rng(2000 + truth)
    candidate_MD = rng.dirichlet(np.ones(N_DOMAINS), size=2000)
    equal_D = np.full(N_DOMAINS, 1 / N_DOMAINS)
    began = time.perf_counter()
    estimator = None if name == "equal" else make_estimator(name, truth).fit(runs)
    seconds = time.perf_counter() - began
    regrets, covered = [], []
    for state_DP in pool.draw_states(20, rng):
        true_M = pool.expected_outcome(state_DP, candidate_MD) @ WEIGHTS_T
        chosen_D = equal_D
        if estimator is not None:
            gain = estimator.gain(state_DP, candidate_MD, equal_D)
            correlation_TT = estimator.task_correlation_TT * np.outer(WEIGHTS_T, WEIGHTS_T)
            variance_M = np.einsum("mt,tu,mu->m", gain.se_MT, correlation_TT, gain.se_MT)
            bound_M = gain.mean_MT @ WEIGHTS_T - np.sqrt(
                np.nan_to_num(np.clip(variance_M, 0, None))
            )
            chosen_D = candidate_MD[np.argsort(bound_M)[-24:]].mean(axis=0)
            true_MT = pool.expected_gain(state_DP, candidate_MD[:50], equal_D)
            if np.isfinite(gain.se_MT).all():
                covered.append(np.abs(true_MT - gain.mean_MT[:50]) <= Z90 * gain.se_MT[:50])
        reached = float((pool.expected_outcome(state_DP, chosen_D) @ WEIGHTS_T)[0])
        regrets.append((true_M.max() - reached) / true_M.std())
    return {
        "estimator": name,
        "regret": float(np.mean(regrets)),
        "coverage_90": float(np.mean(covered)) if covered else None,
        "fit_seconds": seconds,
    }


def main(arguments: list[str]) -> None:
    """Print the table, means over truths with the standard error of the regret."""
    n_states = int(arguments[0]) if arguments else 34
    n_truths = int(arguments[1]) if len(arguments) > 1 else 5
    names = arguments[2:] or ["equal", *ESTIMATOR_NAMES]
    rows = [measure(name, n_states, truth) for name in names for truth in range(n_truths)]
    table = (
        pl.DataFrame(rows, schema_overrides={"coverage_90": pl.Float64})
        .group_by("estimator", maintain_order=True)
        .agg(
            pl.col("regret").mean(),
            (pl.col("regret").std() / np.sqrt(n_truths)).alias("regret_se"),
            pl.col("coverage_90").mean(),
            pl.col("fit_seconds").mean(),
        )
    )
    print(f"{4 * n_states} runs in {n_states} states, {n_truths} truths")
    with pl.Config(tbl_rows=20, float_precision=3, tbl_hide_dataframe_shape=True):
        print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
