"""Fine-tunes a pretrained causal language model as a proxy, and scores it on every task.

Weights, optimiser and sums of gradients are fp32, products bfloat16 where asked. Sequences are
packed: positions restart with each document and there is no attention mask, from which transformers
tells documents apart; a model that doesn't is refused. A killed run goes on from its last
checkpoint with the same bits, on one device.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from causalmix_pipeline.adapters.blobs import write_atomically
from causalmix_pipeline.adapters.model_tokens import describe_model, find_model
from causalmix_pipeline.adapters.packed_samples import (
    PackedDomain,
    SequenceRows,
    pack_domain,
    token_schedule,
)
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore, bits_per_byte
from causalmix_pipeline.adapters.torch_proxy import is_out_of_memory
from causalmix_pipeline.core.errors import ConfigError, ProxyError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import DIVERGENCE_MARGIN
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec

logger = logging.getLogger(__name__)

#: Stretches of the steps over which the training loss is averaged.
TRAIN_LOSS_POINTS = 20
#: Predicted tokens whose logits are held at once: 512 MB for a vocabulary of 128K.
HEAD_ROWS = 1024
#: Checkpoints that are kept: the last one, and one that was whole before it.
N_CHECKPOINTS = 2
#: Largest change of a document's logits, over their own size, when another one of the sequence
#: changes: rounding of bfloat16 stays below, a leak is tens of percent.
MAX_LEAK = 1e-2

Progress = Callable[[int, float], None]


def pretrained_engine_name(device: str = "cpu") -> str:
    """The engine, the versions and the kind of device that decide a run's bits."""
    kind = device.split(":")[0]
    libraries = [f"{name}-{_version(name)}" for name in _LIBRARIES]
    return "-".join(["pretrained", *libraries, *([] if kind == "cpu" else [kind])])


_LIBRARIES = ("torch", "transformers", "peft")


def _version(library: str) -> str:
    try:
        return version(library).split("+")[0]
    except PackageNotFoundError:
        return "absent"


def train_pretrained(
    store: RunStore,
    spec: ProxySpec,
    *,
    device: str,
    evaluation: EvalWindows,
    progress: Progress | None = None,
) -> ProxyRecord:
    """Fine-tune one model on one mixture and score it; the record isn't stored yet.

    Its checkpoints are in `store.scratch(spec.key)`, which the store removes with the record.

    Args:
        store: has the spec's pool state and tokens.
        spec: of a run with a `PretrainedConfig`.
        device: where torch computes, such as "cpu" or "cuda".
        evaluation: what the spec's `eval_hash` names, in the tokens of the model.
        progress: called after each optimiser step with the number of finished steps and the
            step's loss, nats per token.

    Raises:
        ConfigError: if the model can't be loaded or isn't the one that the spec means.
        ProxyError: if memory runs out even with one sequence at a time, documents of a sequence
            would see each other, or a checkpoint can't be written.
    """
    config = spec.config
    assert isinstance(config, PretrainedConfig)
    with _settled(device), _memory_named(config, device):
        trainer = _trainer(store, spec, config, device)
        model, feed = trainer.model, trainer.feed
        history = trainer.train(progress)
        # A model that a NaN has reached has nothing to say.
        scores = {} if history.diverged else _score(model, config, device, evaluation)
    history.take_time()
    diverged = history.diverged or _left_the_range(history, scores, model)
    nats = {} if diverged else scores.get("nats", {})
    predicted = {task: windows[:, 1:].size for task, windows in evaluation.windows.items()}
    return ProxyRecord(
        key=spec.key,
        spec=spec.to_dict(),
        bits_per_byte={t: bits_per_byte(n, evaluation.n_bytes[t]) for t, n in nats.items()},
        nats_per_token={t: n / predicted[t] for t, n in nats.items()},
        train_loss=history.train_loss(),
        diverged=diverged,
        cpu_seconds=history.cpu_seconds,
        scores={} if diverged else scores.get("scores", {}),
        epochs=[float(epochs) for epochs in feed.epochs_D],
        seconds=history.seconds,
        control=trainer.told(),
    )


def _trainer(store: RunStore, spec: ProxySpec, config: PretrainedConfig, device: str) -> Trainer:
    """The trainer of a run, its model loaded; of its controller where it has one."""
    if spec.controller is not None:
        from causalmix_pipeline.adapters.controlled_pretrained import controlled_trainer

        return controlled_trainer(store, spec, spec.controller, device)
    feed = Feed.of(store, spec)
    model = load_model(config, device)
    return Trainer(model, config, device, feed, Checkpoints(store.scratch(spec.key)))


def _left_the_range(history: History, scores: dict[str, dict[str, float]], model: Any) -> bool:
    """Whether losses left the range where they mean something."""
    limit = math.log(model.config.get_text_config().vocab_size) + DIVERGENCE_MARGIN
    return not history.train_loss()[-1] <= limit or not all(
        math.isfinite(nats) for nats in scores["nats"].values()
    )


@contextmanager
def _settled(device: str) -> Iterator[None]:
    """What the bits of a run on one device depend on: threads on a CPU, kernels on a GPU."""
    import torch

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    if device.startswith("cuda"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _memory_named(config: PretrainedConfig, device: str) -> Iterator[None]:
    """Say what to do where memory runs out and a smaller micro-batch doesn't help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _no_memory(config, device) from error
        raise


def _no_memory(config: PretrainedConfig, device: str) -> ProxyError:
    return ProxyError(
        f"proxy.micro_batch must fit the memory of {device}, but it ran out with 1 sequence of "
        f"{config.sequence_length} tokens. Set proxy.overrides.gradient_checkpointing to true or "
        "method to lora, lower sequence_length, or take a device with more memory."
    )


# --- what a run reads


class FeedLike(Protocol):
    """What a trainer reads, step by step: `Feed`, or a feed that a controller steers."""

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the run."""
        ...

    @property
    def epochs_D(self) -> np.ndarray:
        """How often each domain was read."""
        ...

    def rows(self, step: int) -> list[SequenceRows]:
        """The sequences of a step."""
        ...


@dataclass(frozen=True, eq=False)
class Feed:
    """The packed sequences of a run, step by step.

    All runs of a recipe have the same number of steps; where sequences have padding, a step has
    more of them, so that it has about the same tokens.

    Attributes:
        tokens: all token ids of the store.
        packed: sequences of each domain.
        domain_W, sequence_W: what is read when.
        n_steps: optimiser steps.
        epochs_D: how often each domain is read.
    """

    tokens: np.ndarray
    packed: list[PackedDomain]
    domain_W: np.ndarray
    sequence_W: np.ndarray
    n_steps: int
    epochs_D: np.ndarray

    @classmethod
    def of(cls, store: RunStore, spec: ProxySpec) -> Feed:
        """Pack the documents of a spec's pool state and schedule them by its mixture.

        Raises:
            ProxyError: if a domain with a share has no token to learn.
        """
        config = spec.config
        assert isinstance(config, PretrainedConfig)
        packed = pack_state(store, spec, np.array(spec.mixture))
        schedule = token_schedule(
            np.array(spec.mixture),
            [domain.tokens_S for domain in packed],
            config.tokens,
            seed=spec.data_seed,
            order_seed=int(spec.state_hash[:15], 16),
        )
        return cls(
            tokens=store.token_store(spec.tokens_hash).tokens(),
            packed=packed,
            domain_W=schedule.domain_W,
            sequence_W=schedule.sequence_W,
            n_steps=min(config.steps, len(schedule)),
            epochs_D=schedule.epochs_D,
        )

    def rows(self, step: int) -> list[SequenceRows]:
        """The sequences of a step."""
        n = len(self.domain_W)
        slots = range(step * n // self.n_steps, (step + 1) * n // self.n_steps)
        return [self.packed[self.domain_W[w]].rows(self.tokens, self.sequence_W[w]) for w in slots]


def pack_state(store: RunStore, spec: ProxySpec, shares_D: np.ndarray) -> list[PackedDomain]:
    """The packed sequences of each domain of a spec's pool state.

    Args:
        store: has the pool state and its tokens.
        spec: the run.
        shares_D: positive for the domains that the run reads.

    Raises:
        ProxyError: if a domain that is read has no token to learn.
    """
    config = spec.config
    assert isinstance(config, PretrainedConfig)
    tokens = store.token_store(spec.tokens_hash)
    packed = [
        pack_domain(tokens, ids, length=config.sequence_length, response_only=config.response_only)
        for ids in store.state(spec.state_hash)
    ]
    for d, (domain, share) in enumerate(zip(packed, shares_D, strict=True)):
        if domain.n_truncated or domain.n_dropped:
            logger.info(
                "domain %d: %d samples cut at proxy.sequence_length, %d without any token to "
                "learn left out",
                d,
                domain.n_truncated,
                domain.n_dropped,
            )
        if share > 0 and not len(domain):
            raise ProxyError(
                f"domain {d} of pool state {spec.state_hash} must have a token to learn within "
                f"proxy.sequence_length ({config.sequence_length}), got none. Raise it above "
                "the prompts' length, or leave the domain out."
            )
    return packed


# --- the model


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


# --- training


@dataclass
class History:
    """What happened so far, and what a checkpoint keeps of it besides tensors.

    Attributes:
        step: finished optimiser steps.
        micro_batch: sequences held at once.
        nats: summed loss of each step.
        n_losses: tokens with loss of each step.
        seconds, cpu_seconds: what it cost, over restarts.
        diverged: a loss or gradient wasn't finite.
        control: state of the run's controller; None in a static run.
    """

    step: int
    micro_batch: int
    nats: list[float] = field(default_factory=list)
    n_losses: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    diverged: bool = False
    control: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Start the clocks."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def take_time(self) -> None:
        """Add the time since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds += wall - self._wall
        self.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu

    def train_loss(self) -> list[float]:
        """Nats per token over equal stretches of the steps; infinity where no step was finite."""
        if not self.nats:
            return [math.inf]
        nats, counts = np.array(self.nats), np.array(self.n_losses)
        n_points = min(TRAIN_LOSS_POINTS, len(nats))
        ends = [len(nats) * point // n_points for point in range(n_points + 1)]
        return [
            float(nats[start:end].sum() / counts[start:end].sum()) for start, end in pairwise(ends)
        ]


class Trainer:
    """Trains a model over the steps of its feed."""

    def __init__(
        self,
        model: Any,
        config: PretrainedConfig,
        device: str,
        feed: FeedLike,
        checkpoints: Checkpoints,
    ) -> None:
        """Start, or go on from the last checkpoint."""
        import torch

        self.model, self.config, self.device, self.feed = model, config, device, feed
        self.checkpoints = checkpoints
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim >= 2]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=device.startswith("cuda"),
        )
        self.history = checkpoints.load(self) or History(0, config.micro_batch)
        self.history.micro_batch = min(self.history.micro_batch, config.micro_batch)

    def train(self, progress: Progress | None = None) -> History:
        """Run the steps that are left."""
        history, n_steps = self.history, self.feed.n_steps
        self.model.train()
        while history.step < n_steps and not history.diverged:
            rows = self.feed.rows(history.step)
            n_losses = sum(int(row.has_loss_L.sum()) for row in rows)
            nats = self._gradients(rows, n_losses)
            if not self._update(nats):
                history.diverged = True
                logger.warning("loss or gradient of step %d isn't finite: stopped", history.step)
                break
            history.nats.append(nats)
            history.n_losses.append(n_losses)
            history.step += 1
            if progress is not None:
                progress(history.step, nats / n_losses)
            self._after_step()
        return history

    def _after_step(self) -> None:
        """Keep a checkpoint where it is time."""
        step = self.history.step
        if step % self.config.checkpoint_steps == 0 or step == self.feed.n_steps:
            self.save()

    def save(self) -> None:
        """Keep a checkpoint."""
        self.history.take_time()
        self.checkpoints.save(self)

    def told(self) -> dict[str, Any] | None:
        """What a controller did, for the run's record; None without one."""
        return None

    def _gradients(self, rows: Sequence[SequenceRows], n_losses: int) -> float:
        """Summed nats of a step, its gradients over the step's tokens left in the weights.

        Where memory runs out, the step begins again with half as many sequences at once.
        """
        while True:
            nats = self._try_gradients(rows, n_losses)
            if nats is not None:
                return nats
            self.history.micro_batch = halved(self.history.micro_batch, self.config, self.device)

    def _try_gradients(self, rows: Sequence[SequenceRows], n_losses: int) -> float | None:
        """As `_gradients`; None if memory ran out."""
        self.optimiser.zero_grad(set_to_none=True)
        size, total = self.history.micro_batch, 0.0
        try:
            for at in range(0, len(rows), size):
                with autocast(self.config, self.device):
                    nats = summed_loss(self.model, rows[at : at + size], self.device)
                (nats / n_losses).backward()
                total += float(nats.detach())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return total

    def _update(self, nats: float) -> bool:
        """Change the weights by the gradients; False, and no change, if they aren't finite."""
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip)
        if not (math.isfinite(nats) and bool(norm.isfinite())):
            return False
        rate = self.config.learning_rate_at(self.history.step, self.feed.n_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return True


def halved(micro_batch: int, config: PretrainedConfig, device: str) -> int:
    """Half as many sequences at once, after what was held is given back.

    Raises:
        ProxyError: if it was one already.
    """
    import torch

    if micro_batch == 1:
        raise _no_memory(config, device)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    logger.warning("out of memory with %d sequences at once: %d now", micro_batch, micro_batch // 2)
    return micro_batch // 2


# --- outcomes


def _score(
    model: Any, config: PretrainedConfig, device: str, evaluation: EvalWindows
) -> dict[str, dict[str, float]]:
    """`nats`: summed held-out loss of each task; `scores`: of the tasks that are questions."""
    model.eval()
    with autocast(config, device):
        nats = {
            task: _window_nats(model, windows, config, device)
            for task, windows in evaluation.windows.items()
        }
        scores: dict[str, float] = {}
        if evaluation.questions:
            from causalmix_pipeline.adapters.task_scores import score_questions

            scores |= score_questions(
                model, evaluation.questions, evaluation.tokenizer, device=device
            )
        if evaluation.harness:
            from causalmix_pipeline.adapters.lm_eval_tasks import score_harness

            scores |= score_harness(model, evaluation.harness, evaluation.tokenizer, device=device)
    return {"nats": nats, "scores": scores}


def _window_nats(
    model: Any, windows_WL: np.ndarray, config: PretrainedConfig, device: str
) -> float:
    """Summed nats of all predicted tokens of windows."""
    import torch

    position_L = np.arange(windows_WL.shape[1])
    has_loss_L = position_L > 0
    rows = [
        SequenceRows(ids_L.astype(np.int64), position_L, has_loss_L, len(ids_L))
        for ids_L in windows_WL
    ]
    total = 0.0
    with torch.no_grad():
        for row in rows:  # one by one, so that the sum doesn't depend on memory
            total += float(summed_loss(model, [row], device))
    return total


# --- checkpoints


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: safetensors and JSON in a folder each, whole or absent.

    Attributes:
        folder: of the run; made with the first checkpoint.
    """

    folder: Path

    def save(self, trainer: Trainer) -> None:
        """Keep weights, optimiser, random state and history; older checkpoints go.

        Raises:
            OSError: if the disk is full.
            ProxyError: if they can't be written otherwise.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = f"step-{trainer.history.step:08d}"
        building = self.folder / f".{name}.building"
        try:
            shutil.rmtree(building, ignore_errors=True)  # of a killed process
            building.mkdir(parents=True)
            sums = {}
            for file, tensors in _tensors_of(trainer).items():
                save_file(tensors, building / file)
                with open(building / file, "rb+") as written:
                    sums[file] = hashlib.file_digest(written, "sha256").hexdigest()
                    os.fsync(written.fileno())
            state = {"history": asdict(trainer.history), "sha256": sums}
            write_atomically(building / "state.json", json.dumps(state).encode())
            shutil.rmtree(self.folder / name, ignore_errors=True)
            building.rename(self.folder / name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            full = errno.ENOSPC
            if getattr(error, "errno", None) == full or f"os error {full}" in str(error):
                raise OSError(full, os.strerror(full), str(self.folder)) from error
            raise ProxyError(
                f"the checkpoint of a proxy run can't be written to {self.folder}: {error}. Free "
                "the disk, or raise proxy.overrides.checkpoint_steps; the run goes on from its "
                "last checkpoint."
            ) from error
        for old in self._names()[:-N_CHECKPOINTS]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def load(self, trainer: Trainer) -> History | None:
        """Put the last whole checkpoint into a trainer; a damaged one is removed.

        Returns:
            Its history, or None if there is none.
        """
        for name in reversed(self._names()):
            folder = self.folder / name
            try:
                state = json.loads((folder / "state.json").read_bytes())
                history = History(**state["history"])
                for file, expected in state["sha256"].items():
                    with open(folder / file, "rb") as content:
                        if hashlib.file_digest(content, "sha256").hexdigest() != expected:
                            raise ValueError(f"{file} differs from its checksum")
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("checkpoint %s is damaged (%s): removed", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            _restore(trainer, folder)
            return history
        return None

    def _names(self) -> list[str]:
        """The whole checkpoints, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*"))


def _tensors_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps in tensors, by file."""
    import torch

    moments = {
        f"{number}.{name}": value
        for number, state in trainer.optimiser.state_dict()["state"].items()
        for name, value in state.items()
    }
    random = {"cpu": torch.get_rng_state()}
    if trainer.device.startswith("cuda"):
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    weights = {name: value.detach().contiguous() for name, value in trainer.trained.items()}
    return {
        "weights.safetensors": weights,
        "optimiser.safetensors": moments,
        "random.safetensors": random,
    }


def _restore(trainer: Trainer, folder: Path) -> None:
    """Inverse of `_tensors_of`."""
    import torch
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, value in load_file(folder / "weights.safetensors").items():
            trainer.trained[name].copy_(value)
    state: dict[int, dict[str, Any]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        number, moment = name.split(".")
        state.setdefault(int(number), {})[moment] = value
    groups = trainer.optimiser.state_dict()["param_groups"]
    trainer.optimiser.load_state_dict({"state": state, "param_groups": groups})
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], trainer.device)
