import numpy as np

from causalmix_pipeline.adapters.extra_trees import ExtraTrees
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.effects import EffectEstimator

POOL = SyntheticPool.draw(3, 2, 2, seed=1)
EQUAL_D = np.full(3, 1 / 3)


def test_a_forest_learns_from_mixtures_and_from_the_state():
    runs = POOL.run_table(30, 8, noise=0.05, seed=2)
    forest = ExtraTrees(seed=1).fit(runs)
    states = POOL.draw_states(6, np.random.default_rng(5))
    mixture_MD = np.random.default_rng(6).dirichlet(np.ones(3), size=30)

    gains = [forest.gain(state_DP, mixture_MD, EQUAL_D) for state_DP in states]
    true = [POOL.expected_gain(state_DP, mixture_MD, EQUAL_D) for state_DP in states]

    assert isinstance(forest, EffectEstimator)
    assert all(np.isnan(gain.se_MT).all() for gain in gains)
    found = np.concatenate([gain.mean_MT.ravel() for gain in gains])
    assert np.corrcoef(found, np.concatenate([t.ravel() for t in true]))[0, 1] > 0.8
    assert not np.allclose(gains[0].mean_MT, gains[1].mean_MT)


def test_the_order_of_runs_changes_nothing():
    runs = POOL.run_table(10, 4, seed=2)
    moved = runs.subset(np.random.default_rng(0).permutation(runs.n_runs))

    first, second = (
        ExtraTrees().fit(table).predict(runs.state_NDP[0], EQUAL_D) for table in (runs, moved)
    )

    assert first.tolist() == second.tolist()
