import contextlib
import io

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.cli import main
from causalmix_pipeline.core.belief import reach_of
from causalmix_pipeline.core.errors import CausalMixError, ConfigError, EstimationError
from causalmix_pipeline.tables import Model, fit, predict, recommend
from causalmix_pipeline.top_ups import condition, plan_top_up

POOL = SyntheticPool.draw(4, 3, 2, seed=5)
RUNS = POOL.run_table(24, 4, noise=0.1, seed=6)
DOMAINS, TASKS, COLUMNS = list(RUNS.domains), list(RUNS.tasks), list(RUNS.covariate_columns)
NEAR_DP = np.full((4, 3), 0.1)
FAR_DP = np.where(np.arange(12).reshape(4, 3) % 2 == 0, 2.5, -2.5)
POOLS = pl.DataFrame(
    {"pool": ["near", "far"], **dict(zip(COLUMNS, np.stack([NEAR_DP, FAR_DP]).reshape(2, -1).T,
                                         strict=True))})  # fmt: skip


def tables(run_ids, state_NDP, mixture_ND, outcome_NT) -> tuple[pl.DataFrame, ...]:
    """Ratios, metrics and covariates as frames."""
    ids = pl.Series("run", list(run_ids))
    parts = ((DOMAINS, mixture_ND), (TASKS, outcome_NT), (COLUMNS, state_NDP.reshape(len(ids), -1)))
    return tuple(
        pl.DataFrame([ids, *(pl.Series(n, values[:, i]) for i, n in enumerate(names))])
        for names, values in parts
    )


def trained(plan: pl.DataFrame, noise: float = 0.1) -> tuple[pl.DataFrame, ...]:
    """The tables of the planned runs, all of the far pool."""
    mixture_ND = plan.select(DOMAINS).to_numpy()
    outcome_NT = POOL.expected_outcome(FAR_DP, mixture_ND)
    outcome_NT = outcome_NT + np.random.default_rng(8).normal(0, noise, size=outcome_NT.shape)
    state_NDP = np.repeat(FAR_DP[None], plan.height, axis=0)
    _, metrics, covariates = tables(plan["run"], state_NDP, mixture_ND, outcome_NT)
    return plan, metrics, covariates


@pytest.fixture(scope="module")
def model() -> Model:
    return fit(
        *tables(RUNS.run_ids, RUNS.state_NDP, RUNS.mixture_ND, RUNS.outcome_NT),
        maximize=TASKS,
        estimator="response_surface",
    )


@pytest.fixture(scope="module")
def plan(model) -> pl.DataFrame:
    return plan_top_up(model, POOLS)


@pytest.fixture(scope="module")
def topped_up(model, plan) -> Model:
    return condition(model, *trained(plan))


def test_a_plan_has_mixtures_for_the_pools_out_of_reach_alone(plan):
    assert plan.columns == ["pool", "run", *DOMAINS]
    assert plan["pool"].to_list() == ["far"] * 16
    assert plan["run"].n_unique() == 16
    mixture_ND = plan.select(DOMAINS).to_numpy()
    np.testing.assert_allclose(mixture_ND.sum(axis=1), 1.0)
    assert mixture_ND.max() > 0.7
    assert mixture_ND.min() < 0.05


def test_a_plan_is_the_same_again_and_a_longer_one_begins_alike(model, plan):
    longer = plan_top_up(model, POOLS[::-1], 20)

    assert longer[:16].equals(plan)
    assert not plan_top_up(model, POOLS, seed=3).equals(plan)


def test_a_domain_without_text_gets_no_run(model):
    tokens = {f"{domain}__tokens": [100.0, 0.0 if d == 1 else 50.0]
              for d, domain in enumerate(DOMAINS)}  # fmt: skip

    shares = plan_top_up(model, POOLS.with_columns(**{k: pl.Series(v) for k, v in tokens.items()}))

    assert shares[DOMAINS[1]].max() == 0
    np.testing.assert_allclose(shares.select(DOMAINS).to_numpy().sum(axis=1), 1.0)


def test_a_topped_up_pool_is_supported_and_so_is_one_like_it(model, topped_up):
    assert reach_of(model.runs, FAR_DP).verdict != "supported"
    assert reach_of(topped_up.runs, FAR_DP).verdict == "supported"
    assert reach_of(topped_up.runs, FAR_DP + 0.1).verdict == "supported"
    assert reach_of(topped_up.runs, -FAR_DP).verdict != "supported"
    assert plan_top_up(topped_up, POOLS).height == 0


def test_one_further_run_makes_no_pool_supported(model, plan):
    once = condition(model, *trained(plan[:1]))

    assert reach_of(once.runs, FAR_DP).verdict != "supported"
    more = plan_top_up(once, POOLS)
    assert not set(more["run"]) & set(once.runs.run_ids)
    assert not set(more[DOMAINS[0]]) & set(plan[:1][DOMAINS[0]])


def test_conditioning_searches_nothing_and_cuts_the_error_at_the_pool(model, topped_up):
    mixture_MD = np.random.default_rng(1).dirichlet(np.ones(4), size=300)
    truth_MT = POOL.expected_gain(FAR_DP, mixture_MD, np.full(4, 0.25))

    def error(asked: Model) -> float:
        found = asked.estimator.gain(FAR_DP, mixture_MD, np.full(4, 0.25)).mean_MT
        return float(np.sqrt(np.mean((found - truth_MT) ** 2)))

    assert topped_up.parameters == model.parameters
    assert topped_up.chosen == model.chosen
    assert topped_up.calibration == model.calibration
    assert error(topped_up) < 0.5 * error(model)


def test_what_was_said_of_a_run_before_it_was_seen_is_kept(model, topped_up, plan):
    _, _, covariates = trained(plan)
    said = predict(model, plan.drop("pool"), covariates)

    row_of = {run: row for row, run in enumerate(topped_up.runs.run_ids)}
    rows = [row_of[run] for run in said["run"]]
    np.testing.assert_allclose(
        topped_up.out_of_fold_NT[rows], said.select(TASKS).to_numpy(), atol=1e-9
    )
    old = [row_of[run] for run in model.runs.run_ids]
    np.testing.assert_array_equal(topped_up.out_of_fold_NT[old], model.out_of_fold_NT)
    assert "conditioned on 16 further runs of 1 pool states" in topped_up.notes[-1]


def test_permuting_the_further_tables_changes_nothing(model, topped_up, plan):
    rng = np.random.default_rng(0)
    moved = [
        frame.select(rng.permutation(np.array(frame.columns)).tolist())[
            rng.permutation(frame.height)
        ]
        for frame in trained(plan)
    ]
    again = condition(model, *moved)

    pools = POOLS.select(["pool", *COLUMNS[::-1]])
    numbers = [*DOMAINS, "gain", "gain_lower"]
    first, other = (
        recommend(asked, pools).select(pl.col(numbers).fill_null(0.0)).to_numpy()
        for asked in (topped_up, again)
    )
    np.testing.assert_allclose(other, first, atol=1e-9)


def test_a_conditioned_model_is_saved_and_says_the_same(topped_up, plan, tmp_path):
    topped_up.save(tmp_path / "model")
    again = Model.load(tmp_path / "model")

    _, _, covariates = trained(plan)
    first, other = (predict(asked, plan.drop("pool"), covariates) for asked in (topped_up, again))
    np.testing.assert_allclose(
        other.select(TASKS).to_numpy(), first.select(TASKS).to_numpy(), atol=1e-9
    )


def changed(frame: pl.DataFrame, column: str, row: int, value: object) -> pl.DataFrame:
    values = frame[column].to_list()
    values[row] = value
    return frame.with_columns(pl.Series(column, values, strict=False))


BAD = {
    "other domain": (0, lambda f: f.rename({"domain_1": "web"}), r"lacks 'domain_1'.*'web'"),
    "other metric": (1, lambda f: f.rename({"task_1": "f1"}), r"metrics.*lacks 'task_1'.*'f1'"),
    "further metric": (1, lambda f: f.with_columns(f1=pl.lit(1.0)), r"metrics.*has unknown 'f1'"),
    "covariate lacking": (2, lambda f: f.drop(COLUMNS[4]), rf"lacks the columns {COLUMNS[4]}"),
    "run lacking": (2, lambda f: f[1:], r"covariates must have a row for every run"),
    "diverged": (1, lambda f: changed(f, "task_0", 2, 1e30), r"'task_0'.*1e\+30 in row 3"),
    "nan": (1, lambda f: changed(f, "task_0", 2, float("nan")), r"'task_0'.*finite.*row 3"),
    "broken": (2, lambda f: changed(f, COLUMNS[0], 2, 1e30), rf"{COLUMNS[0]}'.*got 1e\+30"),
    "no run": (1, lambda f: f.with_columns(pl.col("run") + "x"), r"must have runs in common"),
    "twice": (0, lambda f: pl.concat([f, f[:1]]), r"must not name a row twice.*rows 1 and 17"),
    "off": (0, lambda f: changed(f, DOMAINS[0], 1, 0.0), r"sum to 1.*row 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_further_runs_that_dont_fit_are_refused(model, plan, case):
    index, spoil, message = BAD[case]
    frames = list(trained(plan))
    frames[index] = spoil(frames[index])
    with pytest.raises(EstimationError, match=message):
        condition(model, *frames)


def test_a_broken_value_among_three_runs_is_seen(model, plan):
    ratios, metrics, covariates = (frame[:3] for frame in trained(plan))

    with pytest.raises(EstimationError, match=r"'task_1'.*1e\+30 in row 1"):
        condition(model, ratios, changed(metrics, "task_1", 0, 1e30), covariates)
    with pytest.raises(EstimationError, match=rf"'{COLUMNS[0]}' must be of the size"):
        condition(model, ratios, metrics, changed(covariates, COLUMNS[0], 1, -1e30))


def test_a_model_with_covariates_needs_those_of_further_runs(model, plan):
    with pytest.raises(EstimationError, match="must come with the covariates"):
        condition(model, *trained(plan)[:2])


def test_a_model_without_covariates_is_conditioned_but_not_topped_up():
    ratios, metrics, _ = tables(RUNS.run_ids, RUNS.state_NDP, RUNS.mixture_ND, RUNS.outcome_NT)
    blind = fit(ratios[:60], metrics[:60], estimator="response_surface_blind")

    more = condition(blind, ratios[60:], metrics[60:])

    assert more.runs.n_runs == RUNS.n_runs
    assert more.runs.n_states == 1
    assert reach_of(more.runs, np.empty((4, 0))).verdict == "supported"
    with pytest.raises(ConfigError, match="needs a model with covariates"):
        plan_top_up(blind, POOLS)


def test_a_broken_covariate_of_a_pool_is_no_pool_out_of_reach(model):
    with pytest.raises(EstimationError, match=r"'domain_0__covariate_0'.*1e\+30 in row 2 .*'far'"):
        plan_top_up(model, changed(POOLS, COLUMNS[0], 1, 1e30))


def test_no_run_is_no_plan(model):
    with pytest.raises(ConfigError, match="runs must be at least 1, got 0"):
        plan_top_up(model, POOLS, 0)


def call(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; its exit status and what it printed, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


def test_from_a_plan_to_a_new_model_by_command(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save("model")
    POOLS.write_csv("pools.csv")
    top_up = ("top-up", "--model", "model", "--pools", "pools.csv", "--out", "plan.csv")

    status, text = call(*top_up)
    assert status == 0, text
    assert "far 16" in text
    assert "near" not in text

    for name, frame in zip("RMX", trained(pl.read_csv("plan.csv")), strict=True):
        frame.write_csv(f"{name}.csv")
    further = ("--ratios", "R.csv", "--metrics", "M.csv", "--covariates", "X.csv")
    status, text = call("condition", "--model", "model", *further, "--out", "new")
    assert status == 0, text
    assert "112 runs, 25 pool states" in text

    status, text = call("top-up", "--model", "new", *top_up[3:])
    assert status == 0, text
    assert "All pools are supported" in text
    status, text = call("condition", "--model", "new", *further, "--out", "newer")
    assert status == 2
    assert "R.csv must name runs that the model hasn't seen" in text
    with pytest.raises(CausalMixError, match=r"model\.json"):
        Model.load("newer")


def test_a_plan_goes_on_behind_the_last_run_even_where_one_was_left_out(model, plan):
    """A run that diverged is dropped from the tables; its successor's name isn't given again."""
    part = plan[:4].filter(~pl.col("run").str.ends_with("001"))
    once = condition(model, *trained(part))

    more = plan_top_up(once, POOLS.with_columns(pl.col(COLUMNS) * 1.0), 8)
    assert reach_of(once.runs, FAR_DP).verdict != "supported"
    assert not set(more["run"]) & set(once.runs.run_ids)
