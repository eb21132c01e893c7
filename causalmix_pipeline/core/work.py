"""Where work is done that is too much for one process: proxy training and document scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class WorkBackend(Protocol):
    """Calls a function for each of many tasks, in processes of this machine or of a cluster."""

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int, Any], None],
    ) -> None:
        """Call `function(task)` for each task, somewhere.

        Args:
            function: importable from its module; so are the types of tasks and results.
            tasks: independent of each other, sent by value.
            on_done: called here with the number of a task and its result, as results come.

        Raises:
            WorkError: if a worker dies, or the backend can't be reached. An error that `function`
                raises is raised here as it is.
        """
        ...


class InProcess:
    """Does the work here, one task after another: for what is done before a process has started."""

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        on_done: Callable[[int, Any], None],
    ) -> None:
        """Call `function(task)` for each task; see `WorkBackend`."""
        for index, task in enumerate(tasks):
            on_done(index, function(task))
