from dataclasses import replace

import pytest

from causalmix_pipeline.core.price import (
    Calibration,
    Rates,
    Workload,
    over_budget,
    price,
    scaled,
    total,
)

CALIBRATION = Calibration(3.0, 0.5, 0.02, 4096, "measured")
WORK = Workload(
    n_all=136, n_pending=100, tokens=512_000, flops=1.6e11, n_parameters=45_000, steps=1000,
    runs_per_stack=4, n_workers=2, n_cores=2,
)  # fmt: skip


def test_the_last_wave_costs_as_much_as_a_full_one():
    """25 stacks over 2 workers are 13 waves; the last has one stack."""
    assert WORK.n_waves == 13
    assert WORK.seconds(CALIBRATION) == pytest.approx(3 + 13 * (0.5 + 999 * 0.02))
    fewer = replace(WORK, n_pending=97)
    assert fewer.seconds(CALIBRATION) == WORK.seconds(CALIBRATION)


def test_nothing_to_train_costs_nothing():
    found = price(replace(WORK, n_pending=0), CALIBRATION, Rates(2.0, 0.1))

    assert found["hours"] == found["cost"] == found["record bytes"] == found["scratch bytes"] == 0


def test_money_counts_every_core_and_gpu_that_is_taken():
    on_gpus = replace(WORK, n_gpus=2)
    hours = WORK.seconds(CALIBRATION) / 3600

    assert price(on_gpus, CALIBRATION, Rates())["cost"] is None
    assert price(WORK, CALIBRATION, Rates(3.0))["cost"] == 0
    found = price(on_gpus, CALIBRATION, Rates(3.0, 0.1))
    assert found["cost"] == pytest.approx(2 * hours * 3.0 + 2 * hours * 0.1)
    assert found["GPU hours"] == pytest.approx(2 * hours)


def test_workers_without_a_stack_cost_nothing():
    one = price(replace(WORK, n_pending=3, n_gpus=2), CALIBRATION, Rates())

    assert one["GPU hours"] == pytest.approx(one["hours"])
    assert one["core hours"] == pytest.approx(one["hours"])


def test_checkpoints_take_disk_only_of_the_runs_that_train_at_once():
    large = replace(WORK, scratch_bytes=10**9, n_pending=1)

    assert price(large, CALIBRATION, Rates())["scratch bytes"] == 10**9
    assert price(replace(large, n_pending=50), CALIBRATION, Rates())["scratch bytes"] == 2 * 10**9
    assert price(large, CALIBRATION, Rates())["record bytes"] == 4096


def test_every_limit_that_is_broken_is_told_with_its_value():
    found = price(WORK, CALIBRATION, Rates(None, 10.0, "EUR"))
    limits = {"max_hours": 0.01, "max_gpu_hours": 1.0, "max_cost": 0.5}

    told = over_budget(found, limits)

    assert len(told) == 2
    assert "budget.max_hours allows 0.01 hours" in told[0] and "100 proxy runs" in told[0]
    assert "budget.max_cost allows 0.5 EUR" in told[1] and told[1].endswith("take 1.5")
    assert over_budget(found, {"max_hours": 1.0, "max_gpu_hours": None, "max_cost": None}) == []


def test_runs_that_cost_more_each_are_priced_by_the_factor():
    found = price(WORK, CALIBRATION, Rates(None, 1.0))

    twice = scaled(found, 2.0)
    for name in ("hours", "core hours", "cost", "FLOPs to train", "CPU seconds a run"):
        assert twice[name] == pytest.approx(2 * found[name])
    assert twice["to train"] == found["to train"]
    assert scaled(found, 1.0) == found


def test_kinds_of_runs_are_added_up_and_one_kind_is_as_it_was():
    first = price(WORK, CALIBRATION, Rates())
    second = price(replace(WORK, n_pending=3, scratch_bytes=10), CALIBRATION, Rates())

    both = total([first, second])
    assert both["hours"] == pytest.approx(first["hours"] + second["hours"])
    assert both["to train"] == 103 and both["cost"] is None
    assert both["scratch bytes"] == 20
    assert both["million tokens a run"] == first["million tokens a run"]
    assert total([first]) == first
