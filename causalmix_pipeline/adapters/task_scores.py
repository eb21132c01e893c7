"""Scores a causal language model on questions, in batches.

Sequences are padded on the left, so that options and what is generated stand at the end of every
row and only their logits are made. A score doesn't depend on what is in its batch beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from causalmix_pipeline.adapters.task_tokenizers import TaskTokenizer, open_task_tokenizer
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.tasks import Question, score_choice, score_generation

if TYPE_CHECKING:
    from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2

#: Rows of a batch of tiny models, whose calls cost more than their sums.
TINY_BATCH = 64


def score_questions(
    model: Any,
    questions: Mapping[str, Sequence[Question]],
    tokenizer: str,
    *,
    device: str,
    batch_size: int = 16,
) -> dict[str, float]:
    """The model's mean score on each task, in [0, 1]; NaN where its numbers aren't finite.

    A prompt that is longer than the model's context is cut from the left.

    Args:
        model: any `transformers` causal language model, on `device`.
        questions: task to its questions.
        tokenizer: the JSON of the pool's BPE, or a model folder: decodes what is generated.
        device: torch device.
        batch_size: sequences that are computed together.

    Raises:
        ProxyError: if an option, or what may be generated, fills the model's context.
    """
    if not questions:
        return {}
    flat = [(task, question) for task, of_task in questions.items() for question in of_task]
    scores: list[float] = [math.nan] * len(flat)
    choices = [i for i, (_, question) in enumerate(flat) if question.kind == "choice"]
    exact = [i for i, (_, question) in enumerate(flat) if question.kind == "exact"]
    with _evaluating(model):
        likelihoods = option_log_likelihoods(
            model, [flat[i][1] for i in choices], device=device, batch_size=batch_size
        )
        for i, values in zip(choices, likelihoods, strict=True):
            scores[i] = score_choice(values, flat[i][1])
        generated = generate_answers(
            model,
            [flat[i][1] for i in exact],
            open_task_tokenizer(tokenizer),
            device=device,
            batch_size=batch_size,
        )
        for i, text in zip(exact, generated, strict=True):
            scores[i] = math.nan if text is None else score_generation(text, flat[i][1])
    return {
        task: float(np.mean([s for s, (of, _) in zip(scores, flat, strict=True) if of == task]))
        for task in questions
    }


def score_stack_questions(
    model: StackedQwen2, questions: Mapping[str, Sequence[Question]], tokenizer: str
) -> dict[str, np.ndarray]:
    """The score of each model of a stack on each task; arrays of shape (K,)."""
    if not questions:
        return {}
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from causalmix_pipeline.adapters.stacked_qwen2 import transformers_config

    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away
        one = Qwen2ForCausalLM(Qwen2Config(**transformers_config(model.config)))
    one = one.to(model.device)  # pyright: ignore[reportArgumentType]
    scores: dict[str, list[float]] = {task: [] for task in questions}
    for k in range(model.n_models):
        one.load_state_dict(model.to_transformers(k))
        found = score_questions(
            one, questions, tokenizer, device=str(model.device), batch_size=TINY_BATCH
        )
        for task, score in found.items():
            scores[task].append(score)
    return {task: np.array(values) for task, values in scores.items()}


def option_log_likelihoods(
    model: Any, questions: Sequence[Question], *, device: str, batch_size: int
) -> list[list[float]]:
    """Summed log-likelihood of each option after its prompt, in nats."""
    import torch

    context = context_of(model)
    rows = []
    for number, question in enumerate(questions):
        for option in question.options:
            _check_fits(len(option), context, "an option", number)
            kept = (*question.prompt, *option)[-context:]
            rows.append((kept, len(option)))
    found = [0.0] * len(rows)
    for batch in _batches([len(ids) for ids, _ in rows], batch_size):
        ids_BL, mask_BL = _padded_left([rows[i][0] for i in batch], device)
        length = max(rows[i][1] for i in batch)
        with torch.inference_mode():
            logits = model(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                position_ids=_positions(mask_BL),
                use_cache=False,
                logits_to_keep=length + 1,
            ).logits[:, -length - 1 : -1]  # (B, longest option, V)
            targets = ids_BL[:, -length:, None]
            nats_BO = torch.log_softmax(logits.float(), -1).gather(2, targets)[:, :, 0]
        values = nats_BO.double().cpu().numpy()
        for i, row in zip(batch, values, strict=True):
            found[i] = float(row[length - rows[i][1] :].sum())
    result, start = [], 0
    for question in questions:
        result.append(found[start : start + len(question.options)])
        start += len(question.options)
    return result


def generate_answers(
    model: Any,
    questions: Sequence[Question],
    tokenizer: TaskTokenizer,
    *,
    device: str,
    batch_size: int,
) -> list[str | None]:
    """What the model writes after each prompt, the likeliest token each time, to the end of text.

    Returns:
        A text each; None where the model's numbers aren't finite.
    """
    context = context_of(model)
    prompts = []
    for number, question in enumerate(questions):
        _check_fits(question.max_new_tokens, context, "max_new_tokens", number)
        prompts.append(question.prompt[-(context - question.max_new_tokens) :])
    found: list[str | None] = [None] * len(questions)
    for batch in _batches([len(prompt) for prompt in prompts], batch_size):
        limits = [questions[i].max_new_tokens for i in batch]
        generated = _generate(
            model, [prompts[i] for i in batch], limits, tokenizer.stop_ids, device
        )
        for i, ids in zip(batch, generated, strict=True):
            found[i] = None if ids is None else tokenizer.decode(ids)
    return found


def _generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    stop_ids: Sequence[int],
    device: str,
) -> list[list[int] | None]:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    ids_BL, mask_BL = _padded_left(prompts, device)
    finite_B = torch.ones(len(prompts), dtype=torch.bool, device=device)

    def watch(ids_BL: Any, logits_BV: Any) -> Any:
        finite_B.logical_and_(torch.isfinite(logits_BV).all(-1))
        return logits_BV

    # Values that are left out here would be taken from the model's own settings, such as sampling.
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            do_sample=False,
            max_new_tokens=max(limits),
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        ),
    )
    try:
        with torch.inference_mode():
            written_BL = model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                logits_processor=LogitsProcessorList([watch]),
            )[:, ids_BL.shape[1] :]
    finally:
        model.generation_config = own
    generated: list[list[int] | None] = []
    for ids, limit, finite in zip(written_BL.tolist(), limits, finite_B.tolist(), strict=True):
        kept = list(takewhile(lambda token: token not in stop_ids, ids[:limit]))
        generated.append(kept if finite else None)
    return generated


def context_of(model: Any) -> int:
    """Tokens that a model can read."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30)


def _check_fits(n_tokens: int, context: int, what: str, number: int) -> None:
    if n_tokens >= context:
        raise ProxyError(
            f"{what} of question {number + 1} must be shorter than the model's context of "
            f"{context} tokens, got {n_tokens}: shorten it, or take a model with a longer context."
        )


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Positions of sequences, the longest first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padded_left(rows: Sequence[Sequence[int]], device: str) -> tuple[Any, Any]:
    """Token ids and the mask of those that count; both (B, L)."""
    import torch

    length = max(map(len, rows))
    ids_BL, mask_BL = np.zeros((2, len(rows), length), dtype=np.int64)
    for row, ids in enumerate(rows):
        ids_BL[row, length - len(ids) :] = ids
        mask_BL[row, length - len(ids) :] = 1
    return torch.as_tensor(ids_BL, device=device), torch.as_tensor(mask_BL, device=device)


def _positions(mask_BL: Any) -> Any:
    """Position of each token in its own sequence."""
    return (mask_BL.cumsum(1) - 1).clamp(min=0)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout inside; the model as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
