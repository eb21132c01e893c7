import numpy as np
import pytest

from causalmix_pipeline.adapters.econml_forest import CausalForest
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.errors import ConfigError, EstimationError

POOL = SyntheticPool.draw(3, 2, 1, seed=7)
EQUAL_D = np.full(3, 1 / 3)
STATE_DP = np.zeros((3, 2))
MIXTURE_MD = np.random.default_rng(8).dirichlet(np.ones(3), size=40)


@pytest.fixture(scope="module")
def runs():
    return POOL.run_table(50, 4, noise=0.1, seed=4)


@pytest.fixture(scope="module", params=["sqrt", "log", "raw", "ilr"])
def forest(request, runs):
    return CausalForest(coordinates=request.param, n_trees=40).fit(runs)


def test_the_planted_effect_is_found(forest):
    found_M = forest.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT[:, 0]

    truth_M = POOL.expected_gain(STATE_DP, MIXTURE_MD, EQUAL_D)[:, 0]
    assert isinstance(forest, EffectEstimator)
    assert np.corrcoef(found_M, truth_M)[0, 1] > 0.8


def test_the_gain_is_linear_in_the_treatment_coordinates(forest):
    gain = forest.gain(STATE_DP, MIXTURE_MD, EQUAL_D)

    step_MK = forest.treatment(MIXTURE_MD) - forest.treatment(EQUAL_D)
    assert gain.mean_MT == pytest.approx(step_MK @ forest.effect(STATE_DP))
    assert np.isnan(gain.se_MT).all()


def test_predictions_differ_by_the_gain(forest):
    step_MT = forest.predict(STATE_DP, MIXTURE_MD) - forest.predict(STATE_DP, EQUAL_D)

    assert step_MT == pytest.approx(forest.gain(STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT)


def test_a_share_of_zero_has_finite_coordinates(forest):
    assert np.isfinite(forest.treatment(np.array([[1.0, 0.0, 0.0]]))).all()


def test_coordinates_are_what_they_are_called(forest):
    share_D = np.array([0.25, 0.25, 0.5])
    log_D = np.log(share_D + 0.01)
    expected = {
        "sqrt": np.sqrt(share_D),
        "log": log_D,
        "raw": share_D[:2],
        "ilr": [
            (log_D[0] - log_D[1]) / np.sqrt(2),
            (log_D[0] + log_D[1] - 2 * log_D[2]) / np.sqrt(6),
        ],
    }

    assert forest.treatment(share_D)[0] == pytest.approx(expected[forest.coordinates])
    assert forest.parameters()["coordinates"] == forest.coordinates


def test_effects_differ_little_between_seeds_of_the_cross_fitting(forest):
    """The spread is told: more than nothing, and less than the effects themselves."""
    spread = forest.parameters()["seed_spread"]

    assert spread == forest.seed_spread_T.tolist()
    assert 0 < spread[0] < 0.5


def test_only_shares_as_they_are_need_a_trust_region(forest):
    assert forest.needs_trust_region == (forest.coordinates == "raw")


def test_row_order_changes_nothing_bitwise(runs):
    shuffled = runs.subset(np.random.default_rng(0).permutation(runs.n_runs))

    first, second = (CausalForest(n_trees=20).fit(r) for r in (runs, shuffled))

    assert np.array_equal(first.effect(STATE_DP), second.effect(STATE_DP))


def test_runs_without_a_varying_covariate_are_refused():
    with pytest.raises(EstimationError, match="causal_forest needs a covariate"):
        CausalForest().fit(SyntheticPool.draw(3, 0, 1).run_table(8, 4))


def test_unknown_coordinates_are_refused():
    with pytest.raises(ConfigError, match="one of sqrt, log, raw, ilr, got 'clr'"):
        CausalForest(coordinates="clr")


def test_an_offset_of_zero_is_refused():
    with pytest.raises(ConfigError, match="log_offset must be > 0, got 0"):
        CausalForest(coordinates="log", log_offset=0)
