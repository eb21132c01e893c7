"""The tiny engine under a controller: a static run's bits, a stored path, resumed unbroken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from causalmix_pipeline.adapters import controlled_proxy
from causalmix_pipeline.adapters.controlled_proxy import (
    BlockFeed,
    ControlledResult,
    gradient_gram,
    train_controlled,
)
from causalmix_pipeline.adapters.local_backend import LocalBackend, train_stack_of_specs
from causalmix_pipeline.adapters.run_feed import RunFeed
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.stacked_qwen2 import StackedQwen2
from causalmix_pipeline.core.actor_critic import RLScheduler
from causalmix_pipeline.core.controllers import (
    ControllerConfig,
    DoReMi,
    OnlineBandit,
    Schedule,
    StaticMixture,
)
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline_tests.adapters.small_pool import (
    CONFIG,
    SmallExperiment,
    build_experiment,
)

THIRDS = (1 / 3, 1 / 3, 1 / 3)
KINDS = [
    Schedule(stages=((0.5, (0.8, 0.1, 0.1)), (0.5, (0.1, 0.8, 0.1)))),
    OnlineBandit(blocks=5),
    DoReMi(blocks=5, probe_windows=2),
    RLScheduler(blocks=5, probe_windows=2, updates=4),
]
of_each_kind = pytest.mark.parametrize("controller", KINDS, ids=lambda config: config.kind)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> SmallExperiment:
    """Four static runs of one state, trained."""
    experiment = build_experiment(tmp_path_factory.mktemp("controlled"))
    train_stack_of_specs(experiment.store, experiment.specs, 4, "cpu")
    return experiment


def controlled(experiment: SmallExperiment, controller: ControllerConfig, **changes) -> ProxySpec:
    """The first run with a controller that starts from equal shares."""
    return replace(experiment.specs[0], mixture=THIRDS, controller=controller, **changes)


def train(
    experiment: SmallExperiment, spec: ProxySpec, controller: ControllerConfig | None = None
) -> ControlledResult:
    controller = controller or spec.controller
    assert controller is not None
    evaluation = experiment.store.evaluation(spec.eval_hash)
    return train_controlled(experiment.store, spec, controller, evaluation)


def outcome(done: ControlledResult) -> tuple:
    """All that a run gives but its time."""
    result = done.result
    nats = {task: values.tolist() for task, values in result.eval_nats.items()}
    return result.train_loss_KS.tolist(), nats, done.control, done.epochs


# Static runs


def test_a_controller_that_changes_nothing_gives_a_static_run_bit_for_bit(experiment):
    """Another loop, block by block, one model at a time: the same weights after 20 steps."""
    for spec in experiment.specs:
        record = experiment.store.get(spec.key)
        done = train(experiment, spec, StaticMixture())

        assert done.result.train_loss_KS[0].tolist() == record.train_loss
        for task, nats in record.nats_per_token.items():
            assert done.result.eval_nats[task][0] / done.result.eval_tokens[task] == nats
        assert done.epochs == record.epochs


def test_static_runs_are_what_they_were_before_there_were_controllers(experiment):
    """Numbers of an earlier version; libraries may round them otherwise."""
    first, _, third, _ = (experiment.store.get(spec.key) for spec in experiment.specs)

    assert first.train_loss[-1] == pytest.approx(3.2295219898223877, rel=1e-5)
    assert first.nats_per_token["code"] == pytest.approx(2.8162191900610924, rel=1e-5)
    assert third.nats_per_token["math"] == pytest.approx(5.165619459831053, rel=1e-5)


def test_a_static_record_s_file_has_nothing_of_controllers(experiment):
    path = Path(experiment.store.path_of(experiment.specs[0].key))

    assert "control" not in json.loads(path.read_text())["record"]
    assert "controller" not in experiment.specs[0].to_dict()


def test_a_static_run_asked_for_by_name_is_the_stored_one(experiment):
    named = replace(experiment.specs[0], controller=StaticMixture())

    assert experiment.store.missing([named]) == []


# Controlled runs


@of_each_kind
def test_a_controlled_run_stores_its_path_and_what_it_cost(experiment, controller):
    spec = controlled(experiment, controller)
    (record,) = train_stack_of_specs(experiment.store, [spec], 4, "cpu")
    control = record.control

    assert record == experiment.store.get(spec.key)
    assert not record.diverged
    assert record.train_loss[-1] < record.train_loss[0]
    assert record.spec["controller"]["kind"] == control["kind"] == controller.kind
    assert control["tokens"] == spec.config.tokens
    shares = np.array([block["shares"] for block in control["path"]])
    tokens = np.array([block["tokens"] for block in control["path"]])
    assert len(shares) == (2 if controller.kind == "schedule" else 5)
    assert shares.sum(1) == pytest.approx(1.0)
    assert np.ptp(shares, axis=0).max() > 0.001
    # Each block has its shares to within two windows, and all of them to within one.
    length = spec.config.sequence_length
    wanted = shares * tokens.sum(1, keepdims=True)
    assert np.abs(tokens - wanted).max() < 2 * length
    assert np.abs((tokens - wanted).sum(0)).max() < length + 1e-6
    state = [len(part) for part in np.split(*_windows(experiment, spec))]
    np.testing.assert_allclose(record.epochs, tokens.sum(0) / length / np.array(state))


def _windows(experiment: SmallExperiment, spec: ProxySpec):
    feed = BlockFeed(experiment.store, spec)
    return feed.windows, feed.starts[1:-1]


def test_extra_compute_is_told(experiment):
    """Probes after all blocks but the last: 3 domains x 2 windows x 32 tokens x 4 probes."""
    tokens, probed = CONFIG.tokens, 3 * 2 * 32 * 4
    told = {kind.kind: train(experiment, controlled(experiment, kind)).control for kind in KINDS}

    for kind in ("schedule", "online_bandit"):
        assert told[kind]["total_tokens"] == tokens
    assert told["doremi"]["reference_tokens"] == tokens
    assert told["doremi"]["forward_tokens"] == 2 * probed  # the model and the reference
    assert told["doremi"]["total_tokens"] == 2 * tokens + 2 * probed / 3
    assert told["rl_scheduler"]["backward_tokens"] == probed
    assert told["rl_scheduler"]["total_tokens"] == tokens + probed


def test_the_losses_that_a_controller_sees_are_those_of_each_domain(experiment):
    """By hand, at a learning rate too small to change them."""
    config = replace(CONFIG, learning_rate=1e-12)
    spec = controlled(experiment, OnlineBandit(blocks=2), config=config)
    feed, model = BlockFeed(experiment.store, spec), StackedQwen2(config, 1)
    feed.begin(np.array(THIRDS), (0, CONFIG.steps // 2))

    seen = train(experiment, spec).control["path"][0]["loss"]

    for d in range(3):
        nats = model.token_nats(feed.windows[feed.place_W[feed.domain_W == d]].astype(np.int64))
        assert seen[d] == pytest.approx(nats.mean(), rel=1e-4)
    assert np.ptp(seen) > 1e-3


def test_a_schedule_reads_its_stages_in_order(experiment):
    stages = ((0.5, (1.0, 0.0, 0.0)), (0.5, (0.0, 1.0, 0.0)))
    done = train(experiment, controlled(experiment, Schedule(stages=stages)))

    half = CONFIG.tokens // 2
    assert [block["tokens"] for block in done.control["path"]] == [[half, 0, 0], [0, half, 0]]
    assert done.control["path"][0]["loss"][1] is None


def test_a_schedule_s_probe_is_told_and_changes_nothing_of_the_run(experiment):
    """Losses of training windows at the weights of the stage's end, by hand for one domain."""
    plain = Schedule(stages=tuple((1 / 3, shares) for shares in np.eye(3) * 0.7 + 0.1))
    probed = replace(plain, probe_windows=2)
    runs = [train(experiment, controlled(experiment, kind)) for kind in (plain, probed)]
    told = [run.control for run in runs]

    assert outcome(runs[0])[:2] == outcome(runs[1])[:2]
    assert ["probe_loss" in block for block in told[0]["path"]] == [False] * 3
    assert ["probe_loss" in block for block in told[1]["path"]] == [True, True, False]
    losses = np.array([block["probe_loss"] for block in told[1]["path"][:2]])
    assert (losses[0] < np.log(CONFIG.vocab_size)).all()
    assert losses[1, 1] < losses[0, 1] - 0.1  # what the second stage read
    assert told[1]["forward_tokens"] == 2 * 3 * 2 * 32
    assert told[1]["total_tokens"] == CONFIG.tokens + 2 * 3 * 2 * 32 / 3


def test_doremi_s_reference_is_the_static_run(experiment, monkeypatch):
    """On the run's own mixture, seed and order, trained before the run itself."""
    batches = []
    original = controlled_proxy.train_steps

    def kept(model, next_batch):
        batches.extend(next_batch(step) for step in range(CONFIG.steps))
        return original(model, next_batch)

    monkeypatch.setattr(controlled_proxy, "train_steps", kept)
    spec = controlled(experiment, KINDS[2])
    train(experiment, spec)
    feed = RunFeed(experiment.store, replace(spec, controller=None))

    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch[0], feed.batch(step))


def test_doremi_reads_more_of_the_domain_in_which_it_lags_behind_the_reference(
    experiment, monkeypatch
):
    """The reference has read the second domain alone: there it leads, elsewhere it doesn't."""
    spec = controlled(experiment, DoReMi(blocks=10, probe_windows=2))
    feed = BlockFeed(experiment.store, spec)
    feed.begin(np.array([0.0, 1.0, 0.0]), (0, CONFIG.steps))
    original = controlled_proxy.train_steps
    monkeypatch.setattr(
        controlled_proxy,
        "train_steps",
        lambda model, _: original(model, lambda step: feed.batch(step)[1][None]),
    )

    shares = np.array([block["shares"] for block in train(experiment, spec).control["path"]])

    assert shares[1, 1] > shares[0, 1] + 0.2
    assert shares[-1, 1] > 0.9


@of_each_kind
def test_a_run_is_the_same_twice_and_another_with_another_seed(experiment, controller):
    first, again = (outcome(train(experiment, controlled(experiment, controller))) for _ in "ab")
    other = train(experiment, controlled(experiment, controller, data_seed=99))

    assert first == again
    assert outcome(other)[0] != first[0]


def test_controlled_and_static_runs_train_side_by_side_in_workers(experiment, tmp_path):
    """Each with the bits that it has alone; a controlled run is a stack of its own."""
    specs = [*experiment.specs[:2], controlled(experiment, OnlineBandit(blocks=4))]
    alone = train(experiment, specs[2])
    store = RunStore(tmp_path / "other")
    for folder in ("states", "tokens", "eval"):
        _copy(experiment.store, store, folder)
    done: list[ProxyRecord] = []
    backend = LocalBackend(store, n_workers=1)
    backend.train(specs, done.extend)

    assert sorted(record.key for record in done) == sorted(spec.key for spec in specs)
    assert sorted(len(stack) for stack in backend._stacks(specs)) == [1, 2]
    for spec in specs[:2]:
        assert store.get(spec.key).train_loss == experiment.store.get(spec.key).train_loss
    assert store.get(specs[2].key).control == alone.control


def _copy(source: RunStore, target: RunStore, folder: str) -> None:
    shutil.copytree(Path(source.root) / folder, Path(target.root) / folder)


@of_each_kind
def test_a_run_that_diverges_is_recorded_as_such(experiment, controller):
    """As a static one is: its controller has nothing sound to go by."""
    config = replace(CONFIG, learning_rate=1e4)
    spec = controlled(experiment, controller, config=config)

    (record,) = train_stack_of_specs(experiment.store, [spec], 4, "cpu")

    assert record.diverged
    assert np.isfinite([block["shares"] for block in record.control["path"]]).all()


@pytest.mark.parametrize("controller", KINDS[2:], ids=lambda config: config.kind)
def test_a_run_whose_weights_are_lost_keeps_its_shares_and_its_checkpoint(
    experiment, controller, monkeypatch
):
    """Not a number after its second block, broken after its third and resumed."""
    monkeypatch.setattr(controlled_proxy, "CHECKPOINT_SECONDS", 0.0)
    original = controlled_proxy._Training._train_block

    def loses(training):
        if training.control.block == 2:
            for tensor in training.model.flat_weights.values():
                tensor.fill_(float("nan"))
        original(training)

    monkeypatch.setattr(controlled_proxy._Training, "_train_block", loses)
    spec = controlled(experiment, controller, data_seed=77)
    unbroken = train(experiment, spec)
    _forget(experiment.store, spec)
    with monkeypatch.context() as broken:
        _break_after(broken, 3)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, spec)
    trained = _steps_of(monkeypatch)
    resumed = train(experiment, spec)

    shares = np.array([block["shares"] for block in unbroken.control["path"]])
    assert unbroken.result.diverged_K.all()
    np.testing.assert_array_equal(shares[3:], shares[[2, 2]])
    assert resumed.control == unbroken.control
    assert 0 < len(trained) < CONFIG.steps


def test_gradients_are_compared_in_double_each_converted_once(monkeypatch):
    rng = np.random.default_rng(0)
    gradient_DP = rng.normal(size=(3, 1000)).astype(np.float32)
    gradients = {d: torch.from_numpy(row) for d, row in zip((0, 2, 3), gradient_DP, strict=True)}
    original, sizes = torch.Tensor.double, []

    def counted(tensor):
        sizes.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "double", counted)
    monkeypatch.setattr(controlled_proxy, "GRAM_WEIGHTS", 300)
    gram_DD = gradient_gram(gradients, 4)

    wide_DP = gradient_DP.astype(float)
    assert sum(sizes) == 3 * 1000
    np.testing.assert_allclose(gram_DD[np.ix_([0, 2, 3], [0, 2, 3])], wide_DP @ wide_DP.T)
    assert not gram_DD[1].any()
    assert not gram_DD[:, 1].any()


# Killed and resumed


@pytest.mark.parametrize(
    ("controller", "stop"),
    [(KINDS[0], 1), *((controller, stop) for controller in KINDS[1:] for stop in (1, 3))],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_run_that_breaks_at_a_block_goes_on_with_the_bits_of_an_unbroken_one(
    experiment, controller, stop, monkeypatch
):
    spec = controlled(experiment, controller, data_seed=stop)
    unbroken = train(experiment, spec)
    _forget(experiment.store, spec)
    monkeypatch.setattr(controlled_proxy, "CHECKPOINT_SECONDS", 0.0)
    _break_after(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        train(experiment, spec)
    monkeypatch.undo()
    trained = _steps_of(monkeypatch)

    resumed = train(experiment, spec)

    assert outcome(resumed) == outcome(unbroken)
    assert 0 < len(trained) < CONFIG.steps


def _forget(store: RunStore, spec: ProxySpec) -> None:
    shutil.rmtree(store.scratch(spec.key), ignore_errors=True)


def _break_after(monkeypatch, n_blocks: int) -> None:
    """Break a run when it has kept some blocks."""
    original = controlled_proxy._Training._train_block

    def broken(training):
        if training.control.block == n_blocks:
            raise KeyboardInterrupt
        original(training)

    monkeypatch.setattr(controlled_proxy._Training, "_train_block", broken)


def _steps_of(monkeypatch) -> list[int]:
    """Steps of a run's own model that are trained from now on."""
    steps: list[int] = []
    original = controlled_proxy.BlockFeed.batch

    def counted(feed, step):
        steps.append(step)
        return original(feed, step)

    monkeypatch.setattr(controlled_proxy.BlockFeed, "batch", counted)
    return steps


KILLED = """
import sys
from dataclasses import replace
from causalmix_pipeline.adapters import controlled_proxy
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.actor_critic import RLScheduler
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
import json

root, values = sys.argv[1], json.loads(sys.argv[2])
controlled_proxy.CHECKPOINT_SECONDS = 0.0
spec = ProxySpec(
    **values | {"mixture": (1 / 3,) * 3, "config": ProxyConfig(**values["config"]),
    "controller": RLScheduler(blocks=5, probe_windows=2, updates=4)}
)
save = controlled_proxy._Training.save
def told(training):
    save(training)
    print(training.control.block, flush=True)
controlled_proxy._Training.save = told
store = RunStore(root)
controlled_proxy.train_controlled(
    store, spec, spec.controller, store.evaluation(spec.eval_hash)
)
"""


def test_a_killed_run_goes_on_with_the_bits_of_an_unbroken_one(experiment, monkeypatch):
    """A process of its own, killed for real after its third block."""
    spec = controlled(experiment, KINDS[3], data_seed=41)
    unbroken = train(experiment, spec)
    _forget(experiment.store, spec)
    values = {k: v for k, v in spec.to_dict().items() if k not in ("code_version", "controller")}
    command = [sys.executable, "-c", KILLED, str(experiment.store.root), json.dumps(values)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 3:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL
    trained = _steps_of(monkeypatch)

    resumed = train(experiment, spec)

    assert outcome(resumed) == outcome(unbroken)
    assert 0 < len(trained) <= CONFIG.steps * 2 // 5


def test_a_damaged_checkpoint_starts_over(experiment, monkeypatch, caplog):
    spec = controlled(experiment, KINDS[1], data_seed=5)
    unbroken = train(experiment, spec)
    _forget(experiment.store, spec)
    monkeypatch.setattr(controlled_proxy, "CHECKPOINT_SECONDS", 0.0)
    train(experiment, spec)
    path = experiment.store.scratch(spec.key) / "controlled.npz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

    assert outcome(train(experiment, spec)) == outcome(unbroken)
    assert "its checksum differs" in caplog.text


def test_a_checkpoint_goes_with_the_record(experiment, monkeypatch):
    monkeypatch.setattr(controlled_proxy, "CHECKPOINT_SECONDS", 0.0)
    spec = controlled(experiment, KINDS[1], data_seed=6)
    train_stack_of_specs(experiment.store, [spec], 1, "cpu")

    assert not experiment.store.scratch(spec.key).exists()
