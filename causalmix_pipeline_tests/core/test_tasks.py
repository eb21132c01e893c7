"""A question is scored as its task says, and a run without an outcome has none."""

import math
from dataclasses import replace

import pytest

from causalmix_pipeline.core.proxy_runs import ProxyRecord
from causalmix_pipeline.core.tasks import (
    Question,
    QuestionText,
    number_in,
    outcome_of,
    score_choice,
    score_generation,
)

CHOICE = Question(
    kind="choice",
    prompt=(1, 2),
    options=((3,), (4, 5), (6,)),
    option_bytes=(2, 10, 4),
    label=1,
    answer="b",
    pattern="",
    numeric=False,
    max_new_tokens=0,
)
RECORD = ProxyRecord("k", {}, {"text": 2.0}, {"text": 1.0}, [3.0], False, 1.0, {"qa": 0.25})


def test_an_option_is_judged_by_its_likelihood_per_byte():
    """By sums the last would win: a long option would lose to any short one."""
    accuracy = replace(CHOICE, measure="accuracy")

    assert score_choice([-4.0, -10.0, -5.0], accuracy) == 1.0
    assert score_choice([-1.0, -10.0, -5.0], accuracy) == 0.0


def test_the_probability_of_the_right_option_is_a_softmax_over_likelihoods_per_byte():
    weights = [math.exp(-2.0), math.exp(-1.0), math.exp(-1.25)]

    assert score_choice([-4.0, -10.0, -5.0], CHOICE) == pytest.approx(weights[1] / sum(weights))


def test_options_that_the_model_cannot_tell_apart_are_a_guess():
    question = replace(CHOICE, measure="accuracy", option_bytes=(1, 1, 1))

    assert score_choice([-2.0, -2.0, -2.0], question) == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("measure", ["probability", "accuracy"])
def test_a_likelihood_that_is_no_number_gives_no_score(value, measure):
    assert math.isnan(score_choice([-4.0, value, -5.0], replace(CHOICE, measure=measure)))


@pytest.mark.parametrize(
    ("answer", "generated", "changes", "score"),
    [
        ("Paris", " Paris\nQuestion: and of Spain?", {}, 1),
        ("Paris", "It is Paris", {}, 0),
        ("Paris", "", {}, 0),
        ("a\nb", "a\nb\nc", {}, 1),
        ("a\nb", "a", {}, 0),
        ("#### 18", "so 3*6=18\n#### 18 eggs", {"pattern": r"#### (\d+)"}, 1),
        ("#### 18", "so 3*6=18", {"pattern": r"#### (\d+)"}, 0),
        ("#### 1,800", "#### 1800.0", {"pattern": r"#### ([\d,.]+)", "numeric": True}, 1),
        ("3.14", "pi is 3.1416", {"numeric": True, "tolerance": 0.01}, 1),
        ("3.14", "pi is 3.1416", {"numeric": True, "tolerance": 0.001}, 0),
        ("-4", "the answer is -4", {"numeric": True}, 1),
        ("-4", "the answer is four", {"numeric": True}, 0),
        ("7", "7 apples\nno, I mean 8", {"numeric": True}, 0),
        ("7", "7 apples\nno, I mean 8", {"numeric": True, "pattern": r"(\d+)"}, 1),
    ],
)
def test_a_generation_is_right_if_it_gives_the_answer(answer, generated, changes, score):
    question = QuestionText(kind="exact", prompt="?", answer=answer, **changes)

    assert score_generation(generated, question) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.5 km", 1234.5), ("a 3, b 4", 4.0), ("-.5", -0.5), ("none", None), ("1,23", 23.0)],
)
def test_the_last_number_of_a_text_is_read(text, number):
    assert number_in(text) == number


def test_outcomes_are_signed_so_that_larger_is_better():
    assert outcome_of(RECORD, "text") == -2.0
    assert outcome_of(RECORD, "qa") == 0.25
    assert outcome_of(RECORD, "qa", {"qa": "minimize"}) == -0.25


@pytest.mark.parametrize(
    "record",
    [
        replace(RECORD, diverged=True),
        replace(RECORD, scores={}),
        replace(RECORD, scores={"qa": math.nan}),
        replace(RECORD, bits_per_byte={"qa": math.inf}),
    ],
)
def test_a_run_that_diverged_or_was_not_scored_has_no_outcome(record):
    assert outcome_of(record, "qa") is None


def test_a_question_offers_its_prompt_with_each_answer_to_the_search_for_overlap():
    choice = QuestionText(kind="choice", prompt="Sky?", options=("blue", "red"), label=0)

    assert choice.texts() == ["Sky? blue", "Sky? red"]
    assert QuestionText(kind="exact", prompt="2+2?", answer="4").texts() == ["2+2? 4"]
