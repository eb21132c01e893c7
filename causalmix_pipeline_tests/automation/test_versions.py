"""An edited setting makes stale what it decides, and nothing else."""

import pytest

from causalmix_pipeline.automation.versions import DEPENDS_ON
from causalmix_pipeline.definitions import build_definitions
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
         | {"validation_runs"}),
        ({"policy": {"trust_radius": 0.1}}, RECOMMENDATION),
        ({"policy": {"budget_tokens": 10**6}}, RECOMMENDATION | {"training_export"}),
        ({"export": {"formats": ["json"], "tokens": None}}, set()),
        ({"export": {"formats": ["trl"]}}, {"training_export"}),
        ({"export": {"tokens": 10**6}}, {"training_export"}),
        ({"tasks": [TASKS[0] | {"weight": 0.5}, TASKS[1]]}, RECOMMENDATION | {"validation_runs"}
         | {"cate_interpretation", "cate_checks"}),
        ({"tasks": TASKS[:1]}, RECOMMENDATION | {"eval_tasks", "validation_runs"}
         | {"cate_interpretation", "cate_checks"}),
        ({"covariates": ["log2_tokens"]}, {"run_table", "live_covariates"}),
        ({"covariates": ["mtld_p90"]}, {"run_table", "live_covariates"}
         | {"pool_states", "normaliser"}),
        ({"estimators": ["regmix"]}, {"cate_model"}),
        ({"design": DESIGN | {"n_runs": 18}}, {"mixture_design", "pool_states"}),
        ({"design": DESIGN | {"noise_panel": {"mixtures": 2, "seeds": 3}}}, {"mixture_design"}),
        ({"design": DESIGN | {"states": {"noise": 0.1}}}, {"pool_states", "mixture_design"}
         | {"experiment_documents", "normaliser"}),
        ({"backend": {"workers": 1}}, set()),
        ({"profile": {"vocd_budget_tokens": 5_000}}, {"experiment_documents", "live_documents"}),
        ({"proxy": PROXY | {"overrides": PROXY["overrides"] | {"steps": 40}}}, {"mixture_design"}
         | {"validation_runs"}),
        ({"proxy": PROXY | {"overrides": PROXY["overrides"] | {"vocab_size": 400}}},
         {"tokenizer", "mixture_design", "validation_runs"}),
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
    assert set(DEPENDS_ON) <= set(versions(tmp_path))
