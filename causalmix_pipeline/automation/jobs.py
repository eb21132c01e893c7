"""Jobs, and the daily schedule that refreshes what the sensor may have missed."""

import dagster as dg

from causalmix_pipeline.assets.top_ups import TOP_UP_TAG
from causalmix_pipeline.automation.conditions import LIVE_RUN_TAGS, LIVE_SIDE
from causalmix_pipeline.automation.staleness import stale_assets
from causalmix_pipeline.resources.asset_keys import assets_named
from causalmix_pipeline.resources.live_pools import live_pools, settle_partitions
from causalmix_pipeline.resources.observation import (
    EXPERIMENT_POOL,
    LIVE_POOL,
    observe_pool,
)
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: From the pinned pool to the effect model: what proxy compute is spent on.
COVARIATE_CHOICE = assets_named("covariate_choice")

EXPERIMENT_SIDE = dg.AssetSelection.groups("experiment", "effects") - COVARIATE_CHOICE

VALIDATION = assets_named("validation_runs")

RIVALS = assets_named("rivals")

#: What a top-up trains and reaches; the baselines rest on the experiment's own runs alone.
TOP_UP = assets_named("top_up_runs", "recommended_mixture", "training_export", "report")

#: Tag of the runs of jobs that train; `dagster.yaml` lets one of them run at a time.
TRAINS_TAG = "causalmix/trains"

experiment_job = dg.define_asset_job(
    "experiment",
    selection=EXPERIMENT_SIDE,
    tags={TRAINS_TAG: "yes"},
    description="Trains the proxy runs that are missing and fits the effects.",
)
refresh_job = dg.define_asset_job(
    "refresh",
    selection=LIVE_SIDE,
    tags=LIVE_RUN_TAGS,
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
    tags={TRAINS_TAG: "yes"},
    description="Trains a larger model on the recommended mixture and on each baseline.",
)
compare_job = dg.define_asset_job(
    "compare",
    selection=RIVALS,
    tags={TRAINS_TAG: "yes"},
    description="Trains the recommended mixture and its rivals on new pool states, at two sizes.",
)

top_up_job = dg.define_asset_job(
    "top_up",
    selection=TOP_UP,
    tags={TOP_UP_TAG: "yes", TRAINS_TAG: "yes"},
    description="Trains the top-up plan of the recommended mixture at the live pool's present "
    "state, if it has one, and recommends again.",
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
    """A daily look at the live pools that starts `refresh` for what is stale, and else nothing.

    Args:
        settings: where the pools are, and the hour.
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
        settle_partitions(context.instance, settings)
        problems: list[str] = []
        requests: list[dg.RunRequest] = []
        for pool in live_pools(settings):
            try:
                observe_pool(context.instance, settings, LIVE_POOL, pool.name)
            except Exception as error:  # storage fails in many ways; the other pools go on
                if pool.name is None:
                    raise
                problems.append(f"{pool.title} can't be read: {error}")
                context.log.warning(problems[-1])
                continue
            found = stale_assets(get_defs(), context.instance, LIVE_SIDE, pool=pool.name)
            if found.reasons:
                keys = [*found.reasons, *found.maybe]
                requests.append(dg.RunRequest(asset_selection=keys, partition_key=pool.name))
        return requests or dg.SkipReason(
            " ".join(["Nothing on the live side is stale.", *problems])
        )

    return daily_refresh
