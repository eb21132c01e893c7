"""Runs that come into a project as tables, and the project's own that leave as tables."""

import polars as pl
import pytest
import yaml

from causalmix_pipeline import tables
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.cli import main
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.histories import export_runs
from causalmix_pipeline.resources.settings_file import load_settings

NAMES = ("ratios", "metrics", "covariates")

#: Fields of an entry that is there already.
FILES = "".join(f"  {name}: {name}.csv\n" for name in NAMES)


def own_table(config) -> RunTable:
    return RunTable.from_frame(read_value(config.parent / "data/assets/run_table.parquet"))


def exported(config, folder) -> dict[str, pl.DataFrame]:
    assert main(["runs", "--out", str(folder), "--config", str(config)]) == 0
    return {name: pl.read_csv(folder / f"{name}.csv") for name in NAMES}


def bring(config, folder, *options: str) -> int:
    files = [f"--{name}={folder / name}.csv" for name in NAMES if (folder / f"{name}.csv").exists()]
    return main(["import", *files, "--config", str(config), *options])


def refresh(config) -> None:
    assert main(["refresh", "--train", "--config", str(config)]) == 0


@pytest.fixture
def tables_of(finished, tmp_path):
    """The project's settings file, and a folder with its own runs as tables."""
    directions = load_settings(finished).task_directions
    export_runs(own_table(finished), directions, tmp_path / "tables")
    return finished, tmp_path / "tables"


def test_own_runs_leave_in_their_own_units_and_can_be_fitted(tables_of):
    config, folder = tables_of
    runs = own_table(config)
    ratios, metrics, covariates = (pl.read_csv(folder / f"{name}.csv") for name in NAMES)

    assert ratios.columns == ["run", "name", "index", *runs.domains]
    assert ratios.select(runs.domains).to_numpy() == pytest.approx(runs.mixture_ND, abs=1e-15)
    assert metrics.select(runs.tasks).to_numpy() == pytest.approx(-runs.outcome_NT, abs=1e-15)
    assert covariates.columns[3:] == list(runs.covariate_columns)
    model = tables.fit(ratios, metrics, covariates, estimator="structured_ridge")
    assert model.runs.n_runs == runs.n_runs


def test_what_left_comes_back_as_it_was(tables_of):
    config, folder = tables_of
    before = own_table(config)
    n_records = len(list((config.parent / "data/run_store/runs").rglob("*.json")))

    assert bring(config, folder, "--source", "copy", "--randomised") == 0
    refresh(config)

    both = own_table(config)
    copy = both.subset([both.run_ids.index(f"copy/{run}") for run in before.run_ids])
    assert both.n_runs == 2 * before.n_runs
    assert copy.mixture_ND == pytest.approx(before.mixture_ND)
    assert copy.state_NDP == pytest.approx(before.state_NDP)
    assert copy.outcome_NT == pytest.approx(before.outcome_NT, abs=1e-6)  # the same level
    assert both.observational_sources == ()
    again = exported(config, folder.parent / "again")
    assert again["ratios"].height == before.n_runs  # only its own
    assert len(list((config.parent / "data/run_store/runs").rglob("*.json"))) == n_records


def test_names_are_matched_and_metrics_of_no_task_left_out(tables_of, capsys):
    config, folder = tables_of
    runs = own_table(config)
    theirs = {runs.domains[0]: "train_the_pile_first", runs.tasks[0]: "metric/first_val_loss"}
    for name in NAMES:
        frame = pl.read_csv(folder / f"{name}.csv").drop(
            "run", "name"
        )  # RegMix has the index alone
        names = {c: theirs[d] + c.removeprefix(d) for c in frame.columns for d in theirs
                 if c == d or c.startswith(f"{d}__")}  # fmt: skip
        frame = frame.rename(names)
        if name == "metrics":
            frame = frame.with_columns(other=1.0)
        frame.write_csv(folder / f"{name}.csv")

    columns = [f"--column={own}={name}" for own, name in theirs.items()]
    assert bring(config, folder, "--source", "regmix", *columns) == 0

    assert "metrics that are no task of the project: 'other'" in capsys.readouterr().out
    entry = load_settings(config).imported_runs[0]
    assert (entry.source, entry.randomised) == ("regmix", False)
    assert set(pl.read_csv(config.parent / entry.ratios).columns) == {"index", *runs.domains}
    refresh(config)
    assert own_table(config).observational_sources == ("regmix",)


def test_runs_of_one_pool_take_the_covariates_of_a_live_pool(tables_of):
    config, folder = tables_of
    (folder / "covariates.csv").unlink()
    live = read_value(config.parent / "data/assets/live_covariates.parquet")

    assert bring(config, folder, "--source", "swarm", "--trained-on", "live") == 0

    found = pl.read_csv(config.parent / "data/imported/swarm/covariates.csv")
    for row in live.iter_rows(named=True):
        for name in load_settings(config).covariates:
            assert found[f"{row['domain']}__{name}"].unique().to_list() == [row[name]]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("", ()),
        ("imported_runs: []  # none yet\n", ("# none yet",)),
        (f"imported_runs:\n# a note\n- source: a\n{FILES}", ("# a note",)),
        (f"imported_runs:\n  - source: a\n{FILES.replace('  ', '    ')}seed: 3\n", ("seed: 3",)),
    ],
)  # fmt: skip
def test_the_settings_get_an_entry_and_keep_all_else(tables_of, written, kept):
    config, folder = tables_of
    raw = "# mine\n" + config.read_text() + written
    before = yaml.safe_load(raw)
    files = {name: f"data/imported/new/{name}.csv" for name in NAMES}
    config.write_text(raw)

    assert bring(config, folder, "--source", "new", "--randomised") == 0

    text = config.read_text()
    assert all(part in text for part in ("# mine", *kept))
    after = yaml.safe_load(text)
    assert after["imported_runs"][0] == {"source": "new", **files, "randomised": True}
    assert len(after["imported_runs"]) == 1 + len(before.get("imported_runs") or ())
    assert {k: v for k, v in after.items() if k != "imported_runs"} == {
        k: v for k, v in before.items() if k != "imported_runs"
    }


def break_shares(folder) -> None:
    frame = pl.read_csv(folder / "ratios.csv")
    frame.with_columns(pl.col(frame.columns[3]) + 0.5).write_csv(folder / "ratios.csv")


@pytest.mark.parametrize(
    ("options", "spoil", "told"),
    [
        (("--source", "x"), break_shares, "ratios.csv"),
        (("--source", "own"), None, "--source must be lower-case letters"),
        (("--source", "../x"), None, "got '../x'"),
        (("--source", "x", "--trained-on", "live"), None, "got both"),
        (("--source", "x", "--column", "a"), None, "must be mine=theirs, got 'a'"),
        (("--source", "x", "--column", "a=b", "--column", "a=c"), None, "name 'a' once"),
        (("--source", "x", "--column", "a=b"), None, "got 'b' for 'a'"),
    ],
)
def test_what_cant_be_read_is_told_and_leaves_nothing(tables_of, capsys, options, spoil, told):
    config, folder = tables_of
    before = config.read_text()
    if spoil:
        spoil(folder)

    assert bring(config, folder, *options) == 2

    assert told in " ".join(capsys.readouterr().err.split())
    assert config.read_text() == before
    assert not list((config.parent / "data").glob("imported/*"))
    assert not list((config.parent / "data").glob("imported/.*"))


def test_a_name_that_the_table_has_already_is_refused(tables_of, capsys):
    config, folder = tables_of
    first, second = own_table(config).domains[:2]

    assert bring(config, folder, "--source", "x", f"--column={first}={second}") == 2

    assert f"got {first!r} for {second!r}" in " ".join(capsys.readouterr().err.split())


def test_imported_tables_are_never_written_over(tables_of, capsys):
    config, folder = tables_of
    assert bring(config, folder, "--source", "x") == 0
    place = config.parent / "data/imported/x"

    assert main(["runs", "--out", str(place), "--config", str(config)]) == 2

    assert "is an input" in " ".join(capsys.readouterr().err.split())


def test_a_source_comes_once_and_a_list_in_one_line_is_left_to_the_user(tables_of, capsys):
    config, folder = tables_of
    assert bring(config, folder, "--source", "x") == 0
    assert bring(config, folder, "--source", "x") == 2
    assert "--source must be a new name" in capsys.readouterr().err
    entry = yaml.safe_load(config.read_text())["imported_runs"][0]
    raw = {k: v for k, v in yaml.safe_load(config.read_text()).items() if k != "imported_runs"}
    config.write_text(
        yaml.safe_dump(raw)
        + f"imported_runs: [{yaml.safe_dump(entry, default_flow_style=True).strip()}]\n"
    )

    assert bring(config, folder, "--source", "y") == 2
    assert "or add by hand" in " ".join(capsys.readouterr().err.split())


def test_a_project_without_a_design_says_what_to_run_first(project_file, tmp_path, capsys):
    (tmp_path / "t").mkdir()
    for name in NAMES:
        (tmp_path / "t" / f"{name}.csv").write_text("run,a,b\nr,0.5,0.5\n")
    assert bring(project_file, tmp_path / "t", "--source", "x") == 2
    assert "causalmix plan" in capsys.readouterr().err


def test_a_domain_named_like_a_key_cant_leave(tables_of, tmp_path):
    runs = own_table(tables_of[0])
    odd = RunTable(**{**vars(runs), "domains": ("index", *runs.domains[1:])})
    with pytest.raises(ConfigError, match="got 'index'"):
        export_runs(odd, {}, tmp_path)
