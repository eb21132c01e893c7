"""Whether stages want mixtures of their own: two tests, one of them with a placebo.

That the order of a run's mixtures tells its outcome isn't enough: where later stages weigh more but
want what the earlier ones want, it does, and one mixture is still the best in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import StateScaler, center_by_state
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stages import StagedRuns

#: Placebos with permuted stages; the least p value is one over one more.
N_PLACEBOS = 49
#: Largest p value at which the stage is said to matter.
STAGE_P = 0.05
#: Fewest pool states with two runs or more: with fewer, nothing can be told.
FEWEST_STATES = 7
#: Prior variances tried of what a stage's place adds, that of what all stages do being 1.
_ORDER_WEIGHTS = (0.1, 0.5)
#: Prior variances tried of what each stage adds of its own, that of what they share being 1.
_OWN_WEIGHTS = (0.1, 0.5)
#: Folds of pool states of the second test, and rounds of its alternating least squares.
_FOLDS, _ROUNDS = 10, 4
#: Ridge penalties tried, relative to the mean eigenvalue.
_PENALTIES = tuple(10.0 ** np.arange(-3, 2.1, 0.5))


@dataclass(frozen=True)
class StageTrial:
    """Whether stages want mixtures of their own, for the objective.

    Attributes:
        r2_without: share of the variance within unseen pool states that mixtures explain whatever
            their order.
        r2_with: that they explain by their order as well.
        p: share of placebos, the real runs among them, that gain as much from the order.
        n_placebos: placebos tried.
        r2_scaled: share that is explained if stages differ by how much they weigh, and else have
            the same effects.
        r2_own: share that is explained if each has effects of its own.
        p_own: of the t test, over pool states, that own effects leave a smaller error.
        reason: why it can't be told; empty where it can.
    """

    r2_without: float
    r2_with: float
    p: float
    n_placebos: int
    r2_scaled: float
    r2_own: float
    p_own: float
    reason: str = ""

    @classmethod
    def untold(cls, reason: str) -> StageTrial:
        """A trial that couldn't be made."""
        return cls(np.nan, np.nan, 1.0, 0, np.nan, np.nan, 1.0, reason)

    @property
    def added(self) -> float:
        """What the order of the stages adds to R2."""
        return self.r2_with - self.r2_without

    @property
    def has_order(self) -> bool:
        """Whether the order adds something, and more than placebos do."""
        return not self.reason and self.added > 0 and self.p <= STAGE_P

    @property
    def has_own_effects(self) -> bool:
        """Whether stages differ by more than how much they weigh."""
        return not self.reason and self.r2_own > self.r2_scaled and self.p_own <= STAGE_P

    @property
    def passed(self) -> bool:
        """Whether the best mixture depends on the stage: its order tells, by effects of its own."""
        return self.has_order and self.has_own_effects

    def describe(self) -> str:
        """What was found, and where the stage isn't shown to matter, which test says so."""
        if self.reason:
            return f"Whether the stage matters can't be told: {self.reason}."
        order = (
            f"the order of the mixtures adds {self.added:+.3f} to an R2 of {self.r2_without:.3f} "
            f"within unseen pool states (p = {self.p:.3g}, {self.n_placebos} placebos with "
            "permuted stages)"
        )
        own = (
            f"effects of each stage's own add {self.r2_own - self.r2_scaled:+.3f} to those that "
            f"are equal up to a scale per stage (p = {self.p_own:.3g})"
        )
        if self.passed:
            return f"The stage matters: {order}, and {own}."
        if self.has_order:
            alike = "stages may weigh differently, but aren't shown to want different mixtures"
            return f"The stage isn't shown to matter for the mixture: {alike}: {order}, but {own}."
        return f"The stage isn't shown to matter: {order}."


def stage_matters(
    staged: StagedRuns, weights_T: np.ndarray, n_placebos: int = N_PLACEBOS, seed: int = 0
) -> StageTrial:
    """Test whether the order of the stages' mixtures tells the outcome, by effects of their own.

    First: two ridges within pool states, by the error on left-out states: one on what doesn't
    change with the order (the mean mixture, and the mean of the stages' features), one also on each
    stage's difference from that mean. Features are sqrt(share), alone and times the domain's
    standardised covariates. What the second adds is compared with what it adds where each run's
    stages are permuted: if the stages are exchangeable, all orders are equally likely, and the p
    value exact.

    Second: see `_own_effects`.

    Args:
        staged: the runs.
        weights_T: weight of each task in the objective.
        n_placebos: permutations, at least 19.
        seed: of the permutations.
    """
    rows_of = [rows for rows in _groups(staged.runs.groups) if len(rows) > 1]
    if len(rows_of) < FEWEST_STATES:
        reason = f"{len(rows_of)} pool states have two runs, {FEWEST_STATES} are needed"
        return StageTrial.untold(reason)
    rows = np.sort(np.concatenate(rows_of))
    staged = staged.subset(rows)
    group_N, rng = staged.runs.groups, np.random.default_rng(seed)
    outcome_N = center_by_state(staged.runs.outcome_NT @ weights_T[:, None], group_N)[:, 0]
    total = float(outcome_N @ outcome_N)
    if not total:
        return StageTrial.untold("outcomes don't vary within pool states")
    common_NN = _kernel(_common_features(staged), group_N)
    blocks = _groups(group_N)

    def least_error(order_weights: Sequence[float], order_NN: np.ndarray) -> float:
        return min(
            _left_out_error(common_NN + weight * order_NN, outcome_N, blocks)
            for weight in order_weights
        )

    def with_order(runs: StagedRuns) -> float:
        return least_error(_ORDER_WEIGHTS, _kernel(_order_features(runs), group_N))

    without = least_error([0.0], np.zeros_like(common_NN))
    real = with_order(staged)
    placebos = [with_order(staged.permuted(rng)) for _ in range(n_placebos)]
    as_good = sum(error <= real for error in placebos)
    p = (1 + as_good) / (1 + n_placebos)
    scaled, own, p_own = _own_effects(staged, outcome_N, blocks, rng)
    return StageTrial(
        1 - without / total, 1 - real / total, p, n_placebos,
        1 - scaled / total, 1 - own / total, p_own,
    )  # fmt: skip


def _features(runs: RunTable, mixture_ND: np.ndarray) -> np.ndarray:
    """sqrt(share), and times its domain's standardised covariates, of equal size together."""
    scaled_NDP = StateScaler.fit(runs.distinct_states()[1]).transform(runs.state_NDP)
    root_ND = np.sqrt(np.clip(mixture_ND, 0, None))
    meeting_NDP = root_ND[:, :, None] * scaled_NDP / np.sqrt(max(len(runs.covariates), 1))
    return np.hstack([root_ND, meeting_NDP.reshape(len(root_ND), -1)])


def _common_features(staged: StagedRuns) -> np.ndarray:
    """What doesn't change with the order of the stages."""
    stages = [_features(staged.runs, mixture_ND) for mixture_ND in _by_stage(staged)]
    return np.hstack([_features(staged.runs, staged.mixture_NSD.mean(axis=1)), np.mean(stages, 0)])


def _order_features(staged: StagedRuns) -> np.ndarray:
    """What each stage differs by from the mean over stages."""
    stages = np.array([_features(staged.runs, mixture_ND) for mixture_ND in _by_stage(staged)])
    return np.hstack(list(stages - stages.mean(axis=0)))


def _by_stage(staged: StagedRuns) -> np.ndarray:
    return np.swapaxes(staged.mixture_NSD, 0, 1)


def _kernel(features_NF: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Inner products of features that are centred within their pool state."""
    centered_NF = center_by_state(features_NF, group_N)
    return centered_NF @ centered_NF.T


def _groups(group_N: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(group_N == group) for group in np.unique(group_N)]


def _left_out_error(
    kernel_NN: np.ndarray, outcome_N: np.ndarray, blocks: Sequence[np.ndarray]
) -> float:
    """Least squared error over penalties, each pool state's runs predicted without them.

    With C = I - projection, what is left of a block b is C_bb^-1 (C y)_b.
    """
    value_N, vector_NN = np.linalg.eigh(kernel_NN)
    value_N = np.maximum(value_N, 0.0)
    unit = max(float(value_N.mean()), np.finfo(float).tiny)
    turned_N = vector_NN.T @ outcome_N
    errors = []
    for penalty in _PENALTIES:
        kept_N = penalty * unit / (value_N + penalty * unit)
        left_N = vector_NN @ (kept_N * turned_N)
        error = 0.0
        for rows in blocks:
            own = (vector_NN[rows] * kept_N) @ vector_NN[rows].T
            error += float(np.sum(np.linalg.solve(own, left_N[rows]) ** 2))
        errors.append(error)
    return min(errors)


def _own_effects(
    staged: StagedRuns,
    outcome_N: np.ndarray,
    blocks: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """Compare stages with effects of their own with stages that differ by a scale alone.

    The first model is a ridge on sum_s w_s X_s, w_s >= 0: one theta, so the same mixture is best in
    each stage. The second adds to it what each stage has of its own, X_s delta_s. Both predict pool
    states that were left out, with the best of the same penalties.

    Returns:
        The squared error of each, and p of a one-sided t test of their difference over states.
    """
    from scipy.stats import t as t_distribution

    features_SNF = np.array(
        [
            center_by_state(_features(staged.runs, mixture_ND), staged.runs.groups)
            for mixture_ND in _by_stage(staged)
        ]
    )
    own_NN = np.einsum("snf,smf->nm", features_SNF, features_SNF)
    weights = (0.0, *_OWN_WEIGHTS)
    error_WPB = np.zeros((len(weights), len(_PENALTIES), len(blocks)))
    for fold in np.array_split(rng.permutation(len(blocks)), min(_FOLDS, len(blocks))):
        inside = np.concatenate([blocks[b] for b in fold])
        seen = np.setdiff1d(np.arange(len(outcome_N)), inside)
        for k, penalty in enumerate(_PENALTIES):
            scaled_NF = _scaled_sum(features_SNF, outcome_N, seen, penalty)
            shared_NN = scaled_NF @ scaled_NF.T
            for i, weight in enumerate(weights):
                kernel_NN = shared_NN + weight * own_NN
                left_N = np.zeros(len(outcome_N))
                left_N[inside] = outcome_N[inside] - _predict(
                    kernel_NN, outcome_N, seen, inside, penalty
                )
                error_WPB[i, k, fold] = [left_N[blocks[b]] @ left_N[blocks[b]] for b in fold]
    scaled_B = min(error_WPB[0], key=np.sum)
    own_B = min(error_WPB[1:].reshape(-1, len(blocks)), key=np.sum)
    difference_B = scaled_B - own_B
    error = difference_B.std(ddof=1) / np.sqrt(len(blocks))
    t = difference_B.mean() / error if error > 0 else 0.0
    p = float(t_distribution.sf(t, len(blocks) - 1))
    return float(scaled_B.sum()), float(own_B.sum()), p


def _scaled_sum(
    features_SNF: np.ndarray, outcome_N: np.ndarray, seen: np.ndarray, penalty: float
) -> np.ndarray:
    """sum_s w_s X_s (N, F), its scales found by alternating least squares on the runs seen."""
    from scipy.optimize import nnls

    n_stages = len(features_SNF)
    scale_S = np.ones(n_stages)
    for _ in range(_ROUNDS):
        sum_NF = np.tensordot(scale_S, features_SNF[:, seen], axes=1)
        gram_FF = sum_NF.T @ sum_NF
        ridge = penalty * max(np.trace(gram_FF) / len(seen), np.finfo(float).tiny)
        theta_F = np.linalg.solve(
            gram_FF + ridge * np.eye(len(gram_FF)), sum_NF.T @ outcome_N[seen]
        )
        found_S, _ = nnls((features_SNF[:, seen] @ theta_F).T, outcome_N[seen])
        if not found_S.any():
            break
        scale_S = found_S * np.sqrt(n_stages / (found_S @ found_S))
    return np.tensordot(scale_S, features_SNF, axes=1)


def _predict(
    kernel_NN: np.ndarray,
    outcome_N: np.ndarray,
    seen: np.ndarray,
    inside: np.ndarray,
    penalty: float,
) -> np.ndarray:
    """Kernel ridge: outcomes of the runs inside, by those seen."""
    own_NN = kernel_NN[np.ix_(seen, seen)]
    ridge = penalty * max(np.trace(own_NN) / len(seen), np.finfo(float).tiny)
    dual_N = np.linalg.solve(own_NN + ridge * np.eye(len(seen)), outcome_N[seen])
    return kernel_NN[np.ix_(inside, seen)] @ dual_N
