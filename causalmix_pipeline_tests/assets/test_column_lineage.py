"""Columns say where they come from and what they hold; assets say where their code is."""

import dagster as dg
import pytest

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.columns import describe_column
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.settings_file import load_settings


@pytest.mark.parametrize(
    "asset", ["live_covariates", "run_table", "baseline_mixtures", "training_export"]
)
def test_every_column_comes_from_columns_that_are_there(finished, asset):
    storage = load_settings(finished).data_path
    with ensure_instance(storage) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    lineage = event.asset_materialization.metadata["dagster/column_lineage"].value.deps_by_column
    frame = read_value(storage / "assets" / f"{asset}.parquet")

    assert set(lineage) == set(frame.columns)
    for deps in lineage.values():
        assert deps
        for dep in deps:
            path = storage / "assets" / f"{dep.asset_key.path[-1]}.parquet"
            assert dep.column_name in read_value(path).columns


@pytest.mark.parametrize(
    "asset", ["live_documents", "pool_states", "mixture_design", "proxy_runs", "run_table"]
)
def test_every_column_of_ours_is_described(finished, asset):
    frame = read_value(load_settings(finished).data_path / "assets" / f"{asset}.parquet")

    assert [name for name in frame.columns if describe_column(name) is None] == []


def test_a_users_own_column_has_no_description_and_a_quantile_has_its_metrics():
    assert describe_column("my_score") is None
    assert describe_column("mtld_p10") == f"10% quantile over tokens. {describe_column('mtld')}"
    assert describe_column("language_share_de") == "Share of the documents in the language."


def test_every_asset_that_runs_code_says_where_it_is(tmp_path):
    graph = build_definitions(tmp_path / "causalmix.yaml").resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        if graph.get(key).is_materializable:
            (place,) = graph.get(key).metadata["dagster/code_references"].value.code_references
            assert "causalmix_pipeline/assets/" in place.file_path, key
