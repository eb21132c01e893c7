"""The local backend trains for real: same bits whatever the stack, nothing twice, no orphans."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from causalmix_pipeline.adapters.local_backend import (
    LocalBackend,
    engine_name,
    train_stack_of_specs,
)
from causalmix_pipeline.adapters.run_feed import RunFeed
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.tokenizer import cut_windows
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.token_sampler import window_counts
from causalmix_pipeline_tests.adapters.small_pool import (
    CONFIG,
    DOMAINS,
    SmallExperiment,
    build_experiment,
)
from causalmix_pipeline_tests.adapters.test_local_workers import (
    children_of,
    is_alive,
    needs_proc,
    wait_for,
)

#: Runs that no test waits for.
ENDLESS = replace(CONFIG, steps=200_000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SmallExperiment:
    """Four runs of one state, trained as one stack in this process."""
    experiment = build_experiment(tmp_path_factory.mktemp("trained"))
    train_stack_of_specs(experiment.store, experiment.specs, 4, "cpu")
    return experiment


def untrained_copy(experiment: SmallExperiment, root: Path) -> RunStore:
    """A store with the same inputs and no records."""
    shutil.copytree(experiment.store.root, root)
    shutil.rmtree(root / "runs")
    return RunStore(root)


def bits(record: ProxyRecord | None) -> dict:
    """A record but for the time that it took."""
    assert record is not None
    return replace(record, cpu_seconds=0.0, seconds=0.0).__dict__


# Results


def test_a_short_run_learns_and_leaves_a_sound_record(trained):
    """Below the loss of a uniform guess after 20 steps, in both units."""
    spec = trained.specs[0]
    record = trained.store.get(spec.key)

    assert record is not None
    assert record.spec == spec.to_dict()
    assert not record.diverged
    assert set(record.nats_per_token) == {"code", "math"}
    assert max(record.nats_per_token.values()) < np.log(300)
    assert record.train_loss[-1] < record.train_loss[0]
    windows = trained.store.evaluation(spec.eval_hash)
    for task, nats in record.nats_per_token.items():
        n_predicted = windows.windows[task][:, 1:].size
        by_hand = nats * n_predicted / np.log(2) / windows.n_bytes[task]
        assert record.bits_per_byte[task] == pytest.approx(by_hand)


def test_more_of_a_domain_means_less_loss_on_it(trained):
    """The outcome follows the mixture: else nothing that comes after means anything."""
    shares = np.array([spec.mixture for spec in trained.specs])
    records = [trained.store.get(spec.key) for spec in trained.specs]
    for task in ("code", "math"):
        loss = [record.nats_per_token[task] for record in records if record is not None]
        share = shares[:, DOMAINS.index(task)]

        assert np.argmin(loss) == np.argmax(share)


def test_a_run_has_the_same_bits_whatever_it_is_stacked_with(trained, tmp_path):
    store = untrained_copy(trained, tmp_path / "other")
    first, second, third, fourth = trained.specs

    for stack in ([third], [fourth, first, second]):
        train_stack_of_specs(store, stack, 4, "cpu")

    for spec in trained.specs:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))


def test_another_process_resumes_what_is_missing_with_the_same_bits(trained, tmp_path):
    """Two runs are there; a worker trains the two others, and a third call trains none."""
    store = untrained_copy(trained, tmp_path / "other")
    for spec in trained.specs[:2]:
        record = trained.store.get(spec.key)
        assert record is not None
        store.put(record)
    before = [store.path_of(spec.key).stat().st_mtime_ns for spec in trained.specs[:2]]
    done: list[ProxyRecord] = []
    backend = LocalBackend(store, n_workers=1, models_per_stack=4)

    backend.train([*trained.specs, trained.specs[0]], done.extend)

    assert [record.key for record in done] == [spec.key for spec in trained.specs[2:]]
    assert [store.path_of(s.key).stat().st_mtime_ns for s in trained.specs[:2]] == before
    for spec in trained.specs:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))
    done.clear()
    backend.train(trained.specs, done.extend)
    assert done == []


def test_growing_the_design_leaves_exactly_the_new_runs_to_train(trained, tmp_path):
    root = tmp_path / "other"
    shutil.copytree(trained.store.root, root)
    larger = build_experiment(root, n_runs=20)

    assert larger.specs[:4] == trained.specs
    assert larger.store.missing(larger.specs) == larger.specs[4:]


# What a run reads


def test_the_batches_of_a_run_have_exactly_the_shares_of_its_mixture(trained):
    for spec in trained.specs:
        feed = RunFeed(trained.store, spec)
        read = np.concatenate([feed.batch(step) for step in range(CONFIG.steps)])
        tokens_of = trained.store.token_store(spec.tokens_hash)
        domain_of = {}
        for d, ids in enumerate(trained.store.state(spec.state_hash)):
            positions = tokens_of.positions(ids)
            for window in cut_windows(tokens_of.tokens(), tokens_of.offsets(), positions, 32):
                domain_of[window.tobytes()] = d

        counts = np.bincount([domain_of[w.astype(np.int32).tobytes()] for w in read], minlength=3)

        np.testing.assert_array_equal(counts, window_counts(np.array(spec.mixture), 80))
        assert read.shape == (80, 33)


def test_runs_of_one_state_read_a_domain_in_the_same_order(trained):
    """What differs between runs of a state is the mixture, not the data."""
    n_code = len(trained.store.state(trained.specs[0].state_hash)[0])
    orders = []
    for spec in trained.specs:
        feed = RunFeed(trained.store, spec)
        # Slots below the smallest domain's: windows of the first domain.
        orders.append([slot for slot in feed.order.tolist() if slot < n_code])

    longest = max(orders, key=len)
    assert len(longest) > 5
    assert all(order == longest[: len(order)] for order in orders)


# Stacks


def test_a_stack_holds_runs_of_one_model_and_one_store(tmp_path):
    spec = ProxySpec("s" * 64, "t", "e", (0.5, 0.5), 0, CONFIG, engine_name())
    larger, elsewhere = replace(spec, config=ENDLESS), replace(spec, tokens_hash="other")
    specs = [
        replace(kind, data_seed=seed) for seed in range(5) for kind in (spec, larger, elsewhere)
    ]
    stacks = LocalBackend(RunStore(tmp_path), models_per_stack=2)._stacks(specs)

    assert sorted(len(stack) for stack in stacks) == [1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert all(len({(s.config, s.tokens_hash) for s in stack}) == 1 for stack in stacks)
    assert sorted(s.key for stack in stacks for s in stack) == sorted(s.key for s in specs)


def test_the_engine_names_the_version_that_decides_the_bits():
    import torch

    on_cpu = f"stacked-torch-{torch.__version__.split('+')[0]}"
    assert engine_name() == engine_name("cpu") == on_cpu
    assert engine_name("cuda") == engine_name("cuda:1") == f"{on_cpu}-cuda"


# Failures


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(trained):
    small = [replace(spec, config=replace(CONFIG, vocab_size=64)) for spec in trained.specs[:1]]

    with pytest.raises(ProxyError, match=r"must hold tokens in \[0, 64\)"):
        train_stack_of_specs(trained.store, small, 1, "cpu")
    assert trained.store.missing(small) == small


def kill_children(but: list[int]) -> None:
    """Kill the workers of this process."""
    for worker in set(children_of(os.getpid())) - set(but):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


@needs_proc
def test_killed_workers_cost_no_run_and_no_bit(trained, tmp_path):
    """Both are killed while two runs are still to be trained."""
    store = untrained_copy(trained, tmp_path / "other")
    before = children_of(os.getpid())
    done: list[ProxyRecord] = []

    def kill_once(records: Sequence[ProxyRecord]) -> None:
        if not done:
            kill_children(before)
        done.extend(records)

    LocalBackend(store, n_workers=2, models_per_stack=1).train(trained.specs, kill_once)

    assert sorted(r.key for r in done) == sorted(spec.key for spec in trained.specs)
    for spec in trained.specs:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))


@needs_proc
def test_workers_killed_again_and_again_are_reported_and_finished_runs_are_kept(trained, tmp_path):
    store = untrained_copy(trained, tmp_path / "other")
    endless = [replace(spec, config=ENDLESS) for spec in trained.specs]
    before = children_of(os.getpid())
    done: list[ProxyRecord] = []
    ended = threading.Event()

    def kill_on() -> None:
        while not ended.wait(0.2):
            kill_children(before)

    killer = threading.Thread(target=kill_on)

    def start_to_kill(records: Sequence[ProxyRecord]) -> None:
        done.extend(records)
        killer.start()

    try:
        with pytest.raises(
            ProxyError, match=r"4 of 8 proxy runs failed; the others are kept.*SIGKILL"
        ):
            LocalBackend(store, 2).train([*trained.specs, *endless], start_to_kill)
    finally:
        ended.set()
        killer.join()

    assert sorted(r.key for r in done) == sorted(spec.key for spec in trained.specs)
    assert store.missing([*trained.specs, *endless]) == endless
    assert children_of(os.getpid()) == before


@dataclass(eq=False)
class HereWorkers:
    """A work backend that does all itself and notes what it was asked for."""

    tasks: list = field(default_factory=list)

    def run(self, function, tasks, on_done, **callbacks) -> None:
        for index, task in enumerate(tasks):
            self.tasks.append(task)
            on_done(index, pickle.loads(pickle.dumps(function))(task))


def test_runs_are_trained_by_the_workers_that_are_given(trained, tmp_path, monkeypatch):
    """A store at a relative path is found by workers that started in another folder."""
    store = untrained_copy(trained, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    workers = HereWorkers()
    backend = LocalBackend(RunStore(Path("other")), models_per_stack=3, workers=workers)

    backend.train(trained.specs, lambda _: monkeypatch.chdir("/"))

    assert [len(stack) for stack in workers.tasks] == [3, 1]
    for spec in trained.specs:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))


def test_a_stack_whose_size_is_measured_holds_no_copies_and_gives_the_same_bits(trained, tmp_path):
    store = untrained_copy(trained, tmp_path / "other")
    workers = HereWorkers()

    LocalBackend(store, models_per_stack=0, workers=workers).train(trained.specs, lambda _: None)

    measured, *stacks = workers.tasks
    assert measured == trained.specs[0].config
    assert [spec for stack in stacks for spec in stack] == trained.specs
    for spec in trained.specs:
        assert bits(store.get(spec.key)) == bits(trained.store.get(spec.key))


TRAIN = """
import json, sys
from dataclasses import asdict, replace
from pathlib import Path
from causalmix_pipeline.adapters.local_backend import LocalBackend, train_stack_of_specs
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec

if __name__ == "__main__":
    root, n_workers, values = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    specs = [
        ProxySpec(**{**v, "mixture": tuple(v["mixture"]), "config": ProxyConfig(**v["config"])})
        for v in values
    ]
    if n_workers:
        LocalBackend(RunStore(root), n_workers, 1).train(specs, print)
    else:
        records = train_stack_of_specs(RunStore(root), specs, 1, "cpu")
        print(json.dumps([asdict(record) for record in records]))
"""


def start_training(root: Path, specs: list[ProxySpec], n_workers: int) -> subprocess.Popen:
    """A process of its own that trains the specs; without workers in itself."""
    script = root / "train.py"
    script.write_text(TRAIN)
    values = [{k: v for k, v in spec.to_dict().items() if k != "code_version"} for spec in specs]
    return subprocess.Popen(
        [sys.executable, str(script), str(root), str(n_workers), json.dumps(values)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_want_one_run_train_it_once(trained, tmp_path):
    """Both return one record: the seconds that it took would differ between two trainings."""
    store = untrained_copy(trained, tmp_path / "other")
    processes = [start_training(store.root, trained.specs[:1], 0) for _ in range(2)]
    printed = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        printed.append(json.loads(out))

    assert printed[0] == printed[1]
    assert printed[0][0]["cpu_seconds"] > 0


@needs_proc
def test_workers_end_within_two_seconds_of_their_parent(trained, tmp_path):
    """A killed study must leave no orphan that trains on and holds the locks."""
    store = untrained_copy(trained, tmp_path / "other")
    shutil.rmtree(store.root / "locks")
    endless = [replace(spec, config=ENDLESS) for spec in trained.specs[:2]]
    parent = start_training(store.root, endless, 2)
    wait_for(lambda: len(list((store.root / "locks").glob("*"))) == 2, 60)
    workers = children_of(parent.pid)
    time.sleep(0.5)  # into the training itself

    parent.send_signal(signal.SIGKILL)
    parent.communicate()

    assert len(workers) >= 2
    assert wait_for(lambda: not any(map(is_alive, workers)), 10) < 2
    with store.locked([spec.key for spec in endless]):
        assert store.missing(endless) == endless
