"""Small tables of runs with a known effect, and models fitted on them once."""

from functools import cache

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.tables import Model, fit

POOL = SyntheticPool.draw(3, 2, 2, seed=1)
RUNS = POOL.run_table(16, 4, noise=0.1, n_repeats=3, seed=4)
DOMAINS = list(RUNS.domains)
EQUAL_D = np.full(3, 1 / 3)
RATIOS = pl.DataFrame(
    {"run": RUNS.run_ids, **{d: RUNS.mixture_ND[:, i] for i, d in enumerate(DOMAINS)}}
)
#: Task 0 as a loss, task 1 as a score.
METRICS = pl.DataFrame(
    {"run": RUNS.run_ids, "loss": 9 - RUNS.outcome_NT[:, 0], "score": RUNS.outcome_NT[:, 1]}
)


def state_columns(state_NDP):
    flat_NC = np.asarray(state_NDP).reshape(len(state_NDP), -1)
    return {name: flat_NC[:, c] for c, name in enumerate(RUNS.covariate_columns)}


COVARIATES = pl.DataFrame({"run": RUNS.run_ids, **state_columns(RUNS.state_NDP)})
STATES = POOL.draw_states(5, np.random.default_rng(3)) * 0.5
POOLS = pl.DataFrame({"pool": list("abcde"), **state_columns(STATES)})
TOKENS = POOLS.with_columns(
    pl.lit(tokens).alias(f"{d}__tokens") for d, tokens in zip(DOMAINS, (1e6, 2e6, 5e6), strict=True)
)


@cache
def ridge_model() -> Model:
    """With covariates, by an estimator that is quick."""
    return fit(RATIOS, METRICS, COVARIATES, maximize=["score"], estimator="structured_ridge")


@cache
def blind_model() -> Model:
    """Without covariates, chosen by `auto`."""
    return fit(RATIOS, METRICS, maximize=["score"])


def shares(frame):
    return frame.select(DOMAINS).to_numpy()
