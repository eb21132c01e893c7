"""The story that `causalmix demo` tells: one pool, a change within reach, a change out of reach.

Each telling starts from the same live pool. Proxy runs are trained once; a second telling finds
them in the run store.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from causalmix_pipeline.adapters.demo_pool import (
    DemoPool,
    assemble_demo_pool,
    drop_into_live,
    reset_live,
)
from causalmix_pipeline.adapters.run_store import write_atomically
from causalmix_pipeline.console import (
    before_after_table,
    estimator_table,
    minutes,
    mixture_table,
    moved_table,
    print_binding,
    print_gain,
    print_verdict,
    signal_table,
    top_up_table,
)
from causalmix_pipeline.workspace import DEMO_CONFIG, Workspace, open_workspace

#: What the demo's model shall be good at; the other domains' text is only reported. Each task is
#: held-out text of its domain's first source, which the pool starts with and drifts away from.
DEMO_WEIGHTS = {"math": 0.4, "code_reasoning": 0.3, "manuals": 0.3}


def demo_settings(pool: DemoPool, config_file: Path, preset: str) -> str:
    """The demo's settings file: paths relative to its folder, the rest by default."""
    folder = config_file.parent.resolve()
    tasks = [
        {
            "name": domain,
            "path": str((pool.eval_first_dir / f"{domain}.jsonl").resolve().relative_to(folder)),
            "weight": DEMO_WEIGHTS.get(domain, 0.0),
        }
        for domain in pool.domains
    ]
    values = {
        "data_dir": ".",
        "pools": {
            "experiment": str(pool.experiment_dir.resolve().relative_to(folder)),
            "live": "pool",
        },
        "columns": {"group": "group"},
        "domains": list(pool.domains),
        "tasks": tasks,
        "proxy": {"preset": preset},
    }
    head = "# Settings of `causalmix demo`, written by it. See `causalmix init` for every field.\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def start_live_pool(pool: DemoPool, live: Path, console: Console) -> None:
    """Put the live pool back to its start; files that the demo didn't bring are moved aside."""
    known = {
        str(path.relative_to(part))
        for part in [pool.root / "live", *sorted((pool.root / "drops").glob("*"))]
        for path in part.rglob("*")
        if path.is_file()
    }
    foreign = [
        path
        for path in sorted(live.rglob("*"))
        if path.is_file() and str(path.relative_to(live)) not in known
    ]
    if foreign:
        aside = live.parent / "set_aside" / time.strftime("%Y%m%d-%H%M%S")
        for path in foreign:
            target = aside / path.relative_to(live)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        console.print(f"{len(foreign)} files of the live pool aren't the demo's: moved to {aside}")
    reset_live(pool.root, live)


def assemble(root: Path, console: Console) -> DemoPool:
    """Assemble the demo pool with a progress line."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("demo pool", total=1.0)

        def show(share: float, what: str) -> None:
            bar.update(task, completed=share, description=what[:38].ljust(38))

        return assemble_demo_pool(root, progress=show)


def tell(console: Console, *, preset: str = "demo", config_file: Path = DEMO_CONFIG) -> None:
    """Run the whole demo.

    Raises:
        CausalMixError: if the pool can't be assembled or an asset refuses to go on.
    """
    started = time.monotonic()
    config_file.parent.mkdir(parents=True, exist_ok=True)
    pool = assemble(config_file.parent / "demo", console)
    write_atomically(config_file, demo_settings(pool, config_file, preset).encode())
    with open_workspace(config_file, console) as work:
        live = Path(work.settings.live_path)
        console.rule("1. From a pool to a mixture", align="left")
        start_live_pool(pool, live, console)
        before = work.n_proxy_runs()
        made = work.bring_up_to_date(work.selection())
        show_first(work, made, work.n_proxy_runs() - before, started)

        console.rule("2. New documents, within reach of the proxy runs", align="left")
        refresh_after_drop(work, pool, "within_reach")

        console.rule("3. New documents, out of reach", align="left")
        refresh_after_drop(work, pool, "out_of_reach")

        reports = ", ".join(f"demo_{i}.html" for i in (1, 2, 3))
        console.print(
            f"\nThe demo took {minutes(time.monotonic() - started)}. Reports of the three steps: "
            f"{reports} in {shown(work.settings.data_path / 'reports')}\n"
            "To see lineage, runs and checks in the UI: make ui"
        )


def show_first(work: Workspace, made: Sequence[str], n_trained: int, started: float) -> None:
    """Print what the first step found."""
    console, best = work.console, work.value("recommended_mixture")
    console.print(
        f"{len(made)} assets materialised, proxy runs trained: {n_trained} "
        f"(of {work.n_proxy_runs()} kept), after {minutes(time.monotonic() - started)}."
    )
    heading(console, "Signal of the proxy runs: variance between mixtures over that between seeds")
    console.print(signal_table(work.value("cate_checks"), proxy_losses(work)))
    counted = [row["task"] for row in best["task_gains"] if row["weight"] > 0]
    entropy, losses = work.value("tokenizer")["unigram_nats"], work.value("proxy_runs")
    margin = entropy - losses["last_train_loss"]
    console.print(
        f"Proxies end training {margin.min():.2f} nats a token or more below the entropy of the "
        f"pool's tokens ({entropy:.2f}), the median {margin.median():.2f}: past counting tokens."
    )
    heading(console, "Estimators, on pool states that they haven't seen (tasks that count)")
    console.print(estimator_table(work.value("cate_model"), counted))
    calibration = [work.value("cate_model")["calibration"][task] for task in counted]
    widest, least = max(c["factor"] for c in calibration), min(c["slope"] for c in calibration)
    console.print(
        f"Intervals below are widened by up to {widest:.2f}, so that 90% of the gains on unseen "
        f"states lie inside, and gains are multiplied by {least:.2f} or more, as far as they held "
        "there."
    )
    heading(console, "Recommended mixture, and what each would gain over the reference")
    console.print(mixture_table(best))
    print_gain(console, best)
    print_binding(console, best)
    print_verdict(console, best)
    console.print(f"Report: {keep_report(work, 1)}")
    console.print(f"Export for the trainer: {shown(work.settings.data_path / 'export')}")


def proxy_losses(work: Workspace) -> dict[str, tuple[float, float]]:
    """Median held-out loss of proxy runs on each task, and its unigram entropy; nats a token."""
    runs, tasks = work.value("proxy_runs"), work.value("eval_tasks")
    return {
        task: (float(runs[f"nats_per_token__{task}"].median()), entropy)
        for task, entropy in tasks["unigram_nats"].items()
    }


def refresh_after_drop(work: Workspace, pool: DemoPool, drop: str) -> None:
    """Bring documents into the live pool, refresh, and print what that changed."""
    console, started = work.console, time.monotonic()
    before, covariates = work.value("recommended_mixture"), work.value("live_covariates")
    n_before = work.n_proxy_runs()
    files = drop_into_live(pool.root, Path(work.settings.live_path), drop)
    made = work.bring_up_to_date(work.selection())
    after = work.value("recommended_mixture")
    console.print(
        f"{len(files)} files of the live pool changed. Re-materialised in "
        f"{minutes(time.monotonic() - started)}: {', '.join(made) or 'nothing'}."
    )
    console.print(f"[bold]proxy runs trained: {work.n_proxy_runs() - n_before}[/]")
    moved = moved_covariates(covariates, work.value("live_covariates"), work.value("pool_states"),
                             work.settings.covariates)  # fmt: skip
    heading(console, "What moved most, in standard deviations over the experiment's pool states")
    console.print(moved_table(moved))
    if after["verdict"] == "unsupported":
        print_verdict(console, after)
        print_drift(work, after)
        console.print(mixture_table(after))
        heading(console, f"Proxy runs that would help: {len(after['top_up'])}, the first of them")
        console.print(top_up_table(after))
    else:
        heading(console, "Recommended mixture before and after")
        console.print(before_after_table(before, after))
        print_gain(console, after)
        print_binding(console, after)
        print_verdict(console, after)
    console.print(f"Report: {keep_report(work, 2 if drop == 'within_reach' else 3)}")


def heading(console: Console, text: str) -> None:
    """A line above a table."""
    console.print(f"\n[bold]{text}[/]", end="")


def print_drift(work: Workspace, after: dict) -> None:
    """Name the domains that are out of reach."""
    scores = zip(after["domains"], after["domain_scores"], strict=True)
    far = sorted(((score, domain) for domain, score in scores if score > 1), reverse=True)
    if far:
        told = ", ".join(f"{domain} ({score:.1f})" for score, domain in far)
        work.console.print(f"Out of reach by domain (up to 1 is within): {told}.")


def moved_covariates(
    before: pl.DataFrame, after: pl.DataFrame, states: pl.DataFrame, covariates: Sequence[str]
) -> list[dict]:
    """Covariates of the live pool that changed, the largest move first.

    Args:
        before: live covariates, a row per domain.
        after: the same, later.
        states: the experiment's states; their standard deviation is the unit of a move.
        covariates: those that the estimators use.
    """
    spread = {
        row["domain"]: row
        for row in states.group_by("domain").agg(pl.col(list(covariates)).std()).to_dicts()
    }
    old = {row["domain"]: row for row in before.to_dicts()}
    rows = []
    for row in after.to_dicts():
        for name in covariates:
            change = row[name] - old[row["domain"]][name]
            sd = spread[row["domain"]][name] or 0.0
            if sd > 0 and abs(change) > 1e-9:
                rows.append({"domain": row["domain"], "covariate": name, "moved": change / sd,
                             "before": old[row["domain"]][name], "after": row[name]})  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["moved"]))


def keep_report(work: Workspace, number: int) -> str:
    """Keep a copy of the report as it is at this step, and return its path."""
    folder = work.settings.data_path / "reports"
    copy = folder / f"demo_{number}.html"
    write_atomically(copy, (folder / "report.html").read_bytes())
    return shown(copy)


def shown(path: Path) -> str:
    """A path as a person types it: relative to here, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
