import io

import dagster as dg
import pytest
from rich.console import Console

from causalmix_pipeline.console import (
    Work,
    before_after_table,
    bytes_text,
    count_text,
    estimator_table,
    gain_text,
    hours_text,
    minutes,
    mixture_table,
    moved_table,
    plan_table,
    power_table,
    print_binding,
    print_gain,
    print_verdict,
    rivals_table,
    signal_table,
    top_up_table,
)
from causalmix_pipeline.core.price import Calibration, Rates, Workload, price


def recommended(**changes) -> dict:
    """A recommendation as the asset keeps it: two domains, two tasks."""
    value = {
        "domains": ["math", "talk"],
        "mixtures": {
            "recommended": [0.7, 0.3],
            "equal": [0.5, 0.5],
            "natural": [0.4, 0.6],
            "regmix": [0.6, 0.4],
            "reference": [0.4, 0.6],
        },
        "reference_name": "natural",
        "verdict": "supported",
        "overlap_score": 0.8,
        "gain": 0.1,
        "low": 0.05,
        "high": 0.15,
        "gains": [
            {"mixture": "recommended", "gain": 0.1, "low": 0.05, "high": 0.15},
            {"mixture": "equal", "gain": -0.02, "low": None, "high": None},
            {"mixture": "natural", "gain": -0.0, "low": 0.0, "high": 0.0},
            {"mixture": "regmix", "gain": 0.04, "low": 0.0, "high": 0.08},
        ],
        "task_gains": [
            {"task": "solve", "weight": 0.8, "reference_bits_per_byte": 2.0},
            {"task": "chat", "weight": 0.2, "reference_bits_per_byte": 3.0},
        ],
        "slack": [{"constraint": "trust region", "binds": True}],
        "top_up": [{"share__math": 0.9, "share__talk": 0.1}] * 6,
    }
    return value | changes


def printed(*things) -> str:
    out = Console(file=io.StringIO(), width=110, highlight=False)
    for thing in things:
        thing(out) if callable(thing) else out.print(thing)
    return " ".join(out.file.getvalue().split())


def test_the_reference_is_named_once_and_gains_nothing_over_itself():
    text = printed(mixture_table(recommended()))

    assert "natural (reference)" in text
    assert text.count("reference") == 1
    assert "-0.000" not in text


def test_every_mixture_stands_beside_the_recommended_one():
    text = printed(mixture_table(recommended()))

    assert "math 70.0% 40.0% 50.0% 60.0%" in text
    assert "+0.100 0 -0.020 +0.040" in text


def test_an_unsupported_pool_promises_no_gain():
    value = recommended(verdict="unsupported", overlap_score=9.0)

    text = printed(mixture_table(value), lambda out: print_gain(out, value))

    assert "+0.1" not in text
    assert "No gain is promised." in text


def test_a_gain_is_put_beside_the_loss_of_the_tasks_that_count():
    """Loss .8 x 2 + .2 x 3 = 2.2; .1 of it is 4.5%."""
    text = printed(lambda out: print_gain(out, recommended()))

    assert "+0.100 (+0.050 to +0.150) bits per byte" in text
    assert "4.5% of the loss of the tasks that count (solve, chat), 2.200 bits" in text


def test_a_gain_without_an_interval_says_whose_estimator_has_none():
    tasks = [
        {"task": "solve", "weight": 0.8, "reference_bits_per_byte": 2.0, "low": 0.1, "high": 0.2},
        {"task": "chat", "weight": 0.2, "reference_bits_per_byte": 3.0, "low": None, "high": None},
    ]
    value = recommended(low=None, high=None, task_gains=tasks)

    text = printed(lambda out: print_gain(out, value))

    assert "+0.100 bits per byte, without an interval: the estimator of chat has none." in text
    assert "90% interval" not in text


@pytest.mark.parametrize("verdict", ["supported", "extrapolating", "unsupported"])
def test_a_verdict_is_told_in_words(verdict):
    text = printed(lambda out: print_verdict(out, recommended(verdict=verdict)))

    assert text.startswith(f"Overlap verdict: {verdict}: ")
    assert "Distance 0.80" in text


def test_what_binds_is_named():
    free = recommended(slack=[{"constraint": "trust region", "binds": False}])

    assert "What holds it back: trust region." in printed(
        lambda out: print_binding(out, recommended())
    )
    assert "No constraint holds it back." in printed(lambda out: print_binding(out, free))


def test_markup_in_names_is_shown_as_it_is():
    value = recommended(domains=["[red]x[/red]", "talk"])
    value["top_up"] = [{"share__[red]x[/red]": 0.9, "share__talk": 0.1}]

    assert "[red]x[/red]" in printed(mixture_table(value))
    assert "[red]x[/red]" in printed(top_up_table(value))
    assert "[red]x[/red]" in printed(before_after_table(value, value))


def test_a_top_up_plan_shows_its_first_runs():
    text = printed(top_up_table(recommended()))

    assert text.count("90.0% 10.0%") == 4


def test_the_mixture_before_and_after_shows_the_change():
    after = recommended(mixtures=recommended()["mixtures"] | {"recommended": [0.5, 0.5]})

    assert "math 70.0% 50.0% -20.0" in printed(before_after_table(recommended(), after))


def test_a_move_is_told_in_standard_deviations():
    row = {"domain": "math", "covariate": "log2_tokens", "before": 14.0, "after": 15.0}

    assert "math log2_tokens 14 15 +2.5 sd" in printed(moved_table([row | {"moved": 2.5}]))


def test_unknown_numbers_are_said_to_be_unknown():
    floor = {"task": "solve", "ratio": None, "above_noise": None}
    score = {"task": "solve", "estimator": "regmix", "chosen": True, "r2_within": 0.5,
             "r2_within_se": 0.1, "spearman": 0.7, "spearman_se": 0.05, "coverage_90": None,
    }  # fmt: skip

    signal = signal_table({"noise_floor": [floor]}, {"solve": (4.341, 5.871)})
    assert "solve unknown unknown 4.34 5.87" in printed(signal)
    assert "regmix (answers) 0.50 ± 0.10 0.700 ± 0.050 none" in printed(
        estimator_table({"scores": [score, score | {"task": "other"}]}, ["solve"])
    )
    assert gain_text({"gain": None, "low": None, "high": None}) == "unknown"


class Entry:
    """A log entry: a step that starts or ends, or a message."""

    def __init__(self, step, message="", *, starts=False, ends=False):
        self.step_key, self.user_message = step, message
        self.dagster_event = self if starts or ends else None
        self.is_step_start, self.is_step_success = starts, ends


def test_the_remaining_time_falls_as_steps_end():
    work = Work(["tokenizer", "cate_model"])
    whole = work.seconds_left
    work.on_event(Entry("tokenizer", starts=True))
    assert work.what == "tokenizer"

    work.on_event(Entry("tokenizer", ends=True))

    assert work.seconds_left < whole
    assert 0 < work.done_share < 1


def test_training_says_how_many_runs_are_done_and_how_long_the_rest_takes():
    """The step of a graph is named with its graph before a dot."""
    work = Work(["train_proxy_runs"])

    line = "progress: 40 of 136 proxy runs trained, 33 s left"
    work.on_event(Entry("proxy_runs.train_proxy_runs", line))

    assert work.what == "proxy runs trained 40/136"
    assert work.seconds_left == 33


def test_nothing_to_do_is_done():
    assert Work([]).done_share == 1
    work = Work(["x"])
    work.on_event(Entry("x", ends=True))
    assert work.done_share == 1


def test_times_are_told_as_people_say_them():
    assert [minutes(s) for s in (0.4, 59.4, 60, 200)] == ["0 s", "59 s", "1 min 00 s", "3 min 20 s"]


# The plan

PRICE = price(
    Workload(
        n_all=136, n_pending=100, tokens=512_000, flops=1.6e11, n_parameters=45_000, steps=1000,
        runs_per_stack=4, n_workers=2, n_cores=2, scratch_bytes=2 * 10**9,
    ),
    Calibration(3.0, 0.5, 0.02, 4096, "measured by a trial"),
    Rates(core_hour=0.5, currency="EUR"),
)  # fmt: skip
NO_LIMITS = {"max_hours": None, "max_gpu_hours": None, "max_cost": None}


def lines_of(table, width: int = 100) -> list[str]:
    """What is printed, a line each; refuses what doesn't fit."""
    out = Console(file=io.StringIO(), width=width)
    out.print(table)
    lines = out.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(len(line) <= width and "…" not in line for line in lines)
    return [" ".join(line.split()) for line in lines]


def test_the_plan_is_told_in_units_that_people_use():
    lines = lines_of(plan_table(PRICE, NO_LIMITS | {"max_hours": 2.0, "max_cost": 9.0}, 5e10))

    assert "proxy runs 136: 36 in the store, 100 to train" in lines
    assert "a run 512,000 tokens, 45,000 parameters" in lines
    assert "to train 51.2 million tokens, 1.6e+13 FLOPs" in lines
    assert "time here 4 min 29 s, in 2 workers of 4 runs each" in lines
    assert "core hours 0.15" in lines
    assert "money 0.07 EUR" in lines
    assert "disk 410 kB of records, and 4.0 GB while it trains; 50.0 GB free" in lines
    assert "budget at most 2 hours, 9 EUR" in lines


def test_a_plan_without_price_and_limit_says_where_to_set_them():
    lines = lines_of(plan_table({**PRICE, "cost": None}, NO_LIMITS, None))

    assert "money no price is set (budget.price_per_core_hour, budget.price_per_gpu_hour)" in lines
    assert "budget no limit is set" in lines


def rival(name: str, **changes) -> dict:
    """A row of the comparison's table, of a rival without any outcome."""
    row = dict.fromkeys(("gain", "se", "ours", "ours_se"))
    counts = {"ahead": 0, "states": 0, "diverged": 0, "total_flops": 2e9}
    return row | counts | {"entrant": name, "search_tokens": 0, "state_search_tokens": 0} | changes


def test_the_rivals_table_tells_gains_their_errors_and_the_search():
    equal = rival("equal", gain=0.0, se=0.0, ahead=0, states=4, ours=0.0125, ours_se=None)
    doremi = rival("doremi", gain=0.05, se=0.01, ahead=3, states=4, state_search_tokens=2_000_000)

    text = printed(rivals_table([equal, doremi, rival("grid")], "equal"))

    assert "gain over equal" in text and "diverged" not in text
    assert "+0.0500 ± 0.0100" in text and "3 of 4" in text and "2.0e+09" in text
    assert "+0.0125" in text and "+0.0000" not in text
    assert text.count("unknown") == 1 and text.count("none") == 2


def test_the_rivals_table_has_a_column_of_diverged_runs_only_where_there_are_some():
    text = printed(rivals_table([rival("equal"), rival("doremi", diverged=7)], "equal"))

    assert "diverged" in text and text.endswith("none 7")
    assert text.count("unknown") == 1  # equal shares gain 0 over themselves, whatever diverged


def test_the_power_table_shows_what_runs_can_tell():
    row = {
        "task": "math", "seed_sd": 0.0123, "ratio": 12.34, "in_reach": 0.1234, "detection": 0.987,
        "runs_needed": 48, "curve": {"64": None, "512": 0.0101},
    }  # fmt: skip
    unknown = dict.fromkeys(row) | {"task": "code"}

    lines = lines_of(power_table([row, unknown], 1024, (64, 512)))

    assert "task seed sd signal in reach 64 runs 512 runs seen by 1,024 needed" in lines
    assert "math 0.0123 12.3 0.123 - 0.0101 99% 48" in lines
    assert "code " + " ".join(["unknown"] * 7) in lines
    none = lines_of(power_table([row | {"runs_needed": None}], 1024, (64,)))
    assert none[3].endswith("99% none")


def test_times_sizes_and_counts_are_said_as_people_say_them():
    assert [hours_text(h) for h in (0.01, 0.5, 1.0, 26.25, 100.0)] == [
        "36 s", "30 min 00 s", "1 h 00 min", "26 h 15 min", "4 d 4 h",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (4.1e5, 2e9, 3e12)] == ["410 kB", "2.0 GB", "3.0 TB"]
    assert [count_text(n) for n in (45_312, 6.96e7, 5.12e10)] == [
        "45,312", "69.6 million", "51.2 billion",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("progress: 3 of 9 files read, 12 s left", "files read 3/9"),
        (
            "progress: 3 of 9 proxy runs trained (0 failed, 2 running, 999 tokens/s), 12 s left",
            "proxy runs trained 3/9",
        ),
        (
            "progress: 3 of 9 proxy runs trained (1 failed, 2 running, 999 tokens/s), 12 s left",
            "proxy runs trained 3/9, 1 failed",
        ),
    ],
)
def test_a_progress_line_of_the_log_is_understood(line, what):
    """Plain ones, and those of a study with failed and running runs."""
    work = Work(["train_proxy_runs"])
    entry = dg.EventLogEntry(
        error_info=None,
        level=20,
        user_message=line,
        run_id="r",
        timestamp=0.0,
        step_key="proxy_runs.train_proxy_runs",
    )

    work.on_event(entry)

    assert work.what == what
    assert work.seconds_left == 12
