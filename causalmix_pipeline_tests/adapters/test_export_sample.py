import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from causalmix_pipeline.adapters import export_sample
from causalmix_pipeline.adapters.export_sample import write_sample
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline_tests.adapters.exported_pool import (
    HOSTILE,
    export_of,
    mixture_of,
    n_words,
    write_pool,
)

LABELS = ["math", "code", "talk", "none", "web"]


def rows_of(folder: Path) -> list[dict]:
    """All rows of a sample, in its order."""
    rows = []
    for path in sorted(folder.rglob("part-*")):
        if path.suffix == ".parquet":
            rows += pl.read_parquet(path).to_dicts()
        else:
            rows += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return rows


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tokens_by_domain(rows: list[dict]) -> Counter:
    counts = Counter()
    for row in rows:
        counts[row["domain"]] += n_words(row["text"])
    return counts


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("sample") / "pool", LABELS, apart=False)


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards, and buffers that are flushed many times."""
    monkeypatch.setattr(export_sample, "SHARD_TOKENS", 400)
    monkeypatch.setattr(export_sample, "WAITING_BYTES", 2000)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("budget", [900, 20_000], ids=["smaller", "larger than the pool"])
def test_a_sample_holds_each_document_as_often_as_the_manifest_says(
    tmp_path, pool, budget, kind, small_shards
):
    export = export_of(pool, LABELS, mixture_of(5), budget=budget)

    write_sample(tmp_path, export, pool, kind=kind, by_domain=False)

    rows = rows_of(tmp_path / "sample")
    wanted = dict(export.manifest.select("document_id", "copies").iter_rows())
    assert Counter(row["document_id"] for row in rows) == wanted
    assert max(wanted.values()) > 1 if budget > 10_000 else max(wanted.values()) == 1
    repeats = Counter((row["document_id"], row["copy"]) for row in rows)
    assert max(repeats.values()) == 1
    assert all(row["copy"] < wanted[row["document_id"]] for row in rows)


def test_the_shares_of_a_sample_are_exact_to_one_document(tmp_path, pool):
    mixture, budget = mixture_of(5), 9000
    export = export_of(pool, LABELS, mixture, budget=budget)

    write_sample(tmp_path, export, pool, kind="jsonl", by_domain=False)

    found = tokens_by_domain(rows_of(tmp_path / "sample"))
    for d, label in enumerate(LABELS):
        lengths = export.manifest.filter(pl.col("domain") == label)["n_tokens"].to_list()
        assert abs(found[label] - mixture[d] * budget) <= max(lengths, default=0)
    assert "none" not in found


def test_the_index_counts_what_the_files_hold(tmp_path, pool, small_shards):
    export = export_of(pool, LABELS, mixture_of(5), budget=9000)

    write_sample(tmp_path, export, pool, kind="jsonl", by_domain=False)

    index = json.loads((tmp_path / "sample" / "index.json").read_text())
    rows = rows_of(tmp_path / "sample")
    tokens, by_domain = tokens_by_domain(rows), Counter(row["domain"] for row in rows)
    assert (index["rows"], index["tokens"]) == (len(rows), tokens.total())
    for told in index["domains"]:
        assert (told["tokens"], told["rows"]) == (tokens[told["domain"]], by_domain[told["domain"]])
        assert told["achieved"] == pytest.approx(tokens[told["domain"]] / tokens.total())
    assert len(index["files"]) > 5
    for file in index["files"]:
        assert file["rows"] == (tmp_path / "sample" / file["file"]).read_bytes().count(b"\n")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_order(tmp_path, pool):
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        export = export_of(pool, LABELS, mixture_of(5), budget=100_000, seed=seed)
        write_sample(tmp_path / name, export, pool, kind="jsonl", by_domain=False)
        made.append(contents_of(tmp_path / name))

    assert made[0] == made[1]
    assert made[0]["sample/part-00000.jsonl"] != made[2]["sample/part-00000.jsonl"]


def test_documents_are_mixed_over_shards_and_within_them(tmp_path, pool, small_shards):
    """Every shard has every domain, and no run of one file's documents in their order."""
    export = export_of(pool, LABELS, [0.2] * 5, budget=8000)

    write_sample(tmp_path, export, pool, kind="jsonl", by_domain=False)

    shards = sorted((tmp_path / "sample").glob("part-*"))
    read = {row: i for i, row in enumerate(export.manifest.sort("file", "row")["document_id"])}
    for shard in shards:
        rows = [json.loads(line) for line in shard.read_text().split("\n")[:-1]]
        assert len({row["domain"] for row in rows}) >= 3
        order = [read[row["document_id"]] for row in rows]
        assert order != sorted(order)
    assert len(shards) == 20


def test_a_sample_by_domain_has_a_stream_for_each_domain_that_is_read(tmp_path, pool, small_shards):
    export = export_of(pool, LABELS, mixture_of(5), budget=9000)

    sampled = write_sample(tmp_path, export, pool, kind="parquet", by_domain=True)

    assert sorted(p.name for p in (tmp_path / "domains").iterdir() if p.is_dir()) == [
        "code", "math", "talk", "web",
    ]  # fmt: skip
    for source in sampled.sources:
        rows = [row for file in source.files for row in pl.read_parquet(file.path).to_dicts()]
        assert {row["domain"] for row in rows} <= {source.domain}
        assert (len(rows), sum(n_words(row["text"]) for row in rows)) == (
            source.rows, source.n_tokens,
        )  # fmt: skip


def test_hostile_labels_come_back_exactly_and_name_no_file(tmp_path):
    pool = write_pool(tmp_path / "pool", HOSTILE, apart=False)
    export = export_of(pool, HOSTILE, [1 / 7] * 7, budget=2000)

    write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=True)

    rows = rows_of(tmp_path / "out")
    assert {row["domain"] for row in rows} == set(HOSTILE)
    index = json.loads((tmp_path / "out" / "domains" / "index.json").read_text(encoding="utf-8"))
    assert [told["domain"] for told in index["domains"]] == HOSTILE
    for path in (tmp_path / "out").rglob("*"):
        assert path.name.isascii() and path.name.replace("-", "").replace(".", "").isalnum()


def test_prompts_and_responses_stay_apart(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a", "b"], prompts=True)
    export = export_of(pool, ["a", "b"], [0.5, 0.5], budget=200)

    write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=False)

    written = {
        (row["prompt"], row["response"])
        for path in (tmp_path / "pool").iterdir()
        for row in map(json.loads, path.read_text().splitlines())
    }
    rows = rows_of(tmp_path / "out")
    assert {(row["prompt"], row["response"]) for row in rows} <= written
    assert len(rows) > 3 and "text" not in rows[0]


def test_progress_ends_at_all_documents_and_shards(tmp_path, pool, small_shards):
    export, told = export_of(pool, LABELS, mixture_of(5), budget=4000), []

    write_sample(
        tmp_path, export, pool, kind="jsonl", by_domain=False,
        on_progress=lambda *step: told.append(step),
    )  # fmt: skip

    assert ("documents", export.manifest.height, export.manifest.height) in told
    n_shards = -(-sum(export.tokens_of().values()) // 400)
    assert told[-1] == ("shards", n_shards, n_shards)


def test_what_waits_in_memory_stays_at_its_limit_however_many_copies(tmp_path, monkeypatch):
    """Six documents, each a thousand times: the limit is looked at for every copy."""
    limit, waiting, add = 2000, [], export_sample._Shards.add
    monkeypatch.setattr(export_sample, "WAITING_BYTES", limit)

    def add_and_look(shards, shard, line):
        add(shards, shard, line)
        waiting.append(sum(map(len, itertools.chain(*shards.waiting.values()))))

    monkeypatch.setattr(export_sample._Shards, "add", add_and_look)
    pool = write_pool(tmp_path / "pool", LABELS[:3], n=2, apart=False)
    export = export_of(pool, LABELS[:3], [0.3, 0.3, 0.4], budget=80_000)

    write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=False)

    assert len(waiting) == len(rows_of(tmp_path / "out")) > 4000
    assert max(waiting) < limit
    assert sum(waiting) > len(waiting) * limit / 10


def test_copies_of_a_batch_are_placed_in_slices_with_the_same_result(tmp_path, pool, monkeypatch):
    export = export_of(pool, LABELS, mixture_of(5), budget=20_000)
    for name, n in (("whole", 10_000), ("slices", 3)):
        monkeypatch.setattr(export_sample, "SENT_DOCUMENTS", n)
        write_sample(tmp_path / name, export, pool, kind="jsonl", by_domain=False)

    assert contents_of(tmp_path / "whole") == contents_of(tmp_path / "slices")


def test_a_folder_that_another_export_removes_while_it_is_locked_is_made_and_locked_again(
    tmp_path, pool, monkeypatch
):
    """The other ends, and removes its folder, after this one opened it."""
    flock, removed = export_sample.fcntl.flock, []

    def remove_first(handle, flags):
        if not removed:
            removed.append((tmp_path / ".sample.partial").rmdir())
        flock(handle, flags)

    monkeypatch.setattr(export_sample.fcntl, "flock", remove_first)
    with export_sample._partial_folder(tmp_path / "sample") as partial:
        assert partial.is_dir() and removed
        with (
            pytest.raises(ConfigError, match="must be free, but another export"),
            export_sample._partial_folder(tmp_path / "sample"),
        ):
            pass

    assert not partial.exists()


def test_a_pool_that_changed_since_is_refused_and_the_old_sample_stays(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    export = export_of(pool, ["a", "b"], [0.5, 0.5], budget=2000)
    write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=False)
    before = contents_of(tmp_path / "out")
    lines = (tmp_path / "pool" / "01-two.jsonl").read_text().splitlines()
    (tmp_path / "pool" / "01-two.jsonl").write_text("\n".join(lines[:-1]) + "\n")

    with pytest.raises(PoolError, match=r"1 of \d+ are no longer in 01-two\.jsonl.*refresh"):
        write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=False)

    assert contents_of(tmp_path / "out") == before
    (tmp_path / "pool" / "01-two.jsonl").unlink()
    with pytest.raises(PoolError, match=r"no longer in 01-two\.jsonl"):
        write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=False)


def test_another_text_in_the_place_of_a_document_is_refused(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    export = export_of(pool, ["a", "b"], [0.5, 0.5], budget=2000)
    path = tmp_path / "pool" / "00-one.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"text": "something else", "domain": "a"})
    path.write_text("\n".join(lines) + "\n")

    with pytest.raises(PoolError, match=r"1 of 20 are no longer in 00-one\.jsonl"):
        write_sample(tmp_path / "out", export, pool, kind="jsonl", by_domain=False)

    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_kind_is_refused(tmp_path, pool):
    export = export_of(pool, LABELS, mixture_of(5), budget=4000)

    with pytest.raises(ConfigError, match="sample must be jsonl or parquet, got 'arrow'"):
        write_sample(tmp_path, export, pool, kind="arrow", by_domain=False)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, pool, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_sample, "_write_synced", full)
    export = export_of(pool, LABELS, mixture_of(5), budget=4000)

    with pytest.raises(ConfigError, match="must have room for the sample"):
        write_sample(tmp_path, export, pool, kind="jsonl", by_domain=False)

    assert list(tmp_path.iterdir()) == []


KILLED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from causalmix_pipeline.adapters import export_sample
    from causalmix_pipeline_tests.adapters.exported_pool import *
    from causalmix_pipeline.adapters.pool_door import ColumnMap

    root, stage = Path(sys.argv[1]), sys.argv[2]
    export_sample.SHARD_TOKENS, export_sample.WAITING_BYTES = 400, 2000
    labels = ["math", "code", "talk", "none", "web"]
    pool = PoolSpec(root / "pool", ColumnMap(domain="domain"))
    export = export_of(pool, labels, mixture_of(5), budget=9000)

    def wait(what, done, total):
        if what == stage and done >= total // 2:
            print("there", flush=True)
            time.sleep(60)

    export_sample.write_sample(
        root / "out", export, pool, kind="jsonl", by_domain=False, on_progress=wait
    )
""")


@pytest.mark.parametrize("stage", ["documents", "shards"])
def test_a_kill_in_the_middle_leaves_the_old_sample_whole_and_the_next_run_makes_it_new(
    tmp_path, stage, small_shards
):
    pool = write_pool(tmp_path / "pool", LABELS, apart=False)
    old = export_of(pool, LABELS, [0.2] * 5, budget=700)
    write_sample(tmp_path / "out", old, pool, kind="jsonl", by_domain=False)
    before = contents_of(tmp_path / "out" / "sample")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), stage], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "there\n"

    with pytest.raises(ConfigError, match="must be free, but another export"):
        write_sample(tmp_path / "out", old, pool, kind="jsonl", by_domain=False)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()

    assert contents_of(tmp_path / "out" / "sample") == before
    new = export_of(pool, LABELS, mixture_of(5), budget=9000)
    for folder in ("out", "never_killed"):
        write_sample(tmp_path / folder, new, pool, kind="jsonl", by_domain=False)
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "never_killed")
