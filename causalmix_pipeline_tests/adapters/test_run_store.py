"""The run store: a record is whole or absent, damage is named, a lock dies with its holder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.run_store import (
    EvalWindows,
    RunStore,
    bits_per_byte,
    write_atomically,
)
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec

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

    with pytest.raises(ProxyError, match=rf"{SPEC.key} is damaged .*Delete {tmp_path}/runs/.*json"):
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
from pathlib import Path
from causalmix_pipeline.adapters.run_store import RunStore
with RunStore(Path(sys.argv[1])).locked(sys.argv[2].split(",")):
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
