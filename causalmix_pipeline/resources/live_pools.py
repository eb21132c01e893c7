"""The live pools of a project: one without a name, or several, each a partition of the live side.

A pool's name is its partition key, and the name of its folder below `data/export`, `data/reports`,
`data/history` and `data/quarantine`. The one without a name has no partition and no such folder.
"""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from causalmix_pipeline.resources.settings import Settings

#: Name under which Dagster's instance keeps the names of pools; a project's name stands in front.
PARTITIONS_NAME = "live_pools"


@dataclass(frozen=True)
class LivePool:
    """A live pool.

    Attributes:
        name: None for the only one, without a name.
        location: a URL or an absolute path.
        data_path: the project's data folder.
    """

    name: str | None
    location: str | Path
    data_path: Path

    @property
    def title(self) -> str:
        """The pool as a sentence begins with it."""
        return "The live pool" if self.name is None else f"The live pool {self.name}"

    def folder(self, kind: str, *parts: str) -> Path:
        """A folder or file of a kind (`export`, `reports`, ...) that is this pool's own."""
        return self.data_path.joinpath(kind, *([self.name] if self.name else []), *parts)


def live_pool(settings: Settings, name: str | None) -> LivePool:
    """The live pool of a name.

    Raises:
        ConfigError: if the settings have none of it.
    """
    return LivePool(name, settings.live_location(name), settings.data_path)


def live_pools(settings: Settings) -> list[LivePool]:
    """All live pools, in the order of the settings."""
    return [live_pool(settings, name) for name in settings.live_pools]


def pool_of_run(
    context: dg.AssetExecutionContext | dg.OpExecutionContext, settings: Settings
) -> LivePool:
    """The live pool that a run is about, by its partition.

    Raises:
        ConfigError: if the settings don't have it any more.
    """
    return live_pool(settings, context.partition_key if context.has_partition_key else None)


def partitions_name(settings: Settings) -> str:
    """Name under which Dagster's instance keeps the names of this project's pools."""
    return f"{settings.project}/{PARTITIONS_NAME}" if settings.project else PARTITIONS_NAME


def partitions_of(settings: Settings) -> dg.DynamicPartitionsDefinition | None:
    """The partitions of the live side; None with one pool."""
    if None in settings.live_pools:
        return None
    return dg.DynamicPartitionsDefinition(name=partitions_name(settings))


def settle_partitions(instance: dg.DagsterInstance, settings: Settings) -> list[str]:
    """Make the settings' pools the partitions of the instance; nothing to do with one pool.

    A pool that left the settings is no partition any more, so nothing refreshes it. What was made
    of it stays, its events in Dagster as well, and is there again once the pool is back.

    Returns:
        A sentence for each pool that left.
    """
    names = [name for name in settings.live_pools if name is not None]
    if not names:
        return []
    partitions = partitions_name(settings)
    known = instance.get_dynamic_partitions(partitions)
    new = [name for name in names if name not in known]
    if new:
        instance.add_dynamic_partitions(partitions, new)
    left = [name for name in known if name not in names]
    for name in left:
        instance.delete_dynamic_partition(partitions, name)
    return [
        f"The live pool {name} isn't in pools.live any more: it is refreshed no longer, what was "
        "made of it stays."
        for name in left
    ]
