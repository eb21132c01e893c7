"""What Dagster loads: quickly, with the keys and the lineage that users rely on."""

import subprocess
import sys

import dagster as dg
import pytest

from causalmix_pipeline.automation.conditions import LIVE_SIDE_NAMES
from causalmix_pipeline.automation.staleness import lineage
from causalmix_pipeline.definitions import build_definitions

#: Renaming one loses its history: change this list on purpose only.
ASSET_KEYS = {
    "experiment_pool",
    "tokenizer",
    "experiment_documents",
    "eval_tasks",
    "pool_states",
    "normaliser",
    "mixture_design",
    "proxy_plan",
    "proxy_runs",
    "imported_runs",
    "run_table",
    "cate_model",
    "cate_checks",
    "cate_interpretation",
    "covariate_choice",
    "live_pool",
    "live_documents",
    "live_covariates",
    "live_changes",
    "top_up_runs",
    "baseline_mixtures",
    "recommended_mixture",
    "training_export",
    "report",
    "validation_runs",
    "rivals",
}
CHECK_NAMES = {
    "enough_documents",
    "held_out",
    "mixtures_sum_to_one",
    "within_budget",
    "few_diverged",
    "past_the_unigram_regime",
    "above_the_noise_floor",
    "randomised",
    "beats_placebo",
    "state_matters",
    "no_covariate_missing",
    "baselines_sum_to_one",
    "mixture_sums_to_one",
    "within_reach",
}
HEAVY = (
    "torch", "transformers", "econml", "lightgbm", "sklearn", "tokenizers", "gensim", "scipy",
    "numba", "pyarrow", "ray", "tiktoken", "py3langid", "dataframely", "rensa",
)  # fmt: skip


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    return build_definitions(tmp_path_factory.mktemp("none") / "causalmix.yaml")


def names(keys) -> set[str]:
    return {key.to_user_string() for key in keys}


def downstream(definitions, *keys: str) -> set[str]:
    selection = dg.AssetSelection.assets(*keys).downstream(include_self=False)
    return names(selection.resolve(definitions.resolve_asset_graph()))


def test_the_asset_keys_are_those_that_users_know(definitions):
    assert names(definitions.resolve_asset_graph().get_all_asset_keys()) == ASSET_KEYS


def test_the_checks_are_those_that_users_know(definitions):
    checks = definitions.resolve_asset_graph().asset_check_keys

    assert {key.name for key in checks} == CHECK_NAMES


def test_a_changed_live_pool_reaches_the_live_side_and_no_training(definitions):
    """It costs a profile and a recommendation; validation is below, but only runs on request."""
    assert downstream(definitions, "live_pool") == {*LIVE_SIDE_NAMES, "validation_runs"}


def test_proxy_runs_have_nothing_of_the_live_side_above_them(definitions):
    parents = lineage(definitions)

    above, todo = set(), {dg.AssetKey("proxy_runs")}
    while todo:
        todo = {parent for key in todo for parent in parents[key]} - above
        above |= todo
    assert names(above) & {"live_pool", *LIVE_SIDE_NAMES} == set()
    assert "experiment_pool" in names(above)


def test_a_changed_experiment_pool_reaches_everything_but_the_live_pool(definitions):
    assert downstream(definitions, "experiment_pool") == ASSET_KEYS - {
        "experiment_pool",
        "live_pool",
    }


def test_exactly_the_live_side_carries_the_condition(definitions):
    graph = definitions.resolve_asset_graph()
    with_condition = [k for k in graph.get_all_asset_keys() if graph.get(k).automation_condition]

    assert names(with_condition) == set(LIVE_SIDE_NAMES)


def test_the_jobs_sensors_and_the_schedule_are_there(definitions):
    repository = definitions.get_repository_def()

    jobs = {job.name for job in repository.get_all_jobs()} - {"__ASSET_JOB"}
    assert jobs == {
        "experiment",
        "refresh",
        "validate",
        "compare",
        "top_up",
        "choose_covariates",
        "adopt_experiment_pool",
    }
    assert {s.name for s in repository.sensor_defs} == {
        "live_pool_sensor",
        "live_side_sensor",
        "run_failure_alerts",
        "catch_up",
        "dead_runs",
        "alerts",
    }
    assert [s.name for s in repository.schedule_defs] == ["daily_refresh"]


@pytest.mark.parametrize(
    ("job", "trains"), [("experiment", True), ("refresh", False), ("validate", False)]
)
def test_only_the_experiment_trains_proxies(definitions, job, trains):
    selected = definitions.resolve_job_def(job).asset_layer.selected_asset_keys

    assert (dg.AssetKey("proxy_runs") in selected) == trains


def test_steps_run_in_the_process_of_their_run(definitions):
    """A step in a process of its own costs 6 s; the training step starts its own workers."""
    assert definitions.executor is dg.in_process_executor


def test_loading_the_definitions_imports_nothing_heavy(tmp_path):
    """Each run, sensor tick and reload imports them: 12 s and 500 MB otherwise."""
    code = (
        "import sys, causalmix_pipeline.definitions;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )

    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout.strip() == "[]"
