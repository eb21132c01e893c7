"""`causalmix recommend --checkpoint`: the next stage of a running training, in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from causalmix_pipeline.cli_output import check_outputs, new_console, new_table, write_frame
from causalmix_pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from causalmix_pipeline.next_stage import NextStage
    from causalmix_pipeline.workspace import Workspace

#: What a next stage is chosen from: assets of the experiment, and of a live pool.
_OF_RUNS = ("stage_table", "cate_model")
_OF_POOL = ("live_covariates", "baseline_mixtures", "recommended_schedule")


def recommend_next_stage(
    checkpoint: Path, live: str | None, config: Path | None, out: Path | None
) -> None:
    """Print, and perhaps write, the mixture of the next stage of a running training.

    Args:
        checkpoint: file of the training's checkpoint.
        live: name of one of several live pools.
        config: settings file of the project.
        out: file to write.

    Raises:
        ConfigError: if the project's runs have no stages, or aren't made.
    """
    check_outputs([out], [checkpoint])
    from causalmix_pipeline.next_stage import recommend_next
    from causalmix_pipeline.workspace import open_workspace

    console = new_console()
    with open_workspace(config, console) as work:
        values = _values(work, live)
        found = recommend_next(
            work.settings,
            checkpoint,
            stage_table=values["stage_table"],
            cate_model=values["cate_model"],
            live_covariates=values["live_covariates"],
            baselines=values["baseline_mixtures"],
            schedule=values["recommended_schedule"],
        )
    _print(console, found)
    if out is not None:
        import polars as pl

        pairs = zip(found.domains, found.row["mixture"], strict=True)
        shares = {f"share__{domain}": share for domain, share in pairs}
        gain = {name: found.row[name] for name in ("gain", "low", "high", "verdict")}
        write_frame(pl.DataFrame([{"stage": found.row["stage"], **shares, **gain}]), out)
        console.print(f"1 row: {escape(str(out))}")


def _values(work: "Workspace", live: str | None) -> dict[str, Any]:
    """The assets that a next stage is chosen from."""
    if work.settings.design.stages == 1:
        raise ConfigError(
            "design.stages must be 2 or more for --checkpoint, got 1: set it in "
            f"{work.config_file.name} and run `causalmix refresh --train`, which trains anew."
        )
    pools = work.chosen_pools(live)
    if len(pools) > 1:
        raise ConfigError(
            f"--live must name one of {', '.join(map(str, pools))}, got none: add it."
        )
    try:
        return {name: work.value(name) for name in _OF_RUNS} | {
            name: work.value(name, pools[0]) for name in _OF_POOL
        }
    except FileNotFoundError as error:
        raise ConfigError(
            "--checkpoint needs the project's recommended_schedule and what it rests on, got none "
            f"({error}): run `causalmix refresh --train` first."
        ) from error


def _print(console: Console, found: "NextStage") -> None:
    """The stage's shares, its part of the gain, and how it was chosen."""
    row = found.row
    bounds = "unknown" if row["low"] is None else f"{row['low']:+.4g} to {row['high']:+.4g}"
    gain = "-" if row["gain"] is None else f"{row['gain']:+.4g}"
    table = new_table(["stage", *found.domains, "gain", "90% interval", "verdict"], 0)
    shares = (f"{100 * share:.1f}%" for share in row["mixture"])
    table.add_row(str(row["stage"]), *shares, gain, bounds, row["verdict"])
    console.print(table)
    console.print("Gain: the stage's part of the run's gain over the reference.")
    if found.note:
        console.print(escape(found.note))
