"""A Gaussian process over pool state and mixture whose kernel knows the structure; its ridge too.

With s = sqrt(share) and z = standardised covariates, the prior covariance of two runs' outcomes is

    share          sum_d i_d s_d s'_d              a domain helps, whatever its state
    share_state    sum_d i_d s_d s'_d  z_d . z'_d  how much depends on the domain's own state
                   both times near(i s)            and on what else is in the mixture
    domain         mean_d i_d bent(s_d, z_d)       each domain's own curve, kinks allowed
    all            smooth(i s, i z)                anything else
    state_linear, state_smooth                     main effect of the state
    state_id       same state                      what the covariates miss; cancels in gains
    noise          same run                        the seed

with i_d the importance of domain d, and a weight for each covariate of each domain. `near` and
`smooth` are squared exponentials, `bent` is Matern's with nu = 5/2. What one domain brings depends
on the rest of the mixture wherever domains teach the same thing: a prior holds `near` flat unless
the runs show that. A task whose outcomes are all negative is a loss with its sign turned: the
process models minus the log of that loss. Losses follow power laws, so the last tenth of a domain
brings less than the first. Each task has its own hyper-parameters, found by maximising the marginal
likelihood with weak priors: sharing them among tasks, leaving the importance out, and weighting
covariates alike in all domains was measured and is worse (docs/DECISIONS.md).
Source: C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning, sections 2.2
(posterior), 4.2.1 (Matern) and 5.4.1 (likelihood and its gradient).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import (
    MINIMUM_STATES,
    RELATIVE_FLOOR,
    Gain,
    StateScaler,
    check_runs,
)
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Prior median and standard deviation of the log of each hyper-parameter, for outcomes of unit
#: variance. Lengths are in units of sqrt(share), or of standard deviations of a typical covariate.
PRIORS = {
    "share": (1.0, 2.0),
    "share_state": (0.3, 2.0),
    "domain": (0.5, 2.0),
    "all": (0.1, 2.0),
    "state_linear": (0.1, 2.0),
    "state_smooth": (0.1, 2.0),
    "state_id": (0.02, 2.0),
    "noise": (0.05, 2.0),
    "near_length": (6.0, 0.5),
    "domain_share_length": (0.7, 0.7),
    "domain_state_length": (3.0, 0.7),
    "all_share_length": (0.8, 0.7),
    "all_state_length": (3.0, 0.7),
    "state_length": (3.0, 0.7),
}

#: Hyper-parameters that exist without covariates.
BLIND = ("share", "domain", "all", "state_id", "noise", "near_length", "domain_share_length",
         "all_share_length")  # fmt: skip

#: Prior standard deviation of the log weight of a domain's covariate or log importance of a domain;
#: the median is 1.
WEIGHT_DEVIATION = 1.0

#: Where the search starts, over the prior's median. From loud noise it can end where the steep part
#: of a curve near a share of zero is taken for noise (Spearman .914 against .946 on such a task).
START = {"noise": 0.1}

#: How many prior standard deviations a hyper-parameter may move.
SEARCH_WIDTH = 3.0

#: Added to the diagonal of the covariance so that its Cholesky exists, in outcome variances.
JITTER = 1e-6

#: Most runs that the search of hyper-parameters sees; the posterior sees them all. With 512 runs a
#: search on all costs five times as much.
SEARCH_RUNS = 256

#: Covariances computed at a time, so that a part (1 MB) stays in the processor's cache.
CHUNK_VALUES = 131_072

#: Observations that the prior guess 1 of a task's scale counts for.
SCALE_PRIOR_RUNS = 10.0


@dataclass(frozen=True, eq=False)
class _Points:
    """Runs as the kernel sees them: s = sqrt(share) (N, D), z (N, D, P), state ids (N,)."""

    root_ND: np.ndarray
    state_NDP: np.ndarray
    state_ids: np.ndarray


class ResponseSurface:
    """The structured Gaussian process, behind `core.effects.EffectEstimator`.

    Attributes:
        noise_variance_T: variance of one run's outcome around its mean; shape (T,).
        task_correlation_TT: correlation of the tasks' whitened outcomes, which the posterior
            errors of a gain share where tasks have like kernels.
        dropped_covariates: names of covariates that never vary among the runs' states.
    """

    def __init__(self, *, blind: bool = False, seed: int = 0, n_restarts: int = 0):
        """Set up an unfitted surface.

        Args:
            blind: whether to ignore covariates even where there are some.
            seed: draws the further starts of the search, and the runs it sees if there are many.
            n_restarts: random starts of the search after the first, 0 or more; with the first at
                little noise they found nothing better where it was measured.
        """
        self.name = "response_surface_blind" if blind else "response_surface"
        self.blind = blind
        self.seed = seed
        self.n_restarts = n_restarts
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
        names = _hyper_names(runs, asks_state and bool(self._scaler.kept_DP.any()))
        points = _Points(
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
        self._posteriors = [
            _Posterior(hyper, points, standard_NT[:, t])
            for t, hyper in enumerate(
                self._hyper_parameters(names, points, standard_NT, parameters)
            )
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

    def _hyper_parameters(
        self,
        names: tuple[str, ...],
        points: _Points,
        standard_NT: np.ndarray,
        parameters: Mapping | None,
    ) -> list[dict[str, float]]:
        if parameters is not None:
            return [_reuse(names, parameters, task) for task in self._tasks]
        rng = np.random.default_rng(self.seed)
        seen = _search_rows(points.state_ids, rng)
        few = _Points(points.root_ND[seen], points.state_NDP[seen], points.state_ids[seen])
        starts = _starts(names, rng, self.n_restarts)
        return [_search(names, few, standard_N, starts) for standard_N in standard_NT[seen].T]


def _to_latent(outcome: np.ndarray, is_loss_T: np.ndarray) -> np.ndarray:
    """What the process models: minus the log of a loss, any other outcome as it is."""
    return np.where(is_loss_T, -np.log(np.where(is_loss_T, -outcome, 1.0)), outcome)


def _to_outcome(latent: np.ndarray, is_loss_T: np.ndarray) -> np.ndarray:
    """Inverse of `_to_latent`."""
    return np.where(is_loss_T, -np.exp(-np.where(is_loss_T, latent, 0.0)), latent)


class _Posterior:
    """The process of one task for one setting of the hyper-parameters, conditioned on the runs."""

    def __init__(self, hyper: Mapping[str, float], points: _Points, standard_N: np.ndarray):
        from scipy.linalg import cho_solve, solve_triangular

        self.hyper, self.points = hyper, points
        self.sees_state = "share_state" in hyper
        self.importance_D = _importance(hyper)
        if self.sees_state:
            self.weight_DP = _weights(hyper)
        self.center_D = points.root_ND.mean(axis=0)
        self.cholesky_NN = np.linalg.cholesky(_Covariance(hyper, points).matrix())
        self.alpha_N = cho_solve((self.cholesky_NN, True), standard_N)
        self.white_N = solve_triangular(self.cholesky_NN, standard_N, lower=True)
        size = float(self.white_N @ self.white_N)
        # The likelihood's own estimate of the scale that the whole covariance is off by.
        self.variance_scale = (size + SCALE_PRIOR_RUNS) / (len(standard_N) + SCALE_PRIOR_RUNS)
        self.noise_variance = self.variance_scale * hyper["noise"]

    def predict(self, state_DP: np.ndarray, root_MD: np.ndarray) -> np.ndarray:
        """Posterior mean of the outcome; shape (M,)."""
        own = float(np.sum(self._state_row(state_DP) * self.alpha_N))
        parts = [self._cross(state_DP, part) @ self.alpha_N for part in self._chunks(root_MD)]
        return np.concatenate(parts) + own

    def gain(
        self, state_DP: np.ndarray, root_MD: np.ndarray, root_D: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of the gain over the mixture of `root_D`; shapes (M,)."""
        from scipy.linalg import solve_triangular

        reference_1N = self._cross(state_DP, root_D[None])
        means, explained = [], []
        for part in self._chunks(root_MD):
            difference_MN = self._cross(state_DP, part) - reference_1N
            solved_NM = solve_triangular(
                self.cholesky_NN, difference_MN.T, lower=True, check_finite=False
            )
            means.append(difference_MN @ self.alpha_N)
            explained.append(np.einsum("nm,nm->m", solved_NM, solved_NM))
        prior_M = self._prior_variance_of_difference(state_DP, root_MD, root_D)
        variance_M = np.clip(prior_M - np.concatenate(explained), 0, None) * self.variance_scale
        return np.concatenate(means), np.sqrt(variance_M)

    def _chunks(self, root_MD: np.ndarray) -> list[np.ndarray]:
        """Mixtures in parts whose covariances fit the processor's cache."""
        rows = max(CHUNK_VALUES // len(self.alpha_N), 1)
        return [root_MD[i : i + rows] for i in range(0, max(len(root_MD), 1), rows)]

    def _cross(self, state_DP: np.ndarray, root_MD: np.ndarray) -> np.ndarray:
        """Covariance of new mixtures at one state with the runs, but for the state's main effect.

        That the state is constant leaves one exponential per pair and domain: 20,000 candidates
        are scored in a fraction of a second.
        """
        h, points = self.hyper, self.points
        root_ND, n_domains = points.root_ND, points.root_ND.shape[1]
        step_MD = (root_MD - self.center_D) * self.importance_D
        linear_MN = h["share"] * step_MD @ (root_ND - self.center_D).T
        domain_ND, all_N = np.ones(root_ND.shape), np.ones(len(root_ND))
        if self.sees_state:
            met_DP = state_DP * self.weight_DP * self.importance_D[:, None]
            meets_ND = np.einsum("ndp,dp->nd", points.state_NDP, met_DP)
            linear_MN += h["share_state"] * root_MD @ (root_ND * meets_ND).T
            distance_ND = self._distances(state_DP)
            domain_ND = np.exp(-0.5 * distance_ND / h["domain_state_length"] ** 2)
            distance_N = (distance_ND * self.importance_D).mean(axis=1)
            all_N = np.exp(-0.5 * distance_N / h["all_state_length"] ** 2)
        apart_MN, kernel_MN = np.zeros_like(linear_MN), np.zeros_like(linear_MN)
        for d, importance in enumerate(self.importance_D):
            step_MN = np.abs(np.subtract.outer(root_MD[:, d], root_ND[:, d]))
            apart_MN += importance * step_MN**2
            part_MN = _bent(step_MN, h["domain_share_length"])
            part_MN *= domain_ND[:, d] * (h["domain"] * importance / n_domains)
            kernel_MN += part_MN
        kernel_MN += linear_MN * np.exp(apart_MN * (-0.5 / h["near_length"] ** 2))
        apart_MN *= -0.5 / h["all_share_length"] ** 2
        np.exp(apart_MN, out=apart_MN)
        apart_MN *= all_N * h["all"]
        kernel_MN += apart_MN
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
        own_MD = 1 - _bent(step_MD, h["domain_share_length"])
        domain_M = own_MD @ self.importance_D / len(self.importance_D)
        all_M = 1 - np.exp(-0.5 * apart_M / h["all_share_length"] ** 2)
        return variance_M + 2 * h["domain"] * domain_M + 2 * h["all"] * all_M


class _Covariance:
    """Covariance of the runs' outcomes for one setting, and the likelihood's gradient by it."""

    def __init__(self, hyper: Mapping[str, float], points: _Points):
        self.h = hyper
        self.points = points
        n_runs, n_domains = points.root_ND.shape
        self.sees_state = "share_state" in hyper
        self.root_ND = points.root_ND
        self.centered_ND = points.root_ND - points.root_ND.mean(axis=0)
        self.importance_D = _importance(hyper)
        self.same_state_NN = np.equal.outer(points.state_ids, points.state_ids).astype(float)
        if self.sees_state:
            self.weight_DP = _weights(hyper)
            self.both_DP = self.importance_D[:, None] * self.weight_DP
            self.meeting_NC = (points.root_ND[:, :, None] * points.state_NDP).reshape(n_runs, -1)
            self.flat_NC = (points.state_NDP / np.sqrt(n_domains)).reshape(n_runs, -1)

    def matrix(self) -> np.ndarray:
        """Return the covariance with noise; shape (N, N). Keeps the parts for `gradient`."""
        h, n_domains = self.h, self.root_ND.shape[1]
        apart_NN = _squared_distances(self.root_ND * np.sqrt(self.importance_D))
        self.near_NN = np.exp(apart_NN * (-0.5 / h["near_length"] ** 2))
        self.all_NN = apart_NN * (-0.5 / h["all_share_length"] ** 2)
        self.linear_NN = h["share"] * (self.centered_ND * self.importance_D) @ self.centered_ND.T
        if self.sees_state:
            met_NC = self.meeting_NC * self.both_DP.ravel()
            self.linear_NN += h["share_state"] * met_NC @ self.meeting_NC.T
            self.all_NN += self._state_exponent(self.flat_NC, self.both_DP, "all_state_length")
        np.exp(self.all_NN, out=self.all_NN)
        covariance_NN = self.linear_NN * self.near_NN
        self.domain_parts = [self._domain_part(d) for d in range(n_domains)]
        for part_NN, importance in zip(self.domain_parts, self.importance_D, strict=True):
            covariance_NN += h["domain"] * importance / n_domains * part_NN
        covariance_NN += h["all"] * self.all_NN + h["state_id"] * self.same_state_NN
        if self.sees_state:
            weight_C = self.weight_DP.ravel()
            covariance_NN += h["state_linear"] * (self.flat_NC * weight_C) @ self.flat_NC.T
            self.state_NN = np.exp(
                self._state_exponent(self.flat_NC, self.weight_DP, "state_length")
            )
            covariance_NN += h["state_smooth"] * self.state_NN
        covariance_NN[np.diag_indices_from(covariance_NN)] += h["noise"] + JITTER
        return covariance_NN

    def gradient(self, slope_NN: np.ndarray) -> dict[str, float]:
        """Return d/d log of each hyper-parameter of a function whose slope by K is `slope_NN`."""
        h = self.h
        self.out = {name: 0.0 for name in h}
        self.by_importance_D = np.zeros(len(self.importance_D))
        self.by_weight_DP = np.zeros_like(self.weight_DP) if self.sees_state else np.empty((0, 0))
        self._add_near(slope_NN)
        for d in range(len(self.importance_D)):
            self._add_domain(slope_NN, d)
        self._add_all(slope_NN * self.all_NN * h["all"])
        self.out["state_id"] = h["state_id"] * float(np.sum(slope_NN * self.same_state_NN))
        self.out["noise"] = h["noise"] * float(np.trace(slope_NN))
        if self.sees_state:
            part_DP = self._linear_pull(slope_NN, self.flat_NC) * self.weight_DP
            self.out["state_linear"] = h["state_linear"] * float(part_DP.sum())
            self.by_weight_DP += h["state_linear"] * part_DP
            pull_NN = slope_NN * self.state_NN * h["state_smooth"]
            self.out["state_smooth"] = float(pull_NN.sum())
            pull_DP = _pull(pull_NN, self.flat_NC).reshape(self.weight_DP.shape)
            self._add_state_length("state_length", pull_DP * self.weight_DP)
        self.out |= zip(_named(h, "importance:"), self.by_importance_D.tolist(), strict=True)
        self.out |= zip(_named(h, "weight:"), self.by_weight_DP.ravel().tolist(), strict=True)
        return self.out

    def _state_exponent(self, state_NC: np.ndarray, weight: np.ndarray, length: str) -> np.ndarray:
        squared_NN = _squared_distances(state_NC * np.sqrt(weight.ravel()))
        squared_NN *= -0.5 / self.h[length] ** 2
        return squared_NN

    def _steps(self, d: int) -> np.ndarray:
        return np.abs(np.subtract.outer(self.root_ND[:, d], self.root_ND[:, d]))

    def _domain_part(self, d: int) -> np.ndarray:
        part_NN = _bent(self._steps(d), self.h["domain_share_length"])
        if self.sees_state:
            state_NP = self.points.state_NDP[:, d]
            part_NN *= np.exp(
                self._state_exponent(state_NP, self.weight_DP[d], "domain_state_length")
            )
        return part_NN

    def _linear_pull(self, slope_NN: np.ndarray, features_NC: np.ndarray) -> np.ndarray:
        """What a kernel linear in these features takes from each; shape (D, P)."""
        pull_C = np.sum(features_NC * (slope_NN @ features_NC), axis=0)
        return pull_C.reshape(self.weight_DP.shape)

    def _add_near(self, slope_NN: np.ndarray) -> None:
        h, near_slope_NN = self.h, slope_NN * self.near_NN
        part_D = np.sum(self.centered_ND * (near_slope_NN @ self.centered_ND), axis=0)
        part_D *= h["share"] * self.importance_D
        self.out["share"] = float(part_D.sum())
        self.by_importance_D += part_D
        if self.sees_state:
            part_DP = self._linear_pull(near_slope_NN, self.meeting_NC)
            part_DP *= h["share_state"] * self.both_DP
            self.out["share_state"] = float(part_DP.sum())
            self.by_importance_D += part_DP.sum(axis=1)
            self.by_weight_DP += part_DP
        self._add_share_length("near_length", near_slope_NN * self.linear_NN)

    def _add_domain(self, slope_NN: np.ndarray, d: int) -> None:
        h, n_domains = self.h, len(self.importance_D)
        pull_NN = slope_NN * self.domain_parts[d]
        pull_NN *= h["domain"] * self.importance_D[d] / n_domains
        total = float(pull_NN.sum())
        self.out["domain"] += total
        self.by_importance_D[d] += total
        ratio_NN = _bent_ratio(self._steps(d), h["domain_share_length"])
        self.out["domain_share_length"] += float(np.sum(pull_NN * ratio_NN))
        if self.sees_state:
            pull_DP = np.zeros_like(self.weight_DP)
            pull_DP[d] = _pull(pull_NN, self.points.state_NDP[:, d]) * self.weight_DP[d]
            self._add_state_length("domain_state_length", pull_DP)

    def _add_all(self, pull_NN: np.ndarray) -> None:
        self.out["all"] = float(pull_NN.sum())
        self._add_share_length("all_share_length", pull_NN)
        if self.sees_state:
            pull_DP = _pull(pull_NN, self.flat_NC).reshape(self.both_DP.shape) * self.both_DP
            part_DP = self._add_state_length("all_state_length", pull_DP)
            self.by_importance_D -= 0.5 * part_DP.sum(axis=1)

    def _add_share_length(self, name: str, pull_NN: np.ndarray) -> None:
        """Add what the mixtures' squared distance contributes to a smooth kernel."""
        part_D = _pull(pull_NN, self.root_ND) * self.importance_D / self.h[name] ** 2
        self.out[name] += float(part_D.sum())
        self.by_importance_D -= 0.5 * part_D

    def _add_state_length(self, name: str, pull_DP: np.ndarray) -> np.ndarray:
        """Add what a state's squared distance contributes, given its pull on each coordinate."""
        part_DP = pull_DP / self.h[name] ** 2
        self.out[name] += float(part_DP.sum())
        self.by_weight_DP -= 0.5 * part_DP
        return part_DP


def _bent(step: np.ndarray, length: float) -> np.ndarray:
    """Matern's correlation, nu = 5/2, at these distances."""
    far = step * (np.sqrt(5) / length)
    correlation = np.exp(-far)
    polynomial = far / 3
    polynomial += 1
    polynomial *= far
    polynomial += 1
    correlation *= polynomial
    return correlation


def _bent_ratio(step: np.ndarray, length: float) -> np.ndarray:
    """Slope of `_bent` by the log of the length, over `_bent` itself."""
    far = step * (np.sqrt(5) / length)
    return far**2 * (1 + far) / (3 + 3 * far + far**2)


def _named(hyper: Mapping[str, float], prefix: str) -> list[str]:
    return [name for name in hyper if name.startswith(prefix)]


def _weights(hyper: Mapping[str, float]) -> np.ndarray:
    """Weights of each domain's covariates, divided by their number; shape (D, P)."""
    weights = [hyper[name] for name in _named(hyper, "weight:")]
    weight_DP = np.reshape(weights, (len(_named(hyper, "importance:")), -1))
    return weight_DP / weight_DP.shape[1]


def _importance(hyper: Mapping[str, float]) -> np.ndarray:
    """How much each domain matters to the task; shape (D,)."""
    return np.array([hyper[name] for name in _named(hyper, "importance:")])


def _squared_distances(features_NC: np.ndarray) -> np.ndarray:
    size_N = np.einsum("nc,nc->n", features_NC, features_NC)
    squared_NN = size_N[:, None] + size_N - 2 * features_NC @ features_NC.T
    np.fill_diagonal(squared_NN, 0.0)
    return np.maximum(squared_NN, 0.0, out=squared_NN)


def _pull(pull_NN: np.ndarray, features_NC: np.ndarray) -> np.ndarray:
    """Sum of pull_ij (f_i - f_j)^2 over pairs, for each column of a symmetric pull; shape (C,)."""
    own_C = pull_NN.sum(axis=1) @ features_NC**2
    return 2 * (own_C - np.sum(features_NC * (pull_NN @ features_NC), axis=0))


def _hyper_names(runs: RunTable, sees_state: bool) -> tuple[str, ...]:
    importance = [f"importance:{domain}" for domain in runs.domains]
    if not sees_state:
        return (*BLIND, *importance)
    weights = [f"weight:{domain}__{name}" for domain in runs.domains for name in runs.covariates]
    return (*PRIORS, *importance, *weights)


def _prior(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Prior means and standard deviations of the logs; shape (H,) each."""
    pairs = [PRIORS.get(name, (1.0, WEIGHT_DEVIATION)) for name in names]
    return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


def negative_log_posterior(
    log_hyper_H: np.ndarray, names: tuple[str, ...], points: _Points, standard_N: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return minus the log of marginal likelihood times prior (no constant), and its gradient.

    Args:
        log_hyper_H: logs of the hyper-parameters; shape (H,).
        names: their names, in that order.
        points: the runs' mixtures, covariates and states.
        standard_N: one task's outcomes with mean 0 and variance 1; shape (N,).
    """
    from scipy.linalg import cho_solve, get_lapack_funcs

    covariance = _Covariance(dict(zip(names, np.exp(log_hyper_H), strict=True)), points)
    cholesky_NN = np.linalg.cholesky(covariance.matrix())
    alpha_N = cho_solve((cholesky_NN, True), standard_N)
    value = 0.5 * float(standard_N @ alpha_N) + float(np.log(np.diag(cholesky_NN)).sum())
    (invert,) = get_lapack_funcs(("potri",), (cholesky_NN,))
    lower_NN = np.tril(invert(cholesky_NN, lower=1)[0])
    inverse_NN = lower_NN + np.tril(lower_NN, -1).T
    gradient = covariance.gradient(0.5 * (inverse_NN - np.outer(alpha_N, alpha_N)))
    mean_H, deviation_H = _prior(names)
    z_H = (log_hyper_H - mean_H) / deviation_H
    gradient_H = np.array([gradient[name] for name in names]) + z_H / deviation_H
    return value + 0.5 * float(z_H @ z_H), gradient_H


def _search_rows(state_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of whole states, at most `SEARCH_RUNS`; of a single state, any of its rows."""
    order_N = rng.permutation(len(state_ids))
    states = np.unique(state_ids)
    if len(states) > 1:
        rank_S = rng.permutation(len(states))
        order_N = np.argsort(rank_S[np.searchsorted(states, state_ids)], kind="stable")
    return np.sort(order_N[:SEARCH_RUNS])


def _starts(names: tuple[str, ...], rng: np.random.Generator, n_restarts: int) -> list[np.ndarray]:
    mean_H, deviation_H = _prior(names)
    first_H = mean_H + np.log([START.get(name, 1.0) for name in names])
    drawn = [mean_H + 0.7 * deviation_H * rng.normal(size=len(names)) for _ in range(n_restarts)]
    return [first_H, *drawn]


def _search(
    names: tuple[str, ...], points: _Points, standard_N: np.ndarray, starts: list[np.ndarray]
) -> dict[str, float]:
    from scipy.optimize import minimize

    mean_H, deviation_H = _prior(names)
    low_H, high_H = mean_H - SEARCH_WIDTH * deviation_H, mean_H + SEARCH_WIDTH * deviation_H
    found = [
        minimize(
            negative_log_posterior,
            np.clip(start_H, low_H, high_H),
            args=(names, points, standard_N),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low_H, high_H, strict=True)),
            options={"maxiter": 60, "ftol": 1e-5},
        )
        for start_H in starts
    ]
    best = min(found, key=lambda result: result.fun)
    return dict(zip(names, np.exp(best.x).tolist(), strict=True))


def _reuse(names: tuple[str, ...], parameters: Mapping, task: str) -> dict[str, float]:
    given = dict(parameters.get("hyper_parameters", {}).get(task, {}))
    if set(given) != set(names):
        odd = sorted(set(given) ^ set(names))
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise EstimationError(
            f"parameters of task {task} must name the hyper-parameters of a fit on these runs, but "
            f"differ in {', '.join(odd[:4])}{more}: they were made for other names, or by another "
            "version; fit without them (in the pipeline: materialise cate_model)."
        )
    return {name: float(given[name]) for name in names}
