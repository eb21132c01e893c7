"""EconML's causal forest behind `core.effects.EffectEstimator`: the paper's estimator.

y = g(x) + theta(x) . phi(share) + noise; E[y|x] and E[phi|x] are cross-fitted by LightGBM over
folds of whole pool states, the forest learns theta on the residuals. Source: arXiv 2607.01104;
Athey, Tibshirani, Wager, Generalized random forests (arXiv 1610.01271). EconML's intervals are
those of a linear projection, not of a gain, so none is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from causalmix_pipeline.core.effects import (
    MINIMUM_STATES,
    Gain,
    StateScaler,
    assign_folds,
    check_runs,
)
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Treatment coordinates that the forest knows.
COORDINATES = ("sqrt", "log")

#: LightGBM's settings for the nuisances: shallow, for some hundred runs.
NUISANCE_PARAMETERS = {
    "objective": "regression",
    "learning_rate": 0.05,
    "num_leaves": 7,
    "min_data_in_leaf": 10,
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
}

#: Boosting rounds of a nuisance.
NUISANCE_TREES = 100


class CausalForest:
    """One `CausalForestDML` per task on all D x P covariates.

    Standard errors are unknown: `Gain.se_MT` is nan.
    """

    def __init__(
        self,
        *,
        coordinates: str = "sqrt",
        log_offset: float = 0.01,
        n_trees: int = 200,
        n_folds: int = 5,
        seed: int = 0,
    ):
        """Set up an unfitted forest.

        Args:
            coordinates: phi; `sqrt`, or `log` for log(share + log_offset).
            log_offset: > 0; what a share of zero counts as.
            n_trees: trees of a forest; a multiple of 4.
            n_folds: cross-fitting folds, of whole pool states.
            seed: of folds, nuisances and forest.

        Raises:
            ConfigError: if the coordinates are unknown, or the offset isn't positive.
        """
        if coordinates not in COORDINATES:
            raise ConfigError(
                f"causal_forest.coordinates must be one of {', '.join(COORDINATES)}, got "
                f"{coordinates!r}: choose one of them."
            )
        if log_offset <= 0:
            raise ConfigError(
                f"causal_forest.log_offset must be > 0, got {log_offset}: log of a share of zero "
                "has no value without it; .01 is usual."
            )
        self.name = "causal_forest" if coordinates == "sqrt" else "causal_forest_log"
        self.coordinates = coordinates
        self.log_offset = log_offset
        self.n_trees = n_trees
        self.n_folds = n_folds
        self.seed = seed
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable) -> CausalForest:
        """Cross-fit the nuisances and grow a forest per task.

        Raises:
            EstimationError: if `check_runs` refuses the runs, or no covariate varies.
        """
        check_runs(runs, minimum_states=MINIMUM_STATES)
        runs = runs.sorted_by_run()
        self._scaler = StateScaler.fit(runs.distinct_states()[1])
        self.dropped_covariates = self._scaler.dropped(runs)
        if not self._scaler.kept_DP.any():
            raise EstimationError(
                "causal_forest needs a covariate that varies between pool states, got "
                f"{len(runs.covariate_columns)} that don't: use response_surface_blind or regmix."
            )
        state_NC = self._columns(runs.state_NDP)
        treatment_NK = self.treatment(runs.mixture_ND)
        fold_N = assign_folds(runs, self.n_folds, self.seed)
        splits = [
            (np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold))
            for fold in np.unique(fold_N)
        ]
        self._forests = [
            self._grow(outcome_N, treatment_NK, state_NC, splits) for outcome_N in runs.outcome_NT.T
        ]
        self._outcome_nuisance = _Boosted(self.seed).fit(state_NC, runs.outcome_NT)
        self._treatment_nuisance = _Boosted(self.seed).fit(state_NC, treatment_NK)
        self.task_correlation_TT = np.ones((len(runs.tasks),) * 2)
        return self

    def treatment(self, mixture_ND: np.ndarray) -> np.ndarray:
        """Return the treatment coordinates phi of mixtures; shape (N, D)."""
        mixture_ND = np.clip(np.atleast_2d(mixture_ND), 0, None)
        if self.coordinates == "sqrt":
            return np.sqrt(mixture_ND)
        return np.log(mixture_ND + self.log_offset)

    def effect(self, state_DP: np.ndarray) -> np.ndarray:
        """Return theta: the effect of each treatment coordinate on each task; shape (D, T)."""
        state_1C = self._columns(np.asarray(state_DP, dtype=float)[None])
        return np.column_stack(
            [np.ravel(forest.const_marginal_effect(state_1C)) for forest in self._forests]
        )

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture; shape (M, T)."""
        state_1C = self._columns(np.asarray(state_DP, dtype=float)[None])
        step_MK = self.treatment(mixture_MD) - self._treatment_nuisance.predict(state_1C)
        return self._outcome_nuisance.predict(state_1C) + step_MK @ self.effect(state_DP)

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return theta . (phi(mixture) - phi(reference)); standard errors are unknown (nan)."""
        step_MK = self.treatment(mixture_MD) - self.treatment(reference_D)
        mean_MT = step_MK @ self.effect(state_DP)
        return Gain(mean_MT, np.full_like(mean_MT, np.nan))

    def parameters(self) -> dict:
        """Return the settings; nothing is searched."""
        return {
            "coordinates": self.coordinates,
            "log_offset": self.log_offset,
            "n_trees": self.n_trees,
            "n_folds": self.n_folds,
            "seed": self.seed,
        }

    def _columns(self, state_NDP: np.ndarray) -> np.ndarray:
        return self._scaler.transform(state_NDP)[:, self._scaler.kept_DP]

    def _grow(
        self, outcome_N: np.ndarray, treatment_NK: np.ndarray, state_NC: np.ndarray, splits: list
    ):
        from econml.dml import CausalForestDML

        # EconML annotates these as their defaults' types; it takes any regressor and any splits.
        nuisances: dict[str, Any] = {
            "model_y": _Boosted(self.seed),
            "model_t": _Boosted(self.seed),
            "cv": splits,
        }
        forest = CausalForestDML(
            **nuisances,
            n_estimators=self.n_trees,
            inference=False,
            n_jobs=1,
            random_state=self.seed,
        )
        return forest.fit(outcome_N, treatment_NK, X=state_NC)


class _Boosted:
    """LightGBM regression of one or more columns, as scikit-learn's duck-typed estimator.

    LightGBM's own wrapper warns about feature names when scikit-learn checks plain arrays.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def get_params(self, deep: bool = True) -> dict:
        return {"seed": self.seed}

    def set_params(self, **settings: int) -> _Boosted:
        self.seed = settings.get("seed", self.seed)
        return self

    def fit(self, inputs: np.ndarray, targets: np.ndarray) -> _Boosted:
        import lightgbm

        self.is_column_ = np.ndim(targets) == 1
        settings = {**NUISANCE_PARAMETERS, "seed": self.seed}
        self.boosters_ = [
            lightgbm.train(
                settings,
                lightgbm.Dataset(inputs, column, params={"verbosity": -1}),
                num_boost_round=NUISANCE_TREES,
            )
            for column in np.atleast_2d(np.asarray(targets).T)
        ]
        return self

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        columns = np.column_stack(
            [np.asarray(booster.predict(inputs)) for booster in self.boosters_]
        )
        return columns[:, 0] if self.is_column_ else columns
