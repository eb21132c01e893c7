"""`causalmix profile`: a pool's covariates in one command, with no experiment and no Dagster run.

The folder it writes holds `documents.parquet` (a row per document), `covariates.parquet` (a row per
domain and covariate, with standard errors), `quarantine.parquet`, and `tokenizer.json`: the scale.
A second pool that is profiled like the first is on the same scale, and is compared with it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from causalmix_pipeline.adapters.experiment import PoolTokenizer, fit_on_sample
from causalmix_pipeline.adapters.profiler import PoolProfile, profile_pool
from causalmix_pipeline.adapters.profiler import Progress as OnProgress
from causalmix_pipeline.adapters.run_store import write_atomically
from causalmix_pipeline.adapters.sealed_frames import read_value, write_value
from causalmix_pipeline.assets.pool import TOKENIZER_BYTES, plans_of
from causalmix_pipeline.console import minutes, new_table
from causalmix_pipeline.core.covariates import check_scorers, covariates_of, measure_covariates
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pool_change import PoolChange, compare_profiles, covariate_errors
from causalmix_pipeline.resources.project import Project

#: Covariates of the table on the screen; all of them are in the folder.
SHOWN = ("compress_ratio", "bigram_cross_entropy", "mtld", "near_duplicate")


def profile_to_folder(
    project: Project,
    location: str | Path,
    out: Path,
    console: Console,
    *,
    like: Path | None = None,
) -> PoolProfile:
    """Profile a pool into a folder, and say what was found.

    Args:
        project: settings, score store and workers.
        location: the pool.
        out: where to write.
        console: where to print.
        like: folder of an earlier profile, whose scale is used and which is compared with; without
            it, an earlier profile in `out` gives the scale.

    Raises:
        ConfigError: if `like` is no profile.
        PoolError: if the pool can't be read, or the earlier profile was measured otherwise.
    """
    started = time.monotonic()
    spec = project.pool_spec(location, project.settings.domains)
    with progress_bars(console) as on_progress:
        if like is not None:
            tokenizer = read_tokenizer(like)
        elif (out / "tokenizer.json").is_file():  # a pool that is profiled again keeps its scale
            tokenizer = read_tokenizer(out)
        else:
            on_progress("looks at the pool", 0, 1)
            size = project.settings.proxy.pool_vocab_size
            fitted: list[PoolTokenizer] = []
            project.workers.run(
                fit_on_sample,
                [(spec, TOKENIZER_BYTES, size)],
                lambda index, result: fitted.append(result),
            )
            tokenizer = fitted[0]
            on_progress("looks at the pool", 1, 1)
        plans = plans_of(project, tokenizer)
        before = None if like is None else read_value(like / "documents.parquet")
        if before is not None:
            keys = [plan.scorer.key for plan in plans]
            check_scorers(before["scorers"][0].split(";"), keys, f"pool {location}", str(like))
        found = profile_pool(
            spec,
            plans,
            store=project.score_store,
            workers=project.workers,
            scratch=project.folder("scratch"),
            on_progress=on_progress,
        )
    documents = found.documents
    domains = documents["domain"].unique().sort().to_list()
    covariates = covariate_table(documents, domains)
    write_atomically(out / "tokenizer.json", json.dumps(tokenizer.to_dict()).encode())
    write_value(out / "quarantine.parquet", found.quarantine)
    write_value(out / "covariates.parquet", covariates)
    write_value(out / "documents.parquet", documents)
    print_profile(console, found, covariates)
    if before is not None:
        change = compare(before, documents)
        write_value(out / "changes.parquet", change.to_frame())
        print_change(console, change)
    console.print(f"\nTook {minutes(time.monotonic() - started)}; kept in {out}")
    return found


def read_tokenizer(folder: Path) -> PoolTokenizer:
    """The tokenizer of an earlier profile.

    Raises:
        ConfigError: if the folder holds none.
    """
    try:
        return PoolTokenizer.from_dict(json.loads((folder / "tokenizer.json").read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--like must be the folder of an earlier `causalmix profile`, got {folder}, which "
            f"holds no tokenizer.json that can be read ({error}). Name another, or profile that "
            "pool again into a new folder."
        ) from error


def covariate_table(documents: pl.DataFrame, domains: Sequence[str]) -> pl.DataFrame:
    """One row per domain and covariate: value and standard error."""
    names = covariates_of(documents)
    values_DP = measure_covariates(documents, domains, names)
    errors_DP = covariate_errors(documents, domains, names)
    return pl.DataFrame(
        {
            "domain": [domain for domain in domains for _ in names],
            "covariate": [*names] * len(domains),
            "value": values_DP.ravel(),
            "se": errors_DP.ravel(),
        }
    ).with_columns(pl.col("value", "se").fill_nan(None))


def compare(before: pl.DataFrame, after: pl.DataFrame) -> PoolChange:
    """What changed between two profiles, over the domains and covariates that both have."""
    domains = sorted(set(before["domain"].unique()) & set(after["domain"].unique()))
    shared = set(covariates_of(before)) & set(covariates_of(after))
    names = [name for name in covariates_of(after) if name in shared]
    only = pl.col("domain").is_in(domains)
    return compare_profiles(before.filter(only), after.filter(only), domains, names)


def print_profile(console: Console, found: PoolProfile, covariates: pl.DataFrame) -> None:
    """A row per domain, and how much was new."""
    values = {(row["domain"], row["covariate"]): row for row in covariates.to_dicts()}
    table = new_table(["domain", "documents", "tokens", *SHOWN], left=["domain"])
    counted = found.documents.group_by("domain", maintain_order=True).agg(
        documents=pl.len(), tokens=pl.col("n_tokens").sum()
    )
    for domain, documents, tokens in counted.iter_rows():
        cells = []
        for name in SHOWN:
            row = values[domain, name]
            cells.append("-" if row["value"] is None else f"{row['value']:.3f}")
        table.add_row(domain, f"{documents:,}", f"{tokens:,}", *cells)
    console.print(table)
    console.print(
        f"{found.n_rows:,} rows read, {found.quarantine.height:,} refused, "
        f"{found.documents.height:,} distinct documents, "
        f"{max(found.n_scored.values()):,} scored now."
    )


def print_change(console: Console, change: PoolChange, limit: int = 10) -> None:
    """Documents in and out, and what moved by three standard errors or more."""
    table = new_table(["domain", "in", "out", "kept"], left=["domain"])
    for row in change.documents.iter_rows(named=True):
        numbers = (row[f"documents_{what}"] for what in ("in", "out", "kept"))
        table.add_row(row["domain"], *(f"{number:,}" for number in numbers))
    console.print(table)
    moved = change.moved()
    if moved.is_empty():
        console.print("No covariate moved by three standard errors or more.")
        return
    table = new_table(
        ["domain", "covariate", "before", "after", "effect", "z"], left=["domain", "covariate"]
    )
    for row in moved.head(limit).iter_rows(named=True):
        numbers = (row[name] for name in ("before", "after", "effect", "z"))
        cells = ("-" if number is None else f"{number:.3f}" for number in numbers)
        table.add_row(row["domain"], row["covariate"], *cells)
    console.print(table)
    if moved.height > limit:
        console.print(f"and {moved.height - limit} more in changes.parquet")


@contextmanager
def progress_bars(console: Console) -> Iterator[OnProgress]:
    """A bar for each stage of the work, with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24),
               TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    told = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, object] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            nonlocal told
            if what not in tasks:
                tasks[what] = bars.add_task(what[:38].ljust(38), total=total)
            bars.update(tasks[what], completed=done, total=total)  # pyright: ignore[reportArgumentType]
            now = time.monotonic()
            if not console.is_terminal and now - told > 15:
                told = now
                console.print(f"  {done} of {total} {what}")

        yield on_progress
