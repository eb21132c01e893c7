"""A real Ray cluster on this machine does what local workers do, with the same results and bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from causalmix_pipeline.adapters import local_backend
from causalmix_pipeline.adapters.local_backend import LocalBackend, train_stack_of_specs
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.errors import ConfigError, ProxyError, WorkError
from causalmix_pipeline.core.work import InProcess, WorkBackend
from causalmix_pipeline_tests.adapters.small_pool import CONFIG, build_experiment
from causalmix_pipeline_tests.adapters.test_bad_days import keep_specs
from causalmix_pipeline_tests.adapters.test_local_backend import bits
from causalmix_pipeline_tests.adapters.test_local_workers import (
    CountedTasks,
    give_what_cant_be_sent,
    is_alive,
    killed_on_three,
    needs_proc,
    pid_of_worker,
    raise_what_cant_be_sent,
    refuse_three,
    results_of,
    square,
    start_script,
    threads,
    wait_for,
)

ray = pytest.importorskip("ray", reason="Ray isn't installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs that this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


# Refused before there is a cluster: these tests come first


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no address"])
def test_an_address_that_nobody_answers_is_refused_by_name_and_soon(address):
    started = time.monotonic()

    with pytest.raises(
        WorkError, match=rf"backend\.address must be that of a running .* got '{address}'"
    ):
        results_of(RayWorkers(address), square, [1])
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["n_cpus_per_task", "n_gpus_per_task", "max_retries"])
def test_negative_numbers_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"backend\.{name} must be >= 0, got -1"):
        RayWorkers(**{name: -1})


def test_tasks_that_need_nothing_are_refused():
    with pytest.raises(ConfigError, match="must be > 0, got 0 for both"):
        RayWorkers(n_cpus_per_task=0)


def test_no_tasks_need_no_cluster():
    results_of(RayWorkers("nowhere"), square, [])


# Results


def test_ray_workers_are_a_work_backend():
    assert isinstance(RayWorkers(), WorkBackend)


def test_each_task_is_done_once_by_other_processes(cluster):
    assert results_of(RayWorkers(), square, range(50)) == [(i, i * i) for i in range(50)]
    assert os.getpid() not in {pid for _, pid in results_of(RayWorkers(), pid_of_worker, [1, 2])}


def test_a_cluster_that_the_caller_started_stays(cluster):
    results_of(RayWorkers(), square, [1])

    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == cluster


def test_libraries_see_one_thread(cluster):
    ((_, found),) = results_of(RayWorkers(), threads, [None])

    assert {"openblas", "openmp", "torch", "polars", "numba"} <= set(found)
    assert set(found.values()) == {1}


def test_tasks_in_flight_are_bounded_by_the_cluster(cluster):
    tasks = CountedTasks(5000)
    RayWorkers().run(square, tasks, tasks.on_done)

    assert tasks.n_given == tasks.n_done == 5000
    assert max(tasks.ahead) <= 4  # twice the CPUs


# Errors of the function


def test_an_error_of_the_function_keeps_its_type_and_cancels_the_others(cluster):
    """Else the sleepers would hold both CPUs for ten minutes."""
    with pytest.raises(ProxyError, match="run 3 is refused") as caught:
        results_of(RayWorkers(), refuse_three, [1, 3, 2, 4])

    assert type(caught.value) is ProxyError
    assert "in refuse_three" in caught.value.__notes__[0]
    started = time.monotonic()
    assert len(results_of(RayWorkers(), square, range(4))) == 4
    assert time.monotonic() - started < 60


def test_what_cant_be_sent_is_told(cluster):
    with pytest.raises(WorkError, match="a task raised NeedsTwo: 4 and 5"):
        results_of(RayWorkers(), raise_what_cant_be_sent, [4])
    with pytest.raises(TypeError, match=r"[Cc]ould not serialize|cannot pickle"):
        results_of(RayWorkers(), give_what_cant_be_sent, [1])


# Deaths


def test_a_task_whose_worker_is_killed_is_tried_again(cluster, tmp_path):
    function = partial(killed_on_three, tmp_path, 1)

    assert results_of(RayWorkers(), function, range(8)) == [(i, i) for i in range(8)]
    tries = [len((tmp_path / str(i)).read_text().split()) for i in range(8)]
    assert tries == [2 if i == 3 else 1 for i in range(8)]


def test_a_task_that_always_kills_its_worker_is_named(cluster, tmp_path):
    with pytest.raises(WorkError, match=r"task 3 .* WorkerCrashedError after 1 retries"):
        results_of(RayWorkers(max_retries=1), partial(killed_on_three, tmp_path, 99), range(8))

    assert (tmp_path / "3").read_text().split() == ["try"] * 2


# Clusters

SCRIPT = """
import json, os
import ray
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline_tests.adapters.test_local_workers import children_of, square
children, results = set(), []
def on_done(index, result):
    results.append([index, result])
    children.update(children_of(os.getpid()))
RayWorkers({address!r}).run(square, range(5), on_done)
assert not ray.is_initialized()
print(json.dumps([sorted(results), sorted(children)]))
"""
SQUARES = [[i, i * i] for i in range(5)]


def run_script(folder: Path, address: str | None) -> tuple[list[list[int]], list[int]]:
    """Results of a process of its own, and the processes that it had started by then."""
    process = start_script(folder, SCRIPT.format(address=address))
    out, error = process.communicate(timeout=110)
    assert process.returncode == 0, error
    results, children = json.loads(out)
    return results, children


@needs_proc
def test_a_cluster_of_its_own_ends_with_the_work(tmp_path):
    results, children = run_script(tmp_path, None)

    assert results == SQUARES
    assert children
    wait_for(lambda: not any(map(is_alive, children)), 10)


@needs_proc
def test_an_existing_cluster_is_used_by_its_address_and_left_running(cluster, tmp_path):
    assert run_script(tmp_path, cluster) == (SQUARES, [])
    assert results_of(RayWorkers(), square, [3]) == [(0, 9)]


def test_more_than_the_cluster_has_is_refused_by_name(cluster):
    with pytest.raises(WorkError, match=r"n_gpus_per_task \(64\) must be .* got 2 CPU, 0 GPU"):
        results_of(RayWorkers(n_gpus_per_task=64), square, [1])


# Proxy runs


def test_proxy_runs_on_ray_leave_the_records_of_local_workers_bit_by_bit(cluster, tmp_path):
    experiment = build_experiment(tmp_path / "local")
    shutil.copytree(tmp_path / "local", tmp_path / "ray")
    on_ray = RunStore(tmp_path / "ray")
    done: list = []

    LocalBackend(experiment.store, 2, 2).train(experiment.specs, done.extend)
    LocalBackend(on_ray, 0, 2, workers=RayWorkers()).train(experiment.specs, done.extend)

    assert len(done) == 8
    for spec in experiment.specs:
        records = [store.get(spec.key) for store in (experiment.store, on_ray)]
        assert None not in records
        first, second = (replace(r, cpu_seconds=0.0, seconds=0.0) for r in records if r is not None)
        assert first == second


def test_tasks_that_fail_or_kill_their_worker_are_told_and_the_others_go_on(cluster, tmp_path):
    failed: list[tuple[int, str, int]] = []
    done: list[int] = []
    started: list[int] = []

    RayWorkers(max_retries=1).run(
        partial(killed_on_three, tmp_path, 99),
        range(8),
        lambda index, _: done.append(index),
        on_failed=lambda index, error, tries: failed.append((index, type(error).__name__, tries)),
        on_started=started.append,
    )

    assert failed == [(3, "WorkError", 2)]
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7]
    assert sorted(started) == list(range(8))


def train_and_say(folder: Path, store: RunStore, specs, **options):
    """Trains, and leaves its process id where a test finds it."""
    (folder / f"{os.getpid()}.pid").touch()
    return train_stack_of_specs(store, specs, **options)


def test_a_worker_killed_in_the_middle_of_a_run_costs_no_run_and_no_bit(
    cluster, tmp_path, monkeypatch
):
    slow = replace(CONFIG, steps=400)
    experiment = build_experiment(tmp_path / "ray", config=slow)
    shutil.copytree(tmp_path / "ray", tmp_path / "local")
    (tmp_path / "pids").mkdir()
    monkeypatch.setattr(
        local_backend, "train_stack_of_specs", partial(train_and_say, tmp_path / "pids")
    )
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: bool(list((tmp_path / "pids").iterdir())), 60)
        time.sleep(0.5)  # into the training itself
        victim = int(next((tmp_path / "pids").iterdir()).stem)
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    killer = threading.Thread(target=kill_one)
    killer.start()
    done: list = []
    LocalBackend(experiment.store, 0, 2, workers=RayWorkers()).train(experiment.specs, done.extend)
    killer.join()
    monkeypatch.undo()
    local = RunStore(tmp_path / "local")
    LocalBackend(local, 0, 2, workers=InProcess()).train(experiment.specs, lambda records: None)

    assert len(killed) == 1
    assert sorted(record.key for record in done) == sorted(spec.key for spec in experiment.specs)
    for spec in experiment.specs:
        assert bits(experiment.store.get(spec.key)) == bits(local.get(spec.key))


DRIVER = """
import sys
from causalmix_pipeline.adapters import local_backend
from causalmix_pipeline.adapters.local_backend import LocalBackend, train_stack_of_specs
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline_tests.adapters.test_bad_days import read_specs
store = RunStore(sys.argv[1])
LocalBackend(store, 0, 1, workers=RayWorkers({address!r})).train(
    read_specs(store), lambda records: print(len(records), flush=True)
)
"""


@needs_proc
def test_a_driver_killed_under_ray_is_followed_by_local_workers_that_finish(cluster, tmp_path):
    """The cluster ends what the driver had started, so no lock stays held."""
    experiment = build_experiment(tmp_path, config=replace(CONFIG, steps=150))
    keep_specs(experiment.store, experiment.specs)
    driver = start_script(tmp_path, DRIVER.format(address=cluster))
    assert driver.stdout is not None
    assert driver.stdout.readline() == "1\n", driver.communicate()[1]
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    keys = [spec.key for spec in experiment.specs]
    with experiment.store.locked(keys):  # waits until the cluster's workers are gone
        left = experiment.store.missing(experiment.specs)
    done: list = []

    LocalBackend(experiment.store, 1, 4).train(experiment.specs, done.extend)

    assert len(left) < 4
    assert sorted(record.key for record in done) == sorted(spec.key for spec in left)
    assert experiment.store.missing(experiment.specs) == []


def test_a_study_begun_on_local_workers_ends_on_ray(cluster, tmp_path):
    experiment = build_experiment(tmp_path)
    first, done = experiment.specs[:2], []
    LocalBackend(experiment.store, 0, 2, workers=InProcess()).train(first, lambda records: None)

    LocalBackend(experiment.store, 0, 2, workers=RayWorkers()).train(experiment.specs, done.extend)

    assert [record.key for record in done] == [spec.key for spec in experiment.specs[2:]]
    assert experiment.store.missing(experiment.specs) == []
