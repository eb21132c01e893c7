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
        """Find the hyper-parameters, or reuse them, and condition on the runs.

        Args:
            runs: the proxy runs; their order doesn't matter.
            parameters: what `parameters()` returned for an earlier fit; no search then.

        Raises:
            EstimationError: if `check_runs` refuses the runs, or `parameters` were made for other
                covariates.
        """
        sees_state = not self.blind and bool(runs.covariates)
        check_runs(runs, minimum_states=MINIMUM_STATES if sees_state else 1)
        runs = runs.sorted_by_run()
        self._scaler = StateScaler.fit(runs.distinct_states()[1])
        self.dropped_covariates = self._scaler.dropped(runs) if sees_state else ()
        self._sees_state = sees_state and bool(self._scaler.kept_DP.any())
        self._points = _Points(
            np.sqrt(np.clip(runs.mixture_ND, 0, None)), self._scale(runs.state_NDP), runs.state_ids
        )
        self._center_D = self._points.root_ND.mean(axis=0)
        self._outcome_mean_T, deviation_T = runs.outcome_NT.mean(axis=0), runs.outcome_NT.std(axis=0)
        self._outcome_scale_T = np.where(deviation_T > 0, deviation_T, 1.0)
        whitened_NT = (runs.outcome_NT - self._outcome_mean_T) / self._outcome_scale_T
        names = self._names(runs.covariates)
        self._hyper = (
            _search(names, self._points, whitened_NT, self.seed, self.n_restarts)
            if parameters is None
            else _reuse(names, parameters)
        )
        self._condition(whitened_NT)
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the posterior mean of the outcome of each mixture; shape (M, T)."""
        root_MD = np.sqrt(np.clip(np.atleast_2d(mixture_MD), 0, None))
        kernel_MN = self._cross(state_DP, root_MD) + self._state_row(state_DP)
        return self._outcome_mean_T + kernel_MN @ self._alpha_NT * self._outcome_scale_T

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return differences of posterior means and their joint posterior standard errors."""
        from scipy.linalg import solve_triangular

        root_MD = np.sqrt(np.clip(np.vstack([reference_D, mixture_MD]), 0, None))
        kernel_MN = self._cross(state_DP, root_MD)
        difference_MN = kernel_MN[1:] - kernel_MN[0]
        mean_MT = difference_MN @ self._alpha_NT * self._outcome_scale_T
        solved_NM = solve_triangular(self._cholesky_NN, difference_MN.T, lower=True)
        prior_M = self._prior_variance_of_difference(state_DP, root_MD[1:], root_MD[0])
        variance_M = np.clip(prior_M - np.einsum("nm,nm->m", solved_NM, solved_NM), 0, None)
        return Gain(mean_MT, np.sqrt(variance_M)[:, None] * self._error_scale_T)

    def parameters(self) -> dict:
        """Return the hyper-parameters by name, for `fit(runs, parameters=...)`."""
        return {"hyper_parameters": dict(self._hyper)}

    def _names(self, covariates: tuple[str, ...]) -> tuple[str, ...]:
        if not self._sees_state:
            return BLIND
        return (*PRIORS, *(f"weight:{name}" for name in covariates))

    def _scale(self, state: np.ndarray) -> np.ndarray:
        return self._scaler.transform(state)

    def _condition(self, whitened_NT: np.ndarray) -> None:
        from scipy.linalg import cho_solve, solve_triangular

        covariance_NN = _Covariance(self._hyper, self._points).matrix()
        self._cholesky_NN = np.linalg.cholesky(covariance_NN)
        self._alpha_NT = cho_solve((self._cholesky_NN, True), whitened_NT)
        white_NT = solve_triangular(self._cholesky_NN, whitened_NT, lower=True)
        n_runs = len(white_NT)
        scale_T = ((white_NT**2).sum(axis=0) + SCALE_PRIOR_RUNS) / (n_runs + SCALE_PRIOR_RUNS)
        self._error_scale_T = np.sqrt(scale_T) * self._outcome_scale_T
        self.noise_variance_T = self._error_scale_T**2 * self._hyper["noise"]
        size_T = np.sqrt((white_NT**2).sum(axis=0))
        self.task_correlation_TT = white_NT.T @ white_NT / np.outer(size_T, size_T)

    def _cross(self, state_DP: np.ndarray, root_MD: np.ndarray) -> np.ndarray:
        """Covariance of new mixtures at one state with the runs, but for the state's main effect.

        That the state is constant leaves one exponential per pair and domain: 20,000 candidates
        are scored in a fraction of a second.
        """
        h, points = self._hyper, self._points
        root_ND = points.root_ND
        kernel_MN = h["share"] * (root_MD - self._center_D) @ (root_ND - self._center_D).T
        domain_ND, all_N = np.ones(root_ND.shape), np.ones(len(root_ND))
        if self._sees_state:
            weight_P = _weights(h)
            state_DP = self._scale(np.asarray(state_DP, dtype=float))
            meets_ND = (points.state_NDP * state_DP) @ weight_P
            kernel_MN += h["share_state"] * root_MD @ (root_ND * meets_ND).T
            distance_ND = (points.state_NDP - state_DP) ** 2 @ weight_P
            domain_ND = np.exp(-0.5 * distance_ND / h["domain_state_length"] ** 2)
            all_N = np.exp(-0.5 * distance_ND.mean(axis=1) / h["all_state_length"] ** 2)
        squared_MN = np.zeros_like(kernel_MN)
        for d in range(root_MD.shape[1]):
            step_MN = np.subtract.outer(root_MD[:, d], root_ND[:, d])
            step_MN *= step_MN
            squared_MN += step_MN
            step_MN *= -0.5 / h["domain_share_length"] ** 2
            np.exp(step_MN, out=step_MN)
            step_MN *= domain_ND[:, d] * (h["domain"] / root_MD.shape[1])
            kernel_MN += step_MN
        squared_MN *= -0.5 / h["all_share_length"] ** 2
        np.exp(squared_MN, out=squared_MN)
        squared_MN *= all_N * h["all"]
        kernel_MN += squared_MN
        return kernel_MN

    def _state_row(self, state_DP: np.ndarray) -> np.ndarray | float:
        """Covariance of the state's main effect with each run's; shape (N,)."""
        if not self._sees_state:
            return 0.0
        h, weight_P = self._hyper, _weights(self._hyper)
        state_DP = self._scale(np.asarray(state_DP, dtype=float))
        linear_N = ((self._points.state_NDP * state_DP) @ weight_P).mean(axis=1)
        distance_N = ((self._points.state_NDP - state_DP) ** 2 @ weight_P).mean(axis=1)
        smooth_N = np.exp(-0.5 * distance_N / h["state_length"] ** 2)
        return h["state_linear"] * linear_N + h["state_smooth"] * smooth_N

    def _prior_variance_of_difference(
        self, state_DP: np.ndarray, root_MD: np.ndarray, root_D: np.ndarray
    ) -> np.ndarray:
        h = self._hyper
        squared_MD = (root_MD - root_D) ** 2
        variance_M = h["share"] * squared_MD.sum(axis=1)
        if self._sees_state:
            size_D = self._scale(np.asarray(state_DP, dtype=float)) ** 2 @ _weights(h)
            variance_M += h["share_state"] * squared_MD @ size_D
        own_MD = 1 - np.exp(-0.5 * squared_MD / h["domain_share_length"] ** 2)
        all_M = 1 - np.exp(-0.5 * squared_MD.sum(axis=1) / h["all_share_length"] ** 2)
        return variance_M + 2 * h["domain"] * own_MD.mean(axis=1) + 2 * h["all"] * all_M


class _Covariance:
    """Covariance of the runs' outcomes for one setting, and the likelihood's gradient by it."""

    def __init__(self, hyper: Mapping[str, float], points: _Points):
        self.h = hyper
        self.points = points
        n_runs, n_domains = points.root_ND.shape
        self.sees_state = "share_state" in hyper
        self.root_ND = points.root_ND
        self.centered_ND = points.root_ND - points.root_ND.mean(axis=0)
        self.same_state_NN = np.equal.outer(points.state_ids, points.state_ids).astype(float)
        if self.sees_state:
            self.weight_P = _weights(hyper)
            self.meeting_NDP = points.root_ND[:, :, None] * points.state_NDP
            self.flat_NC = (points.state_NDP / np.sqrt(n_domains)).reshape(n_runs, -1)
            self.weight_C = np.tile(self.weight_P, n_domains)

    def matrix(self) -> np.ndarray:
        """Return the covariance with noise; shape (N, N). Keeps the parts for `gradient`."""
        h, n_domains = self.h, self.root_ND.shape[1]
        self.domain_parts = [
            self._smooth(self.root_ND[:, d : d + 1], "domain_share_length", d)
            for d in range(n_domains)
        ]
        self.all_NN = self._smooth(self.root_ND, "all_share_length", None)
        covariance_NN = h["share"] * self.centered_ND @ self.centered_ND.T
        for part_NN in self.domain_parts:
            covariance_NN += h["domain"] / n_domains * part_NN
        covariance_NN += h["all"] * self.all_NN + h["state_id"] * self.same_state_NN
        if self.sees_state:
            meeting_NC = self.meeting_NDP.reshape(len(self.root_ND), -1)
            covariance_NN += h["share_state"] * (meeting_NC * self.weight_C) @ meeting_NC.T
            covariance_NN += h["state_linear"] * (self.flat_NC * self.weight_C) @ self.flat_NC.T
            features_NC = self.flat_NC * np.sqrt(self.weight_C) / h["state_length"]
            self.state_NN = np.exp(-0.5 * _squared_distances(features_NC))
            covariance_NN += h["state_smooth"] * self.state_NN
        covariance_NN[np.diag_indices_from(covariance_NN)] += h["noise"] + JITTER
        return covariance_NN

    def gradient(self, slope_NN: np.ndarray) -> dict[str, float]:
        """Return d/d log of each hyper-parameter of a function whose slope by K is `slope_NN`."""
        h, n_domains = self.h, self.root_ND.shape[1]
        out = {name: 0.0 for name in h}
        out["share"] = h["share"] * float(
            np.sum(self.centered_ND * (slope_NN @ self.centered_ND))
        )
        for d, part_NN in enumerate(self.domain_parts):
            pull_NN = slope_NN * part_NN * (h["domain"] / n_domains)
            self._add_smooth(out, pull_NN, "domain", self.root_ND[:, d : d + 1], d)
        self._add_smooth(out, slope_NN * self.all_NN * h["all"], "all", self.root_ND, None)
        out["state_id"] = h["state_id"] * float(np.sum(slope_NN * self.same_state_NN))
        out["noise"] = h["noise"] * float(np.trace(slope_NN))
        if self.sees_state:
            self._add_linear(out, slope_NN, "share_state", self.meeting_NDP)
            self._add_linear(out, slope_NN, "state_linear", self.flat_NC.reshape(
                self.meeting_NDP.shape
            ))
            pull_NN = slope_NN * self.state_NN * h["state_smooth"]
            out["state_smooth"] = float(pull_NN.sum())
            self._add_state_length(out, pull_NN, "state_length", None)
        return out

    def _smooth(self, root_ND: np.ndarray, length: str, d: int | None) -> np.ndarray:
        parts = [root_ND / self.h[length]]
        if self.sees_state:
            state_length = self.h["all_state_length" if d is None else "domain_state_length"]
            state_NC = (
                self.flat_NC * np.sqrt(self.weight_C)
                if d is None
                else self.points.state_NDP[:, d] * np.sqrt(self.weight_P)
            )
            parts.append(state_NC / state_length)
        return np.exp(-0.5 * _squared_distances(np.hstack(parts)))

    def _add_smooth(
        self, out: dict, pull_NN: np.ndarray, name: str, root_ND: np.ndarray, d: int | None
    ) -> None:
        out[name] += float(pull_NN.sum())
        share_length = f"{name}_share_length"
        out[share_length] += _pull(pull_NN, root_ND).sum() / self.h[share_length] ** 2
        if self.sees_state:
            self._add_state_length(out, pull_NN, f"{name}_state_length", d)

    def _add_state_length(self, out: dict, pull_NN: np.ndarray, name: str, d: int | None) -> None:
        n_covariates = len(self.weight_P)
        pull_P = (
            _pull(pull_NN, self.flat_NC).reshape(-1, n_covariates).sum(axis=0)
            if d is None
            else _pull(pull_NN, self.points.state_NDP[:, d])
        )
        part_P = self.weight_P * pull_P / self.h[name] ** 2
        out[name] += part_P.sum()
        for key, part in zip(_weight_names(self.h), part_P, strict=True):
            out[key] -= 0.5 * part

    def _add_linear(
        self, out: dict, slope_NN: np.ndarray, name: str, features_NDP: np.ndarray
    ) -> None:
        flat_NC = features_NDP.reshape(len(slope_NN), -1)
        part_C = np.sum(flat_NC * (slope_NN @ flat_NC), axis=0)
        part_P = self.h[name] * self.weight_P * part_C.reshape(-1, len(self.weight_P)).sum(axis=0)
        out[name] += part_P.sum()
        for key, part in zip(_weight_names(self.h), part_P, strict=True):
            out[key] += part


def _weight_names(hyper: Mapping[str, float]) -> list[str]:
    return [name for name in hyper if name.startswith("weight:")]


def _weights(hyper: Mapping[str, float]) -> np.ndarray:
    """Weights of the covariates, divided by their number; shape (P,)."""
    names = _weight_names(hyper)
    return np.array([hyper[name] for name in names]) / len(names)


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
    pairs = [PRIORS.get(name, (1.0, WEIGHT_DEVIATION)) for name in names]
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
    names: tuple[str, ...], points: _Points, whitened_NT: np.ndarray, seed: int, n_restarts: int
) -> dict[str, float]:
    from scipy.optimize import minimize

    mean_H, deviation_H = _prior(names)
    rng = np.random.default_rng(seed)
    starts = [mean_H]
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
