"""Jobs, and the daily schedule that refreshes what the sensor may have missed."""

import dagster as dg

from causalmix_pipeline.automation.conditions import LIVE_SIDE
from causalmix_pipeline.automation.staleness import stale_assets
from causalmix_pipeline.resources.observation import (
    EXPERIMENT_POOL,
    LIVE_POOL,
    observe_pool,
)
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: From the pinned pool to the effect model: what proxy compute is spent on.
COVARIATE_CHOICE = dg.AssetSelection.assets("covariate_choice")

EXPERIMENT_SIDE = dg.AssetSelection.groups("experiment", "effects") - COVARIATE_CHOICE

VALIDATION = dg.AssetSelection.assets("validation_runs")

experiment_job = dg.define_asset_job(
    "experiment",
    selection=EXPERIMENT_SIDE,
    description="Trains the proxy runs that are missing and fits the effects.",
)
refresh_job = dg.define_asset_job(
    "refresh",
    selection=LIVE_SIDE,
    description="Profiles the live pool and recommends a mixture; trains no proxy.",
)
choose_covariates_job = dg.define_asset_job(
    "choose_covariates",
    selection=COVARIATE_CHOICE,
    description="Tries subsets of the covariates on the proxy runs at hand; trains no proxy.",
)
validate_job = dg.define_asset_job(
    "validate",
    selection=VALIDATION,
    description="Trains a larger model on the recommended mixture and on each baseline.",
)


@dg.op(description="Records the content of pools.experiment as the new experiment pool.")
def adopt_pool(context: dg.OpExecutionContext, project: dg.ResourceParam[Project]) -> None:
    """Observe the experiment pool."""
    new = observe_pool(context.instance, project.settings, EXPERIMENT_POOL)
    context.log.info("adopted" if new else "the experiment pool is the one adopted before")


@dg.job(
    description="Adopts the files in pools.experiment as the new experiment pool; every proxy run "
    "is then trained anew, so it's a decision about a budget."
)
def adopt_experiment_pool() -> None:
    """Adopt a new experiment pool."""
    adopt_pool()


def make_refresh_schedule(settings: Settings, get_defs) -> dg.ScheduleDefinition:
    """A daily look at the live pool that starts `refresh` for what is stale, and else nothing.

    Args:
        settings: where the pool is, and the hour.
        get_defs: returns the definitions the schedule is part of.
    """

    @dg.schedule(
        name="daily_refresh",
        job=refresh_job,
        cron_schedule=f"0 {settings.automation.refresh_hour} * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Once a day: whatever on the live side is stale.",
    )
    def daily_refresh(context: dg.ScheduleEvaluationContext):
        observe_pool(context.instance, settings, LIVE_POOL)
        found = stale_assets(get_defs(), context.instance, LIVE_SIDE)
        if not found.reasons:
            return dg.SkipReason("Nothing on the live side is stale.")
        keys = [*found.reasons, *found.maybe]
        return dg.RunRequest(asset_selection=keys)

    return daily_refresh
