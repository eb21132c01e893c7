"""Proxies of several sizes: the recipe of each run, the covariate, and whether sizes agree."""

import json
from collections.abc import Sequence
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import (
    SIZE_COVARIATE,
    at_trained_size,
    log2_parameters,
    nearest_size,
    sizes_of_states,
)
from causalmix_pipeline.core.size_agreement import SizeComparison, compare_sizes
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.settings import Settings

#: Fitted at one size to predict another: quick, and fixed beforehand.
COMPARED_BY = "structured_ridge"


def at_sizes(
    settings: Settings, specs: Sequence[ProxySpec], state_N: np.ndarray
) -> list[ProxySpec]:
    """The specs of a design, each at the size of its pool state.

    Args:
        settings: `proxy.sizes`; with none, the specs stay as they are.
        specs: of the recipe's own size.
        state_N: pool state of each.
    """
    if not settings.proxy.sizes:
        return list(specs)
    configs, shares = settings.proxy.size_configs(), [s.share for s in settings.proxy.sizes]
    size_M = sizes_of_states(int(state_N.max()) + 1, shares, seed=settings.design.seed)
    return [
        replace(spec, config=configs[size_M[state]])
        for spec, state in zip(specs, state_N, strict=True)
    ]


def with_sizes(
    settings: Settings, values_MDP: np.ndarray, mixture_design: pl.DataFrame
) -> np.ndarray:
    """Covariates of the design's states, and the size that each was trained at where it varies."""
    if not settings.proxy.sizes:
        return values_MDP
    config_of = dict(mixture_design.select("state_id", "config").iter_rows())
    size_M = np.array([size_of(config_of[state]) for state in range(len(values_MDP))])
    size_MD1 = np.broadcast_to(size_M[:, None, None], (*values_MDP.shape[:2], 1))
    return np.concatenate([values_MDP, size_MD1], axis=2)


def size_of(config: str) -> float:
    """Log2 parameters of the model of a recipe, which is JSON."""
    return log2_parameters(ProxyConfig(**json.loads(config)).n_parameters)


def with_target(settings: Settings, live_covariates: pl.DataFrame) -> pl.DataFrame:
    """Covariates of a live pool, and the size of the model to recommend for where it matters."""
    if not settings.proxy.sizes:
        return live_covariates
    return live_covariates.with_columns(pl.lit(settings.target_size).alias(SIZE_COVARIATE))


def top_up_config(mixture_design: pl.DataFrame, runs: RunTable, state_DP: np.ndarray) -> str:
    """The recipe of top-ups, as JSON: the design's; of several sizes the one they're planned at.

    Args:
        mixture_design: with the recipe of each run.
        runs: the run table.
        state_DP: the live pool's covariates, the size that is asked for among them.
    """
    configs = mixture_design["config"].unique(maintain_order=True).to_list()
    if SIZE_COVARIATE not in runs.covariates:
        return configs[0]
    column = runs.covariates.index(SIZE_COVARIATE)
    size = float(at_trained_size(runs, state_DP)[0, column])
    return configs[nearest_size([size_of(config) for config in configs], size)]


def make_size_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    """The check that effects hold across sizes; none where proxies have one size."""
    if not settings.proxy.sizes:
        return []

    @dg.asset_check(
        name="sizes_agree",
        asset=asset_key(settings, "run_table"),
        description="Mixtures that are better at one size of proxies are better at the others, "
        "and effects there are neither below half nor above twice as large.",
    )
    def sizes_agree(run_table: pl.DataFrame) -> dg.AssetCheckResult:
        """Mixtures rank alike at all sizes, and effects are of like size."""
        return size_check(RunTable.from_frame(run_table), settings)

    return [sizes_agree]


def size_check(runs: RunTable, settings: Settings) -> dg.AssetCheckResult:
    """Fit at one size, predict the others' contrasts within states; what can't be told fails."""
    weights_T = np.array([settings.task_weights.get(task, 0.0) for task in runs.tasks])
    weights_T = weights_T / weights_T.sum()
    try:
        found = compare_sizes(
            lambda: make_estimator(COMPARED_BY, settings.seed),
            runs,
            weights_T,
            seed=settings.seed,
        )
    except EstimationError as error:
        return dg.AssetCheckResult(
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"can't be told": str(error)},
        )
    asked = [one for one in found if one.task == "objective"]
    return dg.AssetCheckResult(
        passed=all(one.agrees for one in asked),
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "in short": " ".join(comparison_sentence(one) for one in asked),
            "sizes": markdown_table([comparison_row(one) for one in found]),
        },
    )


def comparison_sentence(one: SizeComparison) -> str:
    """How far the effects of one size hold at another."""
    return (
        f"Effects found at {2**one.fitted_at:,.0f} parameters are {one.ratio:.2f} ± "
        f"{one.ratio_se:.2f} times as large at {2**one.asked_at:,.0f}, and mixtures rank alike by "
        f"{one.agreement:.2f} (90%: {one.agreement_low:.2f} to {one.agreement_high:.2f}; "
        f"{one.agreement_same:.2f} at the first size itself)."
    )


def comparison_row(one: SizeComparison) -> dict:
    """A comparison as a row of a table."""
    return {
        "task": one.task,
        "fitted at": f"{2**one.fitted_at:,.0f}",
        "asked at": f"{2**one.asked_at:,.0f}",
        "states": one.n_states,
        "effect ratio": one.ratio,
        "± se": one.ratio_se,
        "rank agreement": one.agreement,
        "90%": f"{one.agreement_low:.2f} to {one.agreement_high:.2f}",
        "at the first size": one.agreement_same,
        "agree": "yes" if one.agrees else "no",
    }
