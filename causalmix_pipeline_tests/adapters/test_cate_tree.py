"""The tree finds what parts the pool states, in the covariate's own unit."""

import json

import numpy as np
import pytest

from causalmix_pipeline.adapters.cate_tree import (
    LEAF_STATES,
    MAX_DEPTH,
    grow_cate_tree,
    tree_leaves,
)
from causalmix_pipeline.core.effects import Gain
from causalmix_pipeline.core.interpretation import STEP, Effects

EQUAL_D = np.full(3, 1 / 3)


class Switch:
    """Domain 2 pays above a threshold of the first covariate of domain 1, domain 0 below it."""

    name = "switch"
    task_correlation_TT = np.ones((1, 1))

    def __init__(self, threshold: float = 40.0, size: float = 1.0):
        self.threshold, self.size = threshold, size

    def gain(self, state_DP, mixture_MD, reference_D):
        slope_D = np.array([1.0, 0.0, 0.0]) if state_DP[1, 0] <= self.threshold else np.eye(3)[2]
        mean_MT = self.size * (mixture_MD - reference_D) @ slope_D[:, None]
        return Gain(mean_MT, np.full_like(mean_MT, np.nan))


def states(n: int = 40, seed: int = 0) -> np.ndarray:
    state_SDP = np.random.default_rng(seed).normal(size=(n, 3, 2))
    state_SDP[:, 1, 0] = np.linspace(0, 100, n)  # a unit of its own
    return state_SDP


def effects(estimator=None) -> Effects:
    return Effects(estimator or Switch(), np.ones(1), EQUAL_D)  # pyright: ignore


def test_the_tree_asks_for_the_covariate_that_decides_at_its_threshold():
    state_SDP = states()

    tree = grow_cate_tree(effects(), state_SDP)

    root = tree["root"]
    values = np.sort(state_SDP[:, 1, 0])
    assert root["column"] == 1 * 2 + 0
    assert values[values <= 40].max() < root["threshold"] < values[values > 40].min()
    assert "column" not in root["below"] and "column" not in root["above"]
    assert tree["explained"] == pytest.approx(1)
    assert root["below"]["n_states"] + root["above"]["n_states"] == 40


def test_a_leaf_says_what_each_domain_gains_there():
    leaves = tree_leaves(grow_cate_tree(effects(), states())["root"])

    (below_path, below), (above_path, above) = leaves
    assert (below_path[0][:2], above_path[0][:2]) == ((2, "<="), (2, ">"))
    assert below["effects"] == pytest.approx([STEP, -STEP / 2, -STEP / 2])
    assert above["effects"] == pytest.approx([-STEP / 2, -STEP / 2, STEP])
    assert below["spread"] == pytest.approx([0, 0, 0], abs=1e-12)


def test_every_state_goes_where_the_questions_send_it():
    state_SDP = states()
    rng = np.random.default_rng(3)
    slope_DP = rng.normal(size=(3, 2))

    class Smooth(Switch):
        def gain(self, state_DP, mixture_MD, reference_D):
            mean_MT = ((mixture_MD - reference_D) @ (slope_DP * state_DP).sum(axis=1))[:, None]
            return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    shown = effects(Smooth())
    leaves = tree_leaves(grow_cate_tree(shown, state_SDP)["root"])

    effect_SD, flat_SC = shown.of_domains(state_SDP), state_SDP.reshape(40, -1)
    assert len(leaves) > 2
    for path, leaf in leaves:
        inside_S = np.ones(40, dtype=bool)
        for column, sign, threshold in path:
            below_S = flat_SC[:, column] <= threshold
            inside_S &= below_S if sign == "<=" else ~below_S
        assert len(path) <= MAX_DEPTH
        assert leaf["n_states"] == inside_S.sum() >= LEAF_STATES
        assert leaf["effects"] == pytest.approx(effect_SD[inside_S].mean(axis=0).tolist())


@pytest.mark.parametrize("threshold", [-1.0, 1e9])
def test_effects_that_are_the_same_everywhere_make_no_split(threshold):
    tree = grow_cate_tree(effects(Switch(threshold)), states())

    assert "column" not in tree["root"]
    assert tree["explained"] == 0
    assert tree["root"]["n_states"] == 40


def test_effects_that_differ_by_rounding_make_no_split():
    class Rounded(Switch):
        def gain(self, state_DP, mixture_MD, reference_D):
            gain = super().gain(state_DP, mixture_MD, reference_D)
            return Gain(gain.mean_MT * (1 + 1e-7 * np.sign(state_DP[0, 0])), gain.se_MT)

    assert "column" not in grow_cate_tree(effects(Rounded(1e9)), states())["root"]


def test_no_leaf_tells_of_fewer_states_than_it_should():
    tree = grow_cate_tree(effects(Switch(threshold=4)), states())  # two states are below it

    assert min(leaf["n_states"] for _, leaf in tree_leaves(tree["root"])) >= LEAF_STATES


def test_no_leaf_is_deeper_than_it_should(monkeypatch):
    for limit in ("SPLIT_PART", "LEAF_PART"):
        monkeypatch.setattr(f"causalmix_pipeline.adapters.cate_tree.{limit}", 0.0)

    class Line(Switch):
        def gain(self, state_DP, mixture_MD, reference_D):
            mean_MT = (mixture_MD - reference_D)[:, :1] * state_DP[1, 0]
            return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    leaves = tree_leaves(grow_cate_tree(effects(Line()), states(90))["root"])

    assert max(len(path) for path, _ in leaves) == MAX_DEPTH


def test_few_states_make_one_leaf():
    assert "column" not in grow_cate_tree(effects(), states(2 * LEAF_STATES - 1))["root"]


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_the_unit_of_the_outcome_changes_no_question(size):
    plain, scaled = (grow_cate_tree(effects(Switch(size=s)), states()) for s in (1.0, size))

    assert scaled["root"]["column"] == plain["root"]["column"]
    assert scaled["root"]["threshold"] == plain["root"]["threshold"]
    assert scaled["root"]["above"]["effects"][2] == pytest.approx(size * STEP)


def test_the_tree_is_plain_and_the_same_for_the_same_seed():
    first, again = (grow_cate_tree(effects(), states(), seed=5) for _ in range(2))

    assert json.dumps(first, allow_nan=False) == json.dumps(again)
