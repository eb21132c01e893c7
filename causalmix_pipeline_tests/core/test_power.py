import numpy as np
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.belief import noise_floor
from causalmix_pipeline.core.design import DesignPlan, make_design
from causalmix_pipeline.core.effects import center_by_state
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.power import LEVEL, Experiment, power_table

DOMAINS = 5
SEED_SD = 0.02


def features(mixture_ND: np.ndarray, curved: bool) -> np.ndarray:
    """Shares of all domains but one, and their squares where outcomes are curved."""
    shares = mixture_ND[:, 1:]
    return np.hstack([shares, shares**2]) if curved else shares


def whitener(curved: bool) -> np.ndarray:
    """Makes the features of one state's mixtures uncorrelated, of variance 1 each; (P, P)."""
    design = make_design(DesignPlan(n_runs=4096, panel_mixtures=0), DOMAINS)
    centered = center_by_state(features(design.mixture_ND, curved), design.state_N)
    covariance = centered.T @ centered / (len(centered) * 3 / 4)
    return np.linalg.inv(np.linalg.cholesky(covariance)).T


def announced_share(n_runs: int, gain: float, *, curved: bool, trials: int = 600) -> float:
    """How often the recommended mixture's predicted gain exceeds its Scheffe bound.

    Fits each trial by least squares and recommends the mixture that promises most, at the typical
    distance; nothing of `core.power` is used but the level.
    """
    from scipy.stats import f

    turn, announced = whitener(curved), 0
    p = len(turn)
    for trial in range(trials):
        rng = np.random.default_rng([trial, n_runs])
        design = make_design(DesignPlan(n_runs=n_runs, panel_mixtures=0, seed=trial), DOMAINS)
        z_NP = center_by_state(features(design.mixture_ND, curved) @ turn, design.state_N)
        direction = rng.normal(size=p)
        slope = gain / np.sqrt(p) * direction / np.linalg.norm(direction)
        noise_N = SEED_SD * rng.normal(size=n_runs)
        y_N = z_NP @ slope + center_by_state(noise_N[:, None], design.state_N)[:, 0]
        precision = z_NP.T @ z_NP
        fitted = np.linalg.solve(precision, z_NP.T @ y_N)
        df = n_runs * 3 / 4 - p
        variance = np.sum((y_N - z_NP @ fitted) ** 2) / df
        move = np.sqrt(p) * precision @ fitted / np.linalg.norm(precision @ fitted)
        predicted = move @ fitted
        error = np.sqrt(variance * move @ np.linalg.solve(precision, move))
        announced += predicted > np.sqrt(p * f.ppf(1 - LEVEL, p, df)) * error
    return announced / trials


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("n_runs", [32, 128])
def test_a_gain_of_the_stated_size_is_found_in_four_experiments_of_five(n_runs, curved):
    """Trained on the real design; 600 trials put the share within .05 of its mean."""
    p = 2 * (DOMAINS - 1) if curved else DOMAINS - 1
    gain = Experiment(n_runs, 4, p).smallest_gain(SEED_SD)
    assert gain is not None

    assert announced_share(n_runs, gain, curved=curved) == pytest.approx(0.8, abs=0.06)


def test_without_an_effect_one_experiment_in_twenty_announces_a_gain():
    assert announced_share(64, 0.0, curved=False) == pytest.approx(LEVEL, abs=0.03)


def test_the_smallest_gain_halves_with_four_times_the_runs():
    gains = [Experiment(n, 4, 6).smallest_gain(1.0) for n in (256, 1024)]

    assert gains[0] / gains[1] == pytest.approx(2, rel=0.02)


def test_the_runs_needed_are_the_fewest_that_suffice():
    needed = Experiment(16, 4, 6).runs_needed(0.5)

    assert needed and needed % 4 == 0
    assert Experiment(needed, 4, 6).detection(0.5) >= 0.8
    assert Experiment(needed - 4, 4, 6).detection(0.5) < 0.8


def test_no_effect_is_never_enough_and_few_runs_test_nothing():
    assert Experiment(16, 4, 6).runs_needed(0.0) is None
    assert Experiment(8, 4, 6).smallest_gain(1.0) is None
    assert Experiment(8, 4, 6).detection(9.0) == 0.0
    assert Experiment(64, 4, 6).detection(float("inf")) == pytest.approx(1.0)


def test_one_mixture_a_state_is_refused():
    with pytest.raises(EstimationError, match="mixtures_per_state must be >= 2, got 1"):
        Experiment(16, 1, 6)


POOL = SyntheticPool.draw(6, 4, 2, seed=1)


def test_the_table_tells_what_was_planted():
    runs = POOL.run_table(64, 4, noise=0.5, n_repeats=100, seed=2)

    row = power_table(noise_floor(runs), Experiment(256, 4, 5))[0]

    assert row["seed_sd"] == pytest.approx(0.5, rel=0.1)
    assert row["in_reach"] == pytest.approx(5**0.5 * row["mixture_sd"])
    assert row["curve"]["256"] == row["smallest_gain"]
    assert (row["smallest_gain"] < row["in_reach"]) == (row["detection"] > 0.8)
    assert row["curve"]["64"] > row["curve"]["512"]


def test_without_repeated_runs_the_table_says_nothing():
    row = power_table(noise_floor(POOL.run_table(16, 4)), Experiment(64, 4, 5))[0]

    assert row["smallest_gain"] is None and row["runs_needed"] is None
    assert set(row["curve"].values()) == {None}
