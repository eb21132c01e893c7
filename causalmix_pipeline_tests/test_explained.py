import re
from dataclasses import replace

import polars as pl
import pytest

from causalmix_pipeline.core.errors import CausalMixError, EstimationError
from causalmix_pipeline.explained import explain, pool_state
from causalmix_pipeline.tables import fit, recommend
from causalmix_pipeline_tests.small_tables import (
    COVARIATES,
    METRICS,
    POOLS,
    RATIOS,
    RUNS,
    blind_model,
    ridge_model,
)


@pytest.fixture(scope="module")
def model():
    return ridge_model()


@pytest.fixture(scope="module")
def blind():
    return blind_model()


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
    assert page.count("<polyline") == 3 * 3  # domains, and pools: mean, least and most
    assert page.count('class="uncertain') == 3 * 3
    assert page.count('class="point"') == 2 * RUNS.n_runs
    for words in (
        "Which covariates matter",
        "domain_1__covariate_1",
        "mixtures shuffled",
        "answers",
        "Do mixtures matter?",
        "gain of the recommended mixture over the equal mixture",
        "More runs: what they would bring can't be told".replace("'", "&#39;"),
    ):
        assert words in page


def test_without_covariates_the_page_leaves_them_out(blind):
    page = explain(blind)

    assert "Which covariates matter" not in page
    assert "Which pools want what" not in page
    assert "Three domains at once" in page
    assert "stack" in page


def test_runs_that_nobody_declared_randomised_are_told_as_observational(model):
    declared = replace(model, runs=replace(model.runs, observational_sources=("own",)))

    assert "Observational runs." not in explain(model)
    page = re.sub("<bdi[^>]*>own</bdi>", "own", explain(declared))
    assert re.search(r"Observational runs\.</b>\s+Those of own weren", page)


def test_the_page_is_for_the_pool_that_is_named(model):
    page = explain(model, pool_state(model, POOLS, "b"))

    gain = recommend(model, POOLS)["gain"][1]
    assert re.search(r'For the pool <bdi class="name" dir="auto" title="b">', page)
    assert f"{gain:+.3f}" in page
    assert "mean of the pool states" not in page


def test_a_pool_out_of_reach_is_promised_nothing_on_its_page(model):
    far = POOLS[:1].with_columns(pl.selectors.float() + 50)

    page = explain(model, pool_state(model, far))

    assert "no gain can be promised" in page
    assert page.count(">33%</td>") == 3
    assert "90% interval +" not in page
    assert "there is no gain to explain away" in page


def test_a_page_without_interval_shows_no_nan():
    page = explain(fit(RATIOS, METRICS, maximize=["score"], estimator="log_linear"))

    assert page.count("This estimator gives no interval") == 2
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


@pytest.mark.parametrize(
    ("pools", "name", "message"),
    [
        (POOLS, "z", r"pool must be one of pools.*\(a, b, c, d, e\), got z"),
        (POOLS, None, r"got none: name one"),
        (POOLS.drop("domain_0__covariate_0"), "a", r"domain_0__covariate_0"),
    ],
)
def test_a_pool_that_isnt_there_is_refused(model, pools, name, message):
    with pytest.raises(CausalMixError, match=message):
        pool_state(model, pools, name)


def test_a_model_without_covariates_takes_no_pool(blind):
    with pytest.raises(EstimationError, match="pools must be left out"):
        pool_state(blind, POOLS, "a")
