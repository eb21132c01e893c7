"""Plans of top-ups come back as they were kept, in one order, and never half."""

from dataclasses import replace

import pytest

from causalmix_pipeline.adapters.top_up_records import (
    TopUpPlan,
    keep_top_up_plan,
    read_top_up_plans,
)
from causalmix_pipeline.core.errors import PoolError

PLAN = TopUpPlan(
    state_hash="0" * 64,
    domains=["math", "<script>"],
    covariates={"loss": [1.5, 0.1 + 0.2], "style": [0.0, -3.25]},
    scorers=["a", "b"],
    eval_hash="1" * 32,
    config='{"hidden": 8}',
    code_version=1,
    numbers=[0, 3],
    mixtures=[[0.25, 0.75], [1 / 3, 2 / 3]],
    keys=["k0", "k3"],
)


def test_a_plan_comes_back_to_the_last_bit(tmp_path):
    keep_top_up_plan(tmp_path / "top_ups", PLAN)

    assert read_top_up_plans(tmp_path / "top_ups") == [PLAN]


def test_the_state_has_a_row_a_domain_and_a_column_for_each_asked_covariate():
    assert PLAN.state(["style", "loss"]).tolist() == [[0.0, 1.5], [-3.25, 0.1 + 0.2]]
    assert PLAN.state([]).shape == (2, 0)


def test_the_same_plan_is_kept_once_and_another_beside_it(tmp_path):
    for plan in (PLAN, replace(PLAN, numbers=[1, 2]), PLAN):
        keep_top_up_plan(tmp_path, plan)

    found = read_top_up_plans(tmp_path)
    assert len(found) == 2 and PLAN in found
    assert found == read_top_up_plans(tmp_path)


def test_a_project_without_top_ups_has_no_plan(tmp_path):
    assert read_top_up_plans(tmp_path / "none") == []


def test_a_damaged_plan_is_never_read_as_one(tmp_path):
    keep_top_up_plan(tmp_path, PLAN)
    (path,) = tmp_path.glob("*.parquet")
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])

    with pytest.raises(PoolError):
        read_top_up_plans(tmp_path)
