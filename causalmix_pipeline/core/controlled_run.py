"""A run under a controller, whatever trains it: its blocks, what was seen, what it cost.

An engine asks for the shares of the block it is in, tells what the block gave, and keeps `state`
in its checkpoint. The controller itself isn't kept: it is built anew and sees the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from causalmix_pipeline.core.controllers import BlockSeen, ControllerConfig, Schedule

#: Shares of one block that differ by more, from the same blocks before it, aren't one run's.
SHARES_APART = 1e-6


@dataclass
class ExtraCompute:
    """Tokens that a controlled run computes beside those it learns from.

    Attributes:
        forward_tokens: seen by a forward pass alone.
        backward_tokens: seen by a forward and a backward pass, without an update.
        reference_tokens: that a reference model was trained on.
    """

    forward_tokens: int = 0
    backward_tokens: int = 0
    reference_tokens: int = 0

    def as_training_tokens(self, forwards_per_training: int) -> float:
        """The training tokens of the same cost.

        Args:
            forwards_per_training: forward passes that cost as much as training on their tokens.
        """
        forward = self.forward_tokens / forwards_per_training
        return forward + self.backward_tokens + self.reference_tokens


class ControlledRun:
    """The shares of a run, block by block.

    Attributes:
        ends: finished steps at the end of each block.
        seen: the blocks that have ended.
        path: shares of each block so far, the one that is being trained included; (D,) each.
        extra: what it cost beside training.
    """

    def __init__(
        self,
        config: ControllerConfig,
        mixture_D: np.ndarray,
        *,
        steps: int,
        seed: int,
        forwards_per_training: int = 3,
    ) -> None:
        """Begin a run.

        Args:
            config: the controller's settings.
            mixture_D: shares that it starts from, or those of its reference.
            steps: optimiser steps of the run.
            seed: of the run.
            forwards_per_training: forward passes that cost as much as training on their tokens: 3
                where all weights are trained, 2 where nearly all are frozen, whose gradients
                aren't computed.

        Raises:
            ConfigError: if the settings don't fit the run.
        """
        self.config, self.steps = config, steps
        self.forwards_per_training = forwards_per_training
        self.active_D = config.start(mixture_D) > 0
        self.ends = config.ends(steps)
        self.seen: list[BlockSeen] = []
        self._controller = config.build(mixture_D[self.active_D], seed=seed)
        self.path: list[np.ndarray] = []
        self.path.append(self._next(None))
        self.extra = ExtraCompute()

    @property
    def block(self) -> int:
        """Number of the block that is being trained, or of blocks once all have ended."""
        return len(self.seen)

    @property
    def is_last(self) -> bool:
        """Whether no block comes after this one; its end needs no probe."""
        return self.block == len(self.ends) - 1

    @property
    def span(self) -> tuple[int, int]:
        """First step of the block, and the one after its last."""
        return (self.ends[self.block - 1] if self.block else 0), self.ends[self.block]

    @property
    def shares_D(self) -> np.ndarray:
        """Shares of the block."""
        return self.path[-1]

    def see(self, seen: BlockSeen) -> None:
        """End the block; the controller sets the next one's shares."""
        last = self.is_last
        self.seen.append(seen)
        if not last:
            self.path.append(self._next(seen.of(self.active_D)))

    def _next(self, seen: BlockSeen | None) -> np.ndarray:
        """Shares of the next block: the last ones where a diverged model leads to none."""
        shares_D = np.zeros(len(self.active_D))
        with np.errstate(all="ignore"):
            shares_D[self.active_D] = self._controller.next_shares(seen)
        if self.path and not np.isfinite(shares_D).all():
            return self.path[-1]
        return shares_D

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in values that JSON holds."""
        return {
            "seen": [seen.to_dict() for seen in self.seen],
            "path": [shares_D.tolist() for shares_D in self.path],
            "extra": asdict(self.extra),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Bring a run that has just begun to where another one was.

        Another machine may round the shares otherwise; those that were trained on are taken.

        Raises:
            ValueError: if the controller doesn't set the shares again that it had set.
        """
        assert not self.seen
        for seen in state["seen"]:
            self.see(BlockSeen.from_dict(seen))
        path = [np.array(shares, dtype=float) for shares in state["path"]]
        if np.shape(path) != np.shape(self.path) or not np.allclose(
            path, self.path, rtol=0, atol=SHARES_APART
        ):
            raise ValueError("the controller sets other shares from the same blocks")
        self.path = path
        self.extra = ExtraCompute(**state["extra"])

    def told(self) -> dict[str, Any]:
        """What a finished run's record keeps of its controller.

        `path` has an entry a block: its first step, its shares, the tokens read and the training
        loss of each domain (None where nothing was read, or it wasn't finite); after a stage of a
        schedule that probes also `probe_loss`. `mean_shares` is the mean over steps; `tokens` is
        what the run learned from, `total_tokens` the training tokens of the same cost as all that
        it computed, a forward pass a third of a training token, or half of one where nearly all
        weights are frozen.
        """
        starts = [0, *self.ends[:-1]]
        tokens = int(sum(seen.tokens_D.sum() for seen in self.seen))
        steps = np.diff([0, *[seen.step for seen in self.seen]])
        mean_D = np.average(self.path[: len(steps)], axis=0, weights=steps) if len(steps) else None
        return {
            "kind": self.config.kind,
            "path": [
                {
                    "step": start,
                    "shares": shares_D.tolist(),
                    "tokens": seen.tokens_D.tolist(),
                    "loss": _finite(seen.loss_D),
                }
                | self._probe_kept(seen)
                for start, shares_D, seen in zip(starts, self.path, self.seen, strict=False)
            ],
            "mean_shares": None if mean_D is None else mean_D.tolist(),
            "tokens": tokens,
            **asdict(self.extra),
            "total_tokens": tokens + self.extra.as_training_tokens(self.forwards_per_training),
        }

    def _probe_kept(self, seen: BlockSeen) -> dict[str, list[float | None]]:
        """The probe of a schedule: what it is made for. Other controllers' decide, and are gone."""
        if seen.probe is None or self.config.kind != Schedule.kind:
            return {}
        return {"probe_loss": _finite(seen.probe.loss_D)}


def _finite(values_D: np.ndarray) -> list[float | None]:
    """Numbers that JSON holds; None for those that aren't finite."""
    return [value if math.isfinite(value) else None for value in values_D.tolist()]
