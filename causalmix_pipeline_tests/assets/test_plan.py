"""What a project's training costs and can tell, and that a budget stops it."""

import json

import dagster as dg
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.design import specs_of
from causalmix_pipeline.assets.plan import (
    OVER_BUDGET_TAG,
    pilot_of,
    power_of,
    price_runs,
    refuse_over_budget,
)
from causalmix_pipeline.automation.staleness import materialise, stale_assets
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings

#: Hours that no training fits in.
TOO_LITTLE = {"max_hours": 1e-6}


def value(config, name: str):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def edit(config, **sections) -> None:
    raw = yaml.safe_load(config.read_text())
    for name, changes in sections.items():
        raw[name] = raw.get(name, {}) | changes
    config.write_text(yaml.safe_dump(raw))


def lose_records(config, n: int) -> None:
    """Delete the records of the first runs of the design."""
    project = Project(config_file=str(config))
    for spec in specs_of(project, value(config, "mixture_design"))[:n]:
        project.run_store.path_of(spec.key).unlink()


def run(config, *names: str, **tags: str) -> dg.ExecuteInProcessResult:
    """Materialise assets as one run, as the UI does."""
    with ensure_instance(load_settings(config).data_path) as instance:
        keys = [dg.AssetKey(name) for name in names]
        return materialise(
            build_definitions(config), instance, keys, tags=tags, raise_on_error=False
        )


def n_records(config) -> int:
    return Project(config_file=str(config)).run_store.n_records()


def test_a_budget_stops_the_training_in_the_run_that_makes_the_plan(finished):
    lose_records(finished, 3)
    edit(finished, budget=TOO_LITTLE)

    done = run(finished, "proxy_plan", "proxy_runs")

    assert not done.success
    (check,) = done.get_asset_check_evaluations()
    assert check.check_name == "within_budget" and not check.passed
    assert "budget.max_hours allows 1e-06 hours" in (check.description or "")
    assert n_records(finished) == 15


def test_a_budget_stops_the_training_alone_too(finished):
    """A run of `proxy_runs` alone meets no check of the plan."""
    lose_records(finished, 3)
    edit(finished, budget=TOO_LITTLE)

    assert not run(finished, "proxy_runs").success
    assert n_records(finished) == 15


def test_a_run_with_the_tag_was_agreed_to(finished):
    lose_records(finished, 3)
    edit(finished, budget=TOO_LITTLE)

    done = run(finished, "proxy_plan", "proxy_runs", **{OVER_BUDGET_TAG: "yes"})

    assert done.success
    assert n_records(finished) == 18


def test_the_refusal_names_limit_price_and_ways_out(finished):
    lose_records(finished, 3)
    edit(finished, budget={"max_cost": 1e-9, "price_per_core_hour": 5.0, "currency": "EUR"})
    project = Project(config_file=str(finished))
    specs = specs_of(project, value(finished, "mixture_design"))

    with pytest.raises(ConfigError, match=r"budget.max_cost allows 1e-09 EUR, .* 3 proxy runs"):
        refuse_over_budget(project, specs, {})
    with pytest.raises(ConfigError, match="causalmix refresh --train --over-budget"):
        refuse_over_budget(project, specs, {})
    refuse_over_budget(project, specs, {OVER_BUDGET_TAG: "yes"})


def test_another_budget_makes_the_plan_again_and_nothing_below(finished):
    edit(finished, budget={"max_hours": 100.0})

    with ensure_instance(load_settings(finished).data_path) as instance:
        defs = build_definitions(finished)
        found = stale_assets(defs, instance, dg.AssetSelection.groups("experiment"))
        assert [key.path[-1] for key in found.reasons] == ["proxy_plan"]
        assert run(finished, "proxy_plan").success
        after = stale_assets(defs, instance, dg.AssetSelection.groups("experiment"))

    assert after.reasons == {}


def test_the_machine_is_measured_once_for_each_kind_of_run(finished):
    path = finished.parent / "data" / "calibrations.json"
    (kept,) = json.loads(path.read_text()).values()
    kept["figures"]["step_seconds"] = 3600.0
    project = Project(config_file=str(finished))
    specs = specs_of(project, value(finished, "mixture_design"))
    lose_records(finished, 1)
    path.write_text(json.dumps({next(iter(json.loads(path.read_text()))): kept}))

    found = price_runs(project, specs)

    assert found["hours"] == pytest.approx(29, abs=0.1)  # 30 steps, the first one apart
    assert found["to train"] == 1 and found["in the store"] == 17
    path.write_text("no JSON")
    assert price_runs(project, specs)["hours"] < 1


def test_the_pilot_holds_the_repeats_and_their_states(finished):
    design = value(finished, "mixture_design")

    pilot = pilot_of(design)

    assert pilot["state_id"].unique().sort().to_list() == [0, 1]
    assert pilot.height == 6  # 2 states x 2 mixtures, and one repeat in each
    assert pilot["cell"].is_duplicated().sum() == 4


def test_finished_runs_tell_what_the_design_can_see(finished):
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    states = value(finished, "pool_states")

    rows = power_of(project, design, states, ["math", "code"])

    assert [row["task"] for row in rows] == ["math", "code"]
    assert rows[0]["seed_df"] == 2 and rows[0]["seed_sd"] > 0
    assert value(finished, "cate_checks")["power"] == rows


def test_without_a_repeated_run_nothing_is_told(finished):
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    repeats = design.filter(pl.col("cell").is_duplicated() & ~pl.col("cell").is_first_distinct())
    for key in repeats["proxy_run_id"]:
        project.run_store.path_of(key).unlink()

    assert power_of(project, design, value(finished, "pool_states"), ["math"]) == []
