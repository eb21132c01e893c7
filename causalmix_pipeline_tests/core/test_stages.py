"""Rows of (run, stage): what is told of a stage, checkpoints as covariates, placebos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.effects import assign_folds, cross_validate
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stages import StagedRuns
from causalmix_pipeline_tests.core.staged_truth import DOMAINS, staged_truth


def test_a_row_tells_what_its_stage_started_from():
    staged = staged_truth(n_stages=3, n_runs=16)
    frame = staged.to_frame()

    assert frame.height == 3 * staged.runs.n_runs
    first, second, third = frame.filter(run_id=staged.runs.run_ids[0]).to_dicts()
    assert [first["stage"], second["stage"], third["stage"]] == [1, 2, 3]
    assert [first["fraction"], second["fraction"]] == [0, pytest.approx(1 / 3)]
    for d, domain in enumerate(DOMAINS):
        shares = [row[f"share__{domain}"] for row in (first, second, third)]
        assert np.mean(shares) == pytest.approx(staged.runs.mixture_ND[0, d])
        assert first[f"loss__{domain}"] == 6.0
        assert first[f"tokens__{domain}"] == first[f"epochs__{domain}"] == 0
        assert first[f"slope__{domain}"] == 0
        assert second[f"tokens__{domain}"] == round(1000 * shares[0])
        fall = third[f"loss__{domain}"] - second[f"loss__{domain}"]
        assert third[f"slope__{domain}"] == pytest.approx(3 * fall)
        total = sum(round(1000 * share) for share in shares)
        read = third[f"tokens__{domain}"] / total * 2 * staged.runs.mixture_ND[0, d]
        assert third[f"epochs__{domain}"] == pytest.approx(read)


def test_the_table_reads_back_what_was_written():
    staged = staged_truth(n_stages=3, n_runs=16)
    unknown = replace(staged, loss_NSD=staged.loss_NSD.copy())
    unknown.loss_NSD[:, 0] = np.nan  # a pretrained model's, before the first stage

    for written in (staged, unknown):
        read = StagedRuns.from_frame(written.to_frame())
        for name in ("mixture_NSD", "tokens_NSD", "epochs_NSD", "loss_NSD", "slope_NSD"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name), name)
        assert read.runs.run_ids == written.runs.run_ids
        assert read.runs.mixture_ND == pytest.approx(written.runs.mixture_ND)
        np.testing.assert_array_equal(read.runs.outcome_NT, written.runs.outcome_NT)


def test_an_empty_table_says_what_to_set():
    with pytest.raises(EstimationError, match=r"set design\.stages to 2"):
        StagedRuns.from_frame(pl.DataFrame({"stage": []}))


def test_the_loss_before_the_first_stage_may_be_unknown():
    """A pretrained model isn't measured before it is trained; then no slope is made up."""
    staged = staged_truth(n_runs=16)
    path = [{"path": [{"tokens": [1] * 4, "probe_loss": [3.0] * 4}, {"tokens": [1] * 4}]}]
    one = staged.runs.subset([0])

    found = StagedRuns.of(one, path, [[1.0] * 4], staged.mixture_NSD[:1], None)

    assert np.isnan(found.loss_NSD[:, 0]).all()
    assert (found.loss_NSD[:, 1] == 3.0).all()
    assert (found.slope_NSD == 0).all()


# Checkpoints as covariates, and folds


def test_checkpoints_are_covariates_of_later_stages_and_folds_keep_pool_states_whole():
    staged = staged_truth(n_stages=3, n_runs=32)

    assert staged.table(0, checkpoint=True).covariates == ("p", "q")
    assert staged.table(1, checkpoint=True).covariates == ("p", "q", "checkpoint_loss")
    table = staged.table(2, checkpoint=True)
    assert table.covariates == ("p", "q", "checkpoint_loss", "checkpoint_slope")
    assert table.n_states == table.n_runs
    np.testing.assert_array_equal(table.state_NDP[:, :, 2], staged.loss_NSD[:, 2])
    np.testing.assert_array_equal(table.state_NDP[:, :, 3], staged.slope_NSD[:, 2])
    np.testing.assert_array_equal(assign_folds(table, 4, 0), assign_folds(staged.runs, 4, 0))


def test_groups_survive_a_subset_and_a_frame_and_are_no_column_of_a_static_table():
    table = staged_truth(n_runs=32).table(1, checkpoint=True)
    few = table.subset(np.arange(5, 20))

    assert few.groups.tolist() == table.groups[5:20].tolist()
    assert RunTable.from_frame(few.to_frame()).groups.tolist() == few.groups.tolist()
    static = staged_truth(n_runs=32).runs
    assert "group" not in static.to_frame().columns
    assert static.groups is static.state_ids
    with pytest.raises(EstimationError, match=r"run_table\.group_N must have shape"):
        replace(static, group_N=np.zeros(3))


def test_scores_within_states_are_those_of_the_group():
    """Each run is a state of its own here, and still has others of its pool to compare with."""
    from causalmix_pipeline.adapters.structured_ridge import StructuredRidge

    staged = staged_truth(kind="sum", n_runs=64)
    plain = cross_validate(StructuredRidge, staged.table(1)).frame
    grouped = cross_validate(StructuredRidge, staged.table(1, checkpoint=True)).frame

    assert grouped["r2_within"].is_finite().all()
    assert grouped["r2_within"].mean() > plain["r2_within"].mean() - 0.2  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
