"""The checkpoint of a running training, as people write it down."""

from __future__ import annotations

import json

import numpy as np
import pytest

from causalmix_pipeline.adapters.checkpoint_file import checkpoint_frame, read_checkpoint
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline_tests.core.staged_truth import DOMAINS, staged_truth

ROWS = {"fraction": 0.5, "domains": {"a": {"loss": 3.0, "slope": -1}, "b": {"loss": 2.5}}}


def test_a_proxy_s_own_checkpoint_reads_back_from_csv(tmp_path):
    staged = staged_truth(n_stages=3, n_runs=8)
    run_id = staged.runs.run_ids[3]
    checkpoint_frame(staged, run_id, 2).reverse().write_csv(tmp_path / "checkpoint.csv")

    found = read_checkpoint(tmp_path / "checkpoint.csv", DOMAINS)

    assert found.fraction == pytest.approx(2 / 3)
    assert found.loss_D == pytest.approx(staged.loss_NSD[3, 2])
    assert found.slope_D == pytest.approx(staged.slope_NSD[3, 2])
    assert found.tokens_D == pytest.approx(staged.tokens_NSD[3, 2])


def test_json_says_the_same_and_what_some_domain_lacks_is_unknown(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(ROWS))

    found = read_checkpoint(tmp_path / "c.json", ("b", "a"))

    assert found.fraction == 0.5
    assert found.loss_D is not None
    np.testing.assert_array_equal(found.loss_D, [2.5, 3.0])
    assert found.slope_D is found.tokens_D is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 1.0}, r"fraction must be in \[0, 1\), got 1"),
        ({"fraction": "half"}, "fraction must be a finite number, got 'half'"),
        ({"domains": {"a": {"loss": 1}}}, "domains must be a, b, got a: add or drop b"),
        ({"domains": {"a": {"loss": "x"}, "b": {}}}, "loss of a must be a finite number, got 'x'"),
        ({"domains": 3}, "must be JSON with fraction and domains"),
    ],
)
def test_a_file_that_breaks_a_rule_is_told_what_to_write(tmp_path, changes, words):
    (tmp_path / "c.json").write_text(json.dumps(ROWS | changes))

    with pytest.raises(ConfigError, match=words):
        read_checkpoint(tmp_path / "c.json", ("a", "b"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,.5,1,5\nb,,1,5", r"c\.csv: fraction of b must be a number, got none"),
        ("a,.5,1,5\na,.5,2,5\nb,.5,1,5", r"c\.csv: each domain must be given once, got a more"),
        ("a,.5,1,5\nb,.5,1,", r"c\.csv: tokens of b must be 0 or more, .* got none"),
        ("a,.5,1,-5\nb,.5,1,5", r"c\.csv: tokens of a must be 0 or more, .* got -5"),
        ("a,.5,1,0\nb,.5,1,0", r"c\.csv: tokens of a, b must not all be 0 at fraction 0\.5"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_with_domain_and_column(tmp_path, rows, words):
    (tmp_path / "c.csv").write_text(f"domain,fraction,loss,tokens\n{rows}\n")

    with pytest.raises(ConfigError, match=words):
        read_checkpoint(tmp_path / "c.csv", ("a", "b"))


def test_nothing_read_is_what_a_checkpoint_at_the_start_says(tmp_path):
    (tmp_path / "c.csv").write_text("domain,fraction,tokens\na,0,0\nb,0,0\n")

    assert read_checkpoint(tmp_path / "c.csv", ("a", "b")).tokens_D == pytest.approx([0, 0])


def test_a_domain_given_twice_in_json_is_refused(tmp_path):
    (tmp_path / "c.json").write_text('{"fraction": 0.5, "domains": {"a": {}, "a": {"loss": 1}}}')

    with pytest.raises(ConfigError, match=r"c\.json: each domain must be given once, got a more"):
        read_checkpoint(tmp_path / "c.json", ("a",))


def test_a_missing_file_and_a_table_without_its_columns_are_named(tmp_path):
    (tmp_path / "c.csv").write_text("domain,loss\na,1\n")
    (tmp_path / "two.csv").write_text("domain,fraction\na,.5\nb,.6\n")

    with pytest.raises(ConfigError, match="no such file"):
        read_checkpoint(tmp_path / "none.json", ("a",))
    with pytest.raises(ConfigError, match="add fraction"):
        read_checkpoint(tmp_path / "c.csv", ("a",))
    with pytest.raises(ConfigError, match="fraction must be one number for all domains"):
        read_checkpoint(tmp_path / "two.csv", ("a", "b"))
