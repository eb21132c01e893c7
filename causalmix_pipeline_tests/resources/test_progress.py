"""One line now and then: how many are done, how long the rest takes."""

from causalmix_pipeline.resources.progress import PROGRESS_PREFIX, Progress, progress_teller


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
