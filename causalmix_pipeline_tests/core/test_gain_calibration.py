"""Corrections of gains: they find a planted exaggeration, and leave honest gains alone."""

import numpy as np
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.gain_calibration import (
    PRIOR_DEVIATION,
    GainCalibration,
    calibrated,
    read_calibration,
    slope_of_gains,
    widening,
)
from causalmix_pipeline.core.runs import RunTable

RUNS = SyntheticPool.draw(4, 2, 1, seed=3).run_table(60, 4, seed=5)
RNG = np.random.default_rng(9)


def told(gain_N: np.ndarray, true_N: np.ndarray, runs: RunTable = RUNS, *, within: bool = True):
    """The slope where gains were predicted and others came true, with noise and state levels."""
    level_N = RNG.normal(size=runs.state_ids.max() + 1)[runs.state_ids]
    outcome_N = level_N + true_N + RNG.normal(0, 0.2, size=len(gain_N))
    return slope_of_gains(outcome_N, level_N + gain_N, level_N, runs, within_states=within)


@pytest.mark.parametrize("within", [True, False])
def test_a_planted_exaggeration_is_found(within):
    gain_N = RNG.normal(size=RUNS.n_runs)
    slope, se = told(gain_N, np.where(gain_N > 0, 0.6 * gain_N, gain_N), within=within)

    assert slope == pytest.approx(0.6, abs=3 * se)
    assert 0.01 < se < 0.06


def test_losses_that_are_exaggerated_do_not_shrink_gains():
    gain_N = RNG.normal(size=RUNS.n_runs)

    assert told(gain_N, np.where(gain_N < 0, 0.5 * gain_N, gain_N))[0] > 0.95


def test_honest_gains_and_those_promised_too_low_are_left_alone():
    gain_N = RNG.normal(size=RUNS.n_runs)

    assert told(gain_N, gain_N)[0] > 0.95
    assert told(gain_N, 1.5 * gain_N)[0] == 1.0


def test_a_slope_that_is_mostly_error_is_hardly_believed():
    """Twelve states and loud noise: what is left is the prior, 1 give or take .2."""
    few = SyntheticPool.draw(4, 2, 1, seed=3).run_table(12, 4, seed=5)
    rng = np.random.default_rng(4)
    slope_M, se_M = np.array(
        [
            slope_of_gains(
                g + rng.normal(0, 3, size=g.size), g, np.zeros(g.size), few, within_states=True
            )
            for g in rng.normal(size=(50, few.n_runs))
        ]
    ).T

    assert np.quantile(slope_M, 0.1) > 0.8
    assert np.quantile(se_M, 0.1) > 0.15
    assert se_M.max() <= PRIOR_DEVIATION


def test_without_gains_only_the_prior_speaks():
    gain_N = -np.abs(RNG.normal(size=RUNS.n_runs))

    assert told(gain_N, gain_N) == (1.0, PRIOR_DEVIATION)


def test_only_what_is_gained_over_the_equal_mixture_shrinks():
    half = [GainCalibration(factor=2.0, slope=0.5, slope_se=0.1)]
    mean_M1, se_M1 = calibrated(np.array([[1.0], [-1.0]]), np.full((2, 1), 0.3), np.zeros(1), half)

    assert mean_M1.ravel().tolist() == [0.5, -1.0]
    assert se_M1.ravel() == pytest.approx([np.hypot(0.6, 0.1), 0.6])


def test_a_reference_with_a_gain_of_its_own_shrinks_too():
    """From .4 above the equal mixture to 1.0 above: half of .6 is left; to .1 below: .2 + .1."""
    half = [GainCalibration(slope=0.5)]
    mean_M1, _ = calibrated(np.array([[0.6], [-0.5]]), np.zeros((2, 1)), np.array([0.4]), half)

    assert mean_M1.ravel() == pytest.approx([0.3, -0.3])


def test_nothing_is_corrected_without_a_calibration():
    mean_MT, se_MT = RNG.normal(size=(2, 5, 3))
    kept = calibrated(mean_MT, np.abs(se_MT), RNG.normal(size=3), [GainCalibration()] * 3)

    np.testing.assert_array_equal(kept[0], mean_MT)
    np.testing.assert_array_equal(kept[1], np.abs(se_MT))


def test_a_calibration_is_read_as_it_was_written():
    one = {"a": GainCalibration(1.5, 0.8, 0.1), "b": GainCalibration()}

    assert read_calibration({task: value.to_dict() for task, value in one.items()}) == one


def test_intervals_that_cover_too_little_are_widened_until_nine_of_ten_are_inside():
    """Errors of 3 standard errors that were told as 1; seed noise doesn't grow with them."""
    error_M = np.abs(RNG.normal(0, np.hypot(3.0, 1.0), size=4000))
    ones_M, promise_M = np.ones(4000), RNG.normal(size=4000)

    factor = widening(error_M, ones_M, ones_M, promise_M)
    assert factor == pytest.approx(3.0, rel=0.1)
    assert widening(np.abs(RNG.normal(size=4000)), ones_M, ones_M, promise_M) == 1.0


def test_nine_of_ten_of_the_most_promising_gains_must_be_inside_too():
    """Errors as told, but for the fifth that promises most: three times as large."""
    promise_M = np.linspace(-1, 1, 4000)
    true_M = np.where(promise_M > 0.6, 3.0, 1.0)
    error_M, ones_M, none_M = np.abs(RNG.normal(0, true_M)), np.ones(4000), np.zeros(4000)

    assert widening(error_M, ones_M, none_M, promise_M) == pytest.approx(3.0, rel=0.1)
    # The same errors, promised by anyone: nine of ten of all are inside at less.
    shuffled = widening(error_M, ones_M, none_M, RNG.permutation(promise_M))
    assert 1.2 < shuffled < 2.0


def test_a_handful_of_promising_gains_widens_nothing():
    error_M = np.full(50, 0.1)
    error_M[-10:] = 9.0  # a fifth of 50

    promise_M = np.arange(50.0)
    factor = widening(error_M, np.ones(50), np.zeros(50), promise_M)
    assert factor == widening(error_M, np.ones(50), np.zeros(50), -promise_M)
