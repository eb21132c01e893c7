"""What the commands for tables share: options, the terminal, tables and files they write."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

ModelOption = Annotated[Path, typer.Option("--model", help="Folder that `causalmix fit` wrote.")]
OutOption = Annotated[Path, typer.Option("--out", help="CSV, or Parquet if it ends so.")]
CovariatesOption = Annotated[
    Path | None,
    typer.Option("--covariates", help="run,<domain>__<covariate>... (CSV or Parquet)."),
]


def new_console() -> Console:
    """The terminal; wide enough for tables where the output is a file."""
    out = Console(highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(highlight=False, width=110)


def new_table(columns: list[str], left: int) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if i < left else "right")
    return table


def write_frame(frame: "pl.DataFrame", out: Path) -> None:
    """Write a frame as CSV, or Parquet if the name ends so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in (".parquet", ".pq"):
        frame.write_parquet(out)
    else:
        frame.write_csv(out)
