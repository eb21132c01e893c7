"""LightGBM regressions behind `core.effects.EffectEstimator`: RegMix, and the same with the state.

RegMix regresses each task on the mixture alone. Source: arXiv 2407.01492 and the settings of its
published notebook (squared error, 1,000 trees, rate .01, seed 42, else LightGBM's defaults); its
early stopping on the test runs is left out, since it leaks.
"""

from __future__ import annotations

import numpy as np

from causalmix_pipeline.core.effects import MINIMUM_STATES, Gain, check_runs
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Number of trees of RegMix's published settings.
REGMIX_TREES = 1000

#: The rest of RegMix's settings, and what makes LightGBM give the same trees each time.
REGMIX_PARAMETERS = {
    "objective": "regression",
    "learning_rate": 0.01,
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
}


class LightGBMSurface:
    """One boosted regression per task, on the mixture alone or on mixture and covariates.

    It has no standard errors: `Gain.se_MT` is nan.
    """

    def __init__(self, *, with_state: bool = False, seed: int = 42, n_trees: int = REGMIX_TREES):
        """Set up an unfitted regression.

        Args:
            with_state: whether the D x P covariates are inputs too.
            seed: LightGBM's seed; RegMix's is 42.
            n_trees: boosting rounds, > 0.
        """
        self.name = "lightgbm_state" if with_state else "regmix"
        self.with_state = with_state
        self.seed = seed
        self.n_trees = n_trees
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable) -> LightGBMSurface:
        """Fit one regression per task.

        Raises:
            EstimationError: if the runs are refused by `check_runs`, or the state is asked for
                and there are no covariates.
        """
        if self.with_state and not runs.covariates:
            raise EstimationError(
                "lightgbm_state needs at least one covariate, got none: use regmix, or measure "
                "the pool states."
            )
        check_runs(runs, minimum_states=MINIMUM_STATES if self.with_state else 1)
        runs = runs.sorted_by_run()
        inputs = np.column_stack([runs.mixture_ND, self._state_columns(runs.state_NDP)])
        self._boosters = [self._boost(inputs, outcome_N) for outcome_N in runs.outcome_NT.T]
        self.task_correlation_TT = np.ones((len(runs.tasks),) * 2)
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture; shape (M, T)."""
        mixture_MD = np.atleast_2d(mixture_MD)
        state_MDP = np.broadcast_to(state_DP, (len(mixture_MD), *np.shape(state_DP)))
        inputs = np.column_stack([mixture_MD, self._state_columns(state_MDP)])
        return np.column_stack([np.asarray(booster.predict(inputs)) for booster in self._boosters])

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return differences of predictions; their standard errors are unknown (nan)."""
        both = self.predict(state_DP, np.vstack([reference_D, mixture_MD]))
        mean_MT = both[1:] - both[0]
        return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    def parameters(self) -> dict:
        """Return the settings; nothing is searched."""
        return {"n_trees": self.n_trees, "seed": self.seed, **REGMIX_PARAMETERS}

    def _state_columns(self, state_NDP: np.ndarray) -> np.ndarray:
        n_runs = len(state_NDP)
        return state_NDP.reshape(n_runs, -1) if self.with_state else np.empty((n_runs, 0))

    def _boost(self, inputs: np.ndarray, outcome_N: np.ndarray):
        import lightgbm

        settings = {**REGMIX_PARAMETERS, "seed": self.seed}
        data = lightgbm.Dataset(inputs, outcome_N, params={"verbosity": -1})
        return lightgbm.train(settings, data, num_boost_round=self.n_trees)
