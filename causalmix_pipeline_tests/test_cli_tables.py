import contextlib
import io

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.cli import main
from causalmix_pipeline_tests.test_tables import COVARIATES, DOMAINS, METRICS, POOLS, RATIOS


def call(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; its exit status and what it printed, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, frame in (("R", RATIOS), ("M", METRICS), ("X", COVARIATES), ("P", POOLS)):
        frame.write_csv(tmp_path / f"{name}.csv")
    return tmp_path


FIT = ("fit", "--ratios", "R.csv", "--metrics", "M.csv", "--out", "model")
RIDGE = ("--covariates", "X.csv", "--maximize", "score", "--estimator", "structured_ridge")


def test_from_tables_to_a_recommendation(folder):
    status, text = call(*FIT, *RIDGE, "--weights", "loss=1,score=3")
    assert status == 0, text
    assert "structured_ridge (answers)" in text
    assert "Noise: mixtures move every metric more than seeds do." in text
    assert "Confounding: the covariates don't tell the mixture" in text

    status, text = call(
        "predict", "--model", "model", "--ratios", "R.csv", "--covariates", "X.csv",
        "--out", "out/P.csv")  # fmt: skip
    assert status == 0, text
    predicted = pl.read_csv(folder / "out" / "P.csv")
    assert predicted.columns == ["run", "loss", "score"]
    assert np.corrcoef(predicted["loss"], METRICS["loss"])[0, 1] > 0.9

    (folder / "limits.yaml").write_text("most_share: .5\n")
    status, text = call(
        "recommend", "--model", "model", "--pools", "P.csv", "--constraints", "limits.yaml",
        "--out", "best.csv")  # fmt: skip
    assert status == 0, text
    assert "supported" in text
    best = pl.read_csv(folder / "best.csv")
    assert best.columns == ["pool", *DOMAINS, "gain", "gain_lower", "gain_upper", "verdict"]
    assert best.select(DOMAINS).to_numpy().max() < 0.5 + 1e-9

    status, text = call("explain", "--model", "model", "--out", "report.html")
    assert status == 0, text
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_what_the_user_can_mend_is_said_with_status_2(folder):
    METRICS.with_columns(pl.lit(1.0).alias("flat")).write_csv(folder / "flat.csv")
    cases = [
        (("fit", "--ratios", "R.csv", "--metrics", "flat.csv", "--out", "m"), "flat.csv: column"),
        (("fit", "--ratios", "no.csv", "--metrics", "M.csv", "--out", "m"), "no such file"),
        ((*FIT, "--weights", "loss"), "--weights must be name=number"),
        ((*FIT, "--maximize", "speed"), "maximize must name metrics"),
        (("recommend", "--model", "none", "--out", "x.csv"), "fit first"),
    ]
    for arguments, message in cases:
        status, text = call(*arguments)
        assert status == 2, text
        assert message in text


def test_a_name_with_a_comma_is_quoted(folder):
    METRICS.rename({"score": "score, exact"}).write_csv(folder / "M.csv")

    status, text = call(*FIT, *RIDGE[:2], *RIDGE[4:], "--maximize", '"score, exact"')

    assert status == 0, text
    assert "score, exact" in text
