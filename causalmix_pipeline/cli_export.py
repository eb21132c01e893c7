"""The command that hands a recommended mixture to a trainer: export."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from causalmix_pipeline.cli_output import ConfigOption, check_folder, new_console, new_table
from causalmix_pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from causalmix_pipeline.adapters.trainer_formats import HandedOver
    from causalmix_pipeline.resources.settings import Settings

#: Seconds between two lines of progress where the output is no terminal.
PLAIN_SECONDS = 15.0


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(export)


def export(
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="json, datasets, llama_factory, trl, megatron, olmo_core, torchtitan, "
            "mosaic_streaming, axolotl or olmix.",
        ),
    ] = "json",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of the training run; the recommendation's budget if none."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; data/export/FORMAT, for a pool of a name "
            "data/export/NAME/FORMAT, if none."
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            help="jsonl or parquet: also write the documents, shuffled, each as often as the "
            "mixture asks; by domain where the trainer mixes by itself."
        ),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Name in pools.live, where there are several.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Write the recommended mixture for a trainer, from what was made last; refreshes nothing."""
    from causalmix_pipeline.adapters.export_sample import KINDS
    from causalmix_pipeline.adapters.trainer_formats import FORMATS, hand_over
    from causalmix_pipeline.assets.training_export import export_of
    from causalmix_pipeline.resources.live_pools import live_pool
    from causalmix_pipeline.resources.progress import progress_teller
    from causalmix_pipeline.resources.project import Project
    from causalmix_pipeline.resources.settings_file import load_settings
    from causalmix_pipeline.workspace import find_config

    for option, value, known in (("--format", format_, FORMATS), ("--sample", sample, KINDS)):
        if value is not None and value not in known:
            raise ConfigError(f"{option} must be one of {', '.join(known)}, got {value!r}.")
    path = find_config(config)
    settings = load_settings(path)
    live = live_pool(settings, pool)
    folder = out or live.folder("export", format_)
    check_folder(folder, [])
    made = export_of(
        settings,
        stored_value(settings, "recommended_mixture", pool),
        stored_value(settings, "live_documents", pool),
        tokens=tokens,
    )
    spec = Project(config_file=str(path.resolve())).pool_spec(live.location, None)
    console = new_console()
    with _progress(console) as tell:
        handed = hand_over(
            folder, made, format_, spec, sample=sample, on_progress=progress_teller(tell)
        )
    console.print(shares_table(handed))
    print_places(console, handed, folder)


def stored_value(settings: "Settings", asset: str, pool: str | None) -> Any:
    """The value of an asset as it was made last.

    Raises:
        ConfigError: if it was never made.
    """
    from causalmix_pipeline.adapters.sealed_frames import read_value
    from causalmix_pipeline.resources.asset_keys import asset_key
    from causalmix_pipeline.resources.frame_store import value_path

    try:
        return read_value(value_path(settings.assets_root, asset_key(settings, asset), pool))
    except FileNotFoundError as error:
        raise ConfigError(
            f"an export needs a recommended mixture, but {asset} was never made: run `causalmix "
            f"refresh{'' if pool is None else f' --pool {pool}'}` first."
        ) from error


def shares_table(handed: "HandedOver", limit: int = 60) -> Table:
    """Asked and achieved shares of tokens, tokens and epochs of each domain."""
    export = handed.export
    told = export.to_dict()
    table = new_table(["domain", "asked", "achieved", "tokens", "epochs"], 1)
    for d, domain in enumerate(export.domains[:limit]):
        table.add_row(
            escape(one_line(domain)),
            f"{100 * export.mixture_D[d]:.2f}%",
            f"{100 * handed.achieved_D[d]:.2f}%",
            f"{told['tokens'][domain]:,}",
            f"{told['epochs'][domain]:.2f}",
        )
    if len(export.domains) > limit:
        table.caption = f"the first {limit} of {len(export.domains)} domains"
    return table


def one_line(label: str, length: int = 40) -> str:
    """A label without letters that break the line or turn what follows, cut where it is long."""
    seen = "".join(letter if letter.isprintable() else "?" for letter in label)
    return seen if len(seen) <= length else f"{seen[: length - 1]}…"


def print_places(console: Console, handed: "HandedOver", folder: Path) -> None:
    """Verdict, counts of the sample, and where everything is."""
    export = handed.export
    if export.verdict != "supported":
        console.print(f"[yellow]Overlap verdict of this mixture: {export.verdict}.[/]")
    if export.sample is not None:
        rows = int(export.manifest["copies"].sum())
        tokens = sum(export.tokens_of().values())
        console.print(
            f"Sample: {rows:,} rows of {export.manifest.height:,} documents, {tokens:,} tokens, "
            f"as {export.sample}."
        )
    names = ", ".join(sorted(path.name for path in handed.paths))
    console.print(f"Files: {escape(names)}")
    console.print(f"Folder: {escape(str(folder))}", soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """One line that tells how much of a sample is done and how long the rest takes."""
    from causalmix_pipeline.resources.progress import PROGRESS_PREFIX

    told = time.monotonic()
    with console.status("choosing documents") as status:

        def tell(line: str) -> None:
            nonlocal told
            text = escape(line.removeprefix(PROGRESS_PREFIX))
            status.update(text)
            if not console.is_terminal and time.monotonic() - told > PLAIN_SECONDS:
                told = time.monotonic()
                console.print(f"  {text}")

        yield tell
