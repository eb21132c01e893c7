"""Tables as people have them, CSV, Parquet or frames: opened, rows told apart, cells made numbers.

Every refusal names file, column, row and the way out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import ConfigError, EstimationError

#: Columns that name a run, the first that all tables have; none of them is a domain or a metric.
KEYS = ("run", "run_id", "index", "name")


@dataclass(frozen=True, eq=False)
class Table:
    """A frame and what to call it in a message: its file, or the argument's name."""

    frame: pl.DataFrame
    name: str

    @property
    def value_columns(self) -> list[str]:
        """All columns but those that name the run."""
        return [column for column in self.frame.columns if column not in KEYS]


def open_table(source: Any, argument: str) -> Table:
    """Take a frame, or read a CSV or Parquet file.

    Args:
        source: a polars (or pandas) frame, or a path.
        argument: what to call a frame in messages.

    Raises:
        ConfigError: if there is no such file.
        EstimationError: if the file can't be read, has no row, or names a column twice or not.
    """
    if not isinstance(source, str | Path):
        frame = source if isinstance(source, pl.DataFrame) else pl.DataFrame(source)
        return _check_table(Table(frame, argument))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{argument} must be a CSV or Parquet file, got {path}: no such file.")
    if path.suffix.lower() in (".parquet", ".pq"):
        try:
            return _check_table(Table(pl.read_parquet(path), path.name))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise EstimationError(f"{path} can't be read as Parquet: {error}") from error
    return _check_table(Table(_read_csv(path), path.name))


def _read_csv(path: Path) -> pl.DataFrame:
    """All cells as text; empty ones are null."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise EstimationError(
            f"{path} must be CSV in UTF-8, got {error}: save it as UTF-8."
        ) from error
    _refuse_names(header, path.name)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise EstimationError(
                f"{path.name}: row {number} must have {len(header)} cells as the header has, got "
                f"{len(row)}: correct it, or quote a name that holds a comma."
            )
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return pl.DataFrame(
        [
            pl.Series(name, [cell or None for cell in column], dtype=pl.String)
            for name, column in zip(header, columns, strict=True)
        ]
    )


def _check_table(table: Table) -> Table:
    _refuse_names(table.frame.columns, table.name)
    if not table.frame.height:
        raise EstimationError(f"{table.name} must have at least one row, got none: add rows.")
    return table


def _refuse_names(names: Sequence[str], table: str) -> None:
    for position, name in enumerate(names, start=1):
        if not name.strip():
            raise EstimationError(
                f"{table}: column {position} must have a name, got {name!r}: name it, or drop it "
                "(a row number that a data frame wrote, as a rule)."
            )
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise EstimationError(
            f"{table}: column {twice!r} occurs {list(names).count(twice)} times: drop or rename "
            "one."
        )


def shared_key(tables: Sequence[Table]) -> str:
    """The column that names the run in all tables.

    Raises:
        EstimationError: if there is none.
    """
    for key in KEYS:
        if all(key in table.frame.columns for table in tables):
            return key
    lacking = next(t for t in tables if not set(KEYS) & set(t.frame.columns)) if any(
        not set(KEYS) & set(t.frame.columns) for t in tables) else tables[-1]  # fmt: skip
    raise EstimationError(
        f"{' and '.join(table.name for table in tables)} must share a column that names the run "
        f"({', '.join(KEYS)}), but {lacking.name} has "
        f"{', '.join(lacking.frame.columns[:4])}...: add "
        "the column `run`."
    )


def row_ids(table: Table, key: str) -> list[str]:
    """Return what names each row, as text; none may be empty."""
    column = table.frame[key]
    if column.dtype.is_float() and (column.drop_nulls() % 1 == 0).all():
        column = column.cast(pl.Int64)
    ids = [("" if value is None else str(value)).strip() for value in column.to_list()]
    if "" in ids:
        raise EstimationError(
            f"{table.name}: column {key!r} must name every row, got nothing in row "
            f"{ids.index('') + 1}: fill it in."
        )
    return ids


def rows_by_id(table: Table, key: str) -> dict[str, int]:
    """Return the row of each name; none may occur twice."""
    rows: dict[str, int] = {}
    for row, name in enumerate(row_ids(table, key)):
        if name in rows:
            raise EstimationError(
                f"{table.name}: column {key!r} must not name a row twice, got {name!r} in rows "
                f"{rows[name] + 1} and {row + 1}: drop one, or name the second otherwise."
            )
        rows[name] = row
    return rows


def numbers(table: Table, columns: Sequence[str], key: str, rows: Sequence[int]) -> np.ndarray:
    """Values of some rows and columns as finite numbers; shape (rows, columns)."""
    ids = table.frame[key].to_list()
    values = np.empty((len(rows), len(columns)))
    for c, name in enumerate(columns):
        column = table.frame[name]
        if column.dtype == pl.String:
            number = column.str.strip_chars().cast(pl.Float64, strict=False)
        elif column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
            number = column.cast(pl.Float64)
        else:
            raise EstimationError(
                f"{table.name}: column {name!r} must hold numbers, got {column.dtype}: drop it."
            )
        values[:, c] = number.fill_null(float("nan")).to_numpy()[list(rows)]
        bad = np.flatnonzero(~np.isfinite(values[:, c]))
        if len(bad):
            row = rows[bad[0]]
            raise EstimationError(
                f"{table.name}: column {name!r} must hold a finite number in every row, got "
                f"{column[row]!r} in row {row + 1} ({key} {str(ids[row])!r}; {len(bad)} such "
                "rows): drop the row, or drop the column."
            )
    return values
