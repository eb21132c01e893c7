"""What the report shows, page and Markdown alike, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from causalmix_pipeline.adapters.beliefs_html import Beliefs
from causalmix_pipeline.adapters.interpretation_html import Interpretation
from causalmix_pipeline.adapters.what_if_html import WhatIf

#: What gains are in where all tasks are losses, and where some aren't.
BITS_PER_BYTE, OWN_UNITS = "bits per byte", "the tasks' own units"

#: Columns of each frame of `ReportData`.
FRAME_COLUMNS = {
    "gains": ("mixture", "gain", "low", "high"),
    "task_gains": ("task", "weight", "gain", "low", "high", "reference_bits_per_byte"),
    "slack": ("constraint", "value", "limit", "slack", "binds"),
    "covariates": ("domain", "covariate", "live", "states"),
    "predictions": ("task", "observed", "predicted"),
    "estimators": ("task", "estimator", "chosen", "r2_within", "r2_within_se", "spearman",
                   "spearman_se", "coverage_90"),
    "signal": ("task", "mixture_variance", "seed_variance", "ratio", "nats_per_token",
               "unigram_nats"),
}  # fmt: skip

#: What each verdict means to the reader.
VERDICTS = {
    "supported": "The live pool is as near to the experiment's pool states as these are to each "
    "other. The predicted gain and its interval rest on proxy runs of pools like this one.",
    "extrapolating": "The live pool lies beyond the experiment's pool states. Effects are read no "
    "farther out than the runs can tell, and by the distance the interval is widened and a trust "
    "radius made smaller. Take the predicted gain as a rough guide, and train the top-up runs "
    "before a large training run.",
    "unsupported": "No proxy run has seen a pool like this one, so no gain can be promised: the "
    "reference mixture is kept, or the nearest to it that the limits allow. The top-up runs listed "
    "below would help.",
}


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything the report shows, as plain values.

    Losses and their gains are in bits per byte, other tasks in units of their own.

    A gain is positive where the mixture is better than the reference. An unknown interval is null
    or nan. `low` and `high` are the ends of 90% intervals.

    Attributes:
        domains: D labels, in the pool's order.
        mixtures: name to shares in the order of `domains`. `recommended` and `reference` must be
            there (where the verdict is `unsupported`, they are equal, or `recommended` is the
            mixture nearest to the reference that the limits allow); `equal`, `natural`, `regmix`
            and any other are shown beside them.
        reference_name: what the reference is: natural, equal or fixed.
        verdict: `supported`, `extrapolating` or `unsupported`.
        overlap_score: distance of the live pool to the experiment's states, as `core.belief` has
            it; `supported` up to `supported_limit`, `unsupported` above `unsupported_limit`.
        supported_limit: largest score that counts as supported.
        unsupported_limit: largest score that counts as extrapolating.
        gains: a row per mixture of `mixtures`, the weighted gain over the reference: `mixture`,
            `gain`, `low`, `high`.
        task_gains: a row per task, for the recommended mixture: `task`, `weight` (0 is only
            reported), `gain`, `low`, `high`, `reference_bits_per_byte` (predicted loss with the
            reference mixture; null if unknown).
        slack: the frame of `Constraints.slack`: `constraint`, `value`, `limit`, `slack`, `binds`.
        covariates: a row per domain and covariate, raw units: `domain`, `covariate`, `live`,
            `states` (list of the value in each distinct state of the proxy runs).
        predictions: a row per proxy run and task, of the chosen estimator out of fold: `task`,
            `observed`, `predicted`; outcomes, so that a loss is minus its bits per byte.
        estimators: a row per task and estimator: `task`, `estimator`, `chosen`, `r2_within`,
            `r2_within_se`, `spearman`, `spearman_se`, `coverage_90` (null without intervals).
        signal: a row per task: `task`, `mixture_variance`, `seed_variance`, `ratio`,
            `nats_per_token` (median held-out loss of the proxy runs) and `unigram_nats` (entropy of
            the task's token frequencies); the last two may be null.
        losses: tasks whose outcome is a loss in bits per byte; others are probabilities, accuracies
            or the like.
        provenance: label to value, shown as they are: fingerprints, versions, seeds, run counts.
        policy: name of the policy.
        made_at: when, as text; empty leaves it out.
        budget_tokens: tokens of the planned training run, or None.
        top_up: proxy runs of the live pool's state that would help, a row each: `share__<domain>`
            for every domain; None where none are needed.
        interpretation: effects of domains on the live pool, and what they depend on; None leaves
            them out.
        beliefs: what was tried to prove the effect model wrong, and what can't be known; None
            leaves it out.
        what_if: mixtures for other task weights; None leaves them out.
        unconstrained_gain: gain of the mixture without limits; None if unknown.
        learning_curve: rows `n_runs`, `part` of the runs there are, `r2`, `r2_se`.
        size: how far the size of the model is from the proxies', as `recommended_mixture` has it;
            None where proxies have one size.
        history: a row per recommendation of this pool, oldest first: `made_at`, `verdict`, `gain`,
            `low`, `high`, `realised`, `realised_se`; None or empty leaves it out.
    """

    domains: tuple[str, ...]
    mixtures: Mapping[str, tuple[float, ...]]
    reference_name: str
    verdict: str
    overlap_score: float
    supported_limit: float
    unsupported_limit: float
    gains: pl.DataFrame
    task_gains: pl.DataFrame
    slack: pl.DataFrame
    covariates: pl.DataFrame
    predictions: pl.DataFrame
    estimators: pl.DataFrame
    signal: pl.DataFrame
    losses: frozenset[str]
    provenance: Mapping[str, str] = field(default_factory=dict)
    policy: str = "optimum"
    made_at: str = ""
    budget_tokens: float | None = None
    top_up: pl.DataFrame | None = None
    interpretation: Interpretation | None = None
    beliefs: Beliefs | None = None
    what_if: WhatIf | None = None
    unconstrained_gain: float | None = None
    learning_curve: tuple[Mapping[str, Any], ...] = ()
    history: pl.DataFrame | None = None
    size: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check names, lengths and columns: a wrong one is a bug of the caller."""
        assert self.verdict in VERDICTS, self.verdict
        assert {"recommended", "reference"} <= set(self.mixtures), list(self.mixtures)
        for name, shares in self.mixtures.items():
            assert len(shares) == len(self.domains), (name, shares)
        for name, columns in FRAME_COLUMNS.items():
            missing = [c for c in columns if c not in getattr(self, name).columns]
            assert not missing, f"ReportData.{name} lacks {missing}"

    @property
    def unit(self) -> str:
        """What the weighted gain is in."""
        return self._unit_of(self.task_gains.filter(pl.col("weight") > 0)["task"])

    @property
    def task_unit(self) -> str:
        """What the gains of all tasks are in."""
        return self._unit_of(self.task_gains["task"])

    def _unit_of(self, tasks: pl.Series) -> str:
        return BITS_PER_BYTE if self.losses.issuperset(tasks) else OWN_UNITS

    @property
    def is_reference(self) -> bool:
        """Whether the recommended mixture is the reference itself."""
        pairs = zip(self.mixtures["recommended"], self.mixtures["reference"], strict=True)
        return all(abs(a - b) < 1e-9 for a, b in pairs)
