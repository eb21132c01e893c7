"""What a recommended mixture must keep to: shares, tokens, a trust region, guard rails.

All but the guard rails are about the mixture alone; those are about what an estimator says of it
(`core.optimum`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import (
    kl_divergence,
    project_to_box,
    shrink_into_trust_region,
)

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
        guard_rails: by task, the most that may be lost over the reference, in the task's own
            units, >= 0. It holds for the lower bound of the predicted gain.
    """

    reference_D: np.ndarray
    lower_D: np.ndarray
    upper_D: np.ndarray
    trust_radius: float | None = None
    budget_tokens: float | None = None
    available_D: np.ndarray | None = None
    max_epochs: float = 4.0
    guard_rails: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def simplex_only(cls, reference_D: np.ndarray) -> Constraints:
        """No constraint but shares >= 0 that sum to 1."""
        n_domains = len(reference_D)
        return cls(reference_D, np.zeros(n_domains), np.ones(n_domains))

    @property
    def are_none(self) -> bool:
        """Whether every mixture is allowed."""
        limited = (self.lower_D > 0).any() or (self.upper_D < 1).any()
        limited = limited or (self.token_limit_D() < 1).any()
        return not limited and self.trust_radius is None and not self.guard_rails

    def guard_T(self, tasks: Sequence[str]) -> np.ndarray:
        """Most loss of each task, infinite without a guard rail; shape (T,).

        Raises:
            ConfigError: if a guard rail is below 0, or names none of the tasks.
        """
        for task, loss in self.guard_rails.items():
            if task not in tasks:
                raise ConfigError(
                    f"guard_rails must name tasks ({', '.join(tasks) or 'none is known'}), got "
                    f"{task}: correct the name."
                )
            if not 0 <= loss < np.inf:
                raise ConfigError(
                    f"guard_rails: {task} must be the most that may be lost over the reference, a "
                    f"finite number >= 0, got {loss}: 0 allows no loss."
                )
        return np.array([self.guard_rails.get(task, np.inf) for task in tasks])

    def doubted(self, doubt: float, domains: Sequence[str]) -> Constraints:
        """The same, with the trust radius divided by what `core.belief.Overlap.pool_doubt` says.

        Where shares and tokens forbid the reference itself, the radius stays large enough for the
        nearest mixture that they allow.
        """
        if self.trust_radius is None:
            return self
        nearest_D, _ = self.nearest_reference(domains)
        least = float(kl_divergence(nearest_D, self.reference_D)) * (1 + 1e-9)
        radius = min(self.trust_radius, max(self.trust_radius / doubt, least))
        return replace(self, trust_radius=radius)

    def nearest_reference(self, domains: Sequence[str]) -> tuple[np.ndarray, bool]:
        """The mixture nearest to the reference that shares and tokens allow, and if it's another.

        Raises:
            ConfigError: if no mixture satisfies them.
        """
        nearest_D = project_to_box(self.reference_D, *self.box(domains))
        moved = bool(np.abs(nearest_D - self.reference_D).max() > 1e-9)
        return (nearest_D if moved else np.asarray(self.reference_D)), moved

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
            total = f"the most shares of all domains sum to {upper_D.sum():.4g}, below 1, so"
            if self.budget_tokens is None:
                raise ConfigError(
                    f"policy.most_share: {total} no mixture is possible. Raise most_share, to "
                    f"{1 / len(upper_D):.4g} at the least."
                )
            raise ConfigError(
                f"policy: {total} no mixture can fill budget_tokens. Lower budget_tokens to at "
                f"most {upper_D.sum():.4g} of it, or raise max_epochs ({self.max_epochs:g}) or "
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
            trust region. Guard rails aren't among them: see `core.policy`.
        """
        rows: list[tuple[str, float, float, float]] = []
        limits_D = self.token_limit_D()
        for d, domain in enumerate(domains):
            share = float(mixture_D[d])
            if self.lower_D[d] == self.upper_D[d]:
                low = float(self.lower_D[d])
                rows.append((f"{domain}: frozen", share, low, -abs(share - low)))
                continue
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
