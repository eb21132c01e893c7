"""Fine-tunes a pretrained causal language model as a proxy, and scores it on every task.

Weights, optimiser and sums of gradients are fp32, products bfloat16 where asked. Sequences are
packed: positions restart with each document and there is no attention mask, from which transformers
tells documents apart; a model that doesn't is refused. A killed run goes on from its last
checkpoint with the same bits, on one device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.controlled_pretrained import controlled_trainer
from causalmix_pipeline.adapters.packed_samples import SequenceRows
from causalmix_pipeline.adapters.pretrained_model import autocast, load_model, summed_loss
from causalmix_pipeline.adapters.pretrained_trainer import (
    Checkpoints,
    Feed,
    History,
    Progress,
    Trainer,
    no_memory,
)
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore, bits_per_byte
from causalmix_pipeline.adapters.torch_proxy import is_out_of_memory
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import DIVERGENCE_MARGIN
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec

_LIBRARIES = ("torch", "transformers", "peft")


def pretrained_engine_name(device: str = "cpu") -> str:
    """The engine, the versions and the kind of device that decide a run's bits."""
    kind = device.split(":")[0]
    libraries = [f"{name}-{_version(name)}" for name in _LIBRARIES]
    return "-".join(["pretrained", *libraries, *([] if kind == "cpu" else [kind])])


def _version(library: str) -> str:
    try:
        return version(library).split("+")[0]
    except PackageNotFoundError:
        return "absent"


def train_pretrained(
    store: RunStore,
    spec: ProxySpec,
    *,
    device: str,
    evaluation: EvalWindows,
    progress: Progress | None = None,
) -> ProxyRecord:
    """Fine-tune one model on one mixture and score it; the record isn't stored yet.

    Its checkpoints are in `store.scratch(spec.key)`, which the store removes with the record.

    Args:
        store: has the spec's pool state and tokens.
        spec: of a run with a `PretrainedConfig`.
        device: where torch computes, such as "cpu" or "cuda".
        evaluation: what the spec's `eval_hash` names, in the tokens of the model.
        progress: called after each optimiser step with the number of finished steps and the
            step's loss, nats per token.

    Raises:
        ConfigError: if the model can't be loaded or isn't the one that the spec means.
        ProxyError: if memory runs out even with one sequence at a time, documents of a sequence
            would see each other, or a checkpoint can't be written.
    """
    config = spec.config
    assert isinstance(config, PretrainedConfig)
    with _settled(device), _memory_named(config, device):
        trainer = _trainer(store, spec, config, device)
        model, feed = trainer.model, trainer.feed
        history = trainer.train(progress)
        # A model that a NaN has reached has nothing to say.
        scores = {} if history.diverged else _score(model, config, device, evaluation)
    history.take_time()
    diverged = history.diverged or _left_the_range(history, scores, model)
    nats = {} if diverged else scores.get("nats", {})
    predicted = {task: windows[:, 1:].size for task, windows in evaluation.windows.items()}
    return ProxyRecord(
        key=spec.key,
        spec=spec.to_dict(),
        bits_per_byte={t: bits_per_byte(n, evaluation.n_bytes[t]) for t, n in nats.items()},
        nats_per_token={t: n / predicted[t] for t, n in nats.items()},
        train_loss=history.train_loss(),
        diverged=diverged,
        cpu_seconds=history.cpu_seconds,
        scores={} if diverged else scores.get("scores", {}),
        epochs=[float(epochs) for epochs in feed.epochs_D],
        seconds=history.seconds,
        control=trainer.told(),
    )


def _trainer(store: RunStore, spec: ProxySpec, config: PretrainedConfig, device: str) -> Trainer:
    """The trainer of a run, its model loaded; of its controller where it has one."""
    if spec.controller is not None:
        return controlled_trainer(store, spec, spec.controller, device)
    feed = Feed.of(store, spec)
    model = load_model(config, device)
    return Trainer(model, config, device, feed, Checkpoints(store.scratch(spec.key)))


def _left_the_range(history: History, scores: dict[str, dict[str, float]], model: Any) -> bool:
    """Whether losses left the range where they mean something."""
    limit = math.log(model.config.get_text_config().vocab_size) + DIVERGENCE_MARGIN
    return not history.train_loss()[-1] <= limit or not all(
        math.isfinite(nats) for nats in scores["nats"].values()
    )


@contextmanager
def _settled(device: str) -> Iterator[None]:
    """What the bits of a run on one device depend on: threads on a CPU, kernels on a GPU."""
    import torch

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    if device.startswith("cuda"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _memory_named(config: PretrainedConfig, device: str) -> Iterator[None]:
    """Say what to do where memory runs out and a smaller micro-batch doesn't help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise no_memory(config, device) from error
        raise


def _score(
    model: Any, config: PretrainedConfig, device: str, evaluation: EvalWindows
) -> dict[str, dict[str, float]]:
    """`nats`: summed held-out loss of each task; `scores`: of the tasks that are questions."""
    model.eval()
    with autocast(config, device):
        nats = {
            task: _window_nats(model, windows, config, device)
            for task, windows in evaluation.windows.items()
        }
        scores: dict[str, float] = {}
        if evaluation.questions:
            from causalmix_pipeline.adapters.task_scores import score_questions

            scores |= score_questions(
                model, evaluation.questions, evaluation.tokenizer, device=device
            )
        if evaluation.harness:
            from causalmix_pipeline.adapters.lm_eval_tasks import score_harness

            scores |= score_harness(model, evaluation.harness, evaluation.tokenizer, device=device)
    return {"nats": nats, "scores": scores}


def _window_nats(
    model: Any, windows_WL: np.ndarray, config: PretrainedConfig, device: str
) -> float:
    """Summed nats of all predicted tokens of windows."""
    import torch

    position_L = np.arange(windows_WL.shape[1])
    has_loss_L = position_L > 0
    rows = [
        SequenceRows(ids_L.astype(np.int64), position_L, has_loss_L, len(ids_L))
        for ids_L in windows_WL
    ]
    total = 0.0
    with torch.no_grad():
        for row in rows:  # one by one, so that the sum doesn't depend on memory
            total += float(summed_loss(model, [row], device))
    return total
