"""Runs made elsewhere, from their tables to the run table of a real, tiny project."""

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value
from causalmix_pipeline.assets.effects import belief_checks
from causalmix_pipeline.assets.imported import join_imported, no_runs, read_source
from causalmix_pipeline.automation.staleness import refresh
from causalmix_pipeline.core.errors import CausalMixError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.settings_file import load_settings

DOMAINS = ("math", "code", "talk")
RNG = np.random.default_rng(5)
N = 24


def frames(covariates) -> dict[str, pl.DataFrame]:
    """Tables of runs of another team, which has its own order of everything."""
    run = pl.Series("run", [f"b{i}" for i in range(N)])
    shares = dict(zip(DOMAINS[::-1], RNG.dirichlet(np.ones(3), size=N).T, strict=True))
    measured = {f"{d}__{name}": np.repeat(RNG.normal(5, 1, size=N // 2), 2)
                for name in covariates for d in DOMAINS}  # fmt: skip
    return {
        "ratios": pl.DataFrame({"run": run, **shares}),
        "metrics": pl.DataFrame(
            {"bpb_code": 1.5 + shares["math"], "run": run, "math": 2.5 - shares["math"]}
        ),
        "covariates": pl.DataFrame({"run": run, **measured, "math__extra": 1.0}),
    }


def write(config, spoil=None, **options):
    """Add the tables to a project, one of them changed; its settings."""
    for name, frame in frames(load_settings(config).covariates).items():
        if spoil and spoil[0] == name:
            frame = spoil[1](frame)
        frame.write_csv(config.parent / f"{name}.csv")
    entry = {"source": "team_b", "metric_names": {"code": "bpb_code"}}
    entry |= {name: f"{name}.csv" for name in ("ratios", "metrics", "covariates")}
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(raw | {"imported_runs": [entry | options]}))
    return load_settings(config)


def value(config, name: str):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def test_a_table_is_read_in_the_projects_own_order_and_directions(project_file):
    runs, notes = read_source(write(project_file), 0, DOMAINS)

    assert runs.domains == DOMAINS
    assert runs.tasks == ("math", "code")
    assert runs.sources == runs.observational_sources == ("team_b",)
    assert runs.run_ids[0] == "team_b/b0"
    np.testing.assert_allclose(runs.outcome_NT[:, 0], runs.mixture_ND[:, 0] - 2.5)
    np.testing.assert_allclose(runs.outcome_NT[:, 1], -1.5 - runs.mixture_ND[:, 0])
    assert notes == ()


def test_runs_declared_randomised_count_so(project_file):
    runs, _ = read_source(write(project_file, randomised=True), 0, DOMAINS)

    assert runs.observational_sources == ()


BAD = {
    "unknown domain": (
        ("ratios", lambda f: f.rename({"talk": "chat"})),
        r"ratios.csv.*lacks 'talk' and has unknown 'chat'.*rename"),
    "missing domain": (("ratios", lambda f: f.drop("talk")), r"ratios.csv.*lacks 'talk'"),
    "no task": (
        ("metrics", lambda f: f.with_columns(speed=pl.lit(1.0))), r"metrics.csv.*unknown 'speed'"),
    "task missing": (("metrics", lambda f: f.drop("math")), r"metrics.csv.*lacks 'math'"),
    "covariate missing": (
        ("covariates", lambda f: f.drop("talk__log2_tokens")),
        r"covariates.csv.*lacks the columns talk__log2_tokens"),
    "nan": (
        ("metrics", lambda f: f.with_columns(math=pl.when(pl.col("run") == "b3").then(float("nan"))
                                             .otherwise("math"))),
        r"metrics.csv: column 'math'.*row 4"),
    "too few": (("ratios", lambda f: f[:5]), r"imported_runs\[0\] must have at least 12 runs.*5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_doesnt_fit_is_refused(project_file, case):
    spoil, message = BAD[case]
    settings = write(project_file, spoil)

    with pytest.raises(CausalMixError, match=message):
        read_source(settings, 0, DOMAINS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": "absent.csv"}, r"imported_runs\[0\].ratios must be.*absent.csv: no such file"),
        ({"metric_names": {"code": "x"}}, r"\[0\].metric_names must name columns of metrics.csv"),
        ({"metric_names": {"x": "math"}}, r"\[0\].metric_names must give columns of tasks"),
        ({"source": "own"}, "must be another name than own"),
        ({"covariates": None}, r"imported_runs\[0\].covariates must be"),
    ],
)
def test_settings_that_dont_fit_are_refused(project_file, options, message):
    with pytest.raises(CausalMixError, match=message):
        read_source(write(project_file, **options), 0, DOMAINS)


def test_a_source_is_named_once(project_file):
    write(project_file)
    raw = yaml.safe_load(project_file.read_text())
    project_file.write_text(yaml.safe_dump(raw | {"imported_runs": raw["imported_runs"] * 2}))

    with pytest.raises(CausalMixError, match=r"imported_runs\[1\].source must be used once"):
        load_settings(project_file)


def test_where_nothing_is_imported_the_run_table_is_as_it_was(finished):
    runs = RunTable.from_frame(value(finished, "run_table"))

    assert value(finished, "imported_runs").equals(no_runs())
    assert join_imported(runs, no_runs()) == (runs, {})
    assert not {"source", "randomised"} & set(value(finished, "run_table").columns)


def test_imported_runs_join_the_run_table_and_train_no_proxy(finished):
    before = value(finished, "run_table")
    write(finished)
    wanted = dg.AssetSelection.assets("run_table", "imported_runs", "proxy_runs")

    with ensure_instance(load_settings(finished).data_path) as instance:
        made = refresh(build_definitions(finished), instance, wanted)

    assert {key.to_user_string() for key in made} == {"imported_runs", "run_table"}
    table = value(finished, "run_table")
    assert table.height == before.height + N
    own = table.filter(pl.col("source") == "own").select(before.columns)
    assert content_digest(own) == content_digest(before)
    runs = RunTable.from_frame(table)
    assert runs.observational_sources == ("team_b",)
    assert runs.outcome_NT.max() < 0


def test_sources_that_arent_declared_randomised_fail_the_check(finished):
    found = value(finished, "cate_checks") | {"treatment_r2": 0.0}

    def passes(**more) -> bool:
        checks = belief_checks(found | more, load_settings(finished).task_weights)
        return next(check.passed for check in checks if check.check_name == "randomised")

    assert passes()
    assert not passes(observational_sources=["team_b"])
