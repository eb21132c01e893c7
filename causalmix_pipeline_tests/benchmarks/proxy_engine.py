"""Seconds of one proxy run: the stacked engine against transformers' Qwen2, trained plainly.

Rivals train the library's model on one thread, from the same weights and tokens: a plain loop
(autograd, fused AdamW, clipping), and Hugging Face's Trainer with nothing logged, saved or scored.
Every engine has a process of its own, so that its peak memory is its own; engines take turns and
the best of their turns counts, because other work slows a shared machine. Ratios carry over to
another machine, seconds do not: CPU seconds on a CPU, seconds on a GPU. Run:

    OMP_NUM_THREADS=1 python -m causalmix_pipeline_tests.benchmarks.proxy_engine --shapes 32x1 64x2
    OMP_NUM_THREADS=1 python -m causalmix_pipeline_tests.benchmarks.proxy_engine \
        --device cuda --bf16 --shapes 32x1 128x2 256x4 --models 1 8 64 256
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2, transformers_config
from causalmix_pipeline.adapters.torch_proxy import train_stack
from causalmix_pipeline.core.proxy import ProxyConfig

Turn = Callable[[], float]


@dataclass(frozen=True)
class Place:
    """Where engines compute, and what counts as their time there."""

    device: str

    def clock(self) -> float:
        """CPU seconds on a CPU; seconds once the device has done all, elsewhere."""
        import torch

        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak_mib(self) -> float:
        """Most memory so far: of the process on a CPU, of the device elsewhere."""
        import torch

        if self.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return torch.cuda.max_memory_allocated() / 2**20


def config_of(shape: str, *, steps: int, vocab_size: int, bf16: bool) -> ProxyConfig:
    """The configuration of a shape such as "64x2"; heads of 32 dimensions."""
    hidden, layers = (int(number) for number in shape.split("x"))
    return ProxyConfig(
        hidden=hidden,
        layers=layers,
        heads=hidden // 32,
        vocab_size=vocab_size,
        steps=steps,
        bf16=bf16,
    )


def draw_batches(config: ProxyConfig, n_models: int) -> np.ndarray:
    """Tokens of a skewed distribution; shape (steps, K, B, L + 1)."""
    shape = (config.steps, n_models, config.batch_size, config.sequence_length + 1)
    return np.random.default_rng(0).zipf(1.3, size=shape) % config.vocab_size


def library_model(config: ProxyConfig) -> Any:
    """Qwen2 of `transformers` with the engine's first weights; sdpa attention, its default."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**transformers_config(config), use_cache=False))
    model.load_state_dict(StackedQwen2(config, 1).to_transformers(0))
    return model


def parameter_groups(model: Any, config: ProxyConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def plain_loop(config: ProxyConfig, place: Place, *, fused: bool) -> Turn:
    """A turn: seconds of the plain loop over all steps."""
    import torch

    model = library_model(config).to(place.device)
    optimiser = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, fused=fused)
    batches = torch.as_tensor(draw_batches(config, 1)[:, 0])

    def turn() -> float:
        start = place.clock()
        for step, each in enumerate(batches):
            tokens = each.to(place.device)
            with torch.autocast(place.device, torch.bfloat16, enabled=config.bf16):
                logits = model(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), tokens[:, 1:].flatten()
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate_at(step)
            optimiser.step()
        return place.clock() - start

    return turn


def trainer(config: ProxyConfig, place: Place) -> Turn:
    """A turn: seconds of `transformers.Trainer` over all steps, its set-up left out."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = library_model(config)
    tokens_SBL = draw_batches(config, 1)[:, 0]
    # The library shifts labels by itself: a window of L + 1 tokens predicts L.
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.as_tensor(tokens_SBL).flatten(0, 1).unbind()
    ]
    marks: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks["begin"] = place.clock()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks["end"] = place.clock()

    folder = tempfile.mkdtemp()

    def turn() -> float:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=config.batch_size,
            max_steps=config.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            max_grad_norm=config.grad_clip,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=place.device == "cpu",
            bf16=config.bf16,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
        )
        data: Any = rows
        worker = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
        worker.train()
        return marks["end"] - marks["begin"]

    return turn


def stack_of(config: ProxyConfig, place: Place, n_models: int) -> Turn:
    """A turn: seconds a model of the stacked engine over all steps."""
    batches = draw_batches(config, n_models)

    def turn() -> float:
        start = place.clock()
        train_stack(config, batches.__getitem__, n_models, {}, device=place.device)
        return (place.clock() - start) / n_models

    return turn


def engines(models: list[int]) -> dict[str, Callable[[ProxyConfig, Place], Turn]]:
    """What is timed, by name."""
    table: dict[str, Callable[[ProxyConfig, Place], Turn]] = {
        "plain loop, fused AdamW": partial(plain_loop, fused=True),
        "plain loop, AdamW": partial(plain_loop, fused=False),
        "HF Trainer": trainer,
    }
    return table | {f"stack of {k}": partial(stack_of, n_models=k) for k in models}


def serve(config: ProxyConfig, name: str, place: Place) -> None:
    """Take a turn for each line of the input; print seconds and peak MiB after each."""
    import torch

    torch.set_num_threads(1)
    models = [int(name.split()[-1])] if name.startswith("stack") else []
    turn = engines(models)[name](config, place)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints what it did
            seconds = turn()
        print(json.dumps([seconds, place.peak_mib()]), flush=True)


def measure(shape: str, names: list[str], options: argparse.Namespace) -> None:
    """Let the engines take turns, and print their table."""
    common = ["--steps", str(options.steps), "--vocab-size", str(options.vocab_size)]
    common += ["--device", options.device, *(["--bf16"] if options.bf16 else [])]
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--serve", shape, name, *common],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    turns: dict[str, list[float]] = {name: [] for name in names}
    peak: dict[str, float] = {}
    for round_number in range(options.rounds + 1):
        for name, worker in workers.items():
            assert worker.stdin and worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds, peak[name] = json.loads(worker.stdout.readline())
            if round_number > 0:  # the first warms up
                turns[name].append(seconds)
    for worker in workers.values():
        worker.communicate()
    config = config_of(shape, steps=options.steps, vocab_size=options.vocab_size, bf16=options.bf16)
    best = {name: min(seconds) for name, seconds in turns.items()}
    plain = min(best[name] for name in names if name.startswith("plain"))
    print(
        f"{shape}, {config.heads} heads, vocabulary {config.vocab_size}, {options.rounds} rounds, "
        f"{options.device}, {'bf16' if config.bf16 else 'fp32'}"
    )
    rate = "tokens/CPU s" if options.device == "cpu" else "tokens/s"
    print(
        f"{'engine':<26}{'ms a step':>10}{'median':>8}{rate:>14}"
        f"{'/ plain':>9}{'/ Trainer':>11}{'peak MiB':>10}"
    )
    for name, seconds in best.items():
        each, middle = (1e3 * x / config.steps for x in (seconds, np.median(turns[name])))
        print(
            f"{name:<26}{each:>10.3f}{middle:>8.3f}{config.tokens / seconds:>14,.0f}"
            f"{plain / seconds:>9.2f}{best['HF Trainer'] / seconds:>11.2f}{peak[name]:>10.0f}"
        )


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["32x1", "64x2"])
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the fastest one counts")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="products of matrices in bfloat16")
    parser.add_argument("--serve", nargs=2, metavar=("SHAPE", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        shape, name = options.serve
        config = config_of(
            shape, steps=options.steps, vocab_size=options.vocab_size, bf16=options.bf16
        )
        serve(config, name, Place(options.device))
        return
    for shape in options.shapes:
        measure(shape, list(engines(options.models)), options)


if __name__ == "__main__":
    main()
