"""Validation trains on request, on the pool that was profiled, and keeps what it trained."""

import dagster as dg
import pytest

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.report_history import recommendation_history
from causalmix_pipeline.automation.jobs import VALIDATION
from causalmix_pipeline.automation.staleness import materialise, refresh
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.live_pools import live_pool
from causalmix_pipeline.resources.settings_file import load_settings


def test_predicted_stands_beside_realised_for_every_mixture(finished):
    data, definitions = finished.parent / "data", build_definitions(finished)

    with ensure_instance(load_settings(finished).data_path) as instance:
        refresh(definitions, instance, VALIDATION)
        frame = read_value(data / "assets" / "validation_runs.parquet")
        materialise(definitions, instance, [dg.AssetKey("validation_runs")])
        again = instance.get_latest_materialization_event(dg.AssetKey("validation_runs"))
        settings = load_settings(finished)
        history = recommendation_history(instance, settings, live_pool(settings, None))

    names = ["equal", "grid", "log_linear", "natural", "recommended", "reference", "regmix"]
    assert sorted(frame["mixture"].to_list()) == names
    of = {row["mixture"]: row for row in frame.to_dicts()}
    assert of["reference"]["realised_gain"] == of["reference"]["predicted_gain"] == 0
    # The reference is the natural mixture here: the same runs, trained once.
    assert of["natural"]["bits_per_byte"] == of["reference"]["bits_per_byte"]
    assert again.asset_materialization.metadata["trained now"].value == 0
    assert history["realised"].to_list() == [of["recommended"]["realised_gain"]]


def test_a_pool_that_changed_since_its_profile_is_refused(finished):
    (finished.parent / "live" / "math" / "short.jsonl").unlink()

    with (
        ensure_instance(load_settings(finished).data_path) as instance,
        pytest.raises(PoolError, match="must be as it was when it was profiled"),
    ):
        refresh(build_definitions(finished), instance, VALIDATION)
