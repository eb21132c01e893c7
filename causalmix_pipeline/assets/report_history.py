"""What the report tells of the past and of where its values come from, from Dagster's events."""

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.live_pools import LivePool
from causalmix_pipeline.resources.observation import (
    DATA_VERSION_TAG,
    EXPERIMENT_POOL,
    LIVE_POOL,
    observed_version,
)
from causalmix_pipeline.resources.settings import Settings

#: Newest events looked at, and recommendations shown.
MOST_EVENTS, MOST_SHOWN = 200, 20

#: Tag of a materialisation: the data version of what it was made from.
INPUT_VERSION_TAG = "dagster/input_data_version/"

#: Metadata of `validation_runs` that the history reads.
REALISED, REALISED_SE = "realised gain", "realised gain, standard error"

#: Packages whose versions decide values.
PACKAGES = (
    "causalmix-pipeline", "dagster", "numpy", "polars", "scipy", "scikit-learn", "econml",
    "lightgbm", "torch", "transformers",
)  # fmt: skip

_SCHEMA = {"made_at": pl.String, "verdict": pl.String} | dict.fromkeys(
    ("gain", "low", "high", "realised", "realised_se"), pl.Float64
)


def recommendation_history(
    instance: dg.DagsterInstance, settings: Settings, pool: LivePool
) -> pl.DataFrame:
    """A row per recommendation of a pool that differs from the one before, oldest first.

    What validation runs realised stands with the recommendation that they were made of.
    """
    made_from = INPUT_VERSION_TAG + asset_key(settings, "recommended_mixture").to_user_string()
    checks = _events(instance, settings, "validation_runs", pool)
    realised = {(event.tags or {}).get(made_from): event for _, event in checks}
    rows, before = [], None
    for at, event in _events(instance, settings, "recommended_mixture", pool):
        told = (event.tags or {}).get(DATA_VERSION_TAG)
        if told is not None and told == before:
            continue
        before, checked = told, realised.get(told)
        rows.append(
            {
                "made_at": f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC",
                "verdict": event.metadata["verdict"].value if "verdict" in event.metadata else "",
                "gain": _number(event, "gain"),
                "low": _number(event, "gain, low end of 90% interval"),
                "high": _number(event, "gain, high end of 90% interval"),
                "realised": checked and _number(checked, REALISED),
                "realised_se": checked and _number(checked, REALISED_SE),
            }
        )
    return pl.DataFrame(rows[-MOST_SHOWN:], schema=_SCHEMA)


def _events(
    instance: dg.DagsterInstance, settings: Settings, name: str, pool: LivePool
) -> list[tuple[float, dg.AssetMaterialization]]:
    """When an asset was made of a pool, and what was told of it; oldest first."""
    wanted = dg.AssetRecordsFilter(
        asset_key(settings, name), asset_partitions=None if pool.name is None else [pool.name]
    )
    records = instance.fetch_materializations(wanted, limit=MOST_EVENTS).records
    found = [(r.timestamp, r.asset_materialization) for r in reversed(records)]
    return [(at, e) for at, e in found if e is not None and e.partition == pool.name]


def _number(event: dg.AssetMaterialization, name: str) -> float | None:
    value = event.metadata[name].value if name in event.metadata else None
    return float(value) if isinstance(value, int | float) else None


def origins(instance: dg.DagsterInstance, settings: Settings, pool: LivePool) -> dict[str, str]:
    """Fingerprints of the pools, digest of the settings, seeds and versions."""
    experiment = observed_version(instance, asset_key(settings, EXPERIMENT_POOL))
    live = observed_version(instance, asset_key(settings, LIVE_POOL), pool.name)
    return {
        "experiment pool": experiment or "not observed",
        "live pool": live or "not observed",
        "settings": content_digest(settings.model_dump(mode="json"))[:16],
        "seed of the design": str(settings.design.seed),
        "Python": python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
