"""When an asset of the live side re-materialises by itself, and which assets those are."""

import dagster as dg

#: Everything that a change of the live pool reaches by itself, and nothing that trains a proxy.
LIVE_SIDE_NAMES = (
    "live_documents",
    "live_covariates",
    "baseline_mixtures",
    "recommended_mixture",
    "training_export",
    "report",
)
LIVE_SIDE = dg.AssetSelection.assets(*LIVE_SIDE_NAMES)

#: Early cut-off: an asset follows the data version of its inputs, not the fact that they ran.
#: Plain `eager()` also fires when an input was materialised again with the same content.
FOLLOW_DATA = (
    dg.AutomationCondition.eager().replace(
        "any_deps_updated",
        dg.AutomationCondition.any_deps_match(dg.AutomationCondition.data_version_changed()),
    )
    & dg.AutomationCondition.all_deps_blocking_checks_passed()
)


def with_live_condition(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """The asset, with the condition if it's on the live side."""
    return asset.map_asset_specs(
        lambda spec: (
            spec.replace_attributes(automation_condition=FOLLOW_DATA)
            if spec.key.path[-1] in LIVE_SIDE_NAMES
            else spec
        )
    )
