"""The sensor that starts what the conditions forgot.

A condition counts a change as handled once its asset is made: a change that comes while the asset
is being made is lost, and so is one whose run failed. This sensor asks what is stale, as the daily
schedule does. It acts only where nothing ran and nothing changed for a few looks, and once for each
state of the inputs, so it never races the conditions and never repeats a run that fails.
"""

import hashlib
import json
from collections.abc import Callable

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

from causalmix_pipeline.automation.conditions import LIVE_SIDE
from causalmix_pipeline.automation.jobs import refresh_job
from causalmix_pipeline.automation.staleness import (
    Staleness,
    failed_check_above,
    lineage,
    newest_event,
    stale_assets,
)
from causalmix_pipeline.resources.asset_keys import is_own_run
from causalmix_pipeline.resources.instance import OPEN
from causalmix_pipeline.resources.live_pools import live_pools
from causalmix_pipeline.resources.settings import Settings

#: Of backfills at work. The conditions ask for two pools at once by a backfill.
_OPEN_BACKFILL = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]

#: Looks in a row at which the same must be stale.
LOOKS = 3

#: Tag of a run that makes one partition.
PARTITION_TAG = "dagster/partition"


def look_for_stale(
    instance: dg.DagsterInstance, settings: Settings, defs: dg.Definitions, cursor: str | None
) -> dg.SensorResult:
    """Look once; ask for a refresh of each pool for which the same has been stale for long enough.

    Only what is stale for certain is asked for: the conditions follow from there, as far as content
    changes.

    Args:
        instance: keeps runs and what was made.
        settings: the live pools.
        defs: the definitions.
        cursor: what the last look left, or None.

    Returns:
        A run for each such pool, or why there is none; the new cursor.
    """
    graph, before, seen, requests = defs.resolve_asset_graph(), _read(cursor), {}, []
    if _is_backfill_open(instance, graph):
        return dg.SensorResult(skip_reason="A backfill is at work.", cursor=cursor)
    at_work = instance.get_runs(dg.RunsFilter(statuses=list(OPEN)))
    own = [run for run in at_work if is_own_run(settings, run)]
    told = ["Nothing is stale."]
    for pool in live_pools(settings):
        if any(run.tags.get(PARTITION_TAG, pool.name) == pool.name for run in own):
            told.append("A run is at work.")
            continue
        found = stale_assets(defs, instance, LIVE_SIDE, pool=pool.name)
        keys = found.wave(lineage(defs))
        if not keys:
            continue
        obstacle = _obstacle(instance, defs, keys, pool.name)
        if obstacle:
            told.append(obstacle)
            continue
        told.append("Something is stale; the conditions come first.")
        state = _state(instance, graph, found, pool.name)
        seen[state] = before.get(state, 0) + 1
        if seen[state] == LOOKS:
            requests.append(
                dg.RunRequest(run_key=state, asset_selection=keys, partition_key=pool.name)
            )
    return dg.SensorResult(
        requests, skip_reason=None if requests else told[-1], cursor=json.dumps(seen)
    )


def _is_backfill_open(instance: dg.DagsterInstance, graph: BaseAssetGraph) -> bool:
    """Whether a backfill makes some of these assets; its runs start half a minute later."""
    found = instance.get_backfills(BulkActionsFilter(statuses=_OPEN_BACKFILL))
    return any(graph.has(key) for backfill in found for key in backfill.asset_selection or ())


def _obstacle(
    instance: dg.DagsterInstance, defs: dg.Definitions, keys: list[dg.AssetKey], pool: str | None
) -> str | None:
    """Why stale assets can't be made now, if there is a reason that a person must see to."""
    graph = defs.resolve_asset_graph()
    live = LIVE_SIDE.resolve(graph)
    outside = {parent for key in live for parent in graph.get(key).parent_keys} - live
    if not all(newest_event(instance, graph, key, pool) for key in outside):
        return "The experiment isn't done."
    experiment = stale_assets(defs, instance, dg.AssetSelection.groups("experiment", "effects"))
    stale = {key.path[-1] for key in (*experiment.reasons, *experiment.maybe)}
    if "cate_model" in stale:
        return "The effect model is stale: see `causalmix status`."
    failed = failed_check_above(instance, graph, keys, pool)
    return failed and f"The check {failed.name} of {failed.asset_key.path[-1]} failed."


def _state(
    instance: dg.DagsterInstance, graph: BaseAssetGraph, found: Staleness, pool: str | None
) -> str:
    """What is stale and of which inputs; 16 hex digits, others after each event of an input.

    Inputs that are themselves stale don't count: making them again and again is no change.
    """
    stale = {*found.reasons, *found.maybe}
    rows = [
        [key.to_user_string(), reason]
        + [
            newest_event(instance, graph, one, pool)
            for one in sorted(graph.get(key).parent_keys - stale)
        ]
        for key, reason in found.reasons.items()
    ]
    return hashlib.sha256(json.dumps([pool, rows]).encode()).hexdigest()[:16]


def _read(cursor: str | None) -> dict[str, int]:
    """Looks at which each state was seen; none if the cursor is damaged."""
    try:
        return {str(state): int(looks) for state, looks in json.loads(cursor or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def make_catch_up_sensor(
    settings: Settings, get_defs: Callable[[], dg.Definitions]
) -> dg.SensorDefinition:
    """The sensor, which looks as often as the pool sensor does.

    Args:
        settings: the live pools.
        get_defs: returns the definitions the sensor is part of.
    """

    @dg.sensor(
        name="catch_up",
        job=refresh_job,
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Refreshes what is stale on the live side though nothing has run for a while: "
        "changes that came while their asset was being made. Trains no proxy.",
    )
    def catch_up(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return look_for_stale(context.instance, settings, get_defs(), context.cursor)

    return catch_up
