"""Reads a task's file: held-out text, or questions with their answers, from JSONL or Parquet.

A task decides every outcome, so nothing of its file is left out in silence: one wrong row refuses
the file, with the row and the way out.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.tasks import (
    HarnessTask,
    Measure,
    QuestionText,
    extract_answer,
    number_in,
)


def read_text_column(path: Path, column: str) -> list[str]:
    """The texts of one file; held-out text must be clean, so nothing is left out.

    Raises:
        PoolError: if the file can't be read, lacks the column, or holds no text there.
    """
    try:
        frame = _read_frame(path)
        texts = frame[column].cast(pl.String).drop_nulls().to_list()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PoolError(f"{path} must hold text in column {column!r}, got: {error}.") from error
    if not any(text.strip() for text in texts):
        raise PoolError(f"{path} must hold text in column {column!r}, got none: add documents.")
    return texts


def read_questions(
    path: Path,
    kind: Literal["choice", "exact"],
    *,
    max_questions: int | None = None,
    max_new_tokens: int = 64,
    measure: Measure = "probability",
) -> list[QuestionText]:
    """The questions of one file.

    Columns are `prompt` (or `question`); for a choice `choices`, a list of texts, and `answer`, the
    position or the text of the right one; for an exact answer `answer`, and where wanted `pattern`,
    a regular expression with one group, and `numeric`, the tolerance of a comparison as numbers.

    Args:
        path: JSONL or Parquet.
        kind: of the task.
        max_questions: keep this many, spread evenly over the file; None keeps all.
        max_new_tokens: most tokens of a generated answer.
        measure: what of a choice is scored.

    Raises:
        PoolError: if the file can't be read, or a row breaks a rule.
    """
    try:
        rows = _read_frame(path).to_dicts()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PoolError(f"{path} must hold a question a row, got: {error}.") from error
    if not rows:
        raise PoolError(f"{path} must hold questions, got none: add some.")
    read = _choice if kind == "choice" else _exact
    questions = [read(_Row(path, i, row)) for i, row in enumerate(rows)]
    if max_questions is not None and len(questions) > max_questions:
        chosen = np.linspace(0, len(questions) - 1, max_questions).round().astype(int)
        questions = [questions[i] for i in np.unique(chosen)]
    changes: dict[str, Any] = (
        {"measure": measure} if kind == "choice" else {"max_new_tokens": max_new_tokens}
    )
    return [replace(question, **changes) for question in questions]


def file_digest(path: Path) -> str | None:
    """SHA-256 of a task's file, or of all files in its folder; None where there's nothing."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(path).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def harness_texts(task: HarnessTask) -> list[str]:
    """The text in a harness task's data files, a row each, as far as it can be read."""
    texts = []
    for file in sorted(Path(task.folder).rglob("*")):
        if file.suffix not in (".jsonl", ".json", ".parquet"):
            continue
        try:
            frame = pl.read_json(file) if file.suffix == ".json" else _read_frame(file)
        except (pl.exceptions.PolarsError, OSError):
            continue  # a data file of another form; the harness itself reads it, or fails
        for row in frame.iter_rows():
            texts.append(" ".join(_strings_in(row)))
    return texts


def _strings_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [text for part in value for text in _strings_in(part)]


def _read_frame(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    return pl.read_ndjson(path, infer_schema_length=None)


class _Row:
    """One row of a file, which says where it stands when it breaks a rule."""

    def __init__(self, path: Path, index: int, values: dict[str, Any]) -> None:
        self.values = values
        self._where = f"{path}, row {index + 1}"

    def error(self, field: str, rule: str, value: object, way_out: str) -> PoolError:
        return PoolError(f"{self._where}: {field} must {rule}, got {value!r}: {way_out}.")

    def text(self, *names: str) -> str:
        """The text of the first column of these names that has a value."""
        value = next((self.values[n] for n in names if self.values.get(n) is not None), None)
        if not isinstance(value, str) or not value.strip():
            raise self.error(" or ".join(names), "be text", value, "write it, or drop the row")
        return value


def _choice(row: _Row) -> QuestionText:
    choices = row.values.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise row.error("choices", "be a list of texts", choices, "write each option as text")
    if len(set(choices)) < max(2, len(choices)):
        raise row.error(
            "choices", "be two different texts or more", choices, "drop repeated ones, add others"
        )
    answer = row.values.get("answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and re.fullmatch(r"\d+", answer):  # a column of mixed kinds
        answer = int(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise row.error(
            "answer",
            f"be one of choices or its position from 0 to {len(choices) - 1}",
            answer,
            "correct it",
        )
    return QuestionText(
        kind="choice",
        prompt=row.text("prompt", "question"),
        options=tuple(choices),
        label=answer,
        answer=choices[answer],
    )


def _exact(row: _Row) -> QuestionText:
    answer, pattern = row.values.get("answer"), row.values.get("pattern") or ""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        # A column with one broken number has them all as such: 7.0 was written as 7.
        whole = float(answer).is_integer() and abs(answer) < 1e15
        answer = str(int(answer)) if whole else repr(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise row.error("answer", "be text or a number", answer, "write it, or drop the row")
    try:
        n_groups = re.compile(pattern).groups if pattern else 1
    except (re.error, TypeError) as error:
        raise row.error("pattern", "be a regular expression", pattern, str(error)) from error
    if n_groups != 1:
        raise row.error(
            "pattern", "have one group", pattern, "put what counts as the answer in brackets"
        )
    tolerance = row.values.get("numeric")
    numeric = tolerance is not None and tolerance is not False
    if numeric and (not isinstance(tolerance, int | float) or not 0 <= tolerance < float("inf")):
        raise row.error("numeric", "be a tolerance >= 0", tolerance, "use 0 for equal numbers")
    found = extract_answer(answer, pattern, n_lines=None)
    if found is None:
        raise row.error("answer", f"match pattern {pattern!r}", answer, "write it in that form")
    if numeric and number_in(found) is None:
        raise row.error("answer", "hold a number with numeric", answer, "correct it")
    return QuestionText(
        kind="exact",
        prompt=row.text("prompt", "question"),
        answer=answer,
        pattern=pattern,
        numeric=numeric,
        tolerance=float(tolerance or 0.0) if numeric and tolerance is not True else 0.0,
    )
