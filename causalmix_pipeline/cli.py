"""The `causalmix` command: everything that the UI does, from a terminal.

A message in plain words and exit status 2 where the user can mend something; the whole trace of
anything else goes into a file.
"""

import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from causalmix_pipeline import cli_compare, cli_export, cli_history, cli_tables, cli_top_ups
from causalmix_pipeline.cli_output import ConfigOption, new_console
from causalmix_pipeline.core.errors import ConfigError, PoolError

app = typer.Typer(
    name="causalmix",
    help="Recommends the data mixture to train a language model on, from the state of its pool.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

#: Exit status where the user can mend something, and where it's our bug.
USER_FAULT, OUR_FAULT = 2, 1


@app.command()
def demo(
    preset: Annotated[
        str, typer.Option(help="Size of the proxies: tests (plumbing only), demo or study.")
    ] = "demo",
) -> None:
    """Go from a pool of real text to a mixture, then change the pool twice."""
    from causalmix_pipeline.demo import tell

    if preset not in ("tests", "demo", "study"):
        raise ConfigError(f"--preset must be tests, demo or study, got {preset!r}.")
    tell(new_console(), preset=preset)


@app.command()
def profile(
    pool: Annotated[
        str | None,
        typer.Argument(
            help="Folder, file, glob or URL, or a name in pools.live; without it the live pool."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; data/profile, for a pool of a name data/profile/NAME. An "
            "earlier profile there gives the scale."
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Folder of an earlier profile: same scale, and what changed since."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure the covariates of a pool: every document once, only new ones again."""
    from causalmix_pipeline.profiling import profile_to_folder
    from causalmix_pipeline.resources.live_pools import live_pool
    from causalmix_pipeline.resources.project import Project
    from causalmix_pipeline.workspace import find_config

    project = Project(config_file=str(find_config(config).resolve()))
    settings = project.settings
    if pool is None or pool in settings.live_pools:
        found = live_pool(settings, pool)
        location, target = found.location, found.folder("profile")
    else:
        location, target = named_location(pool), project.folder("profile")
    profile_to_folder(project, location, out or target, new_console(), like=like)


def named_location(pool: str) -> str | Path:
    """A pool as named on the command line: a URL as it is, a path from here."""
    return pool if "://" in pool else Path(pool).expanduser().absolute()


@app.command(name="fetch-scorer")
def fetch_scorer(config: ConfigOption = None) -> None:
    """Fetch the small language model that scores documents (SmolLM2-135M-Instruct, 90 MB)."""
    from causalmix_pipeline.adapters.scorer_weights import fetch_scorer as fetch
    from causalmix_pipeline.resources.project import Project
    from causalmix_pipeline.workspace import find_config

    path = find_config(config)
    folder = Project(config_file=str(path.resolve())).folder("scorers")
    found = fetch(folder)
    new_console().print(
        f"Kept in {escape(str(found))}. To score with it, set in {escape(str(path))}:\n"
        f"profile:\n  lm: {escape(str(found))}"
    )


@app.command()
def covariates(config: ConfigOption = None) -> None:
    """Try which covariates help, on the proxy runs at hand; trains no proxy."""
    from causalmix_pipeline.console import choice_table
    from causalmix_pipeline.resources.asset_keys import assets_named
    from causalmix_pipeline.workspace import open_workspace

    out = new_console()
    with open_workspace(config, out) as work:
        work.bring_up_to_date(assets_named("covariate_choice"))
        choice = work.value("covariate_choice")
    out.print(choice_table(choice))
    for row in choice["collinear"]:
        out.print(escape(", ".join(f"{name}: {value}" for name, value in row.items())))
    out.print(f"Chosen: {', '.join(choice['chosen']) or 'none helps'}")
    out.print(f"Used now: {', '.join(choice['used'])} (`covariates` in the settings)")


@app.command()
def plan(
    config: ConfigOption = None,
    pilot: Annotated[
        bool,
        typer.Option(
            "--pilot",
            help="Train the design's repeated runs and their neighbours first, to know the noise.",
        ),
    ] = False,
) -> None:
    """Say what the proxy runs cost and what they can tell, before they are trained."""
    from causalmix_pipeline.assets.design import specs_of
    from causalmix_pipeline.assets.plan import (
        budget_breaches,
        budget_message,
        experiment_of,
        pilot_of,
        power_of,
        price_runs,
    )
    from causalmix_pipeline.console import plan_table
    from causalmix_pipeline.resources.asset_keys import assets_named
    from causalmix_pipeline.resources.project import Project
    from causalmix_pipeline.workspace import open_workspace

    out = new_console()
    with open_workspace(config, out) as work:
        work.bring_up_to_date(assets_named("mixture_design").upstream())
        project = Project(config_file=str(work.config_file.resolve()))
        design = work.value("mixture_design")
        specs = specs_of(project, design)
        chosen = set(pilot_of(design)["proxy_run_id"])
        first = [spec for spec in specs if spec.key in chosen]
        with work.quiet_log():
            if pilot:
                train_pilot(project, first, out)
            price = price_runs(project, specs)
            price_of_pilot = price_runs(project, first)
        power = power_of(
            project, design, work.value("pool_states"), work.value("eval_tasks")["tasks"]
        )
        limits = project.settings.budget.model_dump()
        out.print(plan_table(price, limits, free_bytes(project.run_store.root)))
        print_power(out, power, experiment_of(project, design), price_of_pilot)
        breaches = budget_breaches(project, price)
        print_planned_top_ups(out, work)
    if breaches:
        out.print(f"[bold red]Over the budget.[/] {escape(budget_message(breaches))}")
    elif price["to train"]:
        out.print("Train them: causalmix refresh --train")
    else:
        out.print("Nothing to train: every proxy run of the design is in the run store.")


def print_planned_top_ups(out: Console, work) -> None:
    """What the top-ups cost that the newest recommendations plan; nothing where there is none."""
    for pool in work.pools:
        try:
            n_runs = len(work.value("recommended_mixture", pool)["top_up"])
        except FileNotFoundError:
            continue
        if n_runs:
            out.print(f"{top_up_price(work, n_runs, pool)} Train it: causalmix refresh --top-up")


def free_bytes(root: str | Path) -> float | None:
    """Free room on the disk of the run store; None for object storage."""
    if isinstance(root, str):
        return None
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    return float(shutil.disk_usage(there).free)


def train_pilot(project, specs: Sequence, out: Console) -> None:
    """Train the runs of the pilot that are missing.

    Raises:
        ConfigError: if they alone cost more than the budget allows.
    """
    from causalmix_pipeline.assets.plan import refuse_over_budget
    from causalmix_pipeline.console import count_line

    missing = project.run_store.missing(specs)
    if not missing:
        return
    refuse_over_budget(project, specs, {})
    with count_line(out, "pilot runs", len(missing)) as advance:
        project.backend.train(missing, lambda records: advance(len(records)))


def print_power(out: Console, power: Sequence, experiment, price_of_pilot) -> None:
    """What the runs can tell, or how to find out."""
    from causalmix_pipeline.console import hours_text, power_table
    from causalmix_pipeline.core.power import sd_interval

    out.print("[bold]power[/]")
    if power:
        sizes = sorted({64, 128, 512} - {experiment.n_runs})
        out.print(power_table(power, experiment.n_runs, sizes))
        low, high = sd_interval(power[0]["seed_df"])
        out.print(
            "seed sd: of equal runs with other seeds. signal: variance between mixtures over that "
            "of seeds. in reach: gain of the best mixture as far from the reference as the "
            "design's are from their mean. N runs: smallest gain that they see (80% power, 5% "
            "level). seen by: chance to see what is in reach. needed: runs for a chance of 80%. "
            "Against seed noise alone: effects that differ by pool state need several times more.\n"
            f"From {power[0]['seed_df']} repeated runs: the true seed sd is {low:.1f} to "
            f"{high:.1f} times that (90% interval)."
        )
        return
    least = experiment.smallest_ratio()
    known = f"they see nothing: {experiment.n_runs} runs are too few to test anything"
    if least is not None:
        known = (
            f"they see a task's effect, with 80% probability, if mixtures move it by "
            f"{least**0.5:.2f} of the standard deviation between seeds or more"
        )
    out.print(f"  Of {experiment.n_runs} runs is known so far: {known}.")
    out.print(
        "  Missing: that standard deviation, and how far mixtures move each task. Find out: "
        f"causalmix plan --pilot trains {price_of_pilot['to train']} of the runs, about "
        f"{hours_text(price_of_pilot['hours'])}; the design holds them anyway."
    )


@app.command()
def refresh(
    config: ConfigOption = None,
    train: Annotated[
        bool, typer.Option("--train", help="Also train proxy runs that are missing; see plan.")
    ] = False,
    over_budget: Annotated[
        bool,
        typer.Option(
            "--over-budget", help="With --train or --top-up: train though it exceeds the budget."
        ),
    ] = False,
    top_up: Annotated[
        bool,
        typer.Option(
            "--top-up", help="Also train the runs planned for a live pool that isn't supported."
        ),
    ] = False,
    pool: Annotated[
        str | None,
        typer.Option("--pool", help="Name of one of several live pools; all without it."),
    ] = None,
) -> None:
    """Bring the recommendation up to date with the live pool; trains no proxy by itself."""
    from causalmix_pipeline.assets.plan import OVER_BUDGET_TAG
    from causalmix_pipeline.console import pools_table
    from causalmix_pipeline.workspace import open_workspace

    out = new_console()
    with open_workspace(config, out) as work:
        pools = work.chosen_pools(pool)
        if not train and "cate_model" in stale_names(work):
            raise ConfigError(
                "the effect model must be up to date before a refresh, and isn't: proxy runs or "
                "settings changed. See the cost by `causalmix plan`, then run "
                "`causalmix refresh --train`."
            )
        before = work.n_proxy_runs()
        tags = {OVER_BUDGET_TAG: "yes"} if (train or top_up) and over_budget else {}
        with budget_told(work):
            selection = work.selection(live_only=not train)
            made, problems = work.refresh_pools(pools, selection, tags=tags)
        if top_up:
            for name in pools:
                if name not in problems:
                    made += train_top_up(out, work, name, tags)
        made = list(dict.fromkeys(made))
        out.print(f"Re-materialised: {', '.join(made) or 'nothing, all was up to date'}.")
        out.print(f"proxy runs trained: {work.n_proxy_runs() - before}")
        if len(pools) > 1:
            out.print(pools_table([work.pool_row(name) for name in pools]))
        elif not problems:
            print_recommendation(out, work, pools[0])
        refuse_problems(problems)


def train_top_up(out: Console, work, pool: str | None, tags: Mapping[str, str]) -> list[str]:
    """Train what is planned for a pool, its price told first; names of the assets that were made.

    Raises:
        ConfigError: if it costs more than the budget allows and nobody agreed to it.
    """
    of_pool = "" if pool is None else f" of {pool}"
    n_runs = len(work.value("recommended_mixture", pool)["top_up"])
    if not n_runs:
        out.print(f"No top-up{of_pool}: the pool is within reach of the proxy runs.")
        return []
    out.print(top_up_price(work, n_runs, pool))
    made = work.top_up(pool, tags=tags)
    return made if pool is None else [f"{name} ({pool})" for name in made]


def top_up_price(work, n_runs: int, pool: str | None) -> str:
    """A sentence on what a top-up of a live pool costs."""
    from causalmix_pipeline.assets.design import specs_of
    from causalmix_pipeline.assets.plan import price_runs
    from causalmix_pipeline.assets.sizes import top_up_config
    from causalmix_pipeline.console import hours_text
    from causalmix_pipeline.core.runs import RunTable
    from causalmix_pipeline.resources.project import Project

    project = Project(config_file=str(work.config_file.resolve()))
    design, runs = work.value("mixture_design"), RunTable.from_frame(work.value("run_table"))
    state_DP = work.value("live_covariates", pool).select(runs.covariates).to_numpy()
    config = top_up_config(design, runs, state_DP)
    specs = [
        spec
        for spec, own in zip(specs_of(project, design), design["config"], strict=True)
        if own == config
    ]
    with work.quiet_log():
        found = price_runs(project, specs, n_runs)
    cost = "" if found["cost"] is None else f", {found['cost']:,.2f} {escape(found['currency'])}"
    of_pool = "" if pool is None else f" of {pool}"
    return f"Top-up{of_pool}: {n_runs} proxy runs, about {hours_text(found['hours'])} here{cost}."


def print_recommendation(out: Console, work, pool: str | None) -> None:
    """The mixture recommended for a pool, what it gains, and where the report is."""
    from causalmix_pipeline.console import mixture_table, print_gain, print_verdict
    from causalmix_pipeline.demo import shown
    from causalmix_pipeline.resources.live_pools import live_pool

    best = work.value("recommended_mixture", pool)
    out.print(mixture_table(best))
    print_gain(out, best)
    print_verdict(out, best)
    if best["top_up"]:
        out.print(
            f"{len(best['top_up'])} proxy runs at this pool would tell more: causalmix refresh "
            "--top-up"
        )
    report = live_pool(work.settings, pool).folder("reports", "report.html")
    out.print(f"Report: {shown(report)}")


def refuse_problems(problems: Mapping[str, Exception]) -> None:
    """Say which pools couldn't be refreshed, after the others were.

    Raises:
        PoolError: if there is one.
    """
    if problems:
        lines = [f"the live pool {name}: {error}" for name, error in problems.items()]
        raise PoolError(
            f"every live pool must be refreshed, {len(problems)} couldn't be; the others are.\n"
            + "\n".join(lines)
        )


@contextmanager
def budget_told(work) -> Iterator[None]:
    """Say in words that the budget stopped a run, with the ways out.

    Raises:
        ConfigError: if it did.
    """
    import dagster as dg

    from causalmix_pipeline.assets.plan import budget_breaches, budget_message
    from causalmix_pipeline.resources.project import Project

    try:
        yield
    except dg.DagsterError as error:
        if type(error).__name__ == "DagsterAssetCheckFailedError" and "within_budget" in str(error):
            project = Project(config_file=str(work.config_file.resolve()))
            breaches = budget_breaches(project, work.value("proxy_plan"))
            raise ConfigError(budget_message(breaches)) from error
        raise


def stale_names(work) -> list[str]:
    """Names of assets that are stale, or may be, on the experiment side and the effects."""
    import dagster as dg

    from causalmix_pipeline.automation.staleness import stale_assets

    found = stale_assets(
        work.defs, work.instance, dg.AssetSelection.groups("experiment", "effects")
    )
    return [key.path[-1] for key in (*found.reasons, *found.maybe)]


@app.command()
def status(config: ConfigOption = None) -> None:
    """Say which assets are stale and why, and what was recommended last."""
    from causalmix_pipeline.automation.staleness import last_made, lineage, stale_assets
    from causalmix_pipeline.console import new_table, pools_table, print_gain, print_verdict, when
    from causalmix_pipeline.resources.observation import LIVE_POOL, observe_pool
    from causalmix_pipeline.workspace import ON_REQUEST, open_workspace

    out = new_console()
    with open_workspace(config, out) as work:
        named = [name for name in work.pools if name is not None]
        if not named:
            observe_pool(work.instance, work.settings, LIVE_POOL)
        found = stale_assets(work.defs, work.instance)
        columns = ["asset", "state", "last made"]
        table = new_table(columns, left=columns)
        graph = work.defs.resolve_asset_graph()
        for key in lineage(work.defs):
            if not graph.get(key).is_materializable or graph.get(key).is_partitioned:
                continue
            event = last_made(work.instance, key, None)
            made = when(event.timestamp) if event else ""
            state = found.reasons.get(key, "perhaps stale" if key in found.maybe else "up to date")
            if key.path[-1] in ON_REQUEST and not event:
                state = "on request"
            table.add_row(key.to_user_string(), state, made)
        out.print(table)
        out.print(f"Finished proxy runs in the run store: {work.n_proxy_runs()}")
        if named:
            out.print(pools_table([work.pool_row(name) for name in named]))
            return
        try:
            best = work.value("recommended_mixture")
        except FileNotFoundError:
            out.print("Nothing was recommended yet.")
            return
        print_gain(out, best)
        print_verdict(out, best)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("causalmix.yaml"),
) -> None:
    """Write a settings file that holds every field with its default and what it is for."""
    from causalmix_pipeline.resources.settings_file import write_commented_settings

    write_commented_settings(path)
    new_console().print(
        f"Wrote {escape(str(path))}. Set `pools` and `tasks`, then see `causalmix doctor` and "
        "`causalmix plan`."
    )


@app.command()
def ui(
    config: ConfigOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 3000,
) -> None:
    """Start the Dagster UI and daemon on 127.0.0.1, on this project's instance."""
    from causalmix_pipeline.resources.instance import ensure_home
    from causalmix_pipeline.resources.settings_file import CONFIG_VARIABLE, load_settings
    from causalmix_pipeline.workspace import find_config

    path = find_config(config)
    settings = load_settings(path, missing_ok=True)
    require("dagster-webserver", "the UI", "pip install 'causalmix_pipeline[ui]'")
    home = ensure_home(settings.data_path, settings.instance)
    new_console().print(f"UI: http://127.0.0.1:{port}  (Ctrl-C ends it)")
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ[CONFIG_VARIABLE] = str(path.resolve())
    os.execv(sys.executable, ui_command(port))


def ui_command(port: int) -> list[str]:
    """The webserver and the daemon of Dagster, reachable from this machine only."""
    where = ["-h", "127.0.0.1", "-p", str(port)]
    # `dagster dev` recommends another tool of its vendor at each start.
    quiet = ["-W", "ignore:Function `dev_command`"]
    dev = ["-m", "dagster", "dev", *where, "-m", "causalmix_pipeline.definitions"]
    return [sys.executable, *quiet, *dev]


def require(package: str, purpose: str, command: str) -> None:
    """Refuse to go on without a package.

    Raises:
        ConfigError: if it isn't installed.
    """
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"{purpose} needs the package {package}, which isn't installed: {command}"
        ) from error


@app.command()
def doctor(
    config: ConfigOption = None,
    mend: Annotated[
        bool,
        typer.Option("--mend", help="Mend what can be: dead runs, taken slots, leftovers, tables."),
    ] = False,
) -> None:
    """Check machine, settings, pools and what Dagster keeps; exit status 2 if one is wrong."""
    from causalmix_pipeline.console import new_table
    from causalmix_pipeline.doctor import examine

    findings = examine(config, mend=mend)
    colours = {"ok": "green", "mended": "green", "warning": "yellow", "wrong": "red"}
    columns = ["check", "result", "detail"]
    table = new_table(columns, left=columns)
    for found in findings:
        level = f"[{colours[found.level]}]{found.level}[/]"
        table.add_row(found.what, level, escape(found.detail))
    new_console().print(table)
    if any(found.level == "wrong" for found in findings):
        raise typer.Exit(USER_FAULT)


cli_tables.register(app)
cli_top_ups.register(app)
cli_compare.register(app)
cli_history.register(app)
cli_export.register(app)


# ---------------------------------------------------------------------------- the way out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    from typer.exceptions import TyperException

    warnings.simplefilter("ignore")
    out = Console(stderr=True, highlight=False)
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="causalmix")
        return status if isinstance(status, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except TyperException as error:
        out.print(f"{escape(error.format_message())}\nSee: causalmix --help")
        return USER_FAULT
    except (KeyboardInterrupt, typer.Abort):
        return stopped(out)
    except BaseException as error:
        # What Dagster makes of Ctrl-C and SIGTERM is no Exception.
        if type(error).__name__ == "DagsterExecutionInterruptedError":
            return stopped(out)
        if not isinstance(error, Exception):
            raise
        # The last place before the user: a message, never a bare trace.
        return report_error(error, out)


def stopped(out: Console) -> int:
    """Say that nothing is lost, and return the exit status."""
    out.print("Stopped. Finished proxy runs are kept; the same command goes on from there.")
    return 130


def report_error(error: Exception, out: Console) -> int:
    """Print what went wrong in plain words, keep the trace, and return the exit status."""
    from causalmix_pipeline.workspace import root_cause

    ours = root_cause(error)
    if ours is not None:
        out.print(f"[bold red]causalmix:[/] {escape(str(ours))}")
        return USER_FAULT
    if type(error).__name__ == "DagsterAssetCheckFailedError":
        out.print(f"[bold red]causalmix:[/] {escape(str(error))}")
        out.print("The check's numbers are in the UI: causalmix ui")
        return USER_FAULT
    trace = keep_trace("".join(traceback.format_exception(error)))
    out.print(
        f"[bold red]causalmix:[/] an unexpected error, which is a bug: {type(error).__name__}: "
        f"{escape(str(error))[:500]}\nThe whole trace is in {trace}."
    )
    return OUR_FAULT


def keep_trace(text: str) -> Path:
    """Keep a trace in the project's logs, or in the temporary folder where there is no project."""
    from causalmix_pipeline.resources.settings_file import DEFAULT_CONFIG

    trace = Path(tempfile.gettempdir()) / "causalmix-error.txt"
    if Path(DEFAULT_CONFIG).is_file() and os.access(".", os.W_OK):
        trace = Path("data/logs/error.txt")
        trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text(text, encoding="utf-8")
    return trace


def run() -> None:
    """Entry point of the `causalmix` script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
