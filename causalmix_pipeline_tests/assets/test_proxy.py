"""The experiment side of a finished project: what was made, and what a change trains."""

import re
import threading
import time
from dataclasses import replace

import dagster as dg
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.design import design_of, specs_of
from causalmix_pipeline.assets.proxy import (
    TRAINING_POOL,
    read_records,
    records_frame,
    records_of,
)
from causalmix_pipeline.automation.jobs import COVARIATE_CHOICE, EXPERIMENT_SIDE, RIVALS, VALIDATION
from causalmix_pipeline.automation.staleness import materialise, refresh, stale_assets
from causalmix_pipeline.core.errors import ConfigError, ProxyError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.progress import PROGRESS_PREFIX
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings


def value(config, name: str):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def n_records(config) -> int:
    return len(list((config.parent / "data" / "run_store" / "runs").rglob("*.json")))


def edit(config, **sections) -> None:
    raw = yaml.safe_load(config.read_text())
    for name, changes in sections.items():
        raw[name] = raw[name] | changes
    config.write_text(yaml.safe_dump(raw))


def test_each_run_of_the_design_has_a_row_and_an_outcome(finished):
    design, runs = value(finished, "mixture_design"), value(finished, "proxy_runs")
    table = RunTable.from_frame(value(finished, "run_table"))

    assert design.height == runs.height == table.n_runs == 18  # 16 and a panel of 2 x 1
    assert runs["proxy_run_id"].to_list() == design["proxy_run_id"].to_list()
    assert (table.outcome_NT[:, 0] == -runs["bits_per_byte__math"].to_numpy()).all()
    assert design_of(design).mixture_ND.sum(axis=1) == pytest.approx(1.0)
    assert len(set(table.repeat_of_N.tolist())) == 16


def test_covariates_are_those_of_the_settings_and_of_the_state(finished):
    table, states = (
        RunTable.from_frame(value(finished, "run_table")),
        value(finished, "pool_states"),
    )

    assert list(table.covariates) == load_settings(finished).covariates
    for d, domain in enumerate(table.domains):
        of_state = states.filter((pl.col("state_id") == 3) & (pl.col("domain") == domain))
        row = table.state_NDP[list(table.state_ids).index(3), d]
        assert row[0] == of_state[table.covariates[0]][0]


def test_a_finished_project_has_nothing_to_make(finished):
    with ensure_instance(load_settings(finished).data_path) as instance:
        wanted = dg.AssetSelection.all() - VALIDATION - COVARIATE_CHOICE - RIVALS
        found = stale_assets(build_definitions(finished), instance, wanted)

    assert found.reasons == {}


def test_growing_the_design_trains_exactly_the_new_runs(finished):
    before, known = n_records(finished), set(value(finished, "mixture_design")["proxy_run_id"])
    edit(finished, design={"n_runs": 20})

    with ensure_instance(load_settings(finished).data_path) as instance:
        refresh(build_definitions(finished), instance, EXPERIMENT_SIDE)

    assert n_records(finished) == before + 4
    assert known < set(value(finished, "mixture_design")["proxy_run_id"])
    assert value(finished, "proxy_runs").height == 22


def test_settings_that_changed_since_the_design_are_refused(finished):
    """Otherwise runs of another model would be collected under the design's ids."""
    edit(finished, proxy={"overrides": {"vocab_size": 384, "sequence_length": 32, "steps": 31}})

    with pytest.raises(ConfigError, match="materialise mixture_design first"):
        specs_of(Project(config_file=str(finished)), value(finished, "mixture_design"))


def test_a_lost_record_is_told_by_its_id_and_trained_again_alone(finished):
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    specs = specs_of(project, design)
    project.run_store.path_of(specs[3].key).unlink()

    with pytest.raises(
        ProxyError, match=f"1 of 18 proxy runs have no record, such as {specs[3].key}"
    ):
        read_records(project, specs)
    assert [spec.key for spec in project.run_store.missing(specs)] == [specs[3].key]


def test_records_survive_their_table(finished):
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    records = read_records(project, specs_of(project, design))

    back = records_of(records_frame(records, design), ["math", "code"])

    assert [r.key for r in back] == [r.key for r in records]
    assert [r.bits_per_byte for r in back] == [r.bits_per_byte for r in records]
    assert [r.diverged for r in back] == [r.diverged for r in records]


def test_the_plan_told_the_price_before_anything_was_trained(finished):
    plan = value(finished, "proxy_plan")

    assert plan["to train"] == plan["proxy runs"] == 18
    assert plan["million tokens to train"] == pytest.approx(18 * 30 * 4 * 32 / 1e6)
    assert plan["hours"] > 0
    assert plan["FLOPs to train"] > 0


def observations(instance: dg.DagsterInstance, name: str) -> list[dict]:
    """Metadata of an asset's observations, the first first."""
    found = instance.fetch_observations(dg.AssetKey(name), limit=100).records
    return [
        {k: v.value for k, v in record.asset_observation.metadata.items()}  # pyright: ignore[reportOptionalMemberAccess]
        for record in reversed(found)
    ]


def test_a_study_shows_while_it_trains_what_is_done_and_the_last_loss_curves(finished):
    """As observations, which the run's page lists; each stack of four is a tenth of the runs."""
    with ensure_instance(load_settings(finished).data_path) as instance:
        seen = observations(instance, "proxy_runs")
        (run,) = instance.get_runs(limit=1)
        lines = [e.user_message for e in instance.all_logs(run.run_id) if not e.dagster_event]
        event = instance.get_latest_materialization_event(dg.AssetKey("proxy_runs"))

    assert len(seen) == 5  # stacks
    assert seen[-1] | {"done": 18, "failed": 0, "running": 0, "to train": 18} == seen[-1]
    assert seen[0]["running"] > 0
    assert all(row["loss of the last runs"].startswith("![losses](data:image/svg") for row in seen)
    assert all(row["tokens per second"] > 0 for row in seen)
    line = next(line for line in reversed(lines) if line.startswith(PROGRESS_PREFIX))
    assert re.fullmatch(
        r"progress: 18 of 18 proxy runs trained \(0 failed, 0 running, \d+ tokens/s\), 0 s left",
        line,
    )
    assert event is not None
    metadata = event.asset_materialization.metadata  # pyright: ignore[reportOptionalMemberAccess]
    assert metadata["diverged"].value == 0
    assert metadata["tokens per second"].value > 0
    for domain in ("code", "math", "talk"):
        assert f"|{domain}|" in metadata["most epochs that a run read"].value  # pyright: ignore[reportOperatorIssue]


def test_a_diverged_run_has_no_outcome_and_is_left_out_of_the_table(finished):
    """Its last loss is kept, and its numbers, if it had some, are never used."""
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    records = read_records(project, specs_of(project, design))
    records[2] = replace(records[2], diverged=True)

    frame = records_frame(records, design)
    back = records_of(frame, ["math", "code"])

    assert frame["bits_per_byte__math"].null_count() == 1
    assert frame["bits_per_byte__math"][2] is None
    assert back[2].bits_per_byte == {}
    assert frame["diverged"].sum() == 1


def test_failed_runs_fail_the_asset_by_number_reason_and_way_out(finished):
    """A pool state is lost: its runs are given up, and nothing is collected without them."""
    project, design = Project(config_file=str(finished)), value(finished, "mixture_design")
    specs = specs_of(project, design)
    lost = [spec for spec in specs if spec.state_hash == specs[0].state_hash]
    for spec in lost:
        project.run_store.path_of(spec.key).unlink()
    (project.run_store.root / "states" / f"{lost[0].state_hash}.npz").unlink()

    with ensure_instance(load_settings(finished).data_path) as instance:
        result = materialise(
            build_definitions(finished), instance, [dg.AssetKey("proxy_runs")], raise_on_error=False
        )
        last = observations(instance, "proxy_runs")[-1]

    (failure,) = result.get_failed_step_keys()
    assert failure == "proxy_runs.train_proxy_runs"
    assert (last["done"], last["failed"]) == (0, len(lost))
    with pytest.raises(ProxyError, match=rf"{len(lost)} of them were tried and failed.*states"):
        read_records(project, specs)


@pytest.mark.parametrize("name", ["proxy_runs", "validation_runs"])
def test_two_trainings_never_run_at_once(finished, name):
    """While another run holds the one slot, the asset waits; it trains when the slot is free."""
    started: list[str] = []

    def trained() -> list[str]:
        return [step for step in started if step.endswith(("train_proxy_runs", "validation_runs"))]

    with ensure_instance(load_settings(finished).data_path) as instance:
        storage, other = instance.event_log_storage, dg.DagsterRun(job_name="other")
        instance.add_run(other)
        storage.initialize_concurrency_limit_to_default(TRAINING_POOL)
        assert storage.claim_concurrency_slot(TRAINING_POOL, other.run_id, "train").is_claimed
        waited: list[bool] = []

        def release() -> None:
            time.sleep(4)  # what comes before it is done by then
            waited.append(trained() == [])
            storage.free_concurrency_slots_for_run(other.run_id)

        # Not the other way round: Dagster's capture of logs can't be ended outside this thread.
        thread = threading.Thread(target=release)
        thread.start()
        materialise(
            build_definitions(finished),
            instance,
            [dg.AssetKey(name)],
            on_event=lambda entry: started.append(note(entry)),
        )
        thread.join()

    assert waited == [True]
    assert trained()


def note(entry: dg.EventLogEntry) -> str:
    """The step that a log entry starts, or nothing."""
    event = entry.dagster_event
    return (entry.step_key or "") if event is not None and event.is_step_start else ""
