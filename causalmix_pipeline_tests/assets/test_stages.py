"""A project whose runs have stages: its rows, its schedule, and the next stage of a training."""

import contextlib
import hashlib
import io
import json
import math
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.checkpoint_file import checkpoint_frame
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.assets.stages import choose_schedule
from causalmix_pipeline.automation.staleness import refresh, stale_assets
from causalmix_pipeline.cli import main
from causalmix_pipeline.core.controllers import Schedule
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stages import StagedRuns
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.next_stage import NextStage, recommend_next
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.assets.test_proxy import value
from causalmix_pipeline_tests.conftest import write_project
from causalmix_pipeline_tests.core.staged_truth import DOMAINS, effect_at, staged_truth

STAGED_ASSETS = {"stage_table", "recommended_schedule"}
WANTED = dg.AssetSelection.assets("recommended_schedule").upstream()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project of two stages a run, up to its recommended schedule."""
    design = {"n_runs": 16, "mixtures_per_state": 2, "stages": 2,
              "noise_panel": {"mixtures": 2, "seeds": 2}}  # fmt: skip
    config = write_project(
        tmp_path_factory.mktemp("staged"), design=design, estimators=["structured_ridge"]
    )
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)
        refresh(build_definitions(config), instance, WANTED)
    return config


def call(*arguments: object) -> tuple[int, str]:
    """Run a command in this process; its exit status and what it printed, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main([str(argument) for argument in arguments])
    return status, " ".join(out.getvalue().split())


# A whole project


def test_each_run_has_a_row_for_each_stage_with_what_its_record_tells(project):
    table, design = value(project, "stage_table"), value(project, "mixture_design")
    store = RunStore(load_settings(project).run_store_root)

    assert table.height == 2 * design.height == 2 * 18
    for run_id, state, *shares in design.select(
        "proxy_run_id", "state_id", "stage1__share__code", "stage2__share__code"
    ).iter_rows():
        first, second = table.filter(run_id=run_id).to_dicts()
        record = store.get(run_id)
        assert record is not None and record.control is not None
        path = record.control["path"]
        assert [first["share__code"], second["share__code"]] == pytest.approx(shares)
        assert first["state_id"] == state
        assert first["loss__code"] == pytest.approx(math.log(384))
        assert second["loss__code"] == path[0]["probe_loss"][0]
        assert second["tokens__code"] == path[0]["tokens"][0]
        assert second["outcome__math"] == first["outcome__math"]


def test_the_run_table_has_the_mean_mixture_and_a_static_recommendation_rests_on_it(project):
    runs, design = RunTable.from_frame(value(project, "run_table")), value(project, "stage_table")

    mean_ND = StagedRuns.from_frame(design).mixture_NSD.mean(axis=1)
    np.testing.assert_allclose(runs.mixture_ND, mean_ND)
    assert sum(value(project, "recommended_mixture")["mixtures"]["recommended"]) == pytest.approx(1)


def test_thirty_steps_show_no_order_and_the_static_mixture_is_kept(project):
    """The check warns, the schedule says why, and it is one stage."""
    schedule = value(project, "recommended_schedule")
    static = value(project, "recommended_mixture")["mixtures"]["recommended"]

    assert schedule["recommended"] == "static"
    assert schedule["stages"] == [[1.0, static]]
    assert "isn't shown to matter" in schedule["sentence"]
    key = dg.AssetCheckKey(dg.AssetKey("stage_table"), "stage_matters")
    with ensure_instance(load_settings(project).data_path) as instance:
        (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    assert record.event is not None
    evaluation = record.event.asset_check_evaluation
    assert evaluation is not None and not evaluation.passed
    assert evaluation.severity == dg.AssetCheckSeverity.WARN


def test_once_made_nothing_is_stale_and_the_schedule_is_on_the_live_side(project):
    definitions = build_definitions(project)
    with ensure_instance(load_settings(project).data_path) as instance:
        assert not stale_assets(definitions, instance, WANTED).reasons

    job = definitions.resolve_job_def("refresh")
    assert dg.AssetKey("recommended_schedule") in job.asset_layer.selected_asset_keys
    graph = definitions.resolve_asset_graph()
    assert graph.get(dg.AssetKey("recommended_schedule")).automation_condition is not None
    assert graph.get(dg.AssetKey("stage_table")).automation_condition is None


def test_the_command_keeps_the_static_mixture_where_the_order_tells_nothing(project, tmp_path):
    staged = StagedRuns.from_frame(value(project, "stage_table"))
    path, out = tmp_path / "checkpoint.csv", tmp_path / "next.csv"
    checkpoint_frame(staged, staged.runs.run_ids[0], 1).write_csv(path)

    status, text = call("recommend", "--checkpoint", path, "--config", project, "--out", out)

    assert status == 0, text
    assert "So the static mixture is kept." in text
    static = value(project, "recommended_mixture")["mixtures"]["recommended"]
    written = pl.read_csv(out)
    assert list(written.row(0)[:4]) == pytest.approx([2, *static])
    domains = ["code", "math", "talk"]
    gain = ["gain", "low", "high", "verdict"]  # a domain may have such a name
    assert written.columns == ["stage", *(f"share__{domain}" for domain in domains), *gain]


# A project without stages


def test_a_project_without_stages_has_the_assets_and_versions_that_it_had(project, tmp_path):
    config = write_project(tmp_path)
    settings, graph = load_settings(config), build_definitions(config).resolve_asset_graph()
    names = {key.to_user_string() for key in graph.get_all_asset_keys()}
    staged = build_definitions(project).resolve_asset_graph().get_all_asset_keys()

    assert {key.to_user_string() for key in staged} == names | STAGED_ASSETS
    design = settings.design.model_dump(mode="json")
    assert design.pop("stages") == 1
    text = json.dumps([design, 16, settings.proxy.to_config().to_dict()], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    assert graph.get(dg.AssetKey("mixture_design")).code_version == f"1-{digest}"


def test_the_command_says_what_it_needs(tmp_path):
    config = write_project(tmp_path)
    status, text = call("recommend", "--checkpoint", tmp_path / "c.csv", "--config", config)
    assert status != 0
    assert "design.stages must be 2 or more for --checkpoint, got 1" in text
    status, text = call("recommend", "--out", tmp_path / "x.csv")
    assert status != 0
    assert "recommend needs --model and --out, or --checkpoint in a project" in text
    status, text = call("recommend", "--checkpoint", "c.csv", "--model", "m")
    assert status != 0
    assert "goes without --model and --pools" in text


# With a known truth

STAGED = staged_truth(n_runs=128)
MODEL = {"chosen": dict.fromkeys(STAGED.runs.tasks, "structured_ridge")}
EQUAL = [0.25] * 4
STATIC = [0.1, 0.4, 0.1, 0.4]
LIVE = pl.DataFrame({"domain": DOMAINS, "tokens": [10**6] * 4, "p": [0.0] * 4, "q": [0.0] * 4})
BASELINES = pl.DataFrame({"domain": DOMAINS, "reference": EQUAL})
RECOMMENDED = {"mixtures": {"recommended": STATIC}, "gain": 0.1, "low": 0.0, "high": 0.2}


def settings() -> Settings:
    tasks = [{"name": name, "path": "x", "weight": 0.5} for name in STAGED.runs.tasks]
    policy = {"budget_tokens": 1_000_000, "trust_radius": None}
    return Settings.model_validate({"tasks": tasks, "policy": policy, "design": {"stages": 2}})


def schedule_for(live: pl.DataFrame) -> dict:
    return choose_schedule(settings(), STAGED, MODEL, live, BASELINES, RECOMMENDED)


def true_gain(mixtures) -> float:
    parts = [
        effect_at(np.zeros((4, 2)), k) @ (np.sqrt(mixture) - np.sqrt(EQUAL))
        for k, mixture in enumerate(mixtures)
    ]
    return float(np.sum(parts))


@pytest.fixture(scope="module")
def schedule() -> dict:
    return schedule_for(LIVE)


def test_where_the_stage_matters_a_schedule_is_recommended_and_truly_beats_the_static_one(schedule):
    mixtures = [shares for _, shares in schedule["stages"]]

    assert schedule["recommended"] == "schedule"
    assert true_gain(mixtures) > true_gain([STATIC] * 2) + 0.1
    assert schedule["low"] < true_gain(mixtures) < schedule["high"]
    promised = schedule["gain_over_static"]
    assert promised == pytest.approx(true_gain(mixtures) - true_gain([STATIC] * 2), abs=0.1)
    assert 0 < schedule["low_over_static"] < promised < schedule["high_over_static"]
    assert json.loads(json.dumps(schedule)) == schedule
    Schedule(stages=schedule["stages"])  # what a trainer takes
    assert schedule["rows"][0]["checkpoint_loss"] is None
    assert len(schedule["rows"][1]["checkpoint_loss"]) == 4
    assert schedule["checkpoint_r2"][0] > 0.8


def test_a_gain_over_the_static_mixture_that_is_not_sure_recommends_no_schedule():
    """The stage matters, and the schedule looks better by its own models, as any best one does."""
    staged = staged_truth(n_runs=96, seed=1, noise=0.4)

    found = choose_schedule(settings(), staged, MODEL, LIVE, BASELINES, RECOMMENDED)

    assert found["stage_matters"]
    assert found["gain_over_static"] > 0 > found["low_over_static"]
    assert found["recommended"] == "static"
    assert found["stages"] == [[1.0, STATIC]]


def test_a_pool_out_of_reach_gets_the_static_recommendation():
    found = schedule_for(LIVE.with_columns(p=pl.lit(50.0)))

    assert found["stage_matters"]
    assert found["recommended"] == "static"
    assert found["stages"] == [[1.0, STATIC]]
    assert found["gain"] == 0.1


def ask_next(schedule: dict, path, live=LIVE, staged=STAGED) -> NextStage:
    return recommend_next(
        settings(),
        path,
        stage_table=staged.to_frame(),
        cate_model=MODEL,
        live_covariates=live,
        baselines=BASELINES,
        schedule=schedule,
    )


def test_a_checkpoint_tells_the_mixture_of_the_next_stage(schedule, tmp_path):
    """The second stage wants the second domain; what is used up it can't have."""
    path = tmp_path / "c.csv"
    frame = checkpoint_frame(STAGED, STAGED.runs.run_ids[0], 1)
    frame.with_columns(tokens=pl.lit(125_000.0)).write_csv(path)
    found = ask_next(schedule, path)

    assert found.row["stage"] == 2
    assert found.row["verdict"] != "unsupported"
    assert found.row["mixture"][1] > 0.8
    assert found.row["low"] < found.row["gain"] < found.row["high"]
    assert found.note == ""
    spent = pl.when(pl.col("domain") == "b").then(3.8e6).otherwise(0.0)
    frame.with_columns(tokens=spent).write_csv(path)
    assert ask_next(schedule, path).row["mixture"][1] < 0.1


def test_at_the_start_no_loss_is_needed(schedule, tmp_path):
    (tmp_path / "c.json").write_text(
        json.dumps({"fraction": 0.0, "domains": {domain: {} for domain in DOMAINS}})
    )

    found = ask_next(schedule, tmp_path / "c.json")

    assert found.row["mixture"] == pytest.approx(schedule["stages"][0][1])


def test_a_checkpoint_unlike_the_proxies_leaves_the_pool_to_decide(schedule, tmp_path):
    frame = checkpoint_frame(STAGED, STAGED.runs.run_ids[0], 1)
    frame.with_columns(loss=pl.lit(0.5)).write_csv(tmp_path / "c.csv")

    found = ask_next(schedule, tmp_path / "c.csv")

    assert "chosen by the pool alone" in found.note
    assert found.row["verdict"] == "supported"
    assert found.row["mixture"][1] > 0.8


def test_a_later_stage_needs_losses(schedule, tmp_path):
    path = tmp_path / "c.csv"
    checkpoint_frame(STAGED, STAGED.runs.run_ids[0], 1).drop("loss").write_csv(path)

    with pytest.raises(ConfigError, match="loss must be given for each domain before stage 2 of 2"):
        ask_next(schedule, path)


@pytest.mark.parametrize("fraction", [0.3, 0.95])
def test_a_checkpoint_within_a_stage_is_refused_with_the_boundaries(schedule, tmp_path, fraction):
    path = tmp_path / "c.csv"
    frame = checkpoint_frame(STAGED, STAGED.runs.run_ids[0], 1)
    frame.with_columns(fraction=pl.lit(fraction)).write_csv(path)

    words = rf"fraction must be where a stage starts \(0, 0.5\), got {fraction}"
    with pytest.raises(ConfigError, match=words):
        ask_next(schedule, path)


def test_where_no_schedule_is_recommended_the_next_stage_is_static_with_the_reason(
    schedule, tmp_path
):
    path = tmp_path / "c.csv"
    checkpoint_frame(STAGED, STAGED.runs.run_ids[0], 1).write_csv(path)
    ends = {"gain_over_static": 0.1, "low_over_static": -0.2, "high_over_static": 0.4}

    found = ask_next(schedule | {"recommended": "static"} | ends, path)
    far = ask_next(schedule_for(LIVE.with_columns(p=pl.lit(50.0))), path)

    assert found.row["mixture"] == far.row["mixture"] == STATIC
    assert "isn't surely better" in found.note and "-0.2 to +0.4" in found.note
    assert "The live pool is out of reach" in far.note


def test_a_pool_that_moved_out_of_reach_keeps_the_reference_and_says_so(schedule, tmp_path):
    path = tmp_path / "c.csv"
    checkpoint_frame(STAGED, STAGED.runs.run_ids[0], 1).write_csv(path)

    found = ask_next(schedule, path, LIVE.with_columns(p=pl.lit(50.0)))

    assert found.row["mixture"] == pytest.approx(EQUAL)
    assert found.note == "The live pool is out of the proxy runs' reach: the reference is kept."


def test_losses_that_some_runs_lack_leave_the_pool_to_decide_and_the_asset_says_so(
    schedule, tmp_path
):
    """A domain whose share is 0 in every stage of a run isn't measured there."""
    staged = replace(STAGED, loss_NSD=STAGED.loss_NSD.copy())
    staged.loss_NSD[:3, 1, 2] = np.nan

    found = choose_schedule(settings(), staged, MODEL, LIVE, BASELINES, RECOMMENDED)

    assert found["recommended"] == "schedule"
    assert "c in 3 runs of" in found["note"]
    assert [row["checkpoint_loss"] for row in found["rows"]] == [None, None]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    checkpoint_frame(staged, staged.runs.run_ids[0], 1).write_csv(tmp_path / "c.csv")
    following = ask_next(found, tmp_path / "c.csv", staged=staged)
    assert following.row["mixture"] == pytest.approx(found["stages"][1][1])
    assert following.note == found["note"]
    assert schedule["note"] == ""
