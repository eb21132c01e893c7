"""What Dagster loads: assets, checks, resources, jobs, sensors and the schedule; no logic."""

from pathlib import Path

import dagster as dg

from causalmix_pipeline.assets import (
    design,
    effects,
    imported,
    interpretation,
    plan,
    pool,
    proxy,
    recommendation,
    report,
    rivals,
    sizes,
    stages,
    top_ups,
    training_export,
    validation,
)
from causalmix_pipeline.automation.alerts import make_alert_sensor, make_run_failure_sensor
from causalmix_pipeline.automation.catch_up import make_catch_up_sensor
from causalmix_pipeline.automation.conditions import with_live_condition
from causalmix_pipeline.automation.dead_runs import make_dead_run_sensor
from causalmix_pipeline.automation.imported_tables import (
    table_jobs,
    table_sensors,
    table_specs,
    with_tables,
)
from causalmix_pipeline.automation.jobs import (
    adopt_experiment_pool,
    choose_covariates_job,
    compare_job,
    experiment_job,
    make_refresh_schedule,
    refresh_job,
    top_up_job,
    validate_job,
)
from causalmix_pipeline.automation.partitions import with_partitions
from causalmix_pipeline.automation.sensors import make_condition_sensor, make_pool_sensor
from causalmix_pipeline.automation.upkeep import with_code_links, with_upkeep
from causalmix_pipeline.automation.versions import with_settings_version
from causalmix_pipeline.resources.project import default_resources
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import config_path, load_settings


def build_definitions(config_file: Path, settings: Settings | None = None) -> dg.Definitions:
    """The definitions of the project of a settings file; a missing file means the defaults.

    Args:
        config_file: read again by each run.
        settings: what jobs, sensors and code versions are built from; None reads the file.
    """
    settings = settings or load_settings(config_file, missing_ok=True)
    modules = [
        pool,
        design,
        plan,
        imported,
        proxy,
        effects,
        interpretation,
        recommendation,
        report,
        rivals,
        top_ups,
        training_export,
        validation,
        *([stages] if settings.design.stages > 1 else []),
    ]
    assets = [
        with_partitions(
            with_live_condition(with_settings_version(with_tables(asset, settings), settings)),
            settings,
        )
        if isinstance(asset, dg.AssetsDefinition)
        else asset
        for asset in dg.load_assets_from_modules(
            modules,
            include_specs=True,
            key_prefix=settings.project,
            source_key_prefix=settings.project,  # of specs
        )
        if isinstance(asset, dg.AssetsDefinition | dg.AssetSpec)
    ]
    built: list[dg.Definitions] = []
    definitions = dg.Definitions(
        assets=with_code_links(
            dg.map_asset_specs(
                lambda spec: with_upkeep(spec, settings), [*assets, *table_specs(settings)]
            )
        ),
        asset_checks=[
            *dg.load_asset_checks_from_modules(modules, settings.project),
            proxy.make_unigram_check(settings),
            *sizes.make_size_checks(settings),
        ],
        jobs=[
            experiment_job,
            refresh_job,
            validate_job,
            compare_job,
            top_up_job,
            choose_covariates_job,
            adopt_experiment_pool,
            *table_jobs(settings),
        ],
        schedules=[make_refresh_schedule(settings, lambda: built[0])],
        sensors=[
            make_pool_sensor(settings),
            make_condition_sensor(settings),
            make_catch_up_sensor(settings, lambda: built[0]),
            make_run_failure_sensor(settings),
            make_dead_run_sensor(settings),
            make_alert_sensor(settings, lambda: built[0].resolve_asset_graph().asset_check_keys),
            *table_sensors(settings, lambda: built[0]),
        ],
        resources=default_resources(config_file),
        # A step in a process of its own costs 6 s; the heavy step starts its own workers.
        executor=dg.in_process_executor,
    )
    built.append(definitions)
    return definitions


defs = build_definitions(config_path())
