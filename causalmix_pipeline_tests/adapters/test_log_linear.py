import json
from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.log_linear import LogLinear
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.errors import EstimationError

POOL = SyntheticPool.draw(4, 0, 2, seed=1)
SLOPE_D = np.array([-3.0, 1.0, 0.0, 0.5])
EQUAL_D = np.full(4, 0.25)


@pytest.fixture(scope="module")
def runs():
    """Task 0 is a loss of the law's form; task 1 a score of it."""
    table = POOL.run_table(1, 60, seed=2)
    part_N = np.exp(table.mixture_ND @ SLOPE_D)
    return replace(table, outcome_NT=np.column_stack([-2 - 0.5 * part_N, 0.1 + 0.2 * part_N]))


def test_a_law_of_the_form_is_found_whatever_its_sign(runs):
    law = LogLinear().fit(runs)
    mixture_MD = np.random.default_rng(0).dirichlet(np.ones(4), size=50)
    part_M = np.exp(mixture_MD @ SLOPE_D)

    predicted_MT = law.predict(runs.state_NDP[0], mixture_MD)

    np.testing.assert_allclose(predicted_MT[:, 0], -2 - 0.5 * part_M, atol=0.02)
    np.testing.assert_allclose(predicted_MT[:, 1], 0.1 + 0.2 * part_M, atol=0.02)
    gain = law.gain(runs.state_NDP[0], mixture_MD, EQUAL_D)
    at_equal = law.predict(runs.state_NDP[0], EQUAL_D)
    np.testing.assert_allclose(gain.mean_MT, predicted_MT - at_equal)
    assert np.isnan(gain.se_MT).all()
    assert isinstance(law, EffectEstimator)


def test_kept_parameters_serve_the_same_tasks_alone_and_no_others(runs):
    law = LogLinear().fit(runs)
    kept = json.loads(json.dumps(law.parameters()))
    again = LogLinear().fit(runs.select_tasks(["task_1"]), parameters=kept)

    expected = law.predict(runs.state_NDP[0], EQUAL_D)[:, 1]
    assert again.predict(runs.state_NDP[0], EQUAL_D)[:, 0] == pytest.approx(expected, rel=1e-12)
    del kept["laws"]["task_1"]["b"]["domain_0"]
    with pytest.raises(EstimationError, match=r"the law of task task_1.*domain_0"):
        LogLinear().fit(runs, parameters=kept)


def test_a_flat_outcome_has_no_effect(runs):
    flat = replace(runs, outcome_NT=np.full_like(runs.outcome_NT, 3.0))

    gain = LogLinear().fit(flat).gain(runs.state_NDP[0], runs.mixture_ND, EQUAL_D)

    assert not gain.mean_MT.any()
