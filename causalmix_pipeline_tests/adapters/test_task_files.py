"""Questions are read whole or refused with their row."""

import json

import polars as pl
import pytest

from causalmix_pipeline.adapters.task_files import file_digest, harness_texts, read_questions
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.tasks import HarnessTask

CHOICE = {"question": "Sky?", "choices": ["blue", "red"], "answer": 0}
EXACT = {"prompt": "2 + 2 =", "answer": "4"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_right_option_is_given_by_position_or_text(tmp_path):
    rows = [CHOICE, CHOICE | {"answer": 1}]
    by_position = read_questions(write(tmp_path / "a.jsonl", rows), "choice")
    texts = [row | {"answer": row["choices"][row["answer"]]} for row in rows]
    by_text = read_questions(write(tmp_path / "b.jsonl", texts), "choice")

    assert by_position == by_text
    assert [(q.prompt, q.label, q.answer) for q in by_text] == [("Sky?", 0, "blue"),
                                                                ("Sky?", 1, "red")]  # fmt: skip


def test_an_option_that_is_a_digit_is_meant_before_a_position(tmp_path):
    row = {"prompt": "1+1?", "choices": ["1", "2", "0"], "answer": "2"}

    assert read_questions(write(tmp_path / "a.jsonl", [row]), "choice")[0].label == 1


def test_parquet_holds_the_same_questions(tmp_path):
    rows = [EXACT | {"pattern": r"(\d+)", "numeric": 0.5}, EXACT | {"numeric": None}]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    first, second = read_questions(tmp_path / "a.parquet", "exact", max_new_tokens=7)

    assert (first.pattern, first.numeric, first.tolerance) == (r"(\d+)", True, 0.5)
    assert (second.pattern, second.numeric, second.max_new_tokens) == ("", False, 7)


def test_fewer_questions_are_spread_over_the_file(tmp_path):
    rows = [EXACT | {"answer": i} for i in range(100)]
    path = write(tmp_path / "a.jsonl", rows)

    assert [q.answer for q in read_questions(path, "exact", max_questions=3)] == ["0", "50", "99"]
    assert len(read_questions(path, "exact", max_questions=200)) == 100


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("choice", CHOICE | {"choices": "blue"}, "choices must be a list of texts"),
        ("choice", CHOICE | {"choices": ["blue"]}, "choices must be two different texts"),
        ("choice", CHOICE | {"choices": ["red", "red"]}, "two different texts or more"),
        ("choice", CHOICE | {"answer": 2}, "answer must be one of choices or its position .* 1"),
        ("choice", CHOICE | {"answer": "green"}, "answer must be one of choices"),
        ("choice", CHOICE | {"question": " "}, "prompt or question must be text, got ' '"),
        ("exact", EXACT | {"prompt": None}, "prompt or question must be text, got None"),
        ("exact", EXACT | {"answer": ""}, "answer must be text or a number, got ''"),
        ("exact", EXACT | {"pattern": "(4"}, "pattern must be a regular expression"),
        ("exact", EXACT | {"pattern": "4"}, "pattern must have one group"),
        ("exact", EXACT | {"pattern": "#(4)"}, r"answer must match pattern '#\(4\)', got '4'"),
        ("exact", EXACT | {"numeric": -1}, "numeric must be a tolerance >= 0, got -1"),
        ("exact", {"prompt": "a", "answer": "b", "numeric": 0}, "answer must hold a number"),
    ],
)
def test_a_wrong_row_refuses_the_file_and_is_named(tmp_path, kind, row, message):
    good = CHOICE if kind == "choice" else EXACT
    path = tmp_path / "a.jsonl"
    mixed = any(type(row.get(name)) is not type(value) for name, value in good.items())
    # A column of two kinds can't be read at all: then the wrong row stands alone.
    write(path, [row] if mixed else [good, row])

    with pytest.raises(PoolError, match=message) as caught:
        read_questions(path, kind)
    assert str(caught.value).startswith(f"{path}, row {1 if mixed else 2}: ")


@pytest.mark.parametrize("content", ["", "{", "not json\n"])
def test_a_file_without_questions_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)

    with pytest.raises(PoolError, match="must hold"):
        read_questions(path, "exact")


def test_a_folder_is_named_by_all_its_files(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "task.yaml").write_text("task: a")
    first = file_digest(tmp_path / "t")
    (tmp_path / "t" / "data.jsonl").write_text('{"q": "x"}\n')

    assert first != file_digest(tmp_path / "t")
    assert file_digest(tmp_path / "none") is None


def test_the_text_of_a_harness_task_is_that_of_its_data(tmp_path):
    write(tmp_path / "d.jsonl", [{"q": "sky?", "options": ["blue", "red"], "n": 3}])
    (tmp_path / "task.yaml").write_text("task: a")

    assert harness_texts(HarnessTask(str(tmp_path), "a")) == ["sky? blue red"]
