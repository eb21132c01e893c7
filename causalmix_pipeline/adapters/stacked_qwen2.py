"""Many tiny Qwen2-shaped language models in one stack of tensors: forward, backward, export.

At this size a model spends its time in the output layer and in calls, not in its weights. So K
models share every call (their tensors are stacked, K first), the loss is taken together with its
gradient a chunk of logits at a time, never holding all of them, and the backward pass is written
out by hand on buffers that are made once. A model's numbers do not depend on its neighbours.

Axes: K models, B windows, L tokens of a window, N = B x L tokens of a step, E dimensions of a head.
The shape is Qwen2's (arXiv 2407.10671), equal to `transformers`' Qwen2ForCausalLM to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig

if TYPE_CHECKING:
    import torch

#: Added to the mean square before its root, as in Qwen2.
NORM_EPSILON = 1e-6
#: Logits of one chunk of the loss on a CPU, 2 MiB of fp32: a twentieth less time at 32x1 than with
#: a quarter of it.
CPU_CHUNK_LOGITS = 1 << 19
#: Logits of one chunk on an accelerator: 256 MiB of fp32, large enough that calls cost nothing.
GPU_CHUNK_LOGITS = 1 << 26


class StackedQwen2:
    """K Qwen2-shaped models in one set of tensors, with their gradients.

    Matrices are held input first (`x @ W`). Dimensions of a head are held as pairs that turn
    together, so that rotary positions are one complex product; `to_transformers` undoes both.

    Attributes:
        weights: tensors by name, each (K, ...), views of the flat tensors in `flat_weights`.
        gradients: the same names and shapes; written by `loss_and_gradients`.
        flat_weights, flat_gradients: "embedding" (K, V, H); "matrices" (K, all matrices of the
            layers); "vectors" (K, all biases and norms).
    """

    def __init__(self, config: ProxyConfig, n_models: int, *, device: str = "cpu") -> None:
        """Make K equal models with the weights of `config.init_seed`.

        Args:
            config: the shape of the models.
            n_models: K, >= 1.
            device: where torch computes.

        Raises:
            ProxyError: if `n_models` is below 1, or the device is not there.
        """
        import torch

        if n_models < 1:
            raise ProxyError(
                f"n_models must be >= 1, got {n_models}: a stack needs a model. Give a count."
            )
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ProxyError(
                f"device must be one that torch finds, got {device!r}: torch sees no CUDA device. "
                'Use device="cpu".'
            )
        self.config = config
        self.n_models = n_models
        self.weights, self.flat_weights = self._allocate()
        self.gradients, self.flat_gradients = self._allocate()
        self._memory: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._initialise()
        self._turns_LE, self._mask_LL = self._positions()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight of one model, in the order in which they are first drawn."""
        hidden, intermediate = self.config.hidden, self.config.intermediate
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.config.vocab_size, hidden)}
        for layer in range(self.config.layers):
            shapes |= {
                f"{layer}.qkv": (hidden, 3 * hidden),
                f"{layer}.out": (hidden, hidden),
                f"{layer}.gate": (hidden, intermediate),
                f"{layer}.up": (hidden, intermediate),
                f"{layer}.down": (intermediate, hidden),
                f"{layer}.qkv_bias": (3 * hidden,),
                f"{layer}.attention_norm": (hidden,),
                f"{layer}.feed_forward_norm": (hidden,),
            }
        return shapes | {"norm": (hidden,)}

    def _allocate(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Zeros for all weights: views by name, and the three flat tensors they look into."""
        import torch

        shapes = self._shapes()
        embedding = torch.zeros(self.n_models, *shapes["embedding"], device=self.device)
        views, flat = {"embedding": embedding}, {"embedding": embedding}
        for group, n_axes in (("matrices", 2), ("vectors", 1)):
            members = {
                name: shape
                for name, shape in shapes.items()
                if len(shape) == n_axes and name != "embedding"
            }
            sizes = [int(np.prod(shape)) for shape in members.values()]
            flat[group] = torch.zeros(self.n_models, sum(sizes), device=self.device)
            for (name, shape), part in zip(
                members.items(), flat[group].split(sizes, dim=1), strict=True
            ):
                views[name] = part.view(self.n_models, *shape)
        return views, flat

    def _initialise(self) -> None:
        """Draw one model's weights, on the CPU so that devices agree, and give them to all."""
        import torch

        rng = torch.Generator().manual_seed(self.config.init_seed)
        for name, shape in self._shapes().items():
            if len(shape) == 2:
                drawn = torch.randn(*shape, generator=rng) * self.config.init_std
                self.weights[name].copy_(drawn)
            elif name.endswith("norm"):
                self.weights[name].fill_(1.0)

    def _positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary turns as complex numbers, (1, L, 1, E/2), and the causal mask, (1, L, L)."""
        import torch

        length, size = self.config.sequence_length, self.config.head_size
        powers = torch.arange(0, size, 2, dtype=torch.float32) / size
        frequencies = 1.0 / self.config.rope_theta**powers
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        turns = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
        mask = torch.full((1, length, length), float("-inf")).triu(1)
        return turns.to(self.device), mask.to(self.device)

    def _buffer(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor to write into, of memory kept by name: fresh memory costs more than the sums."""
        import torch

        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            size = int(np.prod(shape))
            kept = self._memory.get(name)
            if kept is None or kept.numel() < size:
                kept = self._memory[name] = torch.empty(size, device=self.device)
            buffer = self._buffers[name] = kept[:size].view(shape)
        return buffer

    def _product(
        self,
        out: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        add: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write beta * add + alpha * left @ right into `out`, which is `add` by default."""
        import torch

        add = out if add is None else add
        if self.config.bf16:
            product = torch.bmm(left.bfloat16(), right.bfloat16()).float().mul_(alpha)
            return out.copy_(product if beta == 0 else product.add_(add, alpha=beta))
        return torch.baddbmm(add, left, right, beta=beta, alpha=alpha, out=out)

    @property
    def bytes_held(self) -> int:
        """Bytes of weights, gradients, AdamW's two moments and all buffers used so far."""
        weights = sum(4 * weight.nbytes for weight in self.flat_weights.values())
        return weights + sum(kept.nbytes for kept in self._memory.values())

    # The forward pass. What the backward pass needs stays in the buffers, by layer.

    def _forward(self, inputs_KBL: torch.Tensor) -> torch.Tensor:
        """Normalised output of the last layer, (K, N, H), before the last norm's weights."""
        import torch

        models, n_tokens = self.n_models, inputs_KBL[0].numel()
        first_row_K = torch.arange(models, device=self.device) * self.config.vocab_size
        self._rows_N = (inputs_KBL.reshape(models, -1) + first_row_K[:, None]).view(-1)
        stream = self._buffer("stream", models, n_tokens, self.config.hidden)
        table = self.weights["embedding"].view(-1, self.config.hidden)
        torch.index_select(table, 0, self._rows_N, out=stream.view(-1, self.config.hidden))
        for layer in range(self.config.layers):
            self._attention(layer, stream)
            self._feed_forward(layer, stream)
        return self._normalise("last", stream)

    def _normalise(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        """Rows of the stream over their root mean square; keeps both factor and result."""
        import torch

        models, n_tokens, hidden = stream.shape
        factor = self._buffer(f"{name}.factor", models, n_tokens, 1)
        out = self._buffer(f"{name}.normal", models, n_tokens, hidden)
        torch.mul(stream, stream, out=out)
        torch.mean(out, -1, keepdim=True, out=factor)
        factor.add_(NORM_EPSILON).rsqrt_()
        return torch.mul(stream, factor, out=out)

    def _scaled(self, layer: int, name: str, norm: str) -> torch.Tensor:
        """A matrix with the weights of the norm before it multiplied into its rows."""
        import torch

        weight = self.weights[f"{layer}.{name}"]
        out = self._buffer(f"{layer}.{name}.scaled", *weight.shape)
        return torch.mul(weight, self.weights[f"{layer}.{norm}"][:, :, None], out=out)

    def _attention(self, layer: int, stream: torch.Tensor) -> None:
        """Add the attention of a layer to the stream."""
        import torch

        config, (models, n_tokens, hidden) = self.config, stream.shape
        length, heads, size = config.sequence_length, config.heads, config.head_size
        windows = models * n_tokens // length
        normal = self._normalise(f"{layer}.attention", stream)
        qkv = self._buffer("qkv", models, n_tokens, 3 * hidden)
        bias = self.weights[f"{layer}.qkv_bias"][:, None, :]
        self._product(qkv, normal, self._scaled(layer, "qkv", "attention_norm"), beta=1.0, add=bias)
        query, key, value = qkv.view(windows, length, 3, heads, size).unbind(2)
        turned = self._buffer(f"{layer}.turned", 3, windows, heads, length, size)
        for part, source in ((0, query), (1, key)):
            torch.mul(
                _pairs(source),
                self._turns_LE,
                out=_pairs(turned[part]).transpose(1, 2),
            )
        turned[2].transpose(1, 2).copy_(value)
        query, key, value = turned.view(3, windows * heads, length, size).unbind(0)
        weights = self._buffer(f"{layer}.weights", windows * heads, length, length)
        mask = self._mask_LL.expand_as(weights)
        self._product(weights, query, key.transpose(1, 2), alpha=size**-0.5, beta=1.0, add=mask)
        torch.softmax(weights, -1, out=weights)
        mixed = self._buffer("mixed", windows * heads, length, size)
        self._product(mixed, weights, value)
        joined = self._buffer(f"{layer}.joined", models, n_tokens, hidden)
        joined.view(windows, length, heads, size).copy_(
            mixed.view(windows, heads, length, size).transpose(1, 2)
        )
        self._product(stream, joined, self.weights[f"{layer}.out"], beta=1.0)

    def _feed_forward(self, layer: int, stream: torch.Tensor) -> None:
        """Add the feed-forward part of a layer to the stream."""
        import torch

        models, n_tokens, _ = stream.shape
        shape = (models, n_tokens, self.config.intermediate)
        normal = self._normalise(f"{layer}.feed_forward", stream)
        gate, up = (self._buffer(f"{layer}.{name}", *shape) for name in ("gate", "up"))
        self._product(gate, normal, self._scaled(layer, "gate", "feed_forward_norm"))
        self._product(up, normal, self._scaled(layer, "up", "feed_forward_norm"))
        opened = self._buffer(f"{layer}.opened", *shape)
        torch.ops.aten.silu.out(gate, out=opened)
        product = self._buffer(f"{layer}.product", *shape)
        torch.mul(opened, up, out=product)
        self._product(stream, product, self.weights[f"{layer}.down"], beta=1.0)

    # The loss and the backward pass.

    def loss_and_gradients(self, tokens_KBL: np.ndarray) -> torch.Tensor:
        """Mean loss of each model on its own windows; writes `gradients`.

        Args:
            tokens_KBL: token numbers, shape (K, B, L + 1).

        Returns:
            Nats per token, shape (K,).
        """
        import torch

        tokens = torch.as_tensor(tokens_KBL, device=self.device, dtype=torch.int64)
        normal = self._forward(tokens[:, :, :-1])
        targets_KN = tokens[:, :, 1:].reshape(self.n_models, -1)
        loss_K, d_normal = self._output_backward(normal, targets_KN)
        d_stream = self._buffer("d_stream", *normal.shape)
        self._normalise_backward("last", d_normal, out=d_stream, add=False)
        for layer in reversed(range(self.config.layers)):
            self._feed_forward_backward(layer, d_stream)
            self._attention_backward(layer, d_stream)
        table = self.gradients["embedding"].view(-1, self.config.hidden)
        d_rows = d_stream.view(-1, self.config.hidden)
        if self.device.type == "cpu":
            table.index_add_(0, self._rows_N, d_rows)
        else:
            # Sorts the rows first, so that a sum has one order: index_add_ has any on a GPU.
            table.index_put_((self._rows_N,), d_rows, accumulate=True)
        return loss_K

    def _chunks(self, n_tokens: int) -> list[tuple[slice, slice]]:
        """Blocks of (models, tokens) whose logits are held at once."""
        on_cpu = self.device.type == "cpu"
        n_models = 1 if on_cpu else self.n_models
        limit = CPU_CHUNK_LOGITS if on_cpu else GPU_CHUNK_LOGITS
        n_rows = max(1, min(n_tokens, limit // (n_models * self.config.vocab_size)))
        return [
            (slice(model, model + n_models), slice(row, min(row + n_rows, n_tokens)))
            for model in range(0, self.n_models, n_models)
            for row in range(0, n_tokens, n_rows)
        ]

    def _output_backward(
        self, normal: torch.Tensor, targets_KN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each model and its gradient at the last normalised stream.

        Takes the logits of a chunk, their softmax in place, both gradients, and forgets them.
        """
        import torch

        models, n_tokens, hidden = normal.shape
        embedding, norm = self.weights["embedding"], self.weights["norm"][:, None, :]
        scaled = torch.mul(normal, norm, out=self._buffer("scaled", *normal.shape))
        d_scaled = self._buffer("d_scaled", *normal.shape)
        d_table = self._buffer("d_table", models, hidden, self.config.vocab_size).zero_()
        chosen_KN1 = self._buffer("chosen", models, n_tokens, 1)
        for block, rows in self._chunks(n_tokens):
            part, table = scaled[block, rows], embedding[block]
            target = targets_KN[block, rows, None]
            logits = self._buffer("logits", *part.shape[:2], self.config.vocab_size)
            self._product(logits, part, table.transpose(1, 2))
            torch.softmax(logits, -1, out=logits)
            chosen = torch.gather(logits, 2, target)
            chosen_KN1[block, rows] = chosen
            logits.scatter_(2, target, chosen - 1.0)
            self._product(d_scaled[block, rows], logits, table, alpha=1.0 / n_tokens)
            self._product(
                d_table[block], part.transpose(1, 2), logits, alpha=1.0 / n_tokens, beta=1.0
            )
        if self.device.type == "cpu":
            # Model by model: torch copies a transposed matrix in tiles, a stack of them row by row.
            for gradient, d_one in zip(self.gradients["embedding"], d_table, strict=True):
                gradient.copy_(d_one.t())
        else:
            self.gradients["embedding"].copy_(d_table.transpose(1, 2))
        torch.sum(torch.mul(d_scaled, normal, out=scaled), 1, out=self.gradients["norm"])
        # The smallest normal number stands for a probability that fp32 rounds to 0.
        least = torch.finfo(torch.float32).tiny
        loss_K = -chosen_KN1.clamp_(min=least).log_().mean((1, 2))
        return loss_K, d_scaled.mul_(norm)

    def _normalise_backward(
        self, name: str, d_normal: torch.Tensor, *, out: torch.Tensor, add: bool
    ) -> None:
        """Gradient at the stream from that at its normalised rows, added to `out` or written."""
        import torch

        normal, factor = self._buffers[f"{name}.normal"], self._buffers[f"{name}.factor"]
        product = torch.mul(d_normal, normal, out=self._buffer("d_product", *normal.shape))
        mean = torch.mean(product, -1, keepdim=True, out=self._buffer("d_mean", *factor.shape))
        d_normal.addcmul_(normal, mean, value=-1.0)
        if add:
            out.addcmul_(d_normal, factor)
        else:
            torch.mul(d_normal, factor, out=out)

    def _scaled_backward(
        self, layer: int, name: str, norm: str, normal: torch.Tensor, d_out: torch.Tensor
    ) -> None:
        """Gradients of a matrix and, added, of the norm's weights multiplied into it."""
        import torch

        full = f"{layer}.{name}"
        d_scaled = self._buffer(f"{name}.d_scaled", *self.weights[full].shape)
        self._product(d_scaled, normal.transpose(1, 2), d_out)
        scale = self.weights[f"{layer}.{norm}"][:, :, None]
        torch.mul(d_scaled, scale, out=self.gradients[full])
        self.gradients[f"{layer}.{norm}"] += (d_scaled * self.weights[full]).sum(2)

    def _feed_forward_backward(self, layer: int, d_stream: torch.Tensor) -> None:
        """Gradients of a feed-forward part; adds what reaches the stream before it."""
        import torch

        gate, up, opened, product = (
            self._buffers[f"{layer}.{name}"] for name in ("gate", "up", "opened", "product")
        )
        normal = self._buffers[f"{layer}.feed_forward.normal"]
        norm, d_norm = "feed_forward_norm", self.gradients[f"{layer}.feed_forward_norm"]
        self._product(self.gradients[f"{layer}.down"], product.transpose(1, 2), d_stream)
        d_product = self._buffer("d_inner", *product.shape)
        self._product(d_product, d_stream, self.weights[f"{layer}.down"].transpose(1, 2))
        d_up = torch.mul(d_product, opened, out=opened)
        d_opened = d_product.mul_(up)
        d_gate = torch.ops.aten.silu_backward.grad_input(d_opened, gate, grad_input=up)
        d_norm.zero_()
        self._scaled_backward(layer, "gate", norm, normal, d_gate)
        self._scaled_backward(layer, "up", norm, normal, d_up)
        d_normal = self._buffer("d_normal", *normal.shape)
        gate_scaled, up_scaled = (
            self._buffers[f"{layer}.{name}.scaled"].transpose(1, 2) for name in ("gate", "up")
        )
        self._product(d_normal, d_gate, gate_scaled)
        self._product(d_normal, d_up, up_scaled, beta=1.0)
        self._normalise_backward(f"{layer}.feed_forward", d_normal, out=d_stream, add=True)

    def _attention_backward(self, layer: int, d_stream: torch.Tensor) -> None:
        """Gradients of an attention; adds what reaches the stream before it."""
        import torch

        config, (models, n_tokens, hidden) = self.config, d_stream.shape
        length, heads, size = config.sequence_length, config.heads, config.head_size
        windows = models * n_tokens // length
        joined, weights = self._buffers[f"{layer}.joined"], self._buffers[f"{layer}.weights"]
        turned = self._buffers[f"{layer}.turned"]
        query, key, value = turned.view(3, windows * heads, length, size).unbind(0)

        self._product(self.gradients[f"{layer}.out"], joined.transpose(1, 2), d_stream)
        d_joined = self._product(joined, d_stream, self.weights[f"{layer}.out"].transpose(1, 2))
        d_mixed = self._buffer("mixed", windows * heads, length, size)
        d_mixed.view(windows, heads, length, size).transpose(1, 2).copy_(
            d_joined.view(windows, length, heads, size)
        )
        d_weights = self._buffer("d_weights", *weights.shape)
        self._product(d_weights, d_mixed, value.transpose(1, 2))
        d_turned = self._buffer("d_turned", 3, windows, heads, length, size)
        d_query, d_key, d_value = d_turned.view(3, windows * heads, length, size).unbind(0)
        self._product(d_value, weights.transpose(1, 2), d_mixed)
        d_scores = torch.ops.aten._softmax_backward_data.out(
            d_weights, weights, -1, torch.float32, grad_input=d_weights
        )
        self._product(d_query, d_scores, key, alpha=size**-0.5)
        self._product(d_key, d_scores.transpose(1, 2), query, alpha=size**-0.5)

        d_qkv = self._buffer("qkv", models, n_tokens, 3 * hidden)
        parts = d_qkv.view(windows, length, 3, heads, size).unbind(2)
        for part in (0, 1):
            torch.mul(
                _pairs(d_turned[part]).transpose(1, 2),
                self._turns_LE.conj().resolve_conj(),
                out=_pairs(parts[part]),
            )
        parts[2].copy_(d_turned[2].transpose(1, 2))
        normal = self._buffers[f"{layer}.attention.normal"]
        torch.sum(d_qkv, 1, out=self.gradients[f"{layer}.qkv_bias"])
        self.gradients[f"{layer}.attention_norm"].zero_()
        self._scaled_backward(layer, "qkv", "attention_norm", normal, d_qkv)
        d_normal = self._buffer("d_normal", *normal.shape)
        self._product(d_normal, d_qkv, self._buffers[f"{layer}.qkv.scaled"].transpose(1, 2))
        self._normalise_backward(f"{layer}.attention", d_normal, out=d_stream, add=True)

    # Scoring and export.

    def summed_nats(self, windows_WL: np.ndarray) -> np.ndarray:
        """Nats that each model pays for all predicted tokens of the windows.

        Args:
            windows_WL: held-out tokens, the same for all models; shape (W, L + 1).

        Returns:
            Sums over W x L tokens, float64, shape (K,).
        """
        import torch

        windows = torch.as_tensor(windows_WL, device=self.device, dtype=torch.int64)
        total_K = torch.zeros(self.n_models, dtype=torch.float64, device=self.device)
        for some_BL in windows.split(self.config.batch_size):
            tokens = some_BL.expand(self.n_models, *some_BL.shape)
            for block, _, chosen in self._log_probabilities(tokens):
                total_K[block] -= chosen.sum((1, 2), dtype=torch.float64)
        return total_K.cpu().numpy()

    def token_nats(self, windows_WL: np.ndarray) -> np.ndarray:
        """Nats that each model pays for each predicted token of the windows.

        Args:
            windows_WL: tokens, the same for all models; shape (W, L + 1).

        Returns:
            fp32, shape (K, W, L).
        """
        import torch

        windows = torch.as_tensor(windows_WL, device=self.device, dtype=torch.int64)
        tokens = windows.expand(self.n_models, *windows.shape)
        nats_KN = torch.zeros(self.n_models, windows[:, 1:].numel(), device=self.device)
        for block, rows, chosen in self._log_probabilities(tokens):
            nats_KN[block, rows] = -chosen[..., 0]
        return nats_KN.view(self.n_models, *windows[:, 1:].shape).cpu().numpy()

    def last_token_nats(self) -> np.ndarray:
        """Nats of each token of the last `loss_and_gradients`, fp32, shape (K, B x L)."""
        return -self._buffers["chosen"][..., 0].cpu().numpy()

    def _log_probabilities(
        self, tokens_KBL: torch.Tensor
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Log-probabilities of the predicted tokens, a block of (models, tokens) at a time."""
        import torch

        normal = self._forward(tokens_KBL[:, :, :-1])
        scaled = normal.mul_(self.weights["norm"][:, None, :])
        targets_KN = tokens_KBL[:, :, 1:].reshape(self.n_models, -1)
        for block, rows in self._chunks(scaled.shape[1]):
            part, target = scaled[block, rows], targets_KN[block, rows, None]
            logits = self._buffer("logits", *part.shape[:2], self.config.vocab_size)
            self._product(logits, part, self.weights["embedding"][block].transpose(1, 2))
            torch.log_softmax(logits, -1, out=logits)
            yield block, rows, torch.gather(logits, 2, target)

    def to_transformers(self, model_index: int) -> dict[str, torch.Tensor]:
        """Weights of one model as a state dict of `transformers`' Qwen2ForCausalLM.

        Args:
            model_index: place of the model in the stack, in [0, K).

        Returns:
            Copies on the CPU by parameter name, to pass to `load_state_dict` of a model made from
            `transformers_config`.
        """
        config, state = self.config, {}
        picked = {name: weight[model_index].cpu() for name, weight in self.weights.items()}
        state["model.embed_tokens.weight"] = picked["embedding"].clone()
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        state["model.norm.weight"] = picked["norm"].clone()
        for layer in range(config.layers):
            part = {
                name.split(".")[1]: weight
                for name, weight in picked.items()
                if name.startswith(f"{layer}.")
            }
            prefix = f"model.layers.{layer}"
            for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
                columns = slice(place * config.hidden, (place + 1) * config.hidden)
                weight = part["qkv"][:, columns].t().contiguous()
                bias = part["qkv_bias"][columns].clone()
                if name != "v_proj":
                    weight, bias = (_unpaired(tensor, config) for tensor in (weight, bias))
                state[f"{prefix}.self_attn.{name}.weight"] = weight
                state[f"{prefix}.self_attn.{name}.bias"] = bias
            state[f"{prefix}.self_attn.o_proj.weight"] = part["out"].t().contiguous()
            for name in ("gate", "up", "down"):
                state[f"{prefix}.mlp.{name}_proj.weight"] = part[name].t().contiguous()
            state[f"{prefix}.input_layernorm.weight"] = part["attention_norm"].clone()
            state[f"{prefix}.post_attention_layernorm.weight"] = part["feed_forward_norm"].clone()
        return state


def transformers_config(config: ProxyConfig) -> dict[str, Any]:
    """Arguments of `transformers`' Qwen2Config for a model of this shape."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.sequence_length,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
    }


def _pairs(tensor: torch.Tensor) -> torch.Tensor:
    """The last axis read as complex numbers, half as many."""
    import torch

    return torch.view_as_complex(tensor.unflatten(-1, (-1, 2)))


def _unpaired(rows: torch.Tensor, config: ProxyConfig) -> torch.Tensor:
    """Rows of a query or key matrix as Qwen2 has them: first halves of the pairs, then second."""
    paired = rows.view(config.heads, config.head_size // 2, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape).contiguous()
