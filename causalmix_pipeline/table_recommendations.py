"""From a model to mixtures: what to recommend for each pool, what it costs, what others would mix.

Gains are weighted means over metrics in the metrics' own units, positive is better.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.asked_estimator import Asked, fit_asked
from causalmix_pipeline.adapters.baseline_mixtures import make_baselines
from causalmix_pipeline.core.belief import reach_of
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pareto import pareto_front
from causalmix_pipeline.core.policy import (
    POLICIES,
    Constraints,
    Recommendation,
    check_trust_region,
    weighted_gain,
)
from causalmix_pipeline.core.policy import recommend as apply_policy
from causalmix_pipeline.table_model import Model, TableSource
from causalmix_pipeline.table_options import read_pools, read_references, read_rules

#: Standard errors taken off the gain before `optimum` maximises it, and by guard rails.
CONFIDENCE_Z = 1.0


@dataclass(frozen=True, eq=False)
class Recommended:
    """What `recommend` found for each pool, in full.

    Attributes:
        mixtures: as `recommend` returns it.
        slack: a row per pool and constraint: `pool`, `constraint`, `value`, `limit`, `slack`,
            `binds`; shares, nats for the trust region, a metric's units for its guard rail.
        unconstrained: a row per pool that isn't `unsupported`: `pool`, the share of each domain in
            the mixture that would be chosen without constraints, `gain`, its weighted gain, and
            `cost`, what of it the constraints cost.
        only_reference: pools for which guard rails forbid whatever is better than the reference.
    """

    mixtures: pl.DataFrame
    slack: pl.DataFrame
    unconstrained: pl.DataFrame
    only_reference: tuple[str, ...]


def recommend(
    model: Model,
    pools: TableSource | None = None,
    *,
    policy: str = "optimum",
    reference: str | Path | Mapping[str, float] = "equal",
    constraints: Path | str | Mapping[str, Any] | None = None,
) -> pl.DataFrame:
    """Recommend a mixture for each pool.

    Args:
        model: from `fit` or `Model.load`.
        pools: `pool`, `<domain>__<covariate>` and perhaps `<domain>__tokens`. Not needed where the
            model was fitted without covariates.
        policy: `optimum`, or the paper's `search`, which is slower, or `analytical`, for a model
            fitted with the estimator `causal_forest_log`.
        reference: what gains are measured from: `equal`, `natural` (token shares), a file, or
            shares by domain. A file is YAML or JSON with a share for each domain, or a CSV with a
            column for each and one row.
        constraints: YAML file or mapping with any of `least_share`, `most_share` (a number, or one
            by domain), `frozen` (shares by domain), `trust_radius` (nats), `budget_tokens`,
            `max_epochs`, `guard_rails` (by metric, the most that may be lost over the reference,
            in its own units; it holds for the gain less one standard error).

    Returns:
        A row per pool: `pool`, a share for each domain, `gain`, `gain_lower`, `gain_upper` (a 90%
        interval; null where none can be told), `verdict`. A gain is what `predict` says, times
        what held of gains on pool states left out (`Model.calibration`). An `unsupported` pool gets
        the reference, or the nearest mixture that is allowed, and no gain; for an `extrapolating`
        one effects are read at the edge of reach, the interval is wider and a trust radius smaller.

    Raises:
        ConfigError: for options that can't be met.
        EstimationError: for pools without the model's covariates.
    """
    return _recommend(model, pools, policy, reference, constraints, in_full=False).mixtures


def recommend_in_full(
    model: Model,
    pools: TableSource | None = None,
    *,
    policy: str = "optimum",
    reference: str | Path | Mapping[str, float] = "equal",
    constraints: Path | str | Mapping[str, Any] | None = None,
) -> Recommended:
    """`recommend`, with the slack of each constraint and what the constraints cost.

    Where there are constraints it takes twice as long.
    """
    return _recommend(model, pools, policy, reference, constraints, in_full=True)


def _recommend(
    model: Model,
    pools: TableSource | None,
    policy: str,
    reference: str | Path | Mapping[str, float],
    constraints: Path | str | Mapping[str, Any] | None,
    *,
    in_full: bool,
) -> Recommended:
    if policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    names, state_MDP, kept = read_rules(model, pools, reference, constraints)
    asked = _asked(model, kept[0].guard_rails)

    def choose(name: str, state_DP: np.ndarray, constraints: Constraints) -> _Choice:
        return _choice(model, asked, name, state_DP, constraints, policy, in_full)

    from threadpoolctl import threadpool_limits

    # One after the other in one thread: the matrices are small, and two threads wait for each
    # other (42 s against 27 for 100 pools).
    with threadpool_limits(1):
        choices = [choose(*each) for each in zip(names, state_MDP, kept, strict=True)]
    return _in_full(choices, model.runs.domains)


def _asked(model: Model, tasks: Iterable[str] = ()) -> Asked:
    """The estimator of the metrics that count and of `tasks`."""
    weights = dict(zip(model.runs.tasks, model.weights_T.tolist(), strict=True))
    counted = tuple(task for task, weight in weights.items() if weight > 0)
    if set(tasks) <= set(counted):
        estimator, weights_T = model.weighted
        return Asked(estimator, counted, weights_T)
    return fit_asked(
        model.runs,
        model.chosen,
        weights,
        tuple(tasks),
        seed=model.seed,
        parameters=model.parameters,
        calibration=model.calibration,
    )


@dataclass(frozen=True, eq=False)
class _Choice:
    """What is recommended for a pool; `found` is None where no run has been."""

    pool: str
    mixture_D: np.ndarray
    gain: float | None
    se: float
    verdict: str
    slack: pl.DataFrame
    found: Recommendation | None

    @property
    def row(self) -> tuple:
        """Shares, gain, its bounds and the verdict."""
        bounds = (None, None)
        if self.gain is not None and math.isfinite(self.se):
            bounds = (self.gain - Z90 * self.se, self.gain + Z90 * self.se)
        return (self.pool, *self.mixture_D.tolist(), self.gain, *bounds, self.verdict)


def _choice(
    model: Model,
    asked: Asked,
    name: str,
    state_DP: np.ndarray,
    constraints: Constraints,
    policy: str,
    in_full: bool,
) -> _Choice:
    """The policy's mixture, or the reference where the runs don't reach."""
    runs = model.runs
    reach = reach_of(runs, state_DP)
    verdict = reach.verdict
    if verdict == "unsupported":
        mixture_D, moved = constraints.nearest_reference(runs.domains)
        slack = constraints.slack(mixture_D, runs.domains)
        return _Choice(name, mixture_D, None if moved else 0.0, math.nan, verdict, slack, None)
    constraints = constraints.doubted(reach.pool_doubt, runs.domains)
    found = _apply(model, asked, reach.edge_DP, constraints, policy, in_full)
    se = found.gain_se * reach.doubt
    return _Choice(name, found.mixture_D, found.gain, se, verdict, found.slack, found)


def _apply(
    model: Model,
    asked: Asked,
    state_DP: np.ndarray,
    constraints: Constraints,
    policy: str,
    in_full: bool = False,
) -> Recommendation:
    return apply_policy(
        policy,
        asked.estimator,
        state_DP,
        asked.weights_T,
        constraints,
        domains=model.runs.domains,
        tasks=asked.tasks,
        design_ND=model.runs.mixture_ND,
        confidence_z=CONFIDENCE_Z,
        seed=model.seed,
        unconstrained_too=in_full,
    )


def _in_full(choices: Sequence[_Choice], domains: Sequence[str]) -> Recommended:
    shares = dict.fromkeys(domains, pl.Float64)
    schema = {"pool": pl.String, **shares, "gain": pl.Float64, "gain_lower": pl.Float64,
              "gain_upper": pl.Float64, "verdict": pl.String}  # fmt: skip
    free = [
        (choice.pool, *found.unconstrained_D.tolist(), found.unconstrained_gain,
         max(found.unconstrained_gain - found.gain, 0.0))
        for choice in choices
        if (found := choice.found) is not None
    ]  # fmt: skip
    free_schema = {"pool": pl.String, **shares, "gain": pl.Float64, "cost": pl.Float64}
    return Recommended(
        mixtures=pl.DataFrame([choice.row for choice in choices], schema=schema, orient="row"),
        slack=pl.concat(
            choice.slack.select(pl.lit(choice.pool).alias("pool"), pl.all()) for choice in choices
        ),
        unconstrained=pl.DataFrame(free, schema=free_schema, orient="row"),
        only_reference=tuple(
            choice.pool for choice in choices if choice.found and choice.found.only_reference
        ),
    )


def best_mixture(
    model: Model, state_DP: np.ndarray, constraints: Constraints, policy: str = "optimum"
) -> tuple[np.ndarray, float, float]:
    """The mixture, its weighted gain over the reference, and the gain's standard error."""
    asked = _asked(model, constraints.guard_rails)
    found = _apply(model, asked, state_DP, constraints, policy)
    return found.mixture_D, found.gain, found.gain_se


# ---------------------------------------------------------------------------- pareto


def pareto(
    model: Model,
    first: str,
    second: str,
    pools: TableSource | None = None,
    pool: str | None = None,
    *,
    constraints: Path | str | Mapping[str, Any] | None = None,
    reference: str | Path | Mapping[str, float] = "equal",
) -> pl.DataFrame:
    """The mixtures of which none is better in both metrics; see `core.pareto`.

    Args:
        model: from `fit` or `Model.load`.
        first: name of a metric.
        second: name of another.
        pools: as in `recommend`.
        pool: name of the pool to look at; the first one if None.
        constraints: as in `recommend`.
        reference: as in `recommend`.

    Returns:
        A column for each domain, then `gain_first`, `gain_first_se`, `gain_second`,
        `gain_second_se` (null where unknown), in the metrics' own units, positive is better; from
        the best in the second metric to the best in the first.

    Raises:
        ConfigError: for options that can't be met, an unknown pool, or one the runs don't reach.
    """
    names, state_MDP, kept = read_rules(model, pools, reference, constraints)
    if pool is not None and pool not in names:
        raise ConfigError(
            f"pool must be one of the pools ({', '.join(names[:20])}), got {pool}: correct the "
            "name."
        )
    unknown = [name for name in (first, second) if name not in model.runs.tasks]
    if unknown:
        raise ConfigError(
            f"pareto must name two metrics of {', '.join(model.runs.tasks)}, got {unknown[0]}: "
            "correct the name."
        )
    m = 0 if pool is None else names.index(pool)
    reach = reach_of(model.runs, state_MDP[m])
    if reach.verdict == "unsupported":
        raise ConfigError(
            f"pareto needs a pool that the runs reach, but {names[m]} is unsupported (overlap "
            f"score {reach.score:.3g}): add runs of its own state."
        )
    asked = _asked(model, {first, second, *kept[m].guard_rails})
    check_trust_region(asked.estimator, kept[m])
    front = pareto_front(
        asked.estimator,
        reach.edge_DP,
        first,
        second,
        kept[m].doubted(reach.pool_doubt, model.runs.domains),
        domains=model.runs.domains,
        tasks=asked.tasks,
        confidence_z=CONFIDENCE_Z,
        seed=model.seed,
    )
    return front.with_columns(pl.col(r"^gain_.*_se$") * reach.doubt)


# ---------------------------------------------------------------------------- baselines


def baselines(
    model: Model,
    pools: TableSource | None = None,
    *,
    reference: str | Path | Mapping[str, float] = "equal",
    fixed: Path | str | Mapping[str, float] | None = None,
) -> pl.DataFrame:
    """What simpler methods would mix for each pool, and the gains that the model predicts of it.

    Only equal and the methods that learn from the table are sure to be there: natural needs
    tokens, fixed shares, and dmo a metric of each domain's name. None keeps to constraints.

    Args:
        model: from `fit` or `Model.load`.
        pools: as in `recommend`.
        reference: what gains are measured from, as in `recommend`.
        fixed: shares by domain of a mixture tuned by hand, or a file as `reference` takes one.

    Returns:
        A row per pool and baseline: `pool`, `baseline`, a share for each domain, `gain`,
        `gain_lower`, `gain_upper` (a 90% interval; null where none can be told, as are the gains
        of a pool that the runs don't reach).
    """
    runs = model.runs
    names, state_MDP, tokens_MD = read_pools(model, pools)
    reference_MD = read_references(reference, runs.domains, names, tokens_MD)
    fixed_D = None if fixed is None else read_references(fixed, runs.domains, names[:1], None)[0]
    estimator, weights_T = model.weighted
    rows = []
    made: dict[bytes, dict[str, np.ndarray]] = {}
    for m, name in enumerate(names):
        natural_D = None if tokens_MD is None else tokens_MD[m] / tokens_MD[m].sum()
        key = b"" if natural_D is None else natural_D.tobytes()
        if key not in made:
            made[key] = make_baselines(runs, model.weights_T, natural_D, fixed_D, seed=model.seed)
        mixture_MD = np.stack(list(made[key].values()))
        reach = reach_of(runs, state_MDP[m])
        gain_M, se_M = weighted_gain(
            estimator, reach.edge_DP, mixture_MD, reference_MD[m], weights_T
        )
        se_M = se_M * reach.doubt
        if reach.verdict == "unsupported":
            gain_M = se_M = np.full(len(mixture_MD), math.nan)
        rows += [
            (name, baseline, *mixture_D.tolist(), gain, gain - Z90 * se, gain + Z90 * se)
            for baseline, mixture_D, gain, se in zip(
                made[key], mixture_MD, gain_M, se_M, strict=True
            )
        ]
    schema = {"pool": pl.String, "baseline": pl.String, **dict.fromkeys(runs.domains, pl.Float64),
              "gain": pl.Float64, "gain_lower": pl.Float64, "gain_upper": pl.Float64}  # fmt: skip
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(pl.col("gain", "gain_lower", "gain_upper").fill_nan(None))
