import contextlib
import io
import json
import random
from pathlib import Path

import polars as pl
import pytest
import yaml
from rich.console import Console

from causalmix_pipeline.adapters.demo_pool import (
    MARKER,
    POOL_SHA256,
    SOURCES,
    DemoPool,
    assemble_demo_pool,
)
from causalmix_pipeline.cli import main
from causalmix_pipeline.demo import DEMO_WEIGHTS, demo_settings, moved_covariates, start_live_pool
from causalmix_pipeline.resources.settings_file import load_settings


def write_texts(path: Path, *, n: int, alphabet: str, seed: int) -> None:
    """Documents of 120 made-up words over an alphabet."""
    rng = random.Random(f"{path.name}{seed}")
    words = ["".join(rng.choices(alphabet, k=rng.randint(2, 7))) for _ in range(150)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        text = " ".join([*rng.choices(words, k=120), f"{rng.random():.9f}"])
        lines.append(json.dumps({"text": text, "group": f"g{i}"}))
    path.write_text("\n".join(lines) + "\n")


def write_demo_pool(root: Path) -> None:
    """A small pool in the demo's layout, marked as complete: assembling it finds it done.

    What packages hold isn't of interest here, and reading it takes half a minute.
    """
    for d, (domain, sources) in enumerate(SOURCES.items()):
        alphabet = "abcdefghijklmnopqrstuvwxyz"[d : d + 14]
        for s, source in enumerate(sources):
            file = f"{domain}/{source}.jsonl"
            write_texts(root / "experiment" / file, n=40, alphabet=alphabet[s:], seed=1)
            write_texts(root / "live" / file, n=24, alphabet=alphabet[s:], seed=2)
        for folder in ("eval", "eval_first"):
            write_texts(root / folder / f"{domain}.jsonl", n=12, alphabet=alphabet, seed=3)
    near, far = root / "drops" / "within_reach", root / "drops" / "out_of_reach"
    write_texts(near / "math" / "word_problems.jsonl", n=30, alphabet="abcdefghijklm", seed=4)
    write_texts(far / "math" / "noise.jsonl", n=200, alphabet="0123456789#$%&", seed=5)
    (near / "drop.json").write_text(json.dumps({"remove": ["opinion/speeches.jsonl"]}))
    (far / "drop.json").write_text(json.dumps({"remove": []}))
    files = {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file()
    }
    (root / MARKER).write_text(json.dumps({"sha256": POOL_SHA256, "files": files}))


@pytest.fixture
def pool(tmp_path, monkeypatch) -> DemoPool:
    """A small demo pool below `data/` of the folder that commands are called in."""
    monkeypatch.chdir(tmp_path)
    write_demo_pool(tmp_path / "data" / "demo")
    return assemble_demo_pool(tmp_path / "data" / "demo")


def tell() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(["demo", "--preset", "tests"])
    text = " ".join(out.getvalue().split())
    assert status == 0, text
    return text


@pytest.mark.timeout(900)
def test_the_story_is_told_twice_and_trains_once(pool, tmp_path):
    """30 steps and made-up words: it's the story that is tested, not the signal."""
    first = tell()
    n_runs = len(list((tmp_path / "data" / "run_store" / "runs").glob("*/*.json")))
    again = tell()

    assert f"proxy runs trained: {n_runs} (of {n_runs} kept)" in first
    assert f"proxy runs trained: 0 (of {n_runs} kept)" in again
    for text in (first, again):
        assert text.count("proxy runs trained: 0") >= 2
        assert "natural (reference)" in text and "RegMix" in text
        assert "Overlap verdict: unsupported" in text
        assert "Proxy runs that would help: 16" in text
        assert "make ui" in text
    only_live = (
        "live_documents, live_changes, live_covariates, top_up_runs, baseline_mixtures, "
        "recommended_mixture, report, training_export"
    )
    assert again.count(f": {only_live}.") == 2
    reports = sorted(path.name for path in (tmp_path / "data" / "reports").iterdir())
    assert reports == ["demo_1.html", "demo_2.html", "demo_3.html", "report.html", "report.md"]


def test_the_demos_settings_are_valid_and_want_something(pool, tmp_path):
    path = tmp_path / "data" / "demo.yaml"
    path.write_text(demo_settings(pool, path, "demo"))

    settings = load_settings(path)

    assert settings.experiment_path == pool.experiment_dir
    assert settings.live_path == tmp_path / "data" / "pool"
    assert settings.data_path == tmp_path / "data"
    assert {t: w for t, w in settings.task_weights.items() if w} == DEMO_WEIGHTS
    assert all(task.is_file() for task in settings.task_paths.values())
    assert settings.n_runs >= 128


def test_the_settings_hold_no_path_of_this_machine(pool, tmp_path):
    text = demo_settings(pool, tmp_path / "data" / "demo.yaml", "demo")

    assert str(tmp_path) not in text
    assert yaml.safe_load(text)["proxy"] == {"preset": "demo"}


def test_a_persons_files_in_the_live_pool_are_moved_aside_not_deleted(pool, tmp_path):
    live = tmp_path / "data" / "pool"
    start_live_pool(pool, live, Console(file=io.StringIO()))
    mine = live / "math" / "mine.jsonl"
    mine.write_text('{"text": "mine"}\n')
    out = Console(file=io.StringIO(), width=200)

    start_live_pool(pool, live, out)

    assert not mine.exists()
    moved = list((tmp_path / "data" / "set_aside").rglob("mine.jsonl"))
    assert [path.read_text() for path in moved] == ['{"text": "mine"}\n']
    assert "1 files of the live pool aren't the demo's" in out.file.getvalue()


def test_every_telling_starts_from_the_same_pool(pool, tmp_path):
    live = tmp_path / "data" / "pool"
    start_live_pool(pool, live, Console(file=io.StringIO()))
    first = {path.name: path.read_bytes() for path in live.rglob("*.jsonl")}
    (live / "math" / "noise.jsonl").write_text("{}\n")  # of a drop
    (live / "opinion" / "speeches.jsonl").unlink()

    start_live_pool(pool, live, Console(file=io.StringIO()))

    assert {path.name: path.read_bytes() for path in live.rglob("*.jsonl")} == first
    assert not (tmp_path / "data" / "set_aside").exists()


def covariate_frame(**values: list[float]) -> pl.DataFrame:
    columns = {name: [0.0, 0.0] for name in ("log2_tokens", "compress_ratio", "mtld")} | values
    return pl.DataFrame({"domain": ["math", "talk"]} | columns)


def test_moves_are_in_standard_deviations_of_the_states_largest_first():
    before = covariate_frame(log2_tokens=[14.0, 15.0], compress_ratio=[0.4, 0.4])
    after = covariate_frame(log2_tokens=[14.0, 16.0], compress_ratio=[0.3, 0.4])
    states = pl.concat(
        [
            covariate_frame(log2_tokens=[10.0, 10.0], compress_ratio=[0.35, 0.1]),
            covariate_frame(log2_tokens=[12.0, 12.0], compress_ratio=[0.45, 0.1]),
        ]
    )

    moved = moved_covariates(before, after, states, ["log2_tokens", "compress_ratio"])

    told = [(row["domain"], row["covariate"], round(row["moved"], 2)) for row in moved]
    # sd of two values is their distance over root 2.
    assert told == [("math", "compress_ratio", -1.41), ("talk", "log2_tokens", 0.71)]


def test_a_covariate_without_spread_is_never_said_to_have_moved():
    before, after = covariate_frame(log2_tokens=[1.0, 1.0]), covariate_frame(log2_tokens=[2.0, 2.0])

    assert moved_covariates(before, after, pl.concat([before, before]), ["log2_tokens"]) == []
