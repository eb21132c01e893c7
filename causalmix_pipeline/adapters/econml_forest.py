"""EconML's causal forest behind `core.effects.EffectEstimator`: the paper's estimator.

y = g(x) + theta(x) . phi(share) + noise; E[y|x] and E[phi|x] are cross-fitted by LightGBM over
folds of whole pool states, the forest learns theta on the residuals. Source: arXiv 2607.01104;
Athey, Tibshirani, Wager, Generalized random forests (arXiv 1610.01271). EconML's intervals are
those of a linear projection, not of a gain, so none is given; how far effects differ from one
seed of the cross-fitting to another is in `CausalForest.seed_spread_T`.
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

#: Treatment coordinates that the forest knows, and the estimator's name with each: the root of a
#: share; log(share + offset), the paper's; shares themselves but for the last, as they sum to 1;
#: isometric log-ratios of share + offset (Egozcue et al., Mathematical Geology 35, 2003).
COORDINATES = {
    "sqrt": "causal_forest",
    "log": "causal_forest_log",
    "raw": "causal_forest_raw",
    "ilr": "causal_forest_ilr",
}

#: Seeds of the cross-fitting; effects are their mean.
N_SEEDS = 3

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
    """`CausalForestDML` per task and seed on all D x P covariates.

    Standard errors are unknown: `Gain.se_MT` is nan.

    Attributes:
        needs_trust_region: whether the best mixture is always a single domain: gains are linear in
            the shares.
        seed_spread_T: standard deviation of effects between cross-fitting seeds over their root
            mean square, over the runs' states and coordinates; shape (T,).
    """

    def __init__(
        self,
        *,
        coordinates: str = "sqrt",
        log_offset: float = 0.01,
        n_trees: int = 68,
        n_folds: int = 5,
        seed: int = 0,
    ):
        """Set up an unfitted forest.

        Args:
            coordinates: phi; one of `COORDINATES`.
            log_offset: > 0; added to shares before their logarithm.
            n_trees: trees of each seed's forest; a multiple of 4.
            n_folds: cross-fitting folds, of whole pool states.
            seed: of folds, nuisances and forests.

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
        self.name = COORDINATES[coordinates]
        self.coordinates = coordinates
        self.needs_trust_region = coordinates == "raw"
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
        self._forests = [
            self._grow_all(runs, treatment_NK, state_NC, seed)
            for seed in range(self.seed, self.seed + N_SEEDS)
        ]
        states_SC = np.unique(state_NC, axis=0)
        effect_LSKT = np.array(
            [[self._effect(f, state_C[None]) for state_C in states_SC] for f in self._forests]
        )
        size_T = np.sqrt((effect_LSKT**2).mean(axis=(0, 1, 2)))
        spread_T = np.sqrt(effect_LSKT.var(axis=0, ddof=1).mean(axis=(0, 1)))
        self.seed_spread_T = spread_T / np.where(size_T > 0, size_T, 1.0)
        self._outcome_nuisance = _Boosted(self.seed).fit(state_NC, runs.outcome_NT)
        self._treatment_nuisance = _Boosted(self.seed).fit(state_NC, treatment_NK)
        self.task_correlation_TT = np.ones((len(runs.tasks),) * 2)
        return self

    def treatment(self, mixture_ND: np.ndarray) -> np.ndarray:
        """Return the treatment coordinates phi of mixtures; shape (N, K).

        K is D for `sqrt` and `log`, D - 1 for `raw` and `ilr`.
        """
        mixture_ND = np.clip(np.atleast_2d(mixture_ND), 0, None)
        if self.coordinates == "sqrt":
            return np.sqrt(mixture_ND)
        if self.coordinates == "raw":
            return mixture_ND[:, :-1]
        log_ND = np.log(mixture_ND + self.log_offset)
        return log_ND if self.coordinates == "log" else log_ND @ _helmert(log_ND.shape[1])

    def effect(self, state_DP: np.ndarray) -> np.ndarray:
        """Return theta: the effect of each treatment coordinate on each task; shape (K, T)."""
        state_1C = self._columns(np.asarray(state_DP, dtype=float)[None])
        return np.mean([self._effect(forests, state_1C) for forests in self._forests], axis=0)

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
        """Return the settings, as nothing is searched, and the spread between seeds."""
        return {
            "n_seeds": N_SEEDS,
            "seed_spread": self.seed_spread_T.tolist(),
            "coordinates": self.coordinates,
            "log_offset": self.log_offset,
            "n_trees": self.n_trees,
            "n_folds": self.n_folds,
            "seed": self.seed,
        }

    def _columns(self, state_NDP: np.ndarray) -> np.ndarray:
        return self._scaler.transform(state_NDP)[:, self._scaler.kept_DP]

    def _effect(self, forests: list, state_1C: np.ndarray) -> np.ndarray:
        """The effects that one seed's forests tell; shape (K, T)."""
        return np.column_stack([np.ravel(f.const_marginal_effect(state_1C)) for f in forests])

    def _grow_all(
        self, runs: RunTable, treatment_NK: np.ndarray, state_NC: np.ndarray, seed: int
    ) -> list:
        """A forest for each task, nuisances cross-fitted over the folds of this seed."""
        from econml.dml import CausalForestDML

        fold_N = assign_folds(runs, self.n_folds, seed)
        splits = [
            (np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold))
            for fold in np.unique(fold_N)
        ]
        # EconML annotates these as their defaults' types; it takes any regressor and any splits.
        nuisances: dict[str, Any] = {
            "model_y": _Boosted(seed),
            "model_t": _Boosted(seed),
            "cv": splits,
        }
        return [
            CausalForestDML(
                **nuisances,
                n_estimators=self.n_trees,
                inference=False,
                n_jobs=1,
                random_state=seed,
            ).fit(outcome_N, treatment_NK, X=state_NC)
            for outcome_N in runs.outcome_NT.T
        ]


def _helmert(n_domains: int) -> np.ndarray:
    """An orthonormal basis of the directions whose coordinates sum to 0; shape (D, D - 1)."""
    basis_DK = np.zeros((n_domains, n_domains - 1))
    for k in range(1, n_domains):
        basis_DK[:k, k - 1], basis_DK[k, k - 1] = 1.0, -k
        basis_DK[:, k - 1] /= np.sqrt(k * (k + 1))
    return basis_DK


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
