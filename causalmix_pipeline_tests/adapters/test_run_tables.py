import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.run_tables import import_runs, read_mixtures
from causalmix_pipeline.adapters.state_tables import read_states
from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.core.errors import CausalMixError, ConfigError, EstimationError

DOMAINS = ("code", "math", "web")
N = 20
RNG = np.random.default_rng(3)
SHARE_ND = RNG.dirichlet(np.ones(3), size=N)
STATE_ND = np.repeat(RNG.normal(size=(10, 3)), 2, axis=0)
RUNS = [f"r{i:02d}" for i in range(N)]


def ratios(**columns):
    shares = {name: SHARE_ND[:, d] for d, name in enumerate(DOMAINS)}
    return pl.DataFrame({"run": RUNS, "name": RUNS, "index": range(N), **shares, **columns})


def metrics(**columns):
    return pl.DataFrame(
        {
            "run": RUNS,
            "loss": 3 - SHARE_ND[:, 0],
            "accuracy": SHARE_ND[:, 1] + 0.1,
            **columns,
        }
    )


def covariates(**columns):
    values = {f"{name}__hes": STATE_ND[:, d] for d, name in enumerate(DOMAINS)}
    return pl.DataFrame({"run": RUNS, **values, **columns})


def read(tmp_path, r=None, m=None, x=None, **options):
    """Write the tables as CSV, and import them: how users have them."""
    paths = []
    for name, frame in (("ratios", r), ("metrics", m), ("covariates", x)):
        if frame is None and name == "covariates":
            continue
        frame = (ratios() if name == "ratios" else metrics()) if frame is None else frame
        path = tmp_path / f"{name}.csv"
        path.write_text(frame) if isinstance(frame, str) else frame.write_csv(path)
        paths.append(open_table(path, name))
    return import_runs(*paths, **options)


def test_tables_in_the_form_of_olmix_become_runs(tmp_path):
    found = read(tmp_path, x=covariates(), maximize=["accuracy"])
    runs = found.runs

    assert runs.domains == DOMAINS
    assert runs.tasks == ("accuracy", "loss")
    assert runs.run_ids == tuple(RUNS)
    assert runs.covariates == ("hes",)
    assert runs.n_states == 10
    np.testing.assert_allclose(runs.mixture_ND, SHARE_ND)
    np.testing.assert_allclose(runs.outcome_NT[:, 1], SHARE_ND[:, 0] - 3)
    np.testing.assert_allclose(runs.outcome_NT[:, 0], SHARE_ND[:, 1] + 0.1)
    assert found.sign_T.tolist() == [1, -1]
    assert found.notes == ()


def test_the_form_of_regmix_is_joined_by_index_and_rounded_shares_are_closed(tmp_path):
    rounded = ratios().drop("run", "name").with_columns(pl.col(DOMAINS).round(2))
    losses = pl.DataFrame({"index": range(N - 1, -1, -1), "loss": SHARE_ND[::-1, 0] + 1})

    found = read(tmp_path, rounded, losses)

    assert np.abs(found.runs.mixture_ND.sum(axis=1) - 1).max() < 1e-12
    by_id = np.array([int(name) for name in found.runs.run_ids])
    np.testing.assert_allclose(-found.runs.outcome_NT[:, 0], SHARE_ND[by_id, 0] + 1)
    assert "taken as rounding" in found.notes[0]


def test_parquet_and_frames_say_the_same_as_csv(tmp_path):
    ratios().write_parquet(tmp_path / "r.parquet")
    same = import_runs(
        open_table(tmp_path / "r.parquet", "ratios"), open_table(metrics(), "metrics")
    )

    assert same.runs.to_frame().equals(read(tmp_path).runs.to_frame())


def test_no_permutation_of_rows_or_columns_changes_a_bit(tmp_path):
    rng = np.random.default_rng(0)

    def shuffled(frame):
        columns = [frame.columns[i] for i in rng.permutation(frame.width)]
        return frame.select(columns)[rng.permutation(N)]

    plain = read(tmp_path, x=covariates())
    moved = read(tmp_path, shuffled(ratios()), shuffled(metrics()), shuffled(covariates()))

    assert moved.runs.to_frame().equals(plain.runs.to_frame())


def test_equal_covariates_are_a_state_and_an_equal_mixture_in_it_is_a_repeat(tmp_path):
    twice = ratios().with_columns(
        pl.when(pl.col("index") == 1).then(pl.col(name).first()).otherwise(name).alias(name)
        for name in DOMAINS
    )
    runs = read(tmp_path, twice, x=covariates()).runs

    assert runs.state_ids[0] == runs.state_ids[1] != runs.state_ids[2]
    assert runs.repeat_of_N[0] == runs.repeat_of_N[1]
    assert len(set(runs.repeat_of_N)) == N - 1


def test_hostile_names_are_kept_as_they_are(tmp_path):
    names = ['../a,"b', "x", "x__y"]
    named = ratios().rename(dict(zip(DOMAINS, names, strict=True)))
    # `x__y__hes` could be covariate `y__hes` of a domain x: the longest domain wins.
    state = pl.DataFrame(
        {"run": RUNS, **{f"{n}__hes é": STATE_ND[:, d] for d, n in enumerate(names)}}
    )

    runs = read(tmp_path, named, metrics().rename({"loss": "<b>état</b>"}), state).runs

    assert runs.domains == tuple(sorted(names))
    assert runs.covariates == ("hes é",)
    assert "<b>état</b>" in runs.tasks
    assert type(runs).from_frame(runs.to_frame()).to_frame().equals(runs.to_frame())


def test_constant_covariates_and_runs_of_one_table_are_left_out_and_said(tmp_path):
    constant = {f"{name}__size": 5.0 for name in DOMAINS}
    x = covariates().with_columns(**{name: pl.lit(v) for name, v in constant.items()})

    found = read(tmp_path, m=metrics()[:-1], x=x)

    assert found.runs.covariates == ("hes",)
    assert found.runs.n_runs == N - 1
    assert any("code__size, math__size, web__size" in note for note in found.notes)
    assert any("r19" in note and "left out" in note for note in found.notes)


def changed(frame, column, row, value):
    values = frame[column].to_list()
    values[row] = value
    return frame.with_columns(pl.Series(column, values, strict=False))


BAD = {
    "unnormalised": (
        {"r": ratios().with_columns(pl.col(DOMAINS) * 100)},
        r"ratios.csv.*sum to 1.*row 1.*divide percent",
    ),
    "one row off": (
        {"r": changed(ratios(), "web", 4, 0.999)}, r"ratios.csv.*row 5 \(run 'r04'"),
    "off by more than its rounding": (
        {"r": changed(ratios().with_columns(pl.col(DOMAINS).round(4)), "web", 0, 0.5)}, r"row 1 "),
    "negative": ({"r": changed(ratios(), "web", 2, -0.3)}, r"'web' must hold shares >= 0.*row 3"),
    "share not a number": (
        {"r": changed(ratios().cast({"math": pl.String}), "math", 1, "abc")},
        r"ratios.csv.*'math'.*'abc' in row 2.*drop",
    ),
    "nan": ({"m": changed(metrics(), "loss", 3, float("nan"))}, r"metrics.csv.*'loss'.*row 4"),
    "missing": ({"m": changed(metrics(), "loss", 3, None)}, r"'loss'.*None in row 4.*drop the row"),
    "infinite": ({"m": changed(metrics(), "loss", 5, float("inf"))}, r"'loss'.*row 6 \(run 'r05'"),
    "diverged": (
        {"m": changed(metrics(), "loss", 6, 1e30)}, r"'loss'.*1e\+30 in row 7.*diverged. Drop it"),
    "constant metric": (
        {"m": metrics(flat=[2.0] * N)}, r"metrics.csv: column 'flat' must vary.*drop the column"),
    "duplicate run": (
        {"r": pl.concat([ratios(), ratios()[2:3]])}, r"ratios.csv.*'r02' in rows 3 and 21"),
    "three runs": ({"r": ratios()[:3]}, r"at least 12 runs.*got 3"),
    "no run in common": (
        {"m": metrics().with_columns(pl.col("run") + "x")}, r"got 0: add runs, or give the same"),
    "one domain": ({"r": ratios().drop("math", "web")}, r"at least 2 domains, got code"),
    "no metric": ({"m": metrics().select("run")}, r"metrics.csv must have at least one column"),
    "no key": ({"m": metrics().drop("run")}, r"must share a column.*metrics.csv has loss"),
    "column twice": ({"m": "run,loss,loss\nr00,1,2\n"}, r"column 'loss' occurs 2 times"),
    "column without a name": ({"m": ",run,loss\n0,r00,1\n"}, r"column 1 must have a name"),
    "ragged": ({"m": "run,loss\nr00,1,2,3\n"}, r"metrics.csv: row 1 must have 2 cells.*got 4"),
    "no row": ({"m": "run,loss\n"}, r"metrics.csv must have at least one row"),
    "covariate of no domain": (
        {"x": covariates(prose__hes=[1.0] * N)}, r"covariates.csv: column 'prose__hes'.*domains"),
    "covariate of some domains": (
        {"x": covariates(code__mtld=STATE_ND[:, 0])}, r"lacks the columns math__mtld, web__mtld"),
    "covariates of some runs": ({"x": covariates()[1:]}, r"row for every run, but lacks run 'r00'"),
    "covariate broken": (
        {"x": changed(covariates(), "web__hes", 7, 1e30)}, r"'web__hes'.*1e\+30 in row 8"),
    "too few states": (
        {"x": covariates().with_columns(pl.lit(1.0).alias(f"{d}__hes") for d in DOMAINS[:2])
              .with_columns(pl.col("web__hes").sign())}, r"at least 7 pool states.*got 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_file_column_row_and_way_out(tmp_path, case):
    tables, message = BAD[case]

    with pytest.raises(EstimationError, match=message):
        read(tmp_path, **tables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximize": ["speed"]}, r"maximize must name metrics.*accuracy, loss.*got speed"),
        ({"maximize": ["loss"], "minimize": ["loss"]}, "both name loss"),
    ],
)
def test_directions_must_name_metrics_once(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **options)


def test_files_that_cant_be_read_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "x.csv").write_bytes(b"run,\xff\n")

    for name in ("x.parquet", r"x.csv must be CSV in UTF-8", "absent.csv"):
        with pytest.raises(CausalMixError, match=name):
            open_table(tmp_path / name.split(" ")[0], "ratios")


def test_mixtures_to_predict_need_the_same_domains():
    swapped = open_table(ratios().select("web", "run", "code", "math"), "ratios")
    ids, mixture_MD = read_mixtures(swapped, DOMAINS)

    assert ids == RUNS
    np.testing.assert_allclose(mixture_MD, SHARE_ND)
    odd = open_table(ratios().rename({"web": "prose"}), "ratios")
    with pytest.raises(EstimationError, match="lacks 'web' and has unknown 'prose'"):
        read_mixtures(odd, DOMAINS)


def test_pools_have_covariates_and_perhaps_tokens():
    tokens = {f"{name}__tokens": [10.0, 20.0 * d] for d, name in enumerate(DOMAINS)}
    pools = pl.DataFrame({"pool": ["a", "b"], **tokens}).with_columns(
        pl.lit(float(d)).alias(f"{name}__hes") for d, name in enumerate(DOMAINS)
    )

    ids, state_MDP, tokens_MD = read_states(
        open_table(pools, "pools"), DOMAINS, ["hes"], key="pool"
    )

    assert ids == ["a", "b"]
    assert state_MDP[1, :, 0].tolist() == [0, 1, 2]
    assert tokens_MD is not None
    assert tokens_MD[1].tolist() == [0, 20, 40]
    with pytest.raises(EstimationError, match="lacks the columns code__mtld"):
        read_states(open_table(pools, "pools"), DOMAINS, ["mtld"], key="pool")
