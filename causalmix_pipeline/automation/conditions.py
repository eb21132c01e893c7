"""When an asset of the live side re-materialises by itself, and which assets those are."""

import dagster as dg

from causalmix_pipeline.resources.asset_keys import assets_named

#: Everything that a change of the live pool reaches by itself, and nothing that trains a proxy:
#: `top_up_runs` only collects, unless its run carries a tag.
LIVE_SIDE_NAMES = (
    "live_documents",
    "live_covariates",
    "live_changes",
    "top_up_runs",
    "baseline_mixtures",
    "recommended_mixture",
    "training_export",
    "report",
)
#: The same of a project whose runs have stages; others lack it.
STAGED_LIVE_NAMES = ("recommended_schedule",)
LIVE_SIDE = assets_named(*LIVE_SIDE_NAMES, *STAGED_LIVE_NAMES)

#: Tags of its runs: after a day one hangs, is ended, and tried once more. Training may take as long
#: as the instance allows, a week.
LIVE_RUN_TAGS = {"dagster/max_runtime": "86400", "dagster/max_retries": "1"}

#: Early cut-off: an asset follows the data version of its inputs, not the fact that they ran.
#: Plain `eager()` also fires when an input was materialised again with the same content.
FOLLOW_DATA = (
    dg.AutomationCondition.eager().replace(
        "any_deps_updated",
        dg.AutomationCondition.any_deps_match(dg.AutomationCondition.data_version_changed()),
    )
    & dg.AutomationCondition.all_deps_blocking_checks_passed()
)

_BUSY = dg.AutomationCondition.will_be_requested() | dg.AutomationCondition.in_progress()

#: As above, and made once where it's missing when it is first seen. A project of an earlier version
#: lacks such an asset, and what is below would wait until the pool changes. It waits for inputs
#: that are being made: with two that change one after the other it would be made twice.
FOLLOW_DATA_FROM_THE_START = (
    dg.AutomationCondition.in_latest_time_window()
    & (
        dg.AutomationCondition.newly_missing()
        | dg.AutomationCondition.any_deps_match(dg.AutomationCondition.data_version_changed())
    ).since(
        # `eager()` has a third one here, the first look.
        dg.AutomationCondition.newly_requested() | dg.AutomationCondition.newly_updated()
    )
    & ~dg.AutomationCondition.any_deps_missing()
    & ~dg.AutomationCondition.in_progress()
    & ~dg.AutomationCondition.any_deps_match(_BUSY)
    & dg.AutomationCondition.all_deps_blocking_checks_passed()
)

#: As above, once nothing up to two steps above is being made or about to be. Otherwise new
#: documents would be exported with the old mixture first, and again with the new one.
FOLLOW_SETTLED_DATA = (
    FOLLOW_DATA
    & ~dg.AutomationCondition.any_deps_match(_BUSY)
    & ~dg.AutomationCondition.any_deps_match(dg.AutomationCondition.any_deps_match(_BUSY))
)

#: What people and training runs read: it must never mix old and new.
_READ_BY_OTHERS = ("training_export", "report")


def condition_of(name: str) -> dg.AutomationCondition | None:
    """The condition of an asset, None off the live side."""
    if name not in (*LIVE_SIDE_NAMES, *STAGED_LIVE_NAMES):
        return None
    if name == "top_up_runs":
        return FOLLOW_DATA_FROM_THE_START
    return FOLLOW_SETTLED_DATA if name in _READ_BY_OTHERS else FOLLOW_DATA


def with_live_condition(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """The asset, with the condition if it's on the live side."""
    return asset.map_asset_specs(
        lambda spec: spec.replace_attributes(automation_condition=condition_of(spec.key.path[-1]))
    )
