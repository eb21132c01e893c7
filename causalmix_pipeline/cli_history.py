"""The commands for runs that come from elsewhere, and that leave: import, runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from causalmix_pipeline.cli_output import (
    ConfigOption,
    CovariatesOption,
    check_folder,
    check_outputs,
    new_console,
)
from causalmix_pipeline.core.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("import")(import_history)
    app.command()(runs)


def import_history(
    ratios: Annotated[Path, typer.Option(help="run,<domain>...: shares (CSV or Parquet).")],
    metrics: Annotated[Path, typer.Option(help="run,<metric>... (CSV or Parquet).")],
    source: Annotated[str, typer.Option(help="Short name of where the runs are from.")],
    covariates: CovariatesOption = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            help="Instead of covariates: the live pool that all runs were trained on, as it was "
            "profiled last. `live`, or its name."
        ),
    ] = None,
    randomised: Annotated[
        bool,
        typer.Option(
            "--randomised", help="The mixtures were drawn at random, whatever the pool was."
        ),
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(help="mine=theirs: a domain or task that the tables name otherwise."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Bring tables of runs made elsewhere into the project, OLMix's and RegMix's among them."""
    from causalmix_pipeline.histories import import_runs
    from causalmix_pipeline.workspace import open_workspace

    console, names = new_console(), {}
    for pair in column or ():
        own, equals, theirs = pair.partition("=")
        if not (own and equals and theirs):
            raise ConfigError(f"--column must be mine=theirs, got {pair!r}: write both names.")
        if own in names:
            raise ConfigError(f"--column must name {own!r} once, got it again: drop one.")
        names[own] = theirs
    with open_workspace(config, console) as work:
        done = import_runs(
            work, ratios, metrics, covariates, source=source, trained_on=trained_on,
            randomised=randomised, columns=names,
        )  # fmt: skip
        place = work.config_file
    for note in done.notes:
        console.print(f"Left out: {escape(note)}.")
    kind = "randomised" if randomised else "observational"
    console.print(
        f"{done.runs.n_runs} runs of {done.runs.n_states} pool states, {kind}: "
        f"{escape(str(done.folder))}, named in {escape(str(place))}."
    )
    console.print(
        "causalmix refresh --train takes them into the effect model; of proxies it trains only "
        "those that are missing."
    )


def runs(
    out: Annotated[Path, typer.Option(help="Folder to write the tables into.")],
    config: ConfigOption = None,
) -> None:
    """Write the project's own runs as ratios.csv, metrics.csv and covariates.csv."""
    from causalmix_pipeline.core.runs import RunTable
    from causalmix_pipeline.histories import TABLES, export_runs
    from causalmix_pipeline.workspace import open_workspace

    check_folder(out, [])
    console = new_console()
    with open_workspace(config, console) as work:
        imported = work.settings.imported_runs
        check_outputs(
            [out / f"{name}.csv" for name in TABLES],
            [work.settings.resolve(getattr(one, name)) for one in imported for name in TABLES],
        )
        try:
            table = RunTable.from_frame(work.value("run_table"))
        except FileNotFoundError as error:
            raise ConfigError(
                "the project must have a run table, got none: run `causalmix refresh --train`."
            ) from error
        written = export_runs(table, work.settings.task_directions, out)
    for path in written:
        console.print(escape(str(path)))
