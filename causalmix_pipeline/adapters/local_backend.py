"""Trains proxy runs in workers: processes of this machine, or a cluster's.

A worker trains a stack of models of one size at a time (`torch_proxy`), each model on its own
windows. A stack is always full: a short one is filled up with copies, so that every run is
computed with the same tensor shapes and gives the same bits whatever it is stacked with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.run_store import RunStore, bits_per_byte
from causalmix_pipeline.adapters.tokenizer import cut_windows
from causalmix_pipeline.core.errors import ProxyError, WorkError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.token_sampler import window_counts, window_schedule
from causalmix_pipeline.core.work import WorkBackend


def engine_name() -> str:
    """The engine and the versions that decide a run's bits."""
    from importlib.metadata import version

    return f"stacked-torch-{version('torch').split('+')[0]}"


@dataclass(frozen=True)
class LocalBackend:
    """Trains proxy runs in workers; of this machine, unless others are given.

    Attributes:
        store: where records, states, tokens and evaluation windows are; workers on other machines
            must reach it.
        n_workers: worker processes of this machine; 0 takes one per core. Unused with `workers`.
        models_per_stack: models trained together in one worker.
        device: torch device of the workers.
        workers: where stacks are trained; None takes processes of this machine.
    """

    store: RunStore
    n_workers: int = 0
    models_per_stack: int = 4
    device: str = "cpu"
    workers: WorkBackend | None = None

    def train(
        self, specs: Sequence[ProxySpec], on_done: Callable[[Sequence[ProxyRecord]], None]
    ) -> None:
        """Train each spec that has no record yet and keep its record.

        Raises:
            ProxyError: if workers die again and again, or can't be reached; finished runs are kept.
        """
        workers = self.workers or LocalWorkers(self.n_workers)
        train = partial(
            train_stack_of_specs,
            _from_anywhere(self.store),
            n_models=self.models_per_stack,
            device=self.device,
        )
        stacks = self._stacks(self.store.missing(specs))
        try:
            workers.run(train, stacks, lambda _, records: on_done(records))
        except WorkError as error:
            raise ProxyError(
                f"proxy runs stopped: {error} Finished runs are kept: start again to go on, with "
                "fewer backend.workers or a smaller proxy.models_per_stack if memory was short."
            ) from error

    def _stacks(self, specs: Sequence[ProxySpec]) -> list[list[ProxySpec]]:
        """Group specs of one model and one token store, neighbours of one state together."""
        groups: dict[tuple, list[ProxySpec]] = {}
        for spec in specs:
            groups.setdefault((spec.config, spec.tokens_hash, spec.eval_hash), []).append(spec)
        size = self.models_per_stack
        return [
            group[i : i + size] for group in groups.values() for i in range(0, len(group), size)
        ]


def _from_anywhere(store: RunStore) -> RunStore:
    """The store with a path that holds in a worker that started in another folder."""
    return replace(store, root=store.root.absolute()) if isinstance(store.root, Path) else store


def train_stack_of_specs(
    store: RunStore, specs: Sequence[ProxySpec], n_models: int, device: str
) -> list[ProxyRecord]:
    """Train the specs that still lack a record, keep and return the records of all.

    Args:
        store: where records and what a run reads are.
        specs: at most `n_models` runs of one proxy configuration.
        n_models: models of the stack, K.
        device: torch device.
    """
    with store.locked([spec.key for spec in specs]):
        todo = store.missing(specs)
        if todo:
            for record in _train(store, todo, n_models, device):
                store.put(record)
    records = [store.get(spec.key) for spec in specs]
    assert all(records)
    return [record for record in records if record is not None]


def _train(
    store: RunStore, specs: Sequence[ProxySpec], n_models: int, device: str
) -> list[ProxyRecord]:
    from causalmix_pipeline.adapters.torch_proxy import train_stack

    config = specs[0].config
    evaluation = store.evaluation(specs[0].eval_hash)
    feeds = [_Feed(store, spec) for spec in specs]
    feeds += [feeds[-1]] * (n_models - len(feeds))

    def next_batch(step: int) -> np.ndarray:
        return np.stack([feed.batch(step) for feed in feeds])  # (K, B, L + 1)

    started = time.process_time()
    result = train_stack(config, next_batch, n_models, evaluation.windows, device=device)
    cpu_seconds = (time.process_time() - started) / len(specs)
    records = []
    for k, spec in enumerate(specs):
        nats = {task: float(values[k]) for task, values in result.eval_nats.items()}
        predicted = {task: windows[:, 1:].size for task, windows in evaluation.windows.items()}
        records.append(
            ProxyRecord(
                key=spec.key,
                spec=spec.to_dict(),
                bits_per_byte={t: bits_per_byte(n, evaluation.n_bytes[t]) for t, n in nats.items()},
                nats_per_token={t: n / predicted[t] for t, n in nats.items()},
                train_loss=[float(loss) for loss in result.train_loss_KS[k]],
                diverged=bool(result.diverged_K[k]),
                cpu_seconds=cpu_seconds,
            )
        )
    return records


class _Feed:
    """The windows that one run reads, step by step."""

    def __init__(self, store: RunStore, spec: ProxySpec) -> None:
        config = spec.config
        tokens_of = store.token_store(spec.tokens_hash)
        tokens, offsets = tokens_of.tokens(), tokens_of.offsets()
        order_seed = int(spec.state_hash[:15], 16)
        counts_D = window_counts(np.array(spec.mixture), config.steps * config.batch_size)
        windows = [
            cut_windows(tokens, offsets, tokens_of.positions(ids), config.sequence_length)
            for ids in store.state(spec.state_hash)
        ]
        starts = np.cumsum([0, *(len(w) for w in windows)])
        domain_W, window_W = window_schedule(
            counts_D,
            np.array([len(w) for w in windows]),
            seed=spec.data_seed,
            order_seed=order_seed,
        )
        self.windows = np.concatenate(windows)
        self.order = starts[domain_W] + window_W
        self.batch_size = config.batch_size

    def batch(self, step: int) -> np.ndarray:
        """Token ids of one step; shape (B, L + 1)."""
        slots = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        return self.windows[slots].astype(np.int64)
