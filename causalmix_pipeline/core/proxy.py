"""What a proxy model is, what training it costs, and what comes back from a stack of them.

The shape is Qwen2's (arXiv 2407.10671): RMSNorm, rotary positions, SwiGLU, biases on queries, keys
and values, embeddings tied to the output layer.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np

from causalmix_pipeline.core.errors import ConfigError

#: Loss above that of a uniform guess, in nats per token, from which a model counts as diverged.
DIVERGENCE_MARGIN = 1.0


def dial(default: Any, description: str) -> Any:
    """A dataclass field whose metadata describes it; `...` has no default."""
    return field(
        default=MISSING if default is ... else default, metadata={"description": description}
    )


def learning_rate_at(
    step: int, steps: int, *, peak: float, warmup_share: float, final_share: float
) -> float:
    """Learning rate of a step: linear warm-up, then a cosine.

    Args:
        step: number of the step, from 0 up to `steps` - 1.
        steps: steps of the run.
        peak: the largest rate; the last warm-up step and the one after have it.
        warmup_share: share of the steps in which the rate rises; in [0, 1).
        final_share: last rate over the peak; in [0, 1].
    """
    warmup = round(warmup_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_share + (1 - final_share) * cosine)


class Recipe:
    """Rules of the fields that every way of training has; a mixin of frozen dataclasses."""

    weight_decay: float
    warmup_share: float
    final_lr_share: float
    betas: tuple[float, float]
    init_seed: int

    def _check_recipe(self, *positive: str) -> None:
        """Check the common fields, and that the named ones are positive."""
        for name in positive:
            value = getattr(self, name)
            self._require(
                name, math.isfinite(value) and value > 0, "finite and > 0", "Start from its default"
            )
        self._require(
            "weight_decay",
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "finite and >= 0",
            "Write 0 for no decay",
        )
        self._require(
            "warmup_share", 0 <= self.warmup_share < 1, "in [0, 1)", "Write 0 for no warm-up"
        )
        self._require(
            "final_lr_share", 0 <= self.final_lr_share <= 1, "in [0, 1]", "Write 1 for no cosine"
        )
        self._require(
            "betas",
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "two numbers in [0, 1)",
            "Write (0.9, 0.95), the default",
        )
        self._require("init_seed", self.init_seed >= 0, ">= 0", "Give a whole number from 0 up")

    def _require(self, name: str, holds: bool, rule: str, way_out: str) -> None:
        """Raise the error of a field that breaks its rule."""
        if not holds:
            value = getattr(self, name)
            raise ConfigError(f"proxy.{name} must be {rule}, got {value!r}. {way_out}.")


@dataclass(frozen=True)
class ProxyConfig(Recipe):
    """The shape of a proxy model and the recipe it is trained by.

    Every field is described in its metadata; `describe` returns them.

    Raises:
        ConfigError: if a field breaks its rule.
    """

    hidden: int = dial(32, "Width of the residual stream; a multiple of 2 x heads.")
    layers: int = dial(1, "Number of transformer layers; >= 1.")
    heads: int = dial(1, "Attention heads of a layer; hidden must divide by 2 x heads.")
    vocab_size: int = dial(1024, "Tokens of the vocabulary; token numbers stay below it.")
    sequence_length: int = dial(128, "Tokens that a model predicts in one window; >= 2.")
    batch_size: int = dial(4, "Windows of one step; >= 1.")
    steps: int = dial(1000, "Optimiser steps of a run; more for a lower loss; >= 1.")
    learning_rate: float = dial(0.02, "Peak learning rate of AdamW; scan it for each size; > 0.")
    init_std: float = dial(0.05, "Standard deviation of the first weights; scan it; > 0.")
    weight_decay: float = dial(0.05, "AdamW's decay, on matrices only; >= 0.")
    warmup_share: float = dial(0.1, "Share of the steps in which the rate rises; in [0, 1).")
    final_lr_share: float = dial(0.1, "Last rate over the peak, end of the cosine; in [0, 1].")
    grad_clip: float = dial(1.0, "Largest norm of a model's gradient; > 0.")
    betas: tuple[float, float] = dial((0.9, 0.95), "AdamW's two decay rates; in [0, 1).")
    init_seed: int = dial(0, "Seed of the first weights, the same for all runs of a design.")
    rope_theta: float = dial(10000.0, "Base of the rotary position frequencies; > 1.")
    bf16: bool = dial(False, "Round the inputs of matrix products to bfloat16; weights stay fp32.")

    def __post_init__(self) -> None:
        """Check each field, and the rules between fields."""
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("hidden", "layers", "heads", "batch_size", "steps"):
            self._require(name, getattr(self, name) >= 1, ">= 1", "Give a positive count")
        self._require("vocab_size", self.vocab_size >= 2, ">= 2", "Train a larger tokenizer")
        self._require("sequence_length", self.sequence_length >= 2, ">= 2", "Give more tokens")
        self._require(
            "hidden",
            self.hidden % (2 * self.heads) == 0,
            f"a multiple of 2 x heads ({2 * self.heads})",
            "Rotary positions turn pairs of dimensions of each head: change hidden or heads",
        )
        self._check_recipe("learning_rate", "init_std", "grad_clip")
        self._require(
            "rope_theta",
            math.isfinite(self.rope_theta) and self.rope_theta > 1,
            "finite and > 1",
            "Start from its default",
        )

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer: the multiple of 8 nearest to 8/3 of `hidden`."""
        return max(8, 8 * round(self.hidden / 3))

    @property
    def head_size(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden // self.heads

    @property
    def eval_length(self) -> int:
        """Tokens predicted in one window of held-out text."""
        return self.sequence_length

    @property
    def windows(self) -> int:
        """Windows that a run reads: `steps` times `batch_size`."""
        return self.steps * self.batch_size

    @property
    def tokens(self) -> int:
        """Tokens that a run predicts: its windows times `sequence_length`."""
        return self.windows * self.sequence_length

    @property
    def n_parameters(self) -> int:
        """Weights of one model; the embedding counts once, it is tied to the output layer."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        vectors = 3 * self.hidden + 2 * self.hidden
        return self.vocab_size * self.hidden + self.layers * (layer + vectors) + self.hidden

    @property
    def flops(self) -> float:
        """Floating-point operations of one run.

        Six for each weight of a matrix and token, and 12 x layers x hidden x sequence_length a
        token for the attention (arXiv 2204.02311, appendix B, without its causal half).
        """
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        matrices = self.vocab_size * self.hidden + self.layers * layer
        attention = 12 * self.layers * self.hidden * self.sequence_length
        return float(self.tokens) * (6 * matrices + attention)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to `final_lr_share`.

        Args:
            step: number of the step, from 0 up to `steps` - 1.

        Returns:
            The rate, in units of AdamW's; the last warm-up step and the one after have the peak.
        """
        return learning_rate_at(
            step,
            self.steps,
            peak=self.learning_rate,
            warmup_share=self.warmup_share,
            final_share=self.final_lr_share,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, in values that JSON holds; `ProxyConfig(**...)` reads them back.

        A run is named by these values, so fields that came later are left out at their default.
        """
        values = {**asdict(self), "betas": list(self.betas)}
        if not self.bf16:
            del values["bf16"]
        return values

    @classmethod
    def describe(cls) -> dict[str, str]:
        """What each field is, by name."""
        return {each.name: each.metadata["description"] for each in fields(cls)}


@dataclass(frozen=True, eq=False)
class StackResult:
    """What training a stack of K proxy models gave.

    Attributes:
        train_loss_KS: loss in nats per token, averaged over S equal stretches of the steps
            (20, or all steps where there are fewer); shape (K, S).
        eval_nats: for each task the summed nats over all predicted tokens, shape (K,).
        eval_tokens: for each task how many tokens were predicted.
        diverged_K: True where a loss became infinite or not a number, or the last stretch ended
            above the loss of a uniform guess by `DIVERGENCE_MARGIN`; its numbers are kept.
        seconds: wall-clock seconds of training and evaluation together.
        cpu_seconds: the process's CPU seconds over the same time.
        scores: for each task scored in another way than by its loss the scores, shape (K,).
    """

    train_loss_KS: np.ndarray
    eval_nats: dict[str, np.ndarray]
    eval_tokens: dict[str, int]
    diverged_K: np.ndarray
    seconds: float
    cpu_seconds: float
    scores: dict[str, np.ndarray] = field(default_factory=dict)
