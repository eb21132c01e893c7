"""Rivals train on the same states with the same seeds; gains are paired; all compute is counted."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.controllers import DoReMi, OnlineBandit
from causalmix_pipeline.core.rival_gains import gains_over, rival_table
from causalmix_pipeline.core.rivals import (
    controlled_entrant,
    lanes_of,
    price_specs,
    run_lanes,
    static_entrant,
    weighted_score,
)
from causalmix_pipeline_tests.core.rival_runs import (
    CONTROLLED_COST,
    EQUAL_MD,
    LARGE,
    MEAN_SHARES,
    SIZES,
    SMALL,
    TRACK,
    Trainer,
)

SCORE = weighted_score({"task": 2.0, "reported": 0.0})
RECOMMENDED = static_entrant("recommended", np.array([[0.6, 0.2, 0.2], [0.5, 0.4, 0.1]]))
EQUAL = static_entrant("equal", EQUAL_MD[0])
BANDIT = controlled_entrant("online_bandit", OnlineBandit(blocks=5), EQUAL_MD)
NATURAL_MD = np.array([[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]])
DOREMI = controlled_entrant("doremi", DoReMi(blocks=5), NATURAL_MD)


def loss(spec) -> float:
    """A level of state, seed and size that all rivals share, and what the first share gains."""
    level = {"first": 1.0, "second": 4.0}[spec.state_hash] + 0.5 * spec.data_seed
    return level + spec.config.layers - spec.mixture[0]


def table(*entrants, loss=loss, search=None) -> dict[tuple[str, str], dict]:
    outcomes = run_lanes(lanes_of(entrants, TRACK, SIZES), Trainer(loss), SCORE)
    rows = rival_table(outcomes, SIZES, search or {}).to_dicts()
    return {(row["size"], row["entrant"]): row for row in rows}


def test_every_rival_trains_on_every_state_with_every_seed_at_every_size():
    lanes = lanes_of([RECOMMENDED, EQUAL, BANDIT], TRACK, SIZES)

    for name in ("recommended", "equal", "online_bandit"):
        own = [lane for lane in lanes if lane.entrant == name]
        assert {(lane.size, lane.state, lane.seed) for lane in own} == {
            (size, state, seed)
            for size in ("32x1", "64x2")
            for state in (0, 1)
            for seed in (1, 2, 3)
        }
        assert {lane.spec.config for lane in own} == {SMALL, LARGE}
    mixtures = {lane.state: lane.spec.mixture for lane in lanes if lane.entrant == "recommended"}
    assert mixtures == {0: (0.6, 0.2, 0.2), 1: (0.5, 0.4, 0.1)}


def test_equal_gains_exactly_nothing_and_what_all_share_cancels():
    found = table(RECOMMENDED, EQUAL)

    for size in ("32x1", "64x2"):
        assert found[size, "equal"]["gain"] == found[size, "equal"]["se"] == 0.0
        gains = np.array([0.6, 0.5]) - 1 / 3
        row = found[size, "recommended"]
        assert row["gain"] == pytest.approx(gains.mean())
        assert row["se"] == pytest.approx(gains.std(ddof=1) / 2**0.5)
        assert (row["ahead"], row["states"]) == (2, 2)


def test_ours_is_the_recommended_mixture_less_the_rival():
    found = table(RECOMMENDED, EQUAL, BANDIT)

    row = found["32x1", "online_bandit"]
    assert row["ours"] == pytest.approx(0.55 - 1 / 3)
    assert row["ours_se"] == pytest.approx(0.05)
    assert found["32x1", "recommended"]["ours"] is None
    assert table(EQUAL, BANDIT)["32x1", "online_bandit"]["ours"] is None


def test_seeds_are_averaged_before_the_error_is_taken_over_states():
    rows = [
        {"size": "s", "entrant": name, "state": state, "seed": seed, "outcome": outcome}
        for name, outcomes in {"equal": [0, 0, 0, 0], "a": [1, 3, 4, 8]}.items()
        for (state, seed), outcome in zip([(0, 1), (0, 2), (1, 1), (1, 2)], outcomes, strict=True)
    ]

    (row,) = gains_over(pl.DataFrame(rows), "equal").filter(entrant="a").to_dicts()

    assert row["gain"] == 4.0 and row["se"] == pytest.approx(2.0)


def test_doremi_finds_its_mixture_at_the_small_size_and_trains_it_at_each():
    trainer = Trainer(loss)
    run_lanes(lanes_of([DOREMI, EQUAL], TRACK, SIZES), trainer, SCORE)

    finders = [spec for spec in trainer.trained.values() if spec.controller is not None]
    finals = [spec for spec in trainer.trained.values() if spec.mixture == MEAN_SHARES]
    assert len(finders) == 6 and {spec.config for spec in finders} == {SMALL}
    assert {spec.mixture for spec in finders} == set(map(tuple, NATURAL_MD.tolist()))
    assert len(finals) == 12 and {spec.config for spec in finals} == {SMALL, LARGE}
    assert all(spec.controller is None for spec in finals)


def test_all_compute_is_counted_the_search_at_the_small_size():
    found = table(RECOMMENDED, EQUAL, BANDIT, DOREMI, search={"recommended": 7e6})

    tokens = float(SMALL.tokens)
    assert found["64x2", "equal"]["total_flops"] == pytest.approx(2 * tokens * 80)
    assert found["64x2", "recommended"]["total_flops"] == pytest.approx(2 * tokens * 80 + 7e7)
    bandit = found["64x2", "online_bandit"]
    assert bandit["run_tokens"] == CONTROLLED_COST * tokens
    assert bandit["total_flops"] == pytest.approx(2 * CONTROLLED_COST * tokens * 80)
    doremi = found["64x2", "doremi"]
    assert doremi["run_tokens"] == tokens
    assert doremi["state_search_tokens"] == CONTROLLED_COST * tokens
    assert doremi["total_flops"] == pytest.approx(2 * tokens * (80 + CONTROLLED_COST * 10))


def test_a_diverged_run_leaves_its_pair_out_and_is_told():
    def broken(spec):
        lost = spec.mixture[0] == 0.6 and spec.data_seed == 3
        return None if lost else loss(spec) - (spec.mixture[0] == 0.6) * spec.data_seed

    row = table(RECOMMENDED, EQUAL, loss=broken)["32x1", "recommended"]

    first = 0.6 - 1 / 3 + (1 + 2) / 2
    assert row["gain"] == pytest.approx((first + 0.5 - 1 / 3) / 2)
    assert row["diverged"] == 1


def test_a_finder_that_found_nothing_is_the_whole_run_and_its_cost_counts_once():
    class LostReference(Trainer):
        def record(self, spec):
            record = super().record(spec)
            if spec.controller is None:
                return record
            control = {"mean_shares": None, "total_tokens": float(spec.config.tokens)}
            return replace(record, bits_per_byte={}, diverged=True, control=control)

    trainer = LostReference(loss)
    outcomes = run_lanes(lanes_of([EQUAL, DOREMI], TRACK, SIZES), trainer, SCORE)

    rows = {row["size"]: row for row in rival_table(outcomes, SIZES, {}).to_dicts()
            if row["entrant"] == "doremi"}  # fmt: skip
    assert not any(spec.mixture == MEAN_SHARES for spec in trainer.trained.values())
    for size in ("32x1", "64x2"):
        assert rows[size]["outcome"] is None and rows[size]["diverged"] == 6
        assert rows[size]["total_flops"] == pytest.approx(2 * SMALL.tokens * 10)


def test_the_mixture_is_found_at_the_small_size_for_a_larger_one_alone():
    lanes = lanes_of([DOREMI], TRACK, SIZES[1:], found_at=SIZES[0])

    assert {lane.finder.config for lane in lanes if lane.finder} == {SMALL}
    assert {lane.spec.config for lane in lanes} == {LARGE}


def test_a_rival_without_any_outcome_has_no_gain():
    row = table(RECOMMENDED, EQUAL, loss=lambda spec: None if spec.mixture[0] > 0.4 else 1.0)

    assert row["32x1", "recommended"]["gain"] is None
    assert row["32x1", "recommended"]["states"] == 0


def test_the_price_counts_what_finders_will_find_even_beside_the_same_mixture():
    lanes = lanes_of([static_entrant("natural", NATURAL_MD), DOREMI], TRACK, SIZES)

    keys = {spec.key for spec in price_specs(lanes)}

    assert len(keys) == 12 + 6 + 12


def test_the_price_of_a_mixture_that_is_found_is_that_of_its_own_run():
    trainer = Trainer(loss)
    lanes = lanes_of([DOREMI], TRACK, SIZES)
    run_lanes(lanes, trainer, SCORE)

    keys = {spec.key for spec in price_specs(lanes, trainer.record)}

    assert keys == trainer.trained.keys()


def test_the_outcome_weighs_tasks_and_tells_nothing_where_one_is_missing():
    record = Trainer(lambda spec: 1.0).record(lanes_of([EQUAL], TRACK, SIZES)[0].spec)
    both = replace(record, bits_per_byte={"a": 1.0, "b": 3.0})

    assert weighted_score({"a": 1.0, "b": 3.0, "c": 0.0})(both) == -2.5
    assert weighted_score({"a": 1.0, "c": 1.0})(both) is None
    scored = replace(record, bits_per_byte={}, scores={"a": 0.5})
    assert weighted_score({"a": 1.0})(scored) == 0.5
    assert weighted_score({"a": 1.0}, {"a": "minimize"})(scored) == -0.5
