import numpy as np
import pytest

from causalmix_pipeline.adapters.lightgbm_surface import LightGBMSurface
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.errors import EstimationError

POOL = SyntheticPool.draw(4, 2, 2, seed=5)
EQUAL_D = np.full(4, 0.25)
STATE_DP = POOL.draw_states(1, np.random.default_rng(9))[0]
MIXTURE_MD = np.random.default_rng(8).dirichlet(np.ones(4), size=60)


@pytest.fixture(scope="module")
def runs():
    return POOL.run_table(60, 4, noise=0.1, seed=4)


def test_regmix_is_the_published_regression(runs):
    """The second way: LightGBM's own scikit-learn class with the notebook's settings."""
    import lightgbm

    published = lightgbm.LGBMRegressor(
        boosting_type="gbdt", objective="regression", num_iterations=1000, seed=42,
        learning_rate=1e-2, verbosity=-1, n_jobs=1,
    )  # fmt: skip
    published.fit(runs.mixture_ND, runs.outcome_NT[:, 1])

    found_M = LightGBMSurface().fit(runs).predict(STATE_DP, MIXTURE_MD)[:, 1]

    assert found_M == pytest.approx(published.booster_.predict(MIXTURE_MD), abs=1e-8)


def test_regmix_finds_the_effect_that_all_states_share():
    blind = SyntheticPool.draw(4, 0, 1, seed=2)
    regmix = LightGBMSurface().fit(blind.run_table(60, 4, noise=0.05))

    found_M = regmix.predict(np.empty((4, 0)), MIXTURE_MD)[:, 0]

    truth_M = blind.expected_outcome(np.empty((4, 0)), MIXTURE_MD)[:, 0]
    assert isinstance(regmix, EffectEstimator)
    assert np.corrcoef(found_M, truth_M)[0, 1] > 0.9


def test_only_the_variant_with_state_sees_the_state(runs):
    regmix, stateful = LightGBMSurface().fit(runs), LightGBMSurface(with_state=True).fit(runs)

    assert (regmix.name, stateful.name) == ("regmix", "lightgbm_state")
    for surface, sees in ((regmix, False), (stateful, True)):
        one, other = surface.predict(STATE_DP, EQUAL_D), surface.predict(STATE_DP + 2, EQUAL_D)
        assert np.allclose(one, other) != sees


def test_the_gain_is_the_difference_of_predictions_without_a_standard_error(runs):
    regmix = LightGBMSurface(n_trees=50).fit(runs)

    gain = regmix.gain(STATE_DP, MIXTURE_MD, EQUAL_D)

    step_MT = regmix.predict(STATE_DP, MIXTURE_MD) - regmix.predict(STATE_DP, EQUAL_D)
    assert gain.mean_MT == pytest.approx(step_MT)
    assert np.isnan(gain.se_MT).all()
    assert regmix.parameters()["n_trees"] == 50


def test_row_order_changes_nothing_bitwise(runs):
    shuffled = runs.subset(np.random.default_rng(0).permutation(runs.n_runs))

    first, second = (LightGBMSurface(n_trees=50).fit(r) for r in (runs, shuffled))

    assert np.array_equal(first.predict(STATE_DP, MIXTURE_MD), second.predict(STATE_DP, MIXTURE_MD))


def test_the_state_without_covariates_is_refused():
    with pytest.raises(EstimationError, match="lightgbm_state needs at least one covariate"):
        LightGBMSurface(with_state=True).fit(SyntheticPool.draw(3, 0, 1).run_table(8, 4))
