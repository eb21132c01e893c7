"""Several live pools over one experiment, from the command line: each on its own."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import dagster as dg
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.validation import VALIDATION_SEEDS
from causalmix_pipeline.automation.conditions import LIVE_SIDE, LIVE_SIDE_NAMES
from causalmix_pipeline.automation.staleness import materialise, stale_assets
from causalmix_pipeline.cli import main
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observed_version
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_pool

POOLS = ("web-2026w47", "longcot")


def call(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


def set_pools(config: Path, live: object) -> None:
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(raw | {"pools": {"experiment": "experiment", "live": live}}))


@pytest.fixture(scope="module")
def refreshed(finished_project, tmp_path_factory) -> Path:
    """The settings file of a project that had one pool, got two, and was refreshed; copy it."""
    root = tmp_path_factory.mktemp("pools") / "project"
    shutil.copytree(finished_project, root)
    write_pool(root / "cot", n=26, seed=4)
    set_pools(root / "causalmix.yaml", {"web-2026w47": "live", "longcot": "cot"})
    status, text = call("refresh", "--config", str(root / "causalmix.yaml"))
    assert status == 0, text
    assert "proxy runs trained: 0" in text
    for name in LIVE_SIDE_NAMES:
        for pool in POOLS:
            assert f"{name} ({pool})" in text
    return root / "causalmix.yaml"


@pytest.fixture
def project(refreshed, tmp_path, monkeypatch) -> Path:
    shutil.copytree(refreshed.parent, tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "project" / "causalmix.yaml"


def change(project: Path, folder: str) -> None:
    path = project.parent / folder / "math" / "short.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-8]) + "\n")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_pool_has_its_own_values_export_report_history_and_rejects(project):
    data = project.parent / "data"
    for pool in POOLS:
        mixture = read_value(data / "assets" / "recommended_mixture" / f"{pool}.parquet")
        exported = json.loads((data / "export" / pool / "mixture.json").read_text())
        best = mixture["mixtures"]["recommended"]
        assert list(exported["weights"].values()) == pytest.approx(best)
        for page in ("report.html", "report.md"):
            assert (data / "reports" / pool / page).is_file()
        assert (data / "history" / pool / "newest_profile.parquet").is_file()
        assert (data / "quarantine" / pool / "live_pool.parquet").is_file()
    both = [read_value(data / "assets" / "live_documents" / f"{pool}.parquet") for pool in POOLS]
    assert both[0].height != both[1].height


def test_a_change_of_one_pool_refreshes_it_and_leaves_the_other_as_it_is(project):
    data = project.parent / "data"
    change(project, "cot")
    with ensure_instance(data) as instance:
        before = observed_version(instance, LIVE_POOL, POOLS[0])
    other = [files(data / kind / POOLS[0]) for kind in ("export", "reports", "history")]
    runs = files(data / "run_store" / "runs")

    status, text = call("refresh", "--config", str(project))

    assert status == 0, text
    assert "live_documents (longcot)" in text
    assert "(web-2026w47)" not in text
    assert "proxy runs trained: 0" in text
    assert files(data / "run_store" / "runs") == runs
    assert [files(data / kind / POOLS[0]) for kind in ("export", "reports", "history")] == other
    with ensure_instance(data) as instance:
        assert observed_version(instance, LIVE_POOL, POOLS[0]) == before
        assert not stale_assets(
            build_definitions(project), instance, LIVE_SIDE, pool=POOLS[1]
        ).reasons


def test_one_pool_is_refreshed_by_its_name(project):
    change(project, "cot")
    change(project, "live")

    status, text = call("refresh", "--config", str(project), "--pool", "longcot")

    assert status == 0, text
    assert "(web-2026w47)" not in text
    assert "longcot/report.html" in text.replace(" ", "")
    status, text = call("status", "--config", str(project))
    assert "longcot up to date" in text
    assert "web-2026w47 live_documents: live_pool changed" in text.replace("  ", " ")


def test_an_unknown_name_is_refused_with_those_that_are_known(project):
    status, text = call("refresh", "--config", str(project), "--pool", "web")

    assert status == 2
    assert "must be one of pools.live (" in text
    assert "longcot" in text
    assert "got web" in text


def test_a_missing_pool_stops_no_other_and_is_named_in_the_end(project):
    shutil.rmtree(project.parent / "live")
    change(project, "cot")

    status, text = call("refresh", "--config", str(project))

    assert status == 2
    assert "live_documents (longcot)" in text
    assert "the live pool web-2026w47: pools:" in text
    status, text = call("status", "--config", str(project))
    assert status == 0
    assert "can't be read" in text


def test_a_pool_is_profiled_by_its_name(project):
    status, text = call("profile", "longcot", "--config", str(project))

    assert status == 0, text
    assert (project.parent / "data" / "profile" / "longcot").is_dir()

    status, text = call("profile", "--config", str(project))
    assert status == 2
    assert "name one" in text


def test_the_schedule_asks_for_each_stale_pool_and_passes_over_a_missing_one(project):
    change(project, "cot")
    repository = build_definitions(project).get_repository_def()

    def tick() -> list[tuple[str | None, set[str]]]:
        with (
            ensure_instance(project.parent / "data") as instance,
            dg.build_schedule_context(instance, repository_def=repository) as context,
        ):
            requests = repository.schedule_defs[0].evaluate_tick(context).run_requests
        return [(r.partition_key, {key.path[-1] for key in r.asset_selection}) for r in requests]

    ((pool, names),) = tick()
    assert pool == "longcot"
    assert names >= {"live_documents", "recommended_mixture", "report"}
    shutil.rmtree(project.parent / "live")
    assert [pool for pool, _ in tick()] == ["longcot"]


def test_a_pool_is_observed_and_validated_as_a_partition_of_a_run(project):
    with ensure_instance(project.parent / "data") as instance:
        definitions = build_definitions(project)
        change(project, "cot")
        result = materialise(definitions, instance, [LIVE_POOL], pool="longcot")
        assert result.success
        (record,) = instance.fetch_observations(LIVE_POOL, limit=1).records
        assert record.partition_key == "longcot"
        change(project, "live")
        key = dg.AssetKey("validation_runs")
        assert materialise(definitions, instance, [LIVE_POOL], pool="web-2026w47").success
        reasons = stale_assets(definitions, instance, LIVE_SIDE, pool="web-2026w47").reasons
        assert reasons[dg.AssetKey("live_documents")] == "live_pool changed"
        names = ["live_documents", "live_covariates", "baseline_mixtures", "recommended_mixture"]
        keys = [dg.AssetKey(name) for name in names]
        assert materialise(definitions, instance, [*keys, key], pool="web-2026w47").success
    data = project.parent / "data" / "assets" / "validation_runs"
    assert [path.name for path in data.iterdir()] == ["web-2026w47.parquet"]
    assert VALIDATION_SEEDS == 3


def test_back_to_one_pool_nothing_of_the_named_ones_is_taken_for_its_own(project):
    set_pools(project, "cot")

    status, text = call("refresh", "--config", str(project))

    assert status == 0, text
    assert "live_documents" in text
    data = project.parent / "data"
    one = read_value(data / "assets" / "live_documents.parquet")
    assert one.equals(read_value(data / "assets" / "live_documents" / "longcot.parquet"))
    assert "Re-materialised: nothing" in call("refresh", "--config", str(project))[1]


def test_a_pool_that_comes_back_has_its_history(project):
    set_pools(project, {"longcot": "cot"})
    assert call("status", "--config", str(project))[0] == 0
    set_pools(project, {"longcot": "cot", "web-2026w47": "live"})

    status, text = call("refresh", "--config", str(project))

    assert status == 0
    assert "Re-materialised: nothing" in text
    assert load_settings(project).live_location("web-2026w47").name == "live"
