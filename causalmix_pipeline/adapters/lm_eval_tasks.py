"""Tasks of EleutherAI's lm-evaluation-harness, from local files, on a model that is in memory.

The only module that imports lm_eval; an optional extra. A task is a folder with the harness's own
YAML file and its data (`dataset_path: json`, `data_files` relative to the folder). Nothing is
fetched: tasks whose data or metric lie on a hub fail.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from causalmix_pipeline.adapters.model_tokens import find_model, load_tokenizer
from causalmix_pipeline.adapters.task_scores import context_of
from causalmix_pipeline.core.errors import ConfigError, ProxyError
from causalmix_pipeline.core.tasks import HarnessTask


def score_harness(
    model: Any,
    tasks: Mapping[str, HarnessTask],
    tokenizer: str,
    *,
    device: str,
    batch_size: int = 16,
) -> dict[str, float]:
    """The model's score on each harness task: the first metric that the task names.

    Args:
        model: a `transformers` causal language model, on `device`.
        tasks: task to its place in the harness.
        tokenizer: folder, GGUF file or hub id of the model whose tokenizer is used.
        device: torch device.
        batch_size: sequences that are computed together.

    Raises:
        ConfigError: if lm_eval isn't installed, or a folder holds no task of the name.
        ProxyError: if the harness gives no number.
    """
    if not tasks:
        return {}
    check_harness(tasks)
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    model.eval()
    try:
        with _quiet():
            # No device: the model is placed already.
            arguments: dict[str, Any] = {
                "pretrained": model,
                "tokenizer": load_tokenizer(find_model(tokenizer)),
                "batch_size": batch_size,
                "max_length": context_of(model),
            }
            language_model = HFLM(**arguments)
            return {name: _score(language_model, name, task) for name, task in tasks.items()}
    finally:
        model.train(was_training)


def check_harness(tasks: Mapping[str, HarnessTask]) -> None:
    """Raise unless the harness is installed and finds each task in its folder.

    Raises:
        ConfigError: naming the task and what's missing.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks of kind lm_eval need the package lm_eval, which isn't there ({error}): "
            "pip install 'causalmix_pipeline[lm-eval]'."
        ) from error
    for name, task in tasks.items():
        with _quiet():
            manager = TaskManager(include_path=task.folder, include_defaults=False)
        known = sorted(manager.all_tasks)
        if task.name not in known:
            raise ConfigError(
                f"harness_task of task {name!r} must be a task in {task.folder}, got "
                f"{task.name!r}; known there: {', '.join(known) or 'none'}. Correct the name, or "
                "put its YAML file there."
            )


def _score(language_model: Any, name: str, task: HarnessTask) -> float:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = Path(task.folder)
    with contextlib.chdir(folder):  # data files stand relative to the task's folder
        found = simple_evaluate(
            model=language_model,
            tasks=[task.name],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            limit=task.max_questions,
            bootstrap_iters=0,
            log_samples=False,
        )
    results = (found or {}).get("results", {}).get(task.name, {})
    for metric, value in results.items():
        # "acc,none": the metric and its filter; standard errors and texts stand between.
        if "_stderr," not in metric and "," in metric and isinstance(value, int | float):
            return float(value)
    raise ProxyError(
        f"harness task {task.name!r} of task {name!r} must give a number, got {results}: name a "
        "metric in the metric_list of its YAML file."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only warnings and errors of the harness are logged."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
