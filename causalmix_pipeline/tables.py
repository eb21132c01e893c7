"""Effects and recommendations from a table of runs: frames in, frames out; no Dagster, no proxies.

    model = fit(ratios, metrics, covariates)
    predict(model, ratios, covariates)
    recommend(model, pools)

    plan = plan_top_up(model, pools)    # a few further runs where pools are out of reach
    model = condition(model, plan, further_metrics, further_covariates)

Gains are weighted means over metrics in the metrics' own units, so metrics should have like units.
"""

from causalmix_pipeline.explained import explain, pool_state
from causalmix_pipeline.table_model import Model, TableSource, fit, predict
from causalmix_pipeline.table_recommendations import (
    Recommended,
    baselines,
    pareto,
    recommend,
    recommend_in_full,
)
from causalmix_pipeline.top_ups import condition, plan_top_up

__all__ = [
    "Model",
    "Recommended",
    "TableSource",
    "baselines",
    "condition",
    "explain",
    "fit",
    "pareto",
    "plan_top_up",
    "pool_state",
    "predict",
    "recommend",
    "recommend_in_full",
]
