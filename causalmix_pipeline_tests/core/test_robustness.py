from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.robustness import best_of_runs, robustness, robustness_values

EQUAL_D = np.full(3, 1 / 3)
BEST_D = np.array([0.6, 0.25, 0.15])


def table(n_states: int = 300, confounder: float = 0.0, effect: float = 1.0, seed: int = 0):
    """Outcomes linear in sqrt(share) along the step; a hidden variable moves both; and that."""
    runs = SyntheticPool.draw(3, 1, 1, seed=seed).run_table(n_states, 1, seed=seed)
    rng = np.random.default_rng(seed)
    hidden_N = rng.normal(size=runs.n_runs)
    tilted_ND = runs.mixture_ND * np.exp(confounder * np.outer(hidden_N, [1, -0.5, -0.5]))
    mixture_ND = tilted_ND / tilted_ND.sum(axis=1, keepdims=True)
    step_D = np.sqrt(BEST_D) - np.sqrt(EQUAL_D)
    treatment_N = np.sqrt(mixture_ND) @ step_D / (step_D @ step_D)
    noise_N = rng.normal(0, 0.5, size=runs.n_runs)
    outcome_N = effect * treatment_N + confounder * hidden_N + noise_N
    return replace(runs, mixture_ND=mixture_ND, outcome_NT=outcome_N[:, None]), hidden_N


def test_a_linear_gain_is_found_with_its_textbook_error():
    runs, _ = table()

    found = robustness(runs, BEST_D, EQUAL_D, [1.0])

    step_D = np.sqrt(BEST_D) - np.sqrt(EQUAL_D)
    root_ND = np.sqrt(runs.mixture_ND)
    z_NC = runs.state_NDP.reshape(runs.n_runs, -1)
    other_NK = root_ND - np.outer(root_ND @ step_D, step_D) / (step_D @ step_D)
    x = np.column_stack(
        [root_ND @ step_D / (step_D @ step_D), np.ones(runs.n_runs), other_NK[:, :2], z_NC]
    )
    beta, squares, *_ = np.linalg.lstsq(x, runs.outcome_NT[:, 0], rcond=None)
    variance = squares[0] / (runs.n_runs - x.shape[1]) * np.linalg.inv(x.T @ x)[0, 0]
    assert found.gain == pytest.approx(beta[0])
    assert found.se == pytest.approx(np.sqrt(variance))
    assert found.df == runs.n_runs - x.shape[1]


def test_a_confounder_as_strong_as_the_value_takes_the_whole_gain():
    """Built by hand: a variable with that partial R2 with mixture and outcome alike."""
    runs, _ = table()
    found = robustness(runs, BEST_D, EQUAL_D, [1.0])
    rng = np.random.default_rng(1)
    step_D = np.sqrt(BEST_D) - np.sqrt(EQUAL_D)
    root_ND = np.sqrt(runs.mixture_ND)
    treatment_N = root_ND @ step_D / (step_D @ step_D)
    other_NK = root_ND - np.outer(root_ND @ step_D, step_D) / (step_D @ step_D)
    z_NC = runs.state_NDP.reshape(runs.n_runs, -1)
    controls = np.column_stack([np.ones(runs.n_runs), other_NK[:, :2], z_NC])

    def left(values, *also):
        x = np.column_stack([controls, *also])
        return values - x @ np.linalg.lstsq(x, values, rcond=None)[0]

    def unit(values):
        return values / np.linalg.norm(values)

    d = unit(left(treatment_N))
    y = unit(left(runs.outcome_NT[:, 0], treatment_N))
    e = unit(left(rng.normal(size=runs.n_runs), treatment_N, runs.outcome_NT[:, 0]))
    # Partial R2 with the treatment is r, and with the outcome given the treatment is r too.
    r = found.value
    hidden = np.sqrt(r) * d + np.sqrt(1 - r) * (np.sqrt(r) * y + np.sqrt(1 - r) * e)
    x = np.column_stack([treatment_N, controls, hidden])
    beta = np.linalg.lstsq(x, runs.outcome_NT[:, 0], rcond=None)[0]

    assert beta[0] == pytest.approx(0.0, abs=1e-8)


def test_a_gain_that_is_all_confounding_needs_no_more_than_that_confounder():
    runs, hidden_N = table(confounder=1.0, effect=0.0)

    found = robustness(runs, BEST_D, EQUAL_D, [1.0])

    assert found.gain > 0.1
    known = replace(runs, state_NDP=np.repeat(hidden_N[:, None, None], 3, axis=1))
    assert robustness(known, BEST_D, EQUAL_D, [1.0]).value_lower == 0.0


def test_the_values_are_those_of_the_paper():
    """The paper's example: t = 4.18, 783 degrees of freedom, 13.9%; its 5% bound has 7.6%."""
    value, lower = robustness_values(4.18, 783)

    assert value == pytest.approx(0.139, abs=5e-4)
    assert 0.076 < lower < value
    assert robustness_values(-3.0, 100) == (0.0, 0.0)
    assert robustness_values(np.inf, 100) == (1.0, 1.0)


def test_the_value_depends_on_no_unit_and_no_order():
    runs, _ = table()
    order = np.random.default_rng(0).permutation(runs.n_runs)
    moved = replace(runs, outcome_NT=5 * runs.outcome_NT + 3, state_NDP=9 * runs.state_NDP)

    value = robustness(runs, BEST_D, EQUAL_D, [1.0]).value

    assert robustness(moved, BEST_D, EQUAL_D, [1.0]).value == pytest.approx(value)
    assert robustness(runs.subset(order), BEST_D, EQUAL_D, [1.0]).value == pytest.approx(value)


def test_many_covariates_are_replaced_by_components():
    runs = SyntheticPool.draw(4, 12, 1).run_table(15, 4)

    found = robustness(runs, np.array([0.7, 0.1, 0.1, 0.1]), np.full(4, 0.25), [1.0])

    assert found.n_controls <= 15
    assert found.df >= 40


def test_the_best_of_the_runs_gains_in_the_mean_state():
    pool = SyntheticPool.draw(6, 4, 2, seed=2)
    runs = pool.run_table(64, 4, seed=2)
    equal_D = np.full(6, 1 / 6)
    fitted = make_estimator("structured_ridge").fit(runs)

    best_D = best_of_runs(fitted, runs, equal_D, [0.5, 0.5])

    assert best_D.sum() == pytest.approx(1.0)
    assert robustness(runs, best_D, equal_D, [0.5, 0.5]).value_lower > 0


def test_the_same_mixture_twice_and_too_few_runs_are_refused():
    runs, _ = table(n_states=60)
    with pytest.raises(EstimationError, match="the same mixture twice"):
        robustness(runs, EQUAL_D, EQUAL_D, [1.0])
    with pytest.raises(EstimationError, match="6 runs must vary"):
        robustness(runs.subset(np.arange(6)), BEST_D, EQUAL_D, [1.0])
