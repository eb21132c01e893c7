"""The run store: a record is whole or absent, damage is named, a lock dies with its holder."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.blobs import ObjectBlobs, write_atomically
from causalmix_pipeline.adapters.run_store import (
    TOKEN_FILES,
    EvalWindows,
    RunStore,
    bits_per_byte,
)
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.tasks import HarnessTask, Question

SPEC = ProxySpec("s" * 64, "t" * 32, "e" * 32, (0.25, 0.75), 1, ProxyConfig(), "engine")


def make_record(spec: ProxySpec = SPEC, loss: float = 2.5) -> ProxyRecord:
    return ProxyRecord(
        key=spec.key,
        spec=spec.to_dict(),
        bits_per_byte={"math": loss / 3, "code": 1.5},
        nats_per_token={"math": loss, "code": 2.25},
        train_loss=[5.0, 4.0, 1 / 3],
        diverged=False,
        cpu_seconds=0.125,
    )


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    """Start a Python process on some code."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Records


def test_a_record_is_read_as_it_was_kept(tmp_path):
    store = RunStore(tmp_path)
    assert store.get(SPEC.key) is None

    store.put(make_record())

    assert store.get(SPEC.key) == make_record()


def test_a_diverged_record_keeps_its_numbers(tmp_path):
    record = replace(make_record(), train_loss=[float("inf")], diverged=True)
    RunStore(tmp_path).put(replace(record, bits_per_byte={"math": float("nan")}))
    back = RunStore(tmp_path).get(SPEC.key)

    assert back is not None
    assert back.diverged
    assert back.train_loss == [float("inf")]
    assert np.isnan(back.bits_per_byte["math"])


def test_missing_specs_come_once_and_in_order(tmp_path):
    first, second, third = (replace(SPEC, data_seed=seed) for seed in (9, 3, 5))
    RunStore(tmp_path).put(make_record(second))

    assert RunStore(tmp_path).missing([first, second, third, first]) == [first, third]
    assert RunStore(tmp_path).n_records() == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b'{"record": 1, "sha256": ""}',
        b'{"record": {"key": "x"}, "sha256": ""}',
    ],
)
def test_a_damaged_record_is_named_with_its_file(tmp_path, content):
    store = RunStore(tmp_path)
    write_atomically(store.path_of(SPEC.key), content)

    with pytest.raises(ProxyError, match=rf"{SPEC.key} is damaged .*moves {tmp_path}/runs/.*json"):
        store.get(SPEC.key)


def test_a_changed_digit_is_not_read_as_an_outcome(tmp_path):
    store = RunStore(tmp_path)
    store.put(make_record())
    path = store.path_of(SPEC.key)
    path.write_text(path.read_text().replace('"code": 1.5', '"code": 1.4'))

    with pytest.raises(ProxyError, match="its checksum differs"):
        store.get(SPEC.key)


def test_a_flipped_bit_anywhere_is_named_or_changes_nothing(tmp_path):
    store, rng = RunStore(tmp_path), random.Random(0)
    store.put(make_record())
    path = store.path_of(SPEC.key)
    raw = path.read_bytes()
    n_named = 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert store.get(SPEC.key) == make_record()
        except ProxyError:
            n_named += 1

    assert n_named > 200


def test_a_record_under_the_name_of_another_is_refused(tmp_path):
    store, other = RunStore(tmp_path), replace(SPEC, data_seed=2)
    store.put(make_record())
    write_atomically(store.path_of(other.key), store.path_of(SPEC.key).read_bytes())

    with pytest.raises(ProxyError, match=f"holds the record of run {SPEC.key}"):
        store.get(other.key)


# Kills

KEEP = """
import json, os, sys
from dataclasses import asdict, replace
from pathlib import Path
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.proxy_runs import ProxyRecord
root, values, call = sys.argv[1:]
store, record = RunStore(Path(root)), ProxyRecord(**json.loads(values))
if call:
    setattr(os, call, lambda *_: os._exit(7))
print("ready", flush=True)
loss = 1.0
while True:
    loss += 1
    store.put(replace(record, train_loss=[loss]))
"""


def keep_without_end(root, call: str = "") -> subprocess.Popen:
    """A process that replaces one record over and over, and ends itself at a call if told to."""
    writer = run_python(KEEP, root, json.dumps(asdict(make_record())), call)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n", writer.communicate()[1]
    return writer


def test_a_writer_killed_at_any_moment_leaves_a_whole_record(tmp_path):
    store, rng = RunStore(tmp_path), random.Random(0)
    store.put(make_record())
    for _ in range(3):
        for writer in [keep_without_end(tmp_path) for _ in range(2)]:
            time.sleep(rng.random() * 0.05)
            writer.send_signal(signal.SIGKILL)
            writer.communicate()

            for _ in range(50):  # the other one still writes: no half is ever read
                record = store.get(SPEC.key)
                assert record is not None
                assert record.train_loss[0] >= 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_ends_before_its_rename_leaves_the_old_record(tmp_path, call):
    store = RunStore(tmp_path)
    store.put(make_record())
    with keep_without_end(tmp_path, call) as writer:
        assert writer.wait() == 7

    assert store.get(SPEC.key) == make_record()


def test_leftovers_of_a_killed_writer_do_not_stop_the_next(tmp_path):
    store = RunStore(tmp_path)
    path = store.path_of(SPEC.key)
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.{os.getpid()}.writing").write_bytes(b"half")

    store.put(make_record())

    assert store.get(SPEC.key) == make_record()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# Locks

HOLDER = """
import sys, time
from causalmix_pipeline.adapters.run_store import RunStore
with RunStore(sys.argv[1]).locked(sys.argv[2].split(",")):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(root, keys: str, seconds: float) -> subprocess.Popen:
    """A process that holds locks."""
    holder = run_python(HOLDER, root, keys, seconds)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n", holder.communicate()[1]
    return holder


def test_a_lock_waits_for_its_holder(tmp_path):
    with hold(tmp_path, "a,b", 0.4) as holder:
        started = time.monotonic()
        with RunStore(tmp_path).locked(["c", "b"]):
            waited = time.monotonic() - started

        assert holder.wait() == 0
    assert waited > 0.2


def test_a_lock_dies_with_its_holder(tmp_path):
    with hold(tmp_path, "a", 600) as holder:
        holder.send_signal(signal.SIGKILL)
        started = time.monotonic()
        with RunStore(tmp_path).locked(["a"]):
            assert time.monotonic() - started < 2


def test_locks_of_other_runs_do_not_wait(tmp_path):
    with hold(tmp_path, "a", 600) as holder:
        started = time.monotonic()
        with RunStore(tmp_path).locked(["b", "b"]):
            assert time.monotonic() - started < 1
        holder.kill()


def test_locks_taken_in_opposite_orders_end(tmp_path):
    """They are taken in the order of their names, so two processes never wait for each other."""
    holders = [run_python(HOLDER, tmp_path, keys, 0.05) for keys in ("a,b,c", "c,b,a")]

    try:
        codes = [holder.wait(timeout=30) for holder in holders]
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    assert codes == [0, 0]


# Inputs of workers


def test_states_and_evaluations_are_read_as_they_were_kept(tmp_path):
    store = RunStore(tmp_path)
    documents = {f"d{i}": np.array([f"{i}", "x"], "S") for i in (2, 0, 1)}
    store.put_state("h", documents)
    evaluation = EvalWindows(
        {"../x": np.arange(6).reshape(2, 3), "a": np.zeros((1, 3), int)},
        {"../x": 12, "a": 3},
        {"../x": 1.25, "a": 0.5},
    )
    store.put_eval("e", evaluation)
    back = store.evaluation("e")

    assert [part[0] for part in store.state("h")] == [b"2", b"0", b"1"]
    assert back.n_bytes == evaluation.n_bytes
    assert back.unigram_nats == evaluation.unigram_nats
    for task, windows in evaluation.windows.items():
        np.testing.assert_array_equal(back.windows[task], windows)
    assert {p.parent.name for p in tmp_path.rglob("*.npz")} == {"states", "eval"}


def test_questions_are_read_as_they_were_kept(tmp_path):
    choice = Question(
        "choice", (1, 2), ((3,), (4, 5)), (1, 2), 1, "b", "", False, 0, 0.0, "accuracy"
    )
    exact = Question("exact", (1,), (), (), -1, "ü", r"(\d)", True, 8, 0.5)
    evaluation = EvalWindows(
        {}, {}, {}, {"a": [choice], "b": [exact, exact]}, {"c": HarnessTask("/f", "t", 3)}, "{}"
    )
    store = RunStore(tmp_path)
    store.put_eval("e", evaluation)

    assert store.evaluation("e") == evaluation


def test_a_model_that_moved_is_looked_for_at_its_new_place(tmp_path):
    store = RunStore(tmp_path)
    question = Question("exact", (1,), (), (), -1, "4", "", False, 8)
    for folder in ("/old", "/new"):
        store.put_eval("e", EvalWindows({}, {}, {}, {"a": [question]}, tokenizer=folder))

    assert store.evaluation("e").tokenizer == "/new"


def test_what_is_kept_under_a_hash_is_not_written_again(tmp_path):
    store = RunStore(tmp_path)
    store.put_state("h", {"a": np.array(["x"], "S")})
    before = (tmp_path / "states/h.npz").stat().st_mtime_ns
    store.put_state("h", {"a": np.array(["y"], "S")})

    assert (tmp_path / "states/h.npz").stat().st_mtime_ns == before
    assert store.state("h")[0].tolist() == [b"x"]


def test_nats_become_bits_per_byte_by_hand():
    assert bits_per_byte(np.log(2) * 24, 8) == pytest.approx(3.0)


def test_a_record_is_plain_json_that_a_person_can_read(tmp_path):
    store = RunStore(tmp_path)
    store.put(make_record())
    values = json.loads(store.path_of(SPEC.key).read_text())["record"]

    assert values["spec"]["mixture"] == [0.25, 0.75]
    assert values["spec"]["config"]["steps"] == 1000


# Object storage


@pytest.fixture
def remote(bucket, tmp_path) -> RunStore:
    """An empty store in object storage, with its cache in `tmp_path`."""
    return RunStore(bucket, cache=tmp_path)


def object_of(store: RunStore) -> tuple[ObjectBlobs, str]:
    """Where the record of SPEC is kept."""
    assert isinstance(store.root, str)
    return ObjectBlobs(store.root), f"runs/{SPEC.key[:2]}/{SPEC.key}.json"


def test_a_record_in_object_storage_is_read_as_it_was_kept(remote):
    assert remote.get(SPEC.key) is None
    assert remote.n_records() == 0

    remote.put(make_record())

    assert remote.get(SPEC.key) == make_record()
    assert remote.n_records() == 1
    assert remote.path_of(SPEC.key) == f"{remote.root}/runs/{SPEC.key[:2]}/{SPEC.key}.json"


def test_a_record_in_object_storage_is_the_file_that_a_disk_would_hold(remote, tmp_path):
    """A store can be copied from one to the other."""
    local = RunStore(tmp_path / "local")
    for store in (local, remote):
        store.put(make_record())

    blobs, name = object_of(remote)
    assert blobs.read(name) == (tmp_path / "local" / name).read_bytes()


def test_a_damaged_record_in_object_storage_is_named_with_its_url(remote):
    remote.put(make_record())
    blobs, name = object_of(remote)
    blobs.write(name, blobs.read(name).replace(b'"code": 1.5', b'"code": 1.4'))

    with pytest.raises(ProxyError, match=r"damaged .*checksum.*moves s3://bucket/team/runs/.*json"):
        remote.get(SPEC.key)


def test_the_first_record_in_object_storage_is_kept(remote):
    """Two machines may train one run, and what was read once must not change."""
    remote.put(make_record())
    remote.put(replace(make_record(), cpu_seconds=9.0))

    assert remote.get(SPEC.key) == make_record()


def test_missing_specs_are_those_without_an_object(remote):
    first, second, third = (replace(SPEC, data_seed=seed) for seed in (9, 3, 5))
    remote.put(make_record(second))

    assert remote.missing([first, second, third, first]) == [first, third]


def test_states_and_evaluations_in_object_storage_come_back(remote):
    evaluation = EvalWindows({"a": np.arange(6).reshape(2, 3)}, {"a": 12}, {"a": 1.25})
    for word in ("x", "y"):  # kept under a hash: not written again
        remote.put_state("h", {"a": np.array([word, "z"], "S"), "b": np.array([], "S")})
        remote.put_eval("e", evaluation)
    back = remote.evaluation("e")

    assert [part.tolist() for part in remote.state("h")] == [[b"x", b"z"], []]
    assert (back.n_bytes, back.unigram_nats) == (evaluation.n_bytes, evaluation.unigram_nats)
    np.testing.assert_array_equal(back.windows["a"], evaluation.windows["a"])


ENCODED = [np.array([1, 2, 3], np.uint32), np.array([], np.uint32), np.array([70_000], np.uint32)]


def assert_tokens_are_whole(store: RunStore) -> None:
    tokens = store.token_store("t")
    assert tokens.document_ids() == ["a", "b", "c"]
    assert tokens.offsets().tolist() == [0, 3, 3, 4]
    assert tokens.tokens().tolist() == [1, 2, 3, 70_000]
    assert isinstance(tokens.tokens(), np.memmap)


def test_tokens_on_a_disk_come_back(tmp_path):
    store = RunStore(tmp_path)
    store.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)

    assert_tokens_are_whole(store)
    assert store.token_store("t").folder == tmp_path / "tokens" / "t"


def test_tokens_come_back_from_object_storage_to_a_machine_without_a_cache(remote, tmp_path):
    remote.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)
    for cache in (tmp_path, tmp_path, tmp_path / "another machine"):
        assert_tokens_are_whole(RunStore(remote.root, cache))


def test_tokens_are_fetched_once(remote, tmp_path):
    remote.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)
    assert_tokens_are_whole(remote)
    ObjectBlobs(remote.root).write("tokens/t/tokens.bin", b"")

    assert_tokens_are_whole(remote)


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.npy", "ids.txt", "manifest.json"])
def test_damaged_tokens_are_refused_and_not_kept(remote, tmp_path, file):
    remote.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)
    blobs, name = ObjectBlobs(remote.root), f"tokens/t/{file}"
    raw = blobs.read(name)
    blobs.write(name, raw[:-1])

    with pytest.raises(ProxyError, match=r"s3://.*damaged. Delete s3://bucket/team/tokens/t "):
        remote.token_store("t")

    blobs.write(name, raw)
    assert_tokens_are_whole(remote)


def test_an_unfinished_token_store_is_written_again(remote):
    """The manifest comes last: a writer that died before it left nothing that counts."""
    blobs = ObjectBlobs(remote.root)
    blobs.write("tokens/t/tokens.bin", b"half")
    with pytest.raises(FileNotFoundError):
        remote.token_store("t")
    remote.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)

    assert_tokens_are_whole(remote)


def test_what_a_killed_fetch_left_in_the_cache_does_not_stop_the_next(remote, tmp_path):
    remote.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)
    left = remote.token_store("t").folder
    left.rename(left.with_name(".t.fetching"))
    (left.with_name(".t.fetching") / "ids.txt").write_text("half")
    (left.with_name(".t.fetching") / ".tokens.bin.1.writing").write_text("half")

    assert_tokens_are_whole(remote)
    assert [path.name for path in left.parent.iterdir()] == ["t"]
    assert {path.name for path in left.iterdir()} == {*TOKEN_FILES, "manifest.json"}


def test_workers_that_want_the_same_tokens_share_one_fetch(remote, tmp_path):
    """Each of three processes takes a whole store, whichever fetched it."""
    remote.put_tokens("t", [(["a", "b", "c"], ENCODED)], 80_000)
    code = (
        "import sys; from pathlib import Path\n"
        "from causalmix_pipeline.adapters.run_store import RunStore\n"
        "tokens = RunStore(sys.argv[1], Path(sys.argv[2])).token_store('t')\n"
        "print(tokens.tokens().tolist(), tokens.document_ids())"
    )
    workers = [run_python(code, remote.root, tmp_path) for _ in range(3)]

    assert {worker.communicate() for worker in workers} == {
        ("[1, 2, 3, 70000] ['a', 'b', 'c']\n", "")
    }


def test_a_lock_of_a_store_in_object_storage_guards_this_machine(tmp_path, monkeypatch):
    """It needs no server: the lock is in the cache below the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with hold("s3://bucket/runs", "a", 600) as holder:
        started = time.monotonic()
        with RunStore("s3://bucket/runs").locked(["b"]), RunStore("s3://other").locked(["a"]):
            assert time.monotonic() - started < 1
        holder.send_signal(signal.SIGALRM)
        with RunStore("s3://bucket/runs").locked(["a"]):
            assert holder.wait() != 0

    assert next(tmp_path.rglob("a.lock")).is_relative_to(tmp_path / ".cache" / "causalmix")


def test_a_store_travels_to_a_worker_and_is_made_again_from_its_root(tmp_path):
    for store in (RunStore(tmp_path), RunStore("s3://bucket/runs/", cache=tmp_path)):
        assert pickle.loads(pickle.dumps(store)) == store
        assert RunStore(store.root).root == store.root
    assert RunStore(str(tmp_path)).root == tmp_path
    assert RunStore("s3://bucket/runs/").root == "s3://bucket/runs"


def test_a_run_trained_from_object_storage_is_that_trained_from_a_disk(remote, tmp_path):
    """By worker processes, which take the tokens from the cache; equal but for the seconds."""
    from causalmix_pipeline.adapters.local_backend import LocalBackend

    config = ProxyConfig(hidden=32, vocab_size=300, sequence_length=32, batch_size=4, steps=3)
    spec = replace(SPEC, state_hash="5" * 64, tokens_hash="t", eval_hash="e", config=config)
    rng = np.random.default_rng(0)
    encoded = [rng.integers(1, 300, 50).astype(np.uint32) for _ in range(4)]
    windows = {"math": rng.integers(1, 300, (4, 33))}
    records = []
    for store in (RunStore(tmp_path / "disk"), remote):
        store.put_tokens("t", [(["a", "b", "c", "d"], encoded)], 10)
        store.put_state("5" * 64, {"x": np.array(["a", "b"], "S"), "y": np.array(["c", "d"], "S")})
        store.put_eval("e", EvalWindows(windows, {"math": 300}, {"math": 5.0}))
        LocalBackend(store, n_workers=1, models_per_stack=1).train([spec], records.extend)
        assert store.get(spec.key) == records[-1]

    assert replace(records[0], cpu_seconds=0, seconds=0) == replace(
        records[1], cpu_seconds=0, seconds=0
    )
