import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.errors import CausalMixError, ConfigError, EstimationError
from causalmix_pipeline.tables import Model, fit, predict, recommend
from causalmix_pipeline_tests.small_tables import (
    COVARIATES,
    DOMAINS,
    EQUAL_D,
    METRICS,
    POOL,
    POOLS,
    RATIOS,
    RUNS,
    STATES,
    blind_model,
    ridge_model,
    shares,
    state_columns,
)


@pytest.fixture(scope="module")
def model():
    return ridge_model()


@pytest.fixture(scope="module")
def blind():
    return blind_model()


def test_predictions_are_in_the_metrics_own_units_and_in_the_order_asked(model):
    mixed = RATIOS[::-1].select("domain_2", "run", "domain_0", "domain_1")

    predicted = predict(model, mixed, COVARIATES.sample(fraction=1, shuffle=True, seed=1))

    assert predicted.columns == ["run", "loss", "score"]
    assert predicted["run"].to_list() == list(RUNS.run_ids[::-1])
    for metric in ("loss", "score"):
        observed = METRICS[metric].to_numpy()[::-1]
        assert np.corrcoef(predicted[metric].to_numpy(), observed)[0, 1] > 0.9
        assert abs(predicted[metric].mean() - observed.mean()) < 0.05


def test_permuting_rows_columns_and_domains_changes_nothing(model):
    rng = np.random.default_rng(0)

    def shuffled(frame):
        columns = [frame.columns[i] for i in rng.permutation(frame.width)]
        return frame.select(columns)[rng.permutation(frame.height)]

    other = fit(
        *map(shuffled, (RATIOS, METRICS, COVARIATES)),
        maximize=["score"],
        estimator="structured_ridge",
    )

    first, second = recommend(model, POOLS), recommend(other, shuffled(POOLS)).sort("pool")
    assert first.equals(second.select(first.columns))


def test_permuting_the_tables_changes_no_number_of_auto():
    rng = np.random.default_rng(1)
    runs = POOL.run_table(14, 3, noise=0.1, seed=8)
    tables = [
        pl.DataFrame({"run": runs.run_ids}).hstack(pl.DataFrame(values, schema=names))
        for values, names in (
            (runs.mixture_ND, list(runs.domains)),
            (runs.outcome_NT, list(runs.tasks)),
            (runs.state_NDP.reshape(runs.n_runs, -1), list(runs.covariate_columns)),
        )
    ]

    def shuffled(frame):
        columns = [frame.columns[i] for i in rng.permutation(frame.width)]
        return frame.select(columns)[rng.permutation(frame.height)]

    first, other = fit(*tables), fit(*map(shuffled, tables))

    assert other.chosen == first.chosen
    for ask in (lambda m: predict(m, RATIOS, COVARIATES), lambda m: recommend(m, POOLS[:1])):
        said, again = ask(first), ask(other)
        numbers = [name for name in said.columns if said[name].dtype.is_float()]
        np.testing.assert_allclose(
            again.select(numbers).fill_null(0.0), said.select(numbers).fill_null(0.0), atol=1e-9
        )


def test_a_saved_model_says_the_same_and_holds_no_code(model, blind, tmp_path):
    for name, one, x in (("model", model, COVARIATES), ("blind", blind, None)):
        one.save(tmp_path / name)
        loaded = Model.load(tmp_path / name)
        assert predict(loaded, RATIOS, x).equals(predict(one, RATIOS, x))
        assert {p.suffix for p in (tmp_path / name).iterdir()} == {".json", ".parquet"}
    assert recommend(loaded).equals(recommend(blind))


def test_a_damaged_model_is_refused(model, tmp_path):
    model.save(tmp_path)
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(EstimationError, match=r"model.json isn't what was written.*fit again"):
        Model.load(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(EstimationError, match="can't be read"):
        Model.load(tmp_path)
    (tmp_path / "model.json").write_text(text)
    replace(model, runs=model.runs.subset(range(30))).runs.to_frame().write_parquet(
        tmp_path / "runs.parquet"
    )
    with pytest.raises(EstimationError, match=r"runs.parquet can't be read"):
        Model.load(tmp_path)
    with pytest.raises(ConfigError, match=r"no model.json: fit first"):
        Model.load(tmp_path / "absent")


def test_json_of_a_model_is_plain(model, tmp_path):
    model.save(tmp_path)

    value = json.loads((tmp_path / "model.json").read_text(), parse_constant=pytest.fail)

    assert value["chosen"] == {"loss": "structured_ridge", "score": "structured_ridge"}


def test_auto_shows_all_estimators_and_answers_with_an_interval(blind):
    found = recommend(blind)

    assert set(blind.scores["estimator"]) == {
        "response_surface_blind", "regmix", "extra_trees", "log_linear", "stack"}  # fmt: skip
    assert set(blind.chosen.values()) <= {"response_surface_blind", "stack"}
    assert found["pool"].to_list() == ["all"]
    assert found["verdict"].to_list() == ["supported"]
    assert found["gain_lower"][0] < found["gain"][0] < found["gain_upper"][0]
    assert found["gain"][0] >= 0


def test_weights_and_directions_decide_what_is_wanted():
    options: dict[str, Any] = {"estimator": "structured_ridge"}
    first = fit(RATIOS, METRICS, COVARIATES, maximize=["score"], weights={"loss": 3}, **options)
    worst = fit(RATIOS, METRICS, COVARIATES, maximize=["loss"], weights={"loss": 1}, **options)

    best_D, worst_D = shares(recommend(first, POOLS))[0], shares(recommend(worst, POOLS))[0]

    gains = POOL.expected_gain(STATES[0], np.stack([best_D, worst_D]), EQUAL_D)[:, 0]
    assert gains[0] > 0 > gains[1]
    assert first.weights_T.tolist() == [1, 0]
    for weights in ({"speed": 1}, {"loss": -1}, {"loss": 0}, {"loss": float("nan")}):
        with pytest.raises(ConfigError, match="weights must"):
            fit(RATIOS, METRICS, COVARIATES, weights=weights, **options)


def test_metrics_named_as_losses_leave_the_others_as_scores():
    minimised = fit(RATIOS, METRICS, COVARIATES, minimize=["loss"], estimator="structured_ridge")

    assert minimised.sign_T.tolist() == [-1.0, 1.0]


def test_a_few_repeated_seeds_do_not_decide_which_estimator_answers():
    """One state a run but for four repeats: R2 over all runs decides, not that of the repeats."""
    runs = POOL.run_table(60, 1, noise=0.1, n_repeats=2, seed=9)
    ratios = pl.DataFrame(
        {"run": runs.run_ids, **{d: runs.mixture_ND[:, i] for i, d in enumerate(DOMAINS)}}
    )
    metrics = pl.DataFrame({"run": runs.run_ids, "score": runs.outcome_NT[:, 1]})
    covariates = pl.DataFrame({"run": runs.run_ids, **state_columns(runs.state_NDP)})

    found = fit(ratios, metrics, covariates, maximize=["score"])

    best = found.scores.filter(pl.col("coverage_90").is_not_null()).sort("r2")["estimator"][-1]
    assert found.chosen["score"] == best or found.chosen["score"] == "stack"
    chosen = found.scores.filter("chosen")["r2"][0]
    assert chosen >= found.scores.filter(estimator="structured_ridge")["r2"][0] - 1e-9


def test_too_few_runs_for_a_fold_are_told_before_anything_is_fitted():
    few = RATIOS.head(14)

    with pytest.raises(EstimationError, match="the tables have 14 runs; without the largest fold"):
        fit(few, METRICS.head(14), maximize=["score"])


def test_a_domain_named_like_a_result_is_refused():
    with pytest.raises(EstimationError, match="column 'gain' is also a column"):
        fit(RATIOS.rename({"domain_0": "gain"}), METRICS, maximize=["score"])


def test_covariates_are_asked_for_where_the_model_has_them(model):
    for call in (lambda: predict(model, RATIOS), lambda: recommend(model)):
        with pytest.raises(EstimationError, match=r"covariate_0, covariate_1.*got none"):
            call()
    with pytest.raises(CausalMixError, match="lacks 'run_00000'"):
        predict(model, RATIOS, COVARIATES[1:])
    with pytest.raises(ConfigError, match="estimator must be auto or one of"):
        fit(RATIOS, METRICS, estimator="oracle")
