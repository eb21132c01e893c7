"""What a pool shares with evaluation data is found, whatever the batches it is read in."""

import json
import random

import polars as pl
import pytest

from causalmix_pipeline.adapters.ngram_overlap import (
    OverlapFinder,
    count_shared_ngrams,
    find_overlap,
)
from causalmix_pipeline.adapters.profiler import PoolSpec

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def texts(n: int, seed: int) -> list[str]:
    """Texts of 5 to 60 words out of 30, so that nothing long is shared by chance."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(30)}" for _ in range(rng.randint(5, 60))) for _ in range(n)]


def frame(found: list[str], domain: str = "d") -> pl.DataFrame:
    return pl.DataFrame({"domain": [domain] * len(found), "text": found})


@pytest.mark.parametrize("other", [LONG.upper(), LONG.replace(" ", "... "), f"zero {LONG}, end"])
def test_case_and_punctuation_do_not_hide_an_overlap(other):
    finder = OverlapFinder.of({"t": [LONG]})

    assert finder.look(frame(["nothing", other])).rows() == [(1, "t")]
    assert finder.n_shared() == 1


def test_twelve_words_or_a_break_between_documents_are_no_overlap():
    finder = OverlapFinder.of({"t": [LONG]})
    head, tail = LONG.split(" thirteen")[0], "thirteen and more"
    found = finder.look(frame([head, tail, "two " + tail]))

    assert found.is_empty()
    assert finder.n_shared() == 0


def test_hashes_find_what_sets_of_words_find():
    rng = random.Random(3)
    held_out, pool = texts(60, seed=1), texts(200, seed=2)
    for _ in range(20):  # plant pieces of evaluation text
        words = rng.choice(held_out).split()
        i = rng.randrange(len(pool))
        pool[i] += " " + " ".join(words[: rng.randint(8, 30)])
    tasks = {"a": held_out[:30], "b": held_out[30:]}
    finder = OverlapFinder.of(tasks)
    hit = []
    for start, end in ((0, 90), (90, 200)):
        hit += [start + index for index in finder.look(frame(pool[start:end]))["index"]]

    assert hit == [i for i, text in enumerate(pool) if count_shared_ngrams([text], held_out)]
    assert finder.n_shared() == count_shared_ngrams(pool, held_out) > 0
    for task, of_task in tasks.items():
        assert finder.n_shared(task) == count_shared_ngrams(pool, of_task)
    assert {row["task"]: row["texts too short to check"] for row in finder.table()} == {
        task: sum(len(text.split()) < 13 for text in of_task) for task, of_task in tasks.items()
    }


def test_the_table_counts_by_task_and_domain():
    finder = OverlapFinder.of({"a": [LONG], "b": [f"{LONG} fourteen"], "c": ["short"]})
    finder.look(frame([LONG, LONG, "else"], "x"))
    finder.look(frame([f"{LONG} fourteen"], "y"))
    rows = [tuple(row.values()) for row in finder.table()]

    assert rows == [
        ("a", "x", 1, 2, 0),
        ("a", "y", 1, 1, 0),
        ("b", "x", 1, 2, 0),
        ("b", "y", 2, 1, 0),
        ("c", "none", 0, 0, 1),
    ]


@pytest.mark.parametrize("tasks", [{}, {"t": []}, {"t": ["short"]}])
def test_without_long_evaluation_text_nothing_is_shared(tasks):
    finder = OverlapFinder.of(tasks)

    assert finder.look(frame([LONG])).is_empty()
    assert finder.n_shared() == 0


def test_a_pool_is_read_once_and_hits_are_named_by_file_and_row(tmp_path):
    for domain, found in {"x": ["clean text", LONG], "y": ["other text"]}.items():
        (tmp_path / domain).mkdir()
        lines = [json.dumps({"text": text}) for text in found]
        (tmp_path / domain / "f.jsonl").write_text("\n".join(lines) + "\n")
    finder = OverlapFinder.of({"t": [LONG]})
    found = find_overlap(finder, PoolSpec(tmp_path))

    assert found.select("file", "row", "task").rows() == [("x/f.jsonl", 1, "t")]
    assert [row["domain"] for row in finder.table()] == ["x"]


def test_shared_ngrams_are_counted_whatever_the_case_and_punctuation():
    other = LONG.upper().replace(" ", ", ")

    assert count_shared_ngrams([other], [LONG]) == 1
    assert count_shared_ngrams([LONG + " fourteen"], [f"zero {LONG} fourteen"]) == 2


def test_twelve_shared_words_are_no_shared_13_gram():
    shorter = LONG.rpartition(" ")[0]

    assert count_shared_ngrams([shorter], [LONG]) == 0
    assert count_shared_ngrams([shorter], [LONG], n=12) == 1
    assert count_shared_ngrams([], [LONG]) == 0
