"""Projects that share a Dagster instance: each has its keys, pools, runs and alerts to itself."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.remote_origin import RemoteInstigatorOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, InstigatorType
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES
from rich.console import Console

from causalmix_pipeline.automation.alerts import alert_log, look_for_alerts, make_run_failure_sensor
from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.automation.imported_tables import look_at_tables
from causalmix_pipeline.automation.staleness import materialise
from causalmix_pipeline.cli import main
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.doctor import examine
from causalmix_pipeline.resources.asset_keys import PROJECT_TAG, asset_key
from causalmix_pipeline.resources.instance import (
    PROCESS_TAG,
    close_dead_runs,
    dagster_home,
    ensure_instance,
    process_tag,
)
from causalmix_pipeline.resources.live_pools import partitions_name, settle_partitions
from causalmix_pipeline.resources.observation import LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline.workspace import open_workspace
from causalmix_pipeline_tests.assets.test_imported import write
from causalmix_pipeline_tests.assets.test_top_ups import lengthen
from causalmix_pipeline_tests.automation.test_daemon import FAST, proxy_runs_of, wait_for
from causalmix_pipeline_tests.test_definitions import ASSET_KEYS
from causalmix_pipeline_tests.test_doctor import ORIGIN

#: The first test makes the project that the others copy.
pytestmark = [
    pytest.mark.timeout(900),
    # With the few runs of this project, SciPy 1.13 can't tell the power of one or another number.
    pytest.mark.filterwarnings("ignore:invalid value encountered in _ncf_sf"),
]

VARIABLE = "CAUSALMIX_POSTGRES_URL"


def call(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


def named_project(source: Path, root: Path, name: str, **changes: object) -> Path:
    """A copy of the finished project with a name, and nothing of it but its proxy runs."""
    shutil.copytree(source, root)
    for folder in ("dagster_home", "assets"):
        shutil.rmtree(root / "data" / folder)
    config = root / "causalmix.yaml"
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(raw | {"project": name, **changes}))
    status, text = call("refresh", "--train", "--config", str(config))
    assert status == 0, text
    assert "proxy runs trained: 0" in text
    return config


def made_since(instance: dg.DagsterInstance, cursor: int) -> list[str]:
    """Whatever was made in the instance, by anyone."""
    found = []
    for key in instance.all_asset_keys():
        records = dg.AssetRecordsFilter(key, after_storage_id=cursor)
        page = instance.fetch_materializations(records, limit=20).records
        found += [key.to_user_string()] * len(page)
    return sorted(found)


def shorten(config: Path) -> None:
    path = config.parent / "live" / "math" / "short.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-8]) + "\n")


@pytest.fixture(scope="module")
def refreshed(finished_project, tmp_path_factory) -> Path:
    return named_project(finished_project, tmp_path_factory.mktemp("named") / "project", "alpha")


@pytest.fixture
def alpha(refreshed, tmp_path) -> Path:
    """The settings file of a copy of a project that is named alpha, and up to date."""
    shutil.copytree(refreshed.parent, tmp_path / "alpha")
    return tmp_path / "alpha" / "causalmix.yaml"


@pytest.fixture
def shared(tmp_path) -> Iterator[tuple[dg.DagsterInstance, Settings, Settings]]:
    """An empty instance, and the settings of two projects with live pools of the same names."""
    found = []
    for name in ("alpha", "beta"):
        live = {"web": f"{name}/web", "cot": f"{name}/cot"}
        path = tmp_path / name / "causalmix.yaml"
        path.parent.mkdir()
        raw = {"project": name, "pools": {"experiment": "experiment", "live": live}}
        path.write_text(yaml.safe_dump(raw))
        found.append(load_settings(path))
    with ensure_instance(tmp_path) as instance:
        yield instance, found[0], found[1]


def test_everything_of_a_named_project_is_below_its_name(alpha):
    with open_workspace(alpha, Console(file=io.StringIO())) as work:
        keys = work.instance.all_asset_keys()
        assert {key.path[0] for key in keys} == {"alpha"}
        on_request = {"validation_runs", "covariate_choice", "rivals"}
        assert {key.path[-1] for key in keys} == ASSET_KEYS - on_request
        assert work.value("recommended_mixture")["verdict"]
        assert work.pool_row(None)["state"] == "up to date"
        assert {run.tags[PROJECT_TAG] for run in work.instance.get_runs()} == {"alpha"}
        storage = work.instance.event_log_storage
        for check in work.defs.resolve_asset_graph().asset_check_keys:
            assert storage.get_asset_check_execution_history(check, limit=1), check
        for name in ("live_covariates", "run_table", "baseline_mixtures", "training_export"):
            event = work.instance.get_latest_materialization_event(dg.AssetKey(["alpha", name]))
            lineage = event.asset_materialization.metadata["dagster/column_lineage"].value
            deps = [dep.asset_key for found in lineage.deps_by_column.values() for dep in found]
            assert set(deps) <= set(keys)
    folders = {path.name for path in (alpha.parent / "data" / "assets").iterdir()}
    assert folders == {"alpha", "ops"}  # the latter by run
    assert (alpha.parent / "data" / "reports" / "report.html").is_file()


def test_a_named_project_is_brought_up_to_date_and_topped_up_from_the_command_line(alpha):
    assert "Re-materialised: nothing" in call("refresh", "--config", str(alpha))[1]
    status, text = call("status", "--config", str(alpha))
    assert status == 0 and "Overlap verdict" in text
    assert "changed" not in text and "never made" not in text
    before = len(proxy_runs_of(alpha))
    lengthen(alpha, 600)

    assert "Re-materialised: alpha/live_documents" in call("refresh", "--config", str(alpha))[1]
    assert len(proxy_runs_of(alpha)) == before
    status, text = call("refresh", "--config", str(alpha), "--top-up")

    assert status == 0, text
    assert len(proxy_runs_of(alpha)) > before
    with open_workspace(alpha, Console(file=io.StringIO())) as work:
        assert work.value("top_up_runs").height == len(proxy_runs_of(alpha)) - before
        assert {key.path[0] for key in work.instance.all_asset_keys()} == {"alpha"}


def test_a_changed_pool_and_a_changed_table_ask_for_their_own_assets(alpha):
    settings = write(alpha)
    with ensure_instance(settings.data_path) as instance:
        repository = build_definitions(alpha).get_repository_def()
        shorten(alpha)
        with dg.build_schedule_context(instance, repository_def=repository) as context:
            (asked,) = repository.schedule_defs[0].evaluate_tick(context).run_requests
        assert dg.AssetKey(["alpha", "live_documents"]) in asked.asset_selection

        def look(cursor: str | None, now: float) -> dg.SensorResult:
            defs = build_definitions(alpha)
            return look_at_tables(instance, settings, lambda: defs, cursor, now)

        first = look(None, 1_000_000.0)
        (event,) = first.asset_events
        assert event.asset_key == dg.AssetKey(["alpha", "imported_tables"])
        instance.report_runless_asset_event(event)
        experiment = repository.get_job("experiment")
        for name, waits in (("beta", False), ("alpha", True)):  # a run of theirs is at work
            instance.create_run_for_job(
                experiment, status=dg.DagsterRunStatus.STARTED, tags={PROJECT_TAG: name}
            )
            assert bool(look(first.cursor, 1_000_030.0).run_requests) != waits
        job = build_definitions(alpha).resolve_job_def("use_imported_runs")
        assert job.execute_in_process(instance=instance).success


def test_the_same_names_of_pools_are_partitions_of_their_own(shared):
    instance, alpha, beta = shared
    assert settle_partitions(instance, alpha) == settle_partitions(instance, beta) == []
    live = {"web": "alpha/web"}
    fewer = alpha.model_copy(update={"pools": alpha.pools.model_copy(update={"live": live})})

    assert len(settle_partitions(instance, fewer)) == 1

    assert instance.get_dynamic_partitions(partitions_name(alpha)) == ["web"]
    assert sorted(instance.get_dynamic_partitions(partitions_name(beta))) == ["cot", "web"]


@dg.asset(key_prefix="alpha")
def broken_alpha() -> None:
    """Fails."""
    raise ValueError("alpha's")


@dg.asset(key_prefix="beta")
def broken_beta() -> None:
    """Fails."""
    raise ValueError("beta's")


def test_only_its_own_failed_runs_are_told_whoever_started_them(shared):
    """Also of a job that makes no asset: the adoption of a pool that isn't there."""
    instance, *both = shared
    defs = dg.Definitions([broken_alpha, broken_beta])

    def tick(settings: Settings, cursor: str | None) -> str | None:
        with dg.build_sensor_context(instance, cursor=cursor, definitions=defs) as context:
            return make_run_failure_sensor(settings).evaluate_tick(context).cursor

    cursors = [tick(settings, None) for settings in both]
    expected: list[set[str]] = []
    for settings, asset in zip(both, (broken_alpha, broken_beta), strict=True):
        made = materialise(defs, instance, [asset.key], raise_on_error=False)
        config = settings.resolve("causalmix.yaml")
        adopt = build_definitions(config).resolve_job_def("adopt_experiment_pool")
        adopted = adopt.execute_in_process(instance=instance, raise_on_error=False)
        assert not made.success and not adopted.success
        expected.append({made.run_id, adopted.run_id})
    for settings, cursor in zip(both, cursors, strict=True):
        tick(settings, cursor)

    for settings, wanted in zip(both, expected, strict=True):
        lines = alert_log(settings).path.read_text().splitlines()
        assert {json.loads(line)["run_id"] for line in lines} == wanted


def test_a_verdict_and_a_check_of_the_other_project_are_not_told(alpha):
    settings = load_settings(alpha)
    other = settings.model_copy(update={"project": "beta"})
    checks = build_definitions(alpha, other).resolve_asset_graph().asset_check_keys

    with ensure_instance(settings.data_path) as instance:
        cursor, _, _ = look_for_alerts(instance, other, checks, None)

    seen = json.loads(cursor)
    assert seen["verdict"] == {"id": 0, "verdict": None}
    assert all(name.startswith("beta/") for name in seen["checks"])
    assert set(seen["checks"].values()) == {0}


def test_a_dead_run_is_closed_by_its_own_project(shared):
    instance, alpha, beta = shared
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        gone = process_tag(process.pid)
    job = dg.Definitions([broken_beta]).resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(
        job,
        status=dg.DagsterRunStatus.STARTED,
        tags={PROCESS_TAG: gone},
        asset_selection=frozenset({broken_beta.key}),
    )

    assert close_dead_runs(instance, alpha) == []
    assert close_dead_runs(instance, beta) == [run.run_id]


def test_the_doctor_finds_a_named_project_in_order_and_says_where_a_sensor_is_off(
    alpha, monkeypatch
):
    monkeypatch.chdir(alpha.parent)
    with ensure_instance(alpha.parent / "data") as instance:
        instance.add_instigator_state(
            InstigatorState(
                RemoteInstigatorOrigin(ORIGIN, "alerts"),
                InstigatorType.SENSOR,
                InstigatorStatus.STOPPED,
            )
        )

    findings = {found.what: found for found in examine(alpha)}

    location = ORIGIN.code_location_origin.location_name
    assert findings["sensors"].detail.startswith(f"alerts of {location} are switched off")
    assert findings["stored values"].level == "ok"
    assert "values" not in findings  # none is older than its code
    assert findings["dagster.yaml"].level == "ok"


@pytest.mark.parametrize("name", ["", "Alpha", "a/b", "../a", "1a", "a-b", "a" * 61])
def test_a_name_that_can_be_no_part_of_a_key_is_refused(tmp_path, name):
    path = tmp_path / "causalmix.yaml"
    path.write_text(yaml.safe_dump({"project": name}))

    with pytest.raises(ConfigError, match="project must be lower-case letters"):
        load_settings(path)


def test_without_a_name_keys_are_as_they_were(tmp_path):
    settings = load_settings(tmp_path / "causalmix.yaml", missing_ok=True)

    assert asset_key(settings, LIVE_POOL) == LIVE_POOL
    assert partitions_name(settings) == "live_pools"


@contextlib.contextmanager
def daemon_of_both(root: Path, configs: list[Path]) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A daemon with a code location for each project, at home with the first."""
    entries = []
    for config in configs:
        name = load_settings(config).project
        (root / f"{name}.py").write_text(FAST.format(config=str(config)))
        entries.append({"python_file": {"relative_path": f"{name}.py", "location_name": name}})
    (root / "workspace.yaml").write_text(yaml.safe_dump({"load_from": entries}))
    home = dagster_home(load_settings(configs[0]).data_path)
    command = [sys.executable, "-m", "dagster._daemon", "run", "-w", str(root / "workspace.yaml")]
    log = root / "daemon.log"
    with (
        open(log, "w") as sink,
        subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | {"DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        ) as daemon,
    ):
        try:
            yield daemon, log
        finally:
            os.killpg(daemon.pid, signal.SIGTERM)
            daemon.wait(30)


@pytest.mark.timeout(1800)
def test_a_daemon_remakes_only_the_project_whose_pool_changed(
    finished_project, tmp_path, postgres_url, monkeypatch
):
    """Two projects on one PostgreSQL database, and one daemon with a code location for each."""
    monkeypatch.setenv(VARIABLE, postgres_url)
    on_postgres = {"storage": "postgres", "postgres_env": VARIABLE}
    configs = [
        named_project(finished_project, tmp_path / name, name, instance=on_postgres)
        for name in ("alpha", "beta")
    ]
    beta = load_settings(configs[1])
    trained = [proxy_runs_of(config) for config in configs]
    with ensure_instance(beta.data_path, beta.instance) as instance:
        keys = instance.all_asset_keys()
        assert {key.path[0] for key in keys} == {"alpha", "beta"}
        versions = {
            name: observed_version(instance, dg.AssetKey([name, "live_pool"]))
            for name in ("alpha", "beta")
        }
        n_runs = instance.get_runs_count()
        cursor = instance.event_log_storage.get_maximum_record_id()

        def ticks() -> dict[str, int]:
            return {
                state.origin.repository_origin.code_location_origin.location_name: len(
                    instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=9)
                )
                for state in instance.all_instigator_state()
                if state.name == "live_pool_sensor"
            }

        def is_idle() -> bool:
            return not instance.get_runs_count(
                dg.RunsFilter(statuses=list(IN_PROGRESS_RUN_STATUSES))
            )

        with daemon_of_both(tmp_path, configs) as (daemon, log):
            wait_for(
                lambda: min(ticks().get(n, 0) for n in ("alpha", "beta")) >= 3, daemon, log, 240
            )
            assert made_since(instance, cursor) == []
            shorten(configs[1])
            wanted = {"beta/training_export", "beta/report"}
            wait_for(lambda: wanted <= set(made_since(instance, cursor)), daemon, log, 600)
            wait_for(is_idle, daemon, log, 240)

        assert made_since(instance, cursor) == sorted(f"beta/{name}" for name in LIVE_SIDE_NAMES)
        runs = instance.get_runs(limit=instance.get_runs_count() - n_runs)
        assert {run.tags[PROJECT_TAG] for run in runs} == {"beta"}
        assert all(run.status == dg.DagsterRunStatus.SUCCESS for run in runs)
        after = observed_version(instance, dg.AssetKey(["beta", "live_pool"]))
        assert after != versions["beta"]
        assert observed_version(instance, dg.AssetKey(["alpha", "live_pool"])) == versions["alpha"]
    assert [proxy_runs_of(config) for config in configs] == trained
