"""Fine-tunes a pretrained model under a controller that sets its mixture block by block.

Model, optimiser, checkpoints and scores are those of a static run (`pretrained_proxy`). The
sequences of a step are taken domain by domain, so that each domain's loss is known; a block's
sequences follow its shares. A checkpoint inside a block keeps what was seen of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.controlled_proxy import gradient_gram, mean_excess
from causalmix_pipeline.adapters.packed_samples import BlockPacker, PackedDomain, SequenceRows
from causalmix_pipeline.adapters.pretrained_model import (
    autocast,
    load_model,
    summed_loss,
    token_losses,
)
from causalmix_pipeline.adapters.pretrained_trainer import (
    Checkpoints,
    Feed,
    Trainer,
    pack_state,
)
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.torch_proxy import is_out_of_memory
from causalmix_pipeline.core.controlled_run import ControlledRun
from causalmix_pipeline.core.controllers import BlockSeen, ControllerConfig, Probe
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.token_sampler import probe_items

logger = logging.getLogger(__name__)

#: Weights whose gradients are compared between domains, the last matrices of the model: 64 MB of
#: fp32 a domain. The actor-critic's authors take three matrices of late layers.
MOST_COMPARED_WEIGHTS = 16_000_000


def controlled_trainer(
    store: RunStore, spec: ProxySpec, controller: ControllerConfig, device: str
) -> ControlledTrainer:
    """The trainer of a controlled run, at its last checkpoint.

    A controller that compares with a reference has that trained first, on the run's own mixture,
    with checkpoints of its own in the run's scratch folder.

    Args:
        store: has the spec's pool state and tokens.
        spec: of a run with a `PretrainedConfig`; its mixture is where the controller starts.
        controller: the rule, `spec.controller` but for tests.
        device: where torch computes.

    Raises:
        ConfigError: if the controller's settings don't fit the run.
        ProxyError: if a domain that is read has nothing to learn.
    """
    config = spec.config
    assert isinstance(config, PretrainedConfig)
    control = ControlledRun(
        controller,
        np.array(spec.mixture),
        steps=config.steps,
        seed=spec.data_seed,
        forwards_per_training=2 if config.method == "lora" else 3,
    )
    reference = Reference(store, spec, config, device) if controller.needs_reference else None
    feed = BlockFeed(store, spec, config, control)
    model = load_model(config, device)
    checkpoints = Checkpoints(store.scratch(spec.key))
    return ControlledTrainer(model, config, device, feed, checkpoints, reference)


class Reference:
    """The model of a static run on the starting mixture, which a controller compares with.

    Attributes:
        model: trained, in evaluation mode.
        history: what it cost.
        n_tokens: tokens that it was trained on.
    """

    def __init__(
        self, store: RunStore, spec: ProxySpec, config: PretrainedConfig, device: str
    ) -> None:
        """Train it, or take it from its last checkpoint."""
        feed = Feed.of(store, spec)
        checkpoints = Checkpoints(store.scratch(spec.key) / "reference")
        trainer = Trainer(load_model(config, device), config, device, feed, checkpoints)
        self.history = trainer.train()
        trainer.optimiser.zero_grad(set_to_none=True)
        self.model = trainer.model.eval()
        self.n_tokens = sum(
            int(feed.packed[d].tokens_S[s])
            for d, s in zip(feed.domain_W, feed.sequence_W, strict=True)
        )


class BlockFeed:
    """The packed sequences of a run, step by step, where blocks have shares of their own."""

    def __init__(
        self, store: RunStore, spec: ProxySpec, config: PretrainedConfig, control: ControlledRun
    ) -> None:
        """Pack the documents of a spec's pool state."""
        self.config, self.control = config, control
        self.tokens = store.token_store(spec.tokens_hash).tokens()
        self.packed: list[PackedDomain] = pack_state(store, spec, control.active_D)
        self.order_seed = int(spec.state_hash[:15], 16)
        self.packer = BlockPacker(
            [domain.tokens_S for domain in self.packed],
            seed=spec.data_seed,
            order_seed=self.order_seed,
        )
        self.n_steps = config.steps

    def begin(self, shares_D: np.ndarray, span: tuple[int, int]) -> None:
        """Choose the sequences of the steps of a block."""
        self.span, n_steps = span, span[1] - span[0]
        before_D = self.packer.read_D
        self.domain_W, self.sequence_W = self.packer.next_block(
            shares_D, self.config.tokens * n_steps / self.n_steps, at_least=n_steps
        )
        self.tokens_D = self.packer.read_D - before_D

    def _slots(self, step: int) -> range:
        n, first = len(self.domain_W), self.span[0]
        n_steps = self.span[1] - first
        return range((step - first) * n // n_steps, (step - first + 1) * n // n_steps)

    def domains(self, step: int) -> list[int]:
        """Domain of each sequence of a step."""
        return [int(self.domain_W[w]) for w in self._slots(step)]

    def rows(self, step: int) -> list[SequenceRows]:
        """The sequences of a step."""
        return [
            self.packed[self.domain_W[w]].rows(self.tokens, self.sequence_W[w])
            for w in self._slots(step)
        ]

    def probed(self, domain: int, count: int, block: int) -> list[SequenceRows]:
        """Sequences of a domain for the probe at the end of a block."""
        packed = self.packed[domain]
        chosen = probe_items(len(packed), count, seed=[self.order_seed, domain, block + 1])
        return [packed.rows(self.tokens, sequence) for sequence in chosen.tolist()]

    @property
    def epochs_D(self) -> np.ndarray:
        """How often each domain was read so far."""
        available = [max(int(domain.tokens_S.sum()), 1) for domain in self.packed]
        return self.packer.read_D / np.array(available)


class ControlledTrainer(Trainer):
    """Trains a model over blocks whose shares its controller sets."""

    feed: BlockFeed

    def __init__(
        self,
        model: Any,
        config: PretrainedConfig,
        device: str,
        feed: BlockFeed,
        checkpoints: Checkpoints,
        reference: Reference | None,
    ) -> None:
        """Start, or go on from the last checkpoint."""
        super().__init__(model, config, device, feed, checkpoints)
        self.control, self.reference = feed.control, reference
        if self.history.control is not None:
            self._go_on(self.history.control)
            return
        self._begin()
        if reference is not None:
            self.control.extra.reference_tokens += reference.n_tokens
            self.history.seconds += reference.history.seconds
            self.history.cpu_seconds += reference.history.cpu_seconds
            # Without a reference there is nothing to compare with: the run ends as it did.
            self.history.diverged = reference.history.diverged

    def _go_on(self, state: dict[str, Any]) -> None:
        """Let the controller see, and the feed read, what they did before the checkpoint."""
        control = self.control
        try:
            control.restore(state)
        except ValueError as error:
            raise ProxyError(
                f"the checkpoint of a controlled run must lead to the shares that it holds, but "
                f"{error}. Delete {self.checkpoints.folder}: the run starts over."
            ) from error
        starts = [0, *control.ends]
        for block in range(control.block):
            self.feed.begin(control.path[block], (starts[block], control.ends[block]))
        self._begin()
        self.nats_D = np.array(state["nats"], dtype=float)
        self.losses_D = np.array(state["losses"], dtype=np.int64)

    def _begin(self) -> None:
        """Begin the block that the controller is in, if one is left."""
        if self.control.block < len(self.control.ends):
            self.feed.begin(self.control.shares_D, self.control.span)
            self.nats_D = np.zeros(len(self.control.active_D))
            self.losses_D = np.zeros(len(self.control.active_D), dtype=np.int64)

    def _try_gradients(self, rows: Sequence[SequenceRows], n_losses: int) -> float | None:
        """As a static run's, but domain by domain; None if memory ran out."""
        self.optimiser.zero_grad(set_to_none=True)
        size = self.history.micro_batch
        domains = np.array(self.feed.domains(self.history.step))
        nats_D = np.zeros(len(self.nats_D))
        try:
            for d in sorted(set(domains.tolist())):
                own = [rows[i] for i in np.flatnonzero(domains == d)]
                for at in range(0, len(own), size):
                    with autocast(self.config, self.device):
                        nats = summed_loss(self.model, own[at : at + size], self.device)
                    (nats / n_losses).backward()
                    nats_D[d] += float(nats.detach())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        self.nats_D += nats_D
        for row, d in zip(rows, domains, strict=True):
            self.losses_D[d] += int(row.has_loss_L.sum())
        return float(nats_D.sum())

    def _after_step(self) -> None:
        """End the block with its last step, and keep a checkpoint where it is time."""
        if self.history.step == self.control.span[1]:
            self._end_block()
        super()._after_step()

    def _end_block(self) -> None:
        """Tell the controller what the block gave, and begin the next one."""
        control, step = self.control, self.history.step
        loss_D = np.full(len(self.nats_D), np.nan)
        read = self.losses_D > 0
        loss_D[read] = self.nats_D[read] / self.losses_D[read]
        probe = None if control.is_last else self._probe()
        control.see(BlockSeen(step, control.steps, loss_D, self.feed.tokens_D, probe))
        self._begin()

    def save(self) -> None:
        """Keep a checkpoint, with what was seen so far of the block that is being trained."""
        seen = {"nats": self.nats_D.tolist(), "losses": self.losses_D.tolist()}
        self.history.control = self.control.state() | seen
        super().save()

    def told(self) -> dict[str, Any]:
        """What the controller did and cost."""
        return self.control.told()

    def _probe(self) -> Probe | None:
        """What the controller asks for of each domain that it may read."""
        control, asked = self.control, self.control.config
        if not asked.n_probed:
            return None
        self.model.eval()
        loss_D = np.full(len(control.active_D), np.nan)
        excess_D, gradients = loss_D.copy(), {}
        for d in np.flatnonzero(control.active_D).tolist():
            rows = self.feed.probed(d, asked.n_probed, control.block)
            n_tokens = sum(row.n_tokens for row in rows)
            if asked.needs_gradients:
                loss_D[d], gradients[d] = self._gradient(rows)
                control.extra.backward_tokens += n_tokens
                continue
            nats = self._token_losses(self.model, rows)
            loss_D[d] = nats.mean(dtype=float)
            control.extra.forward_tokens += n_tokens
            if self.reference is not None:
                excess_D[d] = mean_excess(nats, self._token_losses(self.reference.model, rows))
                control.extra.forward_tokens += n_tokens
        self.model.train()
        return Probe(
            loss_D,
            excess_D if asked.needs_reference else None,
            gradient_gram(gradients, len(loss_D)) if asked.needs_gradients else None,
        )

    def _token_losses(self, model: Any, rows: Sequence[SequenceRows]) -> np.ndarray:
        """Nats of each token with loss, one sequence at a time."""
        with autocast(self.config, self.device):
            return np.concatenate([token_losses(model, [row], self.device) for row in rows])

    def _gradient(self, rows: Sequence[SequenceRows]) -> tuple[float, Any]:
        """Mean loss of sequences, and its gradient at the compared weights as one vector."""
        import torch

        self.optimiser.zero_grad(set_to_none=True)
        n_losses = sum(int(row.has_loss_L.sum()) for row in rows)
        total = 0.0
        for row in rows:
            with autocast(self.config, self.device):
                nats = summed_loss(self.model, [row], self.device)
            (nats / n_losses).backward()
            total += float(nats.detach())
        parts = [
            torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()
            for weight in self._compared()
        ]
        gradient = torch.cat(parts).clone()
        self.optimiser.zero_grad(set_to_none=True)
        return total / n_losses, gradient

    def _compared(self) -> list[Any]:
        """The last trained matrices, without embeddings, up to `MOST_COMPARED_WEIGHTS`."""
        inner = getattr(self.model, "get_base_model", lambda: self.model)()
        tables = {id(inner.get_input_embeddings().weight), id(inner.get_output_embeddings().weight)}
        matrices = [p for p in self.trained.values() if p.ndim >= 2 and id(p) not in tables]
        chosen, size = [], 0
        for matrix in reversed(matrices):
            if chosen and size + matrix.numel() > MOST_COMPARED_WEIGHTS:
                break
            chosen.append(matrix)
            size += matrix.numel()
        return chosen
