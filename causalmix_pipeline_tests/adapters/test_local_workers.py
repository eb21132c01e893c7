"""Local workers do each task once, on one thread, whoever is killed, and never outlive the caller.

Functions that workers call live here, too; the Ray tests share them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.core.errors import ConfigError, ProxyError, WorkError
from causalmix_pipeline.core.work import WorkBackend

ROOT = Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="reads process ids from /proc"
)


# What workers are asked to do


def square(task: int) -> int:
    return task * task


def repeat(task: bytes) -> bytes:
    return task


def pid_of_worker(task: object) -> int:
    return os.getpid()


def refuse_three(task: int) -> int:
    """Sleeps for ten minutes on most tasks, so that whoever waits for them is seen."""
    if task == 3:
        raise ProxyError("run 3 is refused")
    time.sleep(600)
    return task


class NeedsTwo(Exception):
    """Can be pickled, but not read again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_what_cant_be_sent(task: int) -> None:
    raise NeedsTwo(task, 5)


def quit_python(task: int) -> None:
    raise SystemExit(7)


def give_what_cant_be_sent(task: int) -> object:
    return threading.Lock()


def killed_on_three(folder: Path, times: int, task: int) -> int:
    """Kills its process the first times that it gets task 3; leaves a line for each try."""
    log = folder / str(task)
    with log.open("a") as file:
        file.write("try\n")
    if task == 3 and len(log.read_text().split()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def leave_a_process_and_die(folder: Path, task: int) -> int:
    """The process left behind holds the worker's connection open."""
    if not (folder / "died").exists():
        (folder / "died").touch()
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def sleep_long(folder: Path, task: int) -> None:
    """Sleeps for ten minutes, but on task 0."""
    if task:
        (folder / f"{os.getpid()}.pid").touch()
        time.sleep(600)


def seen_gpu(folder: Path, task: int) -> tuple[int, str]:
    """This process and the devices that it may use; the first try of task 0 dies."""
    if task == 0 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def count_gpus(task: object) -> int:
    """CUDA devices that a worker sees, each of which it has computed on."""
    import torch

    for number in range(torch.cuda.device_count()):
        assert float(torch.ones(2, device=f"cuda:{number}").sum()) == 2
    return torch.cuda.device_count()


def threads(task: object) -> dict[str, int]:
    """Threads of each library that has a pool of its own, once it is loaded."""
    import numba
    import numpy as np
    import polars as pl
    import torch
    from threadpoolctl import threadpool_info

    np.ones((8, 8)) @ np.ones((8, 8))
    pools = {f"{pool['internal_api']}": pool["num_threads"] for pool in threadpool_info()}
    return pools | {
        "torch": torch.get_num_threads(),
        "polars": pl.thread_pool_size(),
        "numba": numba.config.NUMBA_NUM_THREADS,
    }


# What the tests look with


def results_of(
    backend: WorkBackend, function: Callable, tasks: Sequence
) -> list[tuple[int, object]]:
    """Number and result of each task in the order of numbers; what came twice is there twice."""
    found: list[tuple[int, object]] = []
    backend.run(function, tasks, lambda index, result: found.append((index, result)))
    return sorted(found, key=lambda pair: pair[0])


@dataclass
class CountedTasks(Sequence):
    """Tasks that are made when they are asked for, and how many were ahead of their results."""

    n: int
    n_given: int = 0
    n_done: int = 0
    ahead: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index):
        self.n_given += 1
        self.ahead.append(self.n_given - self.n_done)
        return index

    def on_done(self, index: int, result: object) -> None:
        self.n_done += 1


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until the condition holds; fails after too many."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "waited too long"
        time.sleep(0.02)
    return time.monotonic() - started


def children_of(parent: int) -> list[int]:
    """Process ids whose parent is this one and that aren't ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent_of_it = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent_of_it) == parent and state != "Z":
            found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def start_script(folder: Path, text: str, *, new_session: bool = False) -> subprocess.Popen:
    """A Python process of its own that runs a script from a file, warnings being errors."""
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=new_session,
    )


# Results


def test_local_workers_are_a_work_backend():
    assert isinstance(LocalWorkers(), WorkBackend)


def test_each_task_is_done_once_by_several_processes():
    assert results_of(LocalWorkers(3), square, range(100)) == [(i, i * i) for i in range(100)]
    pids = {pid for _, pid in results_of(LocalWorkers(3), pid_of_worker, range(200))}

    assert len(pids) == 3
    assert os.getpid() not in pids


@needs_proc
def test_no_tasks_start_no_process_and_no_process_is_left_after_some():
    before = children_of(os.getpid())
    seen = []
    LocalWorkers(2).run(square, [], lambda index, result: seen.append(index))
    LocalWorkers(2).run(square, [1], lambda *_: seen.append(len(children_of(os.getpid()))))

    assert seen == [len(before) + 1]
    assert children_of(os.getpid()) == before


def test_tasks_and_results_larger_than_a_pipes_buffer_go_through():
    tasks = [bytes([i]) * 5_000_000 for i in range(6)]

    assert results_of(LocalWorkers(2), repeat, tasks) == list(enumerate(tasks))


def test_tasks_in_flight_are_bounded_by_the_workers():
    """Thousands of tasks and their results are never all in memory."""
    tasks = CountedTasks(300)
    LocalWorkers(2).run(square, tasks, tasks.on_done)

    assert tasks.n_given == tasks.n_done == 300
    assert max(tasks.ahead) <= 4  # two in work, two finished that the caller hasn't taken yet


def test_five_thousand_tiny_tasks_cost_less_than_a_millisecond_each():
    tasks = CountedTasks(5000)
    started = time.monotonic()
    LocalWorkers(2).run(square, tasks, tasks.on_done)

    assert tasks.n_done == 5000
    assert time.monotonic() - started < 5


SCRIPT_WITHOUT_GUARD = """
import json
import numpy, polars
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline_tests.adapters.test_local_workers import threads
LocalWorkers(1).run(threads, [None], lambda index, result: print(json.dumps(result)))
"""


def test_libraries_see_one_thread_whatever_the_main_script_loads(tmp_path):
    """The variables count only if they are set before a library is loaded."""
    out, error = start_script(tmp_path, SCRIPT_WITHOUT_GUARD).communicate(timeout=100)

    found = json.loads(out or error)
    assert {"openblas", "openmp", "torch", "polars", "numba"} <= set(found)
    assert set(found.values()) == {1}


def test_the_callers_own_environment_is_left_alone():
    before = dict(os.environ)
    results_of(LocalWorkers(1), square, [1])

    assert dict(os.environ) == before


# Errors of the function


@needs_proc
def test_an_error_of_the_function_keeps_its_type_and_ends_the_others_at_once():
    before = children_of(os.getpid())
    started = time.monotonic()

    with pytest.raises(ProxyError, match="run 3 is refused") as caught:
        results_of(LocalWorkers(5), refuse_three, [1, 3, 2, 4, 5])

    assert time.monotonic() - started < 15  # waiting for the sleepers would take 20
    assert str(caught.value) == "run 3 is refused"
    assert "in refuse_three" in caught.value.__notes__[0]
    assert children_of(os.getpid()) == before


def test_an_error_that_cant_be_sent_is_told_in_words():
    with pytest.raises(WorkError, match="a task raised NeedsTwo: 4 and 5"):
        results_of(LocalWorkers(1), raise_what_cant_be_sent, [4])


def test_a_function_that_quits_python_or_gives_what_cant_be_sent_raises_here():
    with pytest.raises(SystemExit, match="7"):
        results_of(LocalWorkers(1), quit_python, [1])
    with pytest.raises(TypeError, match="cannot pickle"):
        results_of(LocalWorkers(1), give_what_cant_be_sent, [1])


@needs_proc
def test_an_error_of_the_caller_ends_the_workers():
    before = children_of(os.getpid())

    with pytest.raises(KeyError):
        LocalWorkers(2).run(square, range(10), lambda index, result: {}[index])

    assert children_of(os.getpid()) == before


def test_a_function_of_the_main_script_and_a_negative_number_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"n_workers must be >= 0, got -1"):
        LocalWorkers(-1)
    monkeypatch.setattr(square, "__module__", "__main__")
    for function in (square, partial(square)):
        with pytest.raises(WorkError, match=r"must be importable from a module, got .*square"):
            LocalWorkers(1).run(function, [1], print)


# Deaths


def test_a_killed_worker_is_replaced_and_only_its_task_is_tried_again(tmp_path):
    function = partial(killed_on_three, tmp_path, 2)

    assert results_of(LocalWorkers(2), function, range(20)) == [(i, i) for i in range(20)]
    tries = [len((tmp_path / str(i)).read_text().split()) for i in range(20)]
    assert tries == [3 if i == 3 else 1 for i in range(20)]


def test_a_task_that_always_kills_its_worker_is_named_after_three_tries(tmp_path):
    done: list[int] = []

    with pytest.raises(
        WorkError,
        match=r"task 3 of 20 .* got 3 dead workers, the last by signal SIGKILL, .* fewer workers",
    ):
        LocalWorkers(2).run(
            partial(killed_on_three, tmp_path, 99), range(20), lambda index, _: done.append(index)
        )

    left = set(range(20)) - set(done) - {3}
    assert 3 not in done and len(left) <= 1  # the other worker may have held one
    assert (tmp_path / "3").read_text().split() == ["try"] * 3


def test_a_worker_killed_from_outside_costs_nothing_but_time(tmp_path):
    """Each result kills a worker that is in its next task by then."""
    done: list[int] = []

    def kill_one(index: int, result: int) -> None:
        done.append(index)
        if len(done) in (2, 5):
            with suppress(ProcessLookupError):
                os.kill(result, signal.SIGKILL)

    LocalWorkers(2).run(pid_of_worker, range(30), kill_one)

    assert sorted(done) == list(range(30))


def test_a_dead_worker_is_noticed_though_what_it_started_lives_on(tmp_path):
    started = time.monotonic()

    assert results_of(LocalWorkers(1), partial(leave_a_process_and_die, tmp_path), [5]) == [(0, 5)]
    assert time.monotonic() - started < 15


def test_with_a_way_to_tell_of_failures_the_other_tasks_go_on(tmp_path):
    """One task kills its workers, one raises: both are told with their tries, 18 are done."""
    failed: list[tuple[int, str, int]] = []
    done: list[int] = []
    started: list[int] = []

    LocalWorkers(2, max_retries=1).run(
        partial(killed_on_three, tmp_path, 99),
        [*range(19), "nine/teen"],
        lambda index, _: done.append(index),
        on_failed=lambda index, error, tries: failed.append((index, type(error).__name__, tries)),
        on_started=started.append,
    )

    assert sorted(failed) == [(3, "WorkError", 2), (19, "FileNotFoundError", 1)]
    assert sorted(done) == [i for i in range(19) if i != 3]
    assert sorted(started) == sorted([*range(20), 3])


def test_retries_below_zero_are_refused():
    with pytest.raises(ConfigError, match=r"backend\.max_retries must be >= 0, got -1"):
        LocalWorkers(max_retries=-1)


# GPUs


def test_each_worker_sees_one_device_that_no_other_has_also_after_a_death(tmp_path):
    found = results_of(LocalWorkers(8, gpus=("4", "GPU-7")), partial(seen_gpu, tmp_path), range(40))
    pairs = {pair for _, pair in found}  # pyright: ignore[reportUnhashable]
    gpus = [gpu for _, gpu in pairs]  # pyright: ignore[reportGeneralTypeIssues]

    assert sorted(gpus) == ["4", "GPU-7"]


@pytest.mark.gpu
def test_a_worker_computes_on_the_one_device_that_it_sees():
    from causalmix_pipeline.resources.project import visible_gpus

    gpus = visible_gpus()
    if not gpus:
        pytest.skip("needs a CUDA device")

    found = results_of(LocalWorkers(gpus=gpus), count_gpus, range(len(gpus)))

    assert found == [(i, 1) for i in range(len(gpus))]


SCRIPT_OF_SLEEPERS = """
import sys
from functools import partial
from pathlib import Path
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline_tests.adapters.test_local_workers import sleep_long
LocalWorkers(3).run(partial(sleep_long, Path(sys.argv[1])), [0, 1, 2], print)
"""


def sleepers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


@needs_proc
def test_workers_end_within_two_seconds_of_a_killed_parent(tmp_path):
    parent = start_script(tmp_path, SCRIPT_OF_SLEEPERS)
    wait_for(lambda: len(sleepers(tmp_path)) == 2, 60)
    workers = children_of(parent.pid)

    parent.send_signal(signal.SIGKILL)
    parent.communicate()

    assert len(workers) == 3  # one is idle
    assert set(sleepers(tmp_path)) < set(workers)
    assert wait_for(lambda: not any(map(is_alive, workers)), 10) < 2


@needs_proc
def test_ctrl_c_ends_parent_and_workers_at_once_and_only_the_parent_speaks(tmp_path):
    """A terminal sends the signal to all processes of its foreground group."""
    parent = start_script(tmp_path, SCRIPT_OF_SLEEPERS, new_session=True)
    wait_for(lambda: len(sleepers(tmp_path)) == 2, 60)
    workers = children_of(parent.pid)
    time.sleep(0.5)  # the third is idle by then

    os.killpg(parent.pid, signal.SIGINT)
    started = time.monotonic()
    _, error = parent.communicate(timeout=30)

    assert time.monotonic() - started < 3
    assert parent.returncode == -signal.SIGINT
    assert error.count("Traceback") == 1
    assert len(workers) == 3
    assert not any(map(is_alive, workers))
