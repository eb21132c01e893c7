"""A Gaussian process over pool state and mixture whose kernel knows the structure.

The kernel is that of `gp_covariance`. A task whose outcomes are all negative is a loss with its
sign turned: the process models minus the log of that loss. Losses follow power laws, so the last
tenth of a domain brings less than the first. Each task has its own hyper-parameters: sharing them
among tasks, leaving the importance out, and weighting covariates alike in all domains was measured
and is worse (docs/DECISIONS.md).
Source: C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning, section 2.2
(posterior).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.adapters.gp_covariance import (
    Covariance,
    Points,
    bent,
    importance_of,
    weights_of,
)
from causalmix_pipeline.adapters.gp_hyper_parameters import (
    find_hyper_parameters,
    hyper_names,
    reuse_hyper_parameters,
)
from causalmix_pipeline.core.effects import (
    MINIMUM_STATES,
    RELATIVE_FLOOR,
    Gain,
    StateScaler,
    check_runs,
)
from causalmix_pipeline.core.runs import RunTable

#: Covariances computed at a time, so that a part (1 MB) stays in the processor's cache.
CHUNK_VALUES = 32_768

#: Observations that the prior guess 1 of a task's scale counts for.
SCALE_PRIOR_RUNS = 10.0


class ResponseSurface:
    """The structured Gaussian process, behind `core.effects.EffectEstimator`.

    Attributes:
        noise_variance_T: variance of one run's outcome around its mean; shape (T,).
        task_correlation_TT: correlation of the tasks' whitened outcomes, which the posterior
            errors of a gain share where tasks have like kernels.
        dropped_covariates: names of covariates that never vary among the runs' states.
    """

    def __init__(self, *, blind: bool = False, seed: int = 0):
        """Set up an unfitted surface.

        Args:
            blind: whether to ignore covariates even where there are some.
            seed: draws the runs that the search sees, if there are many.
        """
        self.name = "response_surface_blind" if blind else "response_surface"
        self.blind = blind
        self.seed = seed
        self.task_correlation_TT = np.ones((0, 0))
        self.dropped_covariates: tuple[str, ...] = ()

    def fit(self, runs: RunTable, parameters: Mapping | None = None) -> ResponseSurface:
        """Find the hyper-parameters of each task, or reuse them, and condition on the runs.

        Args:
            runs: the proxy runs; their order doesn't matter.
            parameters: what `parameters()` returned for an earlier fit; no search then.

        Raises:
            EstimationError: if `check_runs` refuses the runs, or `parameters` were made for other
                tasks, domains or covariates.
        """
        asks_state = not self.blind and bool(runs.covariates)
        check_runs(runs, minimum_states=MINIMUM_STATES if asks_state else 1)
        runs = runs.sorted_by_run()
        self._scaler = StateScaler.fit(runs.distinct_states()[1])
        self.dropped_covariates = self._scaler.dropped(runs) if asks_state else ()
        names = hyper_names(runs, asks_state and bool(self._scaler.kept_DP.any()))
        points = Points(
            np.sqrt(np.clip(runs.mixture_ND, 0, None)),
            self._scaler.transform(runs.state_NDP),
            runs.groups,
        )
        self._is_loss_T = np.asarray((runs.outcome_NT < 0).all(axis=0))
        latent_NT = _to_latent(runs.outcome_NT, self._is_loss_T)
        deviation_T = latent_NT.std(axis=0)
        self._mean_T = latent_NT.mean(axis=0)
        self._scale_T = np.where(
            deviation_T > RELATIVE_FLOOR * (1 + np.abs(self._mean_T)), deviation_T, 1.0
        )
        standard_NT = (latent_NT - self._mean_T) / self._scale_T
        self._tasks = runs.tasks
        if parameters is None:
            hypers = find_hyper_parameters(names, points, standard_NT, seed=self.seed)
        else:
            hypers = [reuse_hyper_parameters(names, parameters, task) for task in runs.tasks]
        self._posteriors = [
            _Posterior(hyper, points, standard_NT[:, t]) for t, hyper in enumerate(hypers)
        ]
        noise_T = np.array([posterior.noise_variance for posterior in self._posteriors])
        slope_T = np.where(self._is_loss_T, (runs.outcome_NT**2).mean(axis=0), 1.0)
        self.noise_variance_T = noise_T * self._scale_T**2 * slope_T
        white_NT = np.column_stack([posterior.white_N for posterior in self._posteriors])
        size_T = np.sqrt((white_NT**2).sum(axis=0))
        white_NT = white_NT / np.where(size_T > 0, size_T, 1.0)
        self.task_correlation_TT = white_NT.T @ white_NT
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the posterior median of the outcome of each mixture; shape (M, T)."""
        scaled_DP, root_MD = self._inputs(state_DP, np.atleast_2d(mixture_MD))
        mean_MT = np.column_stack([p.predict(scaled_DP, root_MD) for p in self._posteriors])
        return _to_outcome(self._mean_T + mean_MT * self._scale_T, self._is_loss_T)

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return gains over the reference and their joint posterior standard errors.

        Of a loss, the process knows the ratio of the two losses and its error; the gain is that
        ratio's part of the loss predicted for the reference (delta method).
        """
        scaled_DP, root_MD = self._inputs(state_DP, np.vstack([reference_D, mixture_MD]))
        parts = [p.gain(scaled_DP, root_MD[1:], root_MD[0]) for p in self._posteriors]
        step_MT = np.column_stack([mean_M for mean_M, _ in parts]) * self._scale_T
        se_MT = np.column_stack([se_M for _, se_M in parts]) * self._scale_T
        loss_T = -self.predict(state_DP, reference_D)[0]
        ratio_MT = np.exp(-np.where(self._is_loss_T, step_MT, 0.0))
        return Gain(
            np.where(self._is_loss_T, loss_T * (1 - ratio_MT), step_MT),
            np.where(self._is_loss_T, loss_T * ratio_MT * se_MT, se_MT),
        )

    def parameters(self) -> dict:
        """Return the hyper-parameters by task and name, for `fit(runs, parameters=...)`."""
        hypers = [dict(posterior.hyper) for posterior in self._posteriors]
        return {"hyper_parameters": dict(zip(self._tasks, hypers, strict=True))}

    def _inputs(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> tuple:
        scaled_DP = self._scaler.transform(np.asarray(state_DP, dtype=float))
        return scaled_DP, np.sqrt(np.clip(mixture_MD, 0, None))


def _to_latent(outcome: np.ndarray, is_loss_T: np.ndarray) -> np.ndarray:
    """What the process models: minus the log of a loss, any other outcome as it is."""
    return np.where(is_loss_T, -np.log(np.where(is_loss_T, -outcome, 1.0)), outcome)


def _to_outcome(latent: np.ndarray, is_loss_T: np.ndarray) -> np.ndarray:
    """Inverse of `_to_latent`."""
    return np.where(is_loss_T, -np.exp(-np.where(is_loss_T, latent, 0.0)), latent)


@dataclass(frozen=True, eq=False)
class _Met:
    """A new state against those of the runs.

    Attributes:
        meeting_ND: what a root of a share counts for in `share_state`; None without states.
        domain_ND: nearness of each domain's state.
        all_N: nearness of the whole state.
    """

    meeting_ND: np.ndarray | None
    domain_ND: np.ndarray
    all_N: np.ndarray


class _Posterior:
    """The process of one task for one setting of the hyper-parameters, conditioned on the runs."""

    def __init__(self, hyper: Mapping[str, float], points: Points, standard_N: np.ndarray):
        from scipy.linalg import cho_solve, solve_triangular

        self.hyper, self.points = hyper, points
        self.sees_state = "share_state" in hyper
        self.importance_D = importance_of(hyper)
        if self.sees_state:
            self.weight_DP = weights_of(hyper)
        self.center_D = points.root_ND.mean(axis=0)
        self.cholesky_NN = np.linalg.cholesky(Covariance(hyper, points).matrix())
        self.alpha_N = cho_solve((self.cholesky_NN, True), standard_N)
        self.white_N = solve_triangular(self.cholesky_NN, standard_N, lower=True)
        size = float(self.white_N @ self.white_N)
        # The likelihood's own estimate of the scale that the whole covariance is off by.
        self.variance_scale = (size + SCALE_PRIOR_RUNS) / (len(standard_N) + SCALE_PRIOR_RUNS)
        self.noise_variance = self.variance_scale * hyper["noise"]

    def predict(self, state_DP: np.ndarray, root_MD: np.ndarray) -> np.ndarray:
        """Posterior mean of the outcome; shape (M,)."""
        own = float(np.sum(self._state_row(state_DP) * self.alpha_N))
        met = self._met(state_DP)
        parts = [self._cross(met, part) @ self.alpha_N for part in self._chunks(root_MD)]
        return np.concatenate(parts) + own

    def gain(
        self, state_DP: np.ndarray, root_MD: np.ndarray, root_D: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of the gain over the mixture of `root_D`; shapes (M,)."""
        from scipy.linalg import solve_triangular

        met, reference_1N, means, explained = self._met(state_DP), None, [], []
        for part in self._chunks(np.vstack([root_D, root_MD])):
            cross_MN = self._cross(met, part)
            reference_1N = cross_MN[:1].copy() if reference_1N is None else reference_1N
            cross_MN -= reference_1N
            means.append(cross_MN @ self.alpha_N)
            solved_NM = solve_triangular(
                self.cholesky_NN, cross_MN.T, lower=True, overwrite_b=True, check_finite=False
            )
            explained.append(np.einsum("nm,nm->m", solved_NM, solved_NM))
        prior_M = self._prior_variance_of_difference(state_DP, root_MD, root_D)
        variance_M = np.clip(prior_M - np.concatenate(explained)[1:], 0, None)
        return np.concatenate(means)[1:], np.sqrt(variance_M * self.variance_scale)

    def _chunks(self, root_MD: np.ndarray) -> list[np.ndarray]:
        """Mixtures in parts whose covariances fit the processor's cache."""
        rows = max(CHUNK_VALUES // len(self.alpha_N), 1)
        return [root_MD[i : i + rows] for i in range(0, max(len(root_MD), 1), rows)]

    def _met(self, state_DP: np.ndarray) -> _Met:
        """What of the kernel the state alone decides."""
        h, root_ND = self.hyper, self.points.root_ND
        if not self.sees_state:
            return _Met(None, np.ones(root_ND.shape), np.ones(len(root_ND)))
        met_DP = state_DP * self.weight_DP * (h["share_state"] * self.importance_D[:, None])
        meeting_ND = root_ND * np.einsum("ndp,dp->nd", self.points.state_NDP, met_DP)
        distance_ND = self._distances(state_DP)
        distance_N = (distance_ND * self.importance_D).mean(axis=1)
        return _Met(
            meeting_ND,
            np.exp(-0.5 * distance_ND / h["domain_state_length"] ** 2),
            np.exp(-0.5 * distance_N / h["all_state_length"] ** 2),
        )

    def _cross(self, met: _Met, root_MD: np.ndarray) -> np.ndarray:
        """Covariance of new mixtures at one state with the runs, but for the state's main effect.

        That the state is constant leaves one exponential per pair and domain: 20,000 candidates
        are scored in a fraction of a second.
        """
        h, root_ND, importance_D = self.hyper, self.points.root_ND, self.importance_D
        step_MD = (root_MD - self.center_D) * (h["share"] * importance_D)
        linear_MN = step_MD @ (root_ND - self.center_D).T
        if met.meeting_ND is not None:
            linear_MN += root_MD @ met.meeting_ND.T
        apart_MN = (root_MD * (-2 * importance_D)) @ root_ND.T
        apart_MN += (root_MD**2 @ importance_D)[:, None]
        apart_MN += root_ND**2 @ importance_D
        kernel_MN = apart_MN * (-0.5 / h["near_length"] ** 2)
        np.exp(kernel_MN, out=kernel_MN)
        kernel_MN *= linear_MN
        apart_MN *= -0.5 / h["all_share_length"] ** 2
        np.exp(apart_MN, out=apart_MN)
        apart_MN *= met.all_N * h["all"]
        kernel_MN += apart_MN
        size_ND = met.domain_ND * (h["domain"] / len(importance_D) * importance_D)
        for d in range(len(importance_D)):
            part_MN = np.subtract.outer(root_MD[:, d], root_ND[:, d])
            part_MN = bent(np.abs(part_MN, out=part_MN), h["domain_share_length"])
            part_MN *= size_ND[:, d]
            kernel_MN += part_MN
        return kernel_MN

    def _state_row(self, state_DP: np.ndarray) -> np.ndarray | float:
        """Covariance of the state's main effect with each run's; shape (N,)."""
        if not self.sees_state:
            return 0.0
        h, n_domains = self.hyper, len(self.importance_D)
        met_DP = state_DP * self.weight_DP / n_domains
        linear_N = np.einsum("ndp,dp->n", self.points.state_NDP, met_DP)
        distance_N = self._distances(state_DP).mean(axis=1)
        smooth_N = np.exp(-0.5 * distance_N / h["state_length"] ** 2)
        return h["state_linear"] * linear_N + h["state_smooth"] * smooth_N

    def _distances(self, state_DP: np.ndarray) -> np.ndarray:
        """Weighted squared distance of each domain's state from those of the runs; (N, D)."""
        step_NDP = self.points.state_NDP - state_DP
        return np.einsum("ndp,ndp,dp->nd", step_NDP, step_NDP, self.weight_DP)

    def _prior_variance_of_difference(
        self, state_DP: np.ndarray, root_MD: np.ndarray, root_D: np.ndarray
    ) -> np.ndarray:
        h = self.hyper
        step_MD = np.abs(root_MD - root_D)
        apart_M = step_MD**2 @ self.importance_D
        near_M = np.exp(-0.5 * apart_M / h["near_length"] ** 2)

        def linear(left_MD: np.ndarray, right_D: np.ndarray, size_D: np.ndarray) -> np.ndarray:
            met_M = left_MD * right_D @ size_D
            return left_MD**2 @ size_D + right_D**2 @ size_D - 2 * near_M * met_M

        center_D = self.center_D
        variance_M = linear(root_MD - center_D, root_D - center_D, h["share"] * self.importance_D)
        if self.sees_state:
            size_D = (state_DP**2 * self.weight_DP).sum(axis=1) * self.importance_D
            variance_M += linear(root_MD, root_D, h["share_state"] * size_D)
        own_MD = 1 - bent(step_MD, h["domain_share_length"])
        domain_M = own_MD @ self.importance_D / len(self.importance_D)
        all_M = 1 - np.exp(-0.5 * apart_M / h["all_share_length"] ** 2)
        return variance_M + 2 * h["domain"] * domain_M + 2 * h["all"] * all_M
