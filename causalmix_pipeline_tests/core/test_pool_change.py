"""Two profiles of a pool: planted moves are found, their errors cover, what stays cancels."""

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.covariates import measure_covariates
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.pool_change import compare_profiles, covariate_errors

DOMAINS = ("code", "math")
COVARIATES = ("compress_ratio", "letter_share", "letter_share_p10", "log2_tokens",
              "duplicate_share")  # fmt: skip


def draw_pool(rng: np.random.Generator, n: int, first: int = 0, shift: float = 0.0) -> pl.DataFrame:
    """Documents `first` to `first + n` of each domain; long ones have a larger letter share."""
    frames = []
    for domain in DOMAINS:
        n_tokens = rng.lognormal(5, 0.8, n).astype(np.int64) + 1
        frames.append(
            pl.DataFrame(
                {
                    "document_id": [f"{domain}{i}" for i in range(first, first + n)],
                    "domain": domain,
                    "copies": rng.choice([1, 2, 5], n, p=[0.8, 0.15, 0.05]),
                    "augmented": False,
                    "n_tokens": n_tokens,
                    "compress_ratio": rng.normal(0.4, 0.1, n) + shift * (domain == "math"),
                    "letter_share": 0.5 + 0.02 * np.log(n_tokens) + rng.normal(0, 0.05, n),
                }
            )
        )
    return pl.concat(frames)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def row_of(frame: pl.DataFrame, domain: str, covariate: str) -> dict:
    return frame.row(by_predicate=(pl.col("domain") == domain) & (pl.col("covariate") == covariate),
                     named=True)  # fmt: skip


def test_a_planted_move_is_found_where_it_was_planted_and_nowhere_else(rng):
    before = draw_pool(rng, 400)

    change = compare_profiles(before, draw_pool(rng, 400, 400, shift=0.05), DOMAINS, COVARIATES)

    moved = change.moved()
    assert moved.select("domain", "covariate").rows() == [("math", "compress_ratio")]
    assert moved["difference"][0] == pytest.approx(0.05, abs=3 * moved["se"][0])
    assert moved["effect"][0] == pytest.approx(0.5, abs=3 * moved["effect_se"][0])
    assert change.to_frame().row(0, named=True)["covariate"] == "compress_ratio"


def test_an_unchanged_pool_moves_nothing_whatever_the_order_of_its_rows(rng):
    """Also where the mean is near 0, so that adding up in another order gives another mean."""
    before = draw_pool(rng, 300).with_columns(balance=rng.normal(size=600))
    balance = pl.col("balance") - pl.col("balance").dot("n_tokens") / pl.col("n_tokens").sum()
    before = before.with_columns(balance.over("domain"), copies=pl.lit(1), constant=pl.lit(0.0))
    after = before.sample(fraction=1, shuffle=True, seed=1)

    change = compare_profiles(before, after, DOMAINS, (*COVARIATES, "balance", "constant"))

    frame = change.to_frame()
    for column in ("difference", "se", "z"):
        assert frame[column].to_list() == [0.0] * 14
    assert change.moved(0.0001).height == 0
    assert change.documents.select("documents_in", "documents_out").sum().row(0) == (0, 0)


def test_differences_are_those_of_the_measured_covariates(rng):
    before, after = draw_pool(rng, 100), draw_pool(rng, 120, 60)

    frame = compare_profiles(before, after, DOMAINS, COVARIATES).to_frame()

    measured = [measure_covariates(pool, DOMAINS, COVARIATES) for pool in (before, after)]
    for d, domain in enumerate(DOMAINS):
        for p, covariate in enumerate(COVARIATES):
            row = row_of(frame, domain, covariate)
            assert row["before"] == pytest.approx(measured[0][d, p])
            assert row["difference"] == pytest.approx(measured[1][d, p] - measured[0][d, p])


def test_documents_and_tokens_in_and_out_add_up():
    columns = {"augmented": False, "compress_ratio": 0.5}
    before = pl.DataFrame({"document_id": ["a", "b", "c"], "domain": ["m", "m", "m"],
                           "copies": [1, 2, 1], "n_tokens": [10, 20, 30]})  # fmt: skip
    after = pl.DataFrame({"document_id": ["a", "b", "d"], "domain": ["m", "m", "m"],
                          "copies": [3, 1, 1], "n_tokens": [10, 20, 7]})  # fmt: skip
    frames = [f.with_columns(**{k: pl.lit(v) for k, v in columns.items()}) for f in (before, after)]

    change = compare_profiles(frames[0], frames[1], ["m"], ["compress_ratio"])
    row = change.documents.row(0, named=True)

    assert row == {
        "domain": "m", "documents_before": 3, "documents_after": 3, "documents_in": 1,
        "documents_out": 1, "documents_kept": 2, "tokens_before": 80, "tokens_after": 57,
        "tokens_in": 27, "tokens_out": 50,
    }  # fmt: skip


def test_the_error_of_a_mean_is_the_formula_by_hand():
    documents = pl.DataFrame({
        "document_id": ["a", "b", "c", "d"], "domain": "m", "copies": [1, 2, 1, 1],
        "augmented": [False, False, False, True], "n_tokens": [10, 20, 30, 99],
        "compress_ratio": [0.1, 0.4, 0.7, 9.0], "hes": [1.0, None, 3.0, None],
    })  # fmt: skip

    error_DP = covariate_errors(documents, ["m"], ["compress_ratio", "hes", "log2_tokens"])

    w, x = np.array([10, 40, 30]), np.array([0.1, 0.4, 0.7])
    mean = w @ x / w.sum()
    assert error_DP[0, 0] == pytest.approx(np.sqrt(np.sum(w**2 * (x - mean) ** 2)) / w.sum())
    assert error_DP[0, 1] == pytest.approx(np.sqrt((10 * 1.5) ** 2 + (30 * 0.5) ** 2) / 40)
    assert error_DP[0, 2] == pytest.approx(np.sqrt(1400) / 60 / np.log(2))


def test_errors_of_one_pool_are_the_spread_over_many_samples_of_it(rng):
    """All kinds of covariate against 400 samples drawn anew; sizes vary by Poisson."""
    pools = [draw_pool(rng, rng.poisson(250)) for _ in range(400)]
    like = (pl.col("letter_share") > 0.62).cast(pl.Float64)
    pools = [pool.with_columns(task_like_qa=like) for pool in pools]
    names = (*COVARIATES, "log2_task_like_qa")

    values_MDP = np.array([measure_covariates(pool, DOMAINS, names) for pool in pools])
    error_MDP = np.array([covariate_errors(pool, DOMAINS, names) for pool in pools])

    ratio_DP = np.sqrt((error_MDP**2).mean(axis=0)) / values_MDP.std(axis=0)
    assert ratio_DP == pytest.approx(np.ones_like(ratio_DP), abs=0.2)


@pytest.mark.parametrize("n_kept", [0, 150])
def test_nine_intervals_in_ten_hold_a_difference_of_nothing(rng, n_kept):
    """Pools of 200 documents of the same kind, none or most of them in both."""
    inside = []
    for _ in range(300):
        kept = [draw_pool(rng, n_kept)] if n_kept else []
        before = pl.concat([*kept, draw_pool(rng, 200 - n_kept, first=1000)])
        after = pl.concat([*kept, draw_pool(rng, 200 - n_kept, first=2000)])
        frame = compare_profiles(before, after, DOMAINS, COVARIATES).to_frame()
        inside.append(frame.sort("domain", "covariate")["z"].abs().to_numpy() <= Z90)

    coverage = np.mean(inside, axis=0)
    assert coverage.mean() == pytest.approx(0.9, abs=0.03)
    assert coverage.min() > 0.83


def test_documents_in_both_pools_make_a_difference_surer(rng):
    both = draw_pool(rng, 400)
    after = pl.concat([both, draw_pool(rng, 20, first=1000, shift=0.05)])

    row = row_of(compare_profiles(both, after, DOMAINS, COVARIATES).to_frame(), "math",
                 "compress_ratio")  # fmt: skip

    alone = covariate_errors(both, DOMAINS, COVARIATES)[1, 0]
    assert row["se"] < 0.3 * np.sqrt(2) * alone


def test_an_effect_is_counted_in_the_units_of_the_experiment_when_they_are_given(rng):
    scale_DP = np.full((2, 5), 0.025)

    change = compare_profiles(draw_pool(rng, 50), draw_pool(rng, 60, 50), DOMAINS, COVARIATES,
                              scale_DP=scale_DP)  # fmt: skip

    frame = change.to_frame()
    assert np.allclose(frame["effect"], frame["difference"] / 0.025)
    assert np.allclose(frame["effect_se"], frame["se"] / 0.025)
    assert frame["effect"].abs().is_sorted(descending=True)


def test_a_domain_that_went_is_named(rng):
    before = draw_pool(rng, 20)

    with pytest.raises(PoolError, match=r"'math' must have documents.*in the pool after .*code"):
        compare_profiles(before, before.filter(pl.col("domain") == "code"), DOMAINS, COVARIATES)


def test_what_only_a_sample_has_and_what_no_document_tells(rng):
    """A metric without a value in a pool has no move; a domain's own compression no error."""
    before, after = (
        draw_pool(rng, 20).with_columns(sample_compress_ratio=pl.lit(ratio)) for ratio in (0.3, 0.2)
    )
    after = after.with_columns(letter_share=pl.lit(None, pl.Float64))

    change = compare_profiles(before, after, DOMAINS, ["letter_share", "sample_compress_ratio"])

    frame = change.to_frame()
    metric = row_of(frame, "code", "letter_share")
    assert metric["after"] is None and metric["se"] is None and metric["z"] is None
    sample = row_of(frame, "code", "sample_compress_ratio")
    assert sample["difference"] == pytest.approx(-0.1)
    assert sample["se"] is None and sample["effect"] is None


def test_a_constant_that_became_another_moved_infinitely(rng):
    before, after = (draw_pool(rng, 20).with_columns(near_duplicate=pl.lit(v)) for v in (0.0, 1.0))

    change = compare_profiles(before, after, DOMAINS, ["near_duplicate"])

    assert change.moved().select("effect", "z").rows() == [(np.inf, np.inf)] * 2
