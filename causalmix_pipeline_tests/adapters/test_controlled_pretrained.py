"""Fine-tuning under a controller: shares of each block, what was seen, resumed as if unbroken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from causalmix_pipeline.adapters import controlled_pretrained
from causalmix_pipeline.adapters.controlled_pretrained import BlockFeed, controlled_trainer
from causalmix_pipeline.adapters.pretrained_model import load_model, summed_loss, token_losses
from causalmix_pipeline.adapters.pretrained_proxy import train_pretrained
from causalmix_pipeline.adapters.pretrained_trainer import Feed
from causalmix_pipeline.core.controlled_run import ControlledRun
from causalmix_pipeline.core.controllers import DoReMi, OnlineBandit, StaticMixture
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline_tests.adapters import controlled_runs
from causalmix_pipeline_tests.adapters.controlled_runs import CONTROLLERS, write_controlled
from causalmix_pipeline_tests.adapters.pretrained_runs import save_lm, small_config, write_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
of_each_kind = pytest.mark.parametrize("kind", CONTROLLERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_lm(tmp_path_factory.mktemp("lm") / "m")


def train(root, model, kind, **changes):
    store, spec, evaluation = write_controlled(root, model, kind, **changes)
    return train_pretrained(store, spec, device="cpu", evaluation=evaluation)


def outcome(record):
    return record.train_loss, record.bits_per_byte, record.epochs, record.control


@of_each_kind
def test_a_controlled_run_tells_its_path_and_what_it_cost(model, tmp_path, kind):
    store, spec, evaluation = write_controlled(tmp_path, model, kind)
    record = train_pretrained(store, spec, device="cpu", evaluation=evaluation)
    control = record.control
    shares = np.array([block["shares"] for block in control["path"]])
    tokens = np.array([block["tokens"] for block in control["path"]])

    assert not record.diverged
    assert len(control["path"]) == (2 if kind == "schedule" else 6)
    assert shares.sum(1) == pytest.approx(1.0)
    assert np.ptp(shares[:, 0]) > 0.01
    # To within one packed sequence, however many blocks.
    wanted = spec.config.tokens / len(shares) * shares.cumsum(0)
    assert np.abs(tokens.cumsum(0) - wanted).max() <= 64
    assert control["tokens"] == tokens.sum()
    extra = {name: control[name] > 0 for name in control if name.endswith("_tokens")}
    assert extra["forward_tokens"] == extra["reference_tokens"] == (kind == "doremi")
    assert extra["backward_tokens"] == (kind == "rl_scheduler")
    store.put(record)
    assert store.get(spec.key) == record
    assert not store.scratch(spec.key).exists()


def test_a_controller_that_changes_nothing_reads_and_learns_what_a_static_run_does(model, tmp_path):
    """To rounding: its sequences are summed domain by domain."""
    store, spec, evaluation = write_run(tmp_path, small_config(model))
    static = train_pretrained(store, spec, device="cpu", evaluation=evaluation)
    (store.scratch(spec.key)).rename(tmp_path / "away")
    trainer = controlled_trainer(store, spec, StaticMixture(), "cpu")
    feed = Feed.of(store, spec)
    np.testing.assert_array_equal(trainer.feed.domain_W, feed.domain_W)
    np.testing.assert_array_equal(trainer.feed.sequence_W, feed.sequence_W)

    history = trainer.train()

    assert history.train_loss() == pytest.approx(static.train_loss, rel=1e-5)
    assert trainer.feed.epochs_D.tolist() == static.epochs


def test_the_losses_that_a_controller_sees_are_those_of_each_domain(model, tmp_path):
    """By hand, at a learning rate too small to change them."""
    store, spec, _ = write_controlled(tmp_path, model, "online_bandit", learning_rate=1e-12)
    trainer = controlled_trainer(store, spec, spec.controller, "cpu")
    feed = trainer.feed
    rows = [
        (d, row)
        for step in (0, 1)
        for d, row in zip(feed.domains(step), feed.rows(step), strict=True)
    ]
    lm = load_model(spec.config, "cpu")

    trainer.train()

    for d in (0, 1):
        own = [row for domain, row in rows if domain == d]
        nats = sum(float(summed_loss(lm, [row], "cpu").detach()) for row in own)
        expected = nats / sum(int(row.has_loss_L.sum()) for row in own)
        assert trainer.control.seen[0].loss_D[d] == pytest.approx(expected, rel=1e-5)


def test_a_schedule_s_probe_is_told_and_changes_nothing_of_the_run(model, tmp_path):
    records = []
    for windows in (0, 2):
        root = tmp_path / str(windows)
        store, spec, evaluation = write_controlled(root, model, "schedule")
        controller = replace(CONTROLLERS["schedule"], probe_windows=windows)
        spec = replace(spec, controller=controller)
        records.append(train_pretrained(store, spec, device="cpu", evaluation=evaluation))
    plain, probed = records

    assert probed.train_loss == plain.train_loss
    assert probed.bits_per_byte == plain.bits_per_byte
    assert ["probe_loss" in block for block in probed.control["path"]] == [True, False]
    assert "probe_loss" not in plain.control["path"][0]
    assert np.isfinite(probed.control["path"][0]["probe_loss"]).all()
    assert probed.control["forward_tokens"] > 0 == plain.control["forward_tokens"]


def test_losses_by_token_sum_to_the_loss(model, tmp_path):
    store, spec, _ = write_controlled(tmp_path, model, "doremi")
    rows = Feed.of(store, replace(spec, controller=None)).rows(0)
    lm = load_model(spec.config, "cpu")

    nats_N = token_losses(lm, rows, "cpu")

    assert len(nats_N) == sum(int(row.has_loss_L.sum()) for row in rows)
    assert nats_N.sum() == pytest.approx(float(summed_loss(lm, rows, "cpu").detach()), rel=1e-5)


def test_a_probe_changes_neither_weights_nor_what_is_learned_next(model, tmp_path):
    store, spec, _ = write_controlled(tmp_path, model, "rl_scheduler")
    trainer = controlled_trainer(store, spec, spec.controller, "cpu")
    before = {name: value.detach().clone() for name, value in trainer.trained.items()}

    probe = trainer._probe()

    assert probe is not None
    assert all(torch.equal(before[name], value) for name, value in trainer.trained.items())
    assert all(value.grad is None for value in trainer.trained.values())
    assert trainer.model.training
    gram_DD = probe.gram_DD
    assert gram_DD is not None
    np.testing.assert_allclose(gram_DD, gram_DD.T)
    assert np.linalg.eigvalsh(gram_DD).min() > 0


def test_gradients_are_compared_at_the_last_matrices_without_the_embedding(
    model, tmp_path, monkeypatch
):
    store, spec, _ = write_controlled(tmp_path, model, "rl_scheduler")
    trainer = controlled_trainer(store, spec, spec.controller, "cpu")
    names = {id(value): name for name, value in trainer.trained.items()}
    everywhere = [names[id(value)] for value in trainer._compared()]
    monkeypatch.setattr(controlled_pretrained, "MOST_COMPARED_WEIGHTS", 5000)

    last = trainer._compared()

    assert "model.embed_tokens.weight" not in everywhere
    assert len(everywhere) == 2 * 7
    assert 1 <= len(last) < len(everywhere)
    assert sum(value.numel() for value in last) <= 5000
    assert all("layers.1." in names[id(value)] for value in last)


def test_doremi_compares_with_a_static_run_on_its_own_mixture(model, tmp_path):
    """The reference has that run's weights, to the bit."""
    store, spec, evaluation = write_controlled(tmp_path / "a", model, "doremi")
    trainer = controlled_trainer(store, spec, spec.controller, "cpu")
    assert trainer.reference is not None
    static = replace(spec, controller=None)
    other = write_run(tmp_path / "b", spec.config)[0]
    record = train_pretrained(other, static, device="cpu", evaluation=evaluation)

    history = trainer.reference.history

    assert history.train_loss() == record.train_loss
    read = sum(epochs * n for epochs, n in zip(record.epochs, _tokens(store, static), strict=False))
    assert trainer.control.extra.reference_tokens == trainer.reference.n_tokens
    assert trainer.reference.n_tokens == pytest.approx(read)


def _tokens(store, spec) -> list[int]:
    return [int(domain.tokens_S.sum()) for domain in Feed.of(store, spec).packed]


def test_doremi_reads_more_of_the_domain_in_which_it_lags_behind_the_reference(model, tmp_path):
    """The reference has read plain text alone."""
    config = small_config(model, tokens=64 * 4 * 24, learning_rate=3e-4)
    store, spec, _ = write_run(tmp_path, config, mixture=(0.5, 0.5))
    trainer = controlled_trainer(store, spec, DoReMi(blocks=8, probe_windows=4), "cpu")
    other = write_run(tmp_path / "b", replace(config, learning_rate=1e-2), mixture=(0.01, 0.99))
    assert trainer.reference is not None
    learned = controlled_trainer(other[0], other[1], StaticMixture(), "cpu")
    learned.train()
    trainer.reference.model = learned.model.eval()

    trainer.train()

    assert trainer.control.path[-1][1] > 0.7


def test_lora_runs_are_controlled_too(model, tmp_path):
    """Gradients are compared at the additions, the only weights that train."""
    record = train(tmp_path, model, "rl_scheduler", method="lora", learning_rate=1e-2)

    assert record.control["backward_tokens"] > 0
    assert np.ptp([block["shares"][0] for block in record.control["path"]]) > 0.01


@pytest.mark.parametrize(("method", "part"), [("full", 3), ("lora", 2)])
def test_a_forward_pass_costs_more_of_a_training_token_under_lora(model, tmp_path, method, part):
    """Gradients of frozen weights aren't computed: a third of the work of training falls away."""
    control = train(tmp_path, model, "doremi", method=method).control

    forward = control["total_tokens"] - control["tokens"] - control["reference_tokens"]
    assert forward == pytest.approx(control["forward_tokens"] / part)


@of_each_kind
def test_a_run_that_diverges_is_recorded_as_such(model, tmp_path, kind):
    """As a static one is, whether it is the run itself or its reference."""
    record = train(tmp_path, model, kind, learning_rate=1e4)

    assert record.diverged
    assert np.isfinite([block["shares"] for block in record.control["path"]]).all()


def test_a_run_whose_reference_diverged_isn_t_trained(model, tmp_path):
    store, spec, _ = write_controlled(tmp_path, model, "doremi", learning_rate=1e4)
    assert spec.controller is not None
    trainer = controlled_trainer(store, spec, spec.controller, "cpu")

    assert trainer.train().diverged
    assert trainer.history.step == 0


@pytest.mark.parametrize("kind", ["doremi", "rl_scheduler"])
def test_a_probe_that_isn_t_finite_keeps_the_shares(model, tmp_path, kind):
    store, spec, _ = write_controlled(tmp_path, model, kind)
    trainer = controlled_trainer(store, spec, spec.controller, "cpu")
    with torch.no_grad():
        for value in trainer.trained.values():
            value.fill_(float("nan"))
    trainer.history.step = trainer.control.span[1]
    trainer.losses_D += 1

    trainer._after_step()

    np.testing.assert_array_equal(*trainer.control.path)
    assert len(trainer.feed.domain_W)


def test_a_stage_must_have_something_to_learn(model, tmp_path):
    store, spec, _ = write_controlled(
        tmp_path, model, "schedule", sequence_length=8, tokens=8 * 4 * 4
    )

    with pytest.raises(ProxyError, match=r"domain 0 .*proxy\.sequence_length \(8\), got none"):
        controlled_trainer(store, spec, spec.controller, "cpu")


def test_what_a_step_reads_is_all_of_its_block(model, tmp_path):
    store, spec, _ = write_controlled(tmp_path, model, "online_bandit")
    control = ControlledRun(OnlineBandit(blocks=4), np.array([0.6, 0.4]), steps=12, seed=1)
    feed = BlockFeed(store, spec, spec.config, control)
    feed.begin(control.shares_D, control.span)

    rows = [row for step in range(3) for row in feed.rows(step)]

    assert len(rows) == len(feed.domain_W)
    assert sum(row.n_tokens for row in rows) == feed.tokens_D.sum()
    assert all(feed.rows(step) for step in range(3))


# Killed and resumed


@of_each_kind
def test_a_run_that_breaks_goes_on_with_the_bits_of_an_unbroken_one(model, tmp_path, kind):
    """In its fourth block, or its second stage."""
    store, spec, evaluation = write_controlled(tmp_path / "broken", model, kind)
    steps: list[int] = []

    def breaks(step: int, loss: float) -> None:
        steps.append(step)
        if steps == list(range(1, 8)):
            raise KeyboardInterrupt

    again = partial(
        train_pretrained, store, spec, device="cpu", evaluation=evaluation, progress=breaks
    )
    with pytest.raises(KeyboardInterrupt):
        again()
    resumed = again()

    assert steps[7:] == list(range(6, 13))  # from the checkpoint in the middle of a block
    assert outcome(resumed) == outcome(train(tmp_path / "whole", model, kind))


def test_a_killed_run_goes_on_with_the_bits_of_an_unbroken_one(model, tmp_path):
    """A process of its own, killed for real in its fourth block."""
    kind, after, kept_step = "doremi", 7, 5
    command = [sys.executable, "-m", controlled_runs.__name__, str(tmp_path / "killed")]
    with subprocess.Popen([*command, str(model), kind], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL
    store, spec, evaluation = write_controlled(tmp_path / "killed", model, kind)
    kept = sorted(path.name for path in store.scratch(spec.key).glob("step-*"))
    folder = store.scratch(spec.key) / "reference"
    reference = sorted(path.name for path in folder.glob("step-*"))
    steps: list[int] = []

    resumed = train_pretrained(
        store, spec, device="cpu", evaluation=evaluation, progress=lambda s, _: steps.append(s)
    )

    assert kept == [f"step-{kept_step:08d}"]
    assert reference == ["step-00000010", "step-00000012"]
    assert steps == list(range(kept_step + 1, 13))
    assert outcome(resumed) == outcome(train(tmp_path / "whole", model, kind))


def test_checkpoints_come_every_checkpoint_steps_wherever_blocks_end(model, tmp_path):
    store, spec, _ = write_controlled(tmp_path, model, "schedule", checkpoint_steps=5)
    controlled_trainer(store, spec, spec.controller, "cpu").train()

    kept = sorted(path.name for path in store.scratch(spec.key).glob("step-*"))

    assert kept == ["step-00000010", "step-00000012"]


def test_a_checkpoint_that_leads_to_other_shares_is_refused(model, tmp_path):
    store, spec, _ = write_controlled(tmp_path, model, "online_bandit")
    controlled_trainer(store, spec, spec.controller, "cpu").train()

    with pytest.raises(ProxyError, match=r"sets other shares from the same blocks.*starts over"):
        controlled_trainer(store, spec, OnlineBandit(blocks=6, smoothing=0.5), "cpu")
