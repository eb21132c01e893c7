"""Trains proxy runs in workers: processes of this machine, or a cluster's.

A worker trains a stack of models of one size at a time (`torch_proxy`), each model on its own
windows. A stack is always full: a short one is filled up with copies, so that every run is
computed with the same tensor shapes and gives the same bits whatever it is stacked with.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from causalmix_pipeline.adapters.local_workers import LocalWorkers, free_memory, n_cores
from causalmix_pipeline.adapters.run_feed import RunFeed
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore, bits_per_byte
from causalmix_pipeline.core.errors import DiskFullError, ProxyError, WorkError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig, StackResult
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.work import WorkBackend

if TYPE_CHECKING:
    from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2


#: Models of a stack where nothing else is asked for: on a CPU 4 are as fast a model as more are; on
#: an H100 64 of 32x1 take a sixtieth of the time a model of one alone, of 128x2 no more helps.
CPU_MODELS, GPU_MODELS = 4, 64


def engine_name(device: str = "cpu") -> str:
    """The engine and the versions that decide a run's bits; its kind of device unless a CPU."""
    from importlib.metadata import version

    kind = device.partition(":")[0]
    return f"stacked-torch-{version('torch').split('+')[0]}" + ("" if kind == "cpu" else f"-{kind}")


@dataclass(frozen=True)
class LocalBackend:
    """Trains proxy runs in workers; of this machine, unless others are given.

    Attributes:
        store: where records, states, tokens and evaluation windows are; workers on other machines
            must reach it.
        n_workers: worker processes of this machine; 0 takes one per core. Unused with `workers`.
        models_per_stack: models trained together in one worker; 0 measures which number is fastest,
            None takes `CPU_MODELS` or `GPU_MODELS`.
        device: torch device of the workers.
        workers: where stacks are trained; None takes processes of this machine.
    """

    store: RunStore
    n_workers: int = 0
    models_per_stack: int | None = None
    device: str = "cpu"
    workers: WorkBackend | None = None

    def train(
        self,
        specs: Sequence[ProxySpec],
        on_done: Callable[[Sequence[ProxyRecord]], None],
        *,
        on_failed: Callable[[ProxySpec, str], None] | None = None,
        on_started: Callable[[Sequence[ProxySpec]], None] | None = None,
    ) -> None:
        """Train each spec that has no record yet and keep its record.

        A stack that fails is tried again run by run. A run that fails then is given up, with its
        reason in the store, and the others go on.

        Raises:
            ProxyError: at the end if runs were given up; at once if the disk is full or workers
                can't be reached. Finished runs are kept.
        """
        study = _Study(self.store, on_done, on_failed, on_started)
        try:
            self._run(study, self._stacks(self.store.missing(specs)))
            self._run(study, [[spec] for spec in study.again], alone=True)
        except WorkError as error:
            raise ProxyError(
                f"proxy runs stopped: {error} Finished runs are kept: start again to go on."
            ) from error
        study.raise_if_failed()

    @property
    def _crew(self) -> WorkBackend:
        return self.workers or LocalWorkers(self.n_workers)

    def ask(self, function: Callable[[str], Any]) -> Any:
        """What a function of the device says in a worker, which may have what this lacks."""
        found: list[Any] = []
        self._crew.run(function, [self.device], lambda _, value: found.append(value))
        return found[0]

    def stack_size(self, config: ProxyConfig | PretrainedConfig, n_runs: int) -> int:
        """Models of one stack of so many runs; a pretrained model is trained by itself."""
        if isinstance(config, PretrainedConfig):
            return 1
        if self.models_per_stack is None:
            return CPU_MODELS if self.device == "cpu" else GPU_MODELS
        if self.models_per_stack:
            return self.models_per_stack
        return min(n_runs, _measured_stack_size(self._crew, config, self.device))

    def _run(
        self, study: _Study, stacks: Sequence[Sequence[ProxySpec]], *, alone: bool = False
    ) -> None:
        n_runs = Counter(spec.config for stack in stacks for spec in stack)
        for config, n in n_runs.items():
            self._run_alike(
                study,
                [stack for stack in stacks if stack[0].config == config],
                1 if alone else self.stack_size(config, n),
            )

    def _run_alike(
        self, study: _Study, stacks: Sequence[Sequence[ProxySpec]], n_models: int
    ) -> None:
        """Train stacks of one configuration."""
        train = partial(
            train_stack_of_specs,
            _from_anywhere(self.store),
            n_models=n_models,
            device=self.device,
        )
        self._crew.run(
            train,
            stacks,
            lambda _, records: study.done(records),
            on_failed=lambda index, error, tries: study.fail(stacks[index], error, tries),
            on_started=lambda index: study.start(stacks[index]),
        )

    def _stacks(self, specs: Sequence[ProxySpec]) -> list[list[ProxySpec]]:
        """Group specs of one model and one token store, neighbours of one state together."""
        groups: dict[tuple, list[ProxySpec]] = {}
        stacks = []
        for spec in specs:
            if spec.controller is not None:  # what it reads depends on its own losses
                stacks.append([spec])
                continue
            groups.setdefault((spec.config, spec.tokens_hash, spec.eval_hash), []).append(spec)
        for (config, *_), group in groups.items():
            size = self.stack_size(config, len(group))
            stacks += [group[i : i + size] for i in range(0, len(group), size)]
        return stacks


@lru_cache
def _measured_stack_size(workers: WorkBackend, config: ProxyConfig, device: str) -> int:
    """The fastest stack for a worker, measured in one: this process needs no torch."""
    found: list[int] = []
    workers.run(partial(_fastest_here, device=device), [config], lambda _, n: found.append(n))
    return found[0]


def _fastest_here(config: ProxyConfig, device: str) -> int:
    """The fastest stack in this worker's part of the memory."""
    import torch

    from causalmix_pipeline.adapters.torch_proxy import fastest_stack_size

    if device.startswith("cuda"):
        n_bytes = torch.cuda.mem_get_info()[0]
    else:
        n_bytes = free_memory() // n_cores()
    return fastest_stack_size(config, device=device, n_bytes=n_bytes)


class _Study:
    """What became of the runs of one call of `train`."""

    def __init__(
        self,
        store: RunStore,
        on_done: Callable[[Sequence[ProxyRecord]], None],
        on_failed: Callable[[ProxySpec, str], None] | None,
        on_started: Callable[[Sequence[ProxySpec]], None] | None,
    ) -> None:
        self.store = store
        self.on_done, self.on_failed, self.on_started = on_done, on_failed, on_started
        #: Runs of stacks that failed, to be tried by themselves.
        self.again: list[ProxySpec] = []
        self.tries: Counter[str] = Counter()
        self.n_done = 0
        self.reasons: dict[str, str] = {}

    def start(self, stack: Sequence[ProxySpec]) -> None:
        if self.on_started is not None:
            self.on_started(stack)

    def done(self, records: Sequence[ProxyRecord]) -> None:
        self.n_done += len(records)
        self.store.forget_failed([record.key for record in records])
        self.on_done(records)

    def fail(self, stack: Sequence[ProxySpec], error: BaseException, tries: int) -> None:
        """Keep a single run as failed, and the runs of a stack to be tried by themselves."""
        if isinstance(error, DiskFullError) or not isinstance(error, Exception):
            raise error
        self.tries.update({spec.key: tries for spec in stack})
        if len(stack) > 1:
            self.again += stack
            return
        (spec,) = stack
        reason = str(error)
        if not isinstance(error, ProxyError | WorkError):
            reason = f"{type(error).__name__}: {reason}."
        self.reasons[spec.key] = reason
        with self.store.disk_full_told():
            self.store.put_failed(spec, reason, self.tries[spec.key])
        if self.on_failed is not None:
            self.on_failed(spec, reason)

    def raise_if_failed(self) -> None:
        """Name how many runs were given up, why, and the way out."""
        if not self.reasons:
            return
        key, reason = next(iter(self.reasons.items()))
        raise ProxyError(
            f"{len(self.reasons)} of {len(self.reasons) + self.n_done} proxy runs failed; the "
            f"others are kept. The first is {key}, tried {self.tries[key]} times: {reason} "
            f"The reason of each is in {self.store.place('failed')}. Remove the cause (if memory "
            "was short: fewer backend.workers or a smaller proxy.models_per_stack), then "
            "materialise again: only what failed is trained."
        )


def _from_anywhere(store: RunStore) -> RunStore:
    """The store with a path that holds in a worker that started in another folder."""
    return replace(store, root=store.root.absolute()) if isinstance(store.root, Path) else store


def train_stack_of_specs(
    store: RunStore,
    specs: Sequence[ProxySpec],
    n_models: int,
    device: str,
) -> list[ProxyRecord]:
    """Train the specs that still lack a record, keep and return the records of all.

    Args:
        store: where records and what a run reads are.
        specs: at most `n_models` runs of one proxy configuration.
        n_models: models of the stack, K.
        device: torch device.
    """
    keys = [spec.key for spec in specs]
    with store.disk_full_told(), store.locked(keys):
        store.quarantine_damaged(keys)
        todo = store.missing(specs)
        if todo:
            for record in _train(store, todo, n_models, device):
                store.put(record)
    records = [store.get(key) for key in keys]
    assert all(records)
    return [record for record in records if record is not None]


def _train(
    store: RunStore, specs: Sequence[ProxySpec], n_models: int, device: str
) -> list[ProxyRecord]:
    config = specs[0].config
    if isinstance(config, ProxyConfig):
        static = [spec for spec in specs if spec.controller is None]
        records = _train_stack(store, static, config, n_models, device) if static else []
        controlled = [spec for spec in specs if spec.controller is not None]
        return records + [_train_controlled(store, spec, device) for spec in controlled]
    from causalmix_pipeline.adapters.pretrained_proxy import train_pretrained

    evaluation = store.evaluation(specs[0].eval_hash)
    return [train_pretrained(store, spec, device=device, evaluation=evaluation) for spec in specs]


def _train_stack(
    store: RunStore, specs: Sequence[ProxySpec], config: ProxyConfig, n_models: int, device: str
) -> list[ProxyRecord]:
    import torch  # noqa: F401  # loaded here, so that it's no run's time

    from causalmix_pipeline.adapters.task_scores import score_stack_questions
    from causalmix_pipeline.adapters.torch_proxy import train_stack

    evaluation = store.evaluation(specs[0].eval_hash)
    feeds = [RunFeed(store, spec) for spec in specs]
    feeds += [feeds[-1]] * (n_models - len(feeds))

    def next_batch(step: int) -> np.ndarray:
        return np.stack([feed.batch(step) for feed in feeds])  # (K, B, L + 1)

    def score(stack: StackedQwen2) -> dict[str, np.ndarray]:
        return score_stack_questions(stack, evaluation.questions, evaluation.tokenizer)

    wall, cpu = time.perf_counter(), time.process_time()
    result = train_stack(
        config,
        next_batch,
        n_models,
        evaluation.windows,
        device=device,
        score=score if evaluation.questions else None,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return [
        _record(
            spec, result, k, evaluation, epochs=feeds[k].epochs, cpu=cpu / len(specs), wall=wall
        )
        for k, spec in enumerate(specs)
    ]


def _train_controlled(store: RunStore, spec: ProxySpec, device: str) -> ProxyRecord:
    """Train a run whose mixture is set by its controller."""
    import torch  # noqa: F401  # loaded here, so that it's no run's time

    from causalmix_pipeline.adapters.controlled_proxy import train_controlled

    assert spec.controller is not None
    evaluation = store.evaluation(spec.eval_hash)
    done = train_controlled(store, spec, spec.controller, evaluation, device=device)
    result = done.result
    record = _record(
        spec, result, 0, evaluation,
        epochs=done.epochs, cpu=result.cpu_seconds, wall=result.seconds,
    )  # fmt: skip
    return replace(record, control=done.control)


def _record(
    spec: ProxySpec,
    result: StackResult,
    k: int,
    evaluation: EvalWindows,
    *,
    epochs: list[float],
    cpu: float,
    wall: float,
) -> ProxyRecord:
    """The record of the k-th model of a stack."""
    nats = {task: float(values[k]) for task, values in result.eval_nats.items()}
    return ProxyRecord(
        key=spec.key,
        spec=spec.to_dict(),
        bits_per_byte={t: bits_per_byte(n, evaluation.n_bytes[t]) for t, n in nats.items()},
        nats_per_token={t: n / result.eval_tokens[t] for t, n in nats.items()},
        train_loss=[float(loss) for loss in result.train_loss_KS[k]],
        diverged=bool(result.diverged_K[k]),
        cpu_seconds=cpu,
        scores={task: float(score_K[k]) for task, score_K in result.scores.items()},
        epochs=epochs,
        seconds=wall,
    )
