"""Who looks after the assets, where their code is, how old those that people read may get."""

import warnings
from collections.abc import Sequence
from datetime import timedelta

import dagster as dg

from causalmix_pipeline.resources.settings import Settings

#: What people read. The rest of the live side is as old as its inputs, and nobody looks at it.
FRESH_NAMES = ("recommended_mixture", "report")


def freshness_policy(settings: Settings) -> dg.FreshnessPolicy | None:
    """Warn after `automation.fresh_days`, fail after `automation.overdue_days`; None if it's off.

    Dagster asks for a window to fail in. It is wide: a pool that rests is no failure.
    """
    automation = settings.automation
    if automation.fresh_days is None:
        return None
    return dg.FreshnessPolicy.time_window(
        fail_window=timedelta(days=automation.overdue_days),
        warn_window=timedelta(days=automation.fresh_days),
    )


def with_code_links(
    assets: Sequence[dg.AssetsDefinition | dg.AssetSpec],
) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """The assets, each with the place of its code; an editor opens it from the asset's page.

    The place is that of the installed package on the machine that loads it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        return list(dg.with_source_code_references(assets))  # pyright: ignore[reportReturnType]


def with_upkeep(spec: dg.AssetSpec, settings: Settings) -> dg.AssetSpec:
    """The asset with its owners, and with the freshness policy if people read it."""
    fresh = spec.key.path[-1] in FRESH_NAMES
    return spec.replace_attributes(
        owners=list(settings.automation.owners),
        freshness_policy=freshness_policy(settings) if fresh else None,
    )
