"""What the commands for tables share: options, the terminal, tables and files they write."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from causalmix_pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    import polars as pl

ModelOption = Annotated[Path, typer.Option("--model", help="Folder that `causalmix fit` wrote.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Settings file; without it causalmix.yaml, else data/demo.yaml."
    ),
]
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


def check_outputs(outs: Sequence[Path | None], inputs: Sequence[Path | str | None]) -> None:
    """Refuse outputs that can't be written or would overwrite an input, before any work.

    Args:
        outs: files to write.
        inputs: files that are read, and folders of models, in which nothing else is written.

    Raises:
        ConfigError: naming the file and the way out.
    """
    taken = {Path(path).resolve(): "an input" for path in inputs if path is not None}
    for out in outs:
        if out is None:
            continue
        place = out.resolve()
        folder = next((path for path in place.parents if path in taken and path.is_dir()), None)
        if place in taken or folder is not None:
            what = "a file of the model" if folder is not None else taken[place]
            raise ConfigError(
                f"{out} is {what} of the same command, so it would be overwritten: write to "
                "another file."
            )
        taken[place] = "another output"
        if out.is_dir():
            raise ConfigError(f"{out} must be a file to write, got a folder: name a file in it.")
        _check_parent(out)


def check_folder(out: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse a folder that can't be made or written into, or that inputs lie in, before any work.

    Raises:
        ConfigError: naming it and the way out.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} must be a folder, got a file: name another.")
    for path in inputs:
        if path is not None and path.resolve().parent == out.resolve():
            raise ConfigError(
                f"{out} holds {path.name}, an input, which the model could overwrite: write the "
                "model into another folder."
            )
    _check_parent(out / "model.json")


def _check_parent(out: Path) -> None:
    """See that a file's folder, or the nearest that exists above it, can be written into."""
    folder = next(path for path in out.absolute().parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} can't be written into: choose another folder for {out.name}.")


def write_frame(frame: "pl.DataFrame", out: Path) -> None:
    """Write a frame as CSV, or Parquet if the name ends so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in (".parquet", ".pq"):
        frame.write_parquet(out)
    else:
        frame.write_csv(out)
