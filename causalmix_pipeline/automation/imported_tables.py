"""Tables of `imported_runs`: watched, and a change taken into the effect model without training.

All of it is there only where the settings import something. The sensor looks at the files as the
pool sensor does. Once a change is quiet it reports an observation of `imported_tables`, which makes
`imported_runs` stale, and then starts the job `use_imported_runs`, which trains nothing; the live
side follows by its conditions. It waits while a run of the experiment side goes on, and while
something else on that side is stale: a person is then in the middle of an experiment, whose next
run reads the tables anyway.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from causalmix_pipeline.adapters.task_files import file_digest
from causalmix_pipeline.assets.imported import make_imported_runs
from causalmix_pipeline.automation.jobs import EXPERIMENT_SIDE
from causalmix_pipeline.automation.sensors import Seen
from causalmix_pipeline.automation.staleness import stale_assets
from causalmix_pipeline.resources.asset_keys import asset_key, assets_named, is_own_run
from causalmix_pipeline.resources.instance import OPEN
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG, observed_version
from causalmix_pipeline.resources.settings import Settings

#: Without a project's name in front; see `asset_key`.
IMPORTED_TABLES = dg.AssetKey("imported_tables")
IMPORTED_RUNS = dg.AssetKey("imported_runs")

#: What a table reaches on the experiment side; none of it trains a proxy.
REACHED = ("imported_runs", "run_table", "cate_model", "cate_checks", "cate_interpretation")

use_imported_runs_job = dg.define_asset_job(
    "use_imported_runs",
    selection=assets_named(*REACHED),
    description="Reads the imported tables again and fits the effects; trains no proxy.",
)


def table_specs(settings: Settings) -> list[dg.AssetSpec]:
    """The asset that stands for all tables; none where the settings import nothing."""
    if not settings.imported_runs:
        return []
    return [
        dg.AssetSpec(
            asset_key(settings, IMPORTED_TABLES),
            group_name="experiment",
            kinds={"file"},
            description="The tables of runs made elsewhere that `imported_runs` in the settings "
            "names. A sensor observes their content; a change reaches the effect model and the "
            "recommendation, and trains no proxy.",
        )
    ]


def with_tables(asset: dg.AssetsDefinition, settings: Settings) -> dg.AssetsDefinition:
    """The asset; `imported_runs` depends on the tables where there are any."""
    if not settings.imported_runs or asset_key(settings, IMPORTED_RUNS) not in asset.keys:
        return asset
    # Dagster 1.13 can't add a dependency to an asset that takes values as inputs.
    return make_imported_runs([asset_key(settings, IMPORTED_TABLES)], settings.project)


def table_paths(settings: Settings) -> dict[str, Path]:
    """Path of each table, by the field that names it."""
    return {
        f"imported_runs[{i}].{name}": settings.resolve(getattr(entry, name))
        for i, entry in enumerate(settings.imported_runs)
        for name in ("ratios", "metrics", "covariates")
    }


def tables_stat(settings: Settings) -> str:
    """A cheap fingerprint of sizes and times of the tables; 16 hex digits.

    Raises:
        FileNotFoundError: if a table isn't there.
    """
    digest = hashlib.sha256()
    for field, path in table_paths(settings).items():
        stat = os.stat(path)
        digest.update(f"{field}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}".encode())
    return digest.hexdigest()[:16]


def tables_version(settings: Settings) -> str:
    """A fingerprint of the content of the tables; 16 hex digits.

    Raises:
        FileNotFoundError: if a table isn't there.
    """
    digest = hashlib.sha256()
    for field, path in table_paths(settings).items():
        content = file_digest(path)
        if content is None:
            raise FileNotFoundError(2, os.strerror(2), str(path))
        digest.update(f"{field}\0{content}\0".encode())
    return digest.hexdigest()[:16]


def make_table_observation(settings: Settings, version: str) -> dg.AssetObservation:
    """Say what the tables hold now."""
    sizes = [path.stat().st_size for path in table_paths(settings).values()]
    return dg.AssetObservation(
        asset_key(settings, IMPORTED_TABLES),
        tags={DATA_VERSION_TAG: version},
        metadata={"files": len(sizes), "megabytes": round(sum(sizes) / 1e6, 3)},
    )


def observe_tables(instance: dg.DagsterInstance, settings: Settings) -> bool:
    """Report an observation of the tables if their content is new; tell whether it was.

    A table that isn't there reports nothing: the run that reads it says so.
    """
    if not settings.imported_runs:
        return False
    try:
        version = tables_version(settings)
        if version == observed_version(instance, asset_key(settings, IMPORTED_TABLES)):
            return False
        instance.report_runless_asset_event(make_table_observation(settings, version))
    except FileNotFoundError:
        return False
    return True


def look_at_tables(
    instance: dg.DagsterInstance,
    settings: Settings,
    get_defs: Callable[[], dg.Definitions],
    cursor: str | None,
    now: float,
) -> dg.SensorResult:
    """Look at the tables once: report what is new and quiet, and at a later look start the job.

    Args:
        instance: keeps observations and runs.
        settings: where the tables are, and how long they must have been quiet.
        get_defs: returns the definitions, for what is stale.
        cursor: what the last look left, or None.
        now: seconds since 1970.

    Returns:
        At most an observation or a run; why there is none; the new cursor.
    """
    seen, waiting = _read(cursor)
    try:
        stat = tables_stat(settings)
        seen.look(stat, now, settings.automation.sensor_interval_seconds)
        if stat != seen.done:
            return _look_closer(instance, settings, seen, waiting, now)
    except FileNotFoundError as error:
        return _skip(f"{error.filename} isn't there; the runs imported last stay.", seen, waiting)
    if waiting is None:
        return _skip("The tables are as before.", seen, None)
    found = stale_assets(get_defs(), instance, EXPERIMENT_SIDE)
    imported = asset_key(settings, IMPORTED_RUNS)
    if imported not in found.reasons:
        return _skip("The tables were read meanwhile.", seen, None)
    others = sorted(key.to_user_string() for key in found.reasons if key != imported)
    if others:
        told = f"{', '.join(others)} must be made first; the job experiment then reads the tables."
        return _skip(told, seen, waiting)
    busy = _run_at_work(instance, settings, get_defs())
    if busy is not None:
        return _skip(f"Run {busy} is at work on the experiment side.", seen, waiting)
    return dg.SensorResult([dg.RunRequest(run_key=waiting)], cursor=_write(seen, None))


def _look_closer(
    instance: dg.DagsterInstance, settings: Settings, seen: Seen, waiting: str | None, now: float
) -> dg.SensorResult:
    """Read tables that changed, once they were quiet."""
    wait = settings.automation.quiet_seconds - seen.quiet
    if wait > 0:
        told = f"The tables changed; they are read once quiet, in {wait} s at the least."
        return _skip(told, seen, waiting)
    version = tables_version(settings)
    if tables_stat(settings) != seen.stat:
        seen.stat = ""
        return _skip("The tables changed while they were read.", seen, waiting)
    seen.done = seen.stat
    # The time, since tables may become what they were, and a run key is used once.
    waiting = f"{version}-{int(now)}"
    if version == observed_version(instance, asset_key(settings, IMPORTED_TABLES)):
        # A command may have observed it first; the next look sees whether it was also read.
        return _skip("The same content as was observed last.", seen, waiting)
    event = make_table_observation(settings, version)
    return dg.SensorResult(asset_events=[event], cursor=_write(seen, waiting))


def _run_at_work(
    instance: dg.DagsterInstance, settings: Settings, defs: dg.Definitions
) -> str | None:
    """A run that makes something of the experiment side, or whose job doesn't say what."""
    keys = EXPERIMENT_SIDE.resolve(defs.resolve_asset_graph())
    for run in instance.get_runs(dg.RunsFilter(statuses=list(OPEN))):
        if not is_own_run(settings, run):
            continue
        if run.asset_selection is None or run.asset_selection & keys:
            return run.run_id
    return None


def _skip(reason: str, seen: Seen, waiting: str | None) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=reason, cursor=_write(seen, waiting))


def _write(seen: Seen, waiting: str | None) -> str:
    return json.dumps({"seen": asdict(seen), "waiting": waiting})


def _read(cursor: str | None) -> tuple[Seen, str | None]:
    """What the last look left; nothing if it's damaged."""
    try:
        content = json.loads(cursor or "")
        return Seen(**content["seen"]), content["waiting"]
    except (ValueError, TypeError, KeyError):
        return Seen(), None


def table_sensors(
    settings: Settings, get_defs: Callable[[], dg.Definitions]
) -> list[dg.SensorDefinition]:
    """The sensor that watches the tables; none where the settings import nothing.

    Args:
        settings: where the tables are, and how often they are looked at.
        get_defs: returns the definitions the sensor is part of.
    """
    if not settings.imported_runs:
        return []

    @dg.sensor(
        name="imported_tables_sensor",
        job=use_imported_runs_job,
        minimum_interval_seconds=settings.automation.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Takes changed tables of imported runs into the effect model once they have "
        "been quiet and nothing else on the experiment side is stale; never a proxy run.",
    )
    def imported_tables_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return look_at_tables(context.instance, settings, get_defs, context.cursor, time.time())

    return [imported_tables_sensor]


def table_jobs(settings: Settings) -> list[dg.JobDefinition]:
    """The job that the sensor starts; none where the settings import nothing."""
    return [use_imported_runs_job] if settings.imported_runs else []  # pyright: ignore[reportReturnType]
