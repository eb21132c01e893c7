"""Looking at pools from outside a run: fingerprints, and observations of them.

An observation carries the fingerprint of the pool's content as data version. That is all that a
changed pool causes by itself; what is stale because of it is for the conditions, the schedule and
`refresh` to find out.
"""

import hashlib
from pathlib import Path

import dagster as dg

from causalmix_pipeline.adapters.pool_files import pool_files, pool_fingerprint
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.settings import Settings

#: Tag of an observation or materialisation that tells Dagster which data it stands for.
DATA_VERSION_TAG = "dagster/data_version"

#: Without a project's name in front; see `asset_key`.
EXPERIMENT_POOL = dg.AssetKey("experiment_pool")
LIVE_POOL = dg.AssetKey("live_pool")


def pool_stat(location: str | Path) -> str:
    """A cheap fingerprint of names, sizes and times of a pool's files; 16 hex digits.

    On object storage the version (the ETag) stands for the times.

    Raises:
        PoolError: if there is nothing at the location, or no data file.
    """
    digest = hashlib.sha256()
    for file in pool_files(location):
        digest.update(f"{file.name}\0{file.size}\0{file.version}\0".encode())
    return digest.hexdigest()[:16]


def make_observation(
    key: dg.AssetKey, location: str | Path, version: str, pool: str | None = None
) -> dg.AssetObservation:
    """Say what a pool holds now, with the fingerprint of its content as data version.

    Args:
        key: the pool's asset.
        location: where the pool is.
        version: fingerprint of its content.
        pool: name of a live pool, where there are several.
    """
    files = pool_files(location)
    return dg.AssetObservation(
        asset_key=key,
        partition=pool,
        tags={DATA_VERSION_TAG: version},
        metadata={
            "location": dg.MetadataValue.path(str(location)),
            "files": len(files),
            "megabytes": round(sum(max(file.size, 0) for file in files) / 1e6, 3),
        },
    )


def observed_version(
    instance: dg.DagsterInstance,
    key: dg.AssetKey,
    pool: str | None = None,
    *,
    until: int | None = None,
) -> str | None:
    """The data version of the newest observation of a pool, or None.

    Args:
        instance: keeps the observations.
        key: the pool's asset.
        pool: name of a live pool, where there are several.
        until: storage id of the newest event that counts.
    """
    records = dg.AssetRecordsFilter(
        key,
        asset_partitions=None if pool is None else [pool],
        before_storage_id=None if until is None else until + 1,
    )
    found = instance.fetch_observations(records, limit=1).records
    observation = found[0].asset_observation if found else None
    # One of a named pool says nothing of the pool without a name.
    if observation is None or observation.partition != pool:
        return None
    return observation.tags.get(DATA_VERSION_TAG)


def observe_pool(
    instance: dg.DagsterInstance, settings: Settings, key: dg.AssetKey, pool: str | None = None
) -> bool:
    """Report an observation of a pool if its content isn't the one observed last.

    For `experiment_pool` this is the adoption of a new experiment pool.

    Args:
        instance: keeps the observations.
        settings: where pools are.
        key: the pool's asset, `EXPERIMENT_POOL` or `LIVE_POOL`.
        pool: name of a live pool, where there are several.

    Returns:
        Whether there was something new.
    """
    live = key == LIVE_POOL
    location = settings.live_location(pool) if live else settings.experiment_path
    version, key = pool_fingerprint(location), asset_key(settings, key)
    if observed_version(instance, key, pool) == version:
        return False
    instance.report_runless_asset_event(make_observation(key, location, version, pool))
    return True
