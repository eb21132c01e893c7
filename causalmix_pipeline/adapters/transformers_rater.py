"""Writing style by a trained rater: any sequence classifier or regressor of `transformers`."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.transformers_lm import (
    check_model,
    length_batches,
    load_pretrained,
    model_folder,
    model_hash,
    pick_device,
)
from causalmix_pipeline.core.errors import ConfigError

#: Raise when the formula changes, so that kept scores aren't mixed with new ones.
RATER_VERSION = 1
#: Tokens of one forward pass, padding included.
CPU_BATCH_TOKENS = 2048
CUDA_BATCH_TOKENS = 65_536


@dataclass(frozen=True)
class RaterScorer:
    """A rater's value of documents, `writing_style`, on the rater's own scale.

    A document is read in chunks of `chunk_tokens`, special tokens included, and its value is the
    mean over chunks weighted by their tokens without the special ones. A chunk's value: of a
    regressor (one label) its output; of a classifier the expected label index, the sum over labels
    k of k * p_k, so labels must stand in order of quality. Null where a text has no token.

    Attributes:
        model: folder of a sequence classifier on this machine.
        content_hash: of its files, by `model_hash`.
        chunk_tokens: tokens of a chunk.
        device: `auto` (CUDA where there is some), `cpu`, `cuda`, `cuda:1`.
        dtype: `auto` (bfloat16 on CUDA devices that have it, else float32), `float32`, `bfloat16`.
    """

    model: str
    content_hash: str
    chunk_tokens: int = 512
    device: str = "auto"
    dtype: str = "auto"

    @classmethod
    def open(cls, model: str | Path, **options: Any) -> RaterScorer:
        """A scorer of the rater in a folder, its files checked and hashed.

        Raises:
            ConfigError: if there is no sequence classifier in safetensors there.
        """
        folder = model_folder(model, "profile.rater")
        kind = "a sequence classifier or regressor, not a bare encoder or embedding model"
        check_model(folder, "profile.rater", kind, ("ForSequenceClassification",))
        return cls(str(folder), model_hash(folder), **options)

    @property
    def key(self) -> str:
        """`rater-v1-` and a hash of the model's files, the chunk and the number format."""
        parts = [self.content_hash, self.chunk_tokens, self.dtype]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"rater-v{RATER_VERSION}-{digest[:16]}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("writing_style",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Measure documents; see the class."""
        rater = _load(self.model, self.content_hash, self.device, self.dtype)
        longest = getattr(rater.model.config, "max_position_embeddings", self.chunk_tokens)
        if not 8 <= self.chunk_tokens <= longest:
            raise ConfigError(
                f"profile.rater_chunk_tokens must be between 8 and {longest}, the longest input of "
                f"the model in {self.model}, got {self.chunk_tokens}."
            )
        chunks, weights, owners = [], [], []
        for row, text in enumerate(documents["text"]):
            encoded = rater.tokenizer(
                text,
                truncation=True,
                max_length=self.chunk_tokens,
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
            chunks += encoded["input_ids"]
            weights += [mask.count(0) for mask in encoded["special_tokens_mask"]]
            owners += [row] * len(encoded["input_ids"])
        weight = np.bincount(owners, weights, minlength=documents.height)
        total = np.bincount(owners, weights * _chunk_values(rater, chunks), documents.height)
        values = [float(t / w) if w else None for t, w in zip(total, weight, strict=True)]
        return documents.select("document_id").with_columns(
            writing_style=pl.Series(values, dtype=pl.Float64)
        )


@dataclass(frozen=True, eq=False)
class _Rater:
    model: Any
    tokenizer: Any
    device: str


@functools.lru_cache(maxsize=2)
def _load(folder: str, content_hash: str, device: str, dtype: str) -> _Rater:
    """Load once in a process; `content_hash` is there so that changed files are loaded again."""
    import transformers

    device, torch_dtype = pick_device(device, dtype)
    model, tokenizer = load_pretrained(
        transformers.AutoModelForSequenceClassification, folder, "profile.rater", torch_dtype
    )
    if model.config.problem_type == "multi_label_classification":
        raise ConfigError(
            f"profile.rater must give one value or one label a text, got a multi-label classifier "
            f"in {folder}: its labels have no order. Give another model."
        )
    return _Rater(model.to(device), tokenizer, device)


def _chunk_values(rater: _Rater, chunks: list[list[int]]) -> np.ndarray:
    """Value of each chunk, float64."""
    import torch

    values = np.zeros(len(chunks))
    lengths = [len(chunk) for chunk in chunks]
    batch_tokens = CUDA_BATCH_TOKENS if rater.device.startswith("cuda") else CPU_BATCH_TOKENS
    with torch.inference_mode():
        for batch in length_batches(lengths, batch_tokens):
            if lengths[batch[-1]] == 0:  # an empty text and a tokenizer without special tokens
                continue
            padding_id = rater.model.config.pad_token_id or 0
            tokens_BL = torch.full((len(batch), lengths[batch[-1]]), padding_id)
            mask_BL = torch.zeros_like(tokens_BL)
            for row, place in enumerate(batch):
                tokens_BL[row, : lengths[place]] = torch.tensor(chunks[place])
                mask_BL[row, : lengths[place]] = 1
            logit_BK = rater.model(
                input_ids=tokens_BL.to(rater.device), attention_mask=mask_BL.to(rater.device)
            ).logits.float()
            if logit_BK.shape[1] == 1:
                value_B = logit_BK[:, 0]
            else:
                label_K = torch.arange(logit_BK.shape[1], device=rater.device)
                value_B = (logit_BK.softmax(1) * label_K).sum(1)
            values[batch] = value_B.double().cpu().numpy()
    return values
