"""What the conditions forgot is refreshed, once, and only when nothing else is at work."""

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

from causalmix_pipeline.automation.catch_up import LOOKS, look_for_stale
from causalmix_pipeline.automation.conditions import LIVE_SIDE
from causalmix_pipeline.automation.staleness import materialise, refresh, stale_assets
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.observation import LIVE_POOL, observe_pool
from causalmix_pipeline.resources.settings_file import load_settings


class Watched:
    """A finished project, looked at as the daemon does."""

    def __init__(self, config, instance: dg.DagsterInstance):
        self.config, self.settings, self.instance = config, load_settings(config), instance
        self.defs, self.cursor = build_definitions(config), None

    def look(self) -> list[dg.RunRequest]:
        result = look_for_stale(self.instance, self.settings, self.defs, self.cursor)
        self.cursor = result.cursor
        self.reason = result.skip_reason and result.skip_reason.skip_message
        return list(result.run_requests or [])

    def looks(self, n: int) -> list[dg.RunRequest]:
        return [request for _ in range(n) for request in self.look()]

    def stale(self) -> list[dg.AssetKey]:
        return list(stale_assets(self.defs, self.instance, LIVE_SIDE).reasons)

    def change_settings(self, **changed) -> None:
        """The daemon has read the file again; what was made is of the settings before."""
        self.settings = self.settings.model_copy(update=changed)
        self.defs = build_definitions(self.config, self.settings)

    def change_pool(self) -> None:
        path = self.settings.resolve("live") / "math" / "short.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
        assert observe_pool(self.instance, self.settings, LIVE_POOL)


@pytest.fixture
def watched(finished):
    with ensure_instance(load_settings(finished).data_path) as instance:
        yield Watched(finished, instance)


def test_a_project_at_rest_gets_no_run(watched):
    assert watched.looks(2 * LOOKS) == []
    assert watched.reason == "Nothing is stale."


def test_what_stays_stale_is_asked_for_once_and_the_run_brings_it_up_to_date(watched):
    watched.change_pool()

    assert watched.looks(LOOKS - 1) == []
    (request,) = watched.look()
    assert watched.looks(3 * LOOKS) == []  # asked for, though nothing came of it yet

    assert request.asset_selection == [dg.AssetKey("live_documents")]  # the rest follows from it
    materialise(watched.defs, watched.instance, request.asset_selection)
    assert dg.AssetKey("live_documents") not in watched.stale()


def test_the_same_content_in_another_change_is_asked_for_again(watched):
    """A run key is used once, and a pool may go back to what it was."""
    path = watched.settings.resolve("live") / "math" / "short.jsonl"
    first = path.read_text()
    watched.change_pool()
    (one,) = watched.looks(LOOKS)
    refresh(watched.defs, watched.instance, LIVE_SIDE)
    path.write_text(first)
    assert observe_pool(watched.instance, watched.settings, LIVE_POOL)
    refresh(watched.defs, watched.instance, LIVE_SIDE)

    watched.change_pool()
    (two,) = watched.looks(LOOKS)

    assert one.run_key != two.run_key


def test_while_a_run_is_at_work_looks_dont_count(watched):
    watched.change_pool()
    watched.looks(LOOKS - 1)
    job = watched.defs.resolve_job_def("refresh")
    run = watched.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)

    assert watched.look() == []
    assert watched.reason == "A run is at work."

    watched.instance.report_run_failed(run, "ended")
    assert watched.looks(LOOKS - 1) == []
    assert len(watched.look()) == 1


def backfill_of(key: str, status=BulkActionStatus.REQUESTED) -> PartitionBackfill:
    """What the conditions leave when they ask for two pools at once; its runs start later."""
    return PartitionBackfill(
        backfill_id=f"{key}-{status.value}",
        status=status,
        from_failure=False,
        tags={},
        backfill_timestamp=0.0,
        asset_selection=[dg.AssetKey(key)],
    )


def test_while_a_backfill_is_open_nothing_is_asked_for(watched):
    watched.change_pool()
    for passed_over in (
        backfill_of("of_another_project"),
        backfill_of("live_documents", BulkActionStatus.COMPLETED_SUCCESS),
    ):
        watched.instance.add_backfill(passed_over)
    assert len(watched.looks(LOOKS)) == 1

    watched.cursor = None
    watched.instance.add_backfill(backfill_of("live_documents"))
    assert watched.looks(2 * LOOKS) == []
    assert watched.reason == "A backfill is at work."


def test_a_damaged_cursor_counts_as_none(watched):
    watched.change_pool()
    for damaged in ("nonsense", "[1]", '{"a": null}'):
        watched.cursor = damaged
        assert len(watched.looks(LOOKS)) == 1


def test_a_project_without_an_experiment_gets_no_run(project_file):
    with ensure_instance(load_settings(project_file).data_path) as instance:
        new = Watched(project_file, instance)
        observe_pool(instance, new.settings, LIVE_POOL)

        assert new.looks(2 * LOOKS) == []


def test_runs_that_read_other_settings_than_the_daemon_are_asked_for_once(watched):
    """Each run reads the file; the daemon keeps what it loaded, and sees them as stale for good."""
    as_run = watched.defs
    watched.change_settings(seed=watched.settings.seed + 1)
    names = {"recommended_mixture", "training_export", "baseline_mixtures", "report"}

    refreshes = []
    for _ in range(4):
        for request in watched.looks(LOOKS):
            refreshes.append(request)
            assert request.asset_selection is not None
            materialise(as_run, watched.instance, request.asset_selection)

    assert names & {key.path[-1] for key in watched.stale()}
    assert len(refreshes) <= 1


def test_nothing_is_recommended_by_an_effect_model_that_is_stale(watched):
    watched.change_pool()
    watched.change_settings(covariates=watched.settings.covariates[:1])

    assert watched.looks(2 * LOOKS) == []
    assert "effect model is stale" in watched.reason


def test_what_is_below_a_failed_blocking_check_is_not_asked_for(watched):
    watched.change_pool()
    keys = [dg.AssetKey("live_documents"), dg.AssetKey("live_covariates")]
    materialise(watched.defs, watched.instance, keys)
    assert len(watched.looks(LOOKS)) == 1  # with its check passed
    watched.cursor = None

    failed = dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey("live_covariates"),
        check_name="no_covariate_missing",
        passed=False,
        metadata={},
    )
    watched.instance.report_runless_asset_event(failed)

    assert watched.looks(2 * LOOKS) == []
    assert "no_covariate_missing" in watched.reason
