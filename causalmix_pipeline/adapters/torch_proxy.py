"""Trains a stack of tiny language models on one core, and scores each on every task.

AdamW (arXiv 1711.05101) with a warm-up and a cosine, the gradient clipped for each model by itself.
The models and their gradients are `stacked_qwen2`'s. A stack too large for the memory is trained in
halves; how many models to stack is measured (`fastest_stack_size`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import DIVERGENCE_MARGIN, ProxyConfig, StackResult

#: Stretches of the steps over which the training loss is averaged.
TRAIN_LOSS_POINTS = 20
#: Added to the gradient norm before dividing by it, as in `torch.nn.utils.clip_grad_norm_`.
CLIP_EPSILON = 1e-6
#: AdamW's epsilon, torch's default.
ADAM_EPSILON = 1e-8
#: Largest stack that `fastest_stack_size` tries on a CPU: time a model is flat from 4 on.
CPU_MOST_MODELS = 16
#: Largest stack that it tries on an accelerator, memory permitting.
GPU_MOST_MODELS = 512
#: Seconds after which it tries no larger stack, the first one not counted, and for which it times
#: one. An accelerator is worth more of them: a stack that fills an H100 takes 1/60 of the time a
#: model of one that doesn't.
MEASURE_SECONDS, SIZE_SECONDS = 2.0, 0.15
GPU_MEASURE_SECONDS = 15.0
#: A smaller stack within this factor of the fastest is taken: it holds less memory.
NEARLY_FASTEST = 1.03

NextBatch = Callable[[int], np.ndarray]
Progress = Callable[[int, np.ndarray], None]
Score = Callable[[StackedQwen2], Mapping[str, np.ndarray]]

logger = logging.getLogger(__name__)


def train_stack(
    config: ProxyConfig,
    next_batch: NextBatch,
    n_models: int,
    eval_windows: Mapping[str, np.ndarray],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    score: Score | None = None,
    model: StackedQwen2 | None = None,
) -> StackResult:
    """Train K proxy models side by side and score each on every task.

    All start from the same weights (`config.init_seed`); what they read comes from `next_batch`
    alone. Runs on one torch thread, so that a process a core is the way to use more cores. Where
    the memory does not hold the stack, its halves are trained one after the other, from the first
    step and on the same tokens, and theirs again, down to one model.

    Args:
        config: shape and recipe, the same for all models of the stack.
        next_batch: gives the tokens of a step, integers in [0, V), shape (K, B, L + 1); called
            once for each step from 0 up, and again for each half where memory is short. Token i of
            a window predicts token i + 1.
        n_models: K, how many models are trained; >= 1.
        eval_windows: for each task the held-out tokens, shape (W, L + 1), W >= 1.
        device: where torch computes, such as "cpu" or "cuda".
        progress: called after each of the `TRAIN_LOSS_POINTS` stretches with the number of
            finished steps and the loss of the stretch, shape (K,); nan for models of a half that
            is not being trained then.
        score: called with the trained stack, or half; its scores by task, shape (K,), become the
            result's. For what is scored in another way than by its loss.
        model: the stack to train, for a caller who wants its weights; made anew by default. It is
            not halved.

    Returns:
        Losses, summed nats by task, which models diverged, and what it cost.

    Raises:
        ProxyError: if a batch or an evaluation has a wrong shape or a token outside the vocabulary,
            or if memory is too short for one model.
    """
    for task, windows_WL in eval_windows.items():
        _check_tokens(
            f"eval_windows[{task!r}]", windows_WL, (None, config.sequence_length + 1), config
        )
    with one_thread():
        try:
            return _train_whole(
                config, next_batch, n_models, eval_windows, device, progress, score, model
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if n_models == 1 or model is not None:
                raise ProxyError(short_of_memory(config, n_models)) from error
    # Out of the except clause, whose traceback holds the stack that did not fit.
    _release(device)
    logger.warning("Out of memory with a stack of %d models: training its halves.", n_models)
    middle = n_models // 2
    halves = []
    for part in (slice(0, middle), slice(middle, n_models)):
        halves.append(
            train_stack(
                config,
                _batches_of(next_batch, part),
                part.stop - part.start,
                eval_windows,
                device=device,
                progress=_progress_of(progress, part, n_models),
                score=score,
            )
        )
    return _side_by_side(halves)


def _train_whole(
    config: ProxyConfig,
    next_batch: NextBatch,
    n_models: int,
    eval_windows: Mapping[str, np.ndarray],
    device: str,
    progress: Progress | None,
    score: Score | None,
    model: StackedQwen2 | None,
) -> StackResult:
    """Train and score all models of a stack together."""
    wall, cpu = time.perf_counter(), time.process_time()
    if model is None:
        model = StackedQwen2(config, n_models, device=device)
    train_loss_KS = train_steps(model, next_batch, progress)
    eval_nats = {task: model.summed_nats(windows) for task, windows in eval_windows.items()}
    scores = {} if score is None else dict(score(model))
    return StackResult(
        train_loss_KS=train_loss_KS,
        eval_nats=eval_nats,
        eval_tokens={
            task: windows.shape[0] * config.sequence_length
            for task, windows in eval_windows.items()
        },
        diverged_K=diverged_models(config, train_loss_KS, eval_nats),
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        scores=scores,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or numpy could not get memory; not all allocators have a class for it."""
    import torch

    text = str(error).lower()
    told = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in told)
    )


def short_of_memory(config: ProxyConfig, n_models: int) -> str:
    """What to tell a user whose memory holds no stack of this size."""
    held = "one model" if n_models == 1 else f"a stack of {n_models} models"
    return (
        f"Memory must hold {held} of proxy.hidden {config.hidden}, layers {config.layers}, "
        f"vocab_size {config.vocab_size}, batch_size {config.batch_size}, sequence_length "
        f"{config.sequence_length}, but ran out. Use fewer backend.workers, or a smaller model, "
        "vocabulary or batch."
    )


def _release(device: str) -> None:
    """Give memory that torch keeps back to the device."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _batches_of(next_batch: NextBatch, part: slice) -> NextBatch:
    """The batches of some models of a stack."""
    return lambda step: next_batch(step)[part]


def _progress_of(progress: Progress | None, part: slice, n_models: int) -> Progress | None:
    """Tells the progress of some models of a stack as that of the stack, nan for the others."""
    if progress is None:
        return None

    def tell(step: int, loss: np.ndarray) -> None:
        loss_K = np.full(n_models, np.nan)
        loss_K[part] = loss
        progress(step, loss_K)

    return tell


def _side_by_side(parts: Sequence[StackResult]) -> StackResult:
    """The result of a stack from those of its parts, in their order."""
    first = parts[0]
    return StackResult(
        train_loss_KS=np.concatenate([part.train_loss_KS for part in parts]),
        eval_nats=_joined([part.eval_nats for part in parts]),
        eval_tokens=first.eval_tokens,
        diverged_K=np.concatenate([part.diverged_K for part in parts]),
        seconds=sum(part.seconds for part in parts),
        cpu_seconds=sum(part.cpu_seconds for part in parts),
        scores=_joined([part.scores for part in parts]),
    )


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Values by task of the parts of a stack, one part's after the other's."""
    return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}


def train_steps(
    model: StackedQwen2, next_batch: NextBatch, progress: Progress | None = None
) -> np.ndarray:
    """Run all steps; the training loss by stretch of steps, shape (K, S)."""
    import torch

    config = model.config
    optimiser = StackedAdamW(model)
    shape = (model.n_models, config.batch_size, config.sequence_length + 1)
    n_points = min(TRAIN_LOSS_POINTS, config.steps)
    ends = [config.steps * (point + 1) // n_points for point in range(n_points)]
    points, stretch_start = [], 0
    total_K = torch.zeros(model.n_models, dtype=torch.float64, device=model.device)
    for step in range(config.steps):
        tokens = next_batch(step)
        _check_tokens(f"next_batch({step})", tokens, shape, config)
        total_K += model.loss_and_gradients(tokens)
        optimiser.step(config.learning_rate_at(step))
        if step + 1 == ends[len(points)]:
            points.append((total_K / (step + 1 - stretch_start)).cpu().numpy())
            stretch_start = step + 1
            total_K.zero_()
            if progress is not None:
                progress(step + 1, points[-1])
    return np.stack(points, axis=1)


def diverged_models(
    config: ProxyConfig, train_loss_KS: np.ndarray, eval_nats: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Which models left the range where a loss means something, shape (K,)."""
    limit = np.log(config.vocab_size) + DIVERGENCE_MARGIN
    # A loss that was once not a number stays so, its weights are lost; and nan <= limit is False.
    sound_K = train_loss_KS[:, -1] <= limit
    for nats_K in eval_nats.values():
        sound_K &= np.isfinite(nats_K)
    return ~sound_K


def _check_tokens(
    name: str, tokens: np.ndarray, shape: tuple[int | None, ...], config: ProxyConfig
) -> None:
    """Raise unless tokens have the shape (None: any positive size) and lie in the vocabulary."""
    matches = tokens.ndim == len(shape) and all(
        size >= 1 if wanted is None else size == wanted
        for size, wanted in zip(tokens.shape, shape, strict=True)
    )
    if not matches:
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise ProxyError(
            f"{name} must have shape ({wanted_shape}), got {tokens.shape}: each window holds "
            "sequence_length + 1 tokens. Cut the windows to that length."
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ProxyError(f"{name} must hold whole numbers, got {tokens.dtype}. Give token numbers.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ProxyError(
            f"{name} must hold tokens in [0, {config.vocab_size}), got {low} to {high}. Use the "
            "tokenizer that proxy.vocab_size was set from."
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def models_that_fit(config: ProxyConfig, n_bytes: int, *, device: str = "cpu") -> int:
    """How many models a stack may hold in the memory given, found by one step of 1 and of 2.

    Args:
        config: the shape of the models.
        n_bytes: memory to stay within, such as `torch.cuda.mem_get_info()[0]`; a tenth of it is
            left free for what torch allocates beside the stack.
        device: where torch computes.

    Returns:
        The largest K that fits, at least 1.

    Raises:
        ProxyError: if not even one model fits.
    """
    held = []
    for n_models in (1, 2):
        model = StackedQwen2(config, n_models, device=device)
        shape = (n_models, config.batch_size, config.sequence_length + 1)
        model.loss_and_gradients(np.zeros(shape, dtype=np.int64))
        held.append(model.bytes_held)
    spare = 0.9 * n_bytes - held[0]
    if spare < 0:
        raise ProxyError(
            f"n_bytes must hold one model ({held[0]} bytes and a tenth more), got {n_bytes}. Lower "
            "proxy.batch_size, sequence_length, hidden or layers."
        )
    return 1 + int(spare // (held[1] - held[0]))


def fastest_stack_size(config: ProxyConfig, *, device: str = "cpu", n_bytes: int) -> int:
    """How many models to stack, from some training steps of each size: 1, 2, 4, 8 and so on.

    A run's numbers do not depend on it on a CPU, only its time. Takes about two seconds, on an
    accelerator up to 15; a size is timed by its fastest step, in CPU seconds, there in seconds.

    Args:
        config: shape and recipe of the models.
        device: where torch computes.
        n_bytes: memory that the stack of one worker may take.

    Returns:
        The smallest size that is within 3% of the least time a model.

    Raises:
        ProxyError: if not even one model fits.
    """
    most, allowed = (
        (CPU_MOST_MODELS, MEASURE_SECONDS)
        if device == "cpu"
        else (GPU_MOST_MODELS, GPU_MEASURE_SECONDS)
    )
    started, seconds, size = 0.0, {}, 1
    with one_thread():
        fitting = min(most, models_that_fit(config, n_bytes, device=device))
        while size <= fitting and (not seconds or time.perf_counter() - started < allowed):
            try:
                seconds[size] = _step_seconds(config, size, device) / size
            except (RuntimeError, MemoryError) as error:
                if not seconds or not is_out_of_memory(error):
                    raise
                break
            if size == 1:  # until then a device may have been starting
                started = time.perf_counter()
            size *= 2
    least = min(seconds.values())
    return min(size for size, each in seconds.items() if each <= NEARLY_FASTEST * least)


def _step_seconds(config: ProxyConfig, n_models: int, device: str) -> float:
    """Seconds of the fastest training step of a stack, after a first one; three steps or more."""
    import torch

    model = StackedQwen2(config, n_models, device=device)
    optimiser = StackedAdamW(model)
    shape = (n_models, config.batch_size, config.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=shape)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    took, started = [], time.perf_counter()
    while len(took) < 4 or time.perf_counter() - started < SIZE_SECONDS:
        start = clock()
        model.loss_and_gradients(tokens)
        optimiser.step(config.learning_rate_at(0))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        took.append(clock() - start)
    return min(took[1:])


class StackedAdamW:
    """AdamW over a whole stack, the gradient clipped for each model by itself."""

    def __init__(self, model: StackedQwen2) -> None:
        """Start with zero moments."""
        import torch

        self.config = model.config
        self.weights, self.gradients = model.flat_weights, model.flat_gradients
        self.means = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.squares = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        # The fused kernel reads the number of steps done from a tensor for each weight.
        self.steps = {name: torch.zeros((), device=model.device) for name in self.weights}

    def step(self, learning_rate: float) -> None:
        """Clip the gradients, in place, and move the weights."""
        import torch

        self._clip()
        for names, decay in (
            (("embedding", "matrices"), self.config.weight_decay),
            (("vectors",), 0.0),
        ):
            for name in names:
                self.steps[name] += 1.0
            torch.ops.aten._fused_adamw_(
                [self.weights[name] for name in names],
                [self.gradients[name] for name in names],
                [self.means[name] for name in names],
                [self.squares[name] for name in names],
                [],
                [self.steps[name] for name in names],
                lr=learning_rate,
                beta1=self.config.betas[0],
                beta2=self.config.betas[1],
                weight_decay=decay,
                eps=ADAM_EPSILON,
                amsgrad=False,
                maximize=False,
            )

    def _clip(self) -> None:
        """Shorten each model's gradient to `grad_clip` where it is longer."""
        import torch

        flat = [gradient.flatten(1) for gradient in self.gradients.values()]
        norms_KG = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in flat], 1)
        norm_K = torch.linalg.vector_norm(norms_KG, dim=1)
        scale_K1 = (self.config.grad_clip / (norm_K + CLIP_EPSILON)).clamp_(max=1.0)[:, None]
        for part in flat:
            part *= scale_K1
