"""Covariates: measured as by hand, on the experiment's scale, refused on another."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.core.covariates import (
    DOMAIN_COVARIATES,
    METRICS,
    CovariateMeter,
    Normaliser,
    check_covariate_names,
    covariates_of,
    measure_covariates,
    metrics_of,
    tasks_asked,
    weighted_quantile,
)
from causalmix_pipeline.core.errors import PoolError

SIZES = ("log2_tokens", "duplicate_share")


def tiny_frame() -> pl.DataFrame:
    """Domain a: documents of 8 and 24 tokens, the first twice; domain b: one of 16 tokens."""
    values = {metric: [1.0, 2.0, 5.0, 99.0] for metric in METRICS}
    return pl.DataFrame(
        {
            "document_id": ["d0", "d1", "d2", "t0"],
            "domain": ["a", "a", "b", "a"],
            "copies": [2, 1, 1, 1],
            "augmented": [False, False, False, True],
            "n_tokens": [8, 24, 16, 8],
            "language": ["en", "de", "en", "en"],
            **values,
        }
    )


def test_covariates_are_the_token_weighted_means_by_hand():
    values_DP = measure_covariates(tiny_frame(), ["a", "b"], [*METRICS, *SIZES])

    by_hand = (8 * 2 * 1.0 + 24 * 2.0) / (8 * 2 + 24)
    np.testing.assert_allclose(values_DP[0, : len(METRICS)], by_hand)
    assert values_DP[0, -2] == pytest.approx(np.log2(32))
    assert values_DP[0, -1] == pytest.approx(1 - 32 / 40)
    np.testing.assert_allclose(values_DP[1], [5.0] * len(METRICS) + [4.0, 0.0])


def test_a_sub_pool_is_measured_with_its_own_copies_and_twins():
    meter = CovariateMeter.of(tiny_frame(), ["b", "a"], ["mtld", *SIZES])

    values_DP = meter.measure(np.array([1, 2, 3]), np.array([1, 3, 2]))

    np.testing.assert_allclose(values_DP[0], [5.0, 4.0, 1 - 1 / 3])
    np.testing.assert_allclose(values_DP[1, 0], (24 * 2.0 + 8 * 2 * 99.0) / 40)
    assert values_DP[1, -1] == pytest.approx(1 - 32 / 40)


def test_the_share_of_a_language_is_weighted_by_tokens():
    values_DP = measure_covariates(tiny_frame(), ["a", "b"], ["language_share_de"])

    np.testing.assert_allclose(values_DP[:, 0], [24 / 40, 0.0])


def test_likeness_to_a_task_is_the_log_of_the_share_of_tokens_and_no_share_is_finite():
    frame = tiny_frame().with_columns(task_like_qa_p10=pl.Series([1.0, 0.0, 0.0, 1.0]))

    values_DP = measure_covariates(frame, ["a", "b"], ["log2_task_like_qa_p10"])

    np.testing.assert_allclose(values_DP[:, 0], np.log2([0.01 + 16 / 40, 0.01]))
    assert "log2_task_like_qa_p10" in covariates_of(frame)
    assert "task_like_qa_p10" not in covariates_of(frame)


def test_tasks_are_read_off_the_covariates_once():
    names = ["log2_tokens", "log2_task_like_b", "log2_task_like_a", "log2_task_like_b"]

    assert tasks_asked(names) == ["b", "a"]
    assert check_covariate_names(names) is None
    assert check_covariate_names(["log2_task_like_"]) == "log2_task_like_"
    assert check_covariate_names(["task_like_a"]) == "task_like_a"


def test_quantiles_are_those_of_the_tokens():
    values_DP = measure_covariates(tiny_frame(), ["a"], ["mtld_p10", "mtld_p50", "mtld_p90"])

    np.testing.assert_array_equal(values_DP[0], [1.0, 2.0, 2.0])  # 16 of 40 tokens are at 1


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32 - 1),
)
def test_a_weighted_quantile_has_its_share_below_and_the_rest_above(values, share, seed):
    weights = np.random.default_rng(seed).uniform(0.5, 2, len(values))
    found = weighted_quantile(np.array(values), weights, share)

    assert weights[np.array(values) <= found].sum() >= share * weights.sum() * (1 - 1e-12)
    assert weights[np.array(values) < found].sum() <= share * weights.sum() * (1 + 1e-12)


def test_documents_without_a_value_are_left_out_of_its_mean():
    """A model scores a sample; the mean is that of the sample."""
    frame = tiny_frame().with_columns(hes=pl.Series([None, 3.0, 4.0, None], dtype=pl.Float64))

    values_DP = measure_covariates(frame, ["a", "b"], ["hes", "mtld"])

    np.testing.assert_allclose(values_DP[:, 0], [3.0, 4.0])
    np.testing.assert_allclose(values_DP[0, 1], 64 / 40)


def test_a_sub_pool_outside_the_sample_has_the_domains_mean():
    frame = tiny_frame().with_columns(hes=pl.Series([None, 3.0, 4.0, None], dtype=pl.Float64))
    meter = CovariateMeter.of(frame, ["a", "b"], ["hes"])

    values_DP = meter.measure(np.array([0, 2]), np.array([1, 1]))

    np.testing.assert_allclose(values_DP[:, 0], [3.0, 4.0])


def test_a_domain_without_any_value_has_none():
    frame = tiny_frame().with_columns(ifd=pl.Series([0.5, 0.5, None, None], dtype=pl.Float64))

    values_DP = measure_covariates(frame, ["a", "b"], ["ifd"])

    assert values_DP[0, 0] == 0.5 and np.isnan(values_DP[1, 0])


def test_every_metric_of_a_frame_is_offered_and_the_users_own_come_last():
    frame = tiny_frame().with_columns(zeal=pl.lit(1.0), effort=pl.lit(2.0))

    assert metrics_of(frame) == (*METRICS, "effort", "zeal")
    assert covariates_of(frame) == (
        *METRICS, "effort", "zeal", "language_share_de", "language_share_en", *DOMAIN_COVARIATES,
    )  # fmt: skip


def test_a_domain_that_a_pool_lacks_cannot_be_measured():
    with pytest.raises(PoolError, match="domain 'law' has no usable document"):
        measure_covariates(tiny_frame(), ["a", "law"], ["mtld"])


def test_a_metric_that_was_not_measured_is_named_with_the_way_out():
    with pytest.raises(PoolError, match=r"got 'hes', which isn't.*profile\.lm"):
        measure_covariates(tiny_frame(), ["a"], ["hes"])


@pytest.mark.parametrize(
    "name", ["mtld", "mtld_p90", "language_share_fr", "duplicate_share", "stars", "stars_p10"]
)
def test_known_covariates_pass(name):
    assert check_covariate_names([name], ["stars"]) is None


@pytest.mark.parametrize("name", ["mtdl", "log2_tokens_p10", "language_share_", "stars", "_p10"])
def test_a_name_that_no_pool_can_have_is_found(name):
    assert check_covariate_names(["mtld", name]) == name


# Normaliser


def fitted(scorers: tuple[str, ...] = ("a-v1", "b-v1")) -> tuple[Normaliser, np.ndarray]:
    values_MDP = np.random.default_rng(0).normal(5, 3, size=(64, 2, 3))
    values_MDP[:, 1, 2] = 7.0
    return Normaliser.fit(values_MDP, ["x", "y"], ["p", "q", "r"], scorers), values_MDP


def test_the_normaliser_gives_each_covariate_mean_0_and_deviation_1():
    normaliser, values_MDP = fitted()
    scaled = normaliser.scale(values_MDP)

    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(axis=0)[0], 1)
    np.testing.assert_array_equal(scaled[:, 1, 2], 0)  # it never varies: scale 1, no division by 0


def test_a_normaliser_survives_json_and_its_version_follows_its_numbers_and_scorers():
    normaliser, _ = fitted()
    again = Normaliser.from_dict(normaliser.to_dict())

    assert again.version == normaliser.version
    assert fitted(("a-v1", "b-v2"))[0].version != normaliser.version


def test_a_pool_scored_by_another_version_is_refused():
    normaliser, _ = fitted()

    normaliser.check_scorers(["b-v1", "a-v1", "more-v1"], "the live pool")
    with pytest.raises(PoolError, match=r"the live pool must be profiled as .*b-v1, this b-v2"):
        normaliser.check_scorers(["a-v1", "b-v2"], "the live pool")
