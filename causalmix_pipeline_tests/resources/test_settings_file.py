"""Reading `causalmix.yaml`: errors as the user wrote the field; `init` writes what loads."""

import pytest
import yaml

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import (
    CONFIG_VARIABLE,
    config_path,
    load_settings,
    write_commented_settings,
)

TASK = {"name": "math", "path": "eval/math.jsonl"}


def load(tmp_path, raw) -> Settings:
    path = tmp_path / "causalmix.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return load_settings(path)


def refusal(tmp_path, raw) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, raw)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("raw", "start", "end"),
    [
        (
            {"tasks": [TASK, TASK | {"name": "b"}, TASK | {"name": "c", "weight": -1}]},
            "tasks[2].weight must be >= 0, got -1: How much",
            "only reports it.",
        ),
        (
            {"tasks": [TASK | {"wieght": 1}]},
            "tasks[0].wieght is no setting; known here: name, path, kind, weight, direction,",
            "",
        ),
        ({"sede": 1}, "sede is no setting; known here: data_dir, storage, pools", "seed."),
        ({"design": {"n_run": 8}}, "design.n_run is no setting; known here: n_runs", "stages."),
        ({"tasks": [{"name": "math"}]}, "tasks[0].path must be given, got nothing: JSONL", ""),
        ({"tasks": [TASK | {"name": "A b"}]}, "tasks[0].name must match pattern", "underscores."),
        (
            {"tasks": [TASK | {"direction": "maximize"}]},
            "direction of task 'math' must be minimize with kind loss, got maximize",
            "leave it out",
        ),
        (
            {"tasks": [TASK | {"kind": "rank"}]},
            "tasks[0].kind must be 'loss', 'choice', 'exact' or 'lm_eval', got 'rank'",
            "",
        ),
        (
            {"tasks": [TASK | {"kind": "lm_eval"}]},
            "harness_task of task 'math' must be given exactly with kind lm_eval, got None",
            "",
        ),
        (
            {"tasks": [TASK | {"kind": "exact", "measure": "accuracy"}]},
            "measure of task 'math' must be left out with kind exact",
            "choice",
        ),
        (
            {"proxy": {"preset": "big"}},
            "proxy.preset must be 'tests', 'demo', 'study', 'paper' or 'longcot'",
            "",
        ),
        ({"design": {"n_runs": "many"}}, "design.n_runs must be a integer", ""),
        (
            {"automation": {"sensor_interval_seconds": 5}},
            "automation.sensor_interval_seconds must be >= 30, got 5",
            "",
        ),
        (
            {"policy": {"least_share": 0.5, "most_share": 0.2}},
            "policy.least_share must be <= policy.most_share (0.2), got 0.5",
            "",
        ),
        (
            {"design": {"states": {"size_range": [0.1, 2]}}},
            "design.states.size_range[1] must be",
            "",
        ),
    ],
)
def test_an_error_names_the_field_as_it_was_written(tmp_path, raw, start, end):
    lines = refusal(tmp_path, raw)

    assert lines[0].endswith("1 wrong")
    assert lines[1].startswith(start)
    assert lines[1].endswith(end)


def test_every_wrong_field_is_told_at_once(tmp_path):
    lines = refusal(tmp_path, {"seed": -1, "backend": {"workers": -2}})

    assert lines[0].endswith("2 wrong")
    assert {line.split(" ")[0] for line in lines[1:]} == {"seed", "backend.workers"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [("a: [", "must be YAML"), ("- a\n- b", "must hold `field: value` lines, got list")],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, raw, message):
    assert message in refusal(tmp_path, raw)[0]


def test_a_missing_file_is_refused_with_the_way_out_unless_defaults_will_do(tmp_path):
    with pytest.raises(ConfigError, match="run `causalmix init`"):
        load_settings(tmp_path / "none.yaml")

    settings = load_settings(tmp_path / "none.yaml", missing_ok=True)
    assert settings.model_dump() == Settings().model_dump()
    assert settings.data_path == tmp_path / "data"


def test_an_empty_file_means_the_defaults(tmp_path):
    assert load(tmp_path, "").model_dump() == Settings().model_dump()


def test_paths_are_relative_to_the_file_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    settings = load(tmp_path, {"tasks": [TASK], "pools": {"live": "/srv/pool"}})

    assert settings.data_path == tmp_path / "data"
    assert settings.experiment_path == tmp_path / "data" / "experiment"
    assert str(settings.live_path) == "/srv/pool"
    assert settings.task_paths == {"math": tmp_path / "eval" / "math.jsonl"}


def test_the_environment_names_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert str(config_path()) == "causalmix.yaml"

    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "other.yaml"))
    assert config_path() == tmp_path / "other.yaml"


def test_init_writes_every_field_with_what_it_is_for_and_loads_back_to_the_defaults(tmp_path):
    path = write_commented_settings(tmp_path / "causalmix.yaml")

    assert load_settings(path).model_dump() == Settings().model_dump()
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 140
    flat = " ".join(line.strip().removeprefix("#").strip() for line in text.splitlines())
    for name, field in Settings.model_fields.items():
        assert f"{name}:" in text
        assert field.description in flat


def test_the_example_task_of_init_is_valid(tmp_path):
    text = write_commented_settings(tmp_path / "causalmix.yaml").read_text()
    lines = text.splitlines()
    start = lines.index("# tasks:")
    example = "\n".join(line.removeprefix("# ") for line in lines[start : start + 4])

    assert load(tmp_path, example).tasks[0].name == "manuals"


def test_init_never_overwrites(tmp_path):
    path = write_commented_settings(tmp_path / "causalmix.yaml")

    with pytest.raises(ConfigError, match="must not exist yet"):
        write_commented_settings(path)
