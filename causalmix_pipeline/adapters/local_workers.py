"""Work done by processes of this machine, each on one thread.

A worker is a fresh interpreter that holds one task at a time. So when it dies, exactly one task is
known to have been in it: that task alone counts a try, and those in other workers go on.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from causalmix_pipeline.core.errors import ConfigError, WorkError
from causalmix_pipeline.core.work import OnFailed

#: One thread a worker. Libraries read these once, when they are loaded.
THREAD_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "POLARS_MAX_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
#: How often a task is tried again after its worker died.
RETRIES = 2
#: Seconds between two looks at whether a process that says nothing is still there.
WATCH_SECONDS = 0.5
#: Seconds that an idle worker gets to end by itself.
END_SECONDS = 5.0
#: What a worker runs: its variables are set before any library is loaded. Ctrl-C in a terminal
#: reaches workers too; their parent ends them.
_START = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
handle, parent, variables, sys.path[:] = json.loads(sys.argv[1])
os.environ.update(variables)
from causalmix_pipeline.adapters.local_workers import serve
serve(handle, parent)
"""


def n_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that may be taken without swapping; half of all where the system doesn't say."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@dataclass(frozen=True)
class LocalWorkers:
    """Worker processes on this machine.

    A task whose worker dies (killed, or out of memory) goes to the end of the queue and is tried
    again in a new worker, at most `max_retries` times. Workers end when the work is done, when an
    error is raised here, and when this process dies. They don't load the main script, so it needs
    no `if __name__ == "__main__"`, and functions must live in a module.

    Attributes:
        n_workers: processes; 0 takes one per core.
        max_retries: how often a task is tried again after its worker died.
        gpus: names of CUDA devices. If there are some, each worker has one of them for itself and
            sees no other, so there are at most as many workers.
    """

    n_workers: int = 0
    max_retries: int = RETRIES
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.n_workers < 0:
            raise ConfigError(
                f"n_workers must be >= 0, got {self.n_workers}: 0 takes one process per core."
            )
        if self.max_retries < 0:
            raise ConfigError(
                f"backend.max_retries must be >= 0, got {self.max_retries}: 0 tries a task once."
            )

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int, Any], None],
        *,
        on_failed: OnFailed | None = None,
        on_started: Callable[[int], None] | None = None,
    ) -> None:
        """Call `function(task)` for each task in a worker; see `core.work.WorkBackend`.

        A worker holds one task, so at most `n_workers` are in flight. A task that is finished while
        `on_done` runs waits for it, but its worker has the next task already unless it, too,
        finished meanwhile.

        Raises:
            WorkError: without `on_failed`, if one task's workers die more than `max_retries`
                times. What `function` raises is raised here with its type; the worker's traceback
                is a note on it.
        """
        crew = _Crew(function, tasks, self, on_started, goes_on=on_failed is not None)
        try:
            while not crew.is_done:
                crew.fill()
                for index, outcome in crew.collect():
                    if outcome.error is None or on_failed is None:
                        on_done(index, outcome.result_or_raise())
                    else:
                        on_failed(index, outcome.error, outcome.tries)
        except BaseException:
            crew.kill()
            raise
        finally:
            crew.end()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a task: a result, or the error after so many tries."""

    result: Any = None
    error: BaseException | None = None
    tries: int = 1

    def result_or_raise(self) -> Any:
        """Return the result, or raise the error with its type."""
        if self.error is not None:
            raise self.error
        return self.result


def portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note; a WorkError in its place if it can't be sent."""
    note = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = WorkError(f"a task raised {type(error).__name__}: {error}")
    error.add_note(note)
    return error


class _Crew:
    """The workers of one call of `run`, and the tasks that wait for them."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        settings: LocalWorkers,
        on_started: Callable[[int], None] | None,
        *,
        goes_on: bool,
    ) -> None:
        if getattr(function, "func", function).__module__ == "__main__":  # func: of a partial
            raise WorkError(
                f"a worker's function must be importable from a module, got {function!r} of the "
                "main script: move it into a module."
            )
        self.function = pickle.dumps(function)
        self.tasks = tasks
        self.max_retries = settings.max_retries
        self.on_started, self.goes_on = on_started, goes_on
        gpus = settings.gpus
        n_workers = settings.n_workers or len(gpus) or n_cores()
        self.size = min(n_workers, len(tasks), *([len(gpus)] if gpus else []))
        self.free_gpus = deque(gpus)
        self.waiting = deque(range(len(tasks)))
        self.deaths: Counter[int] = Counter()
        self.workers: list[_Worker] = []

    @property
    def is_done(self) -> bool:
        """Whether no task waits or is in work."""
        return not self.waiting and all(worker.task is None for worker in self.workers)

    def fill(self) -> None:
        """Give each idle worker a task; start workers while some are missing."""
        idle = [worker for worker in self.workers if worker.task is None]
        while self.waiting and (idle or len(self.workers) < self.size):
            if not idle:
                idle = [_Worker(self.function, self.free_gpus.popleft() if self.free_gpus else "")]
                self.workers += idle
            index = self.waiting.popleft()
            idle.pop().give(index, self.tasks[index])
            if self.on_started is not None:
                self.on_started(index)

    def collect(self) -> list[tuple[int, Outcome]]:
        """Wait for a worker; return what is finished, errors last, its workers at work again."""
        done = []
        for worker in self._ready():
            assert worker.task is not None
            index, outcome = worker.task, worker.take()
            outcome = outcome or self._bury(worker, index)
            if outcome is not None:
                done.append((index, outcome))
        done.sort(key=lambda finished: finished[1].error is not None)
        if self.goes_on or not done or done[-1][1].error is None:
            self.fill()
        return done

    def _ready(self) -> list[_Worker]:
        """Busy workers that answered or died."""
        busy = [worker for worker in self.workers if worker.task is not None]
        answered = wait([worker.connection for worker in busy], timeout=WATCH_SECONDS)
        # A process that a dead worker left behind keeps its connection open.
        return [w for w in busy if w.connection in answered or w.process.poll() is not None]

    def _bury(self, worker: _Worker, index: int) -> Outcome | None:
        """Count a death against the task that the worker held; queue it again, or give it up."""
        self.workers.remove(worker)
        status = worker.end(kill=True)
        if worker.gpu:
            self.free_gpus.append(worker.gpu)
        self.deaths[index] += 1
        if self.deaths[index] <= self.max_retries:
            self.waiting.append(index)
            return None
        message = (
            f"task {index} of {len(self.tasks)} (counted from 0) must leave its worker alive, got "
            f"{self.deaths[index]} dead workers, the last {_how_it_ended(status)}. If memory was "
            "short, take fewer workers; else look at the task and at the workers' messages on "
            "stderr."
        )
        return Outcome(error=WorkError(message), tries=self.deaths[index])

    def kill(self) -> None:
        """End all workers at once."""
        for worker in self.workers:
            worker.process.kill()

    def end(self) -> None:
        """Let idle workers end by themselves and wait for them."""
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.end()


class _Worker:
    """One process, the number of the task that it holds, and the GPU that it sees, if one."""

    def __init__(self, function: bytes, gpu: str) -> None:
        self.task: int | None = None
        self.gpu = gpu
        self.connection, theirs = Pipe()
        variables = THREAD_VARIABLES | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        with theirs:
            arguments = [theirs.fileno(), os.getpid(), variables, list(map(str, sys.path))]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._send(function)

    def give(self, index: int, task: Any) -> None:
        """Send a task."""
        content = pickle.dumps(task)
        self.task = index
        self._send(content)

    def take(self) -> Outcome | None:
        """The outcome of its task; None if the worker died before it was sent."""
        try:
            # False: the process ended, but something that it started holds the connection open.
            content = self.connection.recv_bytes() if self.connection.poll() else None
        except (EOFError, OSError):
            return None
        if content is None:
            return None
        self.task = None
        return pickle.loads(content)

    def end(self, *, kill: bool = False) -> int:
        """Close the connection, wait for the process, and return its exit status."""
        self.connection.close()
        if kill:
            self.process.kill()
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _send(self, content: bytes) -> None:
        with suppress(OSError):  # died: seen when its answer is waited for
            self.connection.send_bytes(content)


def _how_it_ended(status: int) -> str:
    """An exit status in words; negative ones are signals."""
    if status >= 0:
        return f"with exit status {status}"
    memory = ", as when memory runs out" if status == -signal.SIGKILL else ""
    return f"by signal {signal.Signals(-status).name}{memory}"


def serve(handle: int, parent: int) -> None:
    """Answer each task that comes until the connection closes: a worker's whole life."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.set_inheritable(handle, False)
    connection = Connection(handle)
    with suppress(EOFError, OSError):
        function = connection.recv_bytes()
        while True:
            connection.send_bytes(_answer(function, connection.recv_bytes()))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


#: The function is read once a process, after its first task came.
_read_function = lru_cache(maxsize=1)(pickle.loads)


def _answer(function: bytes, task: bytes) -> bytes:
    """The pickled outcome of a task."""
    try:
        return pickle.dumps(Outcome(result=_read_function(function)(pickle.loads(task))))
    except BaseException as error:
        return pickle.dumps(Outcome(error=portable(error)))
