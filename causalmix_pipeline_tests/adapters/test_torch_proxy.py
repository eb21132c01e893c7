"""The stacked engine against transformers' Qwen2, and what a stack must not do."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from causalmix_pipeline.adapters import stacked_qwen2, torch_proxy
from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2, transformers_config
from causalmix_pipeline.adapters.torch_proxy import StackedAdamW, models_that_fit, train_stack
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig

TINY = ProxyConfig(
    hidden=16, vocab_size=64, sequence_length=16, batch_size=2, steps=24, learning_rate=0.02
)
DEEP = ProxyConfig(
    hidden=32,
    layers=2,
    heads=2,
    vocab_size=256,
    sequence_length=32,
    batch_size=3,
    steps=40,
    learning_rate=0.01,
    init_std=0.08,
)


def draw_batches(config: ProxyConfig, n_models: int, seed: int = 0) -> np.ndarray:
    """Tokens with a skewed distribution and a rule between neighbours; (steps, K, B, L + 1)."""
    rng = np.random.default_rng(seed)
    shape = (config.steps, n_models, config.batch_size, config.sequence_length + 1)
    tokens = rng.zipf(1.4, size=shape) % config.vocab_size
    tokens[..., 1::2] = (3 * tokens[..., :-1:2][..., : tokens[..., 1::2].shape[-1]] + 1) % (
        config.vocab_size
    )
    return tokens


def transformers_model(config: ProxyConfig, stack: StackedQwen2) -> Qwen2ForCausalLM:
    """Qwen2 of the library with the weights of the stack's first model."""
    shape = {**transformers_config(config), "attn_implementation": "eager"}
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.load_state_dict(stack.to_transformers(0))
    return model


def train_plainly(model: Qwen2ForCausalLM, config: ProxyConfig, batches: np.ndarray) -> np.ndarray:
    """The textbook loop on one model: torch's AdamW, clipping and autograd; loss of each step."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=config.betas,
    )
    losses = []
    for step in range(config.steps):
        tokens = torch.as_tensor(batches[step])
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimiser.step()
        losses.append(loss.item())
    return np.array(losses)


def losses_by_step(config: ProxyConfig, batches: np.ndarray) -> tuple[np.ndarray, StackedQwen2]:
    """Loss of each step of each model, (steps, K), and the trained stack."""
    stack = StackedQwen2(config, batches.shape[1])
    optimiser = StackedAdamW(stack)
    losses = []
    for step in range(config.steps):
        losses.append(stack.loss_and_gradients(batches[step]).numpy().copy())
        optimiser.step(config.learning_rate_at(step))
    return np.stack(losses), stack


def train(config: ProxyConfig, batches: np.ndarray, **options):
    """Train on batches drawn before; evaluates on the windows of the first step."""
    windows = {"first": batches[0, 0], "all": batches[0].reshape(-1, batches.shape[-1])}
    return train_stack(config, batches.__getitem__, batches.shape[1], windows, **options)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal byte for byte, nan included."""
    return left.tobytes() == right.tobytes()


#: Shapes whose stacks are compared with the library's model over 60 steps. First weights of .12 and
#: .08 as in a scanned recipe: training multiplies roundings, from smaller ones by far more.
SHAPES = {
    "32x1": ProxyConfig(steps=60, learning_rate=0.01, init_std=0.12),
    "64x2, four heads": ProxyConfig(
        hidden=64, layers=2, heads=4, steps=60, learning_rate=0.005, init_std=0.08
    ),
    "32x2, small vocabulary": replace(DEEP, steps=60),
    "48x3, three heads": ProxyConfig(
        hidden=48,
        layers=3,
        heads=3,
        vocab_size=500,
        sequence_length=40,
        batch_size=3,
        steps=60,
        learning_rate=0.005,
        init_std=0.08,
    ),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_stack_of_different_runs_equals_the_transformers_model_run_by_run(config):
    """Another forward pass, autograd and torch's own optimiser, from the same weights and data."""
    batches = draw_batches(config, 3)
    windows = draw_batches(config, 2, seed=1)[0].reshape(-1, config.sequence_length + 1)
    models = [transformers_model(config, StackedQwen2(config, 1)) for _ in range(3)]

    plain = [train_plainly(model, config, batches[:, k]) for k, model in enumerate(models)]
    stacked, stack = losses_by_step(config, batches)

    assert plain[0][-1] < plain[0][0] - 0.3
    assert np.abs(stacked[-1, 0] - stacked[-1, 1:]).min() > 1e-3
    np.testing.assert_allclose(stacked, np.stack(plain, axis=1), atol=1e-5, rtol=0)
    nats_K = stack.summed_nats(windows) / windows[:, 1:].size
    np.testing.assert_allclose(nats_K, [nats_a_token(m, windows) for m in models], atol=1e-5)


def nats_a_token(model: Qwen2ForCausalLM, windows_WL: np.ndarray) -> float:
    """Mean loss of the library's model over held-out windows."""
    tokens = torch.as_tensor(windows_WL)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("name", ["32x1", "64x2, four heads"])
def test_a_run_has_the_same_bits_in_a_stack_of_any_size(name):
    """So that a stack may be halved, or its size measured, without another key for its runs."""
    config = replace(SHAPES[name], steps=3)
    batches = draw_batches(config, 8)
    windows = {"shared": batches[0, 0]}

    whole = train_stack(config, batches.__getitem__, 8, windows)
    for size in (1, 2, 3):
        part = train_stack(config, lambda step, size=size: batches[step, :size], size, windows)
        assert same_bits(part.train_loss_KS, whole.train_loss_KS[:size])
        assert same_bits(part.eval_nats["shared"], whole.eval_nats["shared"][:size])


def test_gradients_equal_those_of_autograd():
    batches = draw_batches(DEEP, 1)
    stack = StackedQwen2(DEEP, 1)
    # Norms and biases off their first values, so that a forgotten factor would show.
    rng = torch.Generator().manual_seed(1)
    vectors = stack.flat_weights["vectors"]
    vectors += 0.3 * torch.randn(vectors.shape, generator=rng)
    model = transformers_model(DEEP, stack)
    stack.loss_and_gradients(batches[0])
    tokens = torch.as_tensor(batches[0, 0])

    logits = model(input_ids=tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    stack.weights = stack.gradients
    exported = stack.to_transformers(0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(exported[name], weight.grad, atol=2e-6, rtol=1e-4, msg=name)


def test_an_exported_model_scores_as_the_stack_does():
    batches = draw_batches(DEEP, 2)
    stack = StackedQwen2(DEEP, 2)
    result = train(DEEP, batches, model=stack)
    model = Qwen2ForCausalLM(Qwen2Config(**transformers_config(DEEP)))
    model.load_state_dict(stack.to_transformers(1))
    tokens = torch.as_tensor(batches[0, 0])

    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="sum"
    )

    assert result.eval_nats["first"][1] == pytest.approx(nats.item(), rel=1e-6)
    assert result.eval_tokens["first"] == tokens[:, 1:].numel()


def test_a_model_learns_the_rule_planted_in_its_data():
    """Every second token follows from the one before it; a model that learns halves its loss."""
    config = ProxyConfig(vocab_size=64, sequence_length=32, steps=200)

    result = train(config, draw_batches(config, 1))

    assert result.train_loss_KS.shape == (1, 20)
    assert result.train_loss_KS[0, -1] < 0.5 * np.log(64)
    assert not result.diverged_K.any()


def test_a_model_does_not_depend_on_its_neighbours():
    """Bit for bit: the same data at another place in the stack, beside other data."""
    batches, others = draw_batches(TINY, 4), draw_batches(TINY, 4, seed=9)
    mixed = np.stack([others[:, 1], batches[:, 2], others[:, 0], batches[:, 0]], axis=1)

    first, second = train(TINY, batches), train(TINY, mixed)

    assert same_bits(first.train_loss_KS[[0, 2]], second.train_loss_KS[[3, 1]])
    windows = {"shared": batches[0, 0]}
    scored = [
        train_stack(TINY, some.__getitem__, 4, windows).eval_nats["shared"]
        for some in (batches, mixed)
    ]
    assert same_bits(scored[0][[0, 2]], scored[1][[3, 1]])


def test_the_demos_shape_does_not_depend_on_its_neighbours_either():
    """The kernels chosen for its sizes are others than those of a tiny model."""
    config = ProxyConfig(steps=4)
    batches = draw_batches(config, 4)
    order = [2, 0, 3, 1]

    first, second = train(config, batches), train(config, batches[:, order])

    assert same_bits(first.train_loss_KS[order], second.train_loss_KS)


def test_the_same_seed_twice_is_equal_bit_for_bit_in_another_process_too():
    code = (
        "import hashlib\n"
        "from causalmix_pipeline_tests.adapters.test_torch_proxy import TINY, draw_batches, train\n"
        "result = train(TINY, draw_batches(TINY, 2))\n"
        "print(hashlib.sha256(result.train_loss_KS.tobytes()).hexdigest())\n"
    )
    results = [train(TINY, draw_batches(TINY, 2)) for _ in range(2)]

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    digests = {hashlib.sha256(one.train_loss_KS.tobytes()).hexdigest() for one in results}
    assert digests == {printed.strip()}
    assert same_bits(results[0].eval_nats["all"], results[1].eval_nats["all"])


def test_all_models_start_from_the_weights_of_the_init_seed():
    stack = StackedQwen2(TINY, 3)
    other = StackedQwen2(ProxyConfig(**{**TINY.to_dict(), "init_seed": 1}), 1)

    for weight in stack.weights.values():
        assert torch.equal(weight[0], weight[2])
    assert not torch.equal(stack.weights["embedding"][0], other.weights["embedding"][0])
    assert stack.weights["0.qkv"].std().item() == pytest.approx(TINY.init_std, rel=0.1)


def test_data_is_asked_for_once_a_step_and_in_order():
    asked = []
    batches = draw_batches(TINY, 1)

    def next_batch(step):
        asked.append(step)
        return batches[step]

    train_stack(TINY, next_batch, 1, {})

    assert asked == list(range(TINY.steps))


def test_two_models_with_the_same_data_are_equal_and_with_other_data_are_not():
    batches = draw_batches(TINY, 3)
    batches[:, 1] = batches[:, 0]

    loss_KS = train(TINY, batches).train_loss_KS

    assert same_bits(loss_KS[0], loss_KS[1])
    assert not same_bits(loss_KS[0], loss_KS[2])


def test_one_diverged_model_is_flagged_and_disturbs_no_other():
    batches = draw_batches(TINY, 3)
    sound = train(TINY, batches)
    stack = StackedQwen2(TINY, 3)
    stack.weights["embedding"][1, 0, 0] = float("inf")

    broken = train(TINY, batches, model=stack)

    assert broken.diverged_K.tolist() == [False, True, False]
    assert not np.isfinite(broken.train_loss_KS[1]).any()
    assert same_bits(broken.train_loss_KS[[0, 2]], sound.train_loss_KS[[0, 2]])
    assert same_bits(broken.eval_nats["all"][[0, 2]], sound.eval_nats["all"][[0, 2]])


def test_a_model_that_ends_worse_than_guessing_is_flagged_and_keeps_its_numbers():
    config = ProxyConfig(**{**TINY.to_dict(), "learning_rate": 30.0, "final_lr_share": 1.0})

    result = train(config, draw_batches(config, 1))

    assert result.diverged_K.tolist() == [True]
    assert np.isfinite(result.train_loss_KS).all()
    assert result.train_loss_KS[0, -1] > np.log(config.vocab_size) + 1


def test_a_model_that_can_not_be_scored_is_flagged():
    loss_KS, nats_K = np.ones((2, 3)), np.array([5.0, np.nan])

    assert torch_proxy.diverged_models(TINY, loss_KS, {"math": nats_K}).tolist() == [False, True]


def test_each_models_gradient_is_clipped_by_its_own_norm():
    stack = StackedQwen2(TINY, 2)
    for gradient in stack.flat_gradients.values():
        gradient[0], gradient[1] = 5.0, 1e-4
    before = {name: gradient.clone() for name, gradient in stack.flat_gradients.items()}

    StackedAdamW(stack)._clip()

    after = torch.cat([gradient[0].flatten() for gradient in stack.flat_gradients.values()])
    assert torch.linalg.vector_norm(after).item() == pytest.approx(TINY.grad_clip, rel=1e-5)
    for name, gradient in stack.flat_gradients.items():
        assert torch.equal(gradient[1], before[name][1])


def test_evaluation_sums_over_all_windows_whatever_the_batch():
    batches = draw_batches(TINY, 2)
    windows = batches[:5, 0].reshape(-1, TINY.sequence_length + 1)[:7]
    stack = StackedQwen2(TINY, 2)

    whole = stack.summed_nats(windows)
    parts = sum(stack.summed_nats(window[None]) for window in windows)

    np.testing.assert_allclose(whole, parts, rtol=1e-6)
    assert whole[0] == whole[1]


def test_a_loss_is_the_same_in_one_chunk_and_in_many(monkeypatch):
    batches = draw_batches(TINY, 2)
    whole = train(TINY, batches)
    monkeypatch.setattr(stacked_qwen2, "CPU_CHUNK_LOGITS", 5 * TINY.vocab_size)

    chunked = train(TINY, batches)

    np.testing.assert_allclose(chunked.train_loss_KS, whole.train_loss_KS, atol=1e-5)
    np.testing.assert_allclose(chunked.eval_nats["all"], whole.eval_nats["all"], rtol=1e-5)


def test_training_follows_the_schedule_step_by_step():
    """The average of each stretch, against the same steps made one by one at their own rates."""
    config = ProxyConfig(**{**TINY.to_dict(), "steps": 40})
    batches = draw_batches(config, 2)

    by_step, _ = losses_by_step(config, batches)

    averaged = by_step.astype(np.float64).reshape(20, 2, 2).mean(axis=1).T
    np.testing.assert_allclose(train(config, batches).train_loss_KS, averaged, rtol=1e-12)


def test_progress_tells_finished_steps_and_losses():
    told = []
    config = ProxyConfig(**{**TINY.to_dict(), "steps": 41})
    batches = draw_batches(config, 2)

    result = train(config, batches, progress=lambda step, loss_K: told.append((step, loss_K)))

    assert [step for step, _ in told] == [41 * point // 20 for point in range(1, 21)]
    assert same_bits(np.stack([loss_K for _, loss_K in told], axis=1), result.train_loss_KS)


def test_training_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(ProxyConfig(**{**TINY.to_dict(), "steps": 1}), draw_batches(TINY, 1))

        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((1, 2, 16), dtype=np.int64), r"next_batch\(0\) must have shape \(1, 2, 17\)"),
        (np.zeros((2, 2, 17), dtype=np.int64), r"got \(2, 2, 17\)"),
        (np.full((1, 2, 17), 64), r"tokens in \[0, 64\), got 64 to 64"),
        (np.full((1, 2, 17), -1), r"got -1 to -1"),
        (np.zeros((1, 2, 17)), "whole numbers, got float64"),
    ],
)
def test_a_batch_that_can_not_be_right_is_refused(batch, message):
    with pytest.raises(ProxyError, match=message):
        train_stack(TINY, lambda step: batch, 1, {})


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((0, 17), dtype=np.int64), r"eval_windows\['math'\] must have shape \(any, 17\)"),
        (np.zeros((3, 16), dtype=np.int64), r"got \(3, 16\)"),
        (np.full((3, 17), 99), "got 99 to 99"),
    ],
)
def test_evaluation_windows_are_refused_before_anything_is_trained(windows, message):
    def next_batch(step):
        raise AssertionError("trained before the windows were checked")

    with pytest.raises(ProxyError, match=message):
        train_stack(TINY, next_batch, 1, {"math": windows})


def test_a_stack_of_no_models_is_refused():
    with pytest.raises(ProxyError, match="n_models must be >= 1, got 0"):
        StackedQwen2(TINY, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA")
def test_a_missing_device_is_refused():
    with pytest.raises(ProxyError, match="device must be one that torch finds, got 'cuda'"):
        StackedQwen2(TINY, 1, device="cuda")


def test_bf16_products_stay_close_to_fp32():
    """The path for accelerators, tried on the CPU: other roundings, the same learning."""
    batches = draw_batches(DEEP, 2)

    exact, rounded = train(DEEP, batches), train(replace(DEEP, bf16=True), batches)

    assert not same_bits(exact.train_loss_KS, rounded.train_loss_KS)
    np.testing.assert_allclose(rounded.train_loss_KS, exact.train_loss_KS, atol=0.05)


def test_memory_grows_by_the_same_for_each_model_and_a_stack_that_fits_stays_within():
    n_bytes = 20_000_000

    n_models = models_that_fit(DEEP, n_bytes)

    stack = StackedQwen2(DEEP, n_models)
    stack.loss_and_gradients(draw_batches(DEEP, n_models)[0])
    activations = n_models * DEEP.batch_size * DEEP.sequence_length * 4 * DEEP.hidden * 4
    assert n_models > 2
    assert stack.bytes_held > 16 * n_models * DEEP.n_parameters + activations
    assert 0.7 * n_bytes < stack.bytes_held <= 0.9 * n_bytes


def test_buffers_do_not_grow_with_the_steps():
    batches = draw_batches(TINY, 2)
    stack = StackedQwen2(TINY, 2)
    stack.loss_and_gradients(batches[0])
    stack.summed_nats(batches[0, 0])
    before = stack.bytes_held

    train(TINY, batches, model=stack)

    assert stack.bytes_held == before


def test_memory_too_small_for_one_model_is_refused():
    with pytest.raises(ProxyError, match=r"n_bytes must hold one model .* got 1000\."):
        models_that_fit(TINY, 1000)


#: A process whose address space is then limited to what it has and some MiB.
LIMITED = """
import resource, sys
import numpy as np
from causalmix_pipeline.adapters import torch_proxy
from causalmix_pipeline.core.proxy import ProxyConfig

config = ProxyConfig(hidden=64, vocab_size=60000, sequence_length=16, batch_size=2, steps=2)
batches = np.random.default_rng(0).integers(60000, size=(2, 5, 2, 17))
shape = {"steps": 2, "vocab_size": 100, "sequence_length": 16, "batch_size": 2}
small = batches[:, :1] % 100
torch_proxy.train_stack(ProxyConfig(**shape), small.__getitem__, 1, {"w": small[0, 0]})
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
told = []
result = torch_proxy.train_stack(
    config,
    batches.__getitem__,
    5,
    {"held out": batches[0, 0]},
    progress=lambda step, loss_K: told.append(np.isfinite(loss_K).tolist()),
    score=lambda stack: {"corner": stack.weights["embedding"][:, 0, 0].numpy().copy()},
)
np.savez(
    sys.argv[2],
    loss=result.train_loss_KS,
    nats=result.eval_nats["held out"],
    scores=result.scores["corner"],
    told=told,
)
"""


def train_limited(mebibytes: int, path: Path) -> subprocess.CompletedProcess[str]:
    """Train 5 models of 75 MiB each with so much memory beside what torch takes."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(mebibytes), str(path)], capture_output=True, text=True
    )


def test_a_stack_too_large_for_the_memory_is_halved_and_gives_the_same(tmp_path):
    """The system refuses memory, for real: the allocator's error, not one raised for the test."""
    whole = train_limited(3000, tmp_path / "whole.npz")
    halved = train_limited(250, tmp_path / "halved.npz")

    assert whole.returncode == halved.returncode == 0, halved.stderr
    assert "Out of memory" not in whole.stderr
    assert "Out of memory with a stack of 5 models: training its halves." in halved.stderr
    expected, got = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "halved.npz")
    assert same_bits(got["loss"], expected["loss"])
    assert same_bits(got["nats"], expected["nats"])
    assert same_bits(got["scores"], expected["scores"])
    assert expected["told"].all(axis=1).all()
    # Each half tells its own models; the others are nan then.
    assert got["told"].sum(axis=0).tolist() == [len(expected["told"])] * 5
    assert not got["told"].all(axis=1).any()


def test_memory_too_short_for_one_model_says_what_to_change(tmp_path):
    refused = train_limited(30, tmp_path / "none.npz")

    assert refused.returncode != 0
    assert "ProxyError: Memory must hold one model of proxy.hidden 64" in refused.stderr
    assert "Use fewer backend.workers" in refused.stderr


def test_an_error_that_is_not_about_memory_is_not_tried_again():
    asked = []

    def next_batch(step):
        asked.append(step)
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
        train_stack(TINY, next_batch, 4, {})

    assert asked == [0]


def test_a_stack_that_the_caller_keeps_is_not_halved():
    """Its weights may have moved, and the caller wants all of them."""

    def next_batch(step):
        raise MemoryError

    with pytest.raises(ProxyError, match="Memory must hold a stack of 4 models"):
        train_stack(TINY, next_batch, 4, {}, model=StackedQwen2(TINY, 4))


def test_the_smallest_stack_within_3_percent_of_the_fastest_is_taken(monkeypatch):
    """Seconds a step of each size, as a machine might give them."""
    step_seconds = {1: 1.0, 2: 1.6, 4: 3.08, 8: 6.0, 16: 13.0}
    monkeypatch.setattr(
        torch_proxy, "_step_seconds", lambda config, n_models, device: step_seconds[n_models]
    )

    assert torch_proxy.fastest_stack_size(TINY, n_bytes=1 << 30) == 4
    step_seconds[8] = 5.8
    assert torch_proxy.fastest_stack_size(TINY, n_bytes=1 << 30) == 8


def test_the_start_of_a_device_is_not_taken_from_the_time_to_measure(monkeypatch):
    """The first step takes longer than all measuring may; the largest stack is the fastest."""
    monkeypatch.setattr(torch_proxy, "MEASURE_SECONDS", 0.2)

    def slow_at_first(config, n_models, device):
        time.sleep(0.3 if n_models == 1 else 0.0)
        return 1.0

    monkeypatch.setattr(torch_proxy, "_step_seconds", slow_at_first)

    assert torch_proxy.fastest_stack_size(TINY, n_bytes=1 << 34) == torch_proxy.CPU_MOST_MODELS


def test_a_measured_stack_fits_in_the_memory_given():
    n_bytes = 3_000_000
    fitting = models_that_fit(DEEP, n_bytes)

    assert 1 <= torch_proxy.fastest_stack_size(DEEP, n_bytes=n_bytes) <= fitting < 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gpu_learns_as_the_cpu_does(bf16):
    batches = draw_batches(DEEP, 3)

    on_cpu = train(DEEP, batches)
    on_gpu = train(replace(DEEP, bf16=bf16), batches, device="cuda")

    np.testing.assert_allclose(
        on_gpu.train_loss_KS, on_cpu.train_loss_KS, atol=0.05 if bf16 else 2e-3
    )
    assert not on_gpu.diverged_K.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hundreds_of_models_on_a_gpu_learn_as_alone_and_twice_alike():
    config = replace(DEEP, steps=10)
    batches = draw_batches(config, 4)
    many = np.tile(batches, (1, 64, 1, 1))

    first, second = (train(config, many, device="cuda") for _ in range(2))
    alone = train(config, batches, device="cuda")

    assert same_bits(first.train_loss_KS, second.train_loss_KS)
    np.testing.assert_allclose(first.train_loss_KS[:4], alone.train_loss_KS, atol=1e-3)
    np.testing.assert_allclose(first.train_loss_KS[252:], alone.train_loss_KS, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stack_too_large_for_a_gpu_is_halved():
    config = replace(DEEP, steps=4)
    batches = draw_batches(config, 64)
    whole = train(config, batches, device="cuda")
    stack = StackedQwen2(config, 64, device="cuda")
    stack.loss_and_gradients(batches[0])
    allowed = 0.8 * stack.bytes_held / torch.cuda.get_device_properties(0).total_memory
    del stack
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed)
    try:
        halved = train(config, batches, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    np.testing.assert_allclose(halved.train_loss_KS, whole.train_loss_KS, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stack_is_measured_on_a_gpu():
    free = torch.cuda.mem_get_info()[0]

    assert torch_proxy.fastest_stack_size(DEEP, device="cuda", n_bytes=free) >= 8
