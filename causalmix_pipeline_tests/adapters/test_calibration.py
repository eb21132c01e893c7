from dataclasses import replace

import pytest

from causalmix_pipeline.adapters import calibration
from causalmix_pipeline.adapters.calibration import (
    CalibrationStore,
    calibrate,
    machine,
    matrix_rate,
    shortened,
)
from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.work import InProcess
from causalmix_pipeline_tests.adapters.small_pool import CONFIG, build_experiment


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return build_experiment(tmp_path_factory.mktemp("pool"), n_runs=8)


def test_a_trial_times_the_real_thing_and_leaves_no_record(experiment, tmp_path):
    """Two workers, full stacks, real states and evaluation: all that a run does, but few steps."""
    backend = LocalBackend(experiment.store, n_workers=2, models_per_stack=2)
    folder = tmp_path / "trial"

    found = calibrate(
        backend,
        experiment.specs,
        n_workers=2,
        runs_per_stack=2,
        folder=folder,
        flops=CONFIG.flops,
    )

    assert found.start_seconds + found.stack_seconds(20) > 0
    assert found.record_bytes == 4096
    assert found.how.startswith("measured by a trial of 20 steps in all workers at once")
    assert not folder.exists()
    assert experiment.store.n_records() == 0


class HalfOfTheCore(LocalBackend):
    """Answers as a machine does where another program takes half of each core."""

    def train(self, specs, on_done, *, on_failed=None, on_started=None):
        def halved(records):
            on_done([replace(r, seconds=2 * len(records) * r.cpu_seconds) for r in records])

        super().train(specs, halved, on_failed=on_failed, on_started=on_started)


def test_what_other_programs_take_is_taken_out_and_said(experiment, tmp_path):
    found = calibrate(
        HalfOfTheCore(experiment.store, n_workers=1, models_per_stack=2),
        experiment.specs,
        n_workers=1,
        runs_per_stack=2,
        folder=tmp_path / "trial",
        flops=CONFIG.flops,
    )

    assert "other programs held 50% of the cores' time" in found.how


def test_a_trial_reads_from_one_store_and_writes_to_another(experiment, tmp_path):
    store = CalibrationStore(tmp_path, source=experiment.store)
    spec = experiment.specs[0]

    assert store.state(spec.state_hash)[0].tolist() == (
        experiment.store.state(spec.state_hash)[0].tolist()
    )
    assert set(store.evaluation(spec.eval_hash).windows) == {"code", "math"}
    assert store.missing([spec]) == [spec]


def test_a_pretrained_model_too_slow_for_a_trial_is_computed_and_says_so(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibration, "matrix_rate", lambda device, *, bf16: 1e10)
    config = PretrainedConfig(
        model="some/model", weights_hash="0" * 32, tokens=4096, sequence_length=128,
        batch_sequences=8, bf16=False,
    )  # fmt: skip
    spec = replace(experiment.specs[0], config=config)
    backend = LocalBackend(experiment.store, workers=InProcess())

    found = calibrate(
        backend, [spec], n_workers=2, runs_per_stack=1, folder=tmp_path / "trial", flops=4e12
    )

    assert found.stack_seconds(config.steps) == pytest.approx(4e12 / (0.5 * 1e10))
    assert found.how.startswith("computed, not measured: a trial would take over 120 s")
    assert "5e+09 FLOPs a second" in found.how


def test_shortened_runs_differ_in_their_length_alone():
    pretrained = PretrainedConfig(model="m", weights_hash="0" * 32, tokens=10**9)

    assert shortened(CONFIG, 3) == replace(CONFIG, steps=3)
    short = shortened(pretrained, 2)
    assert short == replace(pretrained, tokens=2 * 16 * 2048) and short.steps == 2


def test_the_machine_is_told_by_what_decides_its_speed():
    found = machine("cpu")

    assert found["cores"] >= 1 and found["cpu"] and found["device"] == "cpu"
    assert matrix_rate("cpu", bf16=False) > 1e8
