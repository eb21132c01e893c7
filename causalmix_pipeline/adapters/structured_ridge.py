"""A ridge regression on the response surface's linear features: closed form, instant.

Features are s = sqrt(share), s_d z_d and z (standardised covariates). The penalty and the relative
weight of the three groups are chosen per task by the error on left-out pool states, in closed form
from the ridge's own projection. It extrapolates badly outside the runs' states:
a fallback and a yardstick, not a default.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from causalmix_pipeline.core.effects import MINIMUM_STATES, Gain, StateScaler, check_runs
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Penalties tried, relative to features of unit size.
PENALTIES = tuple(10.0 ** np.arange(-4, 1.6, 0.5))

#: Prior variances tried for share x state and for the state, that of the share being 1.
GROUP_WEIGHTS = (0.03, 0.3, 3.0)


class StructuredRidge:
    """Ridge on (s, s x z, z), one penalty per task, behind `core.effects.EffectEstimator`.

    Attributes:
        noise_variance_T: residual variance with the fit's degrees of freedom taken off; (T,).
    """

    name = "structured_ridge"

    def __init__(self) -> None:
        """Set up an unfitted ridge; it draws no random number."""
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable, parameters: Mapping | None = None) -> StructuredRidge:
        """Choose the penalties, or reuse them, and solve.

        Raises:
            EstimationError: if `check_runs` refuses the runs or there are no covariates.
        """
        if not runs.covariates:
            raise EstimationError(
                "structured_ridge needs at least one covariate, got none: use "
                "response_surface_blind, or measure the pool states."
            )
        check_runs(runs, minimum_states=MINIMUM_STATES)
        runs = runs.sorted_by_run()
        self._scaler = StateScaler.fit(runs.distinct_states()[1])
        features_NF = self._features(self._scaler.transform(runs.state_NDP), runs.mixture_ND)
        self._feature_mean_F, self._outcome_mean_T = features_NF.mean(0), runs.outcome_NT.mean(0)
        centered_NF = features_NF - self._feature_mean_F
        centered_NT = runs.outcome_NT - self._outcome_mean_T
        settings = self._settings(len(runs.domains), len(runs.covariates))
        if parameters is None:
            self._chosen = _choose(settings, centered_NF, centered_NT, runs.groups)
        else:
            self._chosen = [(int(g), float(p)) for g, p in parameters["chosen"]]
        self._solve(settings, centered_NF, centered_NT)
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the expected outcome of each mixture; shape (M, T)."""
        features_MF = self._features_at(state_DP, mixture_MD) - self._feature_mean_F
        return self._outcome_mean_T + features_MF @ self._coefficient_FT

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return linear differences and their standard errors by the ridge's posterior."""
        both = self._features_at(state_DP, np.vstack([reference_D, mixture_MD]))
        difference_MF = both[1:] - both[0]
        se_MT = np.column_stack(
            [
                np.sqrt(
                    np.maximum(np.sum((difference_MF @ covariance_FF) * difference_MF, axis=1), 0.0)
                )
                for covariance_FF in self._covariance_TFF
            ]
        )
        return Gain(difference_MF @ self._coefficient_FT, se_MT)

    def parameters(self) -> dict:
        """Return group setting and penalty of each task, for `fit(runs, parameters=...)`."""
        return {"chosen": [list(pair) for pair in self._chosen]}

    def _features_at(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        mixture_MD = np.atleast_2d(mixture_MD)
        scaled_DP = self._scaler.transform(np.asarray(state_DP, dtype=float))
        return self._features(
            np.broadcast_to(scaled_DP, (len(mixture_MD), *scaled_DP.shape)), mixture_MD
        )

    @staticmethod
    def _features(scaled_NDP: np.ndarray, mixture_ND: np.ndarray) -> np.ndarray:
        root_ND = np.sqrt(np.clip(mixture_ND, 0, None))
        meeting_NDP = root_ND[:, :, None] * scaled_NDP
        n_runs = len(mixture_ND)
        return np.hstack([root_ND, meeting_NDP.reshape(n_runs, -1), scaled_NDP.reshape(n_runs, -1)])

    @staticmethod
    def _settings(n_domains: int, n_covariates: int) -> list[np.ndarray]:
        """Prior standard deviation of each coefficient, for each pair of group weights."""
        n_meetings = n_domains * n_covariates
        return [
            np.sqrt(
                np.repeat([1.0, a / n_covariates, b / n_meetings], [n_domains, *[n_meetings] * 2])
            )
            for a, b in itertools.product(GROUP_WEIGHTS, GROUP_WEIGHTS)
        ]

    def _solve(
        self, settings: list[np.ndarray], features_NF: np.ndarray, outcome_NT: np.ndarray
    ) -> None:
        coefficients, covariances, noises = [], [], []
        residual_NT = np.empty_like(outcome_NT)
        for t, (setting, penalty) in enumerate(self._chosen):
            precision_F = penalty / settings[setting] ** 2
            inverse_FF = np.linalg.inv(features_NF.T @ features_NF + np.diag(precision_F))
            coefficient_F = inverse_FF @ (features_NF.T @ outcome_NT[:, t])
            residual_NT[:, t] = outcome_NT[:, t] - features_NF @ coefficient_F
            used = float(np.sum((features_NF @ inverse_FF) * features_NF)) + 1
            noise = float(residual_NT[:, t] @ residual_NT[:, t]) / max(len(features_NF) - used, 1)
            coefficients.append(coefficient_F)
            covariances.append(noise * inverse_FF)
            noises.append(noise)
        self._coefficient_FT = np.column_stack(coefficients)
        self._covariance_TFF = covariances
        self.noise_variance_T = np.array(noises)
        size_T = np.sqrt((residual_NT**2).sum(axis=0))
        residual_NT = residual_NT / np.where(size_T > 0, size_T, 1.0)
        self.task_correlation_TT = residual_NT.T @ residual_NT


def left_out_residuals(
    features_NF: np.ndarray, outcome_NT: np.ndarray, penalty: float, state_ids: np.ndarray
) -> np.ndarray:
    """Return the residuals of each state's runs under the ridge fitted without that state.

    With C = I - projection, they are C_bb^-1 (C y)_b for the rows b of the state.

    Args:
        features_NF: centred features, already divided by their penalty's square root weight.
        outcome_NT: centred outcomes.
        penalty: the ridge's penalty, > 0.
        state_ids: the state of each row; shape (N,).
    """
    left_NK, singular_K, _ = np.linalg.svd(features_NF, full_matrices=False)
    return _left_out(left_NK, singular_K**2, outcome_NT, penalty, _blocks(state_ids))


def _choose(
    settings: list[np.ndarray],
    features_NF: np.ndarray,
    outcome_NT: np.ndarray,
    state_ids: np.ndarray,
) -> list[tuple[int, float]]:
    blocks = _blocks(state_ids)
    best_T = np.full(outcome_NT.shape[1], np.inf)
    chosen = [(0, PENALTIES[-1])] * outcome_NT.shape[1]
    for index, deviation_F in enumerate(settings):
        left_NK, singular_K, _ = np.linalg.svd(features_NF * deviation_F, full_matrices=False)
        for penalty in PENALTIES:
            residual_NT = _left_out(left_NK, singular_K**2, outcome_NT, penalty, blocks)
            error_T = (residual_NT**2).sum(axis=0)
            for t in np.flatnonzero(error_T < best_T):
                best_T[t], chosen[t] = error_T[t], (index, float(penalty))
    return chosen


def _blocks(state_ids: np.ndarray) -> list[np.ndarray]:
    """Row positions of the states, stacked by how many runs a state has; each (S, runs)."""
    rows_of = [np.flatnonzero(state_ids == state) for state in np.unique(state_ids)]
    sizes = sorted({len(rows) for rows in rows_of})
    return [np.stack([rows for rows in rows_of if len(rows) == size]) for size in sizes]


def _left_out(
    left_NK: np.ndarray,
    eigenvalue_K: np.ndarray,
    outcome_NT: np.ndarray,
    penalty: float,
    blocks: list[np.ndarray],
) -> np.ndarray:
    shrunk_NK = left_NK * (eigenvalue_K / (eigenvalue_K + penalty))
    plain_NT = outcome_NT - shrunk_NK @ (left_NK.T @ outcome_NT)
    residual_NT = np.empty_like(outcome_NT)
    for rows_SB in blocks:
        own_SBB = np.einsum("sbk,sck->sbc", shrunk_NK[rows_SB], left_NK[rows_SB])
        residual_NT[rows_SB] = np.linalg.solve(
            np.eye(rows_SB.shape[1]) - own_SBB, plain_NT[rows_SB]
        )
    return residual_NT
