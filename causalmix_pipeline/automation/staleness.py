"""Which assets are stale, and materialising just these, in this process, with early cut-off.

An asset is stale when it was never made, its code or settings changed (code version), or an input
has another data version than the one it was made from. What lies below a stale asset is only
perhaps stale: it waits until the asset is made, and stays as it is if the content didn't change.

Where there are several live pools, all this is asked of one of them, by its name.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.storage.asset_check_execution_record import (
    COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES as COMPLETED,
)

from causalmix_pipeline.resources.instance import PROCESS_TAG, process_tag
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG, observed_version

CODE_VERSION_TAG = "dagster/code_version"
INPUT_VERSION_TAG = "dagster/input_data_version/"
INPUT_EVENT_TAG = "dagster/input_event_pointer/"

#: Runs made here tell their events to a function; the console would get hundreds of lines.
QUIET_CONSOLE = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}

EventHandler = Callable[[dg.EventLogEntry], None]


@dataclass(frozen=True)
class Staleness:
    """Which assets must be made again, why, and which may have to be.

    Attributes:
        reasons: why each asset is stale, in a few words, in the order of the lineage.
        maybe: assets below a stale one, whose own inputs haven't changed so far.
    """

    reasons: dict[dg.AssetKey, str]
    maybe: frozenset[dg.AssetKey]

    def wave(self, parents: Mapping[dg.AssetKey, frozenset[dg.AssetKey]]) -> list[dg.AssetKey]:
        """The stale assets that can be made now: nothing above them is only perhaps stale."""
        chosen: list[dg.AssetKey] = []
        blocked = set(self.maybe)
        for key in self.reasons:
            if parents[key] & blocked:
                blocked.add(key)
            else:
                chosen.append(key)
        return chosen


def lineage(defs: dg.Definitions) -> dict[dg.AssetKey, frozenset[dg.AssetKey]]:
    """The inputs of each asset, external ones included, inputs before what uses them."""
    graph = defs.resolve_asset_graph()
    return {key: frozenset(graph.get(key).parent_keys) for key in graph.toposorted_asset_keys}


def stale_assets(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    selection: dg.AssetSelection | None = None,
    *,
    pool: str | None = None,
) -> Staleness:
    """Find what is stale within a selection (None: all), without running anything.

    Args:
        defs: the definitions.
        instance: keeps what was made.
        selection: assets outside of it count as they are.
        pool: name of the live pool that partitioned assets are looked at for; None passes over
            these.
    """
    graph, parents = defs.resolve_asset_graph(), lineage(defs)
    chosen = set(parents) if selection is None else set(selection.resolve(graph))
    reasons: dict[dg.AssetKey, str] = {}
    maybe: set[dg.AssetKey] = set()
    for key in parents:
        if key not in chosen or not graph.get(key).is_materializable:
            continue
        if pool is None and graph.get(key).is_partitioned:
            continue
        reason = _why_stale(instance, graph, key, pool)
        if reason:
            reasons[key] = reason
        elif parents[key] & (maybe | set(reasons)):
            maybe.add(key)
    return Staleness(reasons, frozenset(maybe))


def last_made(
    instance: dg.DagsterInstance, key: dg.AssetKey, pool: str | None, *, until: int | None = None
) -> dg.EventLogRecord | None:
    """The newest materialisation of an asset, or None.

    Args:
        instance: keeps the materialisations.
        key: the asset.
        pool: its partition; None for an asset without partitions.
        until: storage id of the newest event that counts.
    """
    records = dg.AssetRecordsFilter(
        key,
        asset_partitions=None if pool is None else [pool],
        before_storage_id=None if until is None else until + 1,
    )
    found = instance.fetch_materializations(records, limit=1).records
    # What was made while it had partitions isn't there for an asset that has none.
    return found[0] if found and found[0].partition_key == pool else None


def newest_event(
    instance: dg.DagsterInstance, graph: BaseAssetGraph, key: dg.AssetKey, pool: str | None
) -> int:
    """Storage id of the newest materialisation or observation of an asset; 0 for none."""
    of = pool if graph.get(key).is_partitioned else None
    made = last_made(instance, key, of)
    wanted = dg.AssetRecordsFilter(key, asset_partitions=None if of is None else [of])
    observed = instance.fetch_observations(wanted, limit=1).records
    return max(made.storage_id if made else 0, observed[0].storage_id if observed else 0)


def failed_check_above(
    instance: dg.DagsterInstance,
    graph: BaseAssetGraph,
    keys: Iterable[dg.AssetKey],
    pool: str | None,
) -> dg.AssetCheckKey | None:
    """A blocking check that failed last, of an input that isn't itself among the assets.

    Within a run Dagster stops below such a check; a run of what is below alone it lets go on.
    """
    chosen = set(keys)
    inputs = {parent for key in chosen for parent in graph.get(key).parent_keys} - chosen
    for check in sorted({c for key in inputs for c in graph.get(key).check_keys}, key=str):
        if not graph.get(check).blocking:
            continue
        of = pool if graph.get(check).partitions_def else None
        records = instance.event_log_storage.get_asset_check_execution_history(
            check,
            limit=1,
            status=COMPLETED,
            partition_filter=None if of is None else PartitionKeyFilter(key=of),
        )
        result = records[0].evaluation if records else None
        if result and not result.passed and result.severity == dg.AssetCheckSeverity.ERROR:
            return check
    return None


def _tags(
    instance: dg.DagsterInstance,
    key: dg.AssetKey,
    pool: str | None = None,
    *,
    until: int | None = None,
) -> Mapping[str, str] | None:
    record = last_made(instance, key, pool, until=until)
    return None if record is None else getattr(record.asset_materialization, "tags", None) or {}


def _version(
    instance: dg.DagsterInstance, key: dg.AssetKey, pool: str | None, *, until: int | None = None
) -> str | None:
    tags = _tags(instance, key, pool, until=until)
    if tags is None:
        return observed_version(instance, key, pool, until=until)
    return tags.get(DATA_VERSION_TAG)


def _why_stale(
    instance: dg.DagsterInstance, graph: BaseAssetGraph, key: dg.AssetKey, pool: str | None
) -> str | None:
    node = graph.get(key)
    tags = _tags(instance, key, pool if node.is_partitioned else None)
    if tags is None:
        return "never made"
    if node.code_version and tags.get(CODE_VERSION_TAG) != node.code_version:
        return "code or settings changed"
    for parent in sorted(node.parent_keys):
        of = pool if graph.get(parent).is_partitioned else None
        now = _version(instance, parent, of)
        if now is not None and now != _made_from(instance, tags, parent, of):
            return f"{parent.to_user_string()} changed"
    return None


def _made_from(
    instance: dg.DagsterInstance, tags: Mapping[str, str], parent: dg.AssetKey, pool: str | None
) -> str | None:
    """The version of an input that an asset was made from.

    Of a partitioned input Dagster keeps no version, but which event was its newest then.
    """
    if pool is None:
        return tags.get(INPUT_VERSION_TAG + parent.to_user_string())
    newest = tags.get(INPUT_EVENT_TAG + parent.to_user_string(), "")
    return _version(instance, parent, pool, until=int(newest)) if newest.isdigit() else None


def materialise(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    keys: Iterable[dg.AssetKey],
    *,
    pool: str | None = None,
    tags: Mapping[str, str] | None = None,
    on_event: EventHandler | None = None,
    raise_on_error: bool = True,
) -> dg.ExecuteInProcessResult:
    """Materialise assets in this process as one Dagster run that the UI shows.

    Args:
        defs: the definitions.
        instance: where the run is recorded.
        keys: what to materialise, checks included.
        pool: name of the live pool that partitioned assets are made for.
        tags: more tags of the run.
        on_event: called with each log entry of the run within half a second, in another thread.
        raise_on_error: whether a failing step's error is raised.
    """
    run_id = str(uuid.uuid4())
    job = defs.resolve_implicit_global_asset_job_def()
    follower = _Follower(instance, run_id, on_event) if on_event else None
    try:
        return job.execute_in_process(
            run_config=QUIET_CONSOLE,
            instance=instance,
            asset_selection=list(keys),
            partition_key=pool,
            run_id=run_id,
            tags={PROCESS_TAG: process_tag(), **(tags or {})},
            raise_on_error=raise_on_error,
        )
    finally:
        if follower:
            follower.stop()


class _Follower:
    """Hands the log entries of a run to a function, in the order they were written."""

    def __init__(self, instance: dg.DagsterInstance, run_id: str, on_event: EventHandler):
        self._instance, self._run_id, self._on_event = instance, run_id, on_event
        self._cursor: str | None = None
        self._error: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            while not self._ended.wait(0.3):
                self._read()
            self._read()
        except Exception as error:  # raised again where the caller can see it
            self._error = error

    def _read(self) -> None:
        while True:
            batch = self._instance.get_records_for_run(self._run_id, self._cursor, limit=500)
            for record in batch.records:
                self._on_event(record.event_log_entry)
            self._cursor = batch.cursor
            if not batch.has_more:
                return

    def stop(self) -> None:
        """Wait for the last entries.

        Raises:
            Exception: what the function raised, if it did.
        """
        self._ended.set()
        self._thread.join()
        if self._error:
            raise self._error


def refresh(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    selection: dg.AssetSelection,
    *,
    pool: str | None = None,
    tags: Mapping[str, str] | None = None,
    on_event: EventHandler | None = None,
    on_wave: Callable[[dict[dg.AssetKey, str]], None] | None = None,
) -> list[dg.AssetKey]:
    """Materialise what is stale within a selection, in waves, until nothing is.

    Each wave is one run of all assets known to be stale. An asset below them joins a later wave
    only if one of its inputs got other content.

    Args:
        defs: the definitions.
        instance: where the runs are recorded.
        selection: the assets that may be materialised.
        pool: name of the live pool that partitioned assets are made for; None passes over these.
        tags: more tags of the runs.
        on_event: as for `materialise`.
        on_wave: called before each wave with its assets and why each is stale.

    Returns:
        The assets that were materialised, in order.

    Raises:
        RuntimeError: if an asset is stale again right after it was made.
    """
    parents, made = lineage(defs), []
    while True:
        found = stale_assets(defs, instance, selection, pool=pool)
        wave = found.wave(parents)
        if not wave:
            return made
        again = set(wave) & set(made)
        if again:
            names = ", ".join(sorted(key.to_user_string() for key in again))
            raise RuntimeError(
                f"{names} must not be stale right after being made, but is "
                f"({found.reasons[min(again)]}): an input changed meanwhile, so run it again"
            )
        if on_wave:
            on_wave({key: found.reasons[key] for key in wave})
        materialise(defs, instance, wave, pool=pool, tags=tags, on_event=on_event)
        made += wave
