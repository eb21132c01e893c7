"""What fine-tuning a pretrained language model as a proxy is: which model, which recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from causalmix_pipeline.core.proxy import Recipe, dial, learning_rate_at

#: Longest held-out window, in predicted tokens: longer ones would make the tasks' text too short.
MAX_EVAL_LENGTH = 1024

#: Fields that don't decide what a run gives, beyond rounding.
NOT_IN_KEY = ("model", "micro_batch", "gradient_checkpointing", "checkpoint_steps")


@dataclass(frozen=True)
class PretrainedConfig(Recipe):
    """A pretrained model and the recipe it is fine-tuned by.

    Every field is described in its metadata; `describe` returns them.

    Raises:
        ConfigError: if a field breaks its rule.
    """

    model: str = dial(..., "Folder, GGUF file or hub id of a Hugging Face causal language model.")
    weights_hash: str = dial(..., "Names the content of its weights and tokenizer; 32 hex digits.")
    tokens: int = dial(..., "Tokens that a run reads, prompts included; >= sequence_length.")
    method: Literal["full", "lora"] = dial(
        "full", "full trains all weights, lora low-rank additions (arXiv 2106.09685)."
    )
    sequence_length: int = dial(2048, "Tokens of a packed sequence; >= 2.")
    batch_sequences: int = dial(16, "Sequences' worth of tokens of an optimiser step; >= 1.")
    micro_batch: int = dial(
        1, "Sequences held at once, halved when memory runs out; more is faster on a GPU; >= 1."
    )
    learning_rate: float = dial(1e-5, "Peak learning rate of AdamW; 10 times more for lora; > 0.")
    warmup_share: float = dial(0.03, "Share of the steps in which the rate rises; in [0, 1).")
    final_lr_share: float = dial(0.1, "Last rate over the peak, end of the cosine; in [0, 1].")
    weight_decay: float = dial(0.0, "AdamW's decay, on matrices only; >= 0.")
    betas: tuple[float, float] = dial((0.9, 0.95), "AdamW's two decay rates; in [0, 1).")
    grad_clip: float = dial(1.0, "Largest norm of the gradient; > 0.")
    lora_rank: int = dial(16, "Rank of the additions of lora; >= 1.")
    lora_alpha: float = dial(32.0, "Scale of the additions of lora, times 1 / lora_rank; > 0.")
    response_only: bool = dial(True, "Whether prompts carry no loss.")
    bf16: bool = dial(True, "Compute in bfloat16; weights, gradients and optimiser stay fp32.")
    gradient_checkpointing: bool = dial(
        False, "Recompute activations instead of keeping them: less memory, a third slower."
    )
    checkpoint_steps: int = dial(200, "Optimiser steps between two checkpoints; >= 1.")
    init_seed: int = dial(0, "Seed of what is drawn when the model is set up; >= 0.")

    def __post_init__(self) -> None:
        """Check each field, and the rules between fields."""
        object.__setattr__(self, "betas", tuple(self.betas))
        self._require("model", bool(self.model), "a folder or hub id", "Set proxy.pretrained")
        self._require("method", self.method in ("full", "lora"), "full or lora", "Choose one")
        self._require("sequence_length", self.sequence_length >= 2, ">= 2", "Give more tokens")
        for name in ("batch_sequences", "micro_batch", "lora_rank", "checkpoint_steps"):
            self._require(name, getattr(self, name) >= 1, ">= 1", "Give a positive count")
        self._require(
            "tokens",
            self.tokens >= self.sequence_length,
            f">= sequence_length ({self.sequence_length})",
            "The run would read less than one sequence: raise it, or samples",
        )
        self._check_recipe("learning_rate", "grad_clip", "lora_alpha")

    @property
    def eval_length(self) -> int:
        """Tokens predicted in one window of held-out text."""
        # A window holds one token more, and the model's context may end with the sequence.
        return min(self.sequence_length - 1, MAX_EVAL_LENGTH)

    @property
    def steps(self) -> int:
        """Optimiser steps of a run: its tokens over the tokens of a step, rounded up."""
        return -(-self.tokens // (self.batch_sequences * self.sequence_length))

    def learning_rate_at(self, step: int, steps: int | None = None) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to `final_lr_share`.

        Args:
            step: number of the step, from 0 up.
            steps: steps of the run where they aren't `self.steps`.
        """
        return learning_rate_at(
            step,
            self.steps if steps is None else steps,
            peak=self.learning_rate,
            warmup_share=self.warmup_share,
            final_share=self.final_lr_share,
        )

    def flops(self, n_parameters: int, *, layers: int, hidden: int) -> float:
        """Floating-point operations of one run.

        Six for each weight and token, four with `lora` (the weights' own gradients aren't needed),
        two more where activations are recomputed; and twice as many times layers x hidden x
        sequence_length a token for the attention (arXiv 2204.02311, appendix B): an upper bound,
        since documents of a sequence don't attend to each other.

        Args:
            n_parameters: weights of the model.
            layers: transformer layers.
            hidden: width of the residual stream.
        """
        each = (6 if self.method == "full" else 4) + 2 * self.gradient_checkpointing
        attention = 2 * layers * hidden * self.sequence_length
        return float(self.tokens) * each * (n_parameters + attention)

    def to_dict(self) -> dict[str, Any]:
        """The fields that decide what a run gives, in values that JSON holds.

        A run is named by these values: the model by its content, not by where it is.
        """
        values = {"kind": "pretrained", **asdict(self), "betas": list(self.betas)}
        return {name: value for name, value in values.items() if name not in NOT_IN_KEY}

    @classmethod
    def describe(cls) -> dict[str, str]:
        """What each field is, by name."""
        return {each.name: each.metadata["description"] for each in fields(cls)}
