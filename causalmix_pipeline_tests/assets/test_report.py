"""What the report adds to stored values: other task weights, the past, and their origins."""

import dagster as dg
import numpy as np
import pytest

from causalmix_pipeline.assets import other_weights as module
from causalmix_pipeline.assets.other_weights import other_weights
from causalmix_pipeline.assets.report_history import (
    INPUT_VERSION_TAG,
    REALISED,
    REALISED_SE,
    origins,
    recommendation_history,
)
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.live_pools import LivePool, live_pool
from causalmix_pipeline.resources.observation import (
    DATA_VERSION_TAG,
    EXPERIMENT_POOL,
    LIVE_POOL,
    observed_version,
)
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.assets.test_recommendation import RUNS, choose, live, settings

MODEL = {
    "chosen": dict.fromkeys(RUNS.tasks, "structured_ridge"),
    "parameters": {},
    "calibration": {},
}


def weighed(state_DP: np.ndarray, project: Settings | None = None):
    recommended = choose(state_DP)
    return other_weights(project or settings(), RUNS, MODEL, recommended, live(state_DP))


def test_the_first_of_the_other_weights_is_the_recommendation_itself():
    state_DP = RUNS.state_NDP[0]
    recommended = choose(state_DP)

    found = weighed(state_DP)

    assert found is not None
    assert found.weights_WT[0] == pytest.approx([0.75, 0.25])
    assert found.mixture_WD[0] == pytest.approx(recommended["mixtures"]["recommended"])
    ends = [recommended[name] for name in ("gain", "low", "high")]
    assert found.total_W3[0] == pytest.approx(ends)
    gains = [row["gain"] for row in recommended["task_gains"]]
    assert found.gain_WT3[0, :, 0] == pytest.approx(gains)


def test_more_weight_on_a_task_gives_it_no_smaller_gain_and_the_same_each_time():
    found, again = weighed(RUNS.state_NDP[0]), weighed(RUNS.state_NDP[0])

    assert found is not None and again is not None
    assert (found.mixture_WD == again.mixture_WD).all()
    for t in range(2):
        most = int(np.argmax(found.weights_WT[:, t]))
        assert found.gain_WT3[most, t, 0] >= found.gain_WT3[0, t, 0] - 1e-6


def test_nothing_is_offered_where_nothing_can_be_chosen():
    assert weighed(RUNS.state_NDP[0] + 50) is None  # the reference is kept


def test_other_policies_get_no_mixtures_of_another_one():
    state_DP = RUNS.state_NDP[0]
    recommended = {**choose(state_DP), "policy": "search"}

    found = other_weights(settings(name="search"), RUNS, MODEL, recommended, live(state_DP))

    assert found is None


def test_estimators_of_all_tasks_are_fitted_once(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("fitted twice")

    monkeypatch.setattr(module, "fit_chosen", refuse)

    assert weighed(RUNS.state_NDP[0]) is not None


def made(version: str, gain: float, pool: str | None = None) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        "recommended_mixture",
        partition=pool,
        tags={DATA_VERSION_TAG: version},
        metadata={
            "verdict": "supported",
            "gain": gain,
            "gain, low end of 90% interval": gain - 0.1,
            "gain, high end of 90% interval": gain + 0.1,
        },
    )


def validated(version: str) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        "validation_runs",
        tags={f"{INPUT_VERSION_TAG}recommended_mixture": version},
        metadata={REALISED: 0.25, REALISED_SE: 0.02},
    )


def test_the_history_has_each_new_recommendation_and_what_was_realised_of_it(tmp_path):
    pool = LivePool(None, tmp_path, tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        assert recommendation_history(instance, Settings(), pool).is_empty()
        for event in (made("a", 0.2), validated("a"), made("a", 0.2), made("b", 0.3)):
            instance.report_runless_asset_event(event)

        history = recommendation_history(instance, Settings(), pool)

    assert history["gain"].to_list() == [0.2, 0.3]
    assert history["low"].to_list() == pytest.approx([0.1, 0.2])
    assert history["realised"].to_list() == [0.25, None]
    assert history["realised_se"].to_list() == [0.02, None]
    assert history["made_at"].str.contains(r"^\d{4}-\d\d-\d\d \d\d:\d\d UTC$").all()


def test_the_history_of_a_pool_is_its_own(tmp_path):
    with dg.DagsterInstance.ephemeral() as instance:
        for event in (made("a", 0.2, "web"), made("b", 0.3, "books")):
            instance.report_runless_asset_event(event)

        gains = [
            recommendation_history(instance, Settings(), LivePool(name, tmp_path, tmp_path))["gain"]
            for name in ("web", "books", None)
        ]

    assert [column.to_list() for column in gains] == [[0.2], [0.3], []]


def test_a_finished_project_tells_where_its_report_comes_from(finished):
    project = load_settings(finished)
    with ensure_instance(project.data_path) as instance:
        pool = live_pool(project, None)
        told = origins(instance, project, pool)
        history = recommendation_history(instance, project, pool)
        versions = [observed_version(instance, key) for key in (EXPERIMENT_POOL, LIVE_POOL)]

    reports = project.data_path / "reports"
    page, short = ((reports / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert [told["experiment pool"], told["live pool"]] == versions
    assert history.height == 1
    for value in (*versions, told["settings"], told["dagster"], history["made_at"][0]):
        assert str(value) in page
    assert told["live pool"] in short
    assert "Predicted against realised over time" in page
    assert 'id="what-if"' in page
