"""The pool sensor: it looks at the live pool's folder and reports what changed; it starts no run.

A look is cheap while nothing changes: names, sizes and times of files. Only when these differ from
the last look, and have been quiet for a while, is the content read. The cursor holds two hashes.
"""

import json
import time

import dagster as dg

from causalmix_pipeline.adapters.pool_files import pool_fingerprint
from causalmix_pipeline.automation.conditions import LIVE_SIDE
from causalmix_pipeline.resources.observation import (
    LIVE_POOL,
    make_observation,
    observed_version,
    pool_stat,
)
from causalmix_pipeline.resources.settings import Settings


def look_at_pool(
    instance: dg.DagsterInstance, settings: Settings, cursor: str | None, now: float
) -> dg.SensorResult:
    """Look at the live pool once; report an observation if its content is new and quiet.

    Args:
        instance: knows the newest observation.
        settings: where the pool is, and how long it must have been quiet.
        cursor: what the last look left, or None.
        now: seconds since 1970.

    Returns:
        At most one observation, never a run; why there is none; the new cursor.
    """
    location, quiet = settings.live_path, settings.automation.quiet_seconds
    seen = json.loads(cursor) if cursor else {}
    stat, newest = pool_stat(location)
    if stat == seen.get("done"):
        return dg.SensorResult(skip_reason="The live pool's files are as before.", cursor=cursor)
    if stat != seen.get("stat"):
        seen = {"done": seen.get("done"), "stat": stat, "since": int(now)}
    # A copied file keeps an old time and a clock may run ahead: both the files and the looks count.
    wait = quiet - min(now - min(newest, now), now - seen["since"])
    if wait > 0:
        reason = f"The live pool changed; it is read once it's quiet, in {wait:.0f} s at the least."
        return dg.SensorResult(skip_reason=reason, cursor=json.dumps(seen))
    version = pool_fingerprint(location)
    done = json.dumps({"done": stat})
    if version == observed_version(instance, LIVE_POOL):
        return dg.SensorResult(
            skip_reason="Files were written again with the same content.", cursor=done
        )
    return dg.SensorResult(
        asset_events=[make_observation(LIVE_POOL, location, version)], cursor=done
    )


def make_pool_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that watches the live pool, as often as the settings say."""

    @dg.sensor(
        name="live_pool_sensor",
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports a change of the live pool's content once it has been quiet. "
        "Starts no run.",
    )
    def live_pool_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return look_at_pool(context.instance, settings, context.cursor, time.time())

    return live_pool_sensor


def make_condition_sensor(settings: Settings) -> dg.AutomationConditionSensorDefinition:
    """The sensor that evaluates the conditions of the live side and starts its runs."""
    return dg.AutomationConditionSensorDefinition(
        name="live_side_sensor",
        target=LIVE_SIDE,
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Re-materialises what is stale on the live side; never a proxy run.",
    )
