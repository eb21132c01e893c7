"""One line now and then: how many are done, how long the rest takes."""

from dataclasses import replace

import pytest

from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.resources.progress import (
    PROGRESS_PREFIX,
    Progress,
    TrainingProgress,
    progress_teller,
)

SPEC = ProxySpec("s", "t", "e", (1.0,), 0, ProxyConfig(), "engine")


def test_the_first_and_last_are_told_and_the_rest_is_estimated():
    lines = []
    progress = Progress(4, "proxy runs trained", lines.append, every=0)

    for _ in range(4):
        progress.add(1)

    assert [line.split(",")[0] for line in lines] == [
        f"{PROGRESS_PREFIX}{n} of 4 proxy runs trained" for n in (1, 2, 3, 4)
    ]
    assert lines[-1].endswith("0 s left")


def test_lines_are_rare_but_the_end_is_always_told():
    lines = []
    progress = Progress(100, "runs", lines.append, every=60)

    for _ in range(100):
        progress.add(1)

    assert lines == [f"{PROGRESS_PREFIX}100 of 100 runs, 0 s left"]


def test_each_stage_is_counted_apart_and_told_at_its_end():
    lines = []
    on_progress = progress_teller(lines.append)

    for done in (1, 2):
        on_progress("files read", done, 2)
    on_progress("chunks scored", 1, 1)

    assert [line.split(",")[0] for line in lines] == [
        f"{PROGRESS_PREFIX}2 of 2 files read",
        f"{PROGRESS_PREFIX}1 of 1 chunks scored",
    ]


def finished(spec: ProxySpec, *, diverged: bool = False) -> ProxyRecord:
    return ProxyRecord(spec.key, {}, {}, {}, [3.0, 2.0], diverged, 1.0, epochs=[0.5])


def test_a_study_tells_what_is_done_failed_and_running_and_how_fast():
    lines, looks = [], []
    specs = [replace(SPEC, data_seed=seed) for seed in range(5)]
    progress = TrainingProgress(
        specs, "runs trained", lines.append, lambda now: looks.append(now.n_ended), every=0
    )

    progress.on_started(specs[:3])
    progress.on_started(specs[:1])  # again, after its worker died
    progress.on_done([finished(specs[0]), finished(specs[1], diverged=True)])
    progress.on_failed(specs[2], "no reason")
    progress.on_started(specs[3:])
    progress.on_done([finished(spec) for spec in specs[3:]])

    assert lines[0].startswith(f"{PROGRESS_PREFIX}2 of 5 runs trained (0 failed, 1 running, ")
    assert lines[1] == f"proxy run {specs[2].key} failed: no reason"
    assert lines[-1].startswith(f"{PROGRESS_PREFIX}4 of 5 runs trained (1 failed, 0 running, ")
    assert lines[-1].endswith(" tokens/s), 0 s left")
    assert looks == [2, 3, 5]
    assert (progress.diverged, progress.tokens) == (1, 4 * SPEC.config.tokens)
    assert [record.key for record in progress.records] == [specs[i].key for i in (0, 1, 3, 4)]


def test_a_long_study_is_looked_at_every_tenth_of_its_runs():
    looks = []
    specs = [replace(SPEC, data_seed=seed) for seed in range(100)]
    progress = TrainingProgress(
        specs, "runs", lambda line: None, lambda now: looks.append(now.done)
    )

    for spec in specs:
        progress.on_done([finished(spec)])

    assert looks == list(range(10, 101, 10))


def test_larger_proxies_count_for_more_of_the_time_that_is_left():
    config = ProxyConfig(hidden=128, layers=4)
    large = replace(SPEC, config=config)
    specs = [SPEC, large]
    progress = TrainingProgress(specs, "runs trained", print, lambda now: None, every=60)
    times = config.flops / ProxyConfig().flops

    progress.on_done([finished(SPEC)])

    done, whole = progress.work
    assert (whole - done) / done == pytest.approx(times)
    assert times > 5
    progress.on_failed(large, "no reason")
    assert progress.work[0] == progress.work[1]
