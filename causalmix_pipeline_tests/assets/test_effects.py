"""What the checks of the effect model say, and of whom."""

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import choose_estimator, fit_chosen
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.assets.effects import belief_checks, effect_beliefs
from causalmix_pipeline.core.effects import permute_mixtures
from causalmix_pipeline.core.falsification import OBJECTIVE


def trials(mixtures: bool | None = True, states: bool | None = True) -> list[dict]:
    return [
        {"check": check, "task": task, "passed": passed, "reason": "" if passed in (True, False)
         else "the runs have no covariates"}
        for check, passed in (("mixtures_matter", mixtures), ("states_matter", states))
        for task in ("math", OBJECTIVE)
    ]  # fmt: skip


def found(**changes) -> dict:
    return {
        "treatment_r2": 0.0,
        "noise_floor": [
            {"task": "math", "above_noise": True},
            {"task": "code", "above_noise": True},
        ],
        "falsification": trials(),
    } | changes


def verdicts(value, weights=None) -> dict:
    results = belief_checks(value, weights or {"math": 1.0, "code": 0.0})
    assert all(result.severity.value == "WARN" for result in results)
    return {result.check_name: result.passed for result in results}


def test_a_clean_experiment_passes_all():
    assert all(verdicts(found()).values())


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"treatment_r2": 0.3}, "randomised"),
        ({"noise_floor": [{"task": "math", "above_noise": False}]}, "above_the_noise_floor"),
        ({"falsification": trials(mixtures=False)}, "beats_placebo"),
        ({"falsification": trials(states=False)}, "state_matters"),
        ({"falsification": trials(states=None)}, "state_matters"),
    ],
)
def test_each_check_fails_alone(changes, failed):
    result = verdicts(found(**changes))

    assert [name for name, passed in result.items() if not passed] == [failed]


def test_a_task_that_nobody_wants_fails_nothing():
    value = found(noise_floor=[{"task": "code", "above_noise": False}])

    assert all(verdicts(value).values())


def test_without_repeated_runs_the_noise_floor_is_unknown_not_failed():
    assert verdicts(found(noise_floor=[{"task": "math", "above_noise": None}]))[
        "above_the_noise_floor"
    ]


def test_what_cannot_be_told_does_not_pass_and_says_why():
    results = belief_checks(found(falsification=trials(states=None)), {"math": 1.0})

    told = next(result for result in results if result.check_name == "state_matters")
    assert told.metadata["can't be told"].value == "the runs have no covariates"


def beliefs_of(runs) -> dict:
    choice = choose_estimator(runs, ["structured_ridge"])
    model = {
        "seed": 0,
        "chosen": choice.chosen,
        "parameters": fit_chosen(runs, choice.chosen).parameters()["members"],
        "calibration": {task: one.to_dict() for task, one in choice.calibration.items()},
        "out_of_fold": {
            task: choice.validations["structured_ridge"].prediction_NT[:, t].tolist()
            for t, task in enumerate(runs.tasks)
        },
    }
    return effect_beliefs(runs, model, {"task_0": 2.0})


def test_the_tests_see_an_effect_and_a_placebo():
    runs = SyntheticPool.draw(4, 2, 2, seed=1).run_table(48, 4, seed=1)
    placebo = permute_mixtures(runs, np.random.default_rng(0))

    real, none = (
        verdicts(found(**beliefs_of(table)), {"task_0": 2.0}) for table in (runs, placebo)
    )

    assert real["beats_placebo"] and real["state_matters"]
    assert not none["beats_placebo"] and not none["state_matters"]


def test_the_value_holds_robustness_and_the_worth_of_more_runs():
    runs = SyntheticPool.draw(4, 2, 2, seed=1).run_table(48, 4, seed=1)

    value = beliefs_of(runs)

    assert 0 < value["robustness"]["value_lower"] < value["robustness"]["value"] < 1
    assert value["learning_curve"]["estimator"] == "structured_ridge"
    assert "doubling the runs to 384" in value["learning_curve"]["sentence"]


def test_few_runs_are_told_so():
    runs = SyntheticPool.draw(4, 2, 2, seed=1).run_table(8, 4, seed=1)

    assert beliefs_of(runs)["learning_curve"]["sentence"] == "can't be told from so few runs"
