"""`dagster.yaml`: made, brought up to date while nobody edited it, and never against a person."""

import hashlib

import dagster as dg
import pytest
import yaml

from causalmix_pipeline.assets.proxy import TRAINING_POOL
from causalmix_pipeline.automation.jobs import TRAINS_TAG
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources import home_config
from causalmix_pipeline.resources.home_config import config_for, next_config, template
from causalmix_pipeline.resources.instance import ensure_home, ensure_instance
from causalmix_pipeline.resources.serving_settings import Instance

SQLITE = Instance()
POSTGRES = Instance(storage="postgres", postgres_env="TEAM_URL")

#: If this fails, the template was changed: put the digest that stands here into
#: `home_config.EARLIER_TEMPLATES`, so that projects get the new one, and the new digest here.
TEMPLATE_SHA256 = "ad7c105fd864ebd2eabd83d26378775988ea85145d231743cb0ce6b441e5574e"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_template_is_the_one_whose_digest_is_kept():
    assert digest(template()) == TEMPLATE_SHA256
    assert TEMPLATE_SHA256 not in home_config.EARLIER_TEMPLATES


def test_the_file_for_postgres_names_the_variable_and_nothing_else(tmp_path):
    text = next_config(None, POSTGRES, tmp_path)

    assert yaml.safe_load(text)["storage"] == {"postgres": {"postgres_url": {"env": "TEAM_URL"}}}
    assert {k: v for k, v in yaml.safe_load(text).items() if k != "storage"} == yaml.safe_load(
        template()
    )


@pytest.mark.parametrize("there", [None, config_for(None), config_for("TEAM_URL")])
def test_an_unedited_file_follows_the_settings(there, tmp_path):
    assert next_config(there, SQLITE, tmp_path) == config_for(None)
    assert next_config(there, POSTGRES, tmp_path) == config_for("TEAM_URL")
    assert next_config(there, None, tmp_path) == (there or config_for(None))


def test_an_unedited_file_of_an_earlier_version_is_brought_up_to_date(tmp_path, monkeypatch):
    earlier = "telemetry:\n  enabled: false\n"
    later = config_for("TEAM_URL").replace(template(), earlier)
    monkeypatch.setattr(home_config, "EARLIER_TEMPLATES", {digest(earlier)})
    home = ensure_home(tmp_path)

    (home / "dagster.yaml").write_text(earlier)
    ensure_home(tmp_path)

    assert (home / "dagster.yaml").read_text() == template()
    assert next_config(later, None, tmp_path) == config_for("TEAM_URL")


EDITED = "telemetry:\n  enabled: false\n"
EDITED_POSTGRES = EDITED + "storage: {postgres: {postgres_url: {env: TEAM_URL}}}\n"
BY_PARTS = EDITED + "storage: {postgres: {postgres_db: {hostname: db, password: {env: P}}}}\n"
MYSQL = EDITED + "storage: {mysql: {mysql_url: {env: TEAM_URL}}}\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(EDITED, SQLITE), (EDITED, None), (EDITED_POSTGRES, POSTGRES), (MYSQL, SQLITE), (MYSQL, None)],
)
def test_an_edited_file_that_fits_is_kept(text, wanted, tmp_path):
    assert next_config(text, wanted, tmp_path) == text


@pytest.mark.parametrize(
    ("text", "wanted", "way_out"),
    [
        (EDITED, POSTGRES, "write into it `storage: {postgres: {postgres_url: {env: TEAM_URL}}}`"),
        (BY_PARTS, POSTGRES, "write into it"),
        (EDITED_POSTGRES, SQLITE, "take the storage section off it"),
        (EDITED_POSTGRES, Instance(storage="postgres", postgres_env="OTHER"), r"\{env: OTHER\}"),
    ],
)
def test_an_edited_file_for_another_storage_stops_and_is_kept(text, wanted, way_out, tmp_path):
    home = ensure_home(tmp_path)
    (home / "dagster.yaml").write_text(text)

    with pytest.raises(ConfigError, match=rf"instance.storage must be what .*{way_out}"):
        ensure_home(tmp_path, wanted)

    assert (home / "dagster.yaml").read_text() == text


def test_a_file_that_isnt_yaml_is_named(tmp_path):
    home = ensure_home(tmp_path)
    (home / "dagster.yaml").write_text("telemetry: [")

    with pytest.raises(ConfigError, match=r"(?s)dagster.yaml must be YAML.*delete it"):
        ensure_home(tmp_path)


def test_the_instance_keeps_few_runs_at_a_time_and_lets_training_take_a_week(tmp_path):
    with ensure_instance(tmp_path) as instance:
        queue = instance.get_concurrency_config().run_queue_config
        assert queue.max_concurrent_runs == 4
        assert queue.tag_concurrency_limits == [{"key": TRAINS_TAG, "limit": 1}]
        assert instance.run_monitoring_max_runtime_seconds == 7 * 86_400
        assert instance.run_retries_enabled


def test_the_runs_of_every_job_that_trains_wait_in_the_queue_for_each_other(project_file):
    """All but the refresh, whose top-up op trains only in the job of that name."""
    repository = build_definitions(project_file).get_repository_def()
    jobs = [job for job in repository.get_all_jobs() if job.name != "__ASSET_JOB"]
    can_train = {
        job.name
        for job in jobs
        for node in job.graph.iterate_op_defs()
        if node.pool == TRAINING_POOL
    }

    assert can_train == {"experiment", "validate", "compare", "top_up", "refresh"}
    assert {job.name for job in jobs if TRAINS_TAG in job.tags} == can_train - {"refresh"}


def test_a_run_of_the_live_side_ends_after_a_day(project_file):
    """Training has a week; a hung refresh would keep the next from starting for as long."""
    repository = build_definitions(project_file).get_repository_def()
    sensor = repository.get_sensor_def("live_side_sensor")

    assert repository.get_job("refresh").tags["dagster/max_runtime"] == str(86_400)
    assert isinstance(sensor, dg.AutomationConditionSensorDefinition)
    assert sensor.run_tags["dagster/max_runtime"] == str(86_400)
    assert "dagster/max_runtime" not in repository.get_job("experiment").tags
