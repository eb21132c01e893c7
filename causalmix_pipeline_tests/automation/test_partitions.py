"""Several live pools: each is a partition of the live side, and goes its own way."""

import dagster as dg
import pytest

from causalmix_pipeline.assets.pool import live_pool
from causalmix_pipeline.automation.conditions import with_live_condition
from causalmix_pipeline.automation.partitions import OF_A_POOL, with_partitions
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.live_pools import PARTITIONS_NAME, settle_partitions
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG
from causalmix_pipeline.resources.settings import Settings

SETTINGS = Settings.model_validate({"pools": {"live": {"web-2026w47": "a", "longcot": "b"}}})

#: Data version of each asset and pool, `1` where it isn't named; and pools whose check fails.
VERSIONS: dict[tuple[str, str | None], str] = {}
FAILING: set[str] = set()


def make_asset(name: str, deps: list[str], check: str | None = None) -> dg.AssetsDefinition:
    specs = [dg.AssetCheckSpec(check, asset=name, blocking=True)] if check else []

    @dg.asset(name=name, deps=deps, check_specs=specs)
    def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        of = context.partition_key if context.has_partition_key else None
        version = VERSIONS.get((name, of), "1")
        checks = [dg.AssetCheckResult(check_name=check, passed=of not in FAILING)]
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version), check_results=checks if check else []
        )

    return made


class World:
    """A small graph of the live side's names, of two pools, in which everything was made once."""

    def __init__(self, instance: dg.DagsterInstance):
        assets = [
            live_pool,
            make_asset("cate_model", []),
            make_asset("live_documents", ["live_pool"]),
            make_asset("live_covariates", ["live_documents"], "complete"),
            make_asset("recommended_mixture", ["live_covariates", "cate_model"], "sums_to_one"),
            make_asset("report", ["recommended_mixture", "live_covariates", "cate_model"]),
        ]
        self.instance, self.cursor = instance, None
        assets = [with_partitions(with_live_condition(asset), SETTINGS) for asset in assets]
        self.definitions = dg.Definitions(
            assets=assets, resources={"project": dg.ResourceDefinition.hardcoded_resource(None)}
        )
        self.graph = self.definitions.resolve_asset_graph()
        settle_partitions(instance, SETTINGS)
        self.run({("cate_model", None)})
        for of in SETTINGS.live_pools:
            self.observe(of, "1")
            self.run({(name, of) for name in OF_A_POOL[1:]})
        self.requested()
        assert self.requested() == set()

    def observe(self, pool: str | None, version: str) -> None:
        self.instance.report_runless_asset_event(
            dg.AssetObservation("live_pool", partition=pool, tags={DATA_VERSION_TAG: version})
        )

    def run(self, wanted: set[tuple[str, str | None]]) -> None:
        """Make assets of pools for real, a run for each pool."""
        job = self.definitions.resolve_implicit_global_asset_job_def()
        known = {key.path[-1] for key in self.graph.materializable_asset_keys}
        for pool in {pool for _, pool in wanted}:
            keys = [dg.AssetKey(name) for name, at in wanted if at == pool and name in known]
            job.execute_in_process(
                asset_selection=keys, partition_key=pool, instance=self.instance,
                raise_on_error=False,
            )  # fmt: skip

    def requested(self) -> set[tuple[str, str | None]]:
        result = dg.evaluate_automation_conditions(
            self.definitions,
            instance=self.instance,
            asset_selection=dg.AssetSelection.all(),
            cursor=self.cursor,
        )
        self.cursor = result.cursor
        return {
            (key.path[-1], pool)
            for key in self.graph.get_all_asset_keys()
            for pool in result.get_requested_partitions(key)
        }

    def settle(self) -> list[set[tuple[str, str | None]]]:
        waves = []
        while wave := self.requested():
            waves.append(wave)
            self.run(wave)
        return waves


@pytest.fixture
def world():
    VERSIONS.clear()
    FAILING.clear()
    with dg.DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_a_change_of_one_pool_remakes_its_partition_and_no_other(world):
    VERSIONS.update(dict.fromkeys([(name, "longcot") for name in OF_A_POOL], "2"))
    world.observe("longcot", "2")

    waves = world.settle()

    names = ["live_documents", "live_covariates", "recommended_mixture", "report"]
    assert sorted(set.union(*waves)) == sorted((name, "longcot") for name in names)
    assert sum(map(len, waves)) == len(names)  # each once
    assert waves[-1] == {("report", "longcot")}


def test_equal_content_of_one_pool_ends_where_it_is_found_to_be_equal(world):
    world.observe("longcot", "2")

    assert world.settle() == [{("live_documents", "longcot")}]


def test_an_observation_of_the_same_content_asks_for_nothing_of_any_pool(world):
    world.observe("longcot", "1")

    assert world.settle() == []


def test_a_new_effect_model_remakes_the_recommendation_of_every_pool(world):
    VERSIONS["cate_model", None] = "2"
    world.run({("cate_model", None)})

    made = set.union(*world.settle())

    assert made == {
        (name, pool) for name in ("recommended_mixture", "report") for pool in SETTINGS.live_pools
    }


def test_a_failed_check_of_one_pool_stops_that_pool_alone(world):
    FAILING.add("longcot")
    VERSIONS.update({("live_documents", p): "2" for p in SETTINGS.live_pools})
    VERSIONS.update({("live_covariates", p): "2" for p in SETTINGS.live_pools})
    for pool in SETTINGS.live_pools:
        world.observe(pool, "2")

    made = set.union(*world.settle())

    below = {(n, p) for n, p in made if n in ("recommended_mixture", "report")}
    assert ("live_covariates", "longcot") in made
    assert {pool for _, pool in below} == {"web-2026w47"}


def test_with_one_pool_nothing_is_partitioned(tmp_path):
    graph = build_definitions(tmp_path / "none.yaml").resolve_asset_graph()

    assert not [k for k in graph.get_all_asset_keys() if graph.get(k).partitions_def]


def test_exactly_what_is_made_of_a_pool_has_partitions_with_its_checks(tmp_path):
    path = tmp_path / "causalmix.yaml"
    path.write_text("pools: {live: {a: data/a, b-2: data/b}}\n")

    graph = build_definitions(path).resolve_asset_graph()

    with_partitions = {k for k in graph.get_all_asset_keys() if graph.get(k).partitions_def}
    assert {key.path[-1] for key in with_partitions} == set(OF_A_POOL) & {
        key.path[-1] for key in graph.get_all_asset_keys()
    }
    for check in graph.asset_check_keys:
        assert bool(graph.get(check).partitions_def) == (check.asset_key in with_partitions)
    (definition,) = {graph.get(key).partitions_def for key in with_partitions}
    assert definition == dg.DynamicPartitionsDefinition(name=PARTITIONS_NAME)
