"""A project whose proxies are fine-tuned from a pretrained model, through Dagster."""

from __future__ import annotations

import json
import math

import pytest

from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.automation.staleness import refresh
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.adapters.pretrained_runs import save_lm
from causalmix_pipeline_tests.assets.test_proxy import value
from causalmix_pipeline_tests.conftest import write_project


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A finished project of 10 fine-tuned proxies, scored on held-out text and on questions."""
    import dagster as dg

    root = tmp_path_factory.mktemp("fine_tuned")
    save_lm(root / "model", chat=False)
    questions = [
        {"question": f"{i} plus {i} is", "choices": [f" {2 * i}", f" {3 * i + 1}"], "answer": 0}
        for i in range(6)
    ]
    (root / "sums.jsonl").write_text("\n".join(json.dumps(each) for each in questions))
    config = write_project(
        root,
        proxy={
            "preset": "tests",
            "pretrained": str(root / "model"),
            "overrides": {"tokens": 1536, "sequence_length": 64, "bf16": False,
                          "learning_rate": 3e-3},
        },
        design={"n_runs": 8, "mixtures_per_state": 2, "noise_panel": {"mixtures": 2, "seeds": 2}},
        tasks=[
            {"name": "math", "path": "eval/math.jsonl"},
            {"name": "sums", "path": "sums.jsonl", "kind": "choice"},
        ],
    )  # fmt: skip
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        wanted = dg.AssetSelection.assets("run_table").upstream()
        refresh(build_definitions(config), instance, wanted)
    return config


def test_each_run_is_fine_tuned_on_its_mixture_and_scored_on_every_task(fine_tuned):
    table, design = value(fine_tuned, "run_table"), value(fine_tuned, "mixture_design")
    store = RunStore(load_settings(fine_tuned).run_store_root)
    records = [store.get(key) for key in design["proxy_run_id"]]

    assert table.height == design.height == 10
    assert (table["outcome__math"] < 0).all() and table["outcome__math"].n_unique() == 10
    assert table["outcome__sums"].is_between(0, 1).all() and table["outcome__sums"].n_unique() > 1
    for record in records:
        assert record is not None
        assert record.spec["config"]["kind"] == "pretrained"
        assert record.spec["engine"].startswith("pretrained-torch-")
        assert all(math.isfinite(loss) for loss in record.train_loss)
        assert len(record.epochs) == len([n for n in design.columns if n.startswith("share__")])


def test_the_plan_prices_what_is_left_of_a_fine_tuned_experiment(fine_tuned):
    plan = value(fine_tuned, "proxy_plan")

    assert plan["proxy runs"] == 10
    assert plan["parameters of a proxy"] > 9_000
    assert plan["FLOPs to train"] > 0 and plan["hours"] > 0


def test_nothing_is_left_behind_in_the_scratch_folder(fine_tuned):
    root = RunStore(load_settings(fine_tuned).run_store_root).root
    scratch = root / "scratch"

    assert not scratch.exists() or not any(scratch.iterdir())
