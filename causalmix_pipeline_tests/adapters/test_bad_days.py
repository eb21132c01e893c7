"""Each bad day of a study, made to happen for real: kills, damage, a full disk, runs that fail.

`CAUSALMIX_KILL_STUDY_RUNS` and `CAUSALMIX_KILL_STUDY_STEPS` make the study of the kills larger.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from causalmix_pipeline.adapters import local_backend
from causalmix_pipeline.adapters.local_backend import LocalBackend, train_stack_of_specs
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.errors import DiskFullError, ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.work import InProcess
from causalmix_pipeline_tests.adapters.small_pool import (
    CONFIG,
    SmallExperiment,
    build_experiment,
)
from causalmix_pipeline_tests.adapters.test_local_backend import (
    bits,
    untrained_copy,
)
from causalmix_pipeline_tests.adapters.test_local_workers import (
    children_of,
    is_alive,
    needs_proc,
    wait_for,
)

KILLS = 50
KILL_STUDY_RUNS = int(os.environ.get("CAUSALMIX_KILL_STUDY_RUNS", "24"))
KILL_STUDY_STEPS = int(os.environ.get("CAUSALMIX_KILL_STUDY_STEPS", "40"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SmallExperiment:
    """Four runs of one state, trained as one stack in this process."""
    experiment = build_experiment(tmp_path_factory.mktemp("trained"))
    train_stack_of_specs(experiment.store, experiment.specs, 4, "cpu")
    return experiment


# Kills

STUDY = """
import sys
from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline_tests.adapters.test_bad_days import read_specs
store = RunStore(sys.argv[1])
workers = LocalWorkers(2, max_retries=100)
LocalBackend(store, models_per_stack=2, workers=workers).train(
    read_specs(store), lambda records: print(*(r.key for r in records), flush=True)
)
"""


def keep_specs(store: RunStore, specs: list[ProxySpec]) -> None:
    values = [{k: v for k, v in spec.to_dict().items() if k != "code_version"} for spec in specs]
    (Path(store.root) / "specs.json").write_text(json.dumps(values))


def read_specs(store: RunStore) -> list[ProxySpec]:
    values = json.loads((Path(store.root) / "specs.json").read_text())
    return [
        ProxySpec(**{**v, "mixture": tuple(v["mixture"]), "config": type(CONFIG)(**v["config"])})
        for v in values
    ]


def start_study(store: RunStore) -> subprocess.Popen:
    """A driver in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", STUDY, str(store.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@needs_proc
def test_fifty_kills_lose_no_finished_run_and_count_each_once(tmp_path):
    """Workers one by one and whole process groups, at random moments; then one undisturbed call.

    What was finished at a kill has the same file, byte by byte, at the end.
    """
    rng = random.Random(0)
    config = replace(CONFIG, steps=KILL_STUDY_STEPS)
    experiment = build_experiment(tmp_path, n_runs=KILL_STUDY_RUNS, config=config)
    store, specs = experiment.store, experiment.specs
    keep_specs(store, specs)
    seen: dict[str, bytes] = {}
    n_killed, driver = 0, start_study(store)
    while n_killed < KILLS and store.missing(specs):
        time.sleep(rng.uniform(0.05, 0.6))
        workers = children_of(driver.pid)
        if driver.poll() is None and workers and rng.random() < 0.8:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
            n_killed += 1
        elif driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.communicate()
            wait_for(lambda pids=workers: not any(map(is_alive, pids)), 30)
            n_killed += 1
        if driver.poll() is not None:
            driver = start_study(store)
        for path in (tmp_path / "runs").rglob("*.json"):
            content = path.read_bytes()
            assert seen.setdefault(path.stem, content) == content
    out, error = driver.communicate(timeout=250)

    assert driver.returncode == 0, error
    assert n_killed >= KILLS or KILL_STUDY_RUNS * KILL_STUDY_STEPS < 960
    assert store.missing(specs) == []
    assert store.n_records() == len(specs)
    for key, content in seen.items():
        assert Path(store.path_of(key)).read_bytes() == content
    assert len(out.split()) == len(set(out.split()))
    assert not list((tmp_path / "failed").glob("*"))


# Runs that fail


def train_or_die(seed: int, store, specs, **options):
    """Trains, but dies where a run has this seed: out of memory, say."""
    if any(spec.data_seed == seed for spec in specs):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_stack_of_specs(store, specs, **options)


def test_a_run_that_kills_its_worker_is_given_up_alone_and_the_others_are_trained(
    trained, tmp_path, monkeypatch
):
    """Its stack is tried, then each of its runs by itself; a later call tries the one again."""
    store = untrained_copy(trained, tmp_path / "other")
    bad, *good = trained.specs
    failed: list[tuple[str, str]] = []
    backend = LocalBackend(store, models_per_stack=4, workers=LocalWorkers(1, max_retries=0))
    function = partial(train_or_die, bad.data_seed)
    monkeypatch.setattr(local_backend, "train_stack_of_specs", function)

    with pytest.raises(ProxyError, match=rf"1 of 4 proxy runs failed.* {bad.key}, tried 2 times"):
        backend.train(
            trained.specs,
            lambda records: None,
            on_failed=lambda spec, reason: failed.append((spec.key, reason)),
        )

    assert store.missing(trained.specs) == [bad]
    for spec in good:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))
    ((key, reason),) = failed
    assert key == bad.key
    assert "SIGKILL" in reason
    kept = store.failed([bad.key])[bad.key]
    assert (kept.spec, kept.reason, kept.tries) == (bad.to_dict(), reason, 2)
    assert {"python", "torch", "numpy"} <= set(kept.versions)

    with pytest.raises(ProxyError, match="1 of 1 proxy runs failed"):
        backend.train(trained.specs, lambda records: None)
    assert store.failed([bad.key])[bad.key].tries == 3
    monkeypatch.undo()
    LocalBackend(store, workers=InProcess()).train(trained.specs, lambda records: None)
    assert store.missing(trained.specs) == []
    assert store.failed([bad.key]) == {}


def test_an_error_of_one_run_stops_neither_its_stack_nor_the_others(trained, tmp_path):
    """The pool state of one run isn't in the store."""
    store = untrained_copy(trained, tmp_path / "other")
    lost = replace(trained.specs[0], state_hash="0" * 64)
    started: list[str] = []
    done: list[ProxyRecord] = []

    with pytest.raises(ProxyError, match=r"1 of 5 proxy runs failed.*FileNotFoundError"):
        LocalBackend(store, models_per_stack=3, workers=InProcess()).train(
            [lost, *trained.specs],
            done.extend,
            on_started=lambda specs: started.extend(spec.key for spec in specs),
        )

    assert sorted(r.key for r in done) == sorted(spec.key for spec in trained.specs)
    assert set(started) == {lost.key, *(spec.key for spec in trained.specs)}
    assert store.failed([lost.key])[lost.key].tries == 2


def test_a_run_that_diverges_is_marked_alone_and_the_others_keep_their_bits(trained, tmp_path):
    """A learning rate of 1e8 leaves the range where a loss means anything."""
    store = untrained_copy(trained, tmp_path / "other")
    wild = replace(trained.specs[0], config=replace(CONFIG, learning_rate=1e8))

    LocalBackend(store, workers=InProcess()).train([wild, *trained.specs], lambda records: None)

    record = store.get(wild.key)
    assert record is not None
    assert record.diverged
    for spec in trained.specs:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))


def test_a_loss_that_is_not_a_number_in_a_stack_marks_only_its_model(
    trained, tmp_path, monkeypatch
):
    """One model's weights become NaN half-way; its neighbours of the stack don't notice."""
    from causalmix_pipeline.adapters import stacked_qwen2

    store = untrained_copy(trained, tmp_path / "other")
    whole = stacked_qwen2.StackedQwen2.loss_and_gradients
    calls = []

    def poisoned(self, tokens):
        calls.append(1)
        if len(calls) == 10:
            for weights in self.flat_weights.values():
                weights[1] = float("nan")
        return whole(self, tokens)

    monkeypatch.setattr(stacked_qwen2.StackedQwen2, "loss_and_gradients", poisoned)
    train_stack_of_specs(store, trained.specs, 4, "cpu")

    first, second, *others = [store.get(spec.key) for spec in trained.specs]
    assert second is not None
    assert second.diverged
    assert np.isnan(second.train_loss[-1])
    for record, spec in zip([first, *others], [trained.specs[0], *trained.specs[2:]], strict=True):
        assert bits(record) == bits(trained.store.get(spec.key))


# Damage


def test_a_damaged_record_is_put_aside_and_its_run_trained_again(trained, tmp_path):
    store = RunStore(tmp_path / "other")
    shutil.copytree(trained.store.root, store.root)
    spec = trained.specs[1]
    path = Path(store.path_of(spec.key))
    damaged = path.read_bytes().replace(b"nats", b"gnat", 1)
    path.write_bytes(damaged)
    done: list[ProxyRecord] = []

    assert store.missing(trained.specs) == [spec]
    LocalBackend(store, workers=InProcess()).train(trained.specs, done.extend)

    assert [record.key for record in done] == [spec.key]
    assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))
    (aside,) = (store.root / "quarantine").iterdir()  # pyright: ignore[reportAttributeAccessIssue]
    assert aside.name.startswith(spec.key)
    assert aside.read_bytes() == damaged


@pytest.mark.parametrize("folder", ["states", "eval"])
def test_a_flipped_byte_of_a_state_or_an_evaluation_is_never_read_as_data(
    trained, tmp_path, folder
):
    store = untrained_copy(trained, tmp_path / "other")
    path = next((tmp_path / "other" / folder).glob("*.npz"))
    read = store.state if folder == "states" else store.evaluation
    raw, before = path.read_bytes(), pickle.dumps(read(path.stem))
    rng, n_told = random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert pickle.dumps(read(path.stem)) == before
        except ProxyError as error:
            n_told += 1
            assert f"{path.name} is damaged" in str(error)

    assert n_told > 550  # the rest: the mark before the checksum


def test_a_flipped_byte_of_the_tokens_fails_the_run_by_the_files_name(trained, tmp_path):
    store = untrained_copy(trained, tmp_path / "other")
    spec = trained.specs[0]
    path = tmp_path / "other" / "tokens" / spec.tokens_hash / "tokens.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

    with pytest.raises(ProxyError, match=r"1 of 1 proxy runs failed.*tokens\.bin is damaged"):
        LocalBackend(store, workers=InProcess()).train([spec], lambda records: None)
    assert store.missing([spec]) == [spec]


# A full disk


def test_a_full_disk_stops_cleanly_and_the_study_goes_on_when_there_is_room(trained, tmp_path):
    """On a real file system of its own, filled to its last block."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        store = untrained_copy(trained, disk / "store")
        record = trained.store.get(trained.specs[0].key)
        assert record is not None
        store.put(record)
        (disk / "store" / "runs" / "spare").mkdir()
        filler = disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

        with pytest.raises(DiskFullError, match=rf"the disk of {disk}/store.* is full"):
            LocalBackend(store, 1).train(trained.specs, lambda records: None)

        assert store.missing(trained.specs) == trained.specs[1:]
        assert bits(store.get(record.key)) == bits(record)
        assert not list((disk / "store").rglob("*.writing"))
        assert not (disk / "store" / "failed").exists()
        filler.unlink()
        LocalBackend(store, workers=InProcess()).train(trained.specs, lambda records: None)
        for spec in trained.specs:
            assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
