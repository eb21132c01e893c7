"""Measures what training takes on this machine, by a short trial of the real thing.

The trial goes through the backend itself: as many workers at once as it uses, full stacks, the
experiment's own pool states and evaluation, and records that are written; only the steps are few.
Its records go into a folder of their own.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.local_workers import n_cores
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore
from causalmix_pipeline.adapters.tokenizer import TokenStore
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.price import Calibration
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec

#: Seconds that each of the two long waves of a trial shall take, about.
WAVE_SECONDS = 2.5
#: Floating-point operations a second of one core, or of one GPU, for that guess alone.
CORE_FLOPS, GPU_FLOPS = 3e10, 3e13
#: Optimiser steps of the long waves of a pretrained model's trial.
PRETRAINED_STEPS = 3
#: Seconds that a trial of a pretrained model may take; beyond, its time is computed.
MOST_SECONDS = 120.0
#: Share of the rate of one large matrix product that training a transformer reaches.
USED_SHARE = 0.5
#: Share of its core that a worker gets on a machine that does nothing else.
QUIET_SHARE = 0.95
#: Bytes of a record that wasn't written.
TYPICAL_RECORD = 4096


@dataclass(frozen=True)
class CalibrationStore(RunStore):
    """Reads what runs read from another store, and keeps records and all else in its own folder."""

    source: RunStore | None = None

    @property
    def _source(self) -> RunStore:
        assert self.source is not None
        return self.source

    def state(self, state_hash: str) -> list[np.ndarray]:
        """Ids of a pool state's documents, of the other store."""
        return self._source.state(state_hash)

    def evaluation(self, eval_hash: str) -> EvalWindows:
        """The evaluation of the other store."""
        return self._source.evaluation(eval_hash)

    def token_store(self, tokens_hash: str) -> TokenStore:
        """A token store of the other store."""
        return self._source.token_store(tokens_hash)


def calibrate(
    backend: LocalBackend,
    specs: Sequence[ProxySpec],
    *,
    n_workers: int,
    runs_per_stack: int,
    folder: Path,
    flops: float,
) -> Calibration:
    """Train a few steps of the specs' kind through the backend, and time them.

    Args:
        backend: what will train the real thing.
        specs: some of the real thing's runs, one at least; repeated where more are needed, and
            trained without their controllers, whose blocks aren't the trial's.
        n_workers: stacks that are trained at once.
        runs_per_stack: runs that a worker trains together.
        folder: where the trial's records go; removed afterwards.
        flops: floating-point operations of one run.
    """
    config = specs[0].config
    specs = [replace(spec, controller=None) for spec in specs]
    if isinstance(config, PretrainedConfig):
        rate = USED_SHARE * backend.ask(partial(matrix_rate, bf16=config.bf16))
        steps = min(PRETRAINED_STEPS, config.steps)
        step = flops / config.steps / rate
        if (2 + 2 * steps) * step > MOST_SECONDS:
            return _computed(rate, step)
    else:
        rate = CORE_FLOPS if backend.device == "cpu" else GPU_FLOPS
        guess = runs_per_stack * flops / config.steps / rate
        steps = min(config.steps, max(10, math.ceil(WAVE_SECONDS / guess)))
    trial = _Trial(specs, n_workers, runs_per_stack, [1, 1, steps, steps, steps])
    # A worker on another machine has a folder of its own, which nobody empties.
    store = CalibrationStore(folder / uuid.uuid4().hex, source=backend.store)
    try:
        return trial.run(replace(backend, store=store, models_per_stack=runs_per_stack))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _computed(rate: float, step: float) -> Calibration:
    how = (
        f"computed, not measured: a trial would take over {MOST_SECONDS:g} s. From the FLOPs, and "
        f"{USED_SHARE:.0%} of the rate of a large matrix product here: {rate:.2g} FLOPs a second; "
        "evaluation is left out"
    )
    return Calibration(0.0, step, step, TYPICAL_RECORD, how)


class _Trial:
    """Waves of short runs, and when their records came."""

    def __init__(
        self, specs: Sequence[ProxySpec], n_workers: int, runs_per_stack: int, steps: Sequence[int]
    ) -> None:
        self.steps, self.runs_per_stack = steps, runs_per_stack
        n_runs = n_workers * runs_per_stack
        # Consecutive runs, as in the real thing: a state's data is read once for its runs.
        self.waves = [
            [
                replace(
                    specs[(wave * n_runs + i) % len(specs)],
                    config=shortened(specs[0].config, n),
                    data_seed=wave * n_runs + i,
                )
                for i in range(n_runs)
            ]
            for wave, n in enumerate(steps)
        ]
        self.wave_of = {spec.key: w for w, wave in enumerate(self.waves) for spec in wave}

    def run(self, backend: LocalBackend) -> Calibration:
        """Train all waves; a wave's time is the mean over its records."""
        came: list[list[float]] = [[] for _ in self.waves]
        long: list[ProxyRecord] = []
        started = time.perf_counter()

        def on_done(records: Sequence[ProxyRecord]) -> None:
            for record in records:
                came[self.wave_of[record.key]].append(time.perf_counter() - started)
                long.extend([record] if self.wave_of[record.key] > 1 else [])

        backend.train([spec for wave in self.waves for spec in wave], on_done)
        ends = [float(np.mean(times)) for times in came]
        first, second, third, fourth, fifth = ends
        task = max(second - first, 0.0)
        # The third wave starts its workers anew. Another program's work may fall into one of the
        # two after it: the faster one counts.
        stack = min(fourth - third, fifth - fourth)
        step = max(stack - task, 0.0) / max(self.steps[-1] - 1, 1)
        how = f"measured by a trial of {self.steps[-1]} steps in all workers at once"
        own = self._own_share(long) if backend.device == "cpu" else 1.0
        if own < QUIET_SHARE:
            how += (
                f"; other programs held {1 - own:.0%} of the cores' time meanwhile, which is taken "
                "out: the time holds while they are quiet"
            )
        return Calibration(
            start_seconds=own * max(first - task, 0.0),
            task_seconds=own * task,
            step_seconds=own * step,
            record_bytes=_record_bytes(long[-1]),
            how=how,
        )

    def _own_share(self, records: Sequence[ProxyRecord]) -> float:
        """Processor time of stacks over their time by the clock: 1 where nothing else runs."""
        shares = [
            self.runs_per_stack * record.cpu_seconds / record.seconds
            for record in records
            if record.seconds > 0
        ]
        return min(1.0, float(np.mean(shares))) if shares else 1.0


def _record_bytes(record: ProxyRecord) -> int:
    """Bytes of a record's file, which takes whole blocks of the disk."""
    return 4096 * math.ceil(len(json.dumps(asdict(record), indent=1)) / 4096)


def shortened(config: ProxyConfig | PretrainedConfig, steps: int) -> ProxyConfig | PretrainedConfig:
    """The same model and recipe for a few optimiser steps."""
    if isinstance(config, PretrainedConfig):
        return replace(config, tokens=steps * config.batch_sequences * config.sequence_length)
    return replace(config, steps=steps)


def matrix_rate(device: str, *, bf16: bool) -> float:
    """Floating-point operations a second of a large matrix product on one core, or on the GPU."""
    import torch

    on_gpu = device.startswith("cuda")
    size = 4096 if on_gpu else 1024
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dtype = torch.bfloat16 if bf16 else torch.float32
        left = torch.ones(size, size, dtype=dtype, device=device)
        best = math.inf
        for _ in range(5):
            started = time.perf_counter()
            (left @ left)[0, 0].item()  # item: a GPU answers before it has computed
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best


def machine(device: str) -> dict[str, Any]:
    """What of this machine decides how fast it trains."""
    found: dict[str, Any] = {"cores": n_cores(), "cpu": _cpu_model(), "device": device}
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpus"] = torch.cuda.device_count()
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
