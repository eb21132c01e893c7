"""What a proxy run is scored on, and how a score becomes an outcome.

A task is held-out text, whose loss is measured in bits per byte; questions with options to choose
from, by the options' likelihood; questions with an exact answer, which the model generates; or a
task of EleutherAI's lm-evaluation-harness. Outcomes are signed so that larger is better.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from causalmix_pipeline.core.proxy_runs import ProxyRecord

TaskKind = Literal["loss", "choice", "exact", "lm_eval"]
Measure = Literal["probability", "accuracy"]
Direction = Literal["minimize", "maximize"]

#: Task kinds that are questions of ours.
QUESTION_KINDS = ("choice", "exact")

#: A number in an answer: sign, digits with commas between thousands, decimals.
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class QuestionText:
    """One question as its file has it.

    Attributes:
        kind: `choice` or `exact`.
        prompt: what the model reads.
        options: texts to choose from; empty for `exact`.
        label: position of the right option; -1 for `exact`.
        answer: the right answer.
        pattern: regular expression with one group, taken from generation and answer alike; ""
            compares as many first lines of the generation as the answer has.
        numeric: compare as numbers.
        tolerance: largest difference of two numbers that count as equal.
        max_new_tokens: most tokens to generate.
        measure: what of a choice is scored.
    """

    kind: Literal["choice", "exact"]
    prompt: str
    options: tuple[str, ...] = ()
    label: int = -1
    answer: str = ""
    pattern: str = ""
    numeric: bool = False
    tolerance: float = 0.0
    max_new_tokens: int = 0
    measure: Measure = "probability"

    def texts(self) -> list[str]:
        """What a training document must not hold: the prompt, followed by each possible answer."""
        answers = self.options or (self.answer,)
        return [f"{self.prompt} {answer}" for answer in answers]


@dataclass(frozen=True)
class Question:
    """One question in token ids, ready to score; what isn't described is as in `QuestionText`.

    Attributes:
        prompt: token ids.
        options: token ids of each option as it continues the prompt.
        option_bytes: UTF-8 bytes of each option, its leading blank included.
    """

    kind: Literal["choice", "exact"]
    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    option_bytes: tuple[int, ...]
    label: int
    answer: str
    pattern: str
    numeric: bool
    max_new_tokens: int
    tolerance: float = 0.0
    measure: Measure = "probability"


@dataclass(frozen=True)
class HarnessTask:
    """A task of the lm-evaluation-harness in local files.

    Attributes:
        folder: holds the task's YAML file and its data.
        name: of the task in that file.
        max_questions: score at most this many; None scores all.
    """

    folder: str
    name: str
    max_questions: int | None = None


def score_choice(log_likelihoods: list[float], question: Question) -> float:
    """The score of one multiple-choice question.

    Args:
        log_likelihoods: summed nats of each option after the prompt, <= 0.
        question: its label and measure.

    Returns:
        `accuracy`: 1.0 where the right option has the highest log-likelihood per byte, else 0.0.
        `probability`: the right option's share in a softmax over them. NaN unless all are finite.
    """
    per_byte = [
        value / n_bytes
        for value, n_bytes in zip(log_likelihoods, question.option_bytes, strict=True)
    ]
    if not all(map(math.isfinite, per_byte)):
        return math.nan
    best = max(per_byte)
    if question.measure == "accuracy":
        # A tie is shared: a model that tells no option from another is right by chance.
        return (per_byte[question.label] == best) / per_byte.count(best)
    weights = [math.exp(value - best) for value in per_byte]
    return weights[question.label] / sum(weights)


def score_generation(generated: str, question: Question | QuestionText) -> float:
    """1.0 where a generated answer is right, else 0.0."""
    answer = extract_answer(question.answer, question.pattern, n_lines=None)
    n_lines = (answer or "").count("\n") + 1
    # A number may stand anywhere; a text is compared with as much as the answer is long.
    found = extract_answer(
        generated, question.pattern, n_lines=None if question.numeric else n_lines
    )
    if answer is None or found is None:
        return 0.0
    if not question.numeric:
        return float(found == answer)
    wanted, got = number_in(answer), number_in(found)
    if wanted is None or got is None:
        return 0.0
    return float(abs(wanted - got) <= question.tolerance)


def extract_answer(text: str, pattern: str, *, n_lines: int | None) -> str | None:
    """What the pattern's group matches first, stripped; without a pattern the first lines.

    Returns:
        None where the pattern matches nothing.
    """
    if pattern:
        found = _compiled(pattern).search(text)
        return None if found is None or found[1] is None else found[1].strip()
    lines = text.strip().split("\n")[:n_lines]
    return "\n".join(lines).strip()


def number_in(text: str) -> float | None:
    """The last number of a text, where word problems end in their answer; None for none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def outcome_of(
    record: ProxyRecord, task: str, directions: Mapping[str, Direction] | None = None
) -> float | None:
    """A run's outcome on a task, signed so that larger is better.

    Args:
        record: of a finished run.
        task: its name.
        directions: which way a task's score is better; by default loss is minimised and every
            other score maximised.

    Returns:
        Minus bits per byte of held-out loss; else the score, minus it where it's minimised. None
        where the run diverged, or has no finite outcome: nothing is put in its place.
    """
    if record.diverged:
        return None
    value, direction = record.bits_per_byte.get(task), "minimize"
    if value is None:
        value = record.scores.get(task)
        direction = (directions or {}).get(task, "maximize")
    if value is None or not math.isfinite(value):
        return None
    return -value if direction == "minimize" else value
