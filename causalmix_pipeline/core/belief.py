"""When to believe an estimate: overlap, noise floor, confounding, placebo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from causalmix_pipeline.core.effects import (
    RELATIVE_FLOOR,
    EffectEstimator,
    Gain,
    StateScaler,
    assign_folds,
    center_by_state,
    cross_validate,
    permute_mixtures,
    permute_states,
)
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import SIZE_COVARIATE, RunTable
from causalmix_pipeline.core.scale import SizeReach, size_reach, without_size

#: Nearest states that a new state is compared with.
NEIGHBOURS = 5

#: Fewest states that give a distance to 5 others a distribution.
MINIMUM_OVERLAP_STATES = NEIGHBOURS + 2

#: Exponent of the mean over domains. At 1 a shift of one domain drowns among the others (a shift by
#: 3 standard deviations scores above 1.5 in 1-17% of states), at 4 it doesn't (74-98%) and a shift
#: of all domains is still seen (AUC .97 at 1 standard deviation, .93 for the farthest domain).
DOMAIN_EXPONENT = 4.0

#: Quantile of the runs' own distances up to which a state is `supported`.
SUPPORTED_QUANTILE = 0.95

#: Multiple of that distance up to which a state is `extrapolating`, beyond it `unsupported`: about
#: where every covariate lies 4 standard deviations off. Up to there the mixture recommended by the
#: rule below beat the reference in 96% of simulated pools (`docs/RESULTS.md`).
UNSUPPORTED_FACTOR = 4.0

#: Score of the farthest state that effects are read at. Read on without end, gains at 4 standard
#: deviations were promised .5 sd higher, and regret was .63 against .50 (`docs/RESULTS.md`).
EDGE_SCORE = 2.0

#: Runs at a pool out of reach that cut the regret by half at a shift of 2.5 standard deviations.
TOP_UP_RUNS = 16

#: Steps on the way that are looked at, and bisections between the last two.
_EDGE_STEPS = 20

#: How far a covariate that never varied among the runs may move before its state counts as
#: extrapolating: a share of its value, or this much where it was 0.
CONSTANT_TOLERANCE = 0.01

#: Out-of-fold R2 of the treatment given the covariates above which runs are observational.
OBSERVATIONAL_R2 = 0.2

#: Ridge penalties tried for the treatment given the covariates, per run.
_TREATMENT_PENALTIES = (0.03, 0.3, 3.0)


@dataclass(frozen=True, eq=False)
class Overlap:
    """How near a pool state is to those of the proxy runs.

    Attributes:
        score: distance to the nearest states over the runs' 95th percentile of the same distance,
            each run's own state left out; up to 1 is supported, beyond 4 unsupported.
        verdict: `supported`, `extrapolating` or `unsupported`. Where the runs tell sizes, a pool
            that is supported is `extrapolating` for a model larger or smaller than any of them.
        pool_verdict: the same for the pool alone, whatever the size of the model.
        domain_score_D: the same for each domain alone; shape (D,). Says which domain is far.
        drift: one row per covariate: `domain`, `covariate`, `value`, the runs' `least`, `most`,
            `mean`, `z` (standard deviations from the mean; null where it never varied), and
            `inside` (whether the value lies within the runs' reach).
        edge_DP: the state that effects are read at: the state itself up to a score of 2, else the
            first one so near on the way from it to the mean of the runs' states (or to the
            nearest of them, where none is on that way). Straight on, effects grow without end and
            promise what no run has shown; shape (D, P).
        size: how far the model's size is from the runs'; None where they don't tell sizes.
    """

    score: float
    verdict: str
    pool_verdict: str
    domain_score_D: np.ndarray
    drift: pl.DataFrame
    edge_DP: np.ndarray
    size: SizeReach | None = None

    @property
    def pool_doubt(self) -> float:
        """What a trust radius is divided by: 1 within reach, beyond it the score.

        Another size is no reason for a shorter step: mixtures carry over better than gains do.
        """
        return max(1.0, self.score)

    @property
    def doubt(self) -> float:
        """What the standard errors of gains are multiplied by: doubt of the pool and of the size.

        1 within reach, beyond it the score: so widened, 90% intervals covered 84% to 99% of the
        true gains at shifts of 1 to 4 standard deviations, and 60% to 76% as they were.
        """
        return self.pool_doubt * (1.0 if self.size is None else self.size.doubt)


def overlap(
    state_DP: np.ndarray,
    state_SDP: np.ndarray,
    domains: tuple[str, ...] | None = None,
    covariates: tuple[str, ...] | None = None,
    group_S: np.ndarray | None = None,
) -> Overlap:
    """Compare a new pool state with the distinct states of the runs.

    Each domain's distance to its 5 nearest states (root mean square over standardised covariates)
    is divided by the same distance among the runs, and the domains are joined by a power mean.

    Args:
        state_DP: covariates of the new state, as measured; shape (D, P).
        state_SDP: covariates of the distinct states of the runs; shape (S, D, P), S >= 7.
        domains: names for the drift table; numbers where not given.
        covariates: the same.
        group_S: which states are of one pool, such as its checkpoints; None where each is its own.
            Of a group the nearest state counts alone, and a state's own group isn't compared with:
            else twins would be near to each other, and every new pool far.

    Raises:
        EstimationError: if there are too few states, the shapes differ, a value isn't finite, or
            there is no covariate.
    """
    state_DP, state_SDP = np.asarray(state_DP, dtype=float), np.asarray(state_SDP, dtype=float)
    _check_states(state_DP, state_SDP, group_S)
    reach = _Reach.of(state_SDP, group_S)
    score = reach.score(state_DP)
    verdict = _verdict(score, _moved_constant(state_DP, reach.scaler))
    return Overlap(
        score=score,
        verdict=verdict,
        pool_verdict=verdict,
        domain_score_D=reach.domain_scores(state_DP),
        drift=_drift(state_DP, state_SDP, reach.scaler, domains, covariates),
        edge_DP=reach.edge(state_DP),
    )


def reach_of(runs: RunTable, state_DP: np.ndarray) -> Overlap:
    """`overlap` with the states of the runs, each counted by its mixtures; never far without any.

    Without covariates all pools are alike, and every one is supported. The size of the model is
    none of the pool: it has a distance of its own.
    """
    size = size_reach(runs, state_DP)
    if size is not None:
        return _reach_of_size(runs, state_DP, size)
    if runs.covariates:
        states, groups = runs.weighed_states(), runs.weighed_groups()
        return overlap(state_DP, states, runs.domains, runs.covariates, groups)
    near, nowhere_D = "supported", np.zeros(len(runs.domains))
    return Overlap(0.0, near, near, nowhere_D, pl.DataFrame(), np.asarray(state_DP, dtype=float))


def _reach_of_size(runs: RunTable, state_DP: np.ndarray, size: SizeReach) -> Overlap:
    """The pool's reach by its own covariates, joined with the size's."""
    column = runs.covariates.index(SIZE_COVARIATE)
    pool = reach_of(without_size(runs), np.delete(state_DP, column, axis=1))
    is_beyond = pool.verdict == "supported" and size.distance > 0
    return replace(
        pool,
        verdict="extrapolating" if is_beyond else pool.verdict,
        edge_DP=np.insert(pool.edge_DP, column, size.read_at, axis=1),
        size=size,
    )


@dataclass(frozen=True, eq=False)
class _Reach:
    """How far the runs' states lie apart: the yardstick of a new state's distance."""

    scaler: StateScaler
    state_SDP: np.ndarray
    scaled_SDP: np.ndarray
    own_SD: np.ndarray
    group_S: np.ndarray | None = None

    @classmethod
    def of(cls, state_SDP: np.ndarray, group_S: np.ndarray | None = None) -> _Reach:
        scaler = StateScaler.fit(state_SDP)
        scaled_SDP = scaler.transform(state_SDP)
        if group_S is None:
            return cls(scaler, state_SDP, scaled_SDP, _nearest(scaled_SDP, scaled_SDP, skip=1))
        own_SD = _nearest_groups(scaled_SDP, scaled_SDP, group_S, group_S)
        return cls(scaler, state_SDP, scaled_SDP, own_SD, group_S)

    def score(self, state_DP: np.ndarray) -> float:
        typical_D = self.own_SD.mean(axis=0)
        safe_D = np.where(typical_D > 0, typical_D, 1.0)
        limit = np.quantile(_join(self.own_SD / safe_D), SUPPORTED_QUANTILE)
        return float(_join(self._distance_D(state_DP) / safe_D) / limit) if limit > 0 else 0.0

    def domain_scores(self, state_DP: np.ndarray) -> np.ndarray:
        limit_D = np.quantile(self.own_SD, SUPPORTED_QUANTILE, axis=0)
        return self._distance_D(state_DP) / np.where(limit_D > 0, limit_D, 1.0)

    def edge(self, state_DP: np.ndarray) -> np.ndarray:
        if self.score(state_DP) <= EDGE_SCORE:
            return state_DP
        # The score needn't fall all the way: between two kinds of pools nothing is near.
        center_DP = self.scaler.mean_DP
        if not self._inside(center_DP, state_DP).any():
            center_DP = self._nearest_state(state_DP)
        inside = np.flatnonzero(self._inside(center_DP, state_DP))
        low, high = (1 - inside[0] / _EDGE_STEPS), (1 - (inside[0] - 1) / _EDGE_STEPS)
        for _ in range(_EDGE_STEPS):
            middle = (low + high) / 2
            near = self.score(center_DP + middle * (state_DP - center_DP)) <= EDGE_SCORE
            low, high = (middle, high) if near else (low, middle)
        return center_DP + low * (state_DP - center_DP)

    def _inside(self, center_DP: np.ndarray, state_DP: np.ndarray) -> np.ndarray:
        """Whether steps from the state to the center are near enough; (steps + 1,) booleans."""
        part = np.linspace(1, 0, _EDGE_STEPS + 1)
        path = center_DP + part[:, None, None] * (state_DP - center_DP)
        return np.array([self.score(step_DP) <= EDGE_SCORE for step_DP in path])

    def _nearest_state(self, state_DP: np.ndarray) -> np.ndarray:
        """Of the runs' states that have others near them, the one nearest to the state."""
        distance_S = ((self.scaled_SDP - self.scaler.transform(state_DP)) ** 2).sum(axis=(1, 2))
        scores = [self.score(one_DP) for one_DP in self.state_SDP]
        return self.state_SDP[np.argmin(np.where(np.array(scores) <= 1, distance_S, np.inf))]

    def _distance_D(self, state_DP: np.ndarray) -> np.ndarray:
        scaled_1DP = self.scaler.transform(state_DP)[None]
        if self.group_S is None:
            return _nearest(scaled_1DP, self.scaled_SDP, skip=0)[0]
        return _nearest_groups(scaled_1DP, self.scaled_SDP, self.group_S)[0]


def noise_floor(runs: RunTable) -> pl.DataFrame:
    """Compare what mixtures do with what seeds do.

    Args:
        runs: the proxy runs, some of which share (state, mixture) and differ by seed.

    Returns:
        One row per task: `mixture_variance` (between mixtures of one state, seed noise taken
        off), `seed_variance` (between runs of one cell), `ratio` of the two, their degrees of
        freedom `mixture_df` and `seed_df`, and `above_noise` (an F test at 5%). Without repeated
        runs `seed_variance`, `ratio` and `above_noise` are null.
    """
    from scipy.stats import f as f_distribution

    _, first, inverse_N = np.unique(runs.repeat_of_N, return_index=True, return_inverse=True)
    within_cell_NT = center_by_state(runs.outcome_NT, inverse_N)
    cell_NT = center_by_state(runs.outcome_NT[first], runs.state_ids[first])
    seed_df = runs.n_runs - len(first)
    mixture_df = len(first) - len(np.unique(runs.state_ids[first]))
    rows = []
    for t, task in enumerate(runs.tasks):
        between = float(cell_NT[:, t] @ cell_NT[:, t]) / mixture_df if mixture_df else None
        seed = float(within_cell_NT[:, t] @ within_cell_NT[:, t]) / seed_df if seed_df else None
        mixture = None if between is None else max(between - (seed or 0.0), 0.0)
        ratio = above = None
        if mixture is not None and between is not None and seed is not None:
            ratio = mixture / seed if seed > 0 else float("inf")
            above = between > seed * float(f_distribution.ppf(0.95, mixture_df, seed_df))
        rows.append((task, mixture, seed, ratio, mixture_df, seed_df, above))
    schema = {
        "task": pl.String,
        "mixture_variance": pl.Float64,
        "seed_variance": pl.Float64,
        "ratio": pl.Float64,
        "mixture_df": pl.Int64,
        "seed_df": pl.Int64,
        "above_noise": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


@dataclass(frozen=True)
class Confounding:
    """How well the covariates tell the mixture: it should be not at all.

    Attributes:
        r2: out-of-fold R2 of the treatment given the covariates; at most about 0 by design.
        observational: whether it is above `OBSERVATIONAL_R2`: intervals are uncalibrated then.
    """

    r2: float
    observational: bool


def confounding(runs: RunTable, n_folds: int = 5, seed: int = 0) -> Confounding:
    """Predict the treatment sqrt(share) from the covariates by ridge, folds of whole states.

    The best of three penalties counts, so the R2 is, if anything, too large. A confounder that
    isn't among the covariates can't be found this way or any other.
    """
    if not runs.covariates or runs.n_states < n_folds:
        return Confounding(0.0, False)
    runs = runs.sorted_by_run()
    scaler = StateScaler.fit(runs.distinct_states()[1])
    state_NC = scaler.transform(runs.state_NDP).reshape(runs.n_runs, -1)
    root_ND = np.sqrt(np.clip(runs.mixture_ND, 0, None))
    fold_N = assign_folds(runs, n_folds, seed)
    total = float(np.sum((root_ND - root_ND.mean(axis=0)) ** 2))
    if total <= RELATIVE_FLOOR:
        return Confounding(0.0, False)
    scores = []
    for penalty in _TREATMENT_PENALTIES:
        error = sum(
            _ridge_error(state_NC, root_ND, fold_N == fold, penalty) for fold in np.unique(fold_N)
        )
        scores.append(1 - error / total)
    r2 = float(max(scores))
    return Confounding(r2, r2 > OBSERVATIONAL_R2)


def placebo(
    make: Callable[[], EffectEstimator], runs: RunTable, n_folds: int = 5, seed: int = 0
) -> pl.DataFrame:
    """Correlate out-of-fold predictions with outcomes within states, really and by placebo.

    Args:
        make: returns a fresh, unfitted estimator.
        runs: the proxy runs, at least two mixtures in some states.
        n_folds: folds of whole states.
        seed: of folds and permutations.

    Returns:
        One row per task: `real`, `states_permuted` (covariates of another state: what is left is
        the effect that all states share) and `mixtures_permuted` (no effect at all: about 0).
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, object] = {"task": list(runs.tasks)}
    tables = {
        "real": runs,
        "states_permuted": permute_states(runs, rng),
        "mixtures_permuted": permute_mixtures(runs, rng),
    }
    for name, table in tables.items():
        prediction_NT = cross_validate(make, table, n_folds, seed).prediction_NT
        columns[name] = _correlation_within(table, prediction_NT)
    return pl.DataFrame(columns)


def gain_interval(gain: Gain, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper end of the normal interval of each gain; shapes (M, T).

    Raises:
        EstimationError: if the level isn't between 0 and 1.
    """
    from scipy.special import ndtri

    if not 0 < level < 1:
        raise EstimationError(
            f"level must lie between 0 and 1, got {level}: .9 asks for a 90% interval."
        )
    half_MT = float(ndtri(0.5 + level / 2)) * gain.se_MT
    return gain.mean_MT - half_MT, gain.mean_MT + half_MT


def _check_states(state_DP: np.ndarray, state_SDP: np.ndarray, group_S: np.ndarray | None) -> None:
    if state_SDP.ndim != 3 or state_SDP.shape[1:] != state_DP.shape or not state_DP.size:
        raise EstimationError(
            "the new state must have the shape (domains, covariates) of the runs' states, at "
            f"least one each, got {state_DP.shape} against {state_SDP.shape[1:]}: measure the "
            "same covariates of the same domains."
        )
    n_pools = len(state_SDP) if group_S is None else len(np.unique(group_S))
    if n_pools < MINIMUM_OVERLAP_STATES:
        raise EstimationError(
            f"overlap needs at least {MINIMUM_OVERLAP_STATES} distinct pool states, got "
            f"{n_pools}: add proxy runs of other states."
        )
    if not (np.isfinite(state_DP).all() and np.isfinite(state_SDP).all()):
        raise EstimationError(
            "covariates must be finite numbers, got nan or infinity: a domain without usable text "
            "has none; leave the domain out, or give it text."
        )


def _nearest(scaled_MDP: np.ndarray, scaled_SDP: np.ndarray, *, skip: int) -> np.ndarray:
    """Mean distance to the nearest states, per domain; shape (M, D). `skip` leaves itself out."""
    squared_MSD = ((scaled_MDP[:, None] - scaled_SDP[None]) ** 2).mean(axis=3)
    nearest_MSD = np.sqrt(np.sort(squared_MSD, axis=1))
    return nearest_MSD[:, skip : skip + NEIGHBOURS].mean(axis=1)


def _nearest_groups(
    scaled_MDP: np.ndarray,
    scaled_SDP: np.ndarray,
    group_S: np.ndarray,
    own_M: np.ndarray | None = None,
) -> np.ndarray:
    """`_nearest`, with the nearest state of each group alone; own groups are left out."""
    squared_MSD = ((scaled_MDP[:, None] - scaled_SDP[None]) ** 2).mean(axis=3)
    if own_M is not None:
        squared_MSD[own_M[:, None] == group_S[None]] = np.inf
    groups = [squared_MSD[:, group_S == group].min(axis=1) for group in np.unique(group_S)]
    nearest_MGD = np.sqrt(np.sort(np.stack(groups, axis=1), axis=1))
    return nearest_MGD[:, :NEIGHBOURS].mean(axis=1)


def _join(ratio_MD: np.ndarray) -> np.ndarray:
    return np.mean(ratio_MD**DOMAIN_EXPONENT, axis=-1) ** (1 / DOMAIN_EXPONENT)


def _moved_constant(state_DP: np.ndarray, scaler: StateScaler) -> bool:
    size_DP = np.where(scaler.mean_DP == 0, 1.0, np.abs(scaler.mean_DP))
    moved_DP = np.abs(state_DP - scaler.mean_DP) > CONSTANT_TOLERANCE * size_DP
    return bool((moved_DP & ~scaler.kept_DP).any())


def _verdict(score: float, moved_constant: bool) -> str:
    if score > UNSUPPORTED_FACTOR:
        return "unsupported"
    return "extrapolating" if score > 1 or moved_constant else "supported"


def _drift(
    state_DP: np.ndarray,
    state_SDP: np.ndarray,
    scaler: StateScaler,
    domains: tuple[str, ...] | None,
    covariates: tuple[str, ...] | None,
) -> pl.DataFrame:
    n_domains, n_covariates = state_DP.shape
    domains = domains or tuple(str(d) for d in range(n_domains))
    covariates = covariates or tuple(str(p) for p in range(n_covariates))
    least_DP, most_DP = state_SDP.min(axis=0), state_SDP.max(axis=0)
    slack_DP = RELATIVE_FLOOR * (1 + np.abs(scaler.mean_DP))
    inside_DP = (state_DP >= least_DP - slack_DP) & (state_DP <= most_DP + slack_DP)
    z_DP = scaler.transform(state_DP)
    frame = pl.DataFrame(
        {
            "domain": np.repeat(np.array(domains, dtype=str), n_covariates),
            "covariate": list(covariates) * n_domains,
            "value": state_DP.ravel(),
            "least": least_DP.ravel(),
            "most": most_DP.ravel(),
            "mean": scaler.mean_DP.ravel(),
            "z": [
                float(z) if kept else None
                for z, kept in zip(z_DP.ravel(), scaler.kept_DP.ravel(), strict=True)
            ],
            "inside": inside_DP.ravel(),
        },
        schema_overrides={"z": pl.Float64},
    )
    return frame


def _ridge_error(
    state_NC: np.ndarray, root_ND: np.ndarray, left_out_N: np.ndarray, penalty: float
) -> float:
    """Squared error of the treatment of left-out runs, by a ridge in its kernel form."""
    inputs, outputs = state_NC[~left_out_N], root_ND[~left_out_N]
    mean_C, mean_D = inputs.mean(axis=0), outputs.mean(axis=0)
    centered = inputs - mean_C
    kernel = centered @ centered.T + penalty * len(centered) * np.eye(len(centered))
    dual = np.linalg.solve(kernel, outputs - mean_D)
    predicted = mean_D + (state_NC[left_out_N] - mean_C) @ (centered.T @ dual)
    return float(np.sum((root_ND[left_out_N] - predicted) ** 2))


def _correlation_within(runs: RunTable, prediction_NT: np.ndarray) -> list[float]:
    observed_NT = center_by_state(runs.outcome_NT, runs.state_ids)
    predicted_NT = center_by_state(prediction_NT, runs.state_ids)
    size_T = np.sqrt((observed_NT**2).sum(axis=0) * (predicted_NT**2).sum(axis=0))
    product_T = (observed_NT * predicted_NT).sum(axis=0)
    return [
        float(product / size) if size > 0 else float("nan")
        for product, size in zip(product_T, size_T, strict=True)
    ]
