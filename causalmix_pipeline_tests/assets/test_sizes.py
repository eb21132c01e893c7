"""Proxies of two sizes through a whole tiny project, to a mixture for a model of any size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.design import proxy_config, specs_of
from causalmix_pipeline.assets.plan import price_runs
from causalmix_pipeline.assets.sizes import at_sizes, size_check, top_up_config, with_target
from causalmix_pipeline.assets.validation import larger_config, sizes_told
from causalmix_pipeline.automation.staleness import refresh
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import SIZE_COVARIATE, at_size
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.asset_keys import assets_named
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_project

pytestmark = pytest.mark.timeout(400)

PROXY = {"preset": "tests", "overrides": {"vocab_size": 384, "sequence_length": 32}}
SIZES = [{"share": 0.5, "hidden": 64, "layers": 2, "learning_rate": 0.01}]
#: Flat mixtures: a domain left out is learned so badly that its run counts as diverged.
DESIGN = {
    "n_runs": 32,
    "mixtures_per_state": 2,
    "noise_panel": {"mixtures": 2, "seeds": 2},
    "strength_range": [4.0, 8.0],
}
WANTED = assets_named("recommended_mixture").upstream() | assets_named("report").upstream()


def bring_up(config: Path) -> set[str]:
    """Materialise what is stale, up to the report; names of what was made."""
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        made = refresh(build_definitions(config), instance, WANTED)
    return {key.to_user_string() for key in made}


@pytest.fixture(scope="module")
def sized_project(tmp_path_factory) -> Path:
    """The folder of a project with proxies of two sizes, up to its report; copy it."""
    root = tmp_path_factory.mktemp("sized")
    config = write_project(
        root,
        proxy=PROXY | {"sizes": SIZES},
        design=DESIGN,
        estimators=["structured_ridge"],
        backend={"workers": 1},
    )
    bring_up(config)
    return root


@pytest.fixture
def sized(sized_project, tmp_path) -> Path:
    shutil.copytree(sized_project, tmp_path / "project")
    return tmp_path / "project" / "causalmix.yaml"


def value(config: Path, name: str):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def edit(config: Path, **sections) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | sections))


def hidden_of(mixture_design: pl.DataFrame) -> pl.DataFrame:
    hidden = [json.loads(config)["hidden"] for config in mixture_design["config"]]
    return mixture_design.select("state_id").with_columns(hidden=pl.Series(hidden))


# ---------------------------------------------------------------------------- the whole project


def test_each_pool_state_is_trained_at_one_size_and_the_run_table_tells_it(sized):
    hidden = hidden_of(value(sized, "mixture_design"))
    runs = RunTable.from_frame(value(sized, "run_table"))
    small, large = (c.n_parameters for c in load_settings(sized).proxy.size_configs())

    by_state = hidden.group_by("state_id").agg(pl.col("hidden").unique()).sort("state_id")
    assert by_state["hidden"].list.len().to_list() == [1] * 16
    n_large = by_state["hidden"].explode().to_list().count(64)
    assert 5 <= n_large <= 8
    assert runs.covariates[-1] == SIZE_COVARIATE
    told = dict(zip(runs.state_ids.tolist(), runs.state_NDP[:, 0, -1].tolist(), strict=True))
    for state, (size,) in by_state.iter_rows():
        assert told[state] == np.log2(large if size == 64 else small)
    assert (runs.state_NDP[:, :, -1] == runs.state_NDP[:, :1, -1]).all()


def test_the_mixture_is_for_the_largest_size_trained_unless_another_is_asked_for(sized):
    best = value(sized, "recommended_mixture")
    settings = load_settings(sized)
    largest = max(config.n_parameters for config in settings.proxy.size_configs())

    assert value(sized, "live_covariates")[SIZE_COVARIATE].to_list() == [np.log2(largest)] * 3
    assert best["size"]["parameters"] == pytest.approx(largest)
    assert (best["size"]["doublings_beyond"], best["size"]["doubt"]) == (0, 1)
    assert {row["covariate"] for row in best["drift"]} == set(settings.covariates)


def test_a_target_beyond_the_sizes_extrapolates_with_wider_intervals_and_trains_nothing(sized):
    before = value(sized, "recommended_mixture")
    largest = before["size"]["parameters"]
    n_records = Project(config_file=str(sized)).run_store.n_records()

    edit(sized, policy={"target_parameters": float(8 * largest)})
    made = bring_up(sized)
    after = value(sized, "recommended_mixture")

    assert {"live_covariates", "recommended_mixture"} <= made
    assert not made & {"mixture_design", "proxy_runs", "run_table", "cate_model"}
    assert Project(config_file=str(sized)).run_store.n_records() == n_records
    assert after["size"]["doublings_beyond"] == pytest.approx(3)
    assert after["size"]["pool_verdict"] == before["size"]["pool_verdict"]
    assert after["overlap_score"] == before["overlap_score"]
    if before["verdict"] == "supported":
        assert after["verdict"] == "extrapolating"
    page = (sized.parent / "data" / "reports" / "report.html").read_text()
    assert "3.0 doublings away" in page
    losses = [
        {row["reference_bits_per_byte"] is None for row in best["task_gains"]}
        for best in (before, after)
    ]
    assert losses == [{False}, {True}]
    size = after["size"]
    assert largest < size["read_at_parameters"] < size["parameters"]
    assert f"effects are read at {size['read_at_parameters']:,.0f}" in page


def test_the_price_counts_each_run_at_its_size(sized):
    project = Project(config_file=str(sized))
    specs = specs_of(project, value(sized, "mixture_design"))
    assert price_runs(project, specs)["to train"] == 0
    new = [replace(spec, data_seed=spec.data_seed + 1) for spec in specs]

    price = price_runs(project, new)

    assert price["to train"] == price["proxy runs"] == len(new)
    small, large = project.settings.proxy.size_configs()
    n_large = sum(spec.config == large for spec in new)
    expected = n_large * large.flops + (len(new) - n_large) * small.flops
    assert price["FLOPs to train"] == pytest.approx(expected)
    assert 0 < n_large < len(new)


def test_runs_of_both_sizes_are_compared_without_further_training(sized):
    runs, settings = RunTable.from_frame(value(sized, "run_table")), load_settings(sized)

    found = size_check(runs, settings)

    assert found.severity == dg.AssetCheckSeverity.WARN
    assert "rank alike" in str(found.metadata["in short"].value)
    assert "effect ratio" in str(found.metadata["sizes"].value)


def test_sizes_with_too_few_states_or_one_size_alone_do_not_pass_and_the_reason_is_told(sized):
    runs, settings = RunTable.from_frame(value(sized, "run_table")), load_settings(sized)
    assert runs.size_N is not None
    is_large_N = runs.size_N == runs.size_N.max()
    few = runs.subset(~is_large_N | (runs.state_ids <= np.median(runs.state_ids)))

    for left, words in ((few, "needs 8 pool states"), (runs.subset(is_large_N), "got one")):
        found = size_check(left, settings)
        assert not found.passed
        assert words in str(found.metadata["can't be told"].value)


def test_a_validation_names_both_sizes_where_they_differ(sized):
    best, config = value(sized, "recommended_mixture"), load_settings(sized).proxy.size_configs()[1]

    assert sizes_told(config, best["size"]) == {}  # it is the one asked for
    told = sizes_told(larger_config(config), best["size"])["size of the model"]
    assert f"{larger_config(config).n_parameters:,}" in told
    assert told.endswith(f"for a model of {config.n_parameters:,}.")
    assert sizes_told(config, None) == {}


def test_the_check_is_defined_and_recorded_only_where_proxies_have_sizes(sized, project_file):
    def names(config):
        keys = build_definitions(config).resolve_asset_graph().asset_check_keys
        return {key.name for key in keys}

    assert names(sized) - names(project_file) == {"sizes_agree"}
    with ensure_instance(load_settings(sized).data_path) as instance:
        key = dg.AssetCheckKey(dg.AssetKey("run_table"), "sizes_agree")
        history = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    assert history


def test_top_ups_are_trained_at_the_size_nearest_to_the_target(sized):
    design = value(sized, "mixture_design")
    small, large = load_settings(sized).proxy.size_configs()

    runs = RunTable.from_frame(value(sized, "run_table"))

    def recipe(n_parameters: float, runs=runs) -> dict:
        state_DP = at_size(runs.covariates, runs.state_NDP[0], np.log2(n_parameters))
        return json.loads(top_up_config(design, runs, state_DP))

    assert recipe(large.n_parameters) == recipe(1e9) == large.to_dict()
    assert recipe(small.n_parameters) == small.to_dict()
    assert runs.size_N is not None
    only_small = runs.subset(runs.size_N == runs.size_N.min())  # where the plan's numbers are from
    assert recipe(1e9, only_small) == small.to_dict()


def test_another_size_asks_for_another_design_first(sized):
    project, design = Project(config_file=str(sized)), value(sized, "mixture_design")
    assert len(specs_of(project, design)) == design.height

    edit(sized, proxy=PROXY | {"sizes": [SIZES[0] | {"layers": 3}]})

    with pytest.raises(ConfigError, match="materialise mixture_design first"):
        specs_of(Project(config_file=str(sized)), design)


# ---------------------------------------------------------------------------- the default


def test_without_sizes_specs_columns_and_recommendation_are_as_before(finished):
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    specs = specs_of(project, design)

    assert {spec.config for spec in specs} == {proxy_config(project, specs[0].tokens_hash)}
    assert at_sizes(project.settings, specs, design["state_id"].to_numpy()) == specs
    live = value(finished, "live_covariates")
    assert SIZE_COVARIATE not in live.columns
    assert with_target(project.settings, live) is live
    assert not [name for name in value(finished, "run_table").columns if SIZE_COVARIATE in name]
    assert "size" not in value(finished, "recommended_mixture")


def test_states_of_the_recipes_own_size_keep_their_runs_when_a_size_is_added(finished):
    """So a design that gets a further size trains only the states that have it."""
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    before = {spec.key for spec in specs_of(project, design)}
    raw = yaml.safe_load(finished.read_text())
    edit(finished, proxy=raw["proxy"] | {"sizes": SIZES})
    settings = load_settings(finished)

    after = at_sizes(settings, specs_of(project, design), design["state_id"].to_numpy())

    own = settings.proxy.to_config()
    assert {spec.key for spec in after if spec.config == own} <= before
    assert not {spec.key for spec in after if spec.config != own} & before
    assert 0 < sum(spec.config == own for spec in after) < len(after)


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"proxy": {"pretrained": "m", "sizes": SIZES}}, r"proxy.sizes must be \[\] with"),
        ({"proxy": {"sizes": [{"share": 1.0}]}}, "less than 1"),
        ({"proxy": {"sizes": [{"share": 0.5, "hidden": 64}, {"share": 0.5, "hidden": 128}]}},
         "sum to less than 1"),
        ({"proxy": {"sizes": [{"steps": 50}]}}, r"proxy.sizes\[0\] must have another number"),
        ({"proxy": {"sizes": [{"hidden": 64}, {"hidden": 64}]}}, r"proxy.sizes\[1\] must have"),
        ({"proxy": {"sizes": [{"layers": 2}, {"hidden": 33}]}},
         r"proxy\.sizes\[1\]\.hidden must be .*multiple of 2 x heads"),
        ({"proxy": {"sizes": [{"wide": 64}]}}, "wide"),
        ({"proxy": {"sizes": [{"hidden": 64, "share": 0.05}]}, "design": {"n_runs": 32}},
         r"at least 3 pool states, got \d of 8 for sizes\[0\]"),
        ({"policy": {"target_parameters": 1e9}}, "must be null without proxy.sizes"),
    ],
)  # fmt: skip
def test_sizes_that_cant_be_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        Settings.model_validate(raw)


def test_a_size_is_the_recipe_but_for_what_it_names():
    proxy = {"overrides": {"steps": 700}, "sizes": [{"hidden": 64, "heads": 2}, {"layers": 4}]}
    own, wide, deep = Settings.model_validate({"proxy": proxy}).proxy.size_configs()

    assert (wide.hidden, wide.heads, wide.layers, wide.steps) == (64, 2, own.layers, 700)
    assert (deep.hidden, deep.layers, deep.steps) == (own.hidden, 4, 700)
