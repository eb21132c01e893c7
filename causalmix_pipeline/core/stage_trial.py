"""Whether it matters in which stage a mixture comes: a test with a placebo."""

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
#: Ridge penalties tried, relative to the mean eigenvalue.
_PENALTIES = tuple(10.0 ** np.arange(-3, 2.1, 0.5))


@dataclass(frozen=True)
class StageTrial:
    """Whether it matters for the objective in which stage a mixture comes.

    Attributes:
        r2_without: share of the variance within unseen pool states that mixtures explain whatever
            their order.
        r2_with: that they explain by their order as well.
        p: share of placebos, the real runs among them, that gain as much from the order.
        n_placebos: placebos tried.
        reason: why it can't be told; empty where it can.
    """

    r2_without: float
    r2_with: float
    p: float
    n_placebos: int
    reason: str = ""

    @property
    def added(self) -> float:
        """What the order of the stages adds to R2."""
        return self.r2_with - self.r2_without

    @property
    def passed(self) -> bool:
        """Whether the stage matters: it adds something, and more than placebos do."""
        return not self.reason and self.added > 0 and self.p <= STAGE_P

    def describe(self) -> str:
        """One sentence."""
        if self.reason:
            return f"Whether the stage matters can't be told: {self.reason}."
        verdict = "The stage matters" if self.passed else "The stage isn't shown to matter"
        return (
            f"{verdict}: the order of the mixtures adds {self.added:+.3f} to an R2 of "
            f"{self.r2_without:.3f} within unseen pool states (p = {self.p:.3g}, "
            f"{self.n_placebos} placebos with permuted stages)."
        )


def stage_matters(
    staged: StagedRuns, weights_T: np.ndarray, n_placebos: int = N_PLACEBOS, seed: int = 0
) -> StageTrial:
    """Test whether the order of the stages' mixtures tells the outcome.

    Two ridges within pool states, by the error on left-out states: one on what doesn't change with
    the order (the mean mixture, and the mean of the stages' features), one also on each stage's
    difference from that mean. Features are sqrt(share), alone and times the domain's standardised
    covariates. What the second adds is compared with what it adds where each run's stages are
    permuted: if the stages are exchangeable, all orders are equally likely, and the p value exact.

    Args:
        staged: the runs.
        weights_T: weight of each task in the objective.
        n_placebos: permutations, at least 19.
        seed: of the permutations.
    """
    rows_of = [rows for rows in _groups(staged.runs.groups) if len(rows) > 1]
    if len(rows_of) < FEWEST_STATES:
        reason = f"{len(rows_of)} pool states have two runs, {FEWEST_STATES} are needed"
        return StageTrial(np.nan, np.nan, 1.0, 0, reason)
    rows = np.sort(np.concatenate(rows_of))
    staged = staged.subset(rows)
    group_N, rng = staged.runs.groups, np.random.default_rng(seed)
    outcome_N = center_by_state(staged.runs.outcome_NT @ weights_T[:, None], group_N)[:, 0]
    total = float(outcome_N @ outcome_N)
    if not total:
        return StageTrial(np.nan, np.nan, 1.0, 0, "outcomes don't vary within pool states")
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
    return StageTrial(1 - without / total, 1 - real / total, p, n_placebos)


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
