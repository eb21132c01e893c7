"""A run's name: everything that its outcome depends on, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core import controllers, proxy_runs
from causalmix_pipeline.core.actor_critic import RLScheduler
from causalmix_pipeline.core.controllers import DoReMi, OnlineBandit, Schedule, StaticMixture
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyBackend, ProxyRecord, ProxySpec

SPEC = ProxySpec(
    state_hash="s" * 64,
    tokens_hash="t" * 32,
    eval_hash="e" * 32,
    mixture=(0.25, 0.75),
    data_seed=7,
    config=ProxyConfig(),
    engine="stacked-torch-2.13.0",
)


@pytest.mark.parametrize(
    "change",
    [
        {"state_hash": "x" * 64},
        {"tokens_hash": "x" * 32},
        {"eval_hash": "x" * 32},
        {"mixture": (0.75, 0.25)},
        {"mixture": (0.25 + 1e-9, 0.75 - 1e-9)},
        {"data_seed": 8},
        {"config": ProxyConfig(steps=999)},
        {"config": ProxyConfig(init_seed=1)},
        {"engine": "stacked-torch-2.12.0"},
        {"controller": OnlineBandit()},
        {"controller": RLScheduler()},
    ],
)
def test_anything_that_changes_the_outcome_changes_the_name(change):
    assert replace(SPEC, **change).key != SPEC.key


def test_static_runs_keep_the_names_they_have_in_run_stores():
    """Frozen: another name would train every stored run again."""
    config = PretrainedConfig(model="m", weights_hash="w" * 32, tokens=4096)
    fine_tuned = replace(SPEC, config=config, engine="pretrained-torch-2.13.0")

    assert SPEC.key == "7460d7f5343003cf3b12da13eab83f9a"
    assert fine_tuned.key == "eb57db6ff31d1cf3a8f5d7efb129d24d"


def test_a_static_controller_is_no_controller():
    named = replace(SPEC, controller=StaticMixture())

    assert named == SPEC
    assert named.key == SPEC.key


def test_controllers_have_names_of_their_own():
    stages = ((0.5, (0.5, 0.5)), (0.5, (0.1, 0.9)))
    kinds = [OnlineBandit(), OnlineBandit(blocks=9), DoReMi(), RLScheduler(), Schedule(stages)]

    assert len({replace(SPEC, controller=kind).key for kind in kinds}) == len(kinds)


def test_a_new_version_of_the_controllers_changes_controlled_runs_alone(monkeypatch):
    controlled = replace(SPEC, controller=OnlineBandit())
    before = SPEC.key, controlled.key
    monkeypatch.setattr(controllers, "CONTROL_VERSION", controllers.CONTROL_VERSION + 1)

    assert SPEC.key == before[0]
    assert controlled.key != before[1]


def test_a_static_record_has_the_values_it_had():
    values = ProxyRecord("k", {}, {}, {}, [1.0], False, 1.0).to_dict()

    assert sorted(values) == [
        "bits_per_byte", "cpu_seconds", "diverged", "epochs", "key", "nats_per_token", "scores",
        "seconds", "spec", "train_loss",
    ]  # fmt: skip


def test_a_new_version_of_the_training_code_changes_the_name(monkeypatch):
    before = SPEC.key
    monkeypatch.setattr(proxy_runs, "CODE_VERSION", proxy_runs.CODE_VERSION + 1)

    assert SPEC.key != before


def test_rounding_of_a_share_does_not_change_the_name():
    assert replace(SPEC, mixture=(0.25 + 1e-15, 0.75 - 1e-15)).key == SPEC.key


def test_the_name_is_the_same_in_another_process():
    """Hashes of strings differ between Python processes; this one must not."""
    code = (
        "from causalmix_pipeline.core.proxy import ProxyConfig\n"
        "from causalmix_pipeline.core.proxy_runs import ProxySpec\n"
        "print(ProxySpec('s'*64,'t'*32,'e'*32,(.25,.75),7,ProxyConfig(),'stacked-torch-2.13.0').key)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert printed.stdout.strip() == SPEC.key
    assert len(SPEC.key) == 32


def test_the_local_backend_is_a_backend(tmp_path):
    assert isinstance(LocalBackend(RunStore(tmp_path)), ProxyBackend)
