"""A tiny project that several folders share: 3 domains of 2 sources, settings, an instance."""

import json
import random
from pathlib import Path

import pytest
import yaml

WORDS = {
    "math": "sum angle prime factor seven equals root proof number digit square".split(),
    "code": "def return self class import index loop value print list yield".split(),
    "talk": "hello morning friend weather really think maybe coffee street laugh".split(),
}
SOURCES = {"short": 40, "long": 90}


def write_documents(path: Path, domain: str, *, n: int, n_words: int, seed: int) -> None:
    """Write documents of words of a domain; the seed tells them apart from any other file's."""
    rng = random.Random(f"{domain}{path.stem}{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        words = [rng.choice(WORDS[domain]) for _ in range(n_words)]
        words[:: max(n_words // 5, 1)] = [f"{rng.random():.6f}" for _ in words[:: n_words // 5]]
        lines.append(json.dumps({"text": " ".join(words), "group": f"g{i // 2}"}))
    path.write_text("\n".join(lines) + "\n")


def write_pool(root: Path, *, n: int = 30, seed: int = 0) -> None:
    """Write `<domain>/<source>.jsonl` for each domain and source."""
    for domain in WORDS:
        for source, n_words in SOURCES.items():
            write_documents(root / domain / f"{source}.jsonl", domain, n=n, n_words=n_words, seed=seed)


def write_project(root: Path, **overrides) -> Path:
    """Write two pools, two tasks' held-out text and a settings file; return the file's path."""
    write_pool(root / "experiment", seed=1)
    write_pool(root / "live", n=24, seed=2)
    for task in ("math", "code"):
        write_documents(root / "eval" / f"{task}.jsonl", task, n=20, n_words=60, seed=3)
    raw = {
        "pools": {"experiment": "experiment", "live": "live"},
        "columns": {"group": "group"},
        "tasks": [
            {"name": "math", "path": "eval/math.jsonl", "weight": 0.7},
            {"name": "code", "path": "eval/code.jsonl", "weight": 0.3},
        ],
        "proxy": {
            "preset": "tests",
            "workers": 2,
            "overrides": {"vocab_size": 384, "sequence_length": 32},
        },
        "design": {
            "n_runs": 16,
            "mixtures_per_state": 2,
            "noise_panel": {"mixtures": 2, "seeds": 2},
        },
        "estimators": ["structured_ridge", "regmix"],
        "automation": {"quiet_seconds": 0},
    }
    path = root / "causalmix.yaml"
    path.write_text(yaml.safe_dump(raw | overrides))
    return path


@pytest.fixture
def project_file(tmp_path) -> Path:
    """The settings file of a tiny project in a folder of its own."""
    return write_project(tmp_path)
