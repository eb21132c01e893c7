"""A changed table of imported runs reaches the recommendation, trains nothing, disturbs nobody."""

import os

import dagster as dg
import polars as pl
import pytest
import yaml

from causalmix_pipeline.automation.imported_tables import (
    IMPORTED_TABLES,
    look_at_tables,
    observe_tables,
    table_specs,
)
from causalmix_pipeline.automation.jobs import COVARIATE_CHOICE, RIVALS, VALIDATION
from causalmix_pipeline.automation.staleness import refresh, stale_assets
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observe_pool, observed_version
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.assets.test_imported import N, value, write
from causalmix_pipeline_tests.automation.test_daemon import FAST, made_since, wait_for
from causalmix_pipeline_tests.resources.test_postgres import RunningDaemon

#: With the few runs of this project, SciPy 1.13 can't tell the power of one or another number.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in _ncf_sf")

WANTED = dg.AssetSelection.all() - VALIDATION - COVARIATE_CHOICE - RIVALS


def test_where_nothing_is_imported_there_is_no_sensor_job_or_asset(project_file):
    definitions = build_definitions(project_file)
    repository = definitions.get_repository_def()

    assert "imported_tables_sensor" not in [sensor.name for sensor in repository.sensor_defs]
    assert "use_imported_runs" not in [job.name for job in repository.get_all_jobs()]
    assert IMPORTED_TABLES not in definitions.resolve_asset_graph().get_all_asset_keys()
    with ensure_instance(load_settings(project_file).data_path) as instance:
        assert not observe_tables(instance, load_settings(project_file))


def test_where_something_is_the_tables_are_described_and_reach_the_model(project_file):
    settings = write(project_file)
    definitions = build_definitions(project_file)
    graph = definitions.resolve_asset_graph()
    reached = dg.AssetSelection.assets(IMPORTED_TABLES).downstream().resolve(graph)

    (spec,) = table_specs(settings)
    assert spec.description and len(spec.description) > 40
    assert {"imported_runs", "cate_model", "recommended_mixture"} <= {k.path[-1] for k in reached}
    assert not {"proxy_runs", "proxy_plan", "live_documents"} & {k.path[-1] for k in reached}
    names = {key.path[-1] for key in definitions.resolve_job_def("use_imported_runs").asset_layer
             .selected_asset_keys}  # fmt: skip
    assert names == {"imported_runs", "run_table", "cate_model", "cate_checks",
                     "cate_interpretation"}  # fmt: skip


class Looks:
    """Looks at the tables of a project one after another, as the daemon makes them."""

    def __init__(self, instance: dg.DagsterInstance, config):
        self.instance, self.config = instance, config
        self.cursor: str | None = None
        self.now = 1_000_000.0

    def __call__(self, defs: dg.Definitions | None = None) -> dg.SensorResult:
        self.now += 30
        built = defs or build_definitions(self.config)
        settings = load_settings(self.config)
        found = look_at_tables(self.instance, settings, lambda: built, self.cursor, self.now)
        self.cursor = found.cursor
        for event in found.asset_events:
            self.instance.report_runless_asset_event(event)
        return found


def told(found: dg.SensorResult) -> str:
    """Why a look did nothing."""
    assert not found.run_requests and not found.asset_events and found.skip_reason
    return str(found.skip_reason.skip_message)


def change(config, by: float) -> None:
    """Other outcomes of the imported runs."""
    path = config.parent / "metrics.csv"
    pl.read_csv(path).with_columns(pl.col("math") + by).write_csv(path)


def test_a_change_is_observed_first_and_then_asked_for_once(finished):
    write(finished)
    with ensure_instance(load_settings(finished).data_path) as instance:
        look = Looks(instance, finished)

        assert look().asset_events
        (asked,) = look().run_requests or ()
        job = build_definitions(finished).resolve_job_def("use_imported_runs")
        assert job.execute_in_process(instance=instance).success

        assert value(finished, "run_table").height >= N
        assert told(look()) == "The tables are as before."
        found = stale_assets(build_definitions(finished), instance)
        assert "imported_runs" not in {key.path[-1] for key in found.reasons}
        path = finished.parent / "metrics.csv"
        path.write_text(path.read_text())
        assert "same content" in told(look())

        change(finished, 0.5)
        assert look().asset_events
        (again,) = look().run_requests or ()
        assert job.execute_in_process(instance=instance).success
        change(finished, -0.5)  # as it was at first; a run key is used once
        assert look().asset_events
        (third,) = look().run_requests or ()
        assert len({asked.run_key, again.run_key, third.run_key}) == 3


def test_a_person_in_the_middle_of_an_experiment_is_left_alone(finished):
    write(finished)
    raw = yaml.safe_load(finished.read_text())
    with ensure_instance(load_settings(finished).data_path) as instance:
        look = Looks(instance, finished)
        look()
        definitions = build_definitions(finished)
        run = instance.create_run_for_job(
            definitions.resolve_job_def("experiment"),
            status=dg.DagsterRunStatus.STARTED,
            asset_selection=frozenset({dg.AssetKey("proxy_runs")}),
        )

        assert told(look()) == f"Run {run.run_id} is at work on the experiment side."
        instance.report_run_canceled(run)
        design = {**raw["design"], "n_runs": 18}
        finished.write_text(yaml.safe_dump(raw | {"design": design}))
        assert "mixture_design" in told(look()) and "must be made first" in told(look())

        finished.write_text(yaml.safe_dump(raw))
        assert look().run_requests


def test_what_another_run_read_meanwhile_isnt_read_again(finished):
    write(finished)
    with ensure_instance(load_settings(finished).data_path) as instance:
        look = Looks(instance, finished)
        look()
        defs = build_definitions(finished)
        refresh(defs, instance, dg.AssetSelection.assets("imported_runs", "run_table"))

        assert told(look()) == "The tables were read meanwhile."
        assert told(look()) == "The tables are as before."


def test_a_table_in_the_making_and_one_that_isnt_there_wait(project_file):
    settings = write(project_file)
    raw = yaml.safe_load(project_file.read_text())
    raw["automation"] = {"quiet_seconds": 60}
    project_file.write_text(yaml.safe_dump(raw))
    with ensure_instance(settings.data_path) as instance:
        look = Looks(instance, project_file)

        assert "in 60 s at the least" in told(look())
        change(project_file, 0.1)
        assert "in 60 s at the least" in told(look())
        os.rename(project_file.parent / "ratios.csv", project_file.parent / "away.csv")
        assert "ratios.csv isn't there" in told(look())
        os.rename(project_file.parent / "away.csv", project_file.parent / "ratios.csv")
        assert "in 60 s" in told(look()) and "in 30 s" in told(look())
        assert look().asset_events
        assert "must be made first" in told(look())  # there is no experiment yet


def test_a_damaged_cursor_counts_as_none(project_file):
    settings = write(project_file)
    with ensure_instance(settings.data_path) as instance:
        for cursor in ("", "{", "[]", '{"seen": {"x": 1}, "waiting": null}', "null"):
            look = Looks(instance, project_file)
            look.cursor = cursor
            look()
        assert observed_version(instance, IMPORTED_TABLES)


@pytest.mark.timeout(800)
def test_a_daemon_takes_a_changed_table_into_the_recommendation_and_trains_nothing(finished):
    settings, root = write(finished), finished.parent
    trained = sorted((settings.data_path / "run_store" / "runs").rglob("*.json"))
    with ensure_instance(settings.data_path) as instance:
        observe_pool(instance, settings, LIVE_POOL)
        observe_tables(instance, settings)
        refresh(build_definitions(finished), instance, WANTED)
        (root / "fast.py").write_text(FAST.format(config=str(finished)))
        cursor = instance.event_log_storage.get_maximum_record_id()
        first = observed_version(instance, IMPORTED_TABLES)
        change(finished, 0.5)

        with RunningDaemon(root, settings) as (daemon, log):
            wanted = {"cate_model", "recommended_mixture", "report"}
            wait_for(lambda: wanted <= set(made_since(instance, cursor)), daemon, log, 420)
            wait_for(
                lambda: (
                    not instance.get_runs_count(
                        dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
                    )
                ),
                daemon,
                log,
            )

        assert observed_version(instance, IMPORTED_TABLES) != first
        made = made_since(instance, cursor)
        assert made.count("cate_model") == made.count("recommended_mixture") == 1
        assert not {"proxy_runs", "proxy_plan", "live_documents"} & set(made)
    assert sorted((settings.data_path / "run_store" / "runs").rglob("*.json")) == trained
