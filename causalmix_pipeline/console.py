"""What the command line prints: one progress line, and tables in plain words."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

import dagster as dg
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from causalmix_pipeline.automation.staleness import EventHandler
from causalmix_pipeline.core.scale import size_sentence, size_words
from causalmix_pipeline.resources.progress import PROGRESS_PREFIX

#: What each verdict means, in a sentence.
VERDICT_WORDS = {
    "supported": "the pool is within reach of the proxy runs, on which gain and interval rest",
    "extrapolating": "the pool is beyond the proxy runs; take the gain as a rough guide, its "
    "interval is widened",
    "unsupported": "no proxy run has seen such a pool; the reference mixture is kept",
}
VERDICT_COLOURS = {"supported": "green", "extrapolating": "yellow", "unsupported": "red"}

#: Seconds of a step on two cores, for the remaining time; measured on the demo. Others count as 1.
STEP_SECONDS = {
    "tokenizer": 4.0,
    "experiment_documents": 12.0,
    "pool_states": 4.0,
    "mixture_design": 3.0,
    "eval_tasks": 4.0,
    "train_proxy_runs": 240.0,
    "cate_model": 25.0,
    "cate_checks": 10.0,
    "cate_interpretation": 5.0,
    "live_documents": 4.0,
    "baseline_mixtures": 3.0,
    "recommended_mixture": 6.0,
}

#: Seconds between two lines of progress where the output is no terminal.
PLAIN_SECONDS = 15.0

_PROGRESS = re.compile(
    re.escape(PROGRESS_PREFIX) + r"(\d+) of (\d+) ([^(]+?)(?: \((.+)\))?, (\d+) s left"
)


class Work:
    """Follows Dagster runs, and knows how long the rest takes."""

    def __init__(self, steps: Sequence[str]):
        """Set up for the steps to come, in any order."""
        self._left = {step: STEP_SECONDS.get(step, 1.0) for step in steps}
        self._total = max(sum(self._left.values()), 1e-9)
        self.what = "starting"

    def on_event(self, entry: dg.EventLogEntry) -> None:
        """Take in one log entry of a run."""
        event = entry.dagster_event
        step = entry.step_key or ""
        if event is not None and event.is_step_start:
            self.what = step.rpartition(".")[2]
        elif event is not None and event.is_step_success:
            self._left.pop(step.rpartition(".")[2], None)
        found = _PROGRESS.search(entry.user_message or "")
        if found:
            done, total, what, note, seconds = found.groups()
            failed = "" if not note or note.startswith("0 failed") else f", {note.split(',')[0]}"
            self.what = f"{what} {done}/{total}{failed}"
            self._left[step.rpartition(".")[2]] = float(seconds)

    @property
    def seconds_left(self) -> float:
        """Seconds until everything is done, about."""
        return sum(self._left.values())

    @property
    def done_share(self) -> float:
        """Share of the work that is done, by time."""
        return min(max(1 - self.seconds_left / self._total, 0.0), 1.0)


def minutes(seconds: float) -> str:
    """A time that people say: 45 s, 3 min 20 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


@contextmanager
def progress_line(console: Console, work: Work) -> Iterator[EventHandler]:
    """Show one line with what is being done and the remaining time; yields the event handler."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[left]}"))  # fmt: skip
    told = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def on_event(entry: dg.EventLogEntry) -> None:
            nonlocal told
            work.on_event(entry)
            left = f"about {minutes(work.seconds_left)} left"
            bar.update(task, description=work.what[:38].ljust(38), completed=work.done_share,
                       left=left)  # fmt: skip
            now = time.monotonic()
            if not console.is_terminal and now - told > PLAIN_SECONDS:
                told = now
                console.print(f"  {work.what}, {left}")

        yield on_event


@contextmanager
def count_line(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show one line with how many of some work are done; yields what to call with more of them."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
    console.print(f"{total} {what} trained.")


# ---------------------------------------------------------------------------- tables


def new_table(columns: Sequence[str], left: Sequence[str]) -> Table:
    """An empty table without frame; columns that aren't in `left` are aligned to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def share_text(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}%"


def gain_text(row: Mapping) -> str:
    """A gain with its 90% interval; `unknown` where there is none."""
    if row["gain"] is None:
        return "unknown"
    if not known(row):
        return f"{row['gain']:+.3f}"
    return f"{row['gain']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def mixture_table(recommended: Mapping) -> Table:
    """The recommended mixture beside the baselines; the last row is their predicted gain."""
    mixtures = recommended["mixtures"]
    reference = recommended["reference_name"]
    names = ["recommended", "natural", "equal", "regmix"]
    names = [name for name in [*names, *mixtures] if name in mixtures and name != "reference"]
    names = list(dict.fromkeys(names))
    table = new_table(["domain"], left=["domain"])
    for name in names:
        label = "RegMix" if name == "regmix" else name
        table.add_column(f"{label}{' (reference)' if name == reference else ''}", justify="right",
                         style="bold" if name == "recommended" else None)  # fmt: skip
    for d, domain in enumerate(recommended["domains"]):
        table.add_row(escape(domain), *(share_text(mixtures[name][d]) for name in names))
    gains = {row["mixture"]: row for row in recommended["gains"]}
    if recommended["verdict"] != "unsupported":
        table.add_section()
        cells = ["0" if name == reference else gain_text(gains[name]) for name in names]
        table.add_row("gain, bits a byte", *(cell.replace(" (", "\n(") for cell in cells))
    return table


def pools_table(rows: Sequence[Mapping]) -> Table:
    """A row for each of several live pools: its state, and what was recommended for it last."""
    columns = ["pool", "state", "recommended", "gain, bits a byte", "verdict"]
    table = new_table(columns, left=columns)
    for row in rows:
        best = row["recommended"]
        gain, verdict = "", "nothing was recommended yet"
        if best is not None:
            colour = VERDICT_COLOURS[best["verdict"]]
            gain, verdict = gain_text(best), f"[{colour}]{best['verdict']}[/]"
        made = "" if row["made"] is None else when(row["made"])
        table.add_row(row["pool"], escape(row["state"]), made, gain, verdict)
    return table


def when(timestamp: float) -> str:
    """Local time to the minute."""
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M")


def print_verdict(console: Console, recommended: Mapping) -> None:
    """The overlap verdict, in words and in its colour."""
    verdict, score = recommended["verdict"], recommended["overlap_score"]
    distance = "" if score is None else f" Distance {score:.2f}; supported up to 1."
    size = recommended.get("size")
    words = size_words(verdict, size) or VERDICT_WORDS[verdict]
    console.print(
        f"Overlap verdict: [bold {VERDICT_COLOURS[verdict]}]{verdict}[/]: {words}.{distance}"
    )
    if size:
        console.print(size_sentence(size))


def print_gain(console: Console, recommended: Mapping) -> None:
    """The headline gain, and what its unit means."""
    if recommended["verdict"] == "unsupported":
        console.print("No gain is promised.")
        return
    tasks = [row for row in recommended["task_gains"] if row["weight"] > 0]
    losses = [row["reference_bits_per_byte"] for row in tasks]
    console.print(
        f"Predicted gain over the {recommended['reference_name']} mixture: "
        f"[bold]{gain_text(recommended)}[/] bits per byte, {interval_words(recommended)}"
    )
    if tasks and None not in losses:
        loss = sum(row["weight"] * row["reference_bits_per_byte"] for row in tasks)
        loss /= sum(row["weight"] for row in tasks)
        console.print(
            f"That is {100 * recommended['gain'] / loss:.1f}% of the loss of the tasks that "
            f"count ({', '.join(escape(row['task']) for row in tasks)}), {loss:.3f} bits per byte."
        )


def interval_words(recommended: Mapping) -> str:
    """That the gain has its interval, or whose estimator has none."""
    if recommended["low"] is not None:
        return "with its 90% interval."
    bare = [row["task"] for row in recommended["task_gains"] if row["weight"] and not known(row)]
    return (
        f"without an interval: the estimator of {escape(', '.join(bare))} has none. "
        "response_surface, structured_ridge and stack have some: add one to estimators."
    )


def known(row: Mapping) -> bool:
    """Whether a gain has an interval."""
    return row["low"] is not None and row["high"] is not None


def print_binding(console: Console, recommended: Mapping) -> None:
    """Which constraints hold the mixture back."""
    if recommended["verdict"] == "unsupported":
        return
    binding = [row["constraint"] for row in recommended["slack"] if row["binds"]]
    if binding:
        console.print(f"What holds it back: {escape(', '.join(binding))}.")
    else:
        console.print("No constraint holds it back.")


def hours_text(hours: float) -> str:
    """A time that people say: 45 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    seconds = 3600 * hours
    if seconds < 3600:
        return minutes(seconds)
    whole = round(seconds / 60)
    if whole < 2880:
        return f"{whole // 60} h {whole % 60:02d} min"
    return f"{whole // 1440} d {whole % 1440 // 60} h"


def bytes_text(n_bytes: float) -> str:
    """A size in kB, MB, GB or TB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"


def count_text(count: float) -> str:
    """A count: 45,312, or 69.6 million, or 51.2 billion."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,.0f}"


def plan_table(price: Mapping, limits: Mapping, free_bytes: float | None) -> Table:
    """What the proxy runs are and what they cost, in groups.

    Args:
        price: as `core.price.price` returns it.
        limits: `max_hours`, `max_gpu_hours` and `max_cost` of the budget; None is no limit.
        free_bytes: room on the disk of the run store; None where it isn't a disk of this machine.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    tokens, parameters = 1e6 * price["million tokens a run"], price["parameters of a proxy"]
    room = "" if free_bytes is None else f"; {bytes_text(free_bytes)} free"
    scratch = price["scratch bytes"]
    meanwhile = f", and {bytes_text(scratch)} while it trains" if scratch else ""
    kept = f"{bytes_text(price['record bytes'])} of records{meanwhile}{room}"
    workers, at_once = price["workers"], price["runs at once"]
    table.add_row("[bold]what[/]")
    table.add_row("  proxy runs", f"{price['proxy runs']:,}: {price['in the store']:,} in the "
                  f"store, {price['to train']:,} to train")  # fmt: skip
    table.add_row("  a run", f"{count_text(tokens)} tokens, {count_text(parameters)} parameters")
    total = 1e6 * price["million tokens to train"]
    table.add_row("  to train", f"{count_text(total)} tokens, {price['FLOPs to train']:.1e} FLOPs")
    table.add_row("[bold]cost[/]")
    table.add_row("  time here", f"{hours_text(price['hours'])}, in {workers} workers of "
                  f"{at_once // workers} runs each")  # fmt: skip
    if price["GPU hours"]:
        table.add_row("  GPU hours", f"{price['GPU hours']:.3g}")
    else:
        table.add_row("  core hours", f"{price['core hours']:.3g}")
    money = "no price is set (budget.price_per_core_hour, budget.price_per_gpu_hour)"
    if price["cost"] is not None:
        money = f"{price['cost']:,.2f} {escape(price['currency'])}"
    table.add_row("  money", money)
    table.add_row("  disk", kept)
    table.add_row("  budget", limits_text(limits, price["currency"]))
    table.add_row("  known how", escape(price["measured"]))
    return table


def rivals_table(rows: Sequence[Mapping], base: str) -> Table:
    """What each rival gained at one size, ours over it, and what it cost with its search.

    Args:
        rows: of one size, as `core.rival_gains.rival_table` has them.
        base: whom gains are measured from.
    """
    columns = ["rival", f"gain over {base}", "ahead", "ours more by", "FLOPs", "tokens searched"]
    diverged = any(row["diverged"] for row in rows)
    table = new_table([*columns, *(["diverged"] if diverged else [])], left=["rival"])
    for row in rows:
        searched = row["search_tokens"] + row["state_search_tokens"]
        table.add_row(
            escape(row["entrant"]),
            "0" if row["entrant"] == base else with_se(row["gain"], row["se"]),
            "" if row["entrant"] == base else f"{row['ahead']} of {row['states']}",
            "" if row["ours"] is None else with_se(row["ours"], row["ours_se"]),
            f"{row['total_flops']:.1e}",
            count_text(searched) if searched else "none",
            *([str(row["diverged"])] if diverged else []),
        )
    return table


def with_se(value: float | None, se: float | None) -> str:
    """A number with its standard error."""
    if value is None:
        return "unknown"
    return f"{value:+.4f}" if se is None else f"{value:+.4f} ± {se:.4f}"


def limits_text(limits: Mapping, currency: str) -> str:
    """The limits of the budget in words."""
    named = {"max_hours": "hours", "max_gpu_hours": "GPU hours", "max_cost": escape(currency)}
    told = [f"{limits[name]:g} {unit}" for name, unit in named.items() if limits[name] is not None]
    return f"at most {', '.join(told)}" if told else "no limit is set"


def power_table(power: Sequence[Mapping], n_runs: int, sizes: Sequence[int]) -> Table:
    """What the runs can tell of each task: noise, the smallest gain by number of runs, a verdict.

    Args:
        power: rows of `core.power.power_table`.
        n_runs: distinct proxy runs of the design.
        sizes: numbers of runs to show the smallest gain of.
    """
    gains = [f"{size:,} runs" for size in sizes]
    columns = ["task", "seed sd", "signal", "in reach", *gains, f"seen by {n_runs:,}", "needed"]
    table = new_table(columns, left=["task"])
    for row in power:
        if row["seed_sd"] is None:
            table.add_row(escape(row["task"]), *["unknown"] * (len(columns) - 1))
            continue
        seen = [row["curve"][str(size)] for size in sizes]
        needed = "none" if row["runs_needed"] is None else f"{row['runs_needed']:,}"
        table.add_row(
            escape(row["task"]),
            f"{row['seed_sd']:.4f}",
            f"{row['ratio']:.1f}",
            f"{row['in_reach']:.3f}",
            *("-" if gain is None else f"{gain:.4f}" for gain in seen),
            f"{100 * row['detection']:.0f}%",
            needed,
        )
    return table


def signal_table(checks: Mapping, losses: Mapping[str, tuple[float, float]]) -> Table:
    """Variance between mixtures over that between seeds, and what the proxies learned.

    Args:
        checks: the value of `cate_checks`.
        losses: for each task the median held-out loss of the proxy runs and the entropy of the
            task's token frequencies, both in nats a token.
    """
    columns = ["task", "mixtures / seeds", "above noise", "loss, nats a token", "unigram entropy"]
    table = new_table(columns, left=["task"])
    for row in checks["noise_floor"]:
        ratio = "unknown" if row["ratio"] is None else f"{row['ratio']:.1f}"
        above = {True: "yes", False: "no", None: "unknown"}[row["above_noise"]]
        numbers = [f"{nats:.2f}" for nats in losses[row["task"]]]
        table.add_row(escape(row["task"]), ratio, above, *numbers)
    return table


def estimator_table(model: Mapping, tasks: Sequence[str]) -> Table:
    """Scores of each estimator on pool states it hasn't seen, for the tasks that count."""
    columns = ["task", "estimator", "R2 within states", "Spearman", "coverage of 90%"]
    table = new_table(columns, left=columns[:2])
    for task in tasks:
        for row in model["scores"]:
            if row["task"] != task:
                continue
            coverage = row["coverage_90"]
            table.add_row(
                escape(task),
                row["estimator"] + (" (answers)" if row["chosen"] else ""),
                f"{row['r2_within']:.2f} ± {row['r2_within_se']:.2f}",
                f"{row['spearman']:.3f} ± {row['spearman_se']:.3f}",
                "none" if coverage is None else share_text(coverage),
                style="bold" if row["chosen"] else None,
            )
        table.add_section()
    return table


def moved_table(rows: Sequence[Mapping], limit: int = 6) -> Table:
    """The covariates that moved most, in standard deviations of the experiment's states."""
    columns = ["domain", "covariate", "before", "after", "moved"]
    table = new_table(columns, left=columns[:2])
    for row in rows[:limit]:
        table.add_row(escape(row["domain"]), row["covariate"], f"{row['before']:.4g}",
                      f"{row['after']:.4g}", f"{row['moved']:+.1f} sd")  # fmt: skip
    return table


def before_after_table(before: Mapping, after: Mapping) -> Table:
    """The recommended mixture before and after a change of the pool."""
    columns = ["domain", "before", "after", "change", "natural, after"]
    table = new_table(columns, left=["domain"])
    old = dict(zip(before["domains"], before["mixtures"]["recommended"], strict=True))
    natural = after["mixtures"]["natural"]
    new = after["mixtures"]["recommended"]
    for domain, share, own in zip(after["domains"], new, natural, strict=True):
        change = f"{100 * (share - old.get(domain, 0.0)):+.1f}"
        table.add_row(escape(domain), share_text(old.get(domain, 0.0)), share_text(share), change,
                      share_text(own))  # fmt: skip
    return table


def top_up_table(recommended: Mapping, limit: int = 4) -> Table:
    """The first proxy runs of a top-up plan."""
    rows = recommended["top_up"]
    table = new_table(["run", *map(escape, recommended["domains"])], left=["run"])
    for i, row in enumerate(rows[:limit]):
        shares = [share_text(row[f"share__{domain}"]) for domain in recommended["domains"]]
        table.add_row(str(i + 1), *shares)
    return table


def choice_table(choice: Mapping) -> Table:
    """Subsets of covariates that were tried, the best first, with standard errors."""
    columns = ["subset", "size", "R2 within unseen states", "s.e.", "below best", "s.e. of that"]
    table = new_table(columns, left=["subset"])
    for row in choice["table"]:
        names = ", ".join(row["covariates"]) or "none"
        label = f"{row['kind']}: {names}" + (" (chosen)" if row["chosen"] else "")
        numbers = ("r2_within", "r2_within_se", "below_best", "below_best_se")
        cells = ("-" if row[name] is None else f"{row[name]:.3f}" for name in numbers)
        table.add_row(escape(label), str(row["size"]), *cells)
    return table
