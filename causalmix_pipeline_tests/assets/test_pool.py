"""Pools as assets: what is read, refused, scored once, and adopted."""

import json

import dagster as dg
import polars as pl
import pytest

from causalmix_pipeline.adapters.sealed_frames import read_value, write_value
from causalmix_pipeline.assets import design, pool
from causalmix_pipeline.automation.staleness import materialise
from causalmix_pipeline.core.covariates import DOMAIN_COVARIATES, METRICS
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.frame_store import FrameStore
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_documents, write_pool

ASSETS = [
    pool.experiment_pool,
    pool.live_pool,
    pool.tokenizer,
    pool.experiment_documents,
    design.normaliser,
    pool.live_documents,
    pool.live_covariates,
    pool.live_changes,
]


class Profile:
    """Materialises the pools' assets of a project."""

    def __init__(self, project_file, instance):
        self.root, self.instance = project_file.parent, instance
        self.project = Project(config_file=str(project_file))
        self.settings = load_settings(project_file)
        observe_pool(instance, self.settings, EXPERIMENT_POOL)

    def run(self, *names: str) -> dict[str, dg.AssetMaterialization]:
        store = FrameStore(base_dir=str(self.root / "data" / "assets"))
        result = dg.materialize(
            ASSETS,
            instance=self.instance,
            resources={"project": self.project, "io_manager": store},
            selection=list(names) or None,
        )
        events = result.get_asset_materialization_events()
        made = [event.step_materialization_data.materialization for event in events]
        return {m.asset_key.to_user_string(): m for m in made}

    def value(self, name: str):
        return read_value(self.root / "data" / "assets" / f"{name}.parquet")


@pytest.fixture
def profile(project_file):
    with dg.DagsterInstance.ephemeral() as instance:
        yield Profile(project_file, instance)


def number(made: dg.AssetMaterialization, name: str) -> float:
    return made.metadata[name].value


def test_documents_and_covariates_tell_what_the_pool_holds(profile):
    made = profile.run()

    documents, covariates = profile.value("live_documents"), profile.value("live_covariates")
    assert number(made["live_documents"], "documents") == documents.height == 3 * 2 * 24
    assert "text" not in documents.columns
    assert covariates["domain"].to_list() == ["code", "math", "talk"]
    assert {*METRICS, *DOMAIN_COVARIATES} <= set(covariates.columns)
    assert covariates["natural_share"].sum() == pytest.approx(1.0)
    assert covariates["tokens"].sum() == documents["n_tokens"].sum()
    assert made["live_documents"].metadata["dagster/row_count"].value == documents.height


def test_a_document_is_scored_once_whatever_pool_it_is_in(profile):
    profile.run()
    write_documents(profile.root / "live" / "math" / "new.jsonl", "math", n=3, n_words=40, seed=77)

    made = profile.run("live_documents")

    assert number(made["live_documents"], "documents scored now") == 3
    assert number(made["live_documents"], "documents") == 3 * 2 * 24 + 3


def test_what_changed_since_the_profile_before_is_told(profile):
    assert "first profile" in profile.run()["live_changes"].metadata["changes"].value
    write_documents(profile.root / "live" / "math" / "new.jsonl", "math", n=9, n_words=300, seed=77)

    made = profile.run("live_documents", "live_changes")["live_changes"]
    again = profile.run("live_changes")["live_changes"]

    assert (number(made, "documents in"), number(made, "documents out")) == (9, 0)
    moved = profile.value("live_changes")["covariates"][0]
    assert moved["domain"] == "math" and abs(moved["effect"]) > 0
    assert "data:image/svg+xml" in made.metadata["moves of the covariates in use"].value
    assert again.tags["dagster/data_version"] == made.tags["dagster/data_version"]


def test_a_live_pool_measured_otherwise_than_the_experiment_is_refused(profile):
    profile.run()
    store = profile.root / "data" / "assets"
    scale = profile.value("normaliser")
    scale["scorers"][0] = "characters-v0"
    write_value(store / "normaliser.parquet", scale)

    with pytest.raises(PoolError, match=r"the live pool must be profiled as .*characters-v0"):
        profile.run("live_covariates")


def test_equal_content_has_an_equal_data_version_and_other_content_another(profile):
    first = profile.run()["live_documents"].tags["dagster/data_version"]
    assert profile.run("live_documents")["live_documents"].tags["dagster/data_version"] == first

    (profile.root / "live" / "math" / "short.jsonl").unlink()

    assert profile.run("live_documents")["live_documents"].tags["dagster/data_version"] != first


def test_a_refused_row_is_kept_with_its_reason(profile):
    with open(profile.root / "live" / "math" / "short.jsonl", "a") as file:
        file.write('{"text": "half\n')

    made = profile.run()

    quarantine = read_value(profile.root / "data" / "quarantine" / "live_pool.parquet")
    assert number(made["live_documents"], "rows rejected") == quarantine.height == 1
    assert "not JSON" in quarantine["reason"][0]


def test_too_many_refused_rows_stop_the_run(profile):
    profile.run("tokenizer")
    (profile.root / "live" / "math" / "bad.jsonl").write_text("{\n" * 100)

    with pytest.raises(PoolError, match=r"quality\.max_rejected_share is 0\.1"):
        profile.run("live_documents")


def test_a_domain_that_the_experiment_does_not_know_is_left_out(profile):
    (profile.root / "live" / "poems").mkdir()
    (profile.root / "live" / "poems" / "a.jsonl").write_text(
        json.dumps({"text": "a rose", "group": "g"}) + "\n"
    )

    profile.run()

    assert "poems" not in profile.value("live_documents")["domain"].to_list()


def test_a_domain_without_live_documents_stops_the_run_by_its_name(profile):
    profile.run("tokenizer")
    for path in (profile.root / "live" / "math").iterdir():
        path.unlink()

    with pytest.raises(PoolError, match="'math'"):
        profile.run("live_documents")


def test_an_experiment_pool_that_was_not_adopted_is_refused(profile):
    """Otherwise proxies would be trained on documents that nobody decided on."""
    write_pool(profile.root / "experiment", seed=9)

    with pytest.raises(PoolError, match=r"pools\.experiment .* must be the pool that was adopted"):
        profile.run("tokenizer")

    observe_pool(profile.instance, profile.settings, EXPERIMENT_POOL)
    assert "tokenizer" in profile.run("tokenizer")


def test_a_small_domain_fails_the_check_before_anything_is_trained(profile):
    for path in (profile.root / "experiment" / "math").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    observe_pool(profile.instance, profile.settings, EXPERIMENT_POOL)

    with pytest.raises(dg.DagsterError, match="enough_documents"):
        profile.run("tokenizer", "experiment_documents")

    key = dg.AssetCheckKey(dg.AssetKey("experiment_documents"), "enough_documents")
    records = profile.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])
    evaluation = records[key].event.dagster_event.asset_check_evaluation_data
    assert not evaluation.passed
    assert "'math'" in evaluation.description
    assert "got 10" in evaluation.description


def test_a_pool_of_one_domain_is_refused(profile):
    for domain in ("math", "code"):
        for path in (profile.root / "experiment" / domain).iterdir():
            path.unlink()
    observe_pool(profile.instance, profile.settings, EXPERIMENT_POOL)

    with pytest.raises(PoolError, match=r"two domains or more, got \['talk'\]"):
        profile.run("tokenizer")


def test_a_person_can_observe_the_live_pool(profile):
    definitions = build_definitions(profile.root / "causalmix.yaml")

    result = materialise(definitions, profile.instance, [LIVE_POOL])

    assert result.success
    assert profile.instance.fetch_observations(LIVE_POOL, limit=1).records


def test_copies_count_in_the_natural_share_and_once_in_the_tokens():
    documents = pl.DataFrame(
        {
            "domain": ["a", "b", "b"],
            "n_tokens": [10, 10, 20],
            "copies": [6, 1, 1],
            "augmented": [False, False, False],
        }
    )

    frame = pool.describe_domains(documents, ["b", "a"])

    assert frame["domain"].to_list() == ["b", "a"]
    assert frame["tokens"].to_list() == [30, 10]
    assert frame["natural_share"].to_list() == pytest.approx([1 / 3, 2 / 3])
