"""What Dagster loads: assets, checks, resources, jobs, sensors and the schedule; no logic."""

from pathlib import Path

import dagster as dg

from causalmix_pipeline.assets import design, effects, pool, proxy, recommendation
from causalmix_pipeline.automation.conditions import with_live_condition
from causalmix_pipeline.automation.jobs import (
    experiment_job,
    make_refresh_schedule,
    refresh_job,
    validate_job,
)
from causalmix_pipeline.automation.sensors import make_condition_sensor, make_pool_sensor
from causalmix_pipeline.automation.versions import with_settings_version
from causalmix_pipeline.resources.project import default_resources
from causalmix_pipeline.resources.settings_file import config_path, load_settings


def build_definitions(config_file: Path) -> dg.Definitions:
    """The definitions of the project of a settings file; a missing file means the defaults."""
    settings = load_settings(config_file, missing_ok=True)
    modules = [pool, design, proxy, effects, recommendation]
    assets = [
        with_live_condition(with_settings_version(asset, settings))
        if isinstance(asset, dg.AssetsDefinition)
        else asset
        for asset in dg.load_assets_from_modules(modules)
    ]
    built: list[dg.Definitions] = []
    definitions = dg.Definitions(
        assets=assets,
        asset_checks=dg.load_asset_checks_from_modules(modules),
        jobs=[],
        schedules=[],
        sensors=[],
        resources=default_resources(config_file),
        # A step in a process of its own costs 6 s; the heavy step starts its own workers.
        executor=dg.in_process_executor,
    )
    built.append(definitions)
    return definitions


defs = build_definitions(config_path())
