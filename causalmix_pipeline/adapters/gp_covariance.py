"""The covariance of the structured Gaussian process over pool state and mixture.

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
the runs show that.
Source: C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning, sections
4.2.1 (Matern) and 5.4.1 (the likelihood's gradient).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: Added to the diagonal of the covariance so that its Cholesky exists, in outcome variances.
JITTER = 1e-6


@dataclass(frozen=True, eq=False)
class Points:
    """Runs as the kernel sees them: s = sqrt(share) (N, D), z (N, D, P), state ids (N,)."""

    root_ND: np.ndarray
    state_NDP: np.ndarray
    state_ids: np.ndarray


class Covariance:
    """Covariance of the runs' outcomes for one setting, and the likelihood's gradient by it."""

    def __init__(self, hyper: Mapping[str, float], points: Points):
        """Take the setting, by name, and the runs."""
        self.h = hyper
        self.points = points
        n_runs, n_domains = points.root_ND.shape
        self.sees_state = "share_state" in hyper
        self.root_ND = points.root_ND
        self.centered_ND = points.root_ND - points.root_ND.mean(axis=0)
        self.importance_D = importance_of(hyper)
        self.same_state_NN = np.equal.outer(points.state_ids, points.state_ids).astype(float)
        if self.sees_state:
            self.weight_DP = weights_of(hyper)
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
        self.out |= zip(named(h, "importance:"), self.by_importance_D.tolist(), strict=True)
        self.out |= zip(named(h, "weight:"), self.by_weight_DP.ravel().tolist(), strict=True)
        return self.out

    def _state_exponent(self, state_NC: np.ndarray, weight: np.ndarray, length: str) -> np.ndarray:
        squared_NN = _squared_distances(state_NC * np.sqrt(weight.ravel()))
        squared_NN *= -0.5 / self.h[length] ** 2
        return squared_NN

    def _steps(self, d: int) -> np.ndarray:
        return np.abs(np.subtract.outer(self.root_ND[:, d], self.root_ND[:, d]))

    def _domain_part(self, d: int) -> np.ndarray:
        part_NN = bent(self._steps(d), self.h["domain_share_length"])
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
        ratio_NN = bent_ratio(self._steps(d), h["domain_share_length"])
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


def bent(step: np.ndarray, length: float) -> np.ndarray:
    """Matern's correlation, nu = 5/2, at these distances."""
    far = step * (np.sqrt(5) / length)
    correlation = np.negative(far)
    np.exp(correlation, out=correlation)
    far += 1.5  # 1 + far + far^2 / 3, in the fewest passes
    far *= far
    far += 0.75
    far /= 3
    correlation *= far
    return correlation


def bent_ratio(step: np.ndarray, length: float) -> np.ndarray:
    """Slope of `bent` by the log of the length, over `bent` itself."""
    far = step * (np.sqrt(5) / length)
    return far**2 * (1 + far) / (3 + 3 * far + far**2)


def named(hyper: Mapping[str, float], prefix: str) -> list[str]:
    """Names of the hyper-parameters that begin with the prefix, in their order."""
    return [name for name in hyper if name.startswith(prefix)]


def weights_of(hyper: Mapping[str, float]) -> np.ndarray:
    """Weights of each domain's covariates, divided by their number; shape (D, P)."""
    weights = [hyper[name] for name in named(hyper, "weight:")]
    weight_DP = np.reshape(weights, (len(named(hyper, "importance:")), -1))
    return weight_DP / weight_DP.shape[1]


def importance_of(hyper: Mapping[str, float]) -> np.ndarray:
    """How much each domain matters to the task; shape (D,)."""
    return np.array([hyper[name] for name in named(hyper, "importance:")])


def _squared_distances(features_NC: np.ndarray) -> np.ndarray:
    size_N = np.einsum("nc,nc->n", features_NC, features_NC)
    squared_NN = size_N[:, None] + size_N - 2 * features_NC @ features_NC.T
    np.fill_diagonal(squared_NN, 0.0)
    return np.maximum(squared_NN, 0.0, out=squared_NN)


def _pull(pull_NN: np.ndarray, features_NC: np.ndarray) -> np.ndarray:
    """Sum of pull_ij (f_i - f_j)^2 over pairs, for each column of a symmetric pull; shape (C,)."""
    own_C = pull_NN.sum(axis=1) @ features_NC**2
    return 2 * (own_C - np.sum(features_NC * (pull_NN @ features_NC), axis=0))
