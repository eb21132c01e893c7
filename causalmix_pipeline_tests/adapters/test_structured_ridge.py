import numpy as np
import pytest

from causalmix_pipeline.adapters.structured_ridge import StructuredRidge, left_out_residuals
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.errors import EstimationError

POOL = SyntheticPool.draw(4, 2, 2, seed=5)
EQUAL_D = np.full(4, 0.25)
NEW_STATE_DP = POOL.draw_states(1, np.random.default_rng(9))[0]
MIXTURE_MD = np.random.default_rng(8).dirichlet(np.ones(4), size=30)


@pytest.fixture(scope="module")
def runs():
    return POOL.run_table(24, 4, noise=0.1, seed=4)


def test_the_planted_effect_is_found(runs):
    ridge = StructuredRidge().fit(runs)

    found_MT = ridge.gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT

    truth_MT = POOL.expected_gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D)
    assert isinstance(ridge, EffectEstimator)
    assert np.corrcoef(found_MT.ravel(), truth_MT.ravel())[0, 1] > 0.9


def test_the_coefficients_are_those_of_least_squares_with_penalty_rows(runs):
    """A ridge is ordinary least squares with sqrt(penalty) / deviation appended as rows."""
    ridge = StructuredRidge().fit(runs)
    (setting, penalty), *_ = ridge.parameters()["chosen"]
    deviation_F = ridge._settings(4, 2)[setting]
    state_SDP = runs.distinct_states()[1]
    scaled_NDP = (runs.state_NDP - state_SDP.mean(axis=0)) / state_SDP.std(axis=0)
    root_ND = np.sqrt(runs.mixture_ND)
    features_NF = np.hstack(
        [root_ND]
        + [root_ND[:, d : d + 1] * scaled_NDP[:, d] for d in range(4)]
        + [scaled_NDP[:, d] for d in range(4)]
    )
    centered_NF = features_NF - features_NF.mean(axis=0)
    outcome_N = runs.outcome_NT[:, 0] - runs.outcome_NT[:, 0].mean()
    stacked = np.vstack([centered_NF, np.diag(np.sqrt(penalty) / deviation_F)])

    by_hand_F = np.linalg.lstsq(stacked, np.append(outcome_N, np.zeros(20)), rcond=None)[0]

    assert ridge._coefficient_FT[:, 0] == pytest.approx(by_hand_F, abs=1e-8)


def test_left_out_residuals_are_those_of_refits():
    rng = np.random.default_rng(0)
    features_NF, outcome_NT = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    state_ids = np.repeat([0, 1, 2, 3, 4, 5], [4, 4, 4, 3, 3, 2])

    found_NT = left_out_residuals(features_NF, outcome_NT, 0.7, state_ids)

    for state in range(6):
        out = state_ids == state
        kept = features_NF[~out]
        solution = np.linalg.solve(kept.T @ kept + 0.7 * np.eye(3), kept.T @ outcome_NT[~out])
        assert found_NT[out] == pytest.approx(outcome_NT[out] - features_NF[out] @ solution)


def test_the_gain_is_the_difference_of_predictions_and_zero_at_the_reference(runs):
    ridge = StructuredRidge().fit(runs)

    gain = ridge.gain(NEW_STATE_DP, np.vstack([EQUAL_D, MIXTURE_MD]), EQUAL_D)

    step_MT = ridge.predict(NEW_STATE_DP, MIXTURE_MD) - ridge.predict(NEW_STATE_DP, EQUAL_D)
    assert gain.mean_MT[1:] == pytest.approx(step_MT)
    assert gain.mean_MT[0] == pytest.approx(0)
    assert gain.se_MT[0] == pytest.approx(0)
    assert (gain.se_MT[1:] > 0).all()


def test_row_order_changes_nothing_bitwise_and_parameters_are_reused(runs):
    ridge = StructuredRidge().fit(runs)
    shuffled = runs.subset(np.random.default_rng(0).permutation(runs.n_runs))

    for again in (StructuredRidge().fit(shuffled), StructuredRidge().fit(runs, ridge.parameters())):
        assert np.array_equal(
            again.predict(NEW_STATE_DP, MIXTURE_MD), ridge.predict(NEW_STATE_DP, MIXTURE_MD)
        )


def test_runs_without_covariates_are_refused():
    with pytest.raises(EstimationError, match="structured_ridge needs at least one covariate"):
        StructuredRidge().fit(SyntheticPool.draw(3, 0, 1).run_table(8, 4))
