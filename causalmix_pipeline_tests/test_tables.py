import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.errors import CausalMixError, ConfigError, EstimationError
from causalmix_pipeline.core.mixture import kl_divergence
from causalmix_pipeline.core.policy import weighted_gain
from causalmix_pipeline.explained import explain
from causalmix_pipeline.tables import Model, fit, predict, recommend

POOL = SyntheticPool.draw(3, 2, 2, seed=1)
RUNS = POOL.run_table(16, 4, noise=0.1, n_repeats=3, seed=4)
DOMAINS = list(RUNS.domains)
EQUAL_D = np.full(3, 1 / 3)
RATIOS = pl.DataFrame(
    {"run": RUNS.run_ids, **{d: RUNS.mixture_ND[:, i] for i, d in enumerate(DOMAINS)}}
)
#: Task 0 as a loss, task 1 as a score.
METRICS = pl.DataFrame(
    {"run": RUNS.run_ids, "loss": 9 - RUNS.outcome_NT[:, 0], "score": RUNS.outcome_NT[:, 1]}
)


def state_columns(state_NDP):
    flat_NC = np.asarray(state_NDP).reshape(len(state_NDP), -1)
    return {name: flat_NC[:, c] for c, name in enumerate(RUNS.covariate_columns)}


COVARIATES = pl.DataFrame({"run": RUNS.run_ids, **state_columns(RUNS.state_NDP)})
STATES = POOL.draw_states(5, np.random.default_rng(3)) * 0.5
POOLS = pl.DataFrame({"pool": list("abcde"), **state_columns(STATES)})
TOKENS = POOLS.with_columns(
    pl.lit(tokens).alias(f"{d}__tokens") for d, tokens in zip(DOMAINS, (1e6, 2e6, 5e6), strict=True)
)


@pytest.fixture(scope="module")
def model():
    return fit(RATIOS, METRICS, COVARIATES, maximize=["score"], estimator="structured_ridge")


@pytest.fixture(scope="module")
def blind():
    """Without covariates, chosen by `auto`."""
    return fit(RATIOS, METRICS, maximize=["score"])


def shares(frame):
    return frame.select(DOMAINS).to_numpy()


def test_predictions_are_in_the_metrics_own_units_and_in_the_order_asked(model):
    mixed = RATIOS[::-1].select("domain_2", "run", "domain_0", "domain_1")

    predicted = predict(model, mixed, COVARIATES.sample(fraction=1, shuffle=True, seed=1))

    assert predicted.columns == ["run", "loss", "score"]
    assert predicted["run"].to_list() == list(RUNS.run_ids[::-1])
    for metric in ("loss", "score"):
        observed = METRICS[metric].to_numpy()[::-1]
        assert np.corrcoef(predicted[metric].to_numpy(), observed)[0, 1] > 0.9
        assert abs(predicted[metric].mean() - observed.mean()) < 0.05


def test_the_gain_is_the_weighted_mean_of_gains_with_its_interval(model):
    row = recommend(model, POOLS).row(0, named=True)
    mixture_D = np.array([row[d] for d in DOMAINS])

    both = pl.DataFrame({"run": ["x", "y"], **{
        d: [mixture_D[i], EQUAL_D[i]] for i, d in enumerate(DOMAINS)}})  # fmt: skip
    state = pl.DataFrame({"run": ["x", "y"], **state_columns(np.stack([STATES[0]] * 2))})
    x, y = predict(model, both, state).rows(named=True)
    expected = 0.5 * (y["loss"] - x["loss"]) + 0.5 * (x["score"] - y["score"])
    assert row["gain"] == pytest.approx(expected)
    _, se_M = weighted_gain(
        model.estimator, STATES[0], mixture_D[None], EQUAL_D, np.array([0.5, 0.5])
    )
    assert row["gain_upper"] - row["gain"] == pytest.approx(Z90 * se_M[0])
    assert row["gain"] - row["gain_lower"] == pytest.approx(Z90 * se_M[0])


def test_recommended_mixtures_are_nearly_the_best_there_are(model):
    found = recommend(model, POOLS)
    candidates = np.random.default_rng(0).dirichlet(np.ones(3) * 0.7, size=3000)

    assert found["verdict"].to_list() == ["supported"] * 5
    for state_DP, mixture_D in zip(STATES, shares(found), strict=True):
        assert mixture_D.sum() == pytest.approx(1)
        gain_M, se_M = weighted_gain(
            model.estimator,
            state_DP,
            np.vstack([mixture_D, candidates]),
            EQUAL_D,
            np.array([0.5, 0.5]),
        )
        bound_M = gain_M - se_M
        assert bound_M[0] >= bound_M[1:].max() - 1e-3


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
    options = {"estimator": "structured_ridge"}
    first = fit(RATIOS, METRICS, COVARIATES, maximize=["score"], weights={"loss": 3}, **options)
    worst = fit(RATIOS, METRICS, COVARIATES, maximize=["loss"], weights={"loss": 1}, **options)

    best_D, worst_D = shares(recommend(first, POOLS))[0], shares(recommend(worst, POOLS))[0]

    gains = POOL.expected_gain(STATES[0], np.stack([best_D, worst_D]), EQUAL_D)[:, 0]
    assert gains[0] > 0 > gains[1]
    assert first.weights_T.tolist() == [1, 0]
    for weights in ({"speed": 1}, {"loss": -1}, {"loss": 0}, {"loss": float("nan")}):
        with pytest.raises(ConfigError, match="weights must"):
            fit(RATIOS, METRICS, COVARIATES, weights=weights, **options)


def test_a_pool_out_of_reach_keeps_the_reference(model):
    far = pl.DataFrame({"pool": ["far"], **state_columns(STATES[:1] + 30)})

    row = recommend(model, far, reference={"domain_0": 0.5, "domain_1": 0.5}).row(0, named=True)

    assert [row[d] for d in DOMAINS] == [0.5, 0.5, 0]
    assert (row["gain"], row["gain_lower"], row["gain_upper"]) == (0.0, None, None)
    assert row["verdict"] == "unsupported"


def test_a_pool_out_of_reach_still_keeps_to_the_constraints(model):
    far = pl.DataFrame({"pool": ["far"], **state_columns(STATES[:1] + 30)})

    row = recommend(model, far, constraints={"frozen": {"domain_1": 0.05}}).row(0, named=True)

    assert row["domain_1"] == pytest.approx(0.05)
    assert row["domain_0"] == pytest.approx(row["domain_2"])
    assert (row["gain"], row["verdict"]) == (None, "unsupported")


def test_a_domain_without_text_gets_no_share(model):
    empty = TOKENS.with_columns(pl.lit(0.0).alias("domain_1__tokens"))

    found = recommend(model, empty, reference="natural")

    assert found["domain_1"].to_list() == [0.0] * 5
    with pytest.raises(ConfigError, match="budget_tokens must be above 0"):
        recommend(model, TOKENS, constraints={"budget_tokens": 0})


def test_numbers_that_yaml_takes_for_text_are_numbers(model, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("budget_tokens: 1e6\nmax_epochs: 1\n")

    found = recommend(model, TOKENS, constraints=rules)

    assert (found["domain_0"] <= 1 + 1e-9).all()
    assert recommend(model, TOKENS, constraints={"budget_tokens": 1e6, "max_epochs": 1}).equals(
        found
    )


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


def test_a_pool_nearly_out_of_reach_gets_half_the_trust_radius(model):
    states = [STATES[0] * scale for scale in np.linspace(1, 8, 60)]
    pools = pl.DataFrame({"pool": list(map(str, range(60))), **state_columns(states)})

    found = recommend(model, pools, constraints={"trust_radius": 0.1})

    distance_M = kl_divergence(shares(found), EQUAL_D)
    for verdict, radius in (("supported", 0.1), ("extrapolating", 0.05), ("unsupported", 0.0)):
        inside = (found["verdict"] == verdict).to_numpy()
        assert inside.any(), verdict
        assert distance_M[inside].max() == pytest.approx(radius, abs=2e-3)


def test_constraints_hold(model, tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text(
        "least_share: {domain_1: .2}\nmost_share: .6\nfrozen: {domain_2: .25}\n"
        "budget_tokens: 10_000_000\nmax_epochs: 4\n"
    )

    found = shares(recommend(model, TOKENS, reference="natural", constraints=file))

    assert np.abs(found[:, 2] - 0.25).max() < 1e-9
    assert found[:, 1].min() > 0.2 - 1e-9
    assert found.max() < 0.6 + 1e-9
    assert found[:, 0].max() < 0.4 + 1e-9  # four times a million of ten


BAD_OPTIONS = [
    ({"policy": "guess"}, r"policy must be one of optimum, search"),
    ({"reference": "natural"}, r"needs the tokens of each domain"),
    ({"reference": "absent.csv"}, r"no such file"),
    ({"reference": {"domain_0": 0.7}}, r"sum 0.7: divide"),
    ({"reference": {"prose": 1}}, r"got prose"),
    ({"constraints": {"least": 0.1}}, r"must name only least_share.*got least"),
    ({"constraints": {"least_share": 0.5}}, r"sums to 1.5"),
    ({"constraints": {"most_share": "half"}}, r"most_share must be a number.*'half'"),
    ({"constraints": {"frozen": {"prose": 0.1}}}, r"frozen.*got prose"),
    ({"constraints": {"budget_tokens": 5}}, r"budget_tokens needs the tokens"),
    ({"constraints": "absent.yaml"}, r"no such file"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_cant_be_met_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        recommend(model, POOLS, **options)


def test_covariates_are_asked_for_where_the_model_has_them(model):
    for call in (lambda: predict(model, RATIOS), lambda: recommend(model)):
        with pytest.raises(EstimationError, match=r"covariate_0, covariate_1.*got none"):
            call()
    with pytest.raises(CausalMixError, match="lacks 'run_00000'"):
        predict(model, RATIOS, COVARIATES[1:])
    with pytest.raises(ConfigError, match="estimator must be auto or one of"):
        fit(RATIOS, METRICS, estimator="oracle")


def test_an_estimator_without_errors_promises_no_interval():
    found = recommend(fit(RATIOS, METRICS, maximize=["score"], estimator="log_linear"))

    assert found.select("gain_lower", "gain_upper").row(0) == (None, None)
    assert found["gain"][0] > 0


def test_the_page_shows_everything_and_runs_no_text_from_tables(tmp_path):
    name = "<script>alert(1)</script>"
    hostile = fit(
        RATIOS.rename({"domain_0": name}),
        METRICS.rename({"loss": name}),
        COVARIATES.rename({c: c.replace("domain_0__", f"{name}__") for c in COVARIATES.columns}),
        maximize=["score"],
        estimator="structured_ridge",
    )

    page = explain(hostile)

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<polyline") == 3
    assert page.count('class="uncertain"') == 3
    assert page.count('class="point"') == 2 * RUNS.n_runs
    for words in (
        "Which covariates matter",
        "domain_1__covariate_1",
        "mixtures shuffled",
        "answers",
    ):
        assert words in page


def test_without_covariates_the_page_leaves_them_out(blind):
    page = explain(blind)

    assert "Which covariates matter" not in page
    assert "stack" in page


def test_json_of_a_model_is_plain(model, tmp_path):
    model.save(tmp_path)

    value = json.loads((tmp_path / "model.json").read_text(), parse_constant=pytest.fail)

    assert value["chosen"] == {"loss": "structured_ridge", "score": "structured_ridge"}
