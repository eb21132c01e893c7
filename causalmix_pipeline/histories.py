"""Runs that come into a project as tables, and the project's own runs as tables again.

Tables are those of `causalmix fit`: OLMix's and RegMix's form, CSV or Parquet. Imported tables are
copied into the project, so that it doesn't depend on files elsewhere, and named in its settings.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from pydantic import ValidationError

from causalmix_pipeline.adapters.run_store import write_atomically
from causalmix_pipeline.adapters.table_files import KEYS, Table, open_table, row_ids, shared_key
from causalmix_pipeline.assets.design import domains_of
from causalmix_pipeline.assets.imported import read_source
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.runs import OWN, RunTable
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline.resources.study_settings import ImportedRuns
from causalmix_pipeline.workspace import Workspace

#: What `--trained-on` calls the live pool where it's the only one.
ONLY_POOL = "live"

#: The tables, as options, settings and files name them.
TABLES = ("ratios", "metrics", "covariates")


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        runs: as the project reads them now.
        notes: what was left out, in plain words.
        folder: where the copies are.
    """

    runs: RunTable
    notes: tuple[str, ...]
    folder: Path


def import_runs(
    work: Workspace,
    ratios: Path,
    metrics: Path,
    covariates: Path | None = None,
    *,
    source: str,
    trained_on: str | None = None,
    randomised: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Imported:
    """Copy tables of runs made elsewhere into a project, and name them in its settings.

    The tables are read as the project will read them first; nothing is kept if that fails.

    Args:
        work: the project; its design must be made, so that the domains are known.
        ratios: shares, a row per run.
        metrics: outcomes; metrics that are no task of the project are left out.
        covariates: what was known of each run's pool.
        source: short name of where they are from.
        trained_on: in place of covariates, the live pool that all runs were trained on, as it was
            profiled last: its name, `live` for the only one.
        randomised: whether the mixtures were drawn at random.
        columns: the project's name of a domain or task, to the tables' name of it.

    Raises:
        ConfigError: for a source that is there already, or no covariates, or both kinds.
        EstimationError: for tables that carry no estimate; says where and what to do.
    """
    settings, columns = work.settings, dict(columns or {})
    if (covariates is None) == (trained_on is None):
        given = "both" if covariates else "neither"
        raise ConfigError(
            f"--covariates or --trained-on must be given, got {given}: effects depend on the pool, "
            "so pass what was measured of each run's pool, or the name of the one live pool that "
            "all were trained on."
        )
    entry = _entry(settings, source, randomised)
    domains = _domains(work)
    tables = {"ratios": open_table(ratios, "ratios"), "metrics": open_table(metrics, "metrics")}
    tables["covariates"] = (
        open_table(covariates, "covariates")
        if covariates
        else _of_one_pool(work, tables["ratios"], str(trained_on))
    )
    tables, dropped = _renamed(tables, columns, list(settings.task_directions))
    folder = settings.data_path / "imported" / source
    if folder.exists():
        raise ConfigError(
            f"--source must be a new name, got {source!r}, whose tables are in {folder}: choose "
            "another, or take the old entry off `imported_runs` and remove that folder."
        )
    text = _with_entry(work.config_file, entry)
    waiting = folder.with_name(f".{source}.{os.getpid()}")
    try:
        for name, table in tables.items():
            write_atomically(waiting / f"{name}.csv", table.frame.write_csv().encode())
        runs, notes = _read_back(settings, entry, waiting, domains)
        os.replace(waiting, folder)
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    try:
        _replace_settings(work.config_file, text)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return Imported(runs, (*notes, *dropped), folder)


def _entry(settings: Settings, source: str, randomised: bool) -> ImportedRuns:
    """The entry that the settings get."""
    if source in {table.source for table in settings.imported_runs}:
        raise ConfigError(f"--source must be a new name, got {source!r} again: choose another.")
    root, folder = settings.resolve("."), settings.data_path / "imported" / source
    folder = folder.relative_to(root) if folder.is_relative_to(root) else folder
    paths = {name: str(folder / f"{name}.csv") for name in TABLES}
    try:
        return ImportedRuns.model_validate({"source": source, "randomised": randomised, **paths})
    except ValidationError as error:
        raise ConfigError(
            f"--source must be lower-case letters, digits and underscores, a letter first, and "
            f"not {OWN}, got {source!r}: choose another."
        ) from error


def _domains(work: Workspace) -> tuple[str, ...]:
    try:
        return tuple(domains_of(work.value("mixture_design")))
    except FileNotFoundError as error:
        raise ConfigError(
            "the project must have a design, so that its domains are known, got none: run "
            "`causalmix plan` first; it trains nothing."
        ) from error


def _of_one_pool(work: Workspace, ratios: Table, pool: str) -> Table:
    """The covariates of a live pool, for each run."""
    name = None if pool == ONLY_POOL and work.pools == [None] else pool
    if name not in work.pools:
        known = ", ".join(name or ONLY_POOL for name in work.pools)
        raise ConfigError(
            f"--trained-on must name a live pool ({known}), got {pool!r}: correct it."
        )
    try:
        measured = work.value("live_covariates", name)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--trained-on {pool} must have been profiled, but never was: run `causalmix refresh`, "
            "or with --train where nothing was trained yet."
        ) from error
    key = shared_key([ratios])
    values = {
        f"{row['domain']}__{name}": row[name]
        for row in measured.iter_rows(named=True)
        for name in work.settings.covariates
    }
    frame = pl.DataFrame({key: row_ids(ratios, key)})
    literals = [pl.lit(value, pl.Float64).alias(name) for name, value in values.items()]
    return Table(frame.with_columns(*literals), f"covariates of {pool}")


def _renamed(
    tables: Mapping[str, Table], columns: Mapping[str, str], tasks: Sequence[str]
) -> tuple[dict[str, Table], list[str]]:
    """The tables with the project's names, metrics of no task left out, and what was."""
    _refuse_unknown(tables, columns)
    found = {}
    for name, table in tables.items():
        parts = {
            column: _own_name(column, columns, with_covariate=name == "covariates")
            for column in table.value_columns
        }
        twice = [column for column, own in parts.items() if own != column and own in parts]
        if twice:
            raise ConfigError(
                f"--column must give a name that {table.name} doesn't use otherwise, got "
                f"{parts[twice[0]]!r} for {twice[0]!r}, and it has a column {parts[twice[0]]!r}: "
                "drop or rename that one."
            )
        found[name] = replace(table, frame=table.frame.rename(parts, strict=False))
    others = [name for name in found["metrics"].value_columns if name not in tasks]
    found["metrics"] = replace(found["metrics"], frame=found["metrics"].frame.drop(others))
    told = ", ".join(repr(name) for name in others[:5]) + ("..." if len(others) > 5 else "")
    return found, [f"metrics that are no task of the project: {told}"] if others else []


def _refuse_unknown(tables: Mapping[str, Table], columns: Mapping[str, str]) -> None:
    known = [c for name in ("ratios", "metrics") for c in tables[name].value_columns]
    for own, theirs in columns.items():
        if theirs not in known:
            raise ConfigError(
                f"--column must name a column of the ratios or metrics ({', '.join(known[:6])}"
                f"{'...' if len(known) > 6 else ''}), got {theirs!r} for {own!r}: correct it."
            )


def _own_name(column: str, columns: Mapping[str, str], *, with_covariate: bool) -> str:
    """The project's name of a column; of a covariate, its domain is what may be named otherwise."""
    for own, theirs in sorted(columns.items(), key=lambda pair: -len(pair[1])):
        if column == theirs:
            return own
        if with_covariate and column.startswith(f"{theirs}__"):
            return own + column.removeprefix(theirs)
    return column


def _read_back(
    settings: Settings, entry: ImportedRuns, folder: Path, domains: Sequence[str]
) -> tuple[RunTable, tuple[str, ...]]:
    """Read the copies as the asset will, before they are in their place."""
    waiting = {name: str(folder / f"{name}.csv") for name in TABLES}
    trial = settings.model_copy(update={"imported_runs": [entry.model_copy(update=waiting)]})
    return read_source(trial, 0, domains)


def _with_entry(config: Path, entry: ImportedRuns) -> str:
    """The text of the settings file with one more entry; all else, comments too, stays.

    Raises:
        ConfigError: if the list is written in a way that a line can't be put into.
    """
    text = config.read_text(encoding="utf-8")
    fields = {name: value for name, value in entry if name != "metric_names"}
    lines = [
        f"{name}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in fields.items()
        if value is not False
    ]
    found = re.search(r"^imported_runs:[ \t]*(.*)$", text, re.MULTILINE)
    if found is None:
        return text.rstrip("\n") + "\n\nimported_runs:\n" + _item(lines, "  ")
    value, _, comment = found[1].partition("#")
    if value.strip() not in ("", "[]"):
        raise ConfigError(
            f"{config}: imported_runs must be `[]` or a list with a line per field, got "
            f"{found[1]!r}: write it so, or add by hand: - {{{', '.join(lines)}}}"
        )
    rest = text[found.end() :]
    dash = re.match(r"(?:[ \t]*(?:#.*)?\n)*([ \t]*)- ", rest)
    head = "imported_runs:" + (f"  #{comment}" if comment else "")
    item = "\n" + _item(lines, dash[1] if dash else "  ").rstrip("\n")
    return text[: found.start()] + head + item + rest


def _item(lines: Sequence[str], indent: str) -> str:
    """A list's item, a line per field."""
    return "".join(f"{indent}{'- ' if i == 0 else '  '}{line}\n" for i, line in enumerate(lines))


def _replace_settings(config: Path, text: str) -> None:
    """Put the new text in place once it reads well."""
    trial = config.with_name(f".{config.name}.{os.getpid()}")
    try:
        trial.write_text(text, encoding="utf-8")
        load_settings(trial)
        shutil.copymode(config, trial)
        os.replace(trial, config)
    finally:
        trial.unlink(missing_ok=True)


def export_runs(runs: RunTable, directions: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the project's own runs as tables that `causalmix fit`, OLMix and RegMix read.

    Args:
        runs: the run table; runs of other sources are left out.
        directions: minimize or maximize, by task.
        folder: gets `ratios.csv`, `metrics.csv` and, where there are any, `covariates.csv`.

    Returns:
        The files.

    Raises:
        ConfigError: if a domain or task is named as the tables name runs.
    """
    taken = sorted({*runs.domains, *runs.tasks} & set(KEYS))
    if taken:
        raise ConfigError(
            f"domains and tasks must be named otherwise than {', '.join(KEYS)}, got {taken[0]!r}: "
            "the tables name runs so; rename it."
        )
    own = runs.subset([i for i, name in enumerate(runs.sources_of_runs) if name == OWN])
    named = {"run": list(own.run_ids), "name": list(own.run_ids), "index": range(own.n_runs)}
    sign_T = [-1.0 if directions[task] == "minimize" else 1.0 for task in own.tasks]
    flat_NC = own.state_NDP.reshape(own.n_runs, -1)
    parts = [
        ("ratios", own.mixture_ND, own.domains),
        ("metrics", own.outcome_NT * sign_T, own.tasks),
    ]
    if own.covariates:
        parts.append(("covariates", flat_NC, own.covariate_columns))
    written = []
    for name, values, columns in parts:
        frame = pl.DataFrame(named).hstack(pl.DataFrame(values, schema=list(columns), orient="row"))
        path = folder / f"{name}.csv"
        write_atomically(path, frame.write_csv().encode())
        written.append(path)
    return written
