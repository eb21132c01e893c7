"""A tiny project that several folders share: 3 domains of 2 sources, settings, an instance."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from hypothesis import HealthCheck, settings

from causalmix_pipeline_tests.adapters.s3_server import s3_environment, s3_server
from causalmix_pipeline_tests.postgres_server import postgres_folder, postgres_server

#: The same examples each time, however busy the machine is. To look for others:
#: `pytest --hypothesis-profile=default`.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

WORDS = {
    "math": ["sum", "angle", "prime", "factor", "seven", "equals", "root", "proof", "digit"],
    "code": ["def", "return", "self", "class", "import", "index", "loop", "value", "print"],
    "talk": ["hello", "morning", "friend", "weather", "really", "think", "maybe", "coffee"],
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
            path = root / domain / f"{source}.jsonl"
            write_documents(path, domain, n=n, n_words=n_words, seed=seed)


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
            "overrides": {"vocab_size": 384, "sequence_length": 32},
        },
        "design": {
            "n_runs": 16,
            "mixtures_per_state": 2,
            "noise_panel": {"mixtures": 2, "seeds": 2},
        },
        "backend": {"workers": 2},
        "estimators": ["structured_ridge", "regmix"],
        "automation": {"quiet_seconds": 0},
    }
    path = root / "causalmix.yaml"
    path.write_text(yaml.safe_dump(raw | overrides))
    return path


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """URL of a real, empty object store on loopback."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint, monkeypatch) -> Iterator[str]:
    """URL of a folder in an empty bucket."""
    from s3fs import S3FileSystem

    for name, value in s3_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    S3FileSystem().mkdir("bucket")
    yield "s3://bucket/team"
    S3FileSystem().rm("bucket", recursive=True)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    """URL, with its password, of an empty database on a real PostgreSQL server on loopback."""
    if postgres_folder() is None:
        pytest.skip("needs PostgreSQL's programs, on PATH or below /usr/lib/postgresql")
    pytest.importorskip("dagster_postgres")
    with postgres_server() as url:
        yield url


@pytest.fixture
def project_file(tmp_path) -> Path:
    """The settings file of a tiny project in a folder of its own."""
    return write_project(tmp_path)


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory) -> Path:
    """The folder of a tiny project whose whole graph was materialised once; copy it, don't use it.

    18 proxy runs of 30 steps: plumbing, no claim about signal.
    """
    from causalmix_pipeline.automation.jobs import COVARIATE_CHOICE, RIVALS, VALIDATION
    from causalmix_pipeline.automation.staleness import refresh
    from causalmix_pipeline.definitions import build_definitions
    from causalmix_pipeline.resources.instance import ensure_instance
    from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
    from causalmix_pipeline.resources.settings_file import load_settings

    root = tmp_path_factory.mktemp("finished")
    config = write_project(root)
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        wanted = dg.AssetSelection.all() - VALIDATION - COVARIATE_CHOICE - RIVALS
        refresh(build_definitions(config), instance, wanted)
    return root


@pytest.fixture
def finished(finished_project, tmp_path) -> Path:
    """The settings file of a copy of the finished project."""
    shutil.copytree(finished_project, tmp_path / "project")
    return tmp_path / "project" / "causalmix.yaml"
