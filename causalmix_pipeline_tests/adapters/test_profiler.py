"""A pool's profile: each document scored once, by whatever workers, and after whatever happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from causalmix_pipeline.adapters import profiler
from causalmix_pipeline.adapters.experiment import PoolTokenizer
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.pool_reader import read_pool
from causalmix_pipeline.adapters.profiler import (
    PoolProfile,
    PoolSpec,
    ScorerPlan,
    profile_pool,
    sample_compress_ratio,
    survey_pool,
)
from causalmix_pipeline.adapters.score_store import ScoreStore
from causalmix_pipeline.adapters.scorers import model_free_plans
from causalmix_pipeline.core.covariates import METRICS
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.work import InProcess
from causalmix_pipeline_tests.adapters.counting_scorer import CountingScorer
from causalmix_pipeline_tests.adapters.s3_server import s3_environment, s3_server
from causalmix_pipeline_tests.adapters.small_pool import draw_texts, make_documents, write_pool

DOCUMENTS = make_documents()
TOKENIZER = PoolTokenizer.fit(DOCUMENTS, vocab_size=300)


def profile(spec: PoolSpec, root: Path, *extra: ScorerPlan, workers=None) -> PoolProfile:
    plans = model_free_plans(TOKENIZER.scorer(root / "tokenizers"), vocd_budget_tokens=2_000)
    return profile_pool(
        spec, [*plans, *extra], store=ScoreStore(root / "scores"), workers=workers or InProcess()
    )


@pytest.fixture
def spec(tmp_path) -> PoolSpec:
    return write_pool(tmp_path / "pool", DOCUMENTS)


def more_documents(n: int) -> pl.DataFrame:
    rows = [
        {"domain": "math", "source": "first", "row": i, "text": text}
        for i, text in enumerate(draw_texts("math", n, seed=77))
    ]
    return pl.DataFrame(rows)


def add_file(folder: Path, name: str, documents: pl.DataFrame) -> None:
    written = write_pool(folder.parent / f"of-{name}", documents)
    (Path(written.location) / "math.jsonl").rename(folder / name)


# What a profile holds


def test_a_profile_holds_the_readers_documents_with_every_metric_and_no_text(spec, tmp_path):
    found = profile(spec, tmp_path)
    read = read_pool(spec.location, spec.columns)

    shared = ["document_id", "domain", "source", "group", "file", "row", "copies"]
    assert found.documents.select(shared).equals(read.documents.select(shared))
    assert set(METRICS) <= set(found.documents.columns)
    assert "text" not in found.documents.columns
    assert found.n_rows == 90 and found.quarantine.is_empty()


def test_copies_are_one_row_and_refused_rows_are_kept_with_their_reason(spec, tmp_path):
    path = Path(spec.location) / "math.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + '\n{"text": 3}\n')

    found = profile(spec, tmp_path)

    assert found.n_rows == 92
    assert found.documents.height == 90
    assert found.documents["copies"].sum() == 91
    assert found.quarantine["row"].to_list() == [31]


def test_the_users_numbers_are_metrics(tmp_path):
    folder = tmp_path / "pool" / "math"
    folder.mkdir(parents=True)
    texts = draw_texts("math", 3, seed=5)
    pl.DataFrame({"text": texts, "stars": [1, None, 5]}).write_parquet(folder / "a.parquet")
    columns = replace(PoolSpec("").columns, numbers=("stars",))

    found = profile(PoolSpec(tmp_path / "pool", columns), tmp_path).documents

    assert sorted(found["stars"].to_list(), key=str) == [1.0, 5.0, None]


def test_a_sample_of_copies_compresses_better_wherever_they_stand(spec, tmp_path):
    once = profile(spec, tmp_path).documents
    for name in ("code", "math", "prose"):
        path = Path(spec.location) / f"{name}.jsonl"
        path.write_text(path.read_text() * 5)

    often = profile(spec, tmp_path).documents

    assert (often["sample_compress_ratio"] < 0.4 * once["sample_compress_ratio"]).all()
    assert often["compress_ratio"].equals(once["compress_ratio"])


def test_the_compression_of_a_sample_is_that_of_its_bytes():
    assert sample_compress_ratio(b"") == 1.0
    assert sample_compress_ratio(b"ab" * 50_000) < 0.01
    assert sample_compress_ratio(os.urandom(50_000)) > 0.99


# Once per content


def test_what_is_known_is_not_scored_again(spec, tmp_path):
    counting = CountingScorer(tmp_path / "log")
    first = profile(spec, tmp_path, ScorerPlan(counting))
    second = profile(spec, tmp_path, ScorerPlan(counting))

    assert set(first.n_scored.values()) >= {90}
    assert set(second.n_scored.values()) == {0}
    assert second.documents.equals(first.documents)
    assert sorted(counting.scored()) == sorted(first.documents["document_id"].to_list())


def test_new_documents_alone_are_scored_and_deleted_ones_leave(spec, tmp_path):
    counting = CountingScorer(tmp_path / "log")
    first = profile(spec, tmp_path, ScorerPlan(counting))
    add_file(Path(spec.location), "new.jsonl", more_documents(7))
    (Path(spec.location) / "code.jsonl").unlink()

    second = profile(spec, tmp_path, ScorerPlan(counting))

    assert second.n_scored[counting.key] == 7
    assert len(counting.scored()) == len(set(counting.scored())) == 97
    assert second.documents.height == 90 - 30 + 7
    assert "code" not in second.documents["domain"].to_list()
    kept = second.documents.join(first.documents, on=["domain", "document_id"], how="semi")
    assert kept.height == 60


def test_a_changed_version_rescored_that_scorer_alone(spec, tmp_path):
    first, second = CountingScorer(tmp_path / "log"), CountingScorer(tmp_path / "log", version=2)
    before = profile(spec, tmp_path, ScorerPlan(first))

    after = profile(spec, tmp_path, ScorerPlan(second))

    assert {key: n for key, n in after.n_scored.items() if n} == {second.key: 90}
    assert (after.documents["length"] - before.documents["length"] == 1.0).all()


def test_a_sample_is_scored_within_its_budget_and_its_texts_are_found_again(spec, tmp_path):
    """They aren't in the spool where all other scores are known: the files are read again."""
    profile(spec, tmp_path)
    counting = CountingScorer(tmp_path / "log")

    found = profile(spec, tmp_path, ScorerPlan(counting, budget_tokens=500))

    scored = found.documents.filter(pl.col("length").is_not_null())
    assert found.n_scored[counting.key] == scored.height == len(counting.scored())
    assert 3 <= scored.height < 45
    assert set(scored["domain"]) == {"code", "math", "prose"}
    again = profile(spec, tmp_path, ScorerPlan(counting, budget_tokens=500))
    assert again.n_scored[counting.key] == 0
    assert again.documents.equals(found.documents)


def test_a_damaged_part_is_put_aside_and_its_documents_scored_again(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "SPOOLED_CHUNK_BYTES", 1)  # a task for each file
    counting = CountingScorer(tmp_path / "log")
    first = profile(spec, tmp_path, ScorerPlan(counting))
    part = next((tmp_path / "scores" / counting.key).glob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)

    second = profile(spec, tmp_path, ScorerPlan(counting))

    assert second.documents.equals(first.documents)
    assert second.n_scored[counting.key] == 30
    assert len(list((tmp_path / "scores" / counting.key).glob("*.damaged"))) == 1


def test_a_store_whose_parts_are_all_damaged_is_filled_again(spec, tmp_path):
    first = profile(spec, tmp_path)
    for part in (tmp_path / "scores").glob("*/*.parquet"):
        part.write_bytes(part.read_bytes()[:-1])

    second = profile(spec, tmp_path)

    assert second.documents.equals(first.documents)
    assert second.n_scored == first.n_scored


def test_an_unchanged_file_is_not_read_again(spec, tmp_path, monkeypatch):
    """Its catalogue is kept by its content, and by how it is read."""
    first, read = profile(spec, tmp_path), []
    real = profiler.read_batches
    monkeypatch.setattr(
        profiler, "read_batches", lambda file, *a: (read.append(file.name), real(file, *a))[1]
    )
    path = Path(spec.location) / "math.jsonl"
    lines = path.read_text().splitlines(keepends=True)

    again = profile(spec, tmp_path)
    assert read == [] and again.documents.equals(first.documents)
    path.write_text("".join(lines[:-1]))
    fewer = profile(spec, tmp_path)
    assert set(read) == {"math.jsonl"} and fewer.documents.height == 89
    other = profile(replace(spec, columns=replace(spec.columns, source=None)), tmp_path)
    assert set(other.documents["source"]) == {"code", "math", "prose"}


def test_a_damaged_catalogue_is_read_from_the_file_again(spec, tmp_path):
    first = profile(spec, tmp_path)
    for part in (tmp_path / "scores" / ".files").rglob("documents*.parquet"):
        part.write_bytes(part.read_bytes()[:-1] + b"?")

    assert profile(spec, tmp_path).documents.equals(first.documents)


def test_many_parts_are_joined_into_one(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "SPOOLED_CHUNK_BYTES", 1)
    monkeypatch.setattr("causalmix_pipeline.adapters.score_store.MAX_PARTS", 2)
    counting = CountingScorer(tmp_path / "log")

    found = profile(spec, tmp_path, ScorerPlan(counting))

    assert len(list((tmp_path / "scores" / counting.key).glob("*.parquet"))) == 1
    assert profile(spec, tmp_path, ScorerPlan(counting)).documents.equals(found.documents)


# Bad days


def _profile_slowly(spec: PoolSpec, root: Path) -> None:
    profiler.SPOOLED_CHUNK_BYTES = 1  # a task for each file
    counting = CountingScorer(root / "log", seconds=0.3)
    profile(spec, root, ScorerPlan(counting))


def test_two_profiles_at_the_same_time_score_each_document_once(spec, tmp_path):
    profile(spec, tmp_path)  # so that both have the same work
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_profile_slowly, args=(spec, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)

    counting = CountingScorer(tmp_path / "log")
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(counting.scored()) == sorted(set(counting.scored()))
    assert len(counting.scored()) == 90


def test_a_killed_profile_goes_on_where_it_was(spec, tmp_path):
    """Chunks that were kept aren't scored again, none is lost, and nothing is left lying."""
    code = (
        "import sys; from pathlib import Path\n"
        "from causalmix_pipeline_tests.adapters import test_profiler as t\n"
        "from causalmix_pipeline_tests.adapters.small_pool import write_pool\n"
        "root = Path(sys.argv[1])\n"
        "t._profile_slowly(write_pool(root / 'pool', t.DOCUMENTS), root)\n"
    )
    folder = tmp_path / "scores" / CountingScorer(tmp_path).key
    victim = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not list(folder.glob("[!.]*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.parquet")}
    n_kept = sum(pl.read_parquet(path).height for path in kept)
    counting = CountingScorer(tmp_path / "log")

    found = profile(spec, tmp_path, ScorerPlan(counting))

    assert 0 < n_kept < 90
    assert found.n_scored[counting.key] == 90 - n_kept
    assert found.documents["length"].null_count() == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list((tmp_path / "scratch").iterdir())


def test_a_pool_without_usable_documents_leaves_nothing_behind(spec, tmp_path):
    with pytest.raises(PoolError, match="domains lists 'law'"):
        profile(replace(spec, domains=("law",)), tmp_path)

    assert not list((tmp_path / "scratch").iterdir())


# Workers and places


@pytest.fixture
def large_spec(tmp_path) -> PoolSpec:
    """A pool large enough for workers: some 3 MB."""
    return write_pool(tmp_path / "large", make_documents(4_000))


def test_worker_processes_give_the_scores_of_this_process(large_spec, tmp_path):
    there = profile(large_spec, tmp_path / "there", workers=LocalWorkers(2))
    here = profile(large_spec, tmp_path / "here", workers=InProcess())

    assert there.documents.equals(here.documents)
    assert there.n_scored == here.n_scored


def test_a_ray_cluster_gives_the_scores_of_this_process(large_spec, tmp_path):
    pytest.importorskip("ray", reason="the extra ray isn't installed")
    from causalmix_pipeline.adapters.ray_workers import RayWorkers

    there = profile(large_spec, tmp_path / "there", workers=RayWorkers())
    here = profile(large_spec, tmp_path / "here", workers=LocalWorkers(2))

    assert there.documents.equals(here.documents)


def test_a_pool_in_object_storage_is_the_same_pool(spec, tmp_path, monkeypatch):
    import fsspec

    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        storage = fsspec.filesystem("s3", skip_instance_cache=True)
        storage.mkdir("team")
        for path in Path(spec.location).iterdir():
            storage.pipe_file(f"team/pool/{path.name}", path.read_bytes())
        there = profile(replace(spec, location="s3://team/pool"), tmp_path / "there")

    assert there.documents.equals(profile(spec, tmp_path / "here").documents)


# A first look


def test_a_survey_counts_every_row_and_samples_by_content(spec):
    whole, part = survey_pool(spec, max_bytes=2**20), survey_pool(spec, max_bytes=3_000)

    assert whole.documents_of == {"code": 30, "math": 30, "prose": 30}
    assert whole.sample["document_id"].to_list() == DOCUMENTS["document_id"].to_list()
    lowest = sorted(DOCUMENTS["document_id"].to_list())[: part.sample.height]
    assert sorted(part.sample["document_id"].to_list()) == lowest
    assert 3_000 <= part.sample["text"].str.len_bytes().sum() < 3_600
