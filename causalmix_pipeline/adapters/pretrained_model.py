"""A pretrained causal language model as a proxy: loaded, and its losses on packed sequences.

Sequences are packed: positions restart with each document and there is no attention mask, from
which transformers tells documents apart; a model that doesn't is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.model_tokens import describe_model, find_model
from causalmix_pipeline.adapters.packed_samples import SequenceRows
from causalmix_pipeline.core.errors import ConfigError, ProxyError
from causalmix_pipeline.core.pretrained import PretrainedConfig

#: Predicted tokens whose logits are held at once: 512 MB for a vocabulary of 128K.
HEAD_ROWS = 1024
#: Largest change of a document's logits, over their own size, when another one of the sequence
#: changes: rounding of bfloat16 stays below, a leak is tens of percent.
MAX_LEAK = 1e-2


def load_model(config: PretrainedConfig, device: str) -> Any:
    """The model to train, with fp32 weights; what isn't trained needs no gradient.

    Raises:
        ConfigError: if its files aren't those that the config means, or can't be loaded.
        ProxyError: if it lets documents of a sequence see each other.
    """
    import torch
    import transformers

    found = describe_model(config.model).weights_hash
    if found != config.weights_hash:
        raise ConfigError(
            f"proxy.pretrained must be the model that the design was made with "
            f"({config.weights_hash}), got {found} in {config.model}: its files changed. Put them "
            "back, or materialise mixture_design again."
        )
    files = find_model(config.model)
    options = files.options()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.init_seed)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"proxy.pretrained: {config.model} can't be loaded: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise ConfigError(
            f"proxy.pretrained must hold all weights, got none for "
            f"{', '.join(sorted(report['missing_keys'])[:3])} in {config.model}: a part of the "
            "model would be random. Give the whole model."
        )
    model = model.to(device)
    check_isolation(model, config, device)
    if config.method == "lora":
        model = _with_additions(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _with_additions(model: Any, config: PretrainedConfig) -> Any:
    """The model with low-rank additions to all its linear layers, the only weights that train."""
    from peft import LoraConfig, get_peft_model

    additions = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, additions)


def check_isolation(model: Any, config: PretrainedConfig, device: str) -> None:
    """Refuse a model in which a document of a packed sequence sees the one before it.

    Raises:
        ProxyError: if the second document's logits change with the first one.
    """
    import torch

    n = min(8, config.sequence_length // 2)
    second = torch.arange(1, n + 1, device=device)
    ids_BL = torch.stack([torch.cat([torch.full_like(second, i), second]) for i in (1, 2)])
    position_L = torch.arange(n, device=device).repeat(2)
    model.eval()
    with torch.no_grad(), autocast(config, device):
        # Both at once: some kernels tell documents apart in batches of one alone.
        logits_BLV = model(
            input_ids=ids_BL, position_ids=position_L.expand(2, -1), use_cache=False
        ).logits[:, n:]
    first_LV, second_LV = logits_BLV.float()
    change = float((first_LV - second_LV).abs().max() / first_LV.abs().max().clamp_min(1e-6))
    if not change <= MAX_LEAK:
        raise ProxyError(
            f"proxy.pretrained must keep documents of a packed sequence apart, got logits that "
            f"change by {change:.0%} with the document before in {config.model}: its attention "
            "doesn't follow position_ids. Choose another model."
        )


def autocast(config: PretrainedConfig, device: str) -> Any:
    """Products in bfloat16 where the recipe asks for it."""
    import torch

    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=config.bf16)


def summed_loss(model: Any, rows: Sequence[SequenceRows], device: str) -> Any:
    """Summed nats over the tokens with loss of some sequences; a tensor with a gradient.

    Logits are made for those tokens only, a few at a time, and made again for the gradient.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    output_N, target_N, head = _outputs(model, rows, device)

    def nats(rows_NH: Any, targets_N: Any) -> Any:
        return torch.nn.functional.cross_entropy(head(rows_NH).float(), targets_N, reduction="sum")

    if head is _logits_already:
        return nats(output_N, target_N)
    total = output_N.float().sum() * 0  # a graph even where no token has loss
    for at in range(0, len(target_N), HEAD_ROWS):
        part = slice(at, at + HEAD_ROWS)
        total = total + checkpoint(nats, output_N[part], target_N[part], use_reentrant=False)
    return total


def token_losses(model: Any, rows: Sequence[SequenceRows], device: str) -> np.ndarray:
    """Nats of each token with loss of some sequences, without a gradient; fp32, shape (N,)."""
    import torch

    with torch.no_grad():
        output_N, target_N, head = _outputs(model, rows, device)
        parts = [
            torch.nn.functional.cross_entropy(
                head(output_N[at : at + HEAD_ROWS]).float(),
                target_N[at : at + HEAD_ROWS],
                reduction="none",
            )
            for at in range(0, len(target_N), HEAD_ROWS)
        ]
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, dtype=np.float32)


def _outputs(model: Any, rows: Sequence[SequenceRows], device: str) -> tuple[Any, Any, Any]:
    """What comes before the output layer for each token with loss, its target, and that layer."""
    width = max(row.n_tokens for row in rows)
    ids_BL = _stack([row.ids_L[:width] for row in rows], device)
    position_BL = _stack([row.position_L[:width] for row in rows], device)
    has_loss_BL = _stack([row.has_loss_L[:width] for row in rows], device)[:, 1:]
    target_N = ids_BL[:, 1:][has_loss_BL]
    inputs = {"input_ids": ids_BL, "position_ids": position_BL, "use_cache": False}
    inner = getattr(model, "get_base_model", lambda: model)()
    if not _has_plain_head(inner):
        return model(**inputs).logits[:, :-1][has_loss_BL], target_N, _logits_already
    hidden_NH = inner.get_decoder()(**inputs).last_hidden_state[:, :-1][has_loss_BL]
    return hidden_NH, target_N, inner.get_output_embeddings()


def _logits_already(logits_NV: Any) -> Any:
    """The output layer of a model whose logits aren't a linear map of its hidden states."""
    return logits_NV


def _stack(rows: list[np.ndarray], device: str) -> Any:
    import torch

    return torch.from_numpy(np.stack(rows)).to(device)


def _has_plain_head(model: Any) -> bool:
    """Whether logits are a linear map of the hidden states; some models scale or cap them."""
    import torch

    known = getattr(model, "_causalmix_plain_head", None)
    if known is None:
        was_training = model.training
        with torch.no_grad():
            probe = {"input_ids": torch.arange(2, device=model.device)[None], "use_cache": False}
            hidden = model.eval().get_decoder()(**probe).last_hidden_state
            expected = model.get_output_embeddings()(hidden)
            known = torch.equal(expected, model(**probe).logits)
        model._causalmix_plain_head = known
        model.train(was_training)
    return known
