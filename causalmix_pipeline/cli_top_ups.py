"""The commands for pools out of reach: plan a few further runs, condition a model on them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from causalmix_pipeline.cli_output import (
    CovariatesOption,
    ModelOption,
    OutOption,
    check_folder,
    check_outputs,
    new_console,
    new_table,
    write_frame,
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("top-up")(top_up)
    app.command()(condition)


def top_up(
    model: ModelOption,
    pools: Annotated[
        Path, typer.Option(help="pool,<domain>__<covariate>..., perhaps <domain>__tokens.")
    ],
    out: OutOption,
    runs: Annotated[int, typer.Option(min=1, help="Runs for each pool out of reach.")] = 16,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of mixtures; the model's if none.")
    ] = None,
) -> None:
    """List mixtures to train at each pool that is out of the model's reach."""
    from causalmix_pipeline import tables, top_ups

    check_outputs([out], [model, pools])
    plan = top_ups.plan_top_up(tables.Model.load(model), pools, runs, seed)
    write_frame(plan, out)
    console = new_console()
    if not plan.height:
        console.print("All pools are supported: no top-up is needed.")
        console.print(f"0 rows: {escape(str(out))}")
        return
    table = new_table(["pool out of reach", "runs to train"], 1)
    for pool, n_runs in plan.group_by("pool", maintain_order=True).len().iter_rows():
        table.add_row(escape(pool), str(n_runs))
    console.print(table)
    console.print(
        "Train each row on its pool and measure the model's metrics; then causalmix condition, "
        "with this file as --ratios."
    )
    console.print(f"{plan.height} rows: {escape(str(out))}")


def condition(
    model: ModelOption,
    ratios: Annotated[Path, typer.Option(help="run,<domain>...: shares (CSV or Parquet).")],
    metrics: Annotated[Path, typer.Option(help="run,<metric>... (CSV or Parquet).")],
    out: Annotated[Path, typer.Option(help="Folder to write the new model into.")],
    covariates: CovariatesOption = None,
) -> None:
    """Condition a model on further runs, such as a top-up; nothing is chosen or searched again."""
    from causalmix_pipeline import tables, top_ups

    check_folder(out, [ratios, metrics, covariates])
    conditioned = top_ups.condition(tables.Model.load(model), ratios, metrics, covariates)
    conditioned.save(out)
    console = new_console()
    console.print(f"{conditioned.runs.n_runs} runs, {conditioned.runs.n_states} pool states")
    for note in conditioned.notes:
        console.print(f"Note: {escape(note)}.")
    console.print(f"Model: {escape(str(out))}")
