"""Tiny pretrained models and runs to fine-tune; run as a script, it trains one until it's killed.

A model is made with a tokenizer trained on the spot; a store holds a chat domain and a text domain.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from causalmix_pipeline.adapters.model_tokens import describe_model, encode_documents, find_model
from causalmix_pipeline.adapters.model_tokens import load_tokenizer as load
from causalmix_pipeline.adapters.pretrained_proxy import pretrained_engine_name, train_pretrained
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline_tests.adapters.small_models import save_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

WORDS = tuple(
    re.findall(r"\w+", "the sum of two and four is prime river runs past old mill to sea")
)


def save_lm(folder: Path, *, kind: str = "qwen2", chat: bool = True, **changes: Any) -> Path:
    """A random causal LM of two layers with a tokenizer of 300 tokens."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "tie_word_embeddings": True,
    } | changes  # fmt: skip
    if kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def small_config(model: Path | str, **changes: Any) -> PretrainedConfig:
    """A recipe of a few steps, in fp32."""
    values = {
        "tokens": 64 * 4 * 6, "sequence_length": 64, "batch_sequences": 4, "micro_batch": 2,
        "learning_rate": 3e-3, "bf16": False, "checkpoint_steps": 2,
    }  # fmt: skip
    facts = describe_model(str(model))
    return PretrainedConfig(
        model=str(model), weights_hash=facts.weights_hash, **{**values, **changes}
    )


def sentence(rng: np.random.Generator, n: int) -> str:
    return " ".join(rng.choice(WORDS, n))


def write_run(
    root: Path, config: PretrainedConfig, *, mixture: tuple[float, float] = (0.6, 0.4)
) -> tuple[RunStore, ProxySpec, EvalWindows]:
    """A store with one pool state, a chat domain and a text domain; a run of it, and its tasks."""
    rng = np.random.default_rng(0)
    tokenizer = load(find_model(config.model))
    prompts = [f"{sentence(rng, 4)}?\n\n" for _ in range(24)]
    texts = [prompt + sentence(rng, int(rng.integers(3, 8))) for prompt in prompts]
    texts += [sentence(rng, int(rng.integers(5, 40))) for _ in range(16)]
    n_chars = [len(prompt) for prompt in prompts] + [0] * 16
    ids = [f"{i:04d}" for i in range(len(texts))]
    tokens, n_prompt = encode_documents(tokenizer, texts, n_chars, is_chat=False)
    store = RunStore(root / "store")
    store.put_tokens("tokens", [(ids, tokens, n_prompt)], len(tokenizer))
    names = np.array(ids, dtype="S")
    state = "0123456789abcdef" * 2
    store.put_state(state, {"chat": names[:24], "text": names[24:]})
    held_out = np.concatenate(encode_documents(tokenizer, texts[:12], [0] * 12, is_chat=False)[0])
    windows = held_out[: len(held_out) // 33 * 33].reshape(-1, 33)
    evaluation = EvalWindows({"talk": windows}, {"talk": windows[:, 1:].size * 2}, {"talk": 5.0})
    spec = ProxySpec(state, "tokens", "eval", mixture, 7, config, pretrained_engine_name())
    return store, spec, evaluation


def real_model_folder() -> Path | None:
    """A real small model on this machine, or None."""
    named = os.environ.get("CAUSALMIX_TEST_MODEL", "data/scorers/smollm2-135m-instruct")
    return Path(named) if (Path(named) / "config.json").is_file() else None


def main(root: str, model: str, changes: str) -> None:
    """Train a run and print each finished step."""
    config = small_config(model, **json.loads(changes))
    store, spec, evaluation = write_run(Path(root), config)
    train_pretrained(
        store,
        spec,
        device="cpu",
        evaluation=evaluation,
        progress=lambda step, loss: print(step, flush=True),
    )


def with_changes(spec: ProxySpec, **changes: Any) -> ProxySpec:
    """The run with another recipe."""
    assert isinstance(spec.config, PretrainedConfig)
    return replace(spec, config=replace(spec.config, **changes))


if __name__ == "__main__":
    main(*sys.argv[1:])
