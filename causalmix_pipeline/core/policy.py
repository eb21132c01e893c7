"""Policies: from an effect estimator and a pool state to a mixture.

`optimum` maximises the lower confidence bound of the weighted gain inside the constraints.
`search` is the paper's: score many Dirichlet candidates and average the best.
Source of `search`: arXiv 2607.01104, policy extraction (CausalMix-S).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.effects import EffectEstimator
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import (
    check_mixture,
    dirichlet_design,
    kl_divergence,
    project_to_box,
    shrink_into_trust_region,
)

#: Candidates of the first, global stage of `optimum`.
N_CANDIDATES = 4096
#: Mixtures carried on by the local stage, and its rounds; the step shrinks to .6 in each.
N_STARTS = 16
N_ROUNDS = 12
#: Candidates and averaged best of `search` (arXiv 2607.01104).
SEARCH_CANDIDATES = 100_000
SEARCH_BEST = 100
#: A constraint binds when its slack is below this share or divergence.
BINDING_SLACK = 1e-3


@dataclass(frozen=True, eq=False)
class Constraints:
    """What a recommended mixture must respect.

    Attributes:
        reference_D: the mixture that gains and the trust region are measured from.
        lower_D: least share of each domain.
        upper_D: most share of each domain.
        trust_radius: largest KL(mixture || reference) in nats; None for no trust region.
        budget_tokens: tokens of the training run; None if availability doesn't matter.
        available_D: tokens that each domain has.
        max_epochs: how often a domain may be read in the training run.
    """

    reference_D: np.ndarray
    lower_D: np.ndarray
    upper_D: np.ndarray
    trust_radius: float | None = None
    budget_tokens: float | None = None
    available_D: np.ndarray | None = None
    max_epochs: float = 4.0

    @classmethod
    def simplex_only(cls, reference_D: np.ndarray) -> Constraints:
        """No constraint but shares >= 0 that sum to 1."""
        n_domains = len(reference_D)
        return cls(reference_D, np.zeros(n_domains), np.ones(n_domains))

    def token_limit_D(self) -> np.ndarray:
        """Share of each domain at which its tokens are used up; infinite without a budget."""
        if self.budget_tokens is None or self.available_D is None:
            return np.full(len(self.reference_D), np.inf)
        return self.max_epochs * np.asarray(self.available_D, float) / self.budget_tokens

    def box(self, domains: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Least and most shares, token availability included.

        A domain without share in the reference gets none inside a trust region: any share would
        be infinitely far.

        Raises:
            ConfigError: if no mixture satisfies them.
        """
        upper_D = np.minimum(np.minimum(self.upper_D, self.token_limit_D()), 1.0)
        if self.trust_radius is not None:
            upper_D = np.where(np.asarray(self.reference_D) > 0, upper_D, 0.0)
        for domain, low, high in zip(domains, self.lower_D, upper_D, strict=True):
            if low > high:
                raise ConfigError(
                    f"policy.least_share of {domain!r} is {low:.4g}, above the most it can have "
                    f"({high:.4g}, from policy.most_share, its tokens, and 0 without a share in "
                    "the reference of a trust region). Lower least_share, or raise max_epochs."
                )
        if upper_D.sum() < 1 - 1e-9:
            raise ConfigError(
                f"policy: the most shares of all domains sum to {upper_D.sum():.4g}, below 1, so "
                f"no mixture can fill budget_tokens. Lower budget_tokens to at most "
                f"{upper_D.sum():.4g} of it, or raise max_epochs ({self.max_epochs:g}) or "
                "most_share."
            )
        if self.lower_D.sum() > 1 + 1e-9:
            raise ConfigError(
                f"policy.least_share sums to {self.lower_D.sum():.4g} over the domains; it must "
                "be at most 1."
            )
        return np.asarray(self.lower_D, float), upper_D

    def project(self, mixture: np.ndarray, domains: Sequence[str]) -> np.ndarray:
        """Bring mixtures into the box and the trust region.

        Raises:
            ConfigError: if the box and the trust region don't meet.
        """
        lower_D, upper_D = self.box(domains)
        boxed = project_to_box(mixture, lower_D, upper_D)
        if self.trust_radius is None:
            return boxed
        center_D = project_to_box(self.reference_D, lower_D, upper_D)
        distance = float(kl_divergence(center_D, self.reference_D))
        if distance > self.trust_radius:
            raise ConfigError(
                f"policy.trust_radius is {self.trust_radius:g} nats, but the nearest mixture that "
                f"the shares and tokens allow is {distance:.3g} nats from the reference. Raise "
                "trust_radius, or loosen least_share, most_share or max_epochs."
            )
        return shrink_into_trust_region(boxed, center_D, self.reference_D, self.trust_radius)

    def slack(self, mixture_D: np.ndarray, domains: Sequence[str]) -> pl.DataFrame:
        """How far each constraint is from binding.

        Returns:
            Columns `constraint`, `value`, `limit`, `slack`, `binds`; shares, or nats for the
            trust region.
        """
        rows: list[tuple[str, float, float, float]] = []
        limits_D = self.token_limit_D()
        for d, domain in enumerate(domains):
            share = float(mixture_D[d])
            if self.lower_D[d] > 0:
                low = float(self.lower_D[d])
                rows.append((f"{domain}: least share", share, low, share - low))
            if self.upper_D[d] < 1:
                high = float(self.upper_D[d])
                rows.append((f"{domain}: most share", share, high, high - share))
            if limits_D[d] < 1:
                high = float(limits_D[d])
                rows.append((f"{domain}: tokens available", share, high, high - share))
        if self.trust_radius is not None:
            distance = float(kl_divergence(mixture_D, self.reference_D))
            rows.append(("trust region", distance, self.trust_radius, self.trust_radius - distance))
        schema = {"constraint": pl.String, "value": pl.Float64, "limit": pl.Float64,
                  "slack": pl.Float64}  # fmt: skip
        frame = pl.DataFrame(rows, schema=schema, orient="row")
        return frame.with_columns(binds=pl.col("slack") < BINDING_SLACK)


@dataclass(frozen=True, eq=False)
class Recommendation:
    """A mixture and what is expected of it.

    Attributes:
        mixture_D: the recommended shares.
        gain: weighted gain over the reference, in outcome units.
        gain_se: its standard error; nan where the estimator has none.
        gain_T: gain of each task.
        gain_se_T: their standard errors.
        slack: the constraints, see `Constraints.slack`.
        unconstrained_D: the mixture the policy would choose on the whole simplex.
        unconstrained_gain: its weighted gain.
    """

    mixture_D: np.ndarray
    gain: float
    gain_se: float
    gain_T: np.ndarray
    gain_se_T: np.ndarray
    slack: pl.DataFrame
    unconstrained_D: np.ndarray
    unconstrained_gain: float


def weighted_gain(
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    mixture_MD: np.ndarray,
    reference_D: np.ndarray,
    weights_T: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted gain over tasks and its standard error.

    Returns:
        Two arrays of shape (M,); the second nan where a weighted task has no standard error.
    """
    gain = estimator.gain(state_DP, mixture_MD, reference_D)
    used = np.flatnonzero(weights_T)
    scaled_MT = gain.se_MT[:, used] * weights_T[used]
    correlation = estimator.task_correlation_TT[np.ix_(used, used)]
    variance_M = np.einsum("mt,ts,ms->m", scaled_MT, correlation, scaled_MT)
    return gain.mean_MT @ weights_T, np.sqrt(np.maximum(variance_M, 0.0))


def recommend(
    policy: str,
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    weights_T: np.ndarray,
    constraints: Constraints,
    *,
    domains: Sequence[str],
    confidence_z: float = 1.0,
    seed: int = 0,
) -> Recommendation:
    """Choose the mixture for a pool in this state.

    Args:
        policy: `optimum` or `search`.
        estimator: fitted on the proxy runs.
        state_DP: the pool's covariates, as the estimator was fitted on them; shape (D, P).
        weights_T: weight of each task in the objective, >= 0; shape (T,).
        constraints: what the mixture must respect.
        domains: names, for messages and the slack table.
        confidence_z: standard errors subtracted from the gain by `optimum`.
        seed: of the candidates.

    Raises:
        ConfigError: for an unknown policy, weights that are all zero, or constraints that no
            mixture satisfies.
    """
    if policy not in POLICIES:
        raise ConfigError(f"policy.name must be one of {', '.join(POLICIES)}, got {policy!r}.")
    weights_T = np.asarray(weights_T, dtype=float)
    if not (np.isfinite(weights_T) & (weights_T >= 0)).all():
        raise ConfigError(
            f"tasks: weights must be finite and >= 0, got {weights_T.tolist()}. Use the task's "
            "direction where less is better."
        )
    if not (weights_T > 0).any():
        raise ConfigError("tasks: all weights are 0, so no mixture is better than another.")
    check_mixture(constraints.reference_D, field="policy.reference")
    reference_D = constraints.reference_D

    def score(mixture_MD: np.ndarray) -> np.ndarray:
        mean_M, se_M = weighted_gain(estimator, state_DP, mixture_MD, reference_D, weights_T)
        return mean_M - confidence_z * np.nan_to_num(se_M)

    def mean(mixture_MD: np.ndarray) -> np.ndarray:
        return weighted_gain(estimator, state_DP, mixture_MD, reference_D, weights_T)[0]

    objective = score if policy == "optimum" else mean
    choose = POLICIES[policy]
    free = Constraints.simplex_only(reference_D)
    mixture_D = choose(objective, constraints, domains, seed)
    unconstrained_D = choose(objective, free, domains, seed)
    both = np.stack([mixture_D, unconstrained_D])
    mean_M, se_M = weighted_gain(estimator, state_DP, both, reference_D, weights_T)
    by_task = estimator.gain(state_DP, mixture_D[None], reference_D)
    return Recommendation(
        mixture_D=mixture_D,
        gain=float(mean_M[0]),
        gain_se=float(se_M[0]),
        gain_T=by_task.mean_MT[0],
        gain_se_T=by_task.se_MT[0],
        slack=constraints.slack(mixture_D, domains),
        unconstrained_D=unconstrained_D,
        unconstrained_gain=float(mean_M[1]),
    )


Objective = Callable[[np.ndarray], np.ndarray]


def _optimum(
    objective: Objective, constraints: Constraints, domains: Sequence[str], seed: int
) -> np.ndarray:
    """Global candidates, then shrinking random steps around the best few.

    Derivative-free, so that it serves smooth and stepwise estimators alike.
    """
    n_domains = len(domains)
    reference_D = constraints.reference_D
    candidates = dirichlet_design(N_CANDIDATES, n_domains, strength_range=(0.3, 3.0), seed=seed)
    # Half of them pulled towards the reference, where a tight region would crowd its border.
    pull = np.linspace(0.1, 0.9, N_CANDIDATES // 2)[:, None]
    candidates[::2] = pull * candidates[::2] + (1 - pull) * reference_D
    mixtures = constraints.project(np.vstack([reference_D[None], candidates]), domains)
    values = objective(mixtures)
    best = np.argsort(-values, kind="stable")[:N_STARTS]
    mixtures, values = mixtures[best], values[best]
    rng = np.random.default_rng([seed, 1])
    step = 0.1
    for _ in range(N_ROUNDS):
        noise = rng.normal(scale=step, size=(N_STARTS, 32, n_domains))
        moved = constraints.project((mixtures[:, None] + noise).reshape(-1, n_domains), domains)
        pool = np.vstack([mixtures, moved])
        scores = np.concatenate([values, objective(moved)])
        best = np.argsort(-scores, kind="stable")[:N_STARTS]
        mixtures, values = pool[best], scores[best]
        step *= 0.6
    return mixtures[0]


def _search(
    objective: Objective, constraints: Constraints, domains: Sequence[str], seed: int
) -> np.ndarray:
    """Score Dirichlet candidates inside the constraints and average the best (CausalMix-S)."""
    candidates = dirichlet_design(
        SEARCH_CANDIDATES, len(domains), strength_range=(1.0, 1.0), seed=seed
    )
    mixtures = constraints.project(candidates, domains)
    blocks = np.array_split(mixtures, 20)
    values = np.concatenate([objective(block) for block in blocks])
    best = np.argsort(-values, kind="stable")[:SEARCH_BEST]
    # The box and the trust region are convex, so the mean stays inside.
    return mixtures[best].mean(axis=0)


#: Policies by name.
POLICIES: dict[str, Callable[[Objective, Constraints, Sequence[str], int], np.ndarray]] = {
    "optimum": _optimum,
    "search": _search,
}
