"""Progress of a long step as one line: how many are done, how long the rest takes."""

import time
from collections.abc import Callable

#: Start of each progress line in a run's log, by which the CLI knows them.
PROGRESS_PREFIX = "progress: "


class Progress:
    """Counts what is done and says so, at most every few seconds and at the end."""

    def __init__(self, total: int, what: str, tell: Callable[[str], None], *, every: float = 2.0):
        """Set up a count.

        Args:
            total: how many there are to do.
            what: their name, in the plural.
            tell: takes a line, such as the log of a step.
            every: seconds between two lines.
        """
        self.total, self.what, self.done = total, what, 0
        self._tell, self._every = tell, every
        self._started = self._told = time.monotonic()

    def add(self, n: int) -> None:
        """Count `n` more as done, and say so if it's time."""
        self.done += n
        now = time.monotonic()
        if now - self._told < self._every and self.done < self.total:
            return
        self._told = now
        left = (now - self._started) / max(self.done, 1) * (self.total - self.done)
        self._tell(f"{PROGRESS_PREFIX}{self.done} of {self.total} {self.what}, {left:.0f} s left")


def progress_teller(tell: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Takes what is being done, how much is done, and of how much; counts each stage apart.

    Args:
        tell: takes a line, such as the log of a step.
    """
    stages: dict[str, Progress] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        stage = stages.setdefault(what, Progress(total, what, tell))
        stage.add(done - stage.done)

    return on_progress
