"""Which covariates enter: a choice by cross-validation on the proxy runs at hand.

A subset of the covariates is as good as the outcomes that an estimator fitted with it predicts for
pool states it has not seen: R2 within unseen states, mean over tasks, the score of
`core.effects.cross_validate`. Subsets are found by forward selection and compared on the same
folds, so the standard error of a difference is that of paired states. The smallest subset within
one standard error of the best is chosen (the rule of Breiman and others, Classification and
Regression Trees, section 3.4.3, with the error of the difference for the error of the best). The
best of many scores, and so the chosen one, is a little too good to be true: pool states that the
choice hasn't seen give the honest figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from causalmix_pipeline.core.effects import (
    MINIMUM_STATES,
    RELATIVE_FLOOR,
    EffectEstimator,
    assign_folds,
    center_by_state,
    check_runs,
    permute_states,
)
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Correlation, in size, from which two covariates count as one.
COLLINEAR = 0.95

#: Steps of the forward selection without a better score after which it ends.
PATIENCE = 2


@dataclass(frozen=True, eq=False)
class WithinSums:
    """What each state adds to R2 within states: enough for its value and its errors over states.

    Attributes:
        error_ST: squared errors of predictions, both centred by the state's mean, summed over the
            state's runs; shape (S, T).
        total_ST: squared centred outcomes, summed likewise; shape (S, T). Tasks that never vary
            within a state are left out.
    """

    error_ST: np.ndarray
    total_ST: np.ndarray

    @property
    def r2(self) -> float:
        """R2 within unseen states, mean over tasks."""
        return float(_r2(self.error_ST.sum(axis=0), self.total_ST.sum(axis=0)))

    @property
    def left_out_r2_S(self) -> np.ndarray:
        """`r2` without each state in turn; shape (S,)."""
        return _r2(
            self.error_ST.sum(axis=0) - self.error_ST, self.total_ST.sum(axis=0) - self.total_ST
        )


@dataclass(frozen=True, eq=False)
class CovariateChoice:
    """The covariates to use, and the scores that decided it.

    Attributes:
        chosen: names in the order of the runs; empty if none help.
        table: one row per subset tried, best first: `kind` (`none`, `alone`, `forward`, `all`;
            `permuted` for the control of `all` and of the chosen, whose covariates belong to other
            states), `covariates`, `size`, `r2_within` and its `r2_within_se`, `below_best` (by how
            much the best eligible subset is better, on the same folds) and its `below_best_se`,
            `eligible` (holds every must-have, is not too large and no control), `chosen`. Errors
            are those of the delete-one-state jackknife.
        collinear: pairs of covariates that say the same: see `collinear_pairs`.
        inflation: one row per covariate: `covariate`, `alone_r2_within`, `inflation` (see
            `variance_inflation`; both null for one that is the same in all states).
        sums: what `bootstrap_r2` needs, per subset tried; controls apart.
    """

    chosen: tuple[str, ...]
    table: pl.DataFrame
    collinear: pl.DataFrame
    inflation: pl.DataFrame
    sums: dict[tuple[str, ...], WithinSums]


def choose_covariates(
    runs: RunTable,
    make_estimator: Callable[[], EffectEstimator],
    *,
    n_folds: int = 5,
    seed: int = 0,
    max_covariates: int = 8,
    must_have: Sequence[str] = (),
    n_permutations: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> CovariateChoice:
    """Choose covariates by R2 within unseen pool states.

    Forward selection starts from the must-haves and adds whichever covariate helps most, until
    nothing has helped twice in a row. None, each alone and all are tried as well. A covariate that
    is the same in all states isn't a candidate.

    Args:
        runs: the proxy runs, with every covariate that may be chosen.
        make_estimator: returns a fresh, unfitted estimator; the structured ridge is fast enough
            for some hundred subsets.
        n_folds: folds of whole states, the same for every subset.
        seed: of the folds and the permutations.
        max_covariates: largest subset that forward selection tries and that may be chosen.
        must_have: covariates that every chosen subset holds.
        n_permutations: permutations that a control is averaged over.
        on_progress: called with the subsets done and the most there will be.

    Raises:
        EstimationError: if no covariate varies, a must-have is none that does, or the runs have
            too few states.
    """
    check_runs(runs, minimum_states=MINIMUM_STATES)
    given, runs = runs, with_covariates(runs, _varying(runs))
    must = _in_order(runs, must_have)
    _check_sizes(runs, must, max_covariates)
    fold_N = assign_folds(runs, n_folds, seed)
    sums: dict[tuple[str, ...], WithinSums] = {}
    at_most = _n_at_most(len(runs.covariates), len(must), max_covariates, n_permutations)
    done = 0

    def score(names: tuple[str, ...], table: RunTable = runs) -> WithinSums:
        nonlocal done
        part = with_covariates(table, names)
        result = r2_within_by_state(part, _predict_unseen(part, make_estimator, fold_N))
        done += 1
        if on_progress:
            on_progress(done, at_most)
        return result

    def try_subset(names: tuple[str, ...]) -> float:
        if names not in sums:
            sums[names] = score(names)
        return sums[names].r2

    for names in [(), *((name,) for name in runs.covariates), runs.covariates, must]:
        try_subset(names)
    _search_forward(runs, try_subset, must, max_covariates)
    eligible = [k for k in sums if set(must) <= set(k) and len(k) <= max_covariates]
    best = max(eligible, key=lambda names: sums[names].r2)
    chosen = _smallest_as_good(sums, eligible, best)
    controls = {}
    for names in dict.fromkeys([runs.covariates, chosen]):
        if names:
            controls[names] = _permuted(runs, names, score, seed, n_permutations)
    alone = {name: sums[name,].r2 for name in runs.covariates}
    inflation = variance_inflation(given)
    return CovariateChoice(
        chosen,
        _table(runs, sums, controls, eligible, best, chosen),
        collinear_pairs(runs, prefer={**alone, **dict.fromkeys(must, np.inf)}),
        inflation.with_columns(
            alone_r2_within=pl.col("covariate").replace_strict(
                alone, default=None, return_dtype=pl.Float64
            )
        ).select("covariate", "alone_r2_within", "inflation"),
        sums,
    )


def with_covariates(runs: RunTable, names: Sequence[str]) -> RunTable:
    """The same runs with only the covariates `names`; without any, with one that never varies.

    Every estimator takes a covariate that never varies for none, also those that need one.

    Raises:
        EstimationError: if a name isn't a covariate of the runs.
    """
    if not names:
        shape = (*runs.mixture_ND.shape, 1)
        return replace(runs, covariates=("constant",), state_NDP=np.zeros(shape))
    unknown = [name for name in names if name not in runs.covariates]
    if unknown:
        raise EstimationError(
            f"covariates must be among those of the run table ({', '.join(runs.covariates)}), "
            f"got {', '.join(unknown)}: correct the name or measure it in the pool states."
        )
    columns = [runs.covariates.index(name) for name in names]
    return replace(runs, covariates=tuple(names), state_NDP=runs.state_NDP[:, :, columns])


def r2_within_by_state(runs: RunTable, prediction_NT: np.ndarray) -> WithinSums:
    """What each state adds to R2 within unseen states.

    Args:
        runs: the proxy runs.
        prediction_NT: outcomes predicted while the run's state was left out; shape (N, T).

    Returns:
        Sums over the runs of each state, states ascending.

    Raises:
        EstimationError: if no task varies within a state.
    """
    observed_NT = center_by_state(runs.outcome_NT, runs.groups)
    error_NT = observed_NT - center_by_state(prediction_NT, runs.groups)
    total_T = (observed_NT**2).sum(axis=0)
    varies_T = total_T > RELATIVE_FLOOR**2 * runs.n_runs
    if not varies_T.any():
        raise EstimationError(
            f"outcomes must vary between mixtures of one pool state, got {runs.n_runs} runs of "
            f"{runs.n_states} states without: train at least two mixtures per state."
        )
    ids, inverse_N = np.unique(runs.groups, return_inverse=True)
    sums = np.zeros((2, len(ids), len(runs.tasks)))
    np.add.at(sums[0], inverse_N, error_NT**2)
    np.add.at(sums[1], inverse_N, observed_NT**2)
    return WithinSums(sums[0][:, varies_T], sums[1][:, varies_T])


def bootstrap_r2(
    sums: WithinSums,
    n: int = 2000,
    seed: int = 0,
    *,
    level: float = 0.9,
    minus: WithinSums | None = None,
) -> tuple[float, float]:
    """A bootstrap interval over states of R2 within unseen states, mean over tasks.

    States are drawn with replacement; the out-of-fold predictions stay what they are, so the
    interval doesn't hold what other training states would have changed.

    Args:
        sums: of the predictions in question.
        n: draws.
        seed: of the draws; the same states are drawn for the same seed and number of states.
        level: share of the draws inside, 0..1.
        minus: other predictions for the same runs; the interval is then of the difference.

    Returns:
        The lower and the upper end.
    """
    n_states = len(sums.total_ST)
    rng = np.random.default_rng(seed)
    times_BS = rng.multinomial(n_states, np.full(n_states, 1 / n_states), size=n).astype(float)
    r2_B = _r2(times_BS @ sums.error_ST, times_BS @ sums.total_ST)
    if minus is not None:
        r2_B = r2_B - _r2(times_BS @ minus.error_ST, times_BS @ minus.total_ST)
    low, high = np.quantile(r2_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def collinear_pairs(
    runs: RunTable, *, limit: float = COLLINEAR, prefer: dict[str, float] | None = None
) -> pl.DataFrame:
    """Pairs of covariates that rank or place the runs' states alike.

    Args:
        runs: the proxy runs; each state counts once.
        limit: smallest size of either correlation.
        prefer: worth of each covariate; of a pair, the one worth less is to be dropped, the later
            one if they are worth the same.

    Returns:
        Columns `first`, `second`, `pearson`, `spearman` (mean size over the domains in which both
        vary), `drop`; the most alike first.
    """
    from scipy.stats import rankdata

    _, state_SDP = runs.distinct_states()
    worth = prefer or {}
    pearson_PP = _mean_correlation(state_SDP)
    spearman_PP = _mean_correlation(rankdata(_rounded(state_SDP), axis=0))
    rows = []
    for p, first in enumerate(runs.covariates):
        for q, second in enumerate(runs.covariates[p + 1 :], start=p + 1):
            sizes = (float(pearson_PP[p, q]), float(spearman_PP[p, q]))
            if max(sizes) >= limit:
                drop = first if worth.get(first, 0.0) < worth.get(second, 0.0) else second
                rows.append((first, second, *sizes, drop))
    schema = {
        "first": pl.String,
        "second": pl.String,
        "pearson": pl.Float64,
        "spearman": pl.Float64,
        "drop": pl.String,
    }
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.sort(pl.max_horizontal("pearson", "spearman"), descending=True)


def variance_inflation(runs: RunTable) -> pl.DataFrame:
    """By how much the other covariates of a domain inflate the variance of each one's slope.

    The factor is 1 / (1 - R2) of the covariate regressed on the domain's others over the distinct
    states, R2 adjusted for their number; 1 if they tell nothing of it. Infinite if they tell all.

    Returns:
        Columns `covariate`, `inflation` (median over the domains in which it varies; null if it
        never does, or if there are too few states to tell).
    """
    _, state_SDP = runs.distinct_states()
    n_states, _, n_covariates = state_SDP.shape
    factor_DP = np.full(state_SDP.shape[1:], np.nan)
    for d in range(state_SDP.shape[1]):
        varies_P = _varies(state_SDP[:, d])
        free = n_states - int(varies_P.sum())
        if free < 1:
            continue
        for p in np.flatnonzero(varies_P):
            others_P = varies_P & (np.arange(n_covariates) != p)
            factor_DP[d, p] = _inflation(state_SDP[:, d, p], state_SDP[:, d, others_P])
    inflation = [
        float(np.median(known)) if len(known := column_D[~np.isnan(column_D)]) else None
        for column_D in factor_DP.T
    ]
    return pl.DataFrame(
        {"covariate": runs.covariates, "inflation": inflation},
        schema={"covariate": pl.String, "inflation": pl.Float64},
    )


def _in_order(runs: RunTable, names: Sequence[str]) -> tuple[str, ...]:
    if names:
        with_covariates(runs, names)
    return tuple(name for name in runs.covariates if name in names)


def _varying(runs: RunTable) -> tuple[str, ...]:
    """The covariates that vary between states in some domain."""
    _, state_SDP = runs.distinct_states()
    varies_P = _varies(state_SDP).any(axis=0)
    names = tuple(np.array(runs.covariates, dtype=object)[varies_P].tolist())
    if not names:
        raise EstimationError(
            "a choice of covariates needs one that varies between pool states, got "
            f"{', '.join(runs.covariates) or 'no covariate'}: measure others, or widen the states."
        )
    return names


def _check_sizes(runs: RunTable, must: tuple[str, ...], max_covariates: int) -> None:
    if max_covariates < max(1, len(must)):
        raise EstimationError(
            f"max_covariates must be at least 1 and hold the {len(must)} of must_have, got "
            f"{max_covariates}: raise it or drop a must-have."
        )


def _n_at_most(n_covariates: int, n_must: int, max_covariates: int, n_permutations: int) -> int:
    """Fits of a search that never ends early."""
    steps = range(n_must, min(max_covariates, n_covariates))
    return n_covariates + 3 + sum(n_covariates - size for size in steps) + 2 * n_permutations


def _predict_unseen(
    runs: RunTable, make: Callable[[], EffectEstimator], fold_N: np.ndarray
) -> np.ndarray:
    """Out-of-fold predictions as in `cross_validate`, without the scores and their jackknives."""
    prediction_NT = np.full(runs.outcome_NT.shape, np.nan)
    for fold in np.unique(fold_N):
        estimator = make().fit(runs.subset(fold_N != fold))
        for state in np.unique(runs.state_ids[fold_N == fold]):
            rows = np.flatnonzero(runs.state_ids == state)
            prediction_NT[rows] = estimator.predict(runs.state_NDP[rows[0]], runs.mixture_ND[rows])
    return prediction_NT


def _search_forward(
    runs: RunTable,
    try_subset: Callable[[tuple[str, ...]], float],
    start: tuple[str, ...],
    max_covariates: int,
) -> None:
    current, best, stalled = start, try_subset(start), 0
    while len(current) < min(max_covariates, len(runs.covariates)) and stalled < PATIENCE:
        larger = [
            tuple(name for name in runs.covariates if name in {*current, new})
            for new in runs.covariates
            if new not in current
        ]
        scores = [try_subset(names) for names in larger]
        current = larger[int(np.argmax(scores))]
        stalled = 0 if max(scores) > best else stalled + 1
        best = max(best, *scores)


def _smallest_as_good(
    sums: dict[tuple[str, ...], WithinSums],
    eligible: list[tuple[str, ...]],
    best: tuple[str, ...],
) -> tuple[str, ...]:
    as_good = [
        names
        for names in eligible
        if sums[best].r2 - sums[names].r2 <= _jackknife(sums[best], sums[names])
    ]
    return min(as_good, key=lambda names: (len(names), -sums[names].r2))


def _jackknife(sums: WithinSums, minus: WithinSums | None = None) -> float:
    left_out_S = sums.left_out_r2_S - (0.0 if minus is None else minus.left_out_r2_S)
    n_states = len(left_out_S)
    return float(np.sqrt((n_states - 1) * np.mean((left_out_S - left_out_S.mean()) ** 2)))


def _permuted(
    runs: RunTable,
    names: tuple[str, ...],
    score: Callable[[tuple[str, ...], RunTable], WithinSums],
    seed: int,
    n_permutations: int,
) -> WithinSums:
    """The control: R2 is linear in the errors, so their mean gives the mean over permutations."""
    rng = np.random.default_rng(seed)
    parts = [score(names, permute_states(runs, rng)) for _ in range(n_permutations)]
    return WithinSums(np.mean([part.error_ST for part in parts], axis=0), parts[0].total_ST)


def _table(
    runs: RunTable,
    sums: dict[tuple[str, ...], WithinSums],
    controls: dict[tuple[str, ...], WithinSums],
    eligible: list[tuple[str, ...]],
    best: tuple[str, ...],
    chosen: tuple[str, ...],
) -> pl.DataFrame:
    kinds = {names: "alone" if len(names) == 1 else "forward" for names in sums}
    kinds |= {runs.covariates: "all", (): "none"}
    rows = [
        {
            "kind": kind,
            "covariates": list(names),
            "size": len(names),
            "r2_within": part.r2,
            "r2_within_se": _jackknife(part),
            "below_best": sums[best].r2 - part.r2,
            "below_best_se": _jackknife(sums[best], part),
            "eligible": kind != "permuted" and names in eligible,
            "chosen": kind != "permuted" and names == chosen,
        }
        for kind, names, part in [
            *((kinds[names], names, part) for names, part in sums.items()),
            *(("permuted", names, part) for names, part in controls.items()),
        ]
    ]
    frame = pl.DataFrame(rows, schema_overrides={"covariates": pl.List(pl.String)})
    return frame.sort("r2_within", descending=True, maintain_order=True)


def _r2(error: np.ndarray, total: np.ndarray) -> np.ndarray:
    """1 - error / total, mean over the last axis, the tasks."""
    return 1.0 - (error / total).mean(axis=-1)


def _varies(values_SP: np.ndarray) -> np.ndarray:
    return values_SP.std(axis=0) > RELATIVE_FLOOR * (1 + np.abs(values_SP.mean(axis=0)))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Values to 12 digits of the largest, so that dust of computing makes no ranks."""
    scale = np.maximum(np.abs(values).max(axis=0), np.finfo(float).tiny)
    return np.round(values / scale, 12)


def _mean_correlation(values_SDP: np.ndarray) -> np.ndarray:
    """Size of the correlation of each pair, mean over the domains in which both vary; (P, P)."""
    total_PP, n_PP = np.zeros((2, *[values_SDP.shape[2]] * 2))
    for d in range(values_SDP.shape[1]):
        varies_P = _varies(values_SDP[:, d])
        centered_SP = values_SDP[:, d] - values_SDP[:, d].mean(axis=0)
        size_P = np.where(varies_P, np.sqrt((centered_SP**2).sum(axis=0)), np.inf)
        scaled_SP = centered_SP / size_P
        total_PP += np.abs(scaled_SP.T @ scaled_SP)
        n_PP += np.outer(varies_P, varies_P)
    return total_PP / np.maximum(n_PP, 1)


def _inflation(value_S: np.ndarray, other_SQ: np.ndarray) -> float:
    n_states, n_others = other_SQ.shape
    value_S = value_S - value_S.mean()
    scaled_SQ = (other_SQ - other_SQ.mean(axis=0)) / other_SQ.std(axis=0)
    slope_Q = np.linalg.lstsq(scaled_SQ, value_S, rcond=None)[0]
    unexplained = float(np.sum((value_S - scaled_SQ @ slope_Q) ** 2) / np.sum(value_S**2))
    adjusted = unexplained * (n_states - 1) / (n_states - 1 - n_others)
    return max(1.0, 1.0 / adjusted) if adjusted > RELATIVE_FLOOR else float("inf")
