"""Where work is done that is too much for one process: proxy training and document scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

#: Takes the number of a task that is given up, its error, and how often it was tried.
OnFailed = Callable[[int, BaseException, int], None]


@runtime_checkable
class WorkBackend(Protocol):
    """Calls a function for each of many tasks, in processes of this machine or of a cluster."""

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int, Any], None],
        *,
        on_failed: OnFailed | None = None,
        on_started: Callable[[int], None] | None = None,
    ) -> None:
        """Call `function(task)` for each task, somewhere.

        Args:
            function: importable from its module; so are the types of tasks and results.
            tasks: independent of each other, sent by value.
            on_done: called here with the number of a task and its result, as results come.
            on_failed: called here with the number of a task that is given up, the error, and how
                often it was tried; the other tasks go on. None ends the work with that error.
            on_started: called here with the number of a task as a worker takes it, again if it is
                tried again.

        Raises:
            WorkError: if the backend can't be reached; without `on_failed`, if a task's workers
                die again and again. Then an error that `function` raises is raised here, too.
        """
        ...


class InProcess:
    """Does the work here, one task after another: for what is done before a process has started."""

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int, Any], None],
        *,
        on_failed: OnFailed | None = None,
        on_started: Callable[[int], None] | None = None,
    ) -> None:
        """Call `function(task)` for each task; see `WorkBackend`."""
        for index, task in enumerate(tasks):
            if on_started is not None:
                on_started(index)
            try:
                result = function(task)
            except Exception as error:
                if on_failed is None:
                    raise
                on_failed(index, error, 1)
            else:
                on_done(index, result)
