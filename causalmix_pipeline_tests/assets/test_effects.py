"""What the checks of the effect model say, and of whom."""

import pytest

from causalmix_pipeline.assets.effects import belief_checks


def found(**changes) -> dict:
    return {
        "treatment_r2": 0.0,
        "noise_floor": [
            {"task": "math", "above_noise": True},
            {"task": "code", "above_noise": True},
        ],
        "placebo": [
            {"task": "math", "real": 0.8, "mixtures_permuted": 0.1},
            {"task": "code", "real": 0.8, "mixtures_permuted": 0.1},
        ],
    } | changes


def verdicts(value, weights=None) -> dict[str, bool]:
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
        (
            {"placebo": [{"task": "math", "real": 0.1, "mixtures_permuted": 0.2}]},
            "beats_placebo",
        ),
        (
            {"placebo": [{"task": "math", "real": float("nan"), "mixtures_permuted": 0.2}]},
            "beats_placebo",
        ),
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
