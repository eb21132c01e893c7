import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.belief import reach_of
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import kl_divergence
from causalmix_pipeline.core.policy import weighted_gain
from causalmix_pipeline.tables import baselines, fit, pareto, predict, recommend, recommend_in_full
from causalmix_pipeline_tests.small_tables import (
    COVARIATES,
    DOMAINS,
    EQUAL_D,
    METRICS,
    POOLS,
    RATIOS,
    RUNS,
    STATES,
    TOKENS,
    ridge_model,
    shares,
    state_columns,
)


@pytest.fixture(scope="module")
def model():
    return ridge_model()


def test_the_gain_is_the_weighted_mean_of_gains_with_its_interval(model):
    row = recommend(model, POOLS).row(0, named=True)
    mixture_D = np.array([row[d] for d in DOMAINS])

    both = pl.DataFrame({"run": ["x", "y"], **{
        d: [mixture_D[i], EQUAL_D[i]] for i, d in enumerate(DOMAINS)}})  # fmt: skip
    state = pl.DataFrame({"run": ["x", "y"], **state_columns(np.stack([STATES[0]] * 2))})
    x, y = predict(model, both, state).rows(named=True)
    predicted = {"loss": y["loss"] - x["loss"], "score": x["score"] - y["score"]}
    expected = sum(
        0.5 * (g * model.calibration[task].slope if g > 0 else g) for task, g in predicted.items()
    )
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


def test_the_trust_radius_shrinks_as_a_pool_lies_farther_out(model):
    states = [STATES[0] * scale for scale in np.linspace(1, 8, 60)]
    pools = pl.DataFrame({"pool": list(map(str, range(60))), **state_columns(states)})

    found = recommend(model, pools, constraints={"trust_radius": 0.1})

    reaches = [reach_of(model.runs, state_DP) for state_DP in states]
    assert found["verdict"].to_list() == [reach.verdict for reach in reaches]
    assert set(found["verdict"]) == {"supported", "extrapolating", "unsupported"}
    radius_M = [0 if r.verdict == "unsupported" else 0.1 / max(1, r.score) for r in reaches]
    np.testing.assert_allclose(kl_divergence(shares(found), EQUAL_D), radius_M, atol=2e-3)


def losses(model, found, metric):
    """What each pool's mixture is predicted to lose on a metric, one standard error added."""
    t = model.runs.tasks.index(metric)
    gains = [
        model.estimator.gain(state_DP, mixture_D[None], EQUAL_D)
        for state_DP, mixture_D in zip(STATES, shares(found), strict=True)
    ]
    return np.array([gain.se_MT[0, t] - gain.mean_MT[0, t] for gain in gains])


def test_guard_rails_hold_also_for_a_metric_without_weight(tmp_path):
    first = fit(
        RATIOS, METRICS, COVARIATES, maximize=["score"], weights={"loss": 1},
        estimator="structured_ridge",
    )  # fmt: skip
    file = tmp_path / "rails.yaml"
    file.write_text("guard_rails: {score: 0.1}\n")

    free, kept = recommend(first, POOLS), recommend(first, POOLS, constraints=file)

    assert losses(first, free, "score").max() > 0.2
    assert losses(first, kept, "score").max() <= 0.1 + 1e-9
    assert (kept["gain"] > 0).any()


def test_in_full_tells_the_slack_and_what_constraints_cost(model):
    limits = {"most_share": 0.4, "guard_rails": {"score": 0.0}}

    found = recommend_in_full(model, POOLS, constraints=limits)

    free = recommend(model, POOLS)
    assert found.mixtures.columns == free.columns
    assert found.unconstrained.select(DOMAINS).equals(free.select(DOMAINS))
    np.testing.assert_allclose(
        found.unconstrained["cost"], free["gain"] - found.mixtures["gain"], atol=1e-12
    )
    assert set(found.slack["constraint"]) == {
        *(f"{d}: most share" for d in DOMAINS), "score: guard rail"}  # fmt: skip
    assert found.slack.height == 5 * 4
    assert (found.slack["slack"] >= -1e-9).all()
    binding = set(found.slack.filter("binds")["pool"])
    assert binding >= set(found.unconstrained.filter(pl.col("cost") > 0.05)["pool"])
    assert found.only_reference == ()


def test_guard_rails_that_allow_nothing_keep_the_reference_and_say_so():
    """The one metric without weight is the negative of the other."""
    opposed = fit(
        RATIOS,
        METRICS.select("run", gain_of="score", loss_of="score"),
        COVARIATES,
        maximize=["gain_of"],
        weights={"gain_of": 1},
        estimator="structured_ridge",
    )

    found = recommend_in_full(opposed, POOLS, constraints={"guard_rails": {"loss_of": 0}})

    np.testing.assert_allclose(shares(found.mixtures), 1 / 3, atol=1e-9)
    assert found.only_reference == tuple("abcde")
    assert found.mixtures["gain"].to_list() == [0.0] * 5


def test_the_front_goes_from_the_best_in_one_metric_to_the_best_in_the_other(model):
    found = pareto(model, "loss", "score", POOLS, "c")

    ends = [
        fit(RATIOS, METRICS, COVARIATES, maximize=["score"], weights={name: 1},
            estimator="structured_ridge")
        for name in ("score", "loss")
    ]  # fmt: skip
    best = [recommend(end, POOLS.filter(pool="c"))["gain"][0] for end in ends]
    assert found.columns == [
        *DOMAINS, "gain_first", "gain_first_se", "gain_second", "gain_second_se"]  # fmt: skip
    assert found["gain_second"][0] == pytest.approx(best[0], abs=0.01)
    assert found["gain_first"][-1] == pytest.approx(best[1], abs=0.01)
    assert found["gain_first"].is_sorted()
    assert found["gain_second"].is_sorted(descending=True)
    assert found.height > 5
    far = pl.DataFrame({"pool": ["far"], **state_columns(STATES[:1] + 30)})
    for second, pools, pool, message in (
        ("speed", POOLS, None, "got speed"),
        ("score", POOLS, "z", "got z: correct the name"),
        ("score", far, None, "far is unsupported"),
    ):
        with pytest.raises(ConfigError, match=message):
            pareto(model, "loss", second, pools, pool)


def test_baselines_stand_beside_each_pool_with_predicted_gains(model, monkeypatch):
    monkeypatch.setattr("causalmix_pipeline.core.baselines.REGMIX_CANDIDATES", 2000)
    fixed = {"domain_0": 0.5, "domain_1": 0.5}

    found = baselines(model, TOKENS, reference="natural", fixed=fixed)

    ours = recommend(model, TOKENS, reference="natural")
    first = found.filter(pool="a")
    assert first["baseline"].to_list() == [
        "equal", "natural", "fixed", "grid", "regmix", "log_linear"]  # fmt: skip
    assert found.height == 5 * 6
    np.testing.assert_allclose(found.select(DOMAINS).to_numpy().sum(axis=1), 1)
    assert first.filter(baseline="natural")["gain"][0] == pytest.approx(0)
    assert first.filter(baseline="fixed").select(DOMAINS).row(0) == (0.5, 0.5, 0.0)
    assert (first["gain"] <= ours["gain"][0] + 0.05).all()
    assert (first["gain_lower"] <= first["gain"]).all()
    without = baselines(model, POOLS.head(1))
    assert "natural" not in without["baseline"].to_list()
    far = pl.DataFrame({"pool": ["far"], **state_columns(STATES[:1] + 30)})
    assert baselines(model, far)["gain"].null_count() == 4


def test_the_closed_form_is_offered_where_the_log_forest_answers(model):
    forest = fit(RATIOS, METRICS, COVARIATES, maximize=["score"], estimator="causal_forest_log")

    found = recommend(forest, POOLS, policy="analytical", constraints={"least_share": 0.02})

    member = forest.estimator._members[0][1]
    theta_D = member.effect(STATES[0]) @ np.array([0.5, 0.5])  # pyright: ignore[reportAttributeAccessIssue]
    by_hand_D = np.maximum(theta_D, 0) / np.maximum(theta_D, 0).sum()
    assert shares(found).min() >= 0.02 - 1e-9
    np.testing.assert_allclose(shares(found)[0], by_hand_D, atol=0.04)
    assert found["gain_lower"].null_count() == 5
    with pytest.raises(ConfigError, match="only causal_forest_log has, got structured_ridge"):
        recommend(model, POOLS, policy="analytical")


def test_an_estimator_without_errors_promises_no_interval():
    found = recommend(fit(RATIOS, METRICS, maximize=["score"], estimator="log_linear"))

    assert found.select("gain_lower", "gain_upper").row(0) == (None, None)
    assert found["gain"][0] > 0


def test_a_covariate_log2_parameters_is_the_size_of_the_model_and_none_of_the_pool():
    """Runs of two sizes: the pool's own size is asked for, and doubted beyond them."""

    def sized(frame, sizes):
        columns = {f"{d}__log2_parameters": pl.Series(sizes, dtype=pl.Float64) for d in DOMAINS}
        return frame.with_columns(**columns)

    sizes = np.where(np.unique(RUNS.state_ids, return_inverse=True)[1] % 2 == 0, 20, 22)
    model = fit(RATIOS, METRICS, sized(COVARIATES, sizes), estimator="structured_ridge")
    within, beyond = (recommend(model, sized(POOLS, [size] * 5)) for size in (21, 26))

    alone = [reach_of(ridge_model().runs, state_DP).score for state_DP in STATES]
    assert [reach_of(model.runs, np.column_stack([s, [26] * 3])).score for s in STATES] == alone
    assert set(within["verdict"]) == {"supported"}
    assert set(beyond["verdict"]) == {"extrapolating"}
    width = [(f["gain_upper"] - f["gain_lower"]).mean() for f in (within, beyond)]
    assert width[1] > 2 * width[0]
