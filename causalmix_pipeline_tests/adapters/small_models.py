"""Small random models saved to a folder, with a tokenizer trained on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from causalmix_pipeline.adapters.tokenizer import END_OF_TEXT, train_tokenizer

TEXTS = [
    "What is the sum of two and two?\n\nThe sum of two and two is four.",
    "Name a prime number above ten.\n\nEleven is a prime number, so is thirteen; ten is not.",
    "def add(left, right):\n    return left + right\n",
    "The river runs past the old mill, and past the new one, and on to the sea. " * 6,
    "Short.",
    "Überraschung: 漢字 und Umlaute ändern nichts.",
]


def save_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """A byte-level BPE as a folder of `transformers` files."""
    import tokenizers

    raw = tokenizers.Tokenizer.from_str(train_tokenizer(TEXTS, vocab_size=vocab_size))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)


def save_model(folder: Path, model: Any) -> Path:
    """A model and a tokenizer in one folder."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def small_lm(seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers with large random weights, so that its predictions are sharp."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    config.update(changes)
    return transformers.LlamaForCausalLM(config)


def small_rater(num_labels: int, seed: int = 0, **changes: Any) -> Any:
    """A BERT of two layers with a classification head."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.4,
        **{"num_labels": num_labels, **changes},
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)
