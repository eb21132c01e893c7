"""Settings of controllers: the paper's come first, drawn ones follow, the best on average wins."""

import numpy as np
import pytest

from causalmix_pipeline.core.controller_tuning import (
    CONTROLLERS,
    RANGES,
    draw_settings,
    make_controller,
    n_settings,
    run_cost,
    tune,
    tuned_already,
    tuning_lanes,
)
from causalmix_pipeline.core.controllers import DoReMi, OnlineBandit
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.rivals import Track, weighted_score
from causalmix_pipeline_tests.core.rival_runs import (
    CONTROLLED_COST,
    EQUAL_MD,
    SIZES,
    TRACK,
    Trainer,
)

SCORE = weighted_score({"task": 1.0})
STARTS = dict.fromkeys(CONTROLLERS, EQUAL_MD)
of_each_kind = pytest.mark.parametrize("kind", CONTROLLERS)


@of_each_kind
def test_the_papers_settings_come_first_and_more_draws_keep_the_first_ones(kind):
    few, many = (draw_settings(kind, {}, n, seed=3) for n in (5, 40))

    assert few[0] == CONTROLLERS[kind]()
    assert many[:5] == few and len(set(many)) == 40
    assert draw_settings(kind, {}, 5, seed=4)[1:] != few[1:]


@of_each_kind
def test_draws_stay_in_their_ranges_and_reach_their_ends(kind):
    drawn = draw_settings(kind, {}, 300, seed=0)

    for name, allowed in RANGES[kind].items():
        values = [getattr(each, name) for each in drawn[1:]]
        if isinstance(allowed, tuple):
            assert set(values) == set(allowed)
            continue
        low, high = sorted((1 - allowed.low, 1 - allowed.high) if allowed.from_one
                           else (allowed.low, allowed.high))  # fmt: skip
        assert low - 1e-9 <= min(values) < max(values) <= high + 1e-9
        assert max(values) - min(values) > 0.8 * (high - low)


def test_no_two_settings_are_the_same_controller_under_other_names():
    drawn = draw_settings("online_bandit", {}, 40, seed=0)

    unread = [each for each in drawn if each.to_dict()["memory"] == "sum"]
    assert {each.to_dict()["smoothing"] for each in unread} == {OnlineBandit().smoothing}
    assert len({each.to_dict()["blocks"] for each in unread}) == len(unread) == 5
    assert len(drawn) == 40


@pytest.mark.parametrize(
    ("given", "n_different"),
    [({"memory": "sum"}, 5), ({"memory": "average"}, 40), ({"smoothing": 0.5}, 10)],
)
def test_a_given_memory_decides_what_is_the_same(given, n_different):
    drawn = [each.to_dict() for each in draw_settings("online_bandit", given, 40, seed=0)]

    assert all(each[name] == value for each in drawn for name, value in given.items())
    assert len(drawn) == n_different
    if given == {"memory": "average"}:
        assert len({each["smoothing"] for each in drawn}) > 35


@of_each_kind
def test_no_setting_costs_more_than_the_papers(kind):
    costs = [run_cost(each, ProxyConfig(), 6) for each in draw_settings(kind, {}, 60, seed=0)]

    assert max(costs) == costs[0]


def test_what_the_user_set_stays_and_the_rest_is_searched():
    drawn = draw_settings("doremi", {"step_size": 2.0}, 8, seed=0)

    assert {each.to_dict()["step_size"] for each in drawn} == {2.0}
    assert len({each.to_dict()["smoothing"] for each in drawn}) == 8
    everything = {name: getattr(DoReMi(), name) for name in RANGES["doremi"]}
    assert draw_settings("doremi", everything, 8, seed=0) == [DoReMi()]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("exp3", {}, "compare.controllers must be among online_bandit, doremi, rl_scheduler, got"),
        ("doremi", {"eta": 1.0}, "compare.controllers.doremi must have settings among .*'eta'"),
        ("doremi", {"step_size": "1e-4"}, "YAML takes 1e-4 for text"),
        ("doremi", {"step_size": -1.0}, "compare.controllers.doremi.step_size must be > 0, got -1"),
        ("doremi", {"step_size": float("inf")}, "step_size must be a finite number, got inf"),
        ("doremi", {"blocks": 10.5}, "compare.controllers.doremi.blocks must be a whole number"),
        ("doremi", {"blocks": True}, "compare.controllers.doremi.blocks must be a whole number"),
        ("online_bandit", {"memory": 3}, "online_bandit.memory must be text, got 3"),
    ],
)
def test_a_wrong_controller_is_refused(kind, given, message):
    with pytest.raises(ConfigError, match=message):
        make_controller(kind, given)


def test_the_search_takes_as_many_runs_as_the_design():
    """A setting is tried on 4 states with 2 seeds; DoReMi trains its mixture anew each time."""
    config = ProxyConfig()
    doremi, bandit = make_controller("doremi", {}), make_controller("online_bandit", {})

    assert n_settings(bandit, config, 7, tuning_runs=136) == 17
    cost = 2 + 2 * (49 * 7 * 4 / 4000) / 3 + 1
    assert n_settings(doremi, config, 7, tuning_runs=136) == int(136 / (8 * cost))
    assert n_settings(doremi, config, 7, tuning_runs=0) == 1


def test_a_probe_costs_more_where_a_forward_pass_is_half_of_training():
    doremi = make_controller("doremi", {})
    full = PretrainedConfig("m", "h", tokens=64 * 16 * 50, sequence_length=64)
    lora = PretrainedConfig("m", "h", tokens=64 * 16 * 50, sequence_length=64, method="lora")

    probed = 49 * 3 * 4 / (16 * 50)
    assert run_cost(doremi, full, 3) == pytest.approx(2 + 2 * probed / 3)
    assert run_cost(doremi, lora, 3) == pytest.approx(2 + probed)
    assert run_cost(None, full, 3) == 1.0


def test_the_setting_with_the_best_mean_gain_wins():
    drawn = {"online_bandit": [OnlineBandit(smoothing=s) for s in (0.9, 0.5, 0.7)]}

    def loss(spec):
        return 2.0 if spec.controller is None else 1.0 + abs(spec.controller.smoothing - 0.6)

    trainer = Trainer(loss)
    found = tune(drawn, STARTS, TRACK, SIZES[0], train=trainer, score=SCORE)

    assert found.chosen == {"online_bandit": OnlineBandit(smoothing=0.5)}
    assert [row["gain"] for row in found.trials] == pytest.approx([0.7, 0.9, 0.9])
    assert [row["chosen"] for row in found.trials] == [False, True, False]
    assert found.trials[2]["settings"]["smoothing"] == 0.7
    tokens = 3 * 6 * CONTROLLED_COST * SIZES[0].config.tokens
    assert found.tokens == {"online_bandit": pytest.approx(tokens)}
    assert {spec.config for spec in trainer.trained.values()} == {SIZES[0].config}


def test_both_runs_of_a_doremi_trial_count():
    drawn = {"doremi": [DoReMi(), DoReMi(step_size=2.0)]}

    found = tune(drawn, STARTS, TRACK, SIZES[0], train=Trainer(lambda _: 1.0), score=SCORE)

    each = 6 * (CONTROLLED_COST + 1) * SIZES[0].config.tokens
    assert found.tokens == {"doremi": pytest.approx(2 * each)}
    assert found.chosen == {"doremi": DoReMi()}  # a tie: the paper's


def test_a_single_setting_is_tried_nowhere():
    drawn = {"online_bandit": [OnlineBandit()], "doremi": [DoReMi()]}
    trainer = Trainer(lambda _: 1.0)

    found = tune(drawn, STARTS, TRACK, SIZES[0], train=trainer, score=SCORE)

    assert not trainer.trained and found.tokens == {"online_bandit": 0.0, "doremi": 0.0}
    assert found.chosen == {"online_bandit": OnlineBandit(), "doremi": DoReMi()}


def test_settings_that_always_diverge_lose():
    drawn = {"online_bandit": [OnlineBandit(), OnlineBandit(memory="sum")]}

    def loss(spec):
        return None if spec.controller == OnlineBandit() else 1.0

    found = tune(drawn, STARTS, TRACK, SIZES[0], train=Trainer(loss), score=SCORE)

    assert found.chosen == {"online_bandit": OnlineBandit(memory="sum")}
    assert found.trials[0]["gain"] is None


def test_one_survivor_of_a_setting_that_diverges_wins_nothing():
    steady, wild = OnlineBandit(), OnlineBandit(smoothing=0.5)

    def loss(spec):
        if spec.controller != wild:
            return 1.0
        return 0.1 if (spec.state_hash, spec.data_seed) == ("first", 1) else None

    found = tune(
        {"online_bandit": [wild, steady]}, STARTS, TRACK, SIZES[0], train=Trainer(loss), score=SCORE
    )

    assert found.chosen == {"online_bandit": steady}
    assert [row["diverged"] for row in found.trials] == [5, 0]
    assert found.trials[0]["gain"] > found.trials[1]["gain"]


def test_what_was_tuned_is_read_back_only_where_every_trial_has_a_record():
    search = ({"doremi": [DoReMi(), DoReMi(step_size=2.0)]}, STARTS, TRACK, SIZES[0])
    trainer = Trainer(lambda spec: 1.0 - (spec.controller is None) * spec.mixture[0])
    made = tune(*search, train=trainer, score=SCORE)

    def read(spec):
        return trainer.record(spec) if spec.key in trainer.trained else None

    again = tuned_already(*search, read=read, score=SCORE)
    assert again is not None and (again.chosen, again.trials) == (made.chosen, made.trials)
    trainer.trained.popitem()
    assert tuned_already(*search, read=read, score=SCORE) is None


def test_trials_train_on_their_own_states_alone():
    own = Track(("a", "b", "c", "d"), (7, 8), "tokens", "evaluation", "engine")
    drawn = {kind: draw_settings(kind, {}, 2, seed=0) for kind in CONTROLLERS}
    starts = dict.fromkeys(CONTROLLERS, np.full((4, 3), 1 / 3))

    lanes = tuning_lanes(drawn, starts, own, SIZES[0])

    specs = [spec for lane in lanes for spec in (lane.spec, lane.finder) if spec is not None]
    assert {spec.state_hash for spec in specs} == {"a", "b", "c", "d"}
    assert {spec.data_seed for spec in specs} == {7, 8}
