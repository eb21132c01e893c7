"""Settings: every rule refuses with the field, the value and the way out; defaults load."""

import dagster as dg
import pytest
from pydantic import ValidationError

from causalmix_pipeline.adapters.estimators import ESTIMATOR_NAMES
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.study_settings import PRESET_RUNS, EstimatorName

TASK = {"name": "math", "path": "eval/math.jsonl"}


def refusal(**raw) -> str:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(raw)
    return str(caught.value.errors()[0].get("ctx", {}).get("error", caught.value))


@pytest.mark.parametrize(
    ("raw", "field", "value"),
    [
        ({"tasks": [TASK, TASK]}, "tasks[1].name", "'math'"),
        ({"tasks": [{**TASK, "weight": 0}]}, "tasks must hold at least one weight > 0", "only 0"),
        ({"covariates": ["log2_tokens", "mood"]}, "covariates", "'mood'"),
        ({"domains": ["math"]}, "domains", "['math']"),
        ({"domains": ["math", "math"]}, "domains", "['math', 'math']"),
        ({"pools": {"experiment": "data/x", "live": "data/x/"}}, "pools.live", "data/x"),
        ({"pools": {"experiment": "x", "live": {"a": "y", "b": "x/"}}}, "pools.live.b", "'x'"),
        ({"pools": {"live": {"Web": "x"}}}, "pools.live must name each pool", "'Web'"),
        ({"pools": {"live": {"../web": "x"}}}, "pools.live must name each pool", "'../web'"),
        ({"pools": {"live": {"-x": "x"}}}, "letter or digit first", "'-x'"),
        ({"pools": {"live": {"a" * 61: "x"}}}, "60 characters at most", "'aaaa"),
        ({"pools": {"live": {"a\n": "x"}}}, "pools.live must name each pool", "'a\\n'"),
        ({"pools": {"live": {2026: "x"}}}, "in quotation marks", "2026"),
        ({"pools": {"live": {"a": ""}}}, "pools.live.a must be a folder", "''"),
        ({"pools": {"live": {"a": None}}}, "pools.live.a must be a folder", "None"),
        ({"pools": {"live": {}}}, "pools.live must be a folder", "{}"),
        ({"pools": {"live": ["x"]}}, "pools.live must be a folder", "['x']"),
        ({"pools": {"live": ""}}, "pools.live must be a folder", "''"),
        ({"design": {"strength_range": [3, 0.4]}}, "design.strength_range", "[3.0, 0.4]"),
        ({"design": {"strength_range": [0, 1]}}, "design.strength_range[0]", "got 0"),
        ({"design": {"n_runs": 10}}, "design.n_runs", "use 12"),
        ({"design": {"states": {"size_range": [0, 1]}}}, "design.states.size_range[0]", "got 0"),
        (
            {"design": {"states": {"size_range": [1, 0.5]}}},
            "design.states.size_range",
            "[1.0, 0.5]",
        ),
        ({"design": {"states": {"tilt_metric": "mood"}}}, "design.states.tilt_metric", "'mood'"),
        ({"proxy": {"overrides": {"depth": 2}}}, "proxy.overrides.depth", "known: hidden"),
        ({"proxy": {"overrides": {"hidden": 33}}}, "proxy.hidden", "33"),
        ({"budget": {"max_cost": 40}}, "budget.max_cost must come with", "got 40 and no price"),
        ({"policy": {"least_share": 0.6, "most_share": 0.5}}, "policy.least_share", "got 0.6"),
        ({"policy": {"reference": "fixed"}}, "policy.fixed_mixture", "reference fixed"),
        ({"policy": {"fixed_mixture": {"math": 1.0}}}, "policy.fixed_mixture", "reference natural"),
        (
            {"policy": {"reference": "fixed", "fixed_mixture": {"math": 0.5, "code": 0.4}}},
            "policy.fixed_mixture must sum to 1",
            "got 0.9",
        ),
        ({"compare": {"controllers": {"exp3": {}}}}, "compare.controllers must be", "'exp3'"),
        (
            {"compare": {"controllers": {"doremi": {"eta": 1.0}}}},
            "compare.controllers.doremi must have settings among",
            "'eta'",
        ),
        ({"compare": {"larger": {"depth": 2}}}, "compare.larger.depth", "known: hidden"),
        ({"compare": {"larger": {"vocab_size": 99}}}, "compare.larger.vocab_size", "known: hidden"),
        ({"compare": {"larger": {"hidden": "64"}}}, "compare.larger.hidden must be a", "'64'"),
        ({"compare": {"larger": {"hidden": 33}}}, "compare.larger.hidden must be a multiple", "33"),
        ({"compare": {"larger": {"bf16": 1}}}, "compare.larger.bf16 must be true or", "got 1"),
        (
            {"compare": {"larger": {"hidden": 16}}},
            "compare.larger.hidden must make a model that costs at least",
            "{'hidden': 16}",
        ),
        (
            {"compare": {"controllers": {"rl_scheduler": {"updates": 2.5}}}},
            "compare.controllers.rl_scheduler.updates must be a whole number",
            "got 2.5",
        ),
        (
            {"compare": {"controllers": {"doremi": {"step_size": float("inf")}}}},
            "compare.controllers.doremi.step_size must be a finite number",
            "got inf",
        ),
        (
            {"compare": {"larger": {"hidden": 64}}, "proxy": {"pretrained": "x"}},
            "compare.larger must be empty with proxy.pretrained",
            "{'hidden': 64}",
        ),
    ],
)
def test_a_broken_rule_names_the_field_and_the_value(raw, field, value):
    message = refusal(**raw)

    assert field in message
    assert value in message


def test_the_defaults_are_valid():
    settings = Settings()

    assert settings.n_runs == 128
    assert settings.proxy.to_config().steps == 1000
    assert settings.proxy.to_config().hidden == 32


@pytest.mark.parametrize("preset", PRESET_RUNS)
def test_a_preset_says_how_many_runs_unless_the_design_does(preset):
    proxy = {"preset": preset, "pretrained": "models/any"}
    assert Settings.model_validate({"proxy": proxy}).n_runs == PRESET_RUNS[preset]
    explicit = {"proxy": proxy, "design": {"n_runs": 12}}
    assert Settings.model_validate(explicit).n_runs == 12


def test_overrides_go_over_the_preset():
    proxy = {"preset": "tests", "overrides": {"hidden": 64}}

    config = Settings.model_validate({"proxy": proxy}).proxy.to_config()

    assert (config.hidden, config.steps) == (64, 30)


@pytest.mark.parametrize("preset", ["paper", "longcot"])
def test_a_preset_for_gpus_needs_a_pretrained_model(preset):
    assert "proxy.pretrained must be set" in refusal(proxy={"preset": preset})


def test_samples_of_a_pretrained_recipe_become_tokens_of_the_pool():
    overrides = {"method": "lora", "samples": 500}
    raw = {"preset": "longcot", "pretrained": "Qwen/Qwen3-4B", "overrides": overrides}
    proxy = Settings.model_validate({"proxy": raw}).proxy

    config = proxy.to_pretrained("/models/qwen3", weights_hash="h", mean_tokens=4000.5)

    assert (config.model, config.weights_hash) == ("/models/qwen3", "h")
    assert (config.tokens, config.sequence_length) == (2_000_250, 16_384)
    assert (config.method, config.gradient_checkpointing) == ("lora", True)
    assert proxy.pool_vocab_size == 1024
    assert proxy.to_config().sequence_length == 16_384


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hidden": 64}, "proxy.overrides.hidden is no proxy setting"),
        ({"weights_hash": "x"}, "proxy.overrides.weights_hash is no proxy setting"),
        ({"samples": 0}, "proxy.overrides.samples must be >= 1, got 0"),
        ({"learning_rate": -1}, "proxy.learning_rate must be finite and > 0, got -1"),
    ],
)
def test_overrides_of_a_pretrained_recipe_are_checked(overrides, said):
    assert said in refusal(proxy={"pretrained": "m", "overrides": overrides})


def test_settings_do_not_change_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().seed = 3


def test_the_estimators_that_settings_know_are_those_that_exist():
    assert set(EstimatorName.__args__) == set(ESTIMATOR_NAMES)


def test_a_fingerprint_follows_its_own_sections_only():
    plain, other = Settings(), Settings.model_validate({"seed": 1})

    assert plain.fingerprint("seed") != other.fingerprint("seed")
    assert plain.fingerprint("policy", "design") == other.fingerprint("policy", "design")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "q"}, "columns.prompt and columns.response belong together"),
        ({"prompt": "q", "response": "a", "messages": "m"}, "two forms of a document"),
        ({"numbers": ("text",)}, "columns.numbers must be different"),
        ({"numbers": ("mtld",)}, "must not use the name of a metric"),
        ({"numbers": ("task_like_math",)}, "must not use the name of a metric"),
    ],
)
def test_columns_that_contradict_themselves_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        Settings(columns=columns)


def test_an_override_that_yaml_took_for_text_is_told_by_name():
    with pytest.raises(ValidationError, match=r"proxy\.overrides must hold numbers.*1\.0e-4"):
        Settings.model_validate({"proxy": {"overrides": {"learning_rate": "1e-4"}}})


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"fresh_days": 8, "overdue_days": 8}, "automation.overdue_days must be > automation"),
        ({"owners": ["ann@example.com", "bob"]}, "automation.owners[1] must be an email address"),
        ({"owners": ["team:"]}, "got 'team:'"),
        ({"owners": ["team:a\nb"]}, "automation.owners[0]"),
    ],
)
def test_upkeep_that_cannot_be_shown_is_refused(raw, said):
    assert said in refusal(automation=raw)


def test_owners_are_those_that_dagster_takes():
    owners = ("ann.b+c@mail.example.com", "team:data", "team:data mix-2")

    assert Settings.model_validate({"automation": {"owners": owners}}).automation.owners == owners
    assert tuple(dg.AssetSpec("any", owners=owners).owners) == owners


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"command": ["", "x"]}, "alerts.command[0] must be text"),
        ({"command": ["a", "b\0"]}, "alerts.command[1] must be text"),
        ({"command": []}, "at least 1 item"),
        ({"command_timeout_seconds": 16}, "less than or equal to 15"),
        ({"interval_seconds": 5}, "greater than or equal to 30"),
        ({"attempts": 0}, "greater than or equal to 1"),
    ],
)
def test_alerts_that_cannot_be_handed_over_are_refused(raw, said):
    assert said in refusal(alerts=raw)


def test_a_webhook_url_in_place_of_its_variable_is_refused_without_repeating_it():
    said = refusal(alerts={"webhook_env": "https://hooks.example.com/secret"})

    assert "alerts.webhook_env must be the name of an environment variable" in said
    assert "secret" not in said


def test_alerts_are_handed_to_nobody_unless_a_channel_is_set(monkeypatch):
    monkeypatch.setenv("HOOK", "http://127.0.0.1/")
    alerts = [Settings.model_validate({"alerts": raw}).alerts for raw in
              ({}, {"webhook_env": "HOOK"}, {"command": ["logger"]})]  # fmt: skip

    assert [section.is_on for section in alerts] == [False, True, True]
    assert [section.webhook_url() for section in alerts] == [None, "http://127.0.0.1/", None]


def test_one_pool_has_no_name_and_several_have_theirs():
    one = Settings.model_validate({"pools": {"live": "s3://team/pool"}})
    two = Settings.model_validate({"pools": {"live": {"web-2026w47": "a", "long_cot": "s3://b"}}})

    assert one.live_pools == {None: "s3://team/pool"}
    assert one.live_path == "s3://team/pool"
    assert two.live_pools == {"web-2026w47": two.resolve("a"), "long_cot": "s3://b"}
    assert two.live_location("long_cot") == "s3://b"


@pytest.mark.parametrize(
    ("live", "name", "said"),
    [("a", "web", "names none"), ({"web": "a"}, None, "name one"), ({"web": "a"}, "x", "(web)")],
)
def test_a_pool_that_is_not_there_is_refused_with_those_that_are(live, name, said):
    settings = Settings.model_validate({"pools": {"live": live}})

    with pytest.raises(ConfigError, match=r"must be one of pools\.live") as caught:
        settings.live_location(name)
    assert said in str(caught.value)
