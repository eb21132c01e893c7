"""Progress of a long step as one line: how many are done, how long the rest takes."""

import time
from collections.abc import Callable, Sequence

from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec

#: Start of each progress line in a run's log, by which the CLI knows them.
PROGRESS_PREFIX = "progress: "

#: Seconds between two looks at a study while it trains; and runs between two, as a share of all.
LOOK_SECONDS, LOOK_SHARE = 30.0, 0.1


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
        self._say()

    @property
    def n_ended(self) -> int:
        """How many there is nothing left to do for."""
        return self.done

    @property
    def work(self) -> tuple[float, float]:
        """How much is done and how much there is, in one that says how long the rest takes."""
        return self.n_ended, self.total

    @property
    def note(self) -> str:
        """What else is said, in brackets; nothing by default."""
        return ""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._told < self._every and self.n_ended < self.total:
            return
        self._told = now
        ended, whole = self.work
        left = self.seconds / max(ended, 1) * (whole - ended)
        note = f" ({self.note})" if self.note else ""
        self._tell(
            f"{PROGRESS_PREFIX}{self.done} of {self.total} {self.what}{note}, {left:.0f} s left"
        )


class TrainingProgress(Progress):
    """Counts proxy runs as done, failed, running and diverged, and their tokens."""

    def __init__(
        self,
        specs: Sequence[ProxySpec],
        what: str,
        tell: Callable[[str], None],
        look: Callable[["TrainingProgress"], None],
        *,
        every: float = 2.0,
    ):
        """Set up a count.

        Args:
            specs: the runs to train.
            what: their name, in the plural.
            tell: takes a line, such as the log of a step.
            look: called now and then, and at the end, for a closer look.
            every: seconds between two lines.
        """
        super().__init__(len(specs), what, tell, every=every)
        self.failed = self.diverged = self.tokens = 0
        self.running: set[str] = set()
        self.records: list[ProxyRecord] = []
        self._tokens_of = {spec.key: spec.config.tokens for spec in specs}
        self._work_of = work_of_runs(specs)
        self._worked = 0.0
        self._look, self._looked, self._looked_at = look, time.monotonic(), 0

    def on_started(self, specs: Sequence[ProxySpec]) -> None:
        """Count runs as running."""
        self.running |= {spec.key for spec in specs}

    def on_done(self, records: Sequence[ProxyRecord]) -> None:
        """Count runs as done."""
        for record in records:
            self.running.discard(record.key)
            self.tokens += self._tokens_of.get(record.key, 0)
            self._worked += self._work_of.get(record.key, 0.0)
            self.diverged += record.diverged
            self.records.append(record)
        self.done += len(records)
        self._say_and_look()

    def on_failed(self, spec: ProxySpec, reason: str) -> None:
        """Count a run as failed, and say why."""
        self.running.discard(spec.key)
        self._worked += self._work_of.get(spec.key, 0.0)
        self.failed += 1
        self._tell(f"proxy run {spec.key} failed: {reason}")
        self._say_and_look()

    @property
    def n_ended(self) -> int:
        """Runs that are done or given up."""
        return self.done + self.failed

    @property
    def work(self) -> tuple[float, float]:
        """Runs that are ended, and all, each counted by what it costs: larger ones take longer."""
        return self._worked, sum(self._work_of.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the runs done by now have read, over the time since the start."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def note(self) -> str:
        """Failed and running runs, and speed."""
        return (
            f"{self.failed} failed, {len(self.running)} running, "
            f"{self.tokens_per_second:.0f} tokens/s"
        )

    def _say_and_look(self) -> None:
        self._say()
        now = time.monotonic()
        is_due = (
            now - self._looked >= LOOK_SECONDS
            or self.n_ended - self._looked_at >= LOOK_SHARE * self.total
            or self.n_ended == self.total
        )
        if is_due:
            self._looked, self._looked_at = now, self.n_ended
            self._look(self)


def work_of_runs(specs: Sequence[ProxySpec]) -> dict[str, float]:
    """What each run costs over the mean of all, by its FLOPs; 1 for pretrained models."""
    flops = [spec.config.flops if isinstance(spec.config, ProxyConfig) else 1.0 for spec in specs]
    mean = sum(flops) / max(len(flops), 1)
    return {spec.key: each / mean for spec, each in zip(specs, flops, strict=True)}


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
