"""What proxy runs cost before any is trained: time, GPU hours, money, disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Calibration:
    """Seconds that training takes here, with as many workers at once as the real thing has.

    Attributes:
        start_seconds: until a worker has started and loaded its libraries; once.
        task_seconds: of a stack of one step: its data, its evaluation and its record.
        step_seconds: of each further optimiser step of the stack.
        record_bytes: of a run's record in the store.
        how: how the figures were found.
    """

    start_seconds: float
    task_seconds: float
    step_seconds: float
    record_bytes: int
    how: str

    def stack_seconds(self, steps: int) -> float:
        """Seconds of one stack in one worker, once that is up."""
        return self.task_seconds + (steps - 1) * self.step_seconds


@dataclass(frozen=True)
class Workload:
    """What is to train, and where.

    Attributes:
        n_all: proxy runs of the design.
        n_pending: those without a record.
        tokens: tokens that a run reads.
        flops: floating-point operations of a run.
        n_parameters: weights of a proxy.
        steps: optimiser steps of a run.
        runs_per_stack: runs that a worker trains together.
        n_workers: stacks that are trained at once.
        n_gpus: GPUs that are taken meanwhile.
        n_cores: cores that are taken meanwhile.
        scratch_bytes: disk that each worker takes for checkpoints while it trains.
    """

    n_all: int
    n_pending: int
    tokens: int
    flops: float
    n_parameters: int
    steps: int
    runs_per_stack: int
    n_workers: int
    n_gpus: float = 0.0
    n_cores: int = 0
    scratch_bytes: int = 0

    @property
    def n_waves(self) -> int:
        """Stacks that the busiest worker trains one after another."""
        return math.ceil(math.ceil(self.n_pending / self.runs_per_stack) / self.n_workers)

    def seconds(self, calibration: Calibration) -> float:
        """Seconds from the start of the workers to the last record.

        A stack that isn't full, and a worker that has nothing left to do, save no time.
        """
        if not self.n_pending:
            return 0.0
        return calibration.start_seconds + self.n_waves * calibration.stack_seconds(self.steps)


@dataclass(frozen=True)
class Rates:
    """Prices; None where there is none.

    Attributes:
        gpu_hour: of one GPU for an hour.
        core_hour: of one core for an hour.
        currency: their unit.
    """

    gpu_hour: float | None = None
    core_hour: float | None = None
    currency: str = "USD"


def price(workload: Workload, calibration: Calibration, rates: Rates) -> dict[str, Any]:
    """What a workload costs, by name; `cost` is None where no price is set.

    Units stand in the names; FLOPs are floating-point operations.
    """
    hours = workload.seconds(calibration) / 3600
    busy = min(1.0, math.ceil(workload.n_pending / workload.runs_per_stack) / workload.n_workers)
    gpu_hours, core_hours = hours * workload.n_gpus * busy, hours * workload.n_cores * busy
    cost = None
    if rates.gpu_hour is not None or rates.core_hour is not None:
        cost = gpu_hours * (rates.gpu_hour or 0.0) + core_hours * (rates.core_hour or 0.0)
    n_scratch = min(workload.n_workers, workload.n_pending)
    return {
        "proxy runs": workload.n_all,
        "in the store": workload.n_all - workload.n_pending,
        "to train": workload.n_pending,
        "million tokens a run": workload.tokens / 1e6,
        "million tokens to train": workload.n_pending * workload.tokens / 1e6,
        "FLOPs to train": workload.n_pending * workload.flops,
        "parameters of a proxy": workload.n_parameters,
        "runs at once": workload.n_workers * workload.runs_per_stack,
        "workers": workload.n_workers,
        "CPU seconds a run": calibration.stack_seconds(workload.steps) / workload.runs_per_stack,
        "hours": hours,
        "core hours": core_hours,
        "GPU hours": gpu_hours,
        "cost": cost,
        "currency": rates.currency,
        "record bytes": workload.n_pending * calibration.record_bytes,
        "scratch bytes": n_scratch * workload.scratch_bytes,
        "measured": calibration.how,
    }


#: Figures of a price that grow with what is to train, and those that add up over kinds of runs.
_GROWING = ("million tokens to train", "FLOPs to train", "hours", "core hours", "GPU hours", "cost")
_ADDED = ("proxy runs", "in the store", "to train", "record bytes", *_GROWING)


def scaled(price: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The price of runs that cost so many times as much each, such as those with probes."""
    found = dict(price)
    for name in (*_GROWING, "CPU seconds a run"):
        if factor != 1.0 and found[name] is not None:
            found[name] *= factor
    return found


def total(prices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The price of several kinds of runs, trained one after the other.

    What is of one run, or of the machine, is that of the first kind.
    """
    found = dict(prices[0])
    if len(prices) == 1:
        return found
    for name in _ADDED:
        values = [each[name] for each in prices if each[name] is not None]
        found[name] = sum(values) if values else None
    found["scratch bytes"] = max(each["scratch bytes"] for each in prices)
    return found


def over_budget(price: Mapping[str, Any], limits: Mapping[str, float | None]) -> list[str]:
    """Which limits a price breaks, each a sentence that names field, rule and value.

    Args:
        price: as `price` returns it.
        limits: `max_hours`, `max_gpu_hours` and `max_cost`; None is no limit.
    """
    named = {
        "max_hours": ("hours", "hours on this hardware"),
        "max_gpu_hours": ("GPU hours", "GPU hours"),
        "max_cost": ("cost", price["currency"]),
    }
    return [
        f"budget.{field} allows {limit:g} {unit}, and the {price['to train']} proxy runs to train "
        f"take {price[name]:.3g}"
        for field, (name, unit) in named.items()
        if (limit := limits.get(field)) is not None and (price[name] or 0.0) > limit
    ]
