"""The commands for people who have a table of runs: fit, predict, recommend, explain."""

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from causalmix_pipeline.core.errors import ConfigError

#: Seconds between two lines of progress where the output is no terminal.
PLAIN_SECONDS = 15.0

VERDICT_COLOURS = {"supported": "green", "extrapolating": "yellow", "unsupported": "red"}

ModelOption = Annotated[Path, typer.Option("--model", help="Folder that `causalmix fit` wrote.")]
OutOption = Annotated[Path, typer.Option("--out", help="CSV, or Parquet if it ends so.")]
CovariatesOption = Annotated[
    Path | None,
    typer.Option("--covariates", help="run,<domain>__<covariate>... (CSV or Parquet)."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (fit, predict, recommend, explain):
        app.command()(command)


def fit(
    ratios: Annotated[Path, typer.Option(help="run,<domain>...: shares (CSV or Parquet).")],
    metrics: Annotated[Path, typer.Option(help="run,<metric>... (CSV or Parquet).")],
    out: Annotated[Path, typer.Option(help="Folder to write the model into.")],
    covariates: CovariatesOption = None,
    minimize: Annotated[
        str | None, typer.Option(help="Metrics a,b that are losses; alone, all others are scores.")
    ] = None,
    maximize: Annotated[
        str | None, typer.Option(help="Metrics a,b where more is better; all others are losses.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="a=1,b=2: weights in the gain; unnamed metrics get 0. All alike if none."
        ),
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="An estimator's name; auto chooses per metric by cross-validation.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of folds, fits and searches.")] = 0,
) -> None:
    """Learn what mixtures do from a table of runs; trains no proxy."""
    from causalmix_pipeline import tables

    console = _console()
    with _progress(console) as on_progress:
        model = tables.fit(
            ratios,
            metrics,
            covariates,
            minimize=_names(minimize),
            maximize=_names(maximize),
            weights=_weights(weights),
            estimator=estimator,
            seed=seed,
            on_progress=on_progress,
        )
    model.save(out)
    runs = model.runs
    console.print(
        f"{runs.n_runs} runs, {len(runs.domains)} domains, "
        + (f"{runs.n_states} pool states" if runs.covariates else "no covariates")
    )
    for note in model.notes:
        console.print(f"Note: {escape(note)}.")
    console.print(_score_table(model))
    for line in _beliefs(model):
        console.print(line)
    console.print(f"Model: {escape(str(out))}")


def predict(
    model: ModelOption,
    ratios: Annotated[Path, typer.Option(help="run,<domain>... (CSV or Parquet).")],
    out: OutOption,
    covariates: CovariatesOption = None,
) -> None:
    """Predict each metric for mixtures, in its own units."""
    from causalmix_pipeline import tables

    frame = tables.predict(tables.Model.load(model), ratios, covariates)
    _write(frame, out)
    _console().print(f"{frame.height} rows: {escape(str(out))}")


def recommend(
    model: ModelOption,
    out: OutOption,
    pools: Annotated[
        Path | None,
        typer.Option(help="pool,<domain>__<covariate>..., perhaps <domain>__tokens."),
    ] = None,
    policy: Annotated[str, typer.Option(help="optimum, or the paper's search.")] = "optimum",
    reference: Annotated[
        str, typer.Option(help="What gains are measured from: equal, natural or a file.")
    ] = "equal",
    constraints: Annotated[
        Path | None,
        typer.Option(
            help="YAML: least_share, most_share, frozen, trust_radius, budget_tokens, max_epochs."
        ),
    ] = None,
) -> None:
    """Recommend a mixture for each pool, with its gain, a 90% interval, and a verdict."""
    from causalmix_pipeline import tables

    loaded = tables.Model.load(model)
    frame = tables.recommend(
        loaded, pools, policy=policy, reference=reference, constraints=constraints
    )
    _write(frame, out)
    console = _console()
    console.print(_recommendation_table(frame, loaded.runs.domains))
    console.print(
        f"Gain over the reference ({escape(reference)}): weighted mean over metrics, in their "
        "units, "
        "positive is better."
    )
    console.print(f"{frame.height} rows: {escape(str(out))}")


def explain(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """Write a page that shows effects, estimators, predictions and checks."""
    from causalmix_pipeline import explained
    from causalmix_pipeline.adapters.blobs import write_atomically
    from causalmix_pipeline.tables import Model

    page = explained.explain(Model.load(model))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode("utf-8"))
    _console().print(f"Page: {escape(str(out))}")


# ---------------------------------------------------------------------------- options


def _console() -> Console:
    out = Console(highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(highlight=False, width=110)


def _names(option: str | None) -> list[str]:
    """Names parted by commas; one that holds a comma is quoted, as in CSV."""
    if option is None:
        return []
    return [
        name.strip() for name in next(csv.reader([option], skipinitialspace=True)) if name.strip()
    ]


def _weights(option: str | None) -> dict[str, float] | None:
    weights = {}
    for part in _names(option):
        name, _, value = part.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"--weights must be name=number,..., got {part!r}: write a=1,b=2.")
    return weights or None


def _write(frame, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in (".parquet", ".pq"):
        frame.write_parquet(out)
    else:
        frame.write_csv(out)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """One line that tells how many fits are done and how long the rest takes."""
    began = told = time.monotonic()
    with console.status("reading the tables") as status:

        def on_progress(done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            left = (now - began) / done * (total - done)
            line = f"{done} of {total} fits, about {left:.0f} s left"
            status.update(line)
            if not console.is_terminal and now - told > PLAIN_SECONDS:
                told = now
                console.print(line)

        yield on_progress


# ---------------------------------------------------------------------------- what is printed


def _table(columns: list[str], left: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if i < left else "right")
    return table


def _score_table(model) -> Table:
    """Each estimator's scores on runs of unseen pool states, by metric."""
    table = _table(["metric", "estimator", "R2 within states", "R2", "Spearman", "in 90%"], 2)
    for task in model.runs.tasks:
        rows = [row for row in model.scores.to_dicts() if row["task"] == task]
        for row in rows:
            coverage = row["coverage_90"]
            table.add_row(
                escape(task),
                row["estimator"] + (" (answers)" if row["chosen"] else ""),
                *("-" if row[name] != row[name] else f"{row[name]:.3f}"
                  for name in ("r2_within", "r2", "spearman")),
                "-" if coverage is None else f"{100 * coverage:.0f}%",
                style="bold" if row["chosen"] else None,
            )  # fmt: skip
        table.add_section()
    return table


def _beliefs(model) -> Iterator[str]:
    """What can be told of noise and confounding."""
    from causalmix_pipeline.core.belief import OBSERVATIONAL_R2

    noise = model.noise().to_dicts()
    drowned = [row["task"] for row in noise if row["above_noise"] is False]
    if all(row["above_noise"] is None for row in noise):
        yield "Noise: unknown, since no run repeats a mixture in the same state."
    elif drowned:
        yield f"[yellow]Noise: mixtures move {escape(', '.join(drowned))} no more than seeds do.[/]"
    else:
        yield "Noise: mixtures move every metric more than seeds do."
    r2 = model.observational_r2()
    if r2 is None:
        yield "Confounding: can't be told without covariates."
    elif r2 > OBSERVATIONAL_R2:
        yield (
            f"[yellow]Confounding: the covariates tell the mixture (R2 {r2:.2f}), so the runs are "
            "observational and intervals aren't calibrated.[/]"
        )
    else:
        yield f"Confounding: the covariates don't tell the mixture (R2 {r2:.2f})."


def _recommendation_table(frame, domains, limit: int = 20) -> Table:
    table = _table(["pool", *domains, "gain", "90% interval", "verdict"], 1)
    for row in frame.head(limit).iter_rows():
        name, *shares, gain, low, high, verdict = row
        bounds = "unknown" if low is None else f"{low:+.4g} to {high:+.4g}"
        table.add_row(
            escape(name), *(f"{100 * s:.1f}%" for s in shares),
            "-" if gain is None else f"{gain:+.4g}", bounds,
            f"[{VERDICT_COLOURS[verdict]}]{verdict}[/]",
        )  # fmt: skip
    if frame.height > limit:
        table.caption = f"the first {limit} of {frame.height} pools"
    return table
