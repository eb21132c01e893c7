"""The commands for people who have a table of runs: fit, predict, recommend, explain."""

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from causalmix_pipeline.cli_output import (
    ConfigOption,
    CovariatesOption,
    ModelOption,
    OutOption,
    check_folder,
    check_outputs,
    new_console,
    new_table,
    write_frame,
)
from causalmix_pipeline.core.errors import ConfigError

#: Seconds between two lines of progress where the output is no terminal.
PLAIN_SECONDS = 15.0

VERDICT_COLOURS = {"supported": "green", "extrapolating": "yellow", "unsupported": "red"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (fit, predict, recommend, pareto, baselines, explain):
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
    check_folder(out, [ratios, metrics, covariates])
    from causalmix_pipeline import tables

    console = new_console()
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
    lost = [row["task"] for row in model.scores.filter("chosen").to_dicts() if _no_better(row)]
    if lost:
        console.print(
            f"[yellow]Fit: {escape(', '.join(lost))} can't be predicted better than by the mean; "
            "gains of it mean nothing.[/]"
        )
    for line in _beliefs(model):
        console.print(line)
    console.print(f"Model: {escape(str(out))}")


def _no_better(row: dict) -> bool:
    """Whether an estimator predicts runs left out no better than their mean."""
    r2 = row["r2"] if row["r2_within"] != row["r2_within"] else row["r2_within"]
    return not r2 > 0


def predict(
    model: ModelOption,
    ratios: Annotated[Path, typer.Option(help="run,<domain>... (CSV or Parquet).")],
    out: OutOption,
    covariates: CovariatesOption = None,
) -> None:
    """Predict each metric for mixtures, in its own units."""
    check_outputs([out], [model, ratios, covariates])
    from causalmix_pipeline import tables

    frame = tables.predict(tables.Model.load(model), ratios, covariates)
    write_frame(frame, out)
    new_console().print(f"{frame.height} rows: {escape(str(out))}")


PoolsOption = Annotated[
    Path | None, typer.Option("--pools", help="pool,<domain>__<covariate>..., perhaps __tokens.")
]
ReferenceOption = Annotated[
    str, typer.Option("--reference", help="Gains are from it: equal, natural or a file.")
]
ConstraintsOption = Annotated[
    Path | None,
    typer.Option(
        "--constraints",
        help="YAML: least_share, most_share, frozen, trust_radius, budget_tokens, max_epochs, "
        "guard_rails.",
    ),
]


def recommend(
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder that `causalmix fit` wrote.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="CSV, or Parquet if it ends so.")
    ] = None,
    pools: PoolsOption = None,
    policy: Annotated[
        str, typer.Option(help="optimum, or the paper's search or analytical.")
    ] = "optimum",
    reference: ReferenceOption = "equal",
    constraints: ConstraintsOption = None,
    slack: Annotated[
        Path | None, typer.Option(help="File for the slack of each pool's constraints.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a model, in a project with design.stages: domain,fraction,loss,slope,"
            "tokens of a running training (CSV or JSON), for the mixture of its next stage."
        ),
    ] = None,
    live: Annotated[
        str | None, typer.Option(help="With --checkpoint: name of one of several live pools.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Recommend a mixture for each pool, with its gain, a 90% interval, and a verdict."""
    if checkpoint is not None:
        if model is not None or pools is not None:
            raise ConfigError(
                f"--checkpoint {checkpoint} is of a project, and goes without --model and --pools, "
                f"got {model or pools}: drop one of them."
            )
        from causalmix_pipeline.cli_next_stage import recommend_next_stage

        recommend_next_stage(checkpoint, live, config, out)
        return
    if model is None or out is None:
        raise ConfigError(
            "recommend needs --model and --out, or --checkpoint in a project, got "
            f"{'--out alone' if out else '--model alone' if model else 'neither'}: name them."
        )
    check_outputs([out, slack], [model, pools, constraints, reference])
    from causalmix_pipeline import tables

    loaded = tables.Model.load(model)
    found = tables.recommend_in_full(
        loaded, pools, policy=policy, reference=reference, constraints=constraints
    )
    write_frame(found.mixtures, out)
    console = new_console()
    console.print(_recommendation_table(found.mixtures, loaded.runs.domains))
    console.print(
        f"Gain over the reference ({escape(reference)}): weighted mean over metrics, in their "
        "units, "
        "positive is better."
    )
    for line in _constraint_lines(found):
        console.print(line)
    if slack is not None:
        write_frame(found.slack, slack)
        console.print(f"Slack: {escape(str(slack))}")
    console.print(f"{found.mixtures.height} rows: {escape(str(out))}")


def pareto(
    model: ModelOption,
    metrics: Annotated[str, typer.Option(help="Two metrics a,b to trade for one another.")],
    out: OutOption,
    pools: PoolsOption = None,
    pool: Annotated[str | None, typer.Option(help="Name of the pool; the first if none.")] = None,
    reference: ReferenceOption = "equal",
    constraints: ConstraintsOption = None,
) -> None:
    """Show what one metric costs another: mixtures of which none is better in both."""
    check_outputs([out], [model, pools, constraints, reference])
    from causalmix_pipeline import tables

    pair = _names(metrics)
    if len(pair) != 2:
        raise ConfigError(f"--metrics must name two metrics, got {metrics!r}: write a,b.")
    loaded = tables.Model.load(model)
    frame = tables.pareto(
        loaded, pair[0], pair[1], pools, pool, constraints=constraints, reference=reference
    )
    write_frame(frame, out)
    console = new_console()
    table = new_table([*loaded.runs.domains, pair[0], pair[1]], 0)
    for row in frame.iter_rows(named=True):
        shares = (f"{100 * row[domain]:.1f}%" for domain in loaded.runs.domains)
        table.add_row(*shares, f"{row['gain_first']:+.4g}", f"{row['gain_second']:+.4g}")
    console.print(table)
    console.print(f"Gains over the reference ({escape(reference)}), positive is better.")
    console.print(f"{frame.height} rows: {escape(str(out))}")


def baselines(
    model: ModelOption,
    out: OutOption,
    pools: PoolsOption = None,
    reference: ReferenceOption = "equal",
    fixed: Annotated[
        Path | None, typer.Option(help="File with the shares of a mixture tuned by hand.")
    ] = None,
) -> None:
    """What simpler methods would mix, and the gains that the model predicts of it."""
    check_outputs([out], [model, pools, reference, fixed])
    from causalmix_pipeline import tables

    loaded = tables.Model.load(model)
    frame = tables.baselines(loaded, pools, reference=reference, fixed=fixed)
    write_frame(frame, out)
    console = new_console()
    table = new_table(["pool", "baseline", *loaded.runs.domains, "gain", "90% interval"], 2)
    for pool, name, *shares, gain, low, high in frame.head(40).iter_rows():
        bounds = "unknown" if low is None else f"{low:+.4g} to {high:+.4g}"
        table.add_row(
            escape(pool), name, *(f"{100 * s:.1f}%" for s in shares),
            "-" if gain is None else f"{gain:+.4g}", bounds,
        )  # fmt: skip
    console.print(table)
    console.print(f"{frame.height} rows: {escape(str(out))}")


def explain(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    pools: Annotated[
        Path | None, typer.Option(help="As for recommend; without, the mean of the runs' pools.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Which of them to explain; needed if there are several.")
    ] = None,
) -> None:
    """Write a page that shows effects, what they depend on, estimators, predictions and checks."""
    from causalmix_pipeline import explained
    from causalmix_pipeline.adapters.blobs import write_atomically
    from causalmix_pipeline.tables import Model

    check_outputs([out], [model, pools])
    loaded = Model.load(model)
    if pool is not None and pools is None:
        raise ConfigError(f"--pool {pool!r} needs --pools, got none: name the file of pools.")
    chosen = None if pools is None else explained.pool_state(loaded, pools, pool)
    page = explained.explain(loaded, chosen)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode("utf-8"))
    new_console().print(f"Page: {escape(str(out))}")


# ---------------------------------------------------------------------------- options


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


def _score_table(model) -> Table:
    """Each estimator's scores on runs of unseen pool states, by metric."""
    table = new_table(["metric", "estimator", "R2 within states", "R2", "Spearman", "in 90%"], 2)
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
    """What can be told of noise, confounding, the effect itself, and the worth of more runs."""
    from causalmix_pipeline import beliefs
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
    yield from _trial_lines(beliefs.trials(model))
    declared = bool(model.runs.observational_sources)
    yield _robustness_line(model, observational=declared or (r2 or 0.0) > OBSERVATIONAL_R2)
    more = beliefs.more_runs(model)
    if more is None:
        yield "More runs: what they would bring can't be told quickly from these."
    else:
        yield f"More runs: {more.curve.describe()} ({more.estimator})."


def _trial_lines(trials) -> Iterator[str]:
    """Whether mixtures and pool states matter, for the objective; and metrics that fail alone."""
    from causalmix_pipeline.core.falsification import OBJECTIVE, describe

    words = {"mixtures_matter": "Mixtures", "states_matter": "Pool states"}
    for check, subject in words.items():
        own = [trial for trial in trials if trial.check == check]
        whole = next(trial for trial in own if trial.task == OBJECTIVE)
        failed = [trial.task for trial in own if trial.passed is False and trial is not whole]
        if whole.passed is None:
            yield f"[yellow]{subject}: whether they matter can't be told, {whole.reason}.[/]"
        elif not whole.passed:
            yield f"[yellow]{subject}: not shown to matter; {describe(whole)}.[/]"
        else:
            but = f", but not shown for {escape(', '.join(failed))}" if failed else ""
            yield f"{subject}: matter{but}; {describe(whole)}."


def _robustness_line(model, *, observational: bool) -> str:
    """How strong a hidden confounder must be to explain the gain away."""
    from causalmix_pipeline import beliefs
    from causalmix_pipeline.core.errors import EstimationError

    try:
        found = beliefs.hidden_confounder(model)
    except EstimationError as error:
        return f"Hidden confounder: can't be told, {escape(str(error))}"
    if found.value == 0:
        return "Hidden confounder: can't be seen, and there is no gain to explain away."
    line = (
        f"Hidden confounder: can't be seen; one that explains {100 * found.value:.0f}% of what is "
        f"left of mixture and outcome alike brings the gain over equal to zero, "
        f"{100 * found.value_lower:.0f}% its lower bound."
    )
    if observational:
        return f"[yellow]{line} Randomised runs are the cure.[/]"
    return f"{line} In runs whose mixtures were drawn at random there is none."


def _constraint_lines(found, limit: int = 20) -> Iterator[str]:
    """Which constraints bind for each pool, and what of the gain they cost."""
    binding = found.slack.filter("binds")
    costs = dict(found.unconstrained.select("pool", "cost").iter_rows())
    bound = [pool for pool in found.mixtures["pool"] if pool in set(binding["pool"])]
    for pool in bound[:limit]:
        names = ", ".join(binding.filter(pool=pool)["constraint"])
        cost = "" if costs.get(pool) is None else f"; constraints cost {costs[pool]:.4g} of gain"
        verb = "bind" if ", " in names else "binds"
        yield f"{escape(pool)}: {escape(names)} {verb}{cost}."
    if len(bound) > limit:
        yield f"Constraints bind for {len(bound)} pools; the first {limit} are told."
    if found.only_reference:
        names = ", ".join(found.only_reference[:limit])
        yield f"[yellow]Guard rails forbid all that beats the reference: {escape(names)}.[/]"


def _recommendation_table(frame, domains, limit: int = 20) -> Table:
    table = new_table(["pool", *domains, "gain", "90% interval", "verdict"], 1)
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
