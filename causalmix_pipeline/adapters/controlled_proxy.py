"""Trains one tiny proxy model under a controller that sets its mixture block by block.

Model, optimiser and evaluation are those of a static run (`torch_proxy`), one model at a time; a
run of one block gives a static run's bits, one of more blocks reads the same windows in another
order even where its mixture never changes. At the end of a block the controller may ask for a
probe: some training windows of each domain, the same for all runs of a pool state. A run that takes
long is kept at the ends of blocks, and goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from causalmix_pipeline.adapters.blobs import write_atomically
from causalmix_pipeline.adapters.run_feed import RunFeed, windows_of_state
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore
from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2
from causalmix_pipeline.adapters.torch_proxy import (
    TRAIN_LOSS_POINTS,
    StackedAdamW,
    diverged_models,
    is_out_of_memory,
    one_thread,
    short_of_memory,
    train_steps,
)
from causalmix_pipeline.core.controlled_run import ControlledRun
from causalmix_pipeline.core.controllers import BlockSeen, ControllerConfig, Probe
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig, StackResult
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.token_sampler import BlockSampler, probe_items

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Seconds between two checkpoints: a run that takes less starts over when it was killed.
CHECKPOINT_SECONDS = 20.0
#: Weights of a gradient that are compared at once.
GRAM_WEIGHTS = 1_000_000


@dataclass(frozen=True)
class ControlledResult:
    """What a controlled run gave.

    Attributes:
        result: as of a stack of one model.
        control: what the controller did and cost (`ControlledRun.told`).
        epochs: how often each domain was read.
    """

    result: StackResult
    control: dict[str, Any]
    epochs: list[float]


def train_controlled(
    store: RunStore,
    spec: ProxySpec,
    controller: ControllerConfig,
    evaluation: EvalWindows,
    *,
    device: str = "cpu",
) -> ControlledResult:
    """Train one proxy model, its mixture set by a controller, and score it on every task.

    Its checkpoint is in `store.scratch(spec.key)`, which the store removes with the record.

    Args:
        store: has the spec's pool state and tokens.
        spec: the run; its mixture is where the controller starts.
        controller: the rule, `spec.controller` but for tests.
        evaluation: what the spec's `eval_hash` names.
        device: where torch computes.

    Raises:
        ConfigError: if the controller's settings don't fit the run.
        ProxyError: if memory is too short, or a domain with a share has nothing to read.
    """
    config = spec.config
    assert isinstance(config, ProxyConfig)
    with one_thread():
        try:
            return _Training(store, spec, controller, device).run(evaluation)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ProxyError(short_of_memory(config, 1)) from error


class BlockFeed:
    """The windows that a run reads, block by block.

    Attributes:
        windows_of: windows of each domain.
        sampler: which is read when.
    """

    def __init__(self, store: RunStore, spec: ProxySpec) -> None:
        """Find the windows of the spec's pool state."""
        config = spec.config
        assert isinstance(config, ProxyConfig)
        self.windows, self.starts = windows_of_state(
            store, spec.tokens_hash, spec.state_hash, config.sequence_length
        )
        self.order_seed = int(spec.state_hash[:15], 16)
        self.batch_size = config.batch_size
        self.sampler = BlockSampler(
            np.diff(self.starts), seed=spec.data_seed, order_seed=self.order_seed
        )

    def begin(self, shares_D: np.ndarray, span: tuple[int, int]) -> None:
        """Choose the windows of the steps of a block."""
        self.first_step = span[0]
        self.domain_W, window_W = self.sampler.next_block(
            shares_D, (span[1] - span[0]) * self.batch_size
        )
        self.place_W = self.starts[self.domain_W] + window_W

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Domains (B,) and token ids (B, L + 1) of one step of the block."""
        at = (step - self.first_step) * self.batch_size
        slots = slice(at, at + self.batch_size)
        return self.domain_W[slots], self.windows[self.place_W[slots]].astype(np.int64)

    def probed(self, domain: int, count: int, block: int) -> np.ndarray:
        """Windows (W, L + 1) of a domain for the probe at the end of a block."""
        size = int(self.sampler.available_D[domain])
        chosen = probe_items(size, count, seed=[self.order_seed, domain, block + 1])
        return self.windows[self.starts[domain] + chosen].astype(np.int64)

    @property
    def epochs(self) -> list[float]:
        """How often each domain was read so far."""
        available_D = np.maximum(self.sampler.available_D, 1)
        return [float(epochs) for epochs in self.sampler.read_D / available_D]


class _Training:
    """One run: its model, what it reads, its controller."""

    def __init__(
        self, store: RunStore, spec: ProxySpec, controller: ControllerConfig, device: str
    ) -> None:
        config = spec.config
        assert isinstance(config, ProxyConfig)
        self.config, self.wall, self.cpu = config, time.perf_counter(), time.process_time()
        self.seconds = self.cpu_seconds = 0.0
        self.feed = BlockFeed(store, spec)
        self.spec, self.controller = spec, controller
        self.control = self._new_control()
        self.model = StackedQwen2(config, 1, device=device)
        self.optimiser = StackedAdamW(self.model)
        self.losses: list[float] = []
        self.reference: StackedQwen2 | None = None
        self.checkpoint = store.scratch(spec.key) / "controlled.npz"
        if controller.needs_reference:
            self.reference = StackedQwen2(config, 1, device=device)
        resumed = self.load()
        if self.reference is not None and not resumed:
            feed = RunFeed(store, spec)
            train_steps(self.reference, lambda step: feed.batch(step)[None])
            self.control.extra.reference_tokens += config.tokens
            self.save()

    def _new_control(self) -> ControlledRun:
        return ControlledRun(
            self.controller,
            np.array(self.spec.mixture),
            steps=self.config.steps,
            seed=self.spec.data_seed,
        )

    def run(self, evaluation: EvalWindows) -> ControlledResult:
        """Train the blocks that are left, and score the model."""
        kept = time.perf_counter()
        while self.control.block < len(self.control.ends):
            self._train_block()
            if time.perf_counter() - kept >= CHECKPOINT_SECONDS:
                self.save()
                kept = time.perf_counter()
        return ControlledResult(self._result(evaluation), self.control.told(), self.feed.epochs)

    def _train_block(self) -> None:
        """Train the steps of a block and tell the controller."""
        config, control = self.config, self.control
        self.feed.begin(control.shares_D, control.span)
        nats_D = np.zeros(len(control.active_D))
        for step in range(*control.span):
            domain_B, tokens_BL = self.feed.batch(step)
            self.losses.append(float(self.model.loss_and_gradients(tokens_BL[None])))
            nats_B = self.model.last_token_nats().reshape(len(domain_B), -1).sum(1, dtype=float)
            np.add.at(nats_D, domain_B, nats_B)
            self.optimiser.step(config.learning_rate_at(step))
        tokens_D = np.bincount(self.feed.domain_W, minlength=len(nats_D)) * config.sequence_length
        loss_D = np.divide(nats_D, tokens_D, out=np.full(len(nats_D), np.nan), where=tokens_D > 0)
        probe = None if control.is_last else self._probe()
        control.see(BlockSeen(control.span[1], config.steps, loss_D, tokens_D, probe))

    def _probe(self) -> Probe | None:
        """What the controller asks for of each domain that it may read."""
        control, asked = self.control, self.control.config
        if not asked.n_probed:
            return None
        loss_D = np.full(len(control.active_D), np.nan)
        excess_D, gradients = loss_D.copy(), {}
        for d in np.flatnonzero(control.active_D).tolist():
            windows_WL = self.feed.probed(d, asked.n_probed, control.block)
            n_tokens = windows_WL[:, 1:].size
            if asked.needs_gradients:
                loss_D[d] = float(self.model.loss_and_gradients(windows_WL[None]))
                gradients[d] = self.model.flat_gradients["matrices"][0].clone()
                control.extra.backward_tokens += n_tokens
                continue
            nats = self.model.token_nats(windows_WL)
            loss_D[d] = nats.mean(dtype=float)
            control.extra.forward_tokens += n_tokens
            if self.reference is not None:
                excess_D[d] = mean_excess(nats, self.reference.token_nats(windows_WL))
                control.extra.forward_tokens += n_tokens
        return Probe(
            loss_D,
            excess_D if asked.needs_reference else None,
            gradient_gram(gradients, len(loss_D)) if asked.needs_gradients else None,
        )

    def _result(self, evaluation: EvalWindows) -> StackResult:
        """Losses by stretch, summed nats and scores, as of a stack of one."""
        from causalmix_pipeline.adapters.task_scores import score_stack_questions

        steps = self.config.steps
        n_points = min(TRAIN_LOSS_POINTS, steps)
        ends = [steps * point // n_points for point in range(n_points + 1)]
        means = [sum(self.losses[a:b]) / (b - a) for a, b in pairwise(ends)]
        train_loss_KS = np.array([means])
        windows = evaluation.windows
        nats = {task: self.model.summed_nats(windows_WL) for task, windows_WL in windows.items()}
        scores = {}
        if evaluation.questions:
            scores = score_stack_questions(self.model, evaluation.questions, evaluation.tokenizer)
        self._take_time()
        return StackResult(
            train_loss_KS=train_loss_KS,
            eval_nats=nats,
            eval_tokens={
                task: len(windows_WL) * self.config.sequence_length
                for task, windows_WL in windows.items()
            },
            diverged_K=diverged_models(self.config, train_loss_KS, nats),
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            scores=dict(scores),
        )

    def _take_time(self) -> None:
        """Add the time since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds += wall - self.wall
        self.cpu_seconds += cpu - self.cpu
        self.wall, self.cpu = wall, cpu

    # The checkpoint.

    def save(self) -> None:
        """Keep the run as it is at the end of a block."""
        self._take_time()
        state = {
            "control": self.control.state(),
            "losses": self.losses,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}
        text = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
        _write_sealed(self.checkpoint, arrays | {"state": text})

    def load(self) -> bool:
        """Bring the run to its checkpoint; tells whether there was a sound one."""
        import torch

        control = self._new_control()
        try:
            arrays = _read_sealed(self.checkpoint)
            state = json.loads(arrays["state"].tobytes())
            control.restore(state["control"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "checkpoint %s is damaged (%s): the run starts over", self.checkpoint, error
            )
            return False
        for name, tensor in self._tensors().items():
            tensor.copy_(torch.from_numpy(arrays[name]))
        starts = [0, *control.ends]
        for block in range(control.block):  # what was read decides what is read next
            self.feed.begin(control.path[block], (starts[block], control.ends[block]))
        self.control, self.losses = control, state["losses"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        return True

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that a later step depends on, by name."""
        optimiser = self.optimiser
        groups = {
            "weights": self.model.flat_weights,
            "means": optimiser.means,
            "squares": optimiser.squares,
            "steps": optimiser.steps,
        }
        if self.reference is not None:
            groups["reference"] = self.reference.flat_weights
        return {
            f"{group}.{name}": tensor
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
        }


def mean_excess(nats: np.ndarray, reference_nats: np.ndarray) -> float:
    """Mean nats above a reference's, each token's at least 0; nan where losses are infinite."""
    with np.errstate(invalid="ignore"):
        return float(np.maximum(nats - reference_nats, 0).mean(dtype=float))


def gradient_gram(gradients: dict[int, torch.Tensor], n_domains: int) -> np.ndarray:
    """Inner products of the domains' gradients in double; 0 where a domain has none."""
    import torch

    gram_DD, domains = np.zeros((n_domains, n_domains)), list(gradients)
    size = gradients[domains[0]].numel()
    for at in range(0, size, GRAM_WEIGHTS):  # so that few weights are held twice
        parts = [gradient[at : at + GRAM_WEIGHTS].double() for gradient in gradients.values()]
        part = torch.stack(parts)
        gram_DD[np.ix_(domains, domains)] += (part @ part.T).cpu().numpy()
    return gram_DD


def _write_sealed(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays and their checksum, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    raw = content.getvalue()
    write_atomically(path, hashlib.sha256(raw).digest() + raw)


def _read_sealed(path: Path) -> dict[str, np.ndarray]:
    """Inverse of `_write_sealed`.

    Raises:
        ValueError: if the file was changed since.
    """
    sealed = path.read_bytes()
    seal, raw = sealed[:32], sealed[32:]
    if hashlib.sha256(raw).digest() != seal:
        raise ValueError("its checksum differs")
    with np.load(io.BytesIO(raw)) as arrays:
        return {name: arrays[name] for name in arrays.files}
