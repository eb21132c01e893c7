"""CPU seconds of one proxy run: the stacked engine against the plain loop over transformers' Qwen2.

Both train on one thread, in turns, from the same weights and tokens, in one process; the ratio is
what carries over to another machine, the seconds are not. Run:

    OMP_NUM_THREADS=1 python -m causalmix_pipeline_tests.benchmarks.proxy_engine --hidden 32
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2, transformers_config
from causalmix_pipeline.adapters.torch_proxy import train_stack
from causalmix_pipeline.core.proxy import ProxyConfig


def draw_batches(config: ProxyConfig, n_models: int) -> np.ndarray:
    """Tokens of a skewed distribution; shape (steps, K, B, L + 1)."""
    shape = (config.steps, n_models, config.batch_size, config.sequence_length + 1)
    return np.random.default_rng(0).zipf(1.3, size=shape) % config.vocab_size


def plain_seconds(config: ProxyConfig, batches_SBL: np.ndarray) -> tuple[float, float]:
    """CPU seconds and last loss of the plain loop: library model, autograd, fused AdamW."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**transformers_config(config)))
    model.load_state_dict(StackedQwen2(config, 1).to_transformers(0))
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=config.betas, fused=True)
    loss = torch.tensor(0.0)
    start = time.process_time()
    for step, batch in enumerate(batches_SBL):
        tokens = torch.as_tensor(batch)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimiser.step()
    return time.process_time() - start, loss.item()


def stacked_seconds(config: ProxyConfig, batches_SKBL: np.ndarray) -> tuple[float, float]:
    """CPU seconds a model and last loss of the first one, in the stacked engine."""
    n_models = batches_SKBL.shape[1]
    result = train_stack(config, batches_SKBL.__getitem__, n_models, {})
    return result.cpu_seconds / n_models, float(result.train_loss_KS[0, -1])


def main() -> None:
    """Print a table of CPU milliseconds a step and model, best of some rounds."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60, help="steps timed in each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the fastest one counts")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ProxyConfig(
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        vocab_size=options.vocab_size,
        steps=options.steps,
    )
    batches = draw_batches(config, max(options.models))
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        timed = {"plain transformers loop": plain_seconds(config, batches[:, 0])[0]}
        for n_models in options.models:
            timed[f"stack of {n_models}"] = stacked_seconds(config, batches[:, :n_models])[0]
        best = {name: min(best.get(name, np.inf), seconds) for name, seconds in timed.items()}
    plain = best["plain transformers loop"]
    print(f"{config.hidden}x{config.layers}, {config.heads} heads, vocabulary {config.vocab_size}")
    print(f"{'engine':<26}{'ms a step':>10}{'s a 1,000 steps':>17}{'plain / this':>14}")
    for name, seconds in best.items():
        each = seconds / config.steps
        print(f"{name:<26}{1e3 * each:>10.2f}{1e3 * each:>17.2f}{plain / seconds:>14.2f}")


if __name__ == "__main__":
    main()
