"""A real Ray cluster on this machine does what local workers do, with the same results and bits."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.errors import ConfigError, ProxyError, WorkError
from causalmix_pipeline.core.work import WorkBackend
from causalmix_pipeline_tests.adapters.small_pool import build_experiment
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


def test_tasks_in_flight_are_bounded_by_the_cluster_and_tiny_ones_are_cheap(cluster):
    tasks = CountedTasks(5000)
    started = time.monotonic()
    RayWorkers().run(square, tasks, tasks.on_done)

    assert tasks.n_given == tasks.n_done == 5000
    assert max(tasks.ahead) <= 4  # twice the CPUs
    assert time.monotonic() - started < 60


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
        first, second = (replace(r, cpu_seconds=0.0) for r in records if r is not None)
        assert first == second
