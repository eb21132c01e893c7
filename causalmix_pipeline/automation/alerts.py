"""Alerts: a failed run, a check that turned to failed, a verdict that turned for the worse.

Two sensors. `run_failure_alerts` hears of each failed run, `alerts` looks at the newest check
results and the newest recommendation. Both only write to `data/alerts.jsonl`; `alerts` also hands
over what waits there. Neither starts a run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value
from causalmix_pipeline.automation.partitions import OF_A_POOL
from causalmix_pipeline.automation.staleness import last_made
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.resources.alert_channels import AlertLog, deliver_waiting, now, plain
from causalmix_pipeline.resources.asset_keys import asset_key, is_own_run
from causalmix_pipeline.resources.frame_store import value_path
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG
from causalmix_pipeline.resources.settings import Settings

#: Verdicts that somebody must hear of, and what each means.
BAD_VERDICTS = {
    "extrapolating": "the live pool is beyond the pool states of the proxy runs, so gains are "
    "less sure",
    "unsupported": "the live pool is too far from the pool states of the proxy runs, so the "
    "reference mixture is kept",
}

#: Results of one check that a look reads: those since the last look, the one before, some to spare.
_RESULTS_READ = 20


def alert_log(settings: Settings) -> AlertLog:
    """The project's `alerts.jsonl`."""
    return AlertLog(settings.data_path / "alerts.jsonl")


def make_alert(
    settings: Settings,
    kind: str,
    key: str,
    summary: str,
    *,
    run_id: str | None,
    details: Mapping[str, Any],
    asset: str | None = None,
    check: str | None = None,
) -> dict[str, Any]:
    """An alert as it is written and sent; `kind` and `key` make the id that it has once."""
    return {
        "time": now(),
        "id": f"{kind}:{key}",
        "kind": kind,
        "summary": plain(summary),
        "run_id": run_id,
        "asset": asset,
        "check": check,
        "details": plain(details),
        "delivery": "waiting" if settings.alerts.is_on else "off",
    }


def run_alert(settings: Settings, run: dg.DagsterRun, message: str, steps: Mapping[str, str]):
    """The alert of a failed run.

    Args:
        settings: whether it is to be sent.
        run: the run.
        message: what Dagster says of the failure.
        steps: error of each failed step, by its name.
    """
    failed, pool = f" in {', '.join(steps)}" if steps else "", run.tags.get("dagster/partition")
    return make_alert(
        settings,
        "run_failure",
        run.run_id,
        f"Run {run.run_id} of {_job_name(run)}{_of(pool)} failed{failed}.",
        run_id=run.run_id,
        details={
            "job": _job_name(run),
            "assets": sorted(key.to_user_string() for key in run.asset_selection or ()),
            "message": message,
            "errors": dict(steps),
            **_named(pool),
        },
    )


def _job_name(run: dg.DagsterRun) -> str:
    return "a materialisation" if run.job_name.startswith("__") else run.job_name


def _error_of(event: dg.DagsterEvent) -> str:
    """What the user's code raised: Dagster wraps it."""
    error = event.step_failure_data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error is not None else "no error was kept"


def check_alerts(
    settings: Settings,
    instance: dg.DagsterInstance,
    checks: Iterable[dg.AssetCheckKey],
    seen: Mapping[str, int] | None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Find checks that turned to failed, or from a warning to an error.

    A check that failed before in the same way is told no second time.

    Args:
        settings: whether alerts are to be sent.
        instance: keeps the results.
        checks: what is looked at.
        seen: id of the newest result of each check at the last look; None at the first look, which
            alerts of nothing.

    Returns:
        The alerts, and the newest ids.
    """
    from dagster._core.event_api import PartitionKeyFilter
    from dagster._core.storage.asset_check_execution_record import (
        COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES as COMPLETED,
    )

    alerts: list[dict[str, Any]] = []
    newest: dict[str, int] = {}
    for key in sorted(checks, key=_name_of):
        for pool in settings.live_pools if key.asset_key.path[-1] in OF_A_POOL else [None]:
            name = _name_of(key, pool)
            records = instance.event_log_storage.get_asset_check_execution_history(
                key,
                limit=_RESULTS_READ,
                status=COMPLETED,
                partition_filter=None if pool is None else PartitionKeyFilter(key=pool),
            )
            newest[name] = records[0].id if records else 0
            if seen is not None:
                alerts += _turned(settings, records, pool, after=seen.get(name, 0))
    return alerts, newest


def _turned(
    settings: Settings, records: Sequence[Any], pool: str | None, *, after: int
) -> Iterator[dict[str, Any]]:
    """The alerts of results that are worse than the one before, newest results first."""
    before = ""
    for record in reversed(records):
        result = record.evaluation
        state = "" if result is None or result.passed else result.severity.value
        if state not in ("", before) and before != "ERROR" and record.id > after:
            yield _check_alert(settings, record.run_id, record.id, result, pool)
        before = state


def _name_of(key: dg.AssetCheckKey, pool: str | None = None) -> str:
    name = f"{key.asset_key.to_user_string()}/{key.name}"
    return name if pool is None else f"{name}@{pool}"


def _of(pool: str | None) -> str:
    """A live pool's name in a sentence; nothing with one pool."""
    return "" if pool is None else f" for the live pool {pool}"


def _named(pool: str | None) -> dict[str, str]:
    """A live pool's name in an alert's details; nothing with one pool."""
    return {} if pool is None else {"live_pool": pool}


def _check_alert(
    settings: Settings, run_id: str, number: int, result: Any, pool: str | None
) -> dict[str, Any]:
    asset = result.asset_key.to_user_string()
    severity = "an error" if result.severity == dg.AssetCheckSeverity.ERROR else "a warning"
    return make_alert(
        settings,
        "check_failure",
        f"{asset}/{result.check_name}:{run_id}:{number}",
        f"The check {result.check_name} of {asset} failed{_of(pool)}, {severity}.",
        run_id=run_id or None,
        asset=asset,
        check=result.check_name,
        details={
            "severity": result.severity.value,
            "description": result.description,
            "metadata": {label: value.value for label, value in result.metadata.items()},
            **_named(pool),
        },
    )


def verdict_alert(
    settings: Settings,
    instance: dg.DagsterInstance,
    seen: Mapping[str, Any] | None,
    pool: str | None = None,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Find out whether the verdict of a pool's newest recommendation turned for the worse.

    Args:
        settings: where the recommendation is stored, and whether alerts are to be sent.
        instance: keeps the materialisations.
        seen: `id` and `verdict` of the last look; None at the first, which alerts of nothing.
        pool: name of the live pool, where there are several.

    Returns:
        The alert, if there is one, and what was seen.
    """
    key = asset_key(settings, "recommended_mixture")
    record = last_made(instance, key, pool)
    if record is None or (seen and record.storage_id == seen["id"]):
        return None, dict(seen or {"id": 0, "verdict": None})
    event = record.asset_materialization
    assert event is not None
    told = event.metadata.get("verdict")
    verdict = None if told is None else str(told.value)
    found = {"id": record.storage_id, "verdict": verdict}
    before = seen["verdict"] if seen else verdict
    if verdict not in BAD_VERDICTS or verdict == before:
        return None, found
    details = _top_up(settings, (event.tags or {}).get(DATA_VERSION_TAG), pool)
    n_runs = len(details["top_up"] or ())
    offer = f"; the top-up plan has {n_runs} proxy runs that would settle it" if n_runs else ""
    alert = make_alert(
        settings,
        "verdict",
        f"{record.run_id}:{record.storage_id}",
        f"The verdict of {key.to_user_string()}{_of(pool)} turned from {before or 'none'} to "
        f"{verdict}: "
        f"{BAD_VERDICTS[verdict]}{offer}.",
        run_id=record.run_id or None,
        asset=key.to_user_string(),
        details={"before": before, "verdict": verdict} | _named(pool) | details,
    )
    return alert, found


def _top_up(settings: Settings, version: str | None, pool: str | None) -> dict[str, Any]:
    """The top-up plan of the recommendation of a data version, or why it can't be told."""
    try:
        key = asset_key(settings, "recommended_mixture")
        value = read_value(value_path(settings.assets_root, key, pool))
    except (OSError, PoolError) as error:
        return {"top_up": None, "top_up_missing": f"the recommendation can't be read: {error}"}
    if version is not None and content_digest(value) != version:
        return {"top_up": None, "top_up_missing": "a newer recommendation is being stored"}
    return {"overlap_score": value["overlap_score"], "top_up": value["top_up"]}


def _verdict_name(pool: str | None) -> str:
    """Under which the cursor keeps a pool's verdict."""
    return "verdict" if pool is None else f"verdict@{pool}"


def look_for_alerts(
    instance: dg.DagsterInstance,
    settings: Settings,
    checks: Iterable[dg.AssetCheckKey],
    cursor: str | None,
) -> tuple[str, str, list[str]]:
    """Look once: write what is new into `alerts.jsonl`, and hand over what waits there.

    Args:
        instance: keeps check results and materialisations.
        settings: where things are and who is told.
        checks: the checks that are looked at.
        cursor: what the last look left, or None.

    Returns:
        The new cursor; a sentence on what was found; a sentence for each alert that nobody got.
    """
    seen = json.loads(cursor) if cursor else {}
    log = alert_log(settings)
    found, newest = check_alerts(settings, instance, checks, seen.get("checks"))
    n_written = sum(log.write(alert) for alert in found)
    verdicts, new = {}, {"id": 0, "verdict": None} if seen else None
    for pool in settings.live_pools:
        name = _verdict_name(pool)
        turned, verdicts[name] = verdict_alert(settings, instance, seen.get(name, new), pool)
        n_written += turned is not None and log.write(turned)
    offset, problems = deliver_waiting(log, settings, seen.get("offset", 0))
    new_cursor = json.dumps({"checks": newest, **verdicts, "offset": offset})
    return new_cursor, f"New alerts: {n_written}.", problems


def make_run_failure_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that writes an alert for each failed run, the CLI's included."""

    @dg.run_failure_sensor(
        name="run_failure_alerts",
        minimum_interval_seconds=settings.alerts.interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        # A run of the CLI belongs to no code location.
        monitor_all_code_locations=True,
        description="Writes an alert into data/alerts.jsonl for each failed run. Starts no run.",
    )
    def run_failure_alerts(context: dg.RunFailureSensorContext) -> None:
        if not is_own_run(settings, context.dagster_run):
            return
        steps = {str(e.step_key): _error_of(e) for e in context.get_step_failure_events()}
        message = context.failure_event.message or ""
        alert_log(settings).write(run_alert(settings, context.dagster_run, message, steps))

    return run_failure_alerts


def make_alert_sensor(
    settings: Settings, get_checks: Callable[[], Iterable[dg.AssetCheckKey]]
) -> dg.SensorDefinition:
    """The sensor that looks at checks and the verdict, and hands over all alerts.

    Args:
        settings: where things are and who is told.
        get_checks: returns the checks of the definitions the sensor is part of.
    """

    @dg.sensor(
        name="alerts",
        minimum_interval_seconds=settings.alerts.interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Writes an alert into data/alerts.jsonl for each check that turned to failed "
        "and each verdict that turned for the worse, and hands all alerts to the webhook and the "
        "command of the settings. Starts no run.",
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor, told, problems = look_for_alerts(
            context.instance, settings, get_checks(), context.cursor
        )
        for problem in problems:
            context.log.warning(problem)
        return dg.SensorResult(skip_reason=" ".join([told, *problems]), cursor=cursor)

    return alerts
