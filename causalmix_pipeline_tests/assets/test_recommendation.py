"""From runs with a known truth to a mixture; the reference where no run has been."""

import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.report_data import ReportData
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.assets import recommendation
from causalmix_pipeline.assets.recommendation import choose_mixture, interval
from causalmix_pipeline.assets.report import report_data
from causalmix_pipeline.assets.validation import larger_config, realised_gains
from causalmix_pipeline.core.belief import TOP_UP_RUNS
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.top_up import top_up_frame
from causalmix_pipeline.resources.settings import Settings

TRUTH = SyntheticPool.draw(n_domains=4, n_covariates=2, n_tasks=2, seed=1)
RUNS = TRUTH.run_table(n_states=24, mixtures_per_state=4, noise=0.05, n_repeats=4, seed=2)

NO_TOP_UPS = top_up_frame(RUNS, [], np.empty(0), np.empty(0), [])


def settings(**policy) -> Settings:
    tasks = [{"name": name, "path": "x", "weight": w} for name, w in zip("ab", (3, 1), strict=True)]
    runs_tasks = [dict(task, name=name) for task, name in zip(tasks, RUNS.tasks, strict=True)]
    return Settings.model_validate({"tasks": runs_tasks, "policy": policy})


def live(state_DP: np.ndarray) -> pl.DataFrame:
    frame = pl.DataFrame({"domain": RUNS.domains, "tokens": [10**6] * len(RUNS.domains)})
    return frame.with_columns(
        **{name: pl.Series(state_DP[:, p]) for p, name in enumerate(RUNS.covariates)}
    )


def baselines() -> pl.DataFrame:
    equal = [1 / len(RUNS.domains)] * len(RUNS.domains)
    return pl.DataFrame(
        {"domain": RUNS.domains, "equal": equal, "natural": equal, "reference": equal}
    )


def choose(state_DP: np.ndarray, top_ups: pl.DataFrame = NO_TOP_UPS, **policy) -> dict:
    chosen = dict.fromkeys(RUNS.tasks, "structured_ridge")
    model = {"chosen": chosen, "parameters": {}, "calibration": {}}
    return choose_mixture(settings(**policy), RUNS, model, live(state_DP), baselines(), top_ups)


def test_the_recommended_mixture_truly_gains_over_the_reference():
    state_DP = RUNS.state_NDP[0]

    value = choose(state_DP)

    best_D = np.array(value["mixtures"]["recommended"])
    reference_D = np.array(value["mixtures"]["reference"])
    true_T = TRUTH.expected_gain(state_DP, best_D[None], reference_D)[0]
    assert value["verdict"] == "supported"
    assert best_D.sum() == pytest.approx(1.0)
    assert true_T @ [0.75, 0.25] > 0
    assert value["gain"] > 0


def test_out_of_reach_the_reference_is_kept_nothing_promised_and_runs_offered():
    value = choose(RUNS.state_NDP[0] + 50)

    assert value["verdict"] == "unsupported"
    assert value["mixtures"]["recommended"] == value["mixtures"]["reference"]
    assert [row["gain"] for row in value["gains"]] == [None] * 4
    assert value["gain"] == 0
    assert value["low"] is value["high"] is None
    assert len(value["top_up"]) == TOP_UP_RUNS
    for row in value["top_up"]:
        assert sum(row.values()) == pytest.approx(1.0)


def test_a_top_up_makes_a_far_pool_supported_and_its_gain_known():
    """The runs planned at a pool out of reach, made: the reference is kept no more."""
    far_DP = RUNS.state_NDP[0] + 50
    before = choose(far_DP)
    mixture_ND = np.array([list(row.values()) for row in before["top_up"]])
    outcome_NT = TRUTH.expected_outcome(far_DP, mixture_ND)
    done = top_up_frame(
        RUNS,
        [f"top_up/far/{i:03d}" for i in range(len(mixture_ND))],
        np.repeat(far_DP[None], len(mixture_ND), axis=0),
        mixture_ND,
        [dict(zip(RUNS.tasks, row, strict=True)) for row in outcome_NT.tolist()],
    )

    after = choose(far_DP, done)

    assert after["verdict"] == "supported" and after["top_up"] == []
    assert after["overlap_score"] < 1 < before["overlap_score"]
    assert after["low"] is not None and after["mixtures"] != before["mixtures"]


def test_a_tighter_region_and_a_least_share_are_kept_to_and_told():
    value = choose(RUNS.state_NDP[0], trust_radius=0.02, least_share=0.05)

    best_D = np.array(value["mixtures"]["recommended"])
    assert best_D.min() >= 0.05 - 1e-9
    trust = next(row for row in value["slack"] if row["constraint"] == "trust region")
    assert trust["value"] <= 0.02 + 1e-9


def test_beyond_the_runs_the_radius_is_divided_by_the_distance():
    value = choose(RUNS.state_NDP[0] + 2.5, trust_radius=0.5)

    assert value["verdict"] == "extrapolating"
    trust = next(row for row in value["slack"] if row["constraint"] == "trust region")
    assert trust["limit"] == pytest.approx(0.5 / value["overlap_score"])
    assert value["budget_tokens"] == 4 * 10**6  # the live pool's tokens, where none is set


def test_the_same_seed_gives_the_same_recommendation():
    assert json.dumps(choose(RUNS.state_NDP[1])) == json.dumps(choose(RUNS.state_NDP[1]))


def test_weights_are_normalised_and_the_order_is_the_run_tables():
    assert recommendation.weights_of(settings(), RUNS).tolist() == [0.75, 0.25]


def test_a_guard_rail_is_kept_to_and_told():
    free = choose(RUNS.state_NDP[0], trust_radius=None)
    losing = min(free["task_gains"], key=lambda row: row["gain"])
    limit = round(max(-losing["gain"], 0.0) / 2, 4)

    value = choose(RUNS.state_NDP[0], trust_radius=None, guard_rails={losing["task"]: limit})

    row = next(r for r in value["slack"] if r["constraint"] == f"{losing['task']}: guard rail")
    assert row["value"] <= limit + 1e-9
    told = next(r for r in value["task_gains"] if r["task"] == losing["task"])
    assert told["gain"] >= -limit - 1e-9
    with pytest.raises(ValueError, match=r"policy.guard_rails must name tasks .*got 'speed'"):
        settings(guard_rails={"speed": 0.1})


def test_analytical_needs_the_forest_of_log_shares():
    with pytest.raises(ConfigError, match="only causal_forest_log has"):
        choose(RUNS.state_NDP[0], name="analytical")


def test_the_baselines_stand_in_a_table_with_the_reference():
    frame = live(RUNS.state_NDP[0]).with_columns(natural_share=pl.lit(0.25))
    project = SimpleNamespace(settings=settings(reference="natural"))

    found = recommendation.baseline_mixtures(project, frame, RUNS.to_frame()).value

    assert found.columns == [
        "domain", "equal", "natural", "grid", "regmix", "log_linear", "reference"]  # fmt: skip
    for name in found.columns[1:]:
        assert found[name].sum() == pytest.approx(1)


def test_an_unknown_interval_stays_unknown():
    assert interval(1.0, float("nan")) == {"gain": 1.0, "low": None, "high": None}
    assert interval(1.0, 1.0)["low"] == pytest.approx(1 - 1.645, abs=1e-3)


@pytest.mark.parametrize("shift", [0, 50])
def test_the_report_takes_what_was_recommended_supported_or_not(shift):
    state_DP = RUNS.state_NDP[0] + shift
    model = {
        "seed": 0,
        "out_of_fold": {t: RUNS.outcome_NT[:, i].tolist() for i, t in enumerate(RUNS.tasks)},
        "scores": [
            {"task": t, "estimator": "structured_ridge", "chosen": True, "r2_within": 0.9,
             "r2_within_se": 0.1, "spearman": 0.9, "spearman_se": 0.1, "coverage_90": None}
            for t in RUNS.tasks
        ],
    }  # fmt: skip
    signal = pl.DataFrame(
        [{"task": t, "mixture_variance": 1.0, "seed_variance": 0.1, "ratio": 10.0,
          "nats_per_token": 3.0, "unigram_nats": 5.0} for t in RUNS.tasks]
    )  # fmt: skip

    data = report_data(choose(state_DP), live(state_DP), RUNS, model, signal)

    assert isinstance(data, ReportData)
    assert (data.top_up is None) == (shift == 0)


def test_a_finished_project_has_its_mixture_export_and_report(finished):
    data = finished.parent / "data"
    mixture = json.loads((data / "export" / "mixture.json").read_text())
    value = read_value(data / "assets" / "recommended_mixture.parquet")

    shares = dict(zip(value["domains"], value["mixtures"]["recommended"], strict=True))
    assert mixture["weights"] == pytest.approx(shares)
    assert sum(shares.values()) == pytest.approx(1.0)
    manifest = pl.read_parquet(data / "export" / "manifest.parquet")
    read = manifest.group_by("domain").agg((pl.col("n_tokens") * pl.col("copies")).sum())
    total = value["budget_tokens"]
    for domain, tokens in read.iter_rows():
        assert tokens / total == pytest.approx(shares[domain], abs=0.05)
    page = (data / "reports" / "report.html").read_text()
    assert "<svg" in page
    assert "Do pool states matter?" in page


def test_realised_gains_are_paired_by_seed():
    """The seed moves every mixture alike here: the difference has no error."""
    seed_S = np.array([0.0, 1.0, 5.0])
    outcome_MST = (np.array([0.0, 0.3])[:, None] + seed_S)[:, :, None]

    frame = realised_gains(
        outcome_MST, ["reference", "recommended"], np.ones(1), {"recommended": 0.2}
    )

    assert frame["realised_gain"].to_list() == pytest.approx([0.0, 0.3])
    assert frame["realised_se"].to_list() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert frame["predicted_gain"].to_list() == [None, 0.2]


def test_the_validation_model_is_about_four_times_larger():
    config = ProxyConfig()

    ratio = larger_config(config).n_parameters / config.n_parameters
    assert 3 <= ratio <= 5
