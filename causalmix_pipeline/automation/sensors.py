"""The pool sensor: it looks at the live pools' folders and reports what changed; it starts no run.

A look is cheap while nothing changes: names, sizes and times of files. Only when these differ from
the last look, and have been quiet for a while, is the content read. How long a pool was quiet is
counted from look to look, an interval each at most, so no clock that jumps and no time of a file
makes it wait for ever or read too early. The cursor holds two hashes and two numbers a pool.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import dagster as dg
from dagster import SensorResult

from causalmix_pipeline.adapters.pool_files import pool_fingerprint
from causalmix_pipeline.automation.conditions import LIVE_RUN_TAGS, LIVE_SIDE
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.live_pools import LivePool, live_pools, settle_partitions
from causalmix_pipeline.resources.observation import (
    LIVE_POOL,
    make_observation,
    observed_version,
    pool_stat,
)
from causalmix_pipeline.resources.settings import Settings

#: Raised when the cursor means something else; one of another version counts as none.
CURSOR_VERSION = 2

#: Seconds of a look after which no further pool's content is read, but at the next look: Dagster
#: gives a look 60 s.
READ_SECONDS = 15.0


@dataclass
class Seen:
    """What the looks so far saw of a pool.

    Attributes:
        done: cheap fingerprint of the content that was read last.
        stat: cheap fingerprint at the last look.
        quiet: seconds for which it has been that, as far as looks tell.
        at: time of the last look, seconds since 1970.
    """

    done: str = ""
    stat: str = ""
    quiet: int = 0
    at: int = 0

    def look(self, stat: str, now: float, interval: int) -> None:
        """Count the time since the last look if the pool is as it was then."""
        passed = min(max(int(now) - self.at, 0), interval)
        self.quiet = self.quiet + passed if stat == self.stat else 0
        self.stat, self.at = stat, int(now)


def read_cursor(cursor: str | None) -> dict[str, Seen]:
    """What the last look left of each pool; nothing if it's damaged or of another version."""
    try:
        content = json.loads(cursor or "")
        if content["version"] != CURSOR_VERSION:
            return {}
        return {str(name): _seen(*row) for name, row in content["seen"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _seen(done: object, stat: object, quiet: object, at: object) -> Seen:
    if not (isinstance(done, str) and isinstance(stat, str)):
        raise ValueError(done, stat)
    if not (isinstance(quiet, int) and isinstance(at, int) and min(quiet, at) >= 0):
        raise ValueError(quiet, at)
    return Seen(done, stat, quiet, at)


def write_cursor(seen: Mapping[str, Seen]) -> str:
    """The cursor for the next look."""
    rows = [[name, list(asdict(one).values())] for name, one in seen.items()]
    return json.dumps({"version": CURSOR_VERSION, "seen": rows}, separators=(",", ":"))


def look_at_pools(
    instance: dg.DagsterInstance, settings: Settings, cursor: str | None, now: float
) -> tuple[SensorResult, list[str]]:
    """Look at each live pool once; report an observation of those whose content is new and quiet.

    A pool that can't be read doesn't stop the others.

    Args:
        instance: knows the newest observations, and the partitions.
        settings: where the pools are, and how long each must have been quiet.
        cursor: what the last look left, or None.
        now: seconds since 1970.

    Returns:
        At most one observation a pool, never a run; why there is none; the new cursor. Beside
        these, sentences that somebody should read.

    Raises:
        CausalMixError: if the only pool can't be read.
    """
    before, seen = read_cursor(cursor), {}
    problems, told, events = settle_partitions(instance, settings), [], []
    ends = time.monotonic() + READ_SECONDS
    for pool in live_pools(settings):
        key = pool.name or ""
        seen[key] = before.get(key, Seen())
        try:
            found = _look(instance, settings, pool, seen[key], now, ends)
        except Exception as error:  # storage fails in many ways; told, and tried at each look
            if pool.name is None:
                raise
            problems.append(f"{pool.title} can't be read: {error}")
            continue
        if isinstance(found, dg.AssetObservation):
            events.append(found)
        elif found:
            told.append(found)
    reason = " ".join([*problems, *told]) or "The live pool's files are as before."
    result = SensorResult(
        asset_events=events,
        skip_reason=None if events and not problems else reason,
        cursor=write_cursor(seen),
    )
    return result, problems


def _look(
    instance: dg.DagsterInstance,
    settings: Settings,
    pool: LivePool,
    seen: Seen,
    now: float,
    ends: float,
) -> dg.AssetObservation | str:
    """An observation of a pool, if it has new and quiet content, else what is to be said of it."""
    quiet, key = settings.automation.quiet_seconds, asset_key(settings, LIVE_POOL)
    try:
        stat = pool_stat(pool.location)
        seen.look(stat, now, settings.automation.sensor_interval_seconds)
        if stat == seen.done:
            return ""
        if seen.quiet < quiet:
            wait = quiet - seen.quiet
            return f"{pool.title} changed; it is read once it's quiet, in {wait} s at the least."
        if time.monotonic() > ends:
            return f"{pool.title} changed; it is read at the next look, others took long."
        version = pool_fingerprint(pool.location)
        is_whole = pool_stat(pool.location) == stat
    except FileNotFoundError:  # listed, and removed before it was opened
        is_whole = False
    if not is_whole:
        seen.stat = ""
        return f"{pool.title} changed while it was read; it is read once it's quiet."
    seen.done = stat
    if version == observed_version(instance, key, pool.name):
        return f"{pool.title}: files were written again with the same content."
    return make_observation(key, pool.location, version, pool.name)


def make_pool_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that watches the live pools, as often as the settings say."""

    @dg.sensor(
        name="live_pool_sensor",
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports a change of a live pool's content once it has been quiet. "
        "Starts no run.",
    )
    def live_pool_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        result, problems = look_at_pools(context.instance, settings, context.cursor, time.time())
        for problem in problems:
            context.log.warning(problem)
        return result

    return live_pool_sensor


def make_condition_sensor(settings: Settings) -> dg.AutomationConditionSensorDefinition:
    """The sensor that evaluates the conditions of the live side and starts its runs."""
    return dg.AutomationConditionSensorDefinition(
        name="live_side_sensor",
        target=LIVE_SIDE,
        run_tags=LIVE_RUN_TAGS,
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Re-materialises what is stale on the live side; never a proxy run.",
    )
