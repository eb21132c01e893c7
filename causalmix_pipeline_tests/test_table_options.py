import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.tables import recommend
from causalmix_pipeline_tests.small_tables import POOLS, TOKENS, ridge_model, shares


@pytest.fixture(scope="module")
def model():
    return ridge_model()


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
    ({"constraints": {"guard_rails": {"speed": 0.1}}}, r"guard_rails.*got speed"),
    ({"constraints": {"guard_rails": {"score": -0.1}}}, r"guard_rails: score must be a number"),
    ({"policy": "guess"}, r"policy must be one of optimum, search, analytical"),
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
