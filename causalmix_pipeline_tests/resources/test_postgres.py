"""The postgres profile on a real server: what can be missing, and a whole project on it."""

import os
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import dagster as dg
import pytest
import yaml

from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.automation.jobs import COVARIATE_CHOICE, RIVALS, VALIDATION
from causalmix_pipeline.automation.staleness import refresh
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import close_dead_runs, dagster_home, ensure_instance
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.postgres import require_postgres
from causalmix_pipeline.resources.serving_settings import Instance
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.automation.test_daemon import FAST, made_since, wait_for
from causalmix_pipeline_tests.postgres_server import free_port
from causalmix_pipeline_tests.resources.test_instance import KILLED, claimed

VARIABLE = "TEAM_POSTGRES"
WANTED = Instance(storage="postgres", postgres_env=VARIABLE)
SECRET = "c4nary-s3cret"


def refusal(monkeypatch, value: str | None) -> str:
    """What is said of a variable's value."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError) as caught:
        require_postgres(WANTED)
    return str(caught.value)


def test_the_setting_takes_a_name_and_never_shows_a_url_that_was_put_there(project_file):
    raw = yaml.safe_load(project_file.read_text())
    raw["instance"] = {
        "storage": "postgres",
        "postgres_env": f"postgresql+psycopg2://a:{SECRET}@b/c",
    }
    project_file.write_text(yaml.safe_dump(raw))

    with pytest.raises(ConfigError, match=r"instance.postgres_env must be the name") as caught:
        load_settings(project_file)

    assert SECRET not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dagster_postgres", None)

    assert "pip install 'causalmix_pipeline[postgres]'" in refusal(monkeypatch, "postgresql://x/y")


@pytest.mark.parametrize(
    "value",
    [None, "", f"mysql://team:{SECRET}@127.0.0.1/dagster", f"postgresql://team:{SECRET}@db/dagster",
     f"postgresql+psycopg2://team:{SECRET}@db",
     f"postgresql+psycopg2://team:a@{SECRET}@db:5432/dagster", f"postgresql+psycopg2://team:{SECRET}/@db/dagster"],
)  # fmt: skip
def test_a_variable_that_holds_no_url_is_named_without_its_value(monkeypatch, value):
    pytest.importorskip("dagster_postgres")

    text = refusal(monkeypatch, value)

    assert f"got {VARIABLE}, which {'holds something else' if value else 'is not set'}" in text
    assert SECRET not in text


def test_a_server_that_doesnt_answer_is_named_without_the_password(monkeypatch):
    pytest.importorskip("dagster_postgres")
    port = free_port()

    text = refusal(
        monkeypatch, f"postgresql+psycopg2://team:{SECRET}@127.0.0.1:{port}/dagster?x={SECRET}"
    )
    closed = refusal(monkeypatch, f"postgresql+psycopg2://team:{SECRET}@127.0.0.1:{port}/dagster")

    assert f"got 127.0.0.1:{port}/dagster, and " in text
    assert f"got 127.0.0.1:{port}/dagster, and no server answers there" in closed
    assert SECRET not in text + closed


def test_a_wrong_password_and_a_missing_database_are_told_apart(monkeypatch, postgres_url):
    address = urlsplit(postgres_url).netloc.rpartition("@")[2]

    password = refusal(monkeypatch, f"postgresql+psycopg2://team:{SECRET}@{address}/dagster")
    database = refusal(monkeypatch, postgres_url.removesuffix("dagster") + "absent")

    assert "it refuses the user or the password" in password
    assert "it has no such database" in database
    assert SECRET not in password
    assert str(urlsplit(postgres_url).password) not in database


@pytest.fixture
def on_postgres(finished, postgres_url, monkeypatch):
    """The settings file of a finished project whose instance is to be on the server."""
    monkeypatch.setenv(VARIABLE, postgres_url)
    raw = yaml.safe_load(finished.read_text())
    finished.write_text(yaml.safe_dump(raw | {"instance": WANTED.model_dump()}))
    return finished


@pytest.mark.timeout(900)
def test_a_project_refreshes_on_postgres_by_hand_and_by_a_daemon(on_postgres):
    """Its runs are in the run store, so that everything is made again and nothing trained."""
    settings, root = load_settings(on_postgres), on_postgres.parent
    defs = build_definitions(on_postgres)
    trained = sorted((settings.data_path / "run_store" / "runs").rglob("*.json"))
    with ensure_instance(settings.data_path, settings.instance) as instance:
        assert "Postgres" in type(instance.run_storage).__name__
        observe_pool(instance, settings, EXPERIMENT_POOL)
        observe_pool(instance, settings, LIVE_POOL)

        on_request = VALIDATION | COVARIATE_CHOICE | RIVALS
        made = refresh(defs, instance, dg.AssetSelection.all() - on_request)

        assert {"cate_model", "recommended_mixture"} <= {key.path[-1] for key in made}
        assert refresh(defs, instance, dg.AssetSelection.assets(*LIVE_SIDE_NAMES)) == []
        cursor = instance.event_log_storage.get_maximum_record_id()
        (root / "fast.py").write_text(FAST.format(config=str(on_postgres)))
        path = settings.resolve("live") / "math" / "short.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:-8]) + "\n")
        with RunningDaemon(root, settings) as (daemon, log):
            wanted = {"training_export", "report"}
            wait_for(lambda: wanted <= set(made_since(instance, cursor)), daemon, log, 420)
        assert sorted(made_since(instance, cursor)) == sorted(LIVE_SIDE_NAMES)  # each once
    assert sorted((settings.data_path / "run_store" / "runs").rglob("*.json")) == trained


class RunningDaemon:
    """A real daemon on a project, ended with all that it started."""

    def __init__(self, root, settings):
        self.log = root / "daemon.log"
        environment = {"DAGSTER_HOME": str(dagster_home(settings.data_path))}
        command = [sys.executable, "-m", "dagster._daemon", "run", "-f", str(root / "fast.py")]
        self.sink = open(self.log, "w")  # noqa: SIM115
        self.daemon = subprocess.Popen(
            command, cwd=root, env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
            stdout=self.sink, stderr=self.sink, start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self.daemon, self.log

    def __exit__(self, *_):
        os.killpg(self.daemon.pid, signal.SIGTERM)
        self.daemon.wait(30)
        self.sink.close()


@dg.asset(pool="proxy_training")
def quick() -> None:
    """Needs the slot that a killed run may still hold."""


def test_a_killed_run_on_postgres_is_closed_and_its_slot_is_free(
    tmp_path, monkeypatch, postgres_url
):
    monkeypatch.setenv(VARIABLE, postgres_url)
    (tmp_path / "killed.py").write_text(KILLED)
    with ensure_instance(tmp_path, WANTED) as instance:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(tmp_path / "killed.py"), str(tmp_path)],
            stderr=subprocess.DEVNULL,
        )
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        run = instance.get_runs(limit=1)[0]
        assert run.status == dg.DagsterRunStatus.STARTED
        assert claimed(instance) == 1

        assert close_dead_runs(instance) == [run.run_id]

        assert claimed(instance) == 0
        assert dg.materialize([quick], instance=instance).success
