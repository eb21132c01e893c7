"""Policies: from an effect estimator and a pool state to a mixture.

`optimum` maximises the lower confidence bound of the weighted gain inside the constraints.
`search` is the paper's: score many Dirichlet candidates and average the best. `analytical` is the
paper's closed form for effects of log shares.
Source of the last two: arXiv 2607.01104, policy extraction (CausalMix-S and CausalMix-A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.effects import EffectEstimator, Gain
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import check_mixture, dirichlet_design
from causalmix_pipeline.core.optimum import Found, Judge, find_optimum, retreat

__all__ = ["POLICIES", "Constraints", "Recommendation", "recommend", "weighted_gain"]

#: Policies by name.
POLICIES = ("optimum", "search", "analytical")
#: Candidates and averaged best of `search` (arXiv 2607.01104).
SEARCH_CANDIDATES = 100_000
SEARCH_BEST = 100
#: Least `level_spread` times sqrt(N) for which `analytical` trusts the level of effects. Simulated
#: with 4, 6 and 12 domains, 128 and 512 runs, noise of .3: above it the mixture loses at most .07
#: standard deviations of the outcome over mixtures on average, at half of it .2, at a fifth 1.
LEAST_LEVEL_SIGNAL = 0.6
#: A guard rail binds when its slack is below this part of the loss it keeps off.
BINDING_PART = 0.02


#: Trust radius of gains that are linear in the shares, nats.
USUAL_RADIUS = 0.15


@dataclass(frozen=True, eq=False)
class Recommendation:
    """A mixture and what is expected of it.

    Attributes:
        mixture_D: the recommended shares.
        gain: weighted gain over the reference, in outcome units.
        gain_se: its standard error; nan where the estimator has none.
        gain_T: gain of each task.
        gain_se_T: their standard errors.
        slack: the constraints, see `Constraints.slack`, and a row `<task>: guard rail` for each
            guard rail, in the task's units.
        unconstrained_D: the mixture the policy would choose on the whole simplex.
        unconstrained_gain: its weighted gain.
        only_reference: whether the reference is kept since guard rails forbid whatever is better.
    """

    mixture_D: np.ndarray
    gain: float
    gain_se: float
    gain_T: np.ndarray
    gain_se_T: np.ndarray
    slack: pl.DataFrame
    unconstrained_D: np.ndarray
    unconstrained_gain: float
    only_reference: bool = False


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
    return _weigh(gain, estimator.task_correlation_TT, weights_T)


def _weigh(
    gain: Gain, correlation_TT: np.ndarray, weights_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and its standard error; tasks without weight may be nan."""
    used = np.flatnonzero(weights_T)
    scaled_MT = gain.se_MT[:, used] * weights_T[used]
    correlation = correlation_TT[np.ix_(used, used)]
    variance_M = np.einsum("mt,ts,ms->m", scaled_MT, correlation, scaled_MT)
    return gain.mean_MT[:, used] @ weights_T[used], np.sqrt(np.maximum(variance_M, 0.0))


@dataclass(frozen=True, eq=False)
class Question:
    """What a policy asks of an estimator about a pool in one state.

    Attributes:
        estimator: fitted on the runs. Where it has `smooth_gain`, the search asks that.
        state_DP: the pool's covariates.
        weights_T: weight of each task, >= 0.
        reference_D: the mixture gains are measured from.
        guard_T: most loss of each task; infinite for no guard rail.
        confidence_z: standard errors taken off gains, of the weighted one and of guarded tasks.
        by_mean: whether mixtures are valued by their gain itself; guard rails keep to the bound.
    """

    estimator: EffectEstimator
    state_DP: np.ndarray
    weights_T: np.ndarray
    reference_D: np.ndarray
    guard_T: np.ndarray
    confidence_z: float = 1.0
    by_mean: bool = False

    def judge(self, mixture_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value and excess of each mixture, by the whole estimator; see `core.optimum.Judge`."""
        return self.judge_gain(self.estimator.gain(self.state_DP, mixture_MD, self.reference_D))

    def quick_judge(self) -> Judge:
        """The judge of the search: without a stack's stepwise members, if others answer."""
        smooth = getattr(self.estimator, "smooth_gain", None)
        if smooth is None:
            return self.judge
        asked = (self.weights_T > 0) | np.isfinite(self.guard_T)
        first = smooth(self.state_DP, self.reference_D[None], self.reference_D)
        if np.isnan(first.mean_MT[:, asked]).any():
            return self.judge
        return lambda mixture_MD: self.judge_gain(
            smooth(self.state_DP, mixture_MD, self.reference_D)
        )

    def bound_MT(self, gain: Gain) -> np.ndarray:
        """Lower confidence bound of each task's gain."""
        return gain.mean_MT - self.confidence_z * np.nan_to_num(gain.se_MT)

    def judge_gain(self, gain: Gain) -> tuple[np.ndarray, np.ndarray]:
        """Value and excess of mixtures whose gains are known."""
        mean_M, se_M = _weigh(gain, self.estimator.task_correlation_TT, self.weights_T)
        z = 0.0 if self.by_mean else self.confidence_z
        guarded = np.isfinite(self.guard_T)
        excess_MT = -self.bound_MT(gain)[:, guarded] - self.guard_T[guarded]
        return mean_M - z * np.nan_to_num(se_M), excess_MT.max(axis=1, initial=-np.inf)


def recommend(
    policy: str,
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    weights_T: np.ndarray,
    constraints: Constraints,
    *,
    domains: Sequence[str],
    tasks: Sequence[str] = (),
    design_ND: np.ndarray | None = None,
    confidence_z: float = 1.0,
    seed: int = 0,
    unconstrained_too: bool = True,
) -> Recommendation:
    """Choose the mixture for a pool in this state.

    Args:
        policy: `optimum`, `search` or `analytical`.
        estimator: fitted on the proxy runs; for a quick search on tasks that have a weight or a
            guard rail only. `analytical` needs one with effects of log shares.
        state_DP: the pool's covariates, as the estimator was fitted on them; shape (D, P).
        weights_T: weight of each task in the objective, >= 0; shape (T,).
        constraints: what the mixture must respect.
        domains: names, for messages and the slack table.
        tasks: names of the estimator's tasks; needed for guard rails.
        design_ND: mixtures of the proxy runs; needed by `analytical`.
        confidence_z: standard errors subtracted from the gain by `optimum`, and from each task's by
            guard rails.
        seed: of the candidates.
        unconstrained_too: whether to search without constraints as well, which takes as long
            again; without, the recommended mixture stands for the unconstrained one.

    Raises:
        ConfigError: for an unknown policy, weights that are all zero, constraints that no
            mixture satisfies, effects that `analytical` can't use, or gains linear in the shares
            without a trust region.
    """
    if policy not in POLICIES:
        raise ConfigError(f"policy.name must be one of {', '.join(POLICIES)}, got {policy!r}.")
    check_trust_region(estimator, constraints)
    question = ask(estimator, state_DP, weights_T, constraints, tasks, confidence_z, policy)
    found = _choose(policy, question, constraints, domains, seed, design_ND)
    if np.abs(found.mixture_D - constraints.reference_D).max() < 1e-9:  # but for rounding
        found = replace(found, mixture_D=np.asarray(constraints.reference_D, dtype=float))
    unconstrained_D = found.mixture_D
    if unconstrained_too and not constraints.are_none:
        free = Constraints.simplex_only(constraints.reference_D)
        open_ = ask(estimator, state_DP, weights_T, free, tasks, confidence_z, policy)
        unconstrained_D = _choose(policy, open_, free, domains, seed, design_ND).mixture_D
    both_MD = np.stack([found.mixture_D, unconstrained_D])
    gain = estimator.gain(state_DP, both_MD, constraints.reference_D)
    mean_M, se_M = _weigh(gain, estimator.task_correlation_TT, question.weights_T)
    return Recommendation(
        mixture_D=found.mixture_D,
        gain=float(mean_M[0]),
        gain_se=float(se_M[0]),
        gain_T=gain.mean_MT[0],
        gain_se_T=gain.se_MT[0],
        slack=pl.concat(
            [
                constraints.slack(found.mixture_D, domains),
                _guard_slack(question, gain, tasks),
            ]
        ),
        unconstrained_D=unconstrained_D,
        unconstrained_gain=float(mean_M[1]),
        only_reference=found.only_start,
    )


def check_trust_region(estimator: EffectEstimator, constraints: Constraints) -> None:
    """Refuse gains that are linear in the shares without a trust region.

    Raises:
        ConfigError: if there is none, but the estimator needs one.
    """
    if getattr(estimator, "needs_trust_region", False) and constraints.trust_radius is None:
        raise ConfigError(
            "policy.trust_radius must be set for gains that are linear in the shares, as those of "
            "causal_forest_raw are, got none: the best mixture would be a single domain. Set it "
            f"({USUAL_RADIUS:g} nats is usual), or take causal_forest."
        )


def ask(
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    weights_T: np.ndarray,
    constraints: Constraints,
    tasks: Sequence[str] = (),
    confidence_z: float = 1.0,
    policy: str = "optimum",
) -> Question:
    """The question of a policy.

    Raises:
        ConfigError: for weights that rank nothing, a reference off the simplex, or guard rails
            that name no task.
    """
    weights_T = np.asarray(weights_T, dtype=float)
    if not (np.isfinite(weights_T) & (weights_T >= 0)).all():
        raise ConfigError(
            f"tasks: weights must be finite and >= 0, got {weights_T.tolist()}. Use the task's "
            "direction where less is better."
        )
    if not (weights_T > 0).any():
        raise ConfigError("tasks: all weights are 0, so no mixture is better than another.")
    check_mixture(constraints.reference_D, field="policy.reference")
    guard_T = np.full(len(weights_T), np.inf)
    if constraints.guard_rails:
        guard_T = constraints.guard_T(tasks)
    return Question(
        estimator,
        state_DP,
        weights_T,
        constraints.reference_D,
        guard_T,
        confidence_z,
        by_mean=policy != "optimum",
    )


def _choose(
    policy: str,
    question: Question,
    constraints: Constraints,
    domains: Sequence[str],
    seed: int,
    design_ND: np.ndarray | None,
) -> Found:
    """The policy's mixture inside the constraints."""
    if policy == "optimum":
        return find_optimum(question.quick_judge(), question.judge, constraints, domains, seed)
    if policy == "search":
        mixture_D = _search(question, constraints, domains, seed)
    else:
        closed_D = analytical_mixture(question, design_ND)
        mixture_D = constraints.project(closed_D, domains)
    if not constraints.guard_rails:
        return Found(mixture_D)
    start_D = constraints.project(constraints.reference_D, domains)
    return retreat(question.judge, start_D, mixture_D)


def _search(
    question: Question, constraints: Constraints, domains: Sequence[str], seed: int
) -> np.ndarray:
    """Score Dirichlet candidates inside the constraints and average the best (CausalMix-S)."""
    candidates = dirichlet_design(
        SEARCH_CANDIDATES, len(domains), strength_range=(1.0, 1.0), seed=seed
    )
    mixtures = constraints.project(candidates, domains)
    judged = [question.judge(block) for block in np.array_split(mixtures, 20)]
    value_M = np.concatenate([value for value, _ in judged])
    passed_M = np.maximum(np.concatenate([excess for _, excess in judged]), 0)
    best = np.lexsort((-value_M, passed_M))[:SEARCH_BEST]
    # The box and the trust region are convex, so the mean stays inside.
    return mixtures[best].mean(axis=0)


# ---------------------------------------------------------------------------- analytical


def analytical_mixture(question: Question, design_ND: np.ndarray | None) -> np.ndarray:
    """CausalMix-A: shares in proportion to the positive effects of log shares.

    The maximiser of sum theta_d log t_d over the domains with theta_d > 0, with theta the weighted
    effect of the coordinates log(share + offset) in the pool's state. Adding a constant to all
    theta changes the mixture, so their level must be identified by the runs.

    Raises:
        ConfigError: if the estimator has no effects of log shares, the runs don't identify their
            level, or none is positive.
    """
    forest: Any = getattr(question.estimator, "forest", None) or question.estimator
    if getattr(forest, "coordinates", None) != "log":
        raise ConfigError(
            "policy analytical needs the effects of log shares, which only causal_forest_log has, "
            f"got {question.estimator.name}: fit with causal_forest_log alone, or take policy "
            "optimum."
        )
    if design_ND is None:
        raise ConfigError(
            "policy analytical needs the mixtures of the runs (design_ND), got none: pass them."
        )
    signal = level_spread(design_ND, forest.log_offset) * len(design_ND) ** 0.5
    if signal < LEAST_LEVEL_SIGNAL:
        raise ConfigError(
            "policy analytical needs runs that identify the level of effects: what the mean log "
            "share varies by itself, times the root of the number of runs, must be at least "
            f"{LEAST_LEVEL_SIGNAL:g}, got {signal:.3g}. Add runs from sparse to flat mixtures, or "
            "take policy optimum."
        )
    theta_D = forest.effect(question.state_DP) @ question.weights_T
    positive_D = np.maximum(theta_D, 0.0)
    if not positive_D.sum() > 0:
        raise ConfigError(
            "policy analytical needs a domain with a positive effect in this pool's state, got "
            f"{np.round(theta_D, 4).tolist()}: take policy optimum."
        )
    return positive_D / positive_D.sum()


def level_spread(mixture_ND: np.ndarray, log_offset: float) -> float:
    """How far runs move all log shares together, other than by what contrasts of them tell.

    The level of the effects is the effect of raising all coordinates log(share + offset) at once.
    Shares sum to one, so in a narrow design the mean coordinate is a linear function of the
    contrasts (the coordinates minus their mean), and the level can't be told from them. What a
    regression of the mean coordinate on the contrasts leaves over is what identifies it: the
    standard error of the level is that of the noise over sqrt(N) and this.

    Returns:
        The standard deviation of that rest, in natural logarithms of shares.
    """
    coordinate_ND = np.log(np.clip(mixture_ND, 0, None) + log_offset)
    level_N = coordinate_ND.mean(axis=1)
    # One contrast is told by the others; the constant takes its place.
    contrast_ND = coordinate_ND - level_N[:, None]
    contrast_ND[:, -1] = 1.0
    fitted_N = contrast_ND @ np.linalg.lstsq(contrast_ND, level_N, rcond=None)[0]
    return float(np.std(level_N - fitted_N))


# ---------------------------------------------------------------------------- guard rails

_SLACK_SCHEMA = {"constraint": pl.String, "value": pl.Float64, "limit": pl.Float64,
                 "slack": pl.Float64, "binds": pl.Boolean}  # fmt: skip


def _guard_slack(question: Question, gain: Gain, tasks: Sequence[str]) -> pl.DataFrame:
    """A row per guard rail; `gain` is that of the mixture, then of the unconstrained one."""
    loss_MT = -question.bound_MT(gain)
    rows = []
    for t in np.flatnonzero(np.isfinite(question.guard_T)):
        limit, loss = float(question.guard_T[t]), float(loss_MT[0, t])
        near = BINDING_PART * max(limit, float(loss_MT[1, t]), 0.0)
        rows.append((f"{tasks[t]}: guard rail", loss, limit, limit - loss, limit - loss <= near))
    return pl.DataFrame(rows, schema=_SLACK_SCHEMA, orient="row")
