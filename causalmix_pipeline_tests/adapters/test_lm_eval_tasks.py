"""A harness task from local files gives one number for a model that is in memory."""

import json

import numpy as np
import pytest

from causalmix_pipeline.adapters.lm_eval_tasks import check_harness, score_harness
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.tasks import HarnessTask
from causalmix_pipeline_tests.adapters.small_models import save_model, small_lm

pytest.importorskip("lm_eval", reason="lm_eval, an optional extra, isn't installed")

YAML = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: sums.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """The harness keeps what it read below the user's home otherwise."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "sums.yaml").write_text(YAML)
    rows = [
        {
            "question": f"What is {i} and one?",
            "choices": [f"It is {i + 1}.", "the sea"],
            "answer": 0,
        }
        for i in range(6)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_local_task_is_scored_by_the_likelihood_of_its_options(tmp_path, folder, monkeypatch):
    """Compared with the sums of log-likelihoods, computed one sequence at a time."""
    import torch

    model = small_lm(seed=2)
    place = str(save_model(tmp_path / "m", model))
    found = score_harness(model, {"t": HarnessTask(str(folder), "sums")}, place, device="cpu")

    from causalmix_pipeline.adapters.task_tokenizers import open_task_tokenizer

    tokenizer, right = open_task_tokenizer(place), []
    for line in (folder / "sums.jsonl").read_text().splitlines():
        row, nats = json.loads(line), []
        for choice in row["choices"]:
            prompt, option = tokenizer.encode([row["question"], f" {choice}"])
            ids = torch.tensor([[*prompt.tolist(), *option.tolist()]])
            with torch.no_grad():
                logits = torch.log_softmax(model.eval()(input_ids=ids).logits[0], -1)
            n = len(option)
            nats.append(float(logits[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum()))
        right.append(nats[0] > nats[1])
    assert found == {"t": pytest.approx(np.mean(right))}


def test_without_tasks_the_harness_is_not_asked():
    assert score_harness(None, {}, "", device="cpu") == {}


def test_a_name_that_the_folder_lacks_is_refused(folder):
    with pytest.raises(ConfigError, match=r"harness_task of task 't' must be .* known there: sums"):
        check_harness({"t": HarnessTask(str(folder), "products")})
