"""What re-materialises by itself when what changes, evaluated without a daemon."""

import dagster as dg
import pytest

from causalmix_pipeline.automation.conditions import LIVE_SIDE, LIVE_SIDE_NAMES
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG


class World:
    """Definitions and an instance in which every asset was made and every check passed."""

    def __init__(
        self, definitions: dg.Definitions, instance: dg.DagsterInstance, missing: str = ""
    ):
        self.definitions, self.instance, self.cursor = definitions, instance, None
        graph = definitions.resolve_asset_graph()
        for key in graph.toposorted_asset_keys:
            if key.path[-1] != missing:
                self.make(key.path[-1], "1")
        for check in graph.asset_check_keys:
            self.instance.report_runless_asset_event(
                dg.AssetCheckEvaluation(
                    asset_key=check.asset_key, check_name=check.name, passed=True, metadata={}
                )
            )
        assert self.requested() == ({missing} if missing else set())

    def make(self, name: str, version: str) -> None:
        """Report an asset as made, or a pool as observed, with a data version."""
        kind = dg.AssetObservation if name.endswith("_pool") else dg.AssetMaterialization
        self.instance.report_runless_asset_event(kind(name, tags={DATA_VERSION_TAG: version}))

    def requested(self) -> set[str]:
        """What the conditions ask for now."""
        result = dg.evaluate_automation_conditions(
            self.definitions,
            instance=self.instance,
            asset_selection=LIVE_SIDE,
            cursor=self.cursor,
        )
        self.cursor = result.cursor
        return {
            key.to_user_string()
            for key in self.definitions.resolve_asset_graph().get_all_asset_keys()
            if result.get_num_requested(key)
        }

    def settle(self, versions: dict[str, str]) -> list[set[str]]:
        """Make what is asked for, with the given data versions (else 1), until nothing is."""
        waves = []
        while wave := self.requested():
            waves.append(wave)
            for name in LIVE_SIDE_NAMES:
                if name in wave:
                    self.make(name, versions.get(name, "1"))
        return waves


@pytest.fixture
def world(tmp_path):
    with dg.DagsterInstance.ephemeral() as instance:
        yield World(build_definitions(tmp_path / "causalmix.yaml"), instance)


def test_a_changed_live_pool_remakes_the_live_side_and_nothing_else(world):
    world.make("live_pool", "2")

    waves = world.settle(dict.fromkeys(LIVE_SIDE_NAMES, "2"))

    assert set.union(*waves) == set(LIVE_SIDE_NAMES)
    assert waves[0] == {"live_documents"}


def test_each_asset_of_the_live_side_is_made_once_for_one_change(world):
    world.make("live_pool", "2")

    waves = world.settle(dict.fromkeys(LIVE_SIDE_NAMES, "2"))

    assert sum(map(len, waves)) == len(LIVE_SIDE_NAMES)


def test_the_export_never_joins_new_documents_with_an_old_mixture(world):
    """It depends on both; it waits for the mixture that the new documents lead to."""
    world.make("live_pool", "2")

    waves = world.settle(dict.fromkeys(LIVE_SIDE_NAMES, "2"))

    assert waves[-1] == {"training_export", "report"}
    assert "recommended_mixture" in waves[-2]


def test_documents_of_the_same_content_end_at_the_profile(world):
    """Files were renamed or rows moved: the fingerprint is new, what was measured isn't."""
    world.make("live_pool", "2")

    assert world.settle({}) == [{"live_documents"}]


def test_an_observation_of_the_same_content_asks_for_nothing(world):
    world.make("live_pool", "1")

    assert world.requested() == set()


def test_covariates_that_stay_end_at_the_export(world):
    """New documents that change no covariate change which documents are exported, no mixture."""
    world.make("live_pool", "2")

    waves = world.settle({"live_documents": "2"})

    assert set.union(*waves) == {
        "live_documents", "live_covariates", "live_changes", "top_up_runs", "training_export",
    }  # fmt: skip


def test_an_experiment_that_ran_again_with_the_same_outcome_asks_for_nothing(world):
    for name in ("proxy_runs", "run_table", "cate_model", "cate_checks"):
        world.make(name, "1")

    assert world.requested() == set()


def test_a_new_effect_model_remakes_the_recommendation_not_the_profile(world):
    world.make("cate_model", "2")

    waves = world.settle({"recommended_mixture": "2"})

    assert set.union(*waves) == {"recommended_mixture", "training_export", "report"}


def test_a_top_up_remakes_the_recommendation_not_the_profile(world):
    world.make("top_up_runs", "2")

    waves = world.settle({"recommended_mixture": "2"})

    assert set.union(*waves) == {"recommended_mixture", "training_export", "report"}


def test_a_project_that_never_had_top_ups_gets_their_empty_table_once(tmp_path):
    """What is below has a missing input until then. If making it fails, it isn't tried for ever."""
    with dg.DagsterInstance.ephemeral() as instance:
        definitions = build_definitions(tmp_path / "causalmix.yaml")
        world = World(definitions, instance, missing="top_up_runs")  # asks for it

        assert [world.requested() for _ in range(3)] == [set()] * 3
        world.make("top_up_runs", "1")
        assert world.settle({}) == [{"recommended_mixture"}, {"report"}]


def test_a_changed_experiment_pool_asks_for_nothing_by_itself(world):
    """Proxy compute is a person's decision."""
    world.make("experiment_pool", "2")

    assert world.requested() == set()


def test_a_failed_blocking_check_stops_what_is_below(world):
    world.make("live_covariates", "2")
    world.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey("live_covariates"),
            check_name="no_covariate_missing",
            passed=False,
            metadata={},
            blocking=True,
        )
    )

    assert world.requested() & {"recommended_mixture", "baseline_mixtures"} == set()
