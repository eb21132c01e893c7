"""A Gaussian process over pool state and mixture whose kernel knows the structure; its ridge too.

With s = sqrt(share) and z = standardised covariates, the prior covariance of two runs' outcomes is

    share         s . s'                          a domain helps, whatever its state
    share_state   sum_d s_d s'_d  z_d . z'_d      how much depends on the domain's own state
    domain        mean_d smooth(s_d, z_d)         each domain's own curve
    all           smooth(s, z)                    anything else
    state_linear, state_smooth                    main effect of the state
    state_id      same state                      what the covariates miss; cancels in gains
    noise         same run                        the seed

Hyper-parameters are shared by the tasks and found by maximising the marginal likelihood with weak
priors. Source: C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning,
sections 2.2 (posterior) and 5.4.1 (likelihood and its gradient).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import MINIMUM_STATES, Gain, StateScaler, check_runs
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
    "domain_share_length": (0.7, 0.7),
    "domain_state_length": (3.0, 0.7),
    "all_share_length": (0.8, 0.7),
    "all_state_length": (3.0, 0.7),
    "state_length": (3.0, 0.7),
}

#: Hyper-parameters that exist without covariates.
BLIND = ("share", "domain", "all", "state_id", "noise", "domain_share_length", "all_share_length")

#: Prior standard deviation of the log weight of a covariate (median 1).
WEIGHT_DEVIATION = 1.0

#: How many prior standard deviations a hyper-parameter may move.
SEARCH_WIDTH = 3.0

#: Added to the diagonal of the covariance so that its Cholesky exists, in outcome variances.
JITTER = 1e-6

#: Observations that the prior guess 1 of a task's scale counts for.
SCALE_PRIOR_RUNS = 10.0


import os
ARD=int(os.environ.get("ARD",0));PER_TASK=int(os.environ.get("PT",0));WARM=int(os.environ.get("WARM",0));IMP=float(os.environ.get("IMP",1))
@dataclass(frozen=True, eq=False)
class _Points:
    """Runs as the kernel sees them: s = sqrt(share) (N, D), z (N, D, P), state ids (N,)."""

    root_ND: np.ndarray
    state_NDP: np.ndarray
    state_ids: np.ndarray


class ResponseSurface:
    """The structured Gaussian process of METHOD 4 B, behind `core.effects.EffectEstimator`.

    Attributes:
        noise_variance_T: variance of one run's outcome around its mean; shape (T,).
        task_correlation_TT: correlation of the tasks' whitened outcomes; the posterior errors of
            a gain are correlated alike, since the tasks share one kernel.
        dropped_covariates: names of covariates that never vary among the runs' states.
    """

    def __init__(self, *, blind: bool = False, seed: int = 0, n_restarts: int = 1):
        """Set up an unfitted surface.

        Args:
            blind: whether to ignore covariates even where there are some.
            seed: draws the starts of the search after the first, which is the prior's median.
            n_restarts: further starts of the search, 0 or more.
        """
        self.name = "response_surface_blind" if blind else "response_surface"
        self.blind = blind
        self.seed = seed
        self.n_restarts = n_restarts
        self.task_correlation_TT = np.ones((0, 0))
        self.dropped_covariates: tuple[str, ...] = ()

    def fit(self, runs: RunTable, parameters: Mapping | None = None) -> ResponseSurface:
        check_runs(runs)
        runs = runs.sorted_by_run()
        self._scaler = StateScaler.fit(runs.distinct_states()[1])
        self._sees_state = not self.blind and bool(self._scaler.kept_DP.any())
        points = _Points(
            np.sqrt(np.clip(runs.mixture_ND, 0, None)),
            self._scaler.transform(runs.state_NDP),
            runs.state_ids,
        )
        self._outcome_mean_T, deviation_T = runs.outcome_NT.mean(axis=0), runs.outcome_NT.std(axis=0)
        self._outcome_scale_T = np.where(deviation_T > 0, deviation_T, 1.0)
        whitened_NT = (runs.outcome_NT - self._outcome_mean_T) / self._outcome_scale_T
        names = BLIND if not self._sees_state else (*PRIORS, *(f"weight:{n}" for n in runs.covariates))
        if ARD: names = (*names, *(f"importance:{n}" for n in runs.domains))
        T=len(runs.tasks)
        groups = [[t] for t in range(T)] if PER_TASK else [list(range(T))]
        shared=None
        if WARM and PER_TASK:
            nm=[n for n in names if not n.startswith("importance")] if WARM==1 else names
            shared = _search(tuple(nm), points, whitened_NT, self.seed, 0)
        self._groups=[]
        for g in groups:
            h=_search(names, points, whitened_NT[:,g], self.seed, self.n_restarts, shared)
            self._groups.append((g,_Posterior(h,points,whitened_NT[:,g])))
        self.noise_variance_T=np.concatenate([p.scale_T**2*p.h["noise"] for g,p in self._groups])*self._outcome_scale_T**2
        w=np.hstack([p.white_NT for g,p in self._groups]); w/=np.sqrt((w**2).sum(0)); self.task_correlation_TT=w.T@w
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        root_MD = np.sqrt(np.clip(np.atleast_2d(mixture_MD), 0, None))
        z=self._scaler.transform(np.asarray(state_DP, dtype=float))
        return self._outcome_mean_T + np.hstack([p.predict(z,root_MD) for _,p in self._groups])* self._outcome_scale_T

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        root_MD = np.sqrt(np.clip(np.vstack([reference_D, mixture_MD]), 0, None))
        z=self._scaler.transform(np.asarray(state_DP, dtype=float))
        parts=[p.gain(z,root_MD) for _,p in self._groups]
        return Gain(np.hstack([m for m,_ in parts])*self._outcome_scale_T,np.hstack([m for _,m in parts])*self._outcome_scale_T)

    def parameters(self) -> dict:
        return {"hyper_parameters": [p.h for _,p in self._groups]}


class _Posterior:
    """The process for one setting of the hyper-parameters, conditioned on the runs."""

    def __init__(self, hyper: Mapping[str, float], points: _Points, whitened_NT: np.ndarray):
        from scipy.linalg import cho_solve, solve_triangular

        self.h, self.points = hyper, points
        self.sees_state = "share_state" in hyper
        self.importance_D = _importance(hyper, points.root_ND.shape[1])
        self.center_D = points.root_ND.mean(axis=0)
        self.cholesky_NN = np.linalg.cholesky(_Covariance(hyper, points).matrix())
        self.alpha_NT = cho_solve((self.cholesky_NN, True), whitened_NT)
        self.white_NT = solve_triangular(self.cholesky_NN, whitened_NT, lower=True)
        self.scale_T = np.sqrt(
            ((self.white_NT**2).sum(axis=0) + SCALE_PRIOR_RUNS)
            / (len(self.white_NT) + SCALE_PRIOR_RUNS)
        )

    def predict(self, state_DP: np.ndarray, root_MD: np.ndarray) -> np.ndarray:
        kernel_MN = self._cross(state_DP, root_MD) + self._state_row(state_DP)
        return kernel_MN @ self.alpha_NT

    def gain(self, state_DP: np.ndarray, root_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of the gain of rows 1.. over row 0; shapes (M, T)."""
        from scipy.linalg import solve_triangular

        kernel_MN = self._cross(state_DP, root_MD)
        difference_MN = kernel_MN[1:] - kernel_MN[0]
        solved_NM = solve_triangular(self.cholesky_NN, difference_MN.T, lower=True)
        prior_M = self._prior_variance_of_difference(state_DP, root_MD[1:], root_MD[0])
        variance_M = np.clip(prior_M - np.einsum("nm,nm->m", solved_NM, solved_NM), 0, None)
        return difference_MN @ self.alpha_NT, np.sqrt(variance_M)[:, None] * self.scale_T

    def _cross(self, state_DP: np.ndarray, root_MD: np.ndarray) -> np.ndarray:
        """Covariance of new mixtures at one state with the runs, but for the state's main effect.

        That the state is constant leaves one exponential per pair and domain: 20,000 candidates
        are scored in a fraction of a second.
        """
        h, points = self.h, self.points
        root_ND, n_domains = points.root_ND, points.root_ND.shape[1]
        step_MD = (root_MD - self.center_D) * self.importance_D
        kernel_MN = h["share"] * step_MD @ (root_ND - self.center_D).T
        domain_ND, all_N = np.ones(root_ND.shape), np.ones(len(root_ND))
        if self.sees_state:
            weight_P = _weights(h)
            meets_ND = (points.state_NDP * state_DP) @ weight_P * self.importance_D
            kernel_MN += h["share_state"] * root_MD @ (root_ND * meets_ND).T
            distance_ND = (points.state_NDP - state_DP) ** 2 @ weight_P
            domain_ND = np.exp(-0.5 * distance_ND / h["domain_state_length"] ** 2)
            distance_N = (distance_ND * self.importance_D).mean(axis=1)
            all_N = np.exp(-0.5 * distance_N / h["all_state_length"] ** 2)
        squared_MN = np.zeros_like(kernel_MN)
        for d, importance in enumerate(self.importance_D):
            step_MN = np.subtract.outer(root_MD[:, d], root_ND[:, d])
            step_MN *= step_MN
            squared_MN += importance * step_MN
            step_MN *= -0.5 / h["domain_share_length"] ** 2
            np.exp(step_MN, out=step_MN)
            step_MN *= domain_ND[:, d] * (h["domain"] * importance / n_domains)
            kernel_MN += step_MN
        squared_MN *= -0.5 / h["all_share_length"] ** 2
        np.exp(squared_MN, out=squared_MN)
        squared_MN *= all_N * h["all"]
        kernel_MN += squared_MN
        return kernel_MN

    def _state_row(self, state_DP: np.ndarray) -> np.ndarray | float:
        """Covariance of the state's main effect with each run's; shape (N,)."""
        if not self.sees_state:
            return 0.0
        h, weight_P = self.h, _weights(self.h)
        linear_N = ((self.points.state_NDP * state_DP) @ weight_P).mean(axis=1)
        distance_N = ((self.points.state_NDP - state_DP) ** 2 @ weight_P).mean(axis=1)
        smooth_N = np.exp(-0.5 * distance_N / h["state_length"] ** 2)
        return h["state_linear"] * linear_N + h["state_smooth"] * smooth_N

    def _prior_variance_of_difference(
        self, state_DP: np.ndarray, root_MD: np.ndarray, root_D: np.ndarray
    ) -> np.ndarray:
        h = self.h
        squared_MD = (root_MD - root_D) ** 2
        variance_M = h["share"] * squared_MD @ self.importance_D
        if self.sees_state:
            size_D = state_DP**2 @ _weights(h) * self.importance_D
            variance_M += h["share_state"] * squared_MD @ size_D
        own_MD = 1 - np.exp(-0.5 * squared_MD / h["domain_share_length"] ** 2)
        distance_M = squared_MD @ self.importance_D
        all_M = 1 - np.exp(-0.5 * distance_M / h["all_share_length"] ** 2)
        domain_M = own_MD @ self.importance_D / len(self.importance_D)
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
        self.importance_D = _importance(hyper, n_domains)
        self.same_state_NN = np.equal.outer(points.state_ids, points.state_ids).astype(float)
        if self.sees_state:
            self.weight_P = _weights(hyper)
            self.meeting_NDP = points.root_ND[:, :, None] * points.state_NDP
            self.flat_NC = (points.state_NDP / np.sqrt(n_domains)).reshape(n_runs, -1)
            self.weight_C = np.tile(self.weight_P, n_domains)
            self.both_C = np.outer(self.importance_D, self.weight_P).ravel()

    def matrix(self) -> np.ndarray:
        """Return the covariance with noise; shape (N, N). Keeps the parts for `gradient`."""
        h, n_domains = self.h, self.root_ND.shape[1]
        self.domain_parts = [
            self._smooth(self.root_ND[:, d : d + 1], "domain_share_length", d)
            for d in range(n_domains)
        ]
        self.all_NN = self._smooth(self.root_ND, "all_share_length", None)
        covariance_NN = h["share"] * (self.centered_ND * self.importance_D) @ self.centered_ND.T
        for part_NN, importance in zip(self.domain_parts, self.importance_D, strict=True):
            covariance_NN += h["domain"] * importance / n_domains * part_NN
        covariance_NN += h["all"] * self.all_NN + h["state_id"] * self.same_state_NN
        if self.sees_state:
            meeting_NC = self.meeting_NDP.reshape(len(self.root_ND), -1)
            covariance_NN += h["share_state"] * (meeting_NC * self.both_C) @ meeting_NC.T
            covariance_NN += h["state_linear"] * (self.flat_NC * self.weight_C) @ self.flat_NC.T
            features_NC = self.flat_NC * np.sqrt(self.weight_C) / h["state_length"]
            self.state_NN = np.exp(-0.5 * _squared_distances(features_NC))
            covariance_NN += h["state_smooth"] * self.state_NN
        covariance_NN[np.diag_indices_from(covariance_NN)] += h["noise"] + JITTER
        return covariance_NN

    def gradient(self, slope_NN: np.ndarray) -> dict[str, float]:
        """Return d/d log of each hyper-parameter of a function whose slope by K is `slope_NN`."""
        h, n_domains = self.h, self.root_ND.shape[1]
        self.out = {name: 0.0 for name in h}
        part_D = np.sum(self.centered_ND * (slope_NN @ self.centered_ND), axis=0)
        self._add_linear("share", importance_D=part_D * self.importance_D)
        for d, part_NN in enumerate(self.domain_parts):
            pull_NN = slope_NN * part_NN * (h["domain"] * self.importance_D[d] / n_domains)
            self._add_domain(pull_NN, d)
        self._add_all(slope_NN * self.all_NN * h["all"])
        self.out["state_id"] = h["state_id"] * float(np.sum(slope_NN * self.same_state_NN))
        self.out["noise"] = h["noise"] * float(np.trace(slope_NN))
        if self.sees_state:
            meeting_NC = self.meeting_NDP.reshape(len(slope_NN), -1)
            part_C = np.sum(meeting_NC * (slope_NN @ meeting_NC), axis=0) * self.both_C
            part_DP = part_C.reshape(n_domains, -1)
            self._add_linear(
                "share_state", importance_D=part_DP.sum(axis=1), weight_P=part_DP.sum(axis=0)
            )
            part_C = np.sum(self.flat_NC * (slope_NN @ self.flat_NC), axis=0) * self.weight_C
            self._add_linear("state_linear", weight_P=part_C.reshape(n_domains, -1).sum(axis=0))
            pull_NN = slope_NN * self.state_NN * h["state_smooth"]
            self.out["state_smooth"] = float(pull_NN.sum())
            pull_C = _pull(pull_NN, self.flat_NC) * self.weight_C
            self._add_length("state_length", pull_C.reshape(n_domains, -1), weight_only=True)
        return self.out

    def _smooth(self, root_ND: np.ndarray, length: str, d: int | None) -> np.ndarray:
        if d is None:
            parts = [root_ND * np.sqrt(self.importance_D) / self.h[length]]
        else:
            parts = [root_ND / self.h[length]]
        if self.sees_state:
            state_length = self.h["all_state_length" if d is None else "domain_state_length"]
            state_NC = (
                self.flat_NC * np.sqrt(self.both_C)
                if d is None
                else self.points.state_NDP[:, d] * np.sqrt(self.weight_P)
            )
            parts.append(state_NC / state_length)
        return np.exp(-0.5 * _squared_distances(np.hstack(parts)))

    def _add_linear(
        self,
        name: str,
        importance_D: np.ndarray | None = None,
        weight_P: np.ndarray | None = None,
    ) -> None:
        """Add what a kernel linear in importances and weights contributes; before `h[name]`."""
        either = importance_D if importance_D is not None else weight_P
        self.out[name] += self.h[name] * float(np.sum(either))
        if importance_D is not None:
            self._add_to("importance:", self.h[name] * importance_D)
        if weight_P is not None:
            self._add_to("weight:", self.h[name] * weight_P)

    def _add_domain(self, pull_NN: np.ndarray, d: int) -> None:
        total = float(pull_NN.sum())
        self.out["domain"] += total
        step_D = np.zeros(self.root_ND.shape[1])
        step_D[d] = total
        self._add_to("importance:", step_D)
        pull = _pull(pull_NN, self.root_ND[:, d : d + 1])[0]
        self.out["domain_share_length"] += pull / self.h["domain_share_length"] ** 2
        if self.sees_state:
            pull_P = _pull(pull_NN, self.points.state_NDP[:, d]) * self.weight_P
            self._add_length("domain_state_length", pull_P[None], weight_only=True)

    def _add_all(self, pull_NN: np.ndarray) -> None:
        self.out["all"] += float(pull_NN.sum())
        pull_D = _pull(pull_NN, self.root_ND) * self.importance_D
        length = self.h["all_share_length"]
        self.out["all_share_length"] += float(pull_D.sum()) / length**2
        self._add_to("importance:", -0.5 * pull_D / length**2)
        if self.sees_state:
            pull_C = _pull(pull_NN, self.flat_NC) * self.both_C
            self._add_length("all_state_length", pull_C.reshape(len(pull_D), -1))

    def _add_length(self, name: str, pull_DP: np.ndarray, *, weight_only: bool = False) -> None:
        """Add what a state's squared distance contributes, given its pull on each coordinate."""
        part_DP = pull_DP / self.h[name] ** 2
        self.out[name] += float(part_DP.sum())
        self._add_to("weight:", -0.5 * part_DP.sum(axis=0))
        if not weight_only:
            self._add_to("importance:", -0.5 * part_DP.sum(axis=1))

    def _add_to(self, prefix: str, parts: np.ndarray) -> None:
        for name, part in zip(_named(self.h, prefix), parts, strict=False):
            self.out[name] += float(part)


def _named(hyper: Mapping[str, float], prefix: str) -> list[str]:
    return [name for name in hyper if name.startswith(prefix)]


def _weights(hyper: Mapping[str, float]) -> np.ndarray:
    """Weights of the covariates, divided by their number; shape (P,)."""
    names = _named(hyper, "weight:")
    return np.array([hyper[name] for name in names]) / len(names)


def _importance(hyper: Mapping[str, float], n_domains: int) -> np.ndarray:
    """How much each domain matters to the task, 1 where it isn't fitted; shape (D,)."""
    names = _named(hyper, "importance:")
    return np.array([hyper[name] for name in names]) if names else np.ones(n_domains)


def _squared_distances(features_NC: np.ndarray) -> np.ndarray:
    size_N = np.einsum("nc,nc->n", features_NC, features_NC)
    squared_NN = size_N[:, None] + size_N - 2 * features_NC @ features_NC.T
    np.fill_diagonal(squared_NN, 0.0)
    return np.maximum(squared_NN, 0.0, out=squared_NN)


def _pull(pull_NN: np.ndarray, features_NC: np.ndarray) -> np.ndarray:
    """Sum of pull_ij (f_i - f_j)^2 over pairs, for each column of a symmetric pull; shape (C,)."""
    own_C = pull_NN.sum(axis=1) @ features_NC**2
    return 2 * (own_C - np.sum(features_NC * (pull_NN @ features_NC), axis=0))


def _prior(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Prior means and standard deviations of the logs; shape (H,) each."""
    pairs = [PRIORS.get(name, (1.0, WEIGHT_DEVIATION if name[0]=="w" else IMP)) for name in names]
    return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


def negative_log_posterior(
    log_hyper_H: np.ndarray, names: tuple[str, ...], points: _Points, whitened_NT: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return minus the log of marginal likelihood times prior, and its gradient.

    Args:
        log_hyper_H: logs of the hyper-parameters; shape (H,).
        names: their names, in that order.
        points: the runs' mixtures, covariates and states.
        whitened_NT: outcomes with mean 0 and variance 1 per task; shape (N, T).
    """
    from scipy.linalg import cho_solve
    from scipy.linalg.lapack import dpotri

    covariance = _Covariance(dict(zip(names, np.exp(log_hyper_H), strict=True)), points)
    cholesky_NN = np.linalg.cholesky(covariance.matrix())
    alpha_NT = cho_solve((cholesky_NN, True), whitened_NT)
    n_tasks = whitened_NT.shape[1]
    value = 0.5 * float(np.sum(whitened_NT * alpha_NT))
    value += n_tasks * float(np.log(np.diag(cholesky_NN)).sum())
    lower_NN = np.tril(dpotri(cholesky_NN, lower=1)[0])
    inverse_NN = lower_NN + np.tril(lower_NN, -1).T
    slope_NN = 0.5 * (n_tasks * inverse_NN - alpha_NT @ alpha_NT.T)
    gradient = covariance.gradient(slope_NN)
    mean_H, deviation_H = _prior(names)
    z_H = (log_hyper_H - mean_H) / deviation_H
    gradient_H = np.array([gradient[name] for name in names]) + z_H / deviation_H
    return value + 0.5 * float(z_H @ z_H), gradient_H


def _search(
    names: tuple[str, ...], points: _Points, whitened_NT: np.ndarray, seed: int, n_restarts: int, warm=None
) -> dict[str, float]:
    from scipy.optimize import minimize

    mean_H, deviation_H = _prior(names)
    rng = np.random.default_rng(seed)
    starts = [mean_H]
    if warm is not None: starts=[np.array([np.log(warm[n]) if n in warm else 0.0 for n in names])]
    starts += [mean_H + deviation_H * rng.normal(0, 0.7, len(names)) for _ in range(n_restarts)]
    reach_H = SEARCH_WIDTH * deviation_H
    bounds = list(zip(mean_H - reach_H, mean_H + reach_H, strict=True))
    found = [
        minimize(
            negative_log_posterior,
            np.clip(start, mean_H - reach_H, mean_H + reach_H),
            args=(names, points, whitened_NT),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 80, "ftol": 1e-6},
        )
        for start in starts
    ]
    best = min(found, key=lambda result: result.fun)
    return dict(zip(names, np.exp(best.x).tolist(), strict=True))


def _reuse(names: tuple[str, ...], parameters: Mapping) -> dict[str, float]:
    given = dict(parameters.get("hyper_parameters", {}))
    if set(given) != set(names):
        odd = ", ".join(sorted(set(given) ^ set(names)))
        raise EstimationError(
            "parameters must name the same hyper-parameters as a fit on these runs, but differ in "
            f"{odd}: they were made for other covariates; fit without them."
        )
    return {name: float(given[name]) for name in names}
