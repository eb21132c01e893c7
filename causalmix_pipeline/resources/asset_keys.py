"""Keys of assets: a project's name stands in front where several projects share an instance.

Constants such as `LIVE_POOL` are keys without it; what is looked up in an instance is `asset_key`
of them.
"""

import dagster as dg

from causalmix_pipeline.resources.settings import Settings

#: Tag of a run: the project's name, where it has one.
PROJECT_TAG = "causalmix/project"


def asset_key(settings: Settings, asset: str | dg.AssetKey) -> dg.AssetKey:
    """The key of an asset in the settings' project, from its name or its key without a project."""
    own = [settings.project] if settings.project else []
    return dg.AssetKey.from_coercible(asset).with_prefix(own)


def assets_named(*names: str) -> dg.AssetSelection:
    """The assets of these names, whatever project's name stands in front."""
    patterns = [pattern for name in names for pattern in (name, f"*/{name}")]
    return dg.AssetSelection.from_string(" or ".join(f'key:"{p}"' for p in patterns))


def is_own_run(settings: Settings, run: dg.DagsterRun) -> bool:
    """Whether a run is of the settings' project: by its tag, else by the keys of what it makes.

    A run that ended before it had the tag and names no asset counts for each project; to a project
    without a name every run is its own.
    """
    if settings.project is None:
        return True
    if PROJECT_TAG in run.tags:
        return run.tags[PROJECT_TAG] == settings.project
    keys = {*(run.asset_selection or ()), *(c.asset_key for c in run.asset_check_selection or ())}
    return not keys or settings.project in {key.path[0] for key in keys}
