"""The asset's tables and picture, and what of it the report shows for the live pool."""

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.assets.interpretation import effects_of, leaf_rows, live_interpretation
from causalmix_pipeline.assets.pictures import effect_map

TRUTH = SyntheticPool.draw(n_domains=4, n_covariates=2, n_tasks=2, seed=1)
RUNS = TRUTH.run_table(n_states=24, mixtures_per_state=4, noise=0.05, n_repeats=4, seed=2)
MODEL = {
    "chosen": dict.fromkeys(RUNS.tasks, "structured_ridge"),
    "parameters": {},
    "calibration": {},
    "seed": 0,
}
WEIGHTS = np.array([0.75, 0.25])
LEAF = {"n_states": 9, "effects": [0.1, 0.3, -0.1, 0.0], "spread": [0.0] * 4}
VALUE = {
    "domains": list(RUNS.domains),
    "columns": list(RUNS.covariate_columns),
    "weights": WEIGHTS.tolist(),
    "tree": {
        "explained": 0.5,
        "root": LEAF | {"column": 3, "threshold": 0.123456, "below": LEAF, "above": LEAF},
    },
    "importance": np.ones((8, 4)).tolist(),
}


def live(verdict: str = "supported", weights_T: np.ndarray = WEIGHTS):
    mixtures = {"recommended": [0.4, 0.3, 0.2, 0.1], "reference": [0.1, 0.2, 0.3, 0.4]}
    frame = pl.DataFrame({name: RUNS.state_NDP[0, :, p] for p, name in enumerate(RUNS.covariates)})
    recommended = {"mixtures": mixtures, "verdict": verdict}
    return live_interpretation(RUNS, MODEL, VALUE, recommended, frame, weights_T)


def test_the_curves_are_those_of_the_live_pool_over_its_reference():
    found = live()

    (curves,) = found.curves.values()
    reference_D = np.array([0.1, 0.2, 0.3, 0.4])
    last_D = np.array([0.1, 0.2, 0.3, 0.4])
    share = curves[3].share_M[-1]
    last_D = np.append(reference_D[:3] / 0.6 * (1 - share), share)
    effects = effects_of(RUNS, MODEL, WEIGHTS, reference_D)
    expected, _ = effects.gain(RUNS.state_NDP[0], last_D[None])
    assert curves[3].gain_M[-1] == pytest.approx(expected[0])
    assert found.triangle is not None
    assert found.triangle.domains == (0, 1, 2)
    assert found.tree == VALUE["tree"]


def test_only_tasks_that_count_are_asked():
    effects = effects_of(RUNS, MODEL, np.array([0.0, 1.0]), np.full(4, 0.25))

    assert effects.weights_T.tolist() == [1.0]
    assert effects.estimator.gain(
        RUNS.state_NDP[0], RUNS.mixture_ND[:2], np.full(4, 0.25)
    ).mean_MT.shape == (2, 1)


def test_where_no_gain_is_promised_no_curve_is_drawn():
    found = live("unsupported")

    assert found.curves == {}
    assert found.triangle is None
    assert found.tree is not None  # of the runs, not of the live pool


def test_what_was_made_with_other_task_weights_is_left_out():
    found = live(weights_T=np.array([0.5, 0.5]))

    assert found.tree is None
    assert found.importance_CD is None
    assert found.curves


def test_a_leaf_is_told_by_its_questions_and_what_to_add():
    rows = leaf_rows(VALUE)

    assert rows[0] == {
        "add": "domain_1", "gain": 0.3, "states": 9,
        "question 1": "domain_1__covariate_1 <= 0.123", "question 2": "", "question 3": "",
    }  # fmt: skip
    assert rows[1]["question 1"] == "domain_1__covariate_1 > 0.123"


def test_the_map_is_darkest_where_a_covariate_moves_most_and_runs_no_names():
    svg = effect_map(np.array([[0.1, 0.2], [0.05, 0.0]]), ["<b>", "y"], ["d" * 90, "e"])

    assert svg.count('class="bar"') == 4
    assert 'opacity="0.550"' in svg and 'opacity="0.000"' in svg
    assert "<b>" not in svg and "&lt;b&gt;" in svg
    assert "d" * 17 not in svg


def test_a_finished_project_shows_its_tree_and_its_covariates(finished):
    data = finished.parent / "data"

    value = read_value(data / "assets" / "cate_interpretation.parquet")

    assert sum(row["states"] for row in leaf_rows(value)) == value["tree"]["root"]["n_states"]
    assert np.array(value["importance"]).shape == (len(value["columns"]), len(value["domains"]))
    page = (data / "reports" / "report.html").read_text()
    assert "Which pools want what" in page
    assert "Which covariates matter" in page
