"""Which assets have a partition for each live pool, where the settings name several."""

import warnings

import dagster as dg

from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES, STAGED_LIVE_NAMES
from causalmix_pipeline.resources.live_pools import partitions_of
from causalmix_pipeline.resources.settings import Settings

#: Made of a live pool; the rest is made of the experiment, and there is one of it.
OF_A_POOL = ("live_pool", *LIVE_SIDE_NAMES, *STAGED_LIVE_NAMES, "validation_runs")


def with_partitions(asset: dg.AssetsDefinition, settings: Settings) -> dg.AssetsDefinition:
    """The asset, and its checks, with a partition for each live pool if it's made of one."""
    partitions = partitions_of(settings)
    if partitions is None or not {key.path[-1] for key in asset.keys} & set(OF_A_POOL):
        return asset
    asset = asset.map_asset_specs(lambda spec: spec.replace_attributes(partitions_def=partitions))
    return _with_check_partitions(asset, partitions)


def _with_check_partitions(
    asset: dg.AssetsDefinition, partitions: dg.PartitionsDefinition
) -> dg.AssetsDefinition:
    """The asset, each of its checks told of one pool: a pool that fails doesn't stop the others.

    There is no public way to change the checks of an asset; this is how `map_asset_specs` does it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions of checks, in 1.13
        checks = {
            output: dg.AssetCheckSpec(
                spec.name,
                asset=spec.asset_key,
                description=spec.description,
                blocking=spec.blocking,
                metadata=spec.metadata,
                partitions_def=partitions,
            )
            for output, spec in asset.get_attributes_dict()["check_specs_by_output_name"].items()
        }
    return dg.AssetsDefinition.dagster_internal_init(
        **{**asset.get_attributes_dict(), "check_specs_by_output_name": checks}
    )
