"""The checkpoint of a running training as a file: fraction, and losses of each domain.

CSV has a row per domain: `domain,fraction,loss,slope,tokens`. JSON has
`{"fraction": 0.5, "domains": {"math": {"loss": 3.1, "slope": -1.2, "tokens": 1000000}}}`. Losses
are nats per token of training text; a slope is their change over the stage before, per whole
training; both may be left out where fraction is 0, the slope also after the first stage, and tokens
always.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.stages import StagedRuns


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What is known of a running training.

    Attributes:
        fraction: part of it that is done, in [0, 1).
        loss_D: nats per token of each domain; None where unknown.
        slope_D: their slopes; None where unknown.
        tokens_D: tokens of each domain read so far; None where unknown.
    """

    fraction: float
    loss_D: np.ndarray | None
    slope_D: np.ndarray | None
    tokens_D: np.ndarray | None


def read_checkpoint(path: Path, domains: Sequence[str]) -> Checkpoint:
    """Read a CSV, Parquet or JSON file.

    Args:
        path: the file.
        domains: those that it must tell of, in the order of the arrays.

    Raises:
        ConfigError: if there is no such file, a domain is missing, unknown or given twice, or a
            number is missing or can't be.
        EstimationError: if a table can't be read.
    """
    rows, fractions = _rows(path)
    if set(rows) != set(domains):
        odd = sorted(set(rows) ^ set(domains))
        raise ConfigError(
            f"{path.name}: domains must be {', '.join(domains)}, got {', '.join(rows) or 'none'}: "
            f"add or drop {', '.join(odd)}."
        )
    if len(fractions) != 1:
        told = ", ".join(sorted(map(str, fractions)))
        raise ConfigError(
            f"{path.name}: fraction must be one number for all domains, got {told or 'none'}: "
            "write the same in each row."
        )
    fraction = _number(path, "fraction", fractions.pop())
    if fraction is None or not 0 <= fraction < 1:
        raise ConfigError(
            f"{path.name}: fraction must be in [0, 1), got {fraction}: write the part of the "
            "training that is done."
        )
    columns = {
        name: [_number(path, f"{name} of {domain}", rows[domain].get(name)) for domain in domains]
        for name in ("loss", "slope", "tokens")
    }
    arrays = {
        name: None if None in values else np.array(values, dtype=float)
        for name, values in columns.items()
    }
    _check_tokens(path, fraction, dict(zip(domains, columns["tokens"], strict=True)))
    return Checkpoint(fraction, arrays["loss"], arrays["slope"], arrays["tokens"])


def _check_tokens(path: Path, fraction: float, tokens: Mapping[str, float | None]) -> None:
    """Refuse tokens that can't be: they limit what is left of a domain."""
    if all(count is None for count in tokens.values()):
        return
    for domain, count in tokens.items():
        if count is None or count < 0:
            raise ConfigError(
                f"{path.name}: tokens of {domain} must be 0 or more, as other domains have them, "
                f"got {'none' if count is None else f'{count:g}'}: correct it, or leave tokens out "
                "for all domains."
            )
    if fraction > 0 and not any(tokens.values()):
        raise ConfigError(
            f"{path.name}: tokens of {', '.join(tokens)} must not all be 0 at fraction "
            f"{fraction:g}: write what was read so far, or leave tokens out for all domains."
        )


def _by_domain(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs by domain, each given once."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{path.name}: each domain must be given once, got {', '.join(twice)} more than once: "
            "keep one of them."
        )
    return dict(pairs)


def _rows(path: Path) -> tuple[dict[str, Mapping[str, Any]], set[Any]]:
    """What the file says of each domain, and the fractions that it names."""
    if path.suffix.lower() != ".json":
        table = open_table(path, "--checkpoint")
        lacking = {"domain", "fraction"} - set(table.frame.columns)
        if lacking:
            raise ConfigError(
                f"{path.name} must have the columns domain, fraction, loss, slope and tokens, got "
                f"{', '.join(table.frame.columns)}: add {', '.join(sorted(lacking))}."
            )
        rows = table.frame.to_dicts()
        by_domain = _by_domain(path, [(str(row["domain"]), row) for row in rows])
        for domain, row in by_domain.items():
            if row["fraction"] is None or row["fraction"] == "":
                raise ConfigError(
                    f"{path.name}: fraction of {domain} must be a number, got none: write the same "
                    "in each row."
                )
        return by_domain, {row["fraction"] for row in rows}
    if not path.is_file():
        raise ConfigError(f"--checkpoint must be a CSV or JSON file, got {path}: no such file.")
    try:
        text = path.read_text("utf-8")
        values = json.loads(text, object_pairs_hook=lambda pairs: _by_domain(path, pairs))
        return {name: dict(row) for name, row in values["domains"].items()}, {values["fraction"]}
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path.name} must be JSON with fraction and domains, got {type(error).__name__} "
            f'({error}): write {{"fraction": 0.5, "domains": {{"a": {{"loss": 3.1}}}}}}.'
        ) from error


def _number(path: Path, name: str, value: Any) -> float | None:
    """A finite number, or None where there is none."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise ConfigError(
            f"{path.name}: {name} must be a finite number, got {value!r}: correct it or leave it "
            "out."
        )
    return number


def checkpoint_frame(staged: StagedRuns, run_id: str, stage: int) -> pl.DataFrame:
    """The checkpoint from which a proxy run started a stage, as the columns of such a file.

    Args:
        staged: the runs.
        run_id: one of them.
        stage: counted from 0.
    """
    run = staged.runs.run_ids.index(run_id)
    return pl.DataFrame(
        {
            "domain": list(staged.runs.domains),
            "fraction": [stage / staged.n_stages] * len(staged.runs.domains),
            "loss": staged.loss_NSD[run, stage],
            "slope": staged.slope_NSD[run, stage],
            "tokens": staged.tokens_NSD[run, stage],
        }
    ).with_columns(pl.col("loss").fill_nan(None))
