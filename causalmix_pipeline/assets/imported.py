"""Runs made elsewhere: read from tables, and joined with the project's own."""

from collections.abc import Sequence
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.further_runs import read_further_runs
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.adapters.table_files import Table, open_table
from causalmix_pipeline.assets.design import domains_of
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.core.effects import MINIMUM_RUNS
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.sources import join_sources, stack_runs
from causalmix_pipeline.resources.frame_store import FRAME
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.study_settings import ImportedRuns


def make_imported_runs(
    deps: Sequence[dg.AssetKey] = (), project: str | None = None
) -> dg.AssetsDefinition:
    """The asset of runs made elsewhere, which may depend on an asset that stands for its files.

    Args:
        deps: what stands for the files.
        project: name in front of the asset's key and of its inputs'.
    """
    asset = dg.asset(
        name="imported_runs",
        key_prefix=project,
        ins={"mixture_design": dg.AssetIn(key_prefix=project)},
        dagster_type=FRAME,
        group_name="experiment",
        kinds={"polars"},
        code_version="1",
        deps=list(deps),
    )
    return asset(_imported_runs)


def _imported_runs(
    project: dg.ResourceParam[Project], mixture_design: pl.DataFrame
) -> dg.MaterializeResult:
    """One row per run made elsewhere, as the tables in the settings have it; often no row.

    Domains, covariates and tasks are matched by name. Outcomes are as measured there, larger is
    better; the run table puts each source on the level of the own runs. Stale when the list of
    imported runs, the content of its files, the covariates or the domains change.
    """
    settings, domains = project.settings, domains_of(mixture_design)
    read = [read_source(settings, i, domains) for i in range(len(settings.imported_runs))]
    frame = no_runs()
    if read:
        frame = stack_runs([runs for runs, _ in read]).to_frame()
    rows = [
        {"source": runs.sources[0], "runs": runs.n_runs, "states": runs.n_states,
         "randomised": not runs.observational_sources, "left out": "; ".join(notes) or None}
        for runs, notes in read
    ]  # fmt: skip
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={"runs": float(frame.height), "sources": markdown_table(rows)},
    )


imported_runs = make_imported_runs()


def no_runs() -> pl.DataFrame:
    """The table where the settings import nothing."""
    return pl.DataFrame(schema={"run_id": pl.String, "source": pl.String})


def read_source(
    settings: Settings, index: int, domains: Sequence[str]
) -> tuple[RunTable, tuple[str, ...]]:
    """Runs of an entry of `imported_runs`, named `<source>/<run>`, and what was left out.

    Args:
        settings: the settings.
        index: the entry's place.
        domains: the project's.

    Raises:
        ConfigError: if a file is missing, or `metric_names` names a column that it lacks.
        EstimationError: if a table lacks or adds a name, or holds what can't be; says where.
    """
    entry, field = settings.imported_runs[index], f"imported_runs[{index}]"
    ratios, metrics, covariates = (
        open_table(settings.resolve(getattr(entry, name)), f"{field}.{name}")
        for name in ("ratios", "metrics", "covariates")
    )
    directions = settings.task_directions
    found = read_further_runs(
        ratios,
        _with_task_names(metrics, entry, field),
        covariates,
        (domains, settings.run_covariates, list(directions)),
        np.array([-1.0 if way == "minimize" else 1.0 for way in directions.values()]),
    )
    if found.runs.n_runs < MINIMUM_RUNS:
        raise EstimationError(
            f"{field} must have at least {MINIMUM_RUNS} runs that are in {ratios.name} and "
            f"{metrics.name}, got {found.runs.n_runs}: the level of fewer can't be told; add runs, "
            "or take the entry off the settings."
        )
    labelled = replace(
        found.runs,
        run_ids=tuple(f"{entry.source}/{run}" for run in found.runs.run_ids),
        source_N=(entry.source,) * found.runs.n_runs,
        observational_sources=() if entry.randomised else (entry.source,),
    )
    return labelled, found.notes


def _with_task_names(metrics: Table, entry: ImportedRuns, field: str) -> Table:
    for task, column in entry.metric_names.items():
        if column not in metrics.frame.columns:
            raise ConfigError(
                f"{field}.metric_names must name columns of {metrics.name} "
                f"({', '.join(metrics.value_columns)}), got {column!r} for {task}: correct it."
            )
    names = {column: task for task, column in entry.metric_names.items()}
    others = [n for n in metrics.frame.columns if n in entry.metric_names and n not in names]
    return replace(metrics, frame=metrics.frame.drop(others).rename(names))


def join_imported(own: RunTable, imported_runs: pl.DataFrame) -> tuple[RunTable, dict]:
    """The project's own runs with the imported ones, and what to show of it; see `core.sources`."""
    if not imported_runs.height:
        return own, {}
    joined = join_sources(own, RunTable.from_frame(imported_runs))
    return joined.runs, {
        "imported runs": float(imported_runs.height),
        "level taken off (losses: divided by)": markdown_table(joined.levels.to_dicts()),
    }
