"""An edited setting makes stale what it decides, and nothing else."""

import hashlib
import json

import pytest

from causalmix_pipeline.automation.versions import DEPENDS_ON
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline_tests.conftest import write_documents, write_project

TASKS = [
    {"name": "math", "path": "eval/math.jsonl", "weight": 0.7},
    {"name": "code", "path": "eval/code.jsonl", "weight": 0.3},
]
PROXY = {
    "preset": "tests",
    "overrides": {"vocab_size": 384, "sequence_length": 32},
}
DESIGN = {"n_runs": 16, "mixtures_per_state": 2, "noise_panel": {"mixtures": 2, "seeds": 2}}
SIZES = [{"share": 0.5, "hidden": 64}]
SIZED = {"mixture_design", "run_table", "live_covariates", "validation_runs", "rivals"}
RECOMMENDATION = {"baseline_mixtures", "recommended_mixture", "report"}


def versions(root, **overrides) -> dict[str, str]:
    graph = build_definitions(write_project(root, **overrides)).resolve_asset_graph()
    return {
        key.to_user_string(): graph.get(key).code_version for key in graph.materializable_asset_keys
    }


IMPORTED = [{"source": "team_b", "ratios": "r.csv", "metrics": "m.csv", "covariates": "x.csv"}]


@pytest.mark.parametrize(
    ("overrides", "stale"),
    [
        ({}, set()),
        ({"imported_runs": IMPORTED}, {"imported_runs"}),
        ({"seed": 1}, RECOMMENDATION | {"cate_model", "cate_checks", "training_export"}
         | {"validation_runs", "rivals"}),
        ({"policy": {"trust_radius": 0.1}}, RECOMMENDATION | {"rivals"}),
        ({"policy": {"budget_tokens": 10**6}}, RECOMMENDATION | {"training_export", "rivals"}),
        ({"compare": {"states": 8}}, {"rivals"}),
        ({"compare": {"controllers": {"doremi": {}}}}, {"rivals"}),
        ({"export": {"formats": ["json"], "tokens": None}}, set()),
        ({"export": {"formats": ["trl"]}}, {"training_export"}),
        ({"export": {"tokens": 10**6}}, {"training_export"}),
        ({"tasks": [TASKS[0] | {"weight": 0.5}, TASKS[1]]}, RECOMMENDATION | {"validation_runs"}
         | {"cate_interpretation", "cate_checks", "rivals"}),
        ({"tasks": TASKS[:1]}, RECOMMENDATION | {"eval_tasks", "validation_runs"}
         | {"cate_interpretation", "cate_checks", "rivals"}),
        ({"covariates": ["log2_tokens"]}, {"run_table", "live_covariates"}),
        ({"covariates": ["mtld_p90"]}, {"run_table", "live_covariates"}
         | {"pool_states", "normaliser"}),
        ({"estimators": ["regmix"]}, {"cate_model"}),
        ({"design": DESIGN | {"n_runs": 18}}, {"mixture_design", "pool_states"}),
        ({"design": DESIGN | {"noise_panel": {"mixtures": 2, "seeds": 3}}}, {"mixture_design"}),
        ({"design": DESIGN | {"stages": 1}}, set()),
        ({"design": DESIGN | {"stages": 2}}, {"mixture_design"}),
        ({"design": DESIGN | {"states": {"noise": 0.1}}}, {"pool_states", "mixture_design"}
         | {"experiment_documents", "normaliser"}),
        ({"backend": {"workers": 1}}, set()),
        ({"profile": {"vocd_budget_tokens": 5_000}}, {"experiment_documents", "live_documents"}),
        ({"proxy": PROXY | {"overrides": PROXY["overrides"] | {"steps": 40}}}, {"mixture_design"}
         | {"validation_runs", "rivals"}),
        ({"proxy": PROXY | {"overrides": PROXY["overrides"] | {"vocab_size": 400}}},
         {"tokenizer", "mixture_design", "validation_runs", "rivals"}),
        ({"proxy": PROXY | {"sizes": []}, "policy": {"target_parameters": None}}, set()),
        ({"proxy": PROXY | {"sizes": SIZES}}, SIZED),
        ({"columns": {"group": None}}, {"tokenizer", "experiment_documents", "live_documents"}),
        ({"automation": {"refresh_hour": 3}}, set()),
        ({"quality": {"max_rejected_share": 0.5}}, set()),
    ],
)  # fmt: skip
def test_an_edited_setting_makes_stale_what_it_decides(tmp_path, overrides, stale):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()

    before = versions(tmp_path / "before")
    after = versions(tmp_path / "after", **overrides)

    assert {name for name in before if before[name] != after[name]} == stale


def test_another_target_size_is_another_state_of_the_live_pool_alone(tmp_path):
    proxy = PROXY | {"sizes": SIZES}
    before = versions(tmp_path, proxy=proxy)
    after = versions(tmp_path, proxy=proxy, policy={"target_parameters": 1e9})

    assert {name for name in before if before[name] != after[name]} == {
        "live_covariates",
        "rivals",  # on request only; their new pool states are asked at the target, too
    }


def test_other_content_of_an_imported_table_is_no_other_version_of_the_code(tmp_path):
    """It's observed: a running daemon would keep the version that it loaded."""
    before = versions(tmp_path, imported_runs=IMPORTED)
    (tmp_path / "m.csv").write_text("run,math,code\n")

    assert versions(tmp_path, imported_runs=IMPORTED) == before


def test_other_held_out_text_makes_the_tasks_stale(tmp_path):
    before = versions(tmp_path)
    path = write_project(tmp_path)
    write_documents(tmp_path / "eval" / "math.jsonl", "math", n=20, n_words=60, seed=9)

    graph = build_definitions(path).resolve_asset_graph()
    after = {
        key.to_user_string(): graph.get(key).code_version for key in graph.materializable_asset_keys
    }
    assert {name for name in before if before[name] != after[name]} == {"eval_tasks"}


def test_every_name_with_a_version_is_an_asset(tmp_path):
    assert set(DEPENDS_ON) <= set(versions(tmp_path, design=DESIGN | {"stages": 2}))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("mixture_design", "18011832"),
        ("run_table", "7fa021e6"),
        ("live_covariates", "7fa021e6"),
        ("recommended_mixture", "3174a4d7"),
        ("validation_runs", "443588a6"),
    ],
)
def test_fields_that_came_later_leave_the_versions_of_a_project_without_them(name, digest):
    text = json.dumps(DEPENDS_ON[name](Settings()), sort_keys=True)

    assert hashlib.sha256(text.encode()).hexdigest()[:8] == digest
