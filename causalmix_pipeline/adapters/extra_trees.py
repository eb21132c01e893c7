"""Extremely randomised trees on mixture and covariates, behind `core.effects.EffectEstimator`.

Source: P. Geurts, D. Ernst, L. Wehenkel, Extremely randomized trees, Machine Learning 63 (2006).
"""

from __future__ import annotations

import numpy as np

from causalmix_pipeline.core.effects import MINIMUM_STATES, Gain, check_runs
from causalmix_pipeline.core.runs import RunTable

#: Trees of each task's forest.
N_TREES = 200


class ExtraTrees:
    """One forest per task on shares and, where there are some, covariates.

    It has no standard errors: `Gain.se_MT` is nan.
    """

    name = "extra_trees"

    def __init__(self, *, seed: int = 0, n_trees: int = N_TREES):
        """Set up an unfitted forest; the seed draws its cuts."""
        self.seed = seed
        self.n_trees = n_trees
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable) -> ExtraTrees:
        """Fit one forest per task.

        Raises:
            EstimationError: if the runs are refused by `check_runs`.
        """
        from sklearn.ensemble import ExtraTreesRegressor

        check_runs(runs, minimum_states=MINIMUM_STATES if runs.covariates else 1)
        runs = runs.sorted_by_run()
        inputs = np.column_stack([runs.mixture_ND, runs.state_NDP.reshape(runs.n_runs, -1)])
        self._forests = [
            ExtraTreesRegressor(self.n_trees, random_state=self.seed).fit(inputs, outcome_N)
            for outcome_N in runs.outcome_NT.T
        ]
        self.task_correlation_TT = np.ones((len(runs.tasks),) * 2)
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture; shape (M, T)."""
        mixture_MD = np.atleast_2d(mixture_MD)
        state_MC = np.broadcast_to(np.ravel(state_DP), (len(mixture_MD), np.size(state_DP)))
        inputs = np.column_stack([mixture_MD, state_MC])
        return np.column_stack([forest.predict(inputs) for forest in self._forests])

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return differences of predictions; their standard errors are unknown (nan)."""
        both = self.predict(state_DP, np.vstack([reference_D, mixture_MD]))
        mean_MT = both[1:] - both[0]
        return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    def parameters(self) -> dict:
        """Return the settings; nothing is searched."""
        return {"n_trees": self.n_trees, "seed": self.seed}
