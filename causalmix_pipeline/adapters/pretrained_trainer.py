"""Trains a pretrained model step by step: what it reads, its optimiser, its checkpoints.

Weights, optimiser and sums of gradients are fp32. A killed run goes on from its last checkpoint
with the same bits, on one device.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from causalmix_pipeline.adapters.blobs import write_atomically
from causalmix_pipeline.adapters.packed_samples import (
    PackedDomain,
    SequenceRows,
    pack_domain,
    token_schedule,
)
from causalmix_pipeline.adapters.pretrained_model import autocast, summed_loss
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.torch_proxy import is_out_of_memory
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec

logger = logging.getLogger(__name__)

#: Stretches of the steps over which the training loss is averaged.
TRAIN_LOSS_POINTS = 20
#: Checkpoints that are kept: the last one, and one that was whole before it.
N_CHECKPOINTS = 2

Progress = Callable[[int, float], None]


# --- what a run reads


class FeedLike(Protocol):
    """What a trainer reads, step by step: `Feed`, or a feed that a controller steers."""

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the run."""
        ...

    @property
    def epochs_D(self) -> np.ndarray:
        """How often each domain was read."""
        ...

    def rows(self, step: int) -> list[SequenceRows]:
        """The sequences of a step."""
        ...


@dataclass(frozen=True, eq=False)
class Feed:
    """The packed sequences of a run, step by step.

    All runs of a recipe have the same number of steps; where sequences have padding, a step has
    more of them, so that it has about the same tokens.

    Attributes:
        tokens: all token ids of the store.
        packed: sequences of each domain.
        domain_W, sequence_W: what is read when.
        n_steps: optimiser steps.
        epochs_D: how often each domain is read.
    """

    tokens: np.ndarray
    packed: list[PackedDomain]
    domain_W: np.ndarray
    sequence_W: np.ndarray
    n_steps: int
    epochs_D: np.ndarray

    @classmethod
    def of(cls, store: RunStore, spec: ProxySpec) -> Feed:
        """Pack the documents of a spec's pool state and schedule them by its mixture.

        Raises:
            ProxyError: if a domain with a share has no token to learn.
        """
        config = spec.config
        assert isinstance(config, PretrainedConfig)
        packed = pack_state(store, spec, np.array(spec.mixture))
        schedule = token_schedule(
            np.array(spec.mixture),
            [domain.tokens_S for domain in packed],
            config.tokens,
            seed=spec.data_seed,
            order_seed=int(spec.state_hash[:15], 16),
        )
        return cls(
            tokens=store.token_store(spec.tokens_hash).tokens(),
            packed=packed,
            domain_W=schedule.domain_W,
            sequence_W=schedule.sequence_W,
            n_steps=min(config.steps, len(schedule)),
            epochs_D=schedule.epochs_D,
        )

    def rows(self, step: int) -> list[SequenceRows]:
        """The sequences of a step."""
        n = len(self.domain_W)
        slots = range(step * n // self.n_steps, (step + 1) * n // self.n_steps)
        return [self.packed[self.domain_W[w]].rows(self.tokens, self.sequence_W[w]) for w in slots]


def pack_state(store: RunStore, spec: ProxySpec, shares_D: np.ndarray) -> list[PackedDomain]:
    """The packed sequences of each domain of a spec's pool state.

    Args:
        store: has the pool state and its tokens.
        spec: the run.
        shares_D: positive for the domains that the run reads.

    Raises:
        ProxyError: if a domain that is read has no token to learn.
    """
    config = spec.config
    assert isinstance(config, PretrainedConfig)
    tokens = store.token_store(spec.tokens_hash)
    packed = [
        pack_domain(tokens, ids, length=config.sequence_length, response_only=config.response_only)
        for ids in store.state(spec.state_hash)
    ]
    for d, (domain, share) in enumerate(zip(packed, shares_D, strict=True)):
        if domain.n_truncated or domain.n_dropped:
            logger.info(
                "domain %d: %d samples cut at proxy.sequence_length, %d without any token to "
                "learn left out",
                d,
                domain.n_truncated,
                domain.n_dropped,
            )
        if share > 0 and not len(domain):
            raise ProxyError(
                f"domain {d} of pool state {spec.state_hash} must have a token to learn within "
                f"proxy.sequence_length ({config.sequence_length}), got none. Raise it above "
                "the prompts' length, or leave the domain out."
            )
    return packed


# --- training


@dataclass
class History:
    """What happened so far, and what a checkpoint keeps of it besides tensors.

    Attributes:
        step: finished optimiser steps.
        micro_batch: sequences held at once.
        nats: summed loss of each step.
        n_losses: tokens with loss of each step.
        seconds, cpu_seconds: what it cost, over restarts.
        diverged: a loss or gradient wasn't finite.
        control: state of the run's controller; None in a static run.
    """

    step: int
    micro_batch: int
    nats: list[float] = field(default_factory=list)
    n_losses: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    diverged: bool = False
    control: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Start the clocks."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def take_time(self) -> None:
        """Add the time since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds += wall - self._wall
        self.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu

    def train_loss(self) -> list[float]:
        """Nats per token over equal stretches of the steps; infinity where no step was finite."""
        if not self.nats:
            return [math.inf]
        nats, counts = np.array(self.nats), np.array(self.n_losses)
        n_points = min(TRAIN_LOSS_POINTS, len(nats))
        ends = [len(nats) * point // n_points for point in range(n_points + 1)]
        return [
            float(nats[start:end].sum() / counts[start:end].sum()) for start, end in pairwise(ends)
        ]


class Trainer:
    """Trains a model over the steps of its feed."""

    def __init__(
        self,
        model: Any,
        config: PretrainedConfig,
        device: str,
        feed: FeedLike,
        checkpoints: Checkpoints,
    ) -> None:
        """Start, or go on from the last checkpoint."""
        import torch

        self.model, self.config, self.device, self.feed = model, config, device, feed
        self.checkpoints = checkpoints
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim >= 2]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=device.startswith("cuda"),
        )
        self.history = checkpoints.load(self) or History(0, config.micro_batch)
        self.history.micro_batch = min(self.history.micro_batch, config.micro_batch)

    def train(self, progress: Progress | None = None) -> History:
        """Run the steps that are left."""
        history, n_steps = self.history, self.feed.n_steps
        self.model.train()
        while history.step < n_steps and not history.diverged:
            rows = self.feed.rows(history.step)
            n_losses = sum(int(row.has_loss_L.sum()) for row in rows)
            nats = self._gradients(rows, n_losses)
            if not self._update(nats):
                history.diverged = True
                logger.warning("loss or gradient of step %d isn't finite: stopped", history.step)
                break
            history.nats.append(nats)
            history.n_losses.append(n_losses)
            history.step += 1
            if progress is not None:
                progress(history.step, nats / n_losses)
            self._after_step()
        return history

    def _after_step(self) -> None:
        """Keep a checkpoint where it is time."""
        step = self.history.step
        if step % self.config.checkpoint_steps == 0 or step == self.feed.n_steps:
            self.save()

    def save(self) -> None:
        """Keep a checkpoint."""
        self.history.take_time()
        self.checkpoints.save(self)

    def told(self) -> dict[str, Any] | None:
        """What a controller did, for the run's record; None without one."""
        return None

    def _gradients(self, rows: Sequence[SequenceRows], n_losses: int) -> float:
        """Summed nats of a step, its gradients over the step's tokens left in the weights.

        Where memory runs out, the step begins again with half as many sequences at once.
        """
        while True:
            nats = self._try_gradients(rows, n_losses)
            if nats is not None:
                return nats
            self.history.micro_batch = halved(self.history.micro_batch, self.config, self.device)

    def _try_gradients(self, rows: Sequence[SequenceRows], n_losses: int) -> float | None:
        """As `_gradients`; None if memory ran out."""
        self.optimiser.zero_grad(set_to_none=True)
        size, total = self.history.micro_batch, 0.0
        try:
            for at in range(0, len(rows), size):
                with autocast(self.config, self.device):
                    nats = summed_loss(self.model, rows[at : at + size], self.device)
                (nats / n_losses).backward()
                total += float(nats.detach())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return total

    def _update(self, nats: float) -> bool:
        """Change the weights by the gradients; False, and no change, if they aren't finite."""
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip)
        if not (math.isfinite(nats) and bool(norm.isfinite())):
            return False
        rate = self.config.learning_rate_at(self.history.step, self.feed.n_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return True


def halved(micro_batch: int, config: PretrainedConfig, device: str) -> int:
    """Half as many sequences at once, after what was held is given back.

    Raises:
        ProxyError: if it was one already.
    """
    import torch

    if micro_batch == 1:
        raise no_memory(config, device)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    logger.warning("out of memory with %d sequences at once: %d now", micro_batch, micro_batch // 2)
    return micro_batch // 2


def no_memory(config: PretrainedConfig, device: str) -> ProxyError:
    """The error where not even one sequence fits."""
    return ProxyError(
        f"proxy.micro_batch must fit the memory of {device}, but it ran out with 1 sequence of "
        f"{config.sequence_length} tokens. Set proxy.overrides.gradient_checkpointing to true or "
        "method to lora, lower sequence_length, or take a device with more memory."
    )


# --- checkpoints


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: safetensors and JSON in a folder each, whole or absent.

    Attributes:
        folder: of the run; made with the first checkpoint.
    """

    folder: Path

    def save(self, trainer: Trainer) -> None:
        """Keep weights, optimiser, random state and history; older checkpoints go.

        Raises:
            OSError: if the disk is full.
            ProxyError: if they can't be written otherwise.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = f"step-{trainer.history.step:08d}"
        building = self.folder / f".{name}.building"
        try:
            shutil.rmtree(building, ignore_errors=True)  # of a killed process
            building.mkdir(parents=True)
            sums = {}
            for file, tensors in _tensors_of(trainer).items():
                save_file(tensors, building / file)
                with open(building / file, "rb+") as written:
                    sums[file] = hashlib.file_digest(written, "sha256").hexdigest()
                    os.fsync(written.fileno())
            state = {"history": asdict(trainer.history), "sha256": sums}
            write_atomically(building / "state.json", json.dumps(state).encode())
            shutil.rmtree(self.folder / name, ignore_errors=True)
            building.rename(self.folder / name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            full = errno.ENOSPC
            if getattr(error, "errno", None) == full or f"os error {full}" in str(error):
                raise OSError(full, os.strerror(full), str(self.folder)) from error
            raise ProxyError(
                f"the checkpoint of a proxy run can't be written to {self.folder}: {error}. Free "
                "the disk, or raise proxy.overrides.checkpoint_steps; the run goes on from its "
                "last checkpoint."
            ) from error
        for old in self._names()[:-N_CHECKPOINTS]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def load(self, trainer: Trainer) -> History | None:
        """Put the last whole checkpoint into a trainer; a damaged one is removed.

        Returns:
            Its history, or None if there is none.
        """
        for name in reversed(self._names()):
            folder = self.folder / name
            try:
                state = json.loads((folder / "state.json").read_bytes())
                history = History(**state["history"])
                for file, expected in state["sha256"].items():
                    with open(folder / file, "rb") as content:
                        if hashlib.file_digest(content, "sha256").hexdigest() != expected:
                            raise ValueError(f"{file} differs from its checksum")
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("checkpoint %s is damaged (%s): removed", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            _restore(trainer, folder)
            return history
        return None

    def _names(self) -> list[str]:
        """The whole checkpoints, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*"))


def _tensors_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps in tensors, by file."""
    import torch

    moments = {
        f"{number}.{name}": value
        for number, state in trainer.optimiser.state_dict()["state"].items()
        for name, value in state.items()
    }
    random = {"cpu": torch.get_rng_state()}
    if trainer.device.startswith("cuda"):
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    weights = {name: value.detach().contiguous() for name, value in trainer.trained.items()}
    return {
        "weights.safetensors": weights,
        "optimiser.safetensors": moments,
        "random.safetensors": random,
    }


def _restore(trainer: Trainer, folder: Path) -> None:
    """Inverse of `_tensors_of`."""
    import torch
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, value in load_file(folder / "weights.safetensors").items():
            trainer.trained[name].copy_(value)
    state: dict[int, dict[str, Any]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        number, moment = name.split(".")
        state.setdefault(int(number), {})[moment] = value
    groups = trainer.optimiser.state_dict()["param_groups"]
    trainer.optimiser.load_state_dict({"state": state, "param_groups": groups})
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], trainer.device)
