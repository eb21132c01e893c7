"""Looking at pools from outside a run: fingerprints, and observations of them.

An observation carries the fingerprint of the pool's content as data version. That is all that a
changed pool causes by itself; what is stale because of it is for the conditions, the schedule and
`refresh` to find out.
"""

import hashlib
from pathlib import Path

import dagster as dg

from causalmix_pipeline.adapters.pool_files import is_url, pool_files, pool_fingerprint
from causalmix_pipeline.resources.settings import Settings

#: Tag of an observation or materialisation that tells Dagster which data it stands for.
DATA_VERSION_TAG = "dagster/data_version"

EXPERIMENT_POOL = dg.AssetKey("experiment_pool")
LIVE_POOL = dg.AssetKey("live_pool")


def pool_stat(location: str | Path) -> tuple[str, float]:
    """A cheap fingerprint of names, sizes and times of a pool's files, and the newest time.

    Returns:
        16 hex digits; seconds since 1970 of the newest change, 0 on object storage, which tells a
        version instead.

    Raises:
        PoolError: if there is nothing at the location, or no data file.
    """
    digest, newest = hashlib.sha256(), 0.0
    for file in pool_files(location):
        digest.update(f"{file.name}\0{file.size}\0{file.version}\0".encode())
        if not is_url(file.url) and file.version.isdigit():
            newest = max(newest, int(file.version) / 1e9)
    return digest.hexdigest()[:16], newest


def make_observation(key: dg.AssetKey, location: str | Path, version: str) -> dg.AssetObservation:
    """Say what a pool holds now, with the fingerprint of its content as data version."""
    files = pool_files(location)
    return dg.AssetObservation(
        asset_key=key,
        tags={DATA_VERSION_TAG: version},
        metadata={
            "location": dg.MetadataValue.path(str(location)),
            "files": len(files),
            "megabytes": round(sum(max(file.size, 0) for file in files) / 1e6, 3),
        },
    )


def observed_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """The data version of the newest observation of a pool, or None."""
    records = instance.fetch_observations(key, limit=1).records
    observation = records[0].asset_observation if records else None
    return observation.tags.get(DATA_VERSION_TAG) if observation else None


def observe_pool(instance: dg.DagsterInstance, settings: Settings, key: dg.AssetKey) -> bool:
    """Report an observation of a pool if its content isn't the one observed last.

    For `experiment_pool` this is the adoption of a new experiment pool.

    Returns:
        Whether there was something new.
    """
    location = settings.live_path if key == LIVE_POOL else settings.experiment_path
    version = pool_fingerprint(location)
    if observed_version(instance, key) == version:
        return False
    instance.report_runless_asset_event(make_observation(key, location, version))
    return True
