from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.gp_covariance import JITTER, Points
from causalmix_pipeline.adapters.gp_hyper_parameters import (
    hyper_names,
    negative_log_posterior,
    prior_of,
)
from causalmix_pipeline.adapters.gp_surface import ResponseSurface
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import Z90, EffectEstimator, StateScaler, check_runs
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

POOL = SyntheticPool.draw(4, 3, 2, seed=2)
EQUAL_D = np.full(4, 0.25)
NEW_STATE_DP = POOL.draw_states(1, np.random.default_rng(9))[0]
MIXTURE_MD = np.random.default_rng(8).dirichlet(np.ones(4), size=30)


@pytest.fixture(scope="module")
def runs() -> RunTable:
    return POOL.run_table(24, 4, noise=0.15, n_repeats=3, seed=4)


@pytest.fixture(scope="module")
def surface(runs) -> ResponseSurface:
    return ResponseSurface().fit(runs)


def reverse_domains(runs: RunTable) -> RunTable:
    return replace(
        runs,
        domains=runs.domains[::-1],
        state_NDP=runs.state_NDP[:, ::-1],
        mixture_ND=runs.mixture_ND[:, ::-1],
    )


def test_it_is_an_effect_estimator(surface):
    assert isinstance(surface, EffectEstimator)


@pytest.mark.parametrize("sees_state", [True, False])
def test_the_gradient_is_that_of_finite_differences(runs, sees_state):
    names = hyper_names(runs, sees_state)
    scaled_NDP = StateScaler.fit(runs.distinct_states()[1]).transform(runs.state_NDP)
    points = Points(np.sqrt(runs.mixture_ND), scaled_NDP, runs.state_ids)
    outcome_N = runs.outcome_NT[:, 0] - runs.outcome_NT[:, 0].mean()
    log_hyper_H = prior_of(names)[0] + np.random.default_rng(0).normal(0, 0.4, len(names))

    def value(step_H: np.ndarray) -> float:
        return negative_log_posterior(log_hyper_H + step_H, names, points, outcome_N)[0]

    _, gradient_H = negative_log_posterior(log_hyper_H, names, points, outcome_N)

    steps = 1e-5 * np.eye(len(names))
    by_hand_H = np.array([(value(step) - value(-step)) / 2e-5 for step in steps])
    assert gradient_H == pytest.approx(by_hand_H, rel=1e-5, abs=1e-6)


def textbook(surface: ResponseSurface, runs: RunTable, task: str) -> tuple:
    """Mean, gain and variance from dense kernels written out pair by pair (GPML eq. 2.23-24)."""
    h = surface.parameters()["hyper_parameters"][task]
    importance_D = np.array([h[f"importance:{name}"] for name in runs.domains])
    weights = [[h[f"weight:{d}__{name}"] for name in runs.covariates] for d in runs.domains]
    weight_DP = np.array(weights) / len(runs.covariates)
    scaler = StateScaler.fit(runs.distinct_states()[1])
    center_D = np.sqrt(runs.mixture_ND).mean(axis=0)

    def kernel(s, z, r, u):
        meeting_D = (z * u * weight_DP).sum(axis=1)
        far_D = ((z - u) ** 2 * weight_DP).sum(axis=1)
        far = np.sqrt(5) * np.abs(s - r) / h["domain_share_length"]
        curve_D = (1 + far + far**2 / 3) * np.exp(-far)
        curve_D *= np.exp(-far_D / 2 / h["domain_state_length"] ** 2)
        near = np.exp(-((s - r) ** 2 @ importance_D) / 2 / h["near_length"] ** 2)
        everything = ((s - r) ** 2 @ importance_D) / h["all_share_length"] ** 2
        everything += (far_D @ importance_D) / len(s) / h["all_state_length"] ** 2
        return (
            near * h["share"] * (s - center_D) @ (importance_D * (r - center_D))
            + near * h["share_state"] * np.sum(importance_D * s * r * meeting_D)
            + h["domain"] * np.mean(importance_D * curve_D)
            + h["all"] * np.exp(-everything / 2)
            + h["state_linear"] * np.mean(meeting_D)
            + h["state_smooth"] * np.exp(-np.mean(far_D) / 2 / h["state_length"] ** 2)
        )

    scaled_NDP = scaler.transform(runs.state_NDP)
    train = list(zip(np.sqrt(runs.mixture_ND), scaled_NDP, strict=True))
    new_z = scaler.transform(NEW_STATE_DP)
    new = [(np.sqrt(t), new_z) for t in np.vstack([EQUAL_D, MIXTURE_MD[:5]])]
    covariance_NN = np.array([[kernel(*a, *b) for b in train] for a in train])
    covariance_NN += h["state_id"] * np.equal.outer(runs.state_ids, runs.state_ids)
    covariance_NN += (h["noise"] + JITTER) * np.eye(runs.n_runs)
    cross_MN = np.array([[kernel(*a, *b) for b in train] for a in new])
    own_MM = np.array([[kernel(*a, *b) for b in new] for a in new])
    t = runs.tasks.index(task)
    mean, scale = runs.outcome_NT[:, t].mean(), runs.outcome_NT[:, t].std()
    standard_N = (runs.outcome_NT[:, t] - mean) / scale
    inverse_NN = np.linalg.inv(covariance_NN)
    posterior_M = cross_MN @ inverse_NN @ standard_N
    posterior_MM = own_MM - cross_MN @ inverse_NN @ cross_MN.T
    contrast = np.hstack([-np.ones((5, 1)), np.eye(5)])
    off_by = (standard_N @ inverse_NN @ standard_N + 10) / (runs.n_runs + 10)
    variance_M = off_by * np.diag(contrast @ posterior_MM @ contrast.T)
    return mean + scale * posterior_M[1:], scale * contrast @ posterior_M, scale**2 * variance_M


def test_the_posterior_is_the_textbooks(surface, runs):
    """The fast code uses that the state is constant; the second way doesn't."""
    mean_M, gain_M, variance_M = textbook(surface, runs.sorted_by_run(), "task_1")

    predicted_MT = surface.predict(NEW_STATE_DP, MIXTURE_MD[:5])
    gain = surface.gain(NEW_STATE_DP, MIXTURE_MD[:5], EQUAL_D)

    assert predicted_MT[:, 1] == pytest.approx(mean_M, abs=1e-7)
    assert gain.mean_MT[:, 1] == pytest.approx(gain_M, abs=1e-7)
    assert gain.se_MT[:, 1] ** 2 == pytest.approx(variance_M, rel=1e-5)


def test_planted_gains_lie_within_their_intervals():
    """Nominal 90%, over 6 truths, 8 new states each and 30 mixtures."""
    covered = []
    for truth in range(6):
        pool = SyntheticPool.draw(4, 3, 2, seed=truth)
        fitted = ResponseSurface().fit(pool.run_table(24, 4, seed=100 + truth))
        for state_DP in pool.draw_states(8, np.random.default_rng(truth)):
            gain = fitted.gain(state_DP, MIXTURE_MD, EQUAL_D)
            error_MT = gain.mean_MT - pool.expected_gain(state_DP, MIXTURE_MD, EQUAL_D)
            covered.append(np.abs(error_MT) <= Z90 * gain.se_MT)

    assert 0.8 <= np.mean(covered) <= 0.97


def test_the_planted_effect_is_found(surface):
    truth_MT = POOL.expected_gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D)

    found_MT = surface.gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT

    assert np.corrcoef(found_MT.ravel(), truth_MT.ravel())[0, 1] > 0.95


def test_the_state_changes_what_it_recommends_and_the_blind_surface_ignores_it(surface, runs):
    blind = ResponseSurface(blind=True).fit(runs)
    other_DP = NEW_STATE_DP + 1

    assert blind.name == "response_surface_blind"
    assert np.array_equal(
        blind.predict(NEW_STATE_DP, MIXTURE_MD), blind.predict(other_DP, MIXTURE_MD)
    )
    assert not np.allclose(
        surface.gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT,
        surface.gain(other_DP, MIXTURE_MD, EQUAL_D).mean_MT,
    )


def test_row_order_changes_nothing_bitwise(surface, runs):
    shuffled = runs.subset(np.random.default_rng(0).permutation(runs.n_runs))

    again = ResponseSurface().fit(shuffled)

    assert again.parameters() == surface.parameters()
    assert np.array_equal(
        again.predict(NEW_STATE_DP, MIXTURE_MD), surface.predict(NEW_STATE_DP, MIXTURE_MD)
    )


def test_domain_order_does_not_matter(surface, runs):
    backwards = ResponseSurface().fit(reverse_domains(runs), surface.parameters())

    found = backwards.gain(NEW_STATE_DP[::-1], MIXTURE_MD[:, ::-1], EQUAL_D)

    expected = surface.gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D)
    assert found.mean_MT == pytest.approx(expected.mean_MT, abs=1e-8)
    assert found.se_MT == pytest.approx(expected.se_MT, abs=1e-8)


def test_a_refit_with_its_own_parameters_is_the_same_without_a_search(surface, runs, monkeypatch):
    def no_search(*_):
        raise AssertionError("searched")

    monkeypatch.setattr("causalmix_pipeline.adapters.gp_hyper_parameters._search", no_search)

    again = ResponseSurface().fit(runs, surface.parameters())

    assert np.array_equal(
        again.predict(NEW_STATE_DP, MIXTURE_MD), surface.predict(NEW_STATE_DP, MIXTURE_MD)
    )


def test_parameters_survive_json(surface):
    import json

    assert json.loads(json.dumps(surface.parameters())) == surface.parameters()


def test_parameters_of_other_covariates_are_refused(surface, runs):
    renamed = replace(runs, covariates=("hes", "covariate_1", "covariate_2"))

    with pytest.raises(EstimationError, match=r"weight:domain_0__covariate_0.* and 4 more"):
        ResponseSurface().fit(renamed, surface.parameters())


def test_the_gain_of_the_reference_is_zero_and_certain(surface):
    gain = surface.gain(NEW_STATE_DP, EQUAL_D[None], EQUAL_D)

    assert gain.mean_MT == pytest.approx(0)
    assert gain.se_MT == pytest.approx(0, abs=1e-6)


def test_the_standard_error_is_that_of_the_difference(surface):
    """Neighbouring mixtures err alike, so their difference is known better than either."""
    near_D = EQUAL_D + np.array([0.01, -0.01, 0, 0])

    near = surface.gain(NEW_STATE_DP, near_D[None], EQUAL_D).se_MT
    far = surface.gain(NEW_STATE_DP, np.eye(4)[:1], EQUAL_D).se_MT

    assert (near < far / 5).all()


def test_the_seed_noise_is_estimated():
    runs = POOL.run_table(40, 4, noise=0.3, n_repeats=20, seed=6)

    assert ResponseSurface().fit(runs).noise_variance_T == pytest.approx(0.09, rel=0.35)


def test_tasks_that_are_equal_are_fully_correlated(runs):
    twice = replace(runs, outcome_NT=np.column_stack([runs.outcome_NT[:, 0]] * 2))

    assert ResponseSurface().fit(twice).task_correlation_TT == pytest.approx(np.ones((2, 2)))


def test_a_constant_covariate_is_dropped_and_reported(runs):
    state_NDP = runs.state_NDP.copy()
    state_NDP[:, 1, 0] = 4.0
    surface = ResponseSurface().fit(replace(runs, state_NDP=state_NDP))
    moved_DP = NEW_STATE_DP.copy()
    moved_DP[1, 0] = 99.0

    assert surface.dropped_covariates == ("domain_1__covariate_0",)
    assert np.array_equal(
        surface.predict(NEW_STATE_DP, MIXTURE_MD), surface.predict(moved_DP, MIXTURE_MD)
    )


def test_without_any_covariate_it_lives_on_the_mixture():
    pool = SyntheticPool.draw(3, 0, 1, seed=1)

    surface = ResponseSurface().fit(pool.run_table(1, 40, noise=0.05))

    mixture_MD = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    truth_M = pool.expected_outcome(np.empty((3, 0)), mixture_MD)[:, 0]
    found_M = surface.predict(np.empty((3, 0)), mixture_MD)[:, 0]
    assert np.corrcoef(found_M, truth_M)[0, 1] > 0.98


def test_a_task_that_never_varies_is_predicted_as_it_is(runs):
    constant = replace(runs, outcome_NT=np.full_like(runs.outcome_NT, 2.5))

    assert ResponseSurface().fit(constant).predict(NEW_STATE_DP, MIXTURE_MD) == pytest.approx(2.5)


def test_many_runs_are_searched_in_part_and_conditioned_on_in_full():
    """The search sees 256 of 320 runs; another seed sees others and finds nearly the same."""
    runs = POOL.run_table(80, 4, seed=3)

    first, second = (ResponseSurface(seed=seed).fit(runs) for seed in (0, 1))

    gains = [s.gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D) for s in (first, second)]
    assert len(first._posteriors[0].alpha_N) == 320
    assert np.abs(gains[0].mean_MT - gains[1].mean_MT).max() < 3 * gains[0].se_MT.max()


def test_runs_that_carry_no_estimate_are_refused(runs):
    assert check_runs(runs) is None
    with pytest.raises(EstimationError, match="at least 3 pool states, got 1"):
        ResponseSurface().fit(POOL.run_table(1, 20))


def loss_runs(seed: int, n_states: int = 24) -> RunTable:
    """A loss that falls as a power of a domain's share, faster in states that suit it."""
    rng = np.random.default_rng(seed)
    state_SDP = rng.normal(size=(n_states, 4, 1))
    state_ids = np.repeat(np.arange(n_states), 4)
    mixture_ND = rng.dirichlet(np.ones(4), size=4 * n_states)
    noise_N = rng.normal(scale=0.01, size=len(mixture_ND))
    return RunTable(
        domains=tuple("abcd"),
        covariates=("suits",),
        tasks=("task",),
        run_ids=tuple(f"{seed}-{i:03d}" for i in range(len(mixture_ND))),
        state_ids=state_ids,
        state_NDP=state_SDP[state_ids],
        mixture_ND=mixture_ND,
        outcome_NT=-(power_law(state_SDP[state_ids], mixture_ND) * np.exp(noise_N))[:, None],
        repeat_of_N=np.arange(len(mixture_ND)),
    )


def power_law(state_NDP: np.ndarray, mixture_ND: np.ndarray) -> np.ndarray:
    return 4 * (0.02 + mixture_ND[:, 0]) ** (-0.25 - 0.05 * state_NDP[:, 0, 0])


def test_a_loss_never_leaves_its_side_of_zero():
    surface = ResponseSurface().fit(loss_runs(0))
    vertices_MD = np.eye(4)

    assert (surface.predict(np.full((4, 1), 3.0), vertices_MD) < 0).all()


def test_the_gain_on_a_loss_is_the_difference_of_the_two_predictions():
    surface, state_DP = ResponseSurface().fit(loss_runs(0)), np.zeros((4, 1))
    gain = surface.gain(state_DP, MIXTURE_MD, EQUAL_D).mean_MT

    difference_MT = surface.predict(state_DP, MIXTURE_MD) - surface.predict(state_DP, EQUAL_D)
    np.testing.assert_allclose(gain, difference_MT, rtol=1e-9, atol=1e-12)


def test_a_planted_power_law_is_found_beyond_the_shares_that_were_tried():
    """On the loss itself the process would go on in a straight line past the data."""
    runs = loss_runs(1)
    runs = runs.subset(runs.mixture_ND[:, 0] < 0.6)
    mixture_MD = np.array([[0.85, 0.05, 0.05, 0.05]])
    state_DP = np.full((4, 1), 1.0)
    true = power_law(state_DP[None], EQUAL_D[None]) - power_law(state_DP[None], mixture_MD)

    gain = ResponseSurface().fit(runs).gain(state_DP, mixture_MD, EQUAL_D)

    assert abs(gain.mean_MT[0, 0] - true[0]) < max(2 * gain.se_MT[0, 0], 0.1 * true[0])


def test_outcomes_of_both_signs_are_modelled_as_they_are(runs, surface):
    assert (runs.outcome_NT > 0).any(axis=0).all()
    shifted = replace(runs, outcome_NT=runs.outcome_NT + 5.0)

    gain = ResponseSurface().fit(shifted).gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT
    expected = surface.gain(NEW_STATE_DP, MIXTURE_MD, EQUAL_D).mean_MT
    np.testing.assert_allclose(gain, expected, atol=1e-4)
