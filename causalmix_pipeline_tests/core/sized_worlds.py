"""A simulated truth whose effects change with the size of the model; proxy runs of two sizes."""

from dataclasses import replace

import numpy as np

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import SIZE_COVARIATE, sizes_of_states

SMALL, LARGE = 15.6, 17.6
LEVEL = 0.4  # by which outcomes rise with each doubling
EQUAL_D = np.full(5, 0.2)


class SizedWorld:
    """A truth whose effects shrink with each doubling, those of each domain at its own rate."""

    def __init__(self, *, shrink: float, seed: int, spread: float = 0.5):
        self.pool = SyntheticPool.draw(5, 3, 1, seed=seed)
        self.rng = np.random.default_rng([seed, round(1000 * shrink)])
        self.rate_D = shrink * (1 + spread * self.rng.normal(size=5))

    def outcome(self, state_DP: np.ndarray, mixture_MD: np.ndarray, size: float) -> np.ndarray:
        """Expected outcomes of models of that size; shape (M, 1)."""
        left_D = np.exp(-self.rate_D * (size - SMALL))
        sized = replace(
            self.pool,
            strength_TD=self.pool.strength_TD * left_D,
            diversity_T=self.pool.diversity_T * left_D.mean(),
        )
        return sized.expected_outcome(state_DP, mixture_MD) + LEVEL * (size - SMALL)

    def gain(self, state_DP: np.ndarray, mixture_D: np.ndarray, size: float) -> float:
        """True gain over the equal mixture."""
        both = self.outcome(state_DP, np.stack([mixture_D, EQUAL_D]), size)
        return float(both[0, 0] - both[1, 0])

    def runs(self, n_states: int = 48, *, share: float = 0.25, noise: float = 0.25) -> RunTable:
        """Proxy runs at the two sizes."""
        runs = self.pool.run_table(n_states, 4, seed=int(self.rng.integers(2**31)))
        size_M = np.array([SMALL, LARGE])[sizes_of_states(n_states, [share], seed=0)]
        size_N = size_M[runs.state_ids]
        rows = zip(runs.state_NDP, runs.mixture_ND, size_N, strict=True)
        expected_NT = np.vstack([self.outcome(*row) for row in rows])
        return with_size(
            replace(runs, outcome_NT=expected_NT + self.rng.normal(0, noise, expected_NT.shape)),
            size_N,
        )


def with_size(runs: RunTable, size_N: np.ndarray) -> RunTable:
    size_ND1 = np.broadcast_to(size_N[:, None, None], (*runs.state_NDP.shape[:2], 1))
    return replace(
        runs,
        covariates=(*runs.covariates, SIZE_COVARIATE),
        state_NDP=np.concatenate([runs.state_NDP, size_ND1], axis=2),
    )
