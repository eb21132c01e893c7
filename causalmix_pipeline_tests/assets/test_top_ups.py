"""A top-up at a pool out of reach: trained when a person asks, kept, and the model rests on it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.top_ups import (
    TOP_UP_TAG,
    collect_top_up_runs,
    refuse_moved_pool,
)
from causalmix_pipeline.automation.conditions import LIVE_SIDE
from causalmix_pipeline.automation.jobs import TOP_UP
from causalmix_pipeline.automation.staleness import materialise, refresh, stale_assets
from causalmix_pipeline.cli import main
from causalmix_pipeline.core.belief import TOP_UP_RUNS
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import close_dead_runs, ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observe_pool
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_documents

#: The first test makes the projects that the others copy.
pytestmark = pytest.mark.timeout(800)

#: Runs of the finished project's own design.
OWN_RUNS = 18

#: Runs the job in a process of its own, which a test kills.
RUN_JOB = """
import sys
from pathlib import Path
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import PROCESS_TAG, ensure_instance, process_tag
from causalmix_pipeline.resources.settings_file import load_settings
config = Path(sys.argv[1])
if __name__ == "__main__":
    with ensure_instance(load_settings(config).data_path) as instance:
        build_definitions(config).resolve_job_def("top_up").execute_in_process(
            instance=instance, tags={PROCESS_TAG: process_tag()}
        )
"""


def value(config: Path, name: str):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def n_records(config: Path) -> int:
    return Project(config_file=str(config)).run_store.n_records()


def lengthen(config: Path, n_words: int) -> None:
    """Put far longer documents into two domains of the live pool."""
    for domain in ("math", "code"):
        path = config.parent / "live" / domain / "long.jsonl"
        write_documents(path, domain, n=24, n_words=n_words, seed=5)


def refresh_live(config: Path) -> set[str]:
    """What `causalmix refresh` makes; names of the assets."""
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, LIVE_POOL)
        made = refresh(build_definitions(config), instance, LIVE_SIDE)
    return {key.to_user_string() for key in made}


def run_job(config: Path) -> dg.ExecuteInProcessResult:
    with ensure_instance(load_settings(config).data_path) as instance:
        close_dead_runs(instance)
        job = build_definitions(config).resolve_job_def("top_up")
        return job.execute_in_process(instance=instance)


def call(*arguments: str) -> tuple[int, str]:
    """Run `causalmix` in this process; its exit status and what it printed, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


def made_by(done: dg.ExecuteInProcessResult) -> set[str]:
    keys = [event.asset_key for event in done.get_asset_materialization_events()]
    return {key.to_user_string() for key in keys if key is not None}


def mixtures_of(frame: pl.DataFrame) -> list[tuple]:
    return frame.select(pl.col("^share__.*$")).rows()


def metadata(config: Path, name: str) -> dict:
    with ensure_instance(load_settings(config).data_path) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(name))
    assert event is not None and event.asset_materialization is not None
    return {label: found.value for label, found in event.asset_materialization.metadata.items()}


@pytest.fixture(scope="module")
def far_project(finished_project, tmp_path_factory) -> Path:
    """The finished project, its live pool moved out of reach and profiled; copy it."""
    root = tmp_path_factory.mktemp("far") / "project"
    shutil.copytree(finished_project, root)
    lengthen(root / "causalmix.yaml", 600)
    refresh_live(root / "causalmix.yaml")
    return root


@pytest.fixture
def far(far_project, tmp_path) -> Path:
    """The settings file of a copy of that project."""
    shutil.copytree(far_project, tmp_path / "far")
    return tmp_path / "far" / "causalmix.yaml"


@pytest.fixture(scope="module")
def topped_up_project(far_project, tmp_path_factory) -> Path:
    """That project after a top-up by the command, and what this printed; copy it."""
    root = tmp_path_factory.mktemp("topped") / "project"
    shutil.copytree(far_project, root)
    status, text = call("refresh", "--top-up", "--config", str(root / "causalmix.yaml"))
    assert status == 0, text
    (root / "printed.txt").write_text(text)
    return root


@pytest.fixture
def topped_up(topped_up_project, tmp_path) -> Path:
    """The settings file of a copy of that project."""
    shutil.copytree(topped_up_project, tmp_path / "topped")
    return tmp_path / "topped" / "causalmix.yaml"


def test_a_top_up_trains_the_plan_and_the_pool_is_supported(far, topped_up):
    before = value(far, "recommended_mixture")
    plan = [tuple(row.values()) for row in before["top_up"]]

    after, frame = value(topped_up, "recommended_mixture"), value(topped_up, "top_up_runs")
    assert before["verdict"] == "extrapolating" and len(plan) == TOP_UP_RUNS
    assert n_records(topped_up) == OWN_RUNS + TOP_UP_RUNS
    assert sorted(mixtures_of(frame)) == sorted(plan)
    assert frame["run_id"].str.starts_with("top_up/").all()
    live_DP = value(far, "live_covariates")
    runs = RunTable.from_frame(frame)
    assert (runs.state_NDP == live_DP.select(runs.covariates).to_numpy()).all()
    assert after["verdict"] == "supported" and after["overlap_score"] < before["overlap_score"]
    assert after["top_up"] == []
    assert after["gain"] is not None and after["mixtures"] != before["mixtures"]
    assert value(topped_up, "run_table").equals(value(far, "run_table"))
    assert "top-up runs" in (topped_up.parent / "data" / "reports" / "report.html").read_text()


def test_the_command_tells_the_price_what_it_trained_and_the_new_verdict(far, topped_up):
    _, plain = call("refresh", "--config", str(far))
    _, plan = call("plan", "--config", str(far))
    printed = (topped_up.parent / "printed.txt").read_text()

    assert "proxy runs trained: 0" in plain
    assert "16 proxy runs at this pool would tell more: causalmix refresh --top-up" in plain
    assert "Top-up: 16 proxy runs, about" in plan
    assert "Top-up: 16 proxy runs, about" in printed
    assert "proxy runs trained: 16" in printed
    assert "Overlap verdict: supported" in printed
    assert "would tell more" not in printed


def test_a_pool_with_a_name_gets_its_top_up_too(far):
    raw = yaml.safe_load(far.read_text())
    pools = raw["pools"] | {"live": {"longcot": raw["pools"]["live"]}}
    far.write_text(yaml.safe_dump(raw | {"pools": pools}))

    status, text = call("refresh", "--top-up", "--pool", "longcot", "--config", str(far))

    assert status == 0, text
    assert "Top-up of longcot: 16 proxy runs" in text
    assert "top_up_runs (longcot)" in text
    assert "Overlap verdict: supported" in text
    assert n_records(far) == OWN_RUNS + TOP_UP_RUNS


def test_a_second_top_up_of_a_supported_pool_trains_none(topped_up):
    frame = value(topped_up, "top_up_runs")

    done = run_job(topped_up)

    assert n_records(topped_up) == OWN_RUNS + TOP_UP_RUNS
    assert value(topped_up, "top_up_runs").equals(frame)
    # Neither the experiment nor the profile is made again, nor the run table's own baselines.
    assert made_by(done) == {"top_up_runs", "recommended_mixture", "training_export", "report"}


def test_a_pool_that_moves_on_keeps_its_top_ups_and_trains_none(topped_up):
    frame = value(topped_up, "top_up_runs")
    lengthen(topped_up, 900)

    made = refresh_live(topped_up)

    assert {"top_up_runs", "recommended_mixture"} <= made
    assert value(topped_up, "top_up_runs").equals(frame)
    assert n_records(topped_up) == OWN_RUNS + TOP_UP_RUNS


def test_neither_a_refresh_nor_a_click_on_the_asset_trains(far):
    with ensure_instance(load_settings(far).data_path) as instance:
        materialise(build_definitions(far), instance, [dg.AssetKey("top_up_runs")])
        found = stale_assets(build_definitions(far), instance, LIVE_SIDE)

    assert n_records(far) == OWN_RUNS
    assert found.reasons == {} and found.maybe == frozenset()
    assert "job top_up" in metadata(far, "top_up_runs")["how to train"]


def test_a_kill_loses_no_run_and_trains_none_twice(far):
    """Killed while it trains: what was trained by then is found with the state it was trained on,
    though the pool is another one meanwhile; the next top-up trains the rest."""
    command = [sys.executable, "-W", "ignore", "-c", RUN_JOB, str(far)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 120
        while n_records(far) == OWN_RUNS and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    n_trained = n_records(far) - OWN_RUNS
    state = value(far, "live_covariates")
    documents = (far.parent / "live" / "math" / "long.jsonl").read_bytes()

    lengthen(far, 700)
    refresh_live(far)
    frame = value(far, "top_up_runs")

    assert 0 < n_trained == frame.height < TOP_UP_RUNS
    runs = RunTable.from_frame(frame)
    assert (runs.state_NDP == state.select(runs.covariates).to_numpy()).all()
    assert documents != (far.parent / "live" / "math" / "long.jsonl").read_bytes()
    lengthen(far, 600)
    refresh_live(far)
    planned = value(far, "recommended_mixture")["top_up"]
    run_job(far)
    both = value(far, "top_up_runs")
    assert n_records(far) == OWN_RUNS + n_trained + len(planned)
    assert both.height == n_trained + len(planned)
    assert both["run_id"].is_unique().all()


def test_a_top_up_over_the_budget_is_refused(far):
    raw = yaml.safe_load(far.read_text())
    far.write_text(yaml.safe_dump(raw | {"budget": {"max_hours": 1e-6}}))

    with pytest.raises(ConfigError, match=r"allows 1e-06 hours .* the 16 proxy .*--top-up"):
        run_job(far)

    assert n_records(far) == OWN_RUNS
    assert not (far.parent / "data" / "top_ups").exists()


def test_runs_of_another_recipe_are_left_out_and_counted(topped_up):
    project, design = Project(config_file=str(topped_up)), value(topped_up, "mixture_design")
    runs = RunTable.from_frame(value(topped_up, "run_table"))
    scorers = value(topped_up, "normaliser")["scorers"]

    fit = collect_top_up_runs(project, design, runs, scorers)
    assert (fit.frame.height, fit.misfits, fit.untrained) == (TOP_UP_RUNS, 0, 0)
    others = {
        "config": design.with_columns(config=pl.lit('{"hidden": 8}')),
        "eval_hash": design.with_columns(eval_hash=pl.lit("0" * 32)),
    }
    for changed in others.values():
        left_out = collect_top_up_runs(project, changed, runs, scorers)
        assert (left_out.frame.height, left_out.misfits) == (0, TOP_UP_RUNS)
    first = pl.int_range(pl.len()) == 0  # the design has two recipes, this one among them
    config = pl.when(first).then(pl.lit('{"hidden": 8}')).otherwise("config").alias("config")
    also = collect_top_up_runs(project, design.with_columns(config), runs, scorers)
    assert (also.frame.height, also.misfits) == (TOP_UP_RUNS, 0)
    assert collect_top_up_runs(project, design, runs, ["other"]).misfits == TOP_UP_RUNS


def test_covariates_of_other_documents_are_refused(far):
    """Documents were profiled again, and the covariates not yet."""
    runs = RunTable.from_frame(value(far, "run_table"))
    documents, covariates = value(far, "live_documents"), value(far, "live_covariates")

    refuse_moved_pool(runs, documents, covariates)
    with pytest.raises(PoolError, match=r"live_covariates must be those of live_documents, got"):
        refuse_moved_pool(runs, documents[1:], covariates)


def test_a_project_that_never_had_top_ups_goes_on_with_one_refresh(finished):
    with ensure_instance(load_settings(finished).data_path) as instance:
        instance.wipe_assets([dg.AssetKey("top_up_runs")])
    (finished.parent / "data" / "assets" / "top_up_runs.parquet").unlink()
    before = json.dumps(value(finished, "recommended_mixture"))

    made = refresh_live(finished)

    assert "top_up_runs" in made and "training_export" not in made
    assert n_records(finished) == OWN_RUNS
    assert value(finished, "top_up_runs").height == 0
    assert json.dumps(value(finished, "recommended_mixture")) == before


def test_the_job_is_the_only_one_that_carries_the_tag(finished):
    repository = build_definitions(finished).get_repository_def()

    tagged = {job.name for job in repository.get_all_jobs() if TOP_UP_TAG in job.tags}
    assert tagged == {"top_up"}
    names = TOP_UP.resolve(build_definitions(finished).resolve_asset_graph())
    assert dg.AssetKey("cate_model") not in names
