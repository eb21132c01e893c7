"""The command that trains the recommended mixture's rivals: `causalmix compare`."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from causalmix_pipeline.cli_output import ConfigOption, new_console
from causalmix_pipeline.core.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)


def compare(
    config: ConfigOption = None,
    states: Annotated[
        int | None, typer.Option(min=2, help="New pool states; compare.states if none.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of each run; compare.seeds if none.")
    ] = None,
    over_budget: Annotated[
        bool, typer.Option("--over-budget", help="Train though it exceeds the budget.")
    ] = False,
) -> None:
    """Train the recommended mixture and its rivals on new pool states, and say who gains what.

    What is trained is kept: a comparison that was stopped goes on.
    """
    from causalmix_pipeline.assets.plan import OVER_BUDGET_TAG
    from causalmix_pipeline.assets.rivals import SEEDS_TAG, STATES_TAG
    from causalmix_pipeline.workspace import open_workspace

    out = new_console()
    with open_workspace(config, out) as work:
        refuse_stale_model(work)
        settings = work.settings.compare
        counts = {STATES_TAG: states or settings.states, SEEDS_TAG: seeds or settings.seeds}
        out.print(price_line(work, counts[STATES_TAG], counts[SEEDS_TAG]))
        tags = {tag: str(count) for tag, count in counts.items()}
        train(work, tags | ({OVER_BUDGET_TAG: "yes"} if over_budget else {}))
        print_rivals(out, work.value("rivals"))


def refuse_stale_model(work: Any) -> None:
    """Refuse to compare what an old effect model recommends.

    Raises:
        ConfigError: if the effect model, or what is above it, is stale or was never made.
    """
    from causalmix_pipeline.automation.staleness import stale_assets
    from causalmix_pipeline.resources.asset_keys import assets_named

    # A changed budget makes the plan stale, and nothing that is compared.
    wanted = assets_named("cate_model").upstream() - assets_named("proxy_plan")
    found = stale_assets(work.defs, work.instance, wanted)
    names = {key.path[-1] for key in (*found.reasons, *found.maybe)}
    if names:
        raise ConfigError(
            "the effect model must be up to date before a comparison, and isn't: proxy runs or "
            "settings changed. See the cost by `causalmix plan`, then run "
            "`causalmix refresh --train`."
        )


def price_line(work: Any, n_states: int, n_seeds: int) -> str:
    """What a comparison costs at most where nothing is trained yet, in a sentence."""
    from causalmix_pipeline.assets.contest import prepare_contest
    from causalmix_pipeline.assets.entrants import stand_ins
    from causalmix_pipeline.assets.plan import price_runs
    from causalmix_pipeline.console import hours_text
    from causalmix_pipeline.core.rivals import nothing_read, untrained, weighted_score
    from causalmix_pipeline.resources.project import Project

    project = Project(config_file=str(work.config_file.resolve()))
    with work.quiet_log():
        contest = prepare_contest(
            project,
            work.value("tokenizer"),
            work.value("experiment_documents"),
            work.value("mixture_design"),
            lambda states, sizes: stand_ins(project.settings, states, sizes),
            n_states=n_states,
            n_seeds=n_seeds,
        )
        specs = contest.to_price(nothing_read, weighted_score(project.settings.task_weights))
        price = price_runs(project, [untrained(spec) for spec in specs])
    sizes = " and ".join(size.name for size in contest.sizes)
    cost = "" if price["cost"] is None else f", {price['cost']:,.2f} {escape(price['currency'])}"
    return (
        f"Rivals on {n_states} new pool states, {seeds_text(n_seeds)}, as {escape(sizes)}, the "
        f"search over controllers' settings included: if nothing were trained yet, at most "
        f"{price['to train']:,} runs, about {hours_text(price['hours'])} here{cost}. Runs that are "
        "in the store aren't trained again."
    )


def train(work: Any, tags: dict[str, str]) -> None:
    """Materialise the comparison with a progress line; what is trained already is read."""
    from causalmix_pipeline.automation.staleness import materialise
    from causalmix_pipeline.console import Work, progress_line
    from causalmix_pipeline.resources.asset_keys import asset_key

    key = asset_key(work.settings, "rivals")
    with work.quiet_log(), progress_line(work.console, Work(["rivals"])) as on_event:
        materialise(work.defs, work.instance, [key], tags=tags, on_event=on_event)


def print_rivals(out: Console, value: dict) -> None:
    """A table for each size, and what the columns mean."""
    from causalmix_pipeline.console import rivals_table
    from causalmix_pipeline.core.rival_gains import BASE

    for size in value["sizes"]:
        out.print(f"[bold]{escape(size)}[/]")
        out.print(rivals_table([row for row in value["table"] if row["size"] == size], BASE))
    tried = sum(1 for row in value["trials"] if row["gain"] is not None)
    out.print(
        f"Gains in bits per byte, ± standard error over {value['states']} states, "
        f"{seeds_text(value['seeds'])} each; ours is the recommended mixture. FLOPs: the search "
        f"and one run on each state. Settings of controllers tried beforehand: {tried}."
    )


def seeds_text(n: int) -> str:
    """A number of seeds in words."""
    return f"{n} seed{'s' if n > 1 else ''}"
