"""Controllers do what their papers say, by seed alone, and go on after a kill as if unbroken."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from causalmix_pipeline.core.actor_critic import Network, RLScheduler
from causalmix_pipeline.core.controlled_run import ControlledRun
from causalmix_pipeline.core.controllers import (
    BlockSeen,
    ControllerConfig,
    DoReMi,
    OnlineBandit,
    Probe,
    Schedule,
    StaticMixture,
)
from causalmix_pipeline.core.errors import ConfigError

HALVES = np.array([0.5, 0.5])
KINDS = [
    Schedule(stages=((0.25, (0.9, 0.1, 0.0)), (0.75, (0.2, 0.3, 0.5)))),
    OnlineBandit(blocks=12),
    OnlineBandit(blocks=12, memory="sum"),
    DoReMi(blocks=12),
    RLScheduler(blocks=12, updates=4),
]

Sees = Callable[[ControlledRun], BlockSeen]


def play(config: ControllerConfig, sees: Sees, *, mixture_D=HALVES, steps=1000, seed=0):
    """A run whose blocks show what `sees` says."""
    run = ControlledRun(config, mixture_D, steps=steps, seed=seed)
    while run.block < len(run.ends):
        run.see(sees(run))
    return run


def shows(run: ControlledRun, loss_D, excess_D=None, gram_DD=None) -> BlockSeen:
    """A block of 100 tokens a step."""
    loss_D = np.array(loss_D, dtype=float)
    start, end = run.span
    tokens_D = np.rint(run.shares_D * (end - start) * 100).astype(np.int64)
    excess_D = None if excess_D is None else np.array(excess_D, dtype=float)
    probe = Probe(loss_D, excess_D, gram_DD)
    return BlockSeen(end, run.steps, np.where(tokens_D > 0, loss_D, np.nan), tokens_D, probe)


def drawn(run: ControlledRun) -> BlockSeen:
    """Losses, excess and gradients that change with the block."""
    rng = np.random.default_rng([7, run.block])
    n = len(run.active_D)
    gradients = rng.normal(size=(n, 20)) + 0.3
    return shows(run, rng.uniform(1, 5, n), rng.uniform(0, 0.3, n), gradients @ gradients.T)


# Every kind


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_shares_stay_mixtures_in_which_an_absent_domain_stays_absent(config):
    mixture_D = np.array([0.6, 0.4, 0.0])
    run = play(config, drawn, mixture_D=mixture_D)
    shares = np.array(run.path)

    assert len(run.path) == len(run.seen) == len(run.ends)
    assert run.ends[-1] == 1000
    assert shares.sum(1) == pytest.approx(1.0)
    assert (shares >= 0).all()
    if not isinstance(config, Schedule):
        assert (shares[:, 2] == 0).all()
        assert (shares[:, :2] > 0).all()
        start = [0.5, 0.5, 0.0] if isinstance(config, DoReMi) else mixture_D
        np.testing.assert_array_equal(shares[0], start)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_a_run_that_goes_on_from_any_block_has_the_shares_of_an_unbroken_one(config):
    mixture_D = np.array([0.5, 0.3, 0.2])
    unbroken = play(config, drawn, mixture_D=mixture_D)

    for stop in range(len(unbroken.ends)):
        run = ControlledRun(config, mixture_D, steps=1000, seed=0)
        while run.block < stop:
            run.extra.forward_tokens += 10
            run.see(drawn(run))
        kept = json.loads(json.dumps(run.state()))
        resumed = ControlledRun(config, mixture_D, steps=1000, seed=0)
        resumed.restore(kept)
        assert resumed.extra == run.extra
        while resumed.block < len(resumed.ends):
            resumed.see(drawn(resumed))

        np.testing.assert_array_equal(resumed.path, unbroken.path)


def test_a_checkpoint_of_other_shares_is_refused():
    run = ControlledRun(OnlineBandit(blocks=4), HALVES, steps=40, seed=0)
    run.see(shows(run, [2.0, 1.0]))
    kept = run.state()
    kept["path"][1] = [0.9, 0.1]

    with pytest.raises(ValueError, match="other shares"):
        ControlledRun(OnlineBandit(blocks=4), HALVES, steps=40, seed=0).restore(kept)


def test_a_checkpoint_of_a_machine_that_rounds_otherwise_goes_on_with_its_shares():
    run = ControlledRun(OnlineBandit(blocks=4), HALVES, steps=40, seed=0)
    run.see(shows(run, [2.0, 1.0]))
    kept = run.state()
    kept["path"][1][0] = np.nextafter(kept["path"][1][0], 1)
    resumed = ControlledRun(OnlineBandit(blocks=4), HALVES, steps=40, seed=0)

    resumed.restore(kept)

    assert [shares_D.tolist() for shares_D in resumed.path] == kept["path"]


def test_a_checkpoint_of_more_blocks_than_were_seen_is_refused():
    run = ControlledRun(OnlineBandit(blocks=4), HALVES, steps=40, seed=0)
    kept = run.state()
    kept["path"].append([0.5, 0.5])

    with pytest.raises(ValueError, match="other shares"):
        ControlledRun(OnlineBandit(blocks=4), HALVES, steps=40, seed=0).restore(kept)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_diverges_keeps_its_last_sound_shares(config, value):
    def diverges(run: ControlledRun) -> BlockSeen:
        if run.block < len(run.ends) // 2:
            return drawn(run)
        n = len(run.active_D)
        return shows(run, np.full(n, value), np.full(n, value), np.full((n, n), value))

    mixture_D = np.array([0.5, 0.3, 0.2])
    run = play(config, diverges, mixture_D=mixture_D)
    kept = json.loads(json.dumps(run.state()))
    resumed = ControlledRun(config, mixture_D, steps=1000, seed=0)
    resumed.restore(kept)

    path = np.array(run.path)
    assert path.sum(1) == pytest.approx(1.0)
    assert (path >= 0).all()
    np.testing.assert_array_equal(resumed.path, path)
    told = run.told()
    assert told["path"][-1]["loss"] == [None] * 3
    json.dumps(told, allow_nan=False)
    if config.kind in ("doremi", "rl_scheduler"):
        np.testing.assert_array_equal(path[7:], path[[6] * 5])


def test_the_seed_decides_what_an_actor_critic_draws_and_nothing_else_does():
    paths = [
        play(RLScheduler(blocks=12, updates=4), drawn, mixture_D=np.full(3, 1 / 3), seed=seed).path
        for seed in (1, 1, 2)
    ]

    np.testing.assert_array_equal(paths[0], paths[1])
    assert np.abs(np.array(paths[0]) - paths[2]).max() > 1e-3


def test_a_record_tells_the_path_and_all_that_was_computed():
    run = ControlledRun(OnlineBandit(blocks=2), np.array([0.8, 0.2, 0.0]), steps=10, seed=0)
    run.see(shows(run, [3.0, 1.0, 9.0]))
    run.extra.forward_tokens, run.extra.backward_tokens, run.extra.reference_tokens = 300, 50, 900
    run.see(shows(run, [2.0, 1.0, 9.0]))
    told = run.told()

    assert told["kind"] == "online_bandit"
    assert [block["step"] for block in told["path"]] == [0, 5]
    assert told["path"][0]["tokens"] == [400, 100, 0]
    assert told["path"][0]["loss"] == [3.0, 1.0, None]
    assert told["path"][0]["shares"] == [0.8, 0.2, 0.0]
    np.testing.assert_allclose(told["mean_shares"], np.mean(run.path, 0))
    assert told["tokens"] == 1000
    assert told["total_tokens"] == 1000 + 300 / 3 + 50 + 900
    assert json.loads(json.dumps(told)) == told


def test_a_forward_pass_is_half_a_training_token_where_most_weights_are_frozen():
    config = OnlineBandit(blocks=2)
    run = ControlledRun(config, HALVES, steps=10, seed=0, forwards_per_training=2)
    run.extra.forward_tokens, run.extra.backward_tokens = 300, 50

    assert run.told()["total_tokens"] == 300 / 2 + 50


# A schedule


def test_a_schedule_has_each_stage_for_its_part_of_the_run():
    config = Schedule(stages=((0.3, (1.0, 0.0)), (0.5, (0.5, 0.5)), (0.2, (0.0, 1.0))))
    run = play(config, drawn)

    assert run.ends == [300, 800, 1000]
    np.testing.assert_array_equal(run.path, [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((), r"controller\.stages must be one stage or more"),
        (((0.5, (1.0,)), (0.4, (1.0,))), "sum to 1"),
        (((1.0, (0.7, 0.7)),), r"controller\.stages\[0\] must be shares"),
        (((0.5, (1.0,)), (0.5, (0.5, 0.5))), "over the same domains"),
    ],
)
def test_a_schedule_that_is_none_is_refused(stages, words):
    with pytest.raises(ConfigError, match=words):
        Schedule(stages=stages)


def test_a_schedule_without_a_probe_has_the_name_that_it_had_before_there_were_any():
    config = Schedule(stages=((0.5, (1.0, 0.0)), (0.5, (0.0, 1.0))))
    parts = [[0.5, [1.0, 0.0]], [0.5, [0.0, 1.0]]]

    assert config.to_dict() == {"kind": "schedule", "version": 2, "stages": parts}
    assert config.n_probed == 0
    assert Schedule(config.stages, probe_windows=3).to_dict()["probe_windows"] == 3
    with pytest.raises(ConfigError, match=r"controller\.probe_windows must be >= 0, got -1"):
        Schedule(config.stages, probe_windows=-1)


def test_a_schedule_must_fit_the_run():
    with pytest.raises(ConfigError, match="over 3 domains, got 2"):
        ControlledRun(Schedule(stages=((1.0, (0.5, 0.5)),)), np.ones(3) / 3, steps=9, seed=0)
    with pytest.raises(ConfigError, match="at least one of 3 steps"):
        config = Schedule(stages=((0.01, (1.0, 0.0)), (0.99, (0.0, 1.0))))
        ControlledRun(config, HALVES, steps=3, seed=0)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (OnlineBandit, "blocks", 1),
        (OnlineBandit, "smoothing", 1.0),
        (OnlineBandit, "memory", "all"),
        (DoReMi, "step_size", 0.0),
        (DoReMi, "smoothing", -0.1),
        (DoReMi, "smoothing", 0),
        (DoReMi, "probe_windows", 0),
        (RLScheduler, "probe_windows", 0),
        (RLScheduler, "updates", 0),
        (RLScheduler, "learning_rate", 0.0),
        (RLScheduler, "follow", 0.0),
        (RLScheduler, "noise", -1.0),
        (RLScheduler, "discount", 1.0),
        (RLScheduler, "floor", 1.5),
    ],
)
def test_a_setting_that_breaks_its_rule_is_named(kind, field, value):
    with pytest.raises(ConfigError, match=rf"controller\.{field} must be .*got {value!r}"):
        kind(**{field: value})


@pytest.mark.parametrize("kind", [OnlineBandit, DoReMi, RLScheduler, Schedule, StaticMixture])
def test_every_setting_is_described(kind):
    assert all(text.endswith(".") for text in kind.describe().values())


# The bandit


@pytest.mark.parametrize("better", [0, 1])
def test_exp3_finds_the_better_of_two_arms(better):
    """The arm whose loss stays larger is the one with more to learn."""
    loss_D = np.where(np.arange(2) == better, 4.0, 2.0)
    run = play(OnlineBandit(blocks=400, memory="sum"), lambda run: shows(run, loss_D))
    share = np.array(run.path)[:, better]

    assert (share[2:] > 0.5).all()
    assert share[-1] > 0.85


@pytest.mark.parametrize("better", [0, 1])
def test_online_data_mixing_reads_more_of_the_better_of_two_arms(better):
    """Rewards divided by shares hold it back: it never leaves the other arm."""
    loss_D = np.where(np.arange(2) == better, 4.0, 2.0)
    run = play(OnlineBandit(blocks=400), lambda run: shows(run, loss_D))
    share = np.array(run.path)[:, better]

    assert (share[2:] > 0.5).all()
    assert 0.51 < share[2:].max() < 0.9


def test_a_bandit_follows_the_paper_step_by_step():
    """Two updates by hand: K = 2, rewards of .1 of loss over share, then e_t."""
    run = ControlledRun(OnlineBandit(blocks=3), np.array([0.8, 0.2]), steps=30, seed=0)
    run.see(shows(run, [4.0, 1.0]))
    reward = np.array([0.1 * 4.0 / 0.8, 0.1 * 1.0 / 0.2])
    first = min(0.5, np.sqrt(np.log(2) / 2))
    gibbs = np.exp(0.5 * reward) / np.exp(0.5 * reward).sum()
    np.testing.assert_allclose(run.path[1], (1 - 2 * first) * gibbs + first)

    run.see(shows(run, [3.0, 1.0]))
    reward = 0.9 * reward + 0.1 * np.array([3.0, 1.0]) / run.path[1]
    second = min(0.5, np.sqrt(np.log(2) / 4))
    gibbs = np.exp(first * reward) / np.exp(first * reward).sum()
    np.testing.assert_allclose(run.path[2], (1 - 2 * second) * gibbs + second)


def test_a_bandit_keeps_the_reward_of_a_domain_that_was_not_read():
    """No reward is made up for it: the shares are those of the domains that were."""
    runs = [ControlledRun(OnlineBandit(blocks=9), HALVES, steps=90, seed=0) for _ in range(2)]
    for run, unread in zip(runs, (np.nan, 0.0), strict=True):
        for _ in range(3):
            run.see(shows(run, [3.0, 3.0]))
        run.see(shows(run, [3.0, unread]))

    assert runs[0].path[-1][1] > runs[1].path[-1][1]


# DoReMi


def test_doremi_moves_weight_to_the_domain_with_the_larger_excess():
    run = play(DoReMi(blocks=20), lambda run: shows(run, [9.0, 1.0], [0.1, 0.4]))
    share = np.array(run.path)[:, 1]

    assert (np.diff(share) > 0).all()
    assert share[-1] > 0.98
    assert run.told()["mean_shares"][1] > 0.8


def test_doremi_follows_the_paper_step_by_step():
    config = DoReMi(blocks=3, step_size=2.0, smoothing=0.1)
    run = ControlledRun(config, np.array([0.7, 0.3]), steps=30, seed=0)
    run.see(shows(run, [1.0, 1.0], [0.2, 0.5]))
    weights = np.array([np.exp(2 * 0.2), np.exp(2 * 0.5)])

    np.testing.assert_array_equal(run.path[0], [0.5, 0.5])  # the mixture is the reference's
    np.testing.assert_allclose(run.path[1], 0.9 * weights / weights.sum() + 0.05)


def test_equal_excess_moves_nothing():
    run = play(DoReMi(blocks=20), lambda run: shows(run, [9.0, 1.0], [0.3, 0.3]))

    np.testing.assert_allclose(run.path, np.full((20, 2), 0.5))


# The actor-critic


def descend(config: ControllerConfig, curvature_DK, *, noise: float, seed: int):
    """Gradient descent on two domains; the run, and how far their losses are from their least.

    Domain d's loss is half of sum_k curvature_dk x_k^2; a step follows the mixture's gradient.
    """
    curvature_DK, x_K = np.array(curvature_DK), np.full(2, 3.0)
    rng = np.random.default_rng(seed)

    def sees(run: ControlledRun) -> BlockSeen:
        nonlocal x_K
        for _ in range(*run.span):
            x_K = x_K - 0.006 * run.shares_D @ (curvature_DK * x_K)
        gradient_DK = curvature_DK * x_K + noise * rng.normal(size=(2, 2))
        loss_D = 0.5 * (curvature_DK * x_K**2).sum(1) + 1
        return shows(run, loss_D, None, gradient_DK @ gradient_DK.T)

    return play(config, sees, seed=seed), float(0.5 * (curvature_DK * x_K**2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_actor_critic_reads_what_can_be_learned_and_beats_equal_shares(seed):
    """All of the first domain's loss can go, nothing of the second's: its gradient is noise."""
    task = {"curvature_DK": [[0.5, 0.5], [0.0, 0.0]], "noise": 0.05, "seed": seed}
    run, left = descend(RLScheduler(), **task)
    _, left_by_equal = descend(StaticMixture(), **task)

    assert np.mean(run.path, 0)[0] > 0.75
    assert left < left_by_equal / 4


@pytest.mark.parametrize("seed", range(3))
def test_the_actor_critic_reads_the_steep_domain_first_and_beats_equal_shares(seed):
    """The right order is known: the steep domain is learned soon, then only the flat one pays."""
    task = {"curvature_DK": [[2.0, 0.0], [0.0, 0.5]], "noise": 0.0, "seed": seed}
    run, left = descend(RLScheduler(), **task)
    _, left_by_equal = descend(StaticMixture(), **task)
    steep = np.array(run.path)[:, 0]

    assert steep[5:15].mean() > steep[25:].mean() + 0.1
    assert left < 0.7 * left_by_equal


def test_an_actor_critic_keeps_a_part_of_each_share():
    run = play(RLScheduler(floor=0.4, blocks=20, updates=4), drawn, mixture_D=np.full(3, 1 / 3))

    assert np.min(run.path) >= 0.4 / 3 - 1e-12


def test_an_actor_critic_judges_only_mixtures_that_it_could_set(monkeypatch):
    """The critic is asked about shares with their floor, as those it has learned from."""
    mixture_D = np.array([0.5, 0.3, 0.2])
    asked, forward = [], Network.forward

    def kept(network, inputs):
        if inputs.shape[1] == 3 * 3 + 1 + 3:
            asked.append(inputs[:, -3:])
        return forward(network, inputs)

    monkeypatch.setattr(Network, "forward", kept)
    play(RLScheduler(floor=0.9, blocks=12, updates=4), drawn, mixture_D=mixture_D)

    action_BD = np.concatenate(asked)
    assert (action_BD >= 0.9 * mixture_D - 1e-12).all()
    assert action_BD.sum(1) == pytest.approx(1.0)


def test_a_network_s_gradients_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    network = Network((3, 5, 2), rng)
    network.weights[2] = rng.normal(size=(5, 2))
    inputs, weight = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))

    def loss(inputs: np.ndarray) -> float:
        return float((network.forward(inputs) * weight).sum())

    loss(inputs)
    gradients, d_inputs = network.backward(weight)
    for place, gradient in enumerate(gradients):
        at = (0,) * gradient.ndim
        kept = network.weights[place][at]
        above, below = (_moved(network, place, at, kept + h, loss, inputs) for h in (1e-5, -1e-5))
        network.weights[place][at] = kept
        assert gradient[at] == pytest.approx((above - below) / 2e-5, rel=1e-5)
    shift = np.zeros_like(inputs)
    shift[1, 2] = 1e-5
    numeric = (loss(inputs + shift) - loss(inputs - shift)) / 2e-5
    assert d_inputs[1, 2] == pytest.approx(numeric, rel=1e-5)


def _moved(network, place, at, value, loss, inputs) -> float:
    network.weights[place][at] = value
    return loss(inputs)
