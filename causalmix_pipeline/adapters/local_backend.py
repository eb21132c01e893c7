"""Trains proxy runs in worker processes on this machine, one per core or device.

A worker trains a stack of models of one size at a time (`torch_proxy`), each model on its own
windows. A stack is always full: a short one is filled up with copies, so that every run is
computed with the same tensor shapes and gives the same bits whatever it is stacked with.
Workers end when their parent does.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from causalmix_pipeline.adapters.run_store import RunStore, bits_per_byte
from causalmix_pipeline.adapters.tokenizer import cut_windows
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.token_sampler import window_counts, window_schedule


def engine_name() -> str:
    """The engine and the versions that decide a run's bits."""
    from importlib.metadata import version

    return f"stacked-torch-{version('torch').split('+')[0]}"


@dataclass(frozen=True)
class LocalBackend:
    """Worker processes on this machine.

    Attributes:
        store: where records, states, tokens and evaluation windows are.
        n_workers: worker processes; 0 takes one per core.
        models_per_stack: models trained together in one worker.
        device: torch device of the workers.
    """

    store: RunStore
    n_workers: int = 0
    models_per_stack: int = 4
    device: str = "cpu"

    def train(
        self, specs: Sequence[ProxySpec], on_done: Callable[[Sequence[ProxyRecord]], None]
    ) -> None:
        """Train each spec that has no record yet and keep its record.

        Raises:
            ProxyError: if a worker dies; finished runs are kept.
        """
        stacks = self._stacks(self.store.missing(specs))
        if not stacks:
            return
        n_workers = min(self.n_workers or os.cpu_count() or 1, len(stacks))
        executor = ProcessPoolExecutor(
            n_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(os.getpid(),),
        )
        try:
            futures = [
                executor.submit(train_stack_of_specs, self.store.root, stack, self.models_per_stack,
                                self.device)
                for stack in stacks
            ]  # fmt: skip
            for future in as_completed(futures):
                on_done(future.result())
        except BrokenProcessPool as error:
            raise ProxyError(
                "a proxy worker died before its runs ended (killed, or out of memory). Finished "
                "runs are kept: start again to go on, with fewer proxy.workers or a smaller "
                "proxy.models_per_stack if memory was short."
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _stacks(self, specs: Sequence[ProxySpec]) -> list[list[ProxySpec]]:
        """Group specs of one model and one token store, neighbours of one state together."""
        groups: dict[tuple, list[ProxySpec]] = {}
        for spec in specs:
            groups.setdefault((spec.config, spec.tokens_hash, spec.eval_hash), []).append(spec)
        size = self.models_per_stack
        return [
            group[i : i + size] for group in groups.values() for i in range(0, len(group), size)
        ]


def _start_worker(parent: int) -> None:
    """Keep the worker to one thread, and end it when its parent is gone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_stack_of_specs(
    root: Path, specs: Sequence[ProxySpec], n_models: int, device: str
) -> list[ProxyRecord]:
    """Train the specs that still lack a record, keep and return the records of all.

    Args:
        root: of the run store.
        specs: at most `n_models` runs of one proxy configuration.
        n_models: models of the stack, K.
        device: torch device.
    """
    store = RunStore(root)
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
