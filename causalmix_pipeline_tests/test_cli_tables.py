import contextlib
import io
import re

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.cli import main
from causalmix_pipeline_tests.small_tables import COVARIATES, DOMAINS, METRICS, POOLS, RATIOS


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
    assert "Mixtures: matter; weighted objective: mean correlation of left-out runs" in text
    assert "Pool states: not shown to matter" in text
    assert "brings the gain over equal to zero" in text
    assert "More runs: what they would bring can't be told quickly from these." in text

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
    assert "most share binds; constraints cost" in text

    status, text = call("explain", "--model", "model", "--out", "report.html")
    assert status == 0, text
    assert (folder / "report.html").read_text().startswith("<!doctype html>")

    pool = ("--pools", "P.csv", "--pool", "c")
    status, text = call("explain", "--model", "model", "--out", "c.html", *pool)
    assert status == 0, text
    assert 'title="c"' in (folder / "c.html").read_text()
    for some, message in ((pool[2:], "needs --pools"), (pool[:2], "(a, b, c, d, e), got none")):
        status, text = call("explain", "--model", "model", "--out", "c.html", *some)
        assert status == 2, text
        assert message in text


def test_slack_front_and_baselines_are_written(folder):
    status, text = call(*FIT, *RIDGE)
    assert status == 0, text
    (folder / "limits.yaml").write_text("guard_rails: {loss: 0.05}\n")

    status, text = call(
        "recommend", "--model", "model", "--pools", "P.csv", "--constraints", "limits.yaml",
        "--out", "best.csv", "--slack", "slack.csv")  # fmt: skip
    assert status == 0, text
    slack = pl.read_csv(folder / "slack.csv")
    assert slack.columns == ["pool", "constraint", "value", "limit", "slack", "binds"]
    assert set(slack["constraint"]) == {"loss: guard rail"}

    status, text = call(
        "pareto", "--model", "model", "--metrics", "loss,score", "--pools", "P.csv",
        "--pool", "b", "--out", "front.csv")  # fmt: skip
    assert status == 0, text
    front = pl.read_csv(folder / "front.csv")
    assert front.columns[-4:] == ["gain_first", "gain_first_se", "gain_second", "gain_second_se"]

    status, text = call("baselines", "--model", "model", "--pools", "P.csv", "--out", "B.csv")
    assert status == 0, text
    beside = pl.read_csv(folder / "B.csv")
    assert beside.columns == [
        "pool", "baseline", *DOMAINS, "gain", "gain_lower", "gain_upper"]  # fmt: skip
    assert "log_linear" in text


def test_what_the_user_can_mend_is_said_with_status_2(folder):
    METRICS.with_columns(pl.lit(1.0).alias("flat")).write_csv(folder / "flat.csv")
    cases = [
        (("fit", "--ratios", "R.csv", "--metrics", "flat.csv", "--out", "m"), "flat.csv: column"),
        (("fit", "--ratios", "no.csv", "--metrics", "M.csv", "--out", "m"), "no such file"),
        ((*FIT, "--weights", "loss"), "--weights must be name=number"),
        ((*FIT, "--maximize", "speed"), "maximize must name metrics"),
        (("recommend", "--model", "none", "--out", "x.csv"), "fit first"),
        (("pareto", "--model", "none", "--metrics", "loss", "--out", "x"), "must name two"),
    ]
    for arguments, message in cases:
        status, text = call(*arguments)
        assert status == 2, text
        assert message in text


def test_an_output_that_would_overwrite_an_input_is_refused_before_the_work(folder):
    assert call(*FIT, *RIDGE)[0] == 0
    kept = {name: (folder / name).read_bytes() for name in ("P.csv", "model/model.json")}
    best = ("recommend", "--model", "model", "--pools", "P.csv")

    for out in (("P.csv",), ("model/model.json",), ("o.csv", "--slack", "P.csv")):
        status, text = call(*best, "--out", *out)
        assert (status, "would be overwritten" in text) == (2, True), text
    status, text = call(*best, "--out", "o.csv", "--slack", "o.csv")
    assert (status, "o.csv is another output" in text) == (2, True), text
    (folder / "made").mkdir()
    status, text = call(*best, "--out", "made")
    assert (status, "got a folder" in text) == (2, True), text
    status, text = call(*FIT[:-1], "R.csv", *RIDGE)
    assert (status, "must be a folder, got a file" in text) == (2, True), text
    status, text = call(*FIT[:-1], ".", *RIDGE)
    assert (status, "holds R.csv, an input" in text) == (2, True), text
    assert kept == {name: (folder / name).read_bytes() for name in kept}
    assert not (folder / "o.csv").exists()


def put(frame: pl.DataFrame, column: str, row: int, value: object) -> pl.DataFrame:
    values = frame[column].to_list()
    values[row] = value
    return frame.with_columns(pl.Series(column, values, strict=False))


STATE = COVARIATES.columns[1]
BAD_TABLES = {
    "percent": ({"R": RATIOS.with_columns(pl.col(DOMAINS) * 100)}, r"R\.csv.*sum to 1.*row 1 "),
    "huge": ({"R": put(RATIOS, "domain_0", 2, 1e30)}, r"R\.csv.*1e\+30 in row 3 "),
    "nan": ({"M": put(METRICS, "loss", 3, float("nan"))}, r"M\.csv.*'loss'.*row 4 .*drop"),
    "infinite": ({"X": put(COVARIATES, STATE, 1, float("inf"))}, rf"X\.csv.*{STATE}.*row 2 "),
    "diverged": ({"M": put(METRICS, "loss", 3, 1e30)}, r"M\.csv.*'loss'.*1e\+30 in row 4 "),
    "broken": ({"X": put(COVARIATES, STATE, 1, 1e30)}, rf"X\.csv.*{STATE}.*1e\+30 in row 2 "),
    "constant": ({"M": METRICS.with_columns(loss=pl.lit(2.0))}, r"M\.csv.*'loss' must vary"),
    "twice": ({"X": pl.concat([COVARIATES, COVARIATES[:1]])}, r"X\.csv.*rows 1 and 71"),
    "three": ({"R": RATIOS[:3]}, r"at least 12 runs.*R\.csv and M\.csv, got 3: add runs"),
    "one domain": ({"R": RATIOS.select("run", "domain_0")}, r"R\.csv.*at least 2 domains"),
    "domain missing": ({"R": RATIOS.drop("domain_2")}, r"sum to 1|with one of the domains"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_told_by_file_column_and_row(folder, case):
    frames, message = BAD_TABLES[case]
    for name, frame in frames.items():
        frame.write_csv(f"{name}.csv")

    status, text = call(*FIT, *RIDGE)

    assert status == 2, text
    assert re.search(message, text), text
    assert not (folder / "model").exists()


HOSTILE = {
    "markup": "<script>alert(1)</script>",
    "quotes": "a\"b'c",
    "lines": "a\nb",
    "direction": "\u202eabc",
    "long": "x" * 300,
    "colour": "[red]x[/red]",
    "comma": "a,b",
    "path": "../../etc",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_name_of_domain_metric_and_pool_comes_out_as_it_went_in(folder, case):
    name = HOSTILE[case]

    def renamed(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.rename(lambda column: column.replace("domain_0", name))

    renamed(RATIOS).write_csv("R.csv")
    renamed(COVARIATES).write_csv("X.csv")
    renamed(METRICS.rename({"loss": name + "!"})).write_csv("M.csv")
    pools = renamed(POOLS).with_columns(pool=pl.Series([name, *"bcde"]))
    pools.write_csv("P.csv")

    status, text = call(*FIT, *RIDGE)
    assert status == 0, text
    rows = ("--ratios", "R.csv", "--covariates", "X.csv")
    for arguments in (("predict", *rows), ("recommend", "--pools", "P.csv")):
        status, text = call(*arguments, "--model", "model", "--out", f"{arguments[0]}.csv")
        assert status == 0, text
    # Polars reads a doubled quote in a header as two.
    predicted, best = (
        open_table(f"{command}.csv", "").frame for command in ("predict", "recommend")
    )
    assert set(predicted.columns) == {"run", "score", name + "!"}
    assert name in best.columns
    assert best["pool"][0] == name


def test_a_name_with_a_comma_is_quoted(folder):
    METRICS.rename({"score": "score, exact"}).write_csv(folder / "M.csv")

    status, text = call(*FIT, *RIDGE[:2], *RIDGE[4:], "--maximize", '"score, exact"')

    assert status == 0, text
    assert "score, exact" in text
