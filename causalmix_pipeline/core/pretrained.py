"""What fine-tuning a pretrained language model as a proxy is: which model, which recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PretrainedConfig:
    """A pretrained model and the recipe it is fine-tuned by.

    Attributes:
        model: local folder or hub id of a Hugging Face causal language model.
        weights_hash: names the content of its weights and tokenizer, 32 hex digits.
        method: `full` trains all weights, `lora` low-rank additions (arXiv 2106.09685).
        tokens: tokens that a run reads; the last packed sequence may go beyond.
        sequence_length: tokens of a packed sequence.
        batch_sequences: packed sequences of an optimiser step.
        micro_batch: packed sequences that are held at once; halved when memory runs out. Results
            don't depend on it beyond rounding.
        learning_rate, warmup_share, final_lr_share, weight_decay, betas, grad_clip: as in
            `core.proxy.ProxyConfig`.
        lora_rank, lora_alpha: size and scale of the additions.
        response_only: prompts carry no loss.
        bf16: compute in bfloat16; weights, gradients' sums and optimiser stay fp32.
        gradient_checkpointing: recompute activations instead of keeping them.
        checkpoint_steps: optimiser steps between two checkpoints.
        init_seed: seed of what is drawn when the model is set up.
    """

    model: str
    weights_hash: str
    tokens: int
    method: Literal["full", "lora"] = "full"
    sequence_length: int = 2048
    batch_sequences: int = 16
    micro_batch: int = 1
    learning_rate: float = 1e-5
    warmup_share: float = 0.03
    final_lr_share: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    response_only: bool = True
    bf16: bool = True
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 200
    init_seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, in values that JSON holds."""
        return {"kind": "pretrained", **asdict(self), "betas": list(self.betas)}
