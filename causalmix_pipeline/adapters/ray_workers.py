"""Work done on a Ray cluster: an existing one, or one of this machine that ends with the work.

Machines of an existing cluster need this package installed, and paths that they can reach.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from causalmix_pipeline.adapters.local_workers import (
    RETRIES,
    THREAD_VARIABLES,
    Outcome,
    portable,
)
from causalmix_pipeline.core.errors import ConfigError, WorkError
from causalmix_pipeline.core.work import OnFailed

logger = logging.getLogger(__name__)

#: Seconds that an address gets to answer; Ray by itself tries for a minute or more.
CONNECT_SECONDS = 5.0
#: Seconds between two looks at the size of a cluster, which may grow.
SIZE_SECONDS = 5.0
#: Logging belongs to this process, and what workers print to Ray's logs.
_QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}


@dataclass(frozen=True)
class RayWorkers:
    """Tasks of a Ray cluster.

    If this process is connected to a cluster already, that one is used and left running. No usage
    data is sent anywhere.

    Attributes:
        address: of an existing cluster, such as `10.0.0.5:6379`, `auto` or `ray://10.0.0.5:10001`;
            None starts one on this machine and ends it after the work.
        n_cpus_per_task: CPUs that Ray reserves for a task; a task runs on one thread.
        n_gpus_per_task: GPUs that Ray reserves for a task; a part of one is fine.
        max_retries: how often a task is tried again after its worker or machine died.
    """

    address: str | None = None
    n_cpus_per_task: float = 1.0
    n_gpus_per_task: float = 0.0
    max_retries: int = RETRIES

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("n_cpus_per_task", "n_gpus_per_task", "max_retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"backend.{name} must be >= 0, got {getattr(self, name)}.")
        if not any(self._needs.values()):
            raise ConfigError(
                "backend.n_cpus_per_task or backend.n_gpus_per_task must be > 0, got 0 for both: "
                "nothing would bound how many tasks run at once."
            )

    @property
    def _needs(self) -> dict[str, float]:
        return {"CPU": self.n_cpus_per_task, "GPU": self.n_gpus_per_task}

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int, Any], None],
        *,
        on_failed: OnFailed | None = None,
        on_started: Callable[[int], None] | None = None,
    ) -> None:
        """Call `function(task)` for each task on the cluster; see `core.work.WorkBackend`.

        Twice as many tasks as the cluster can run at once are in flight; the older half of them
        counts as started.

        Raises:
            WorkError: if the cluster can't be reached; without `on_failed`, if a task's workers
                die more than `max_retries` times. Then what `function` raises is raised here with
                its type.
        """
        if not tasks:
            return
        with self._connected() as ray:
            call = ray.remote(
                num_cpus=self.n_cpus_per_task,
                num_gpus=self.n_gpus_per_task,
                max_retries=self.max_retries,
                runtime_env={"env_vars": THREAD_VARIABLES},
            )(_call)
            function_ref = ray.put(function)
            todo = iter(range(len(tasks)))
            limits = self._limits(ray)
            in_flight: dict[Any, int] = {}
            started: set[int] = set()

            def tell_start(index: int) -> None:
                if on_started is not None and index not in started:
                    on_started(index)
                started.add(index)

            try:
                while True:
                    limit = next(limits)
                    while len(in_flight) < limit and (index := next(todo, None)) is not None:
                        in_flight[call.remote(function_ref, tasks[index])] = index
                    if not in_flight:
                        return
                    for index in list(in_flight.values())[: max(1, limit // 2)]:
                        tell_start(index)
                    ready, _ = ray.wait(list(in_flight), timeout=SIZE_SECONDS)
                    for ref in ready:
                        index = in_flight.pop(ref)
                        tell_start(index)  # a short task may start and end between two looks
                        outcome = self._outcome(ray, ref, index)
                        if outcome.error is None or on_failed is None:
                            on_done(index, outcome.result_or_raise())
                        else:
                            on_failed(index, outcome.error, outcome.tries)
            finally:
                for ref in in_flight:
                    ray.cancel(ref, force=True)

    def n_at_once(self) -> int:
        """How many tasks the cluster, as it is now, runs at once; at least 1.

        Raises:
            WorkError: if the cluster can't be reached.
        """
        with self._connected() as ray:
            return max(1, self._slots(ray.cluster_resources()))

    def _slots(self, has: dict[str, float]) -> int:
        return int(min(has.get(name, 0) / need for name, need in self._needs.items() if need))

    def _outcome(self, ray: Any, ref: Any, index: int) -> Outcome:
        """Fetch what became of a task."""
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # its result can't be sent
            return Outcome(error=error.cause)
        except ray.exceptions.RayError as error:
            died = WorkError(
                f"task {index} (counted from 0) must leave its Ray worker alive, got "
                f"{type(error).__name__} after {self.max_retries} retries: {error}. If memory was "
                "short, take fewer workers at once; else look at the task and at Ray's logs."
            )
            died.__cause__ = error
            return Outcome(error=died, tries=self.max_retries + 1)

    def _limits(self, ray: Any) -> Iterator[int]:
        """How many tasks may be in flight now: twice what the cluster runs at once."""
        has_waited = False
        while True:
            has = ray.cluster_resources()
            slots = self._slots(has)
            if slots == 0 and not has_waited:
                self._refuse_or_wait(has)
                has_waited = True
            looked = time.monotonic()
            while time.monotonic() - looked < SIZE_SECONDS:
                yield max(1, 2 * slots)

    def _refuse_or_wait(self, has: dict[str, float]) -> None:
        """A cluster of this machine never gets what it lacks; another one may start machines."""
        found = ", ".join(f"{has.get(name, 0):g} {name}" for name in self._needs)
        message = (
            f"backend.n_cpus_per_task ({self.n_cpus_per_task:g}) and backend.n_gpus_per_task "
            f"({self.n_gpus_per_task:g}) must be at most what the cluster has, got {found}"
        )
        if self.address is None:
            raise WorkError(f"{message}. Lower them, or name a larger cluster in backend.address.")
        logger.warning("%s: waiting for it to grow.", message)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Ray, connected; a connection made here ends here."""
        # Read when Ray is loaded, and by the processes that it starts.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        # Of its memory monitor: without it, a task that never fits is tried again for ever.
        os.environ["RAY_task_oom_retries"] = str(self.max_retries)  # noqa: SIM112
        import ray

        if ray.is_initialized():
            yield ray
            return
        if self.address is None:
            ray.init("local", include_dashboard=False, **_QUIET)
        else:
            self._connect(ray, self.address)
        try:
            yield ray
        finally:
            ray.shutdown()

    def _connect(self, ray: Any, address: str) -> None:
        """Connect to an existing cluster, soon or not at all."""
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            ray.init(address, **_QUIET)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise WorkError(
                f"backend.address must be that of a running Ray cluster, got {address!r}: {error}. "
                "Check the address (`ray status` on the cluster's head prints it) and that this "
                "machine reaches it, or leave backend.address out to work on this machine."
            ) from error


def _call(function: Callable[[Any], Any], task: Any) -> Outcome:
    """Run in a Ray worker: errors of the function are a value, so that none is Ray's."""
    try:
        return Outcome(result=function(task))
    except Exception as error:
        return Outcome(error=portable(error))
