"""What an effect model says, made readable: effects of domains, and what they depend on.

The effect of a domain is the gain of moving a few points of the mixture to it from all others in
proportion. Everything here asks an estimator for gains and nothing else, so that it serves all.
Source of the importance: permutation importance, Breiman, Random Forests (2001), section 10, with
the change of the effect in place of the change of the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.effects import Z90, EffectEstimator
from causalmix_pipeline.core.policy import weighted_gain

#: Share that is moved to a domain: 5 points of the mixture, near what people change at a time.
STEP = 0.05

#: Points of an effect curve, and rows of cells of the triangle.
N_POINTS, N_CELL_ROWS = 25, 24

#: Most pool states times covariates that the importance asks about, and fewest states of it.
MOST_ASKED, FEWEST_STATES = 1000, 8


@dataclass(frozen=True, eq=False)
class Effects:
    """An effect model, asked for gains over a reference mixture, weighted over tasks.

    Attributes:
        estimator: fitted on the runs.
        weights_T: weight of each of its tasks; sum 1.
        reference_D: the mixture that gains are measured from, and that domains are added to.
        doubt: what standard errors are multiplied by; see `core.belief.Overlap.doubt`.
    """

    estimator: EffectEstimator
    weights_T: np.ndarray
    reference_D: np.ndarray
    doubt: float = 1.0

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return gains and their standard errors (nan where unknown); both of shape (M,)."""
        gain_M, se_M = weighted_gain(
            self.estimator, state_DP, mixture_MD, self.reference_D, self.weights_T
        )
        return gain_M, se_M * self.doubt

    def of_domains(self, state_SDP: np.ndarray) -> np.ndarray:
        """Return the effect of each domain in each state: the gain of `STEP` more; (S, D).

        A stack is asked without its trees where it can be: their steps are coarser than `STEP`.
        """
        step_DD = np.vstack(
            [
                move_share(self.reference_D, d, np.array([min(share + STEP, 1.0)]))
                for d, share in enumerate(self.reference_D)
            ]
        )
        ask = getattr(self.estimator, "smooth_gain", self.estimator.gain)
        if np.isnan(ask(state_SDP[0], step_DD, self.reference_D).mean_MT).any():
            ask = self.estimator.gain
        return np.stack(
            [ask(s_DP, step_DD, self.reference_D).mean_MT @ self.weights_T for s_DP in state_SDP]
        )


def move_share(mixture_D: np.ndarray, d: int, share_M: np.ndarray) -> np.ndarray:
    """Give domain `d` other shares and keep the others in proportion; shape (M, D)."""
    others_D = np.where(np.arange(len(mixture_D)) == d, 0.0, mixture_D)
    if not others_D.any():  # it had all: what it leaves goes to the others alike
        others_D = np.where(np.arange(len(mixture_D)) == d, 0.0, 1.0)
    mixture_MD = (1 - share_M)[:, None] * others_D / max(others_D.sum(), 1e-300)
    mixture_MD[:, d] = share_M
    return mixture_MD


# ---------------------------------------------------------------------------- curves


@dataclass(frozen=True, eq=False)
class EffectCurve:
    """Gain against the share of a domain, with the ends of its 90% interval; shapes (M,)."""

    domain: str
    share_M: np.ndarray
    gain_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray


def effect_curves(
    effects: Effects, state_DP: np.ndarray, domains: Sequence[str], most_D: np.ndarray
) -> list[EffectCurve]:
    """Gain over the reference as one domain's share moves, the others in proportion.

    Args:
        effects: the model.
        state_DP: the pool's covariates.
        domains: names.
        most_D: where each curve ends: the largest share that a run had. Beyond it nothing was seen.
    """
    curves = []
    for d, domain in enumerate(domains):
        share_M = np.linspace(0, most_D[d], N_POINTS)
        gain_M, se_M = effects.gain(state_DP, move_share(effects.reference_D, d, share_M))
        half_M = Z90 * se_M
        curves.append(EffectCurve(domain, share_M, gain_M, gain_M - half_M, gain_M + half_M))
    return curves


# ---------------------------------------------------------------------------- covariates


def covariate_importance(effects: Effects, state_SDP: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """By how much each domain's effect moves when a covariate is exchanged among pool states.

    Args:
        effects: the model.
        state_SDP: distinct pool states of the runs; where that would be slow, a sample of them
            is asked about.
        seed: of that sample and of the order of the states.

    Returns:
        Root mean square change in outcome units, shape (D x P, D): rows are covariates, domain by
        domain, columns are the domains whose effect moves.
    """
    n_states, n_domains, n_covariates = state_SDP.shape
    n_columns = n_domains * n_covariates
    n_asked = min(n_states, max(FEWEST_STATES, MOST_ASKED // max(n_columns, 1)))
    order = np.random.default_rng(seed).permutation(n_states)[:n_asked]
    asked_SDP = state_SDP[order]
    own_SD = effects.of_domains(asked_SDP)
    importance_CD = np.zeros((n_columns, n_domains))
    for c in range(n_columns):
        d, p = divmod(c, n_covariates)
        moved_SDP = asked_SDP.copy()
        # A shift by half of the states: no state keeps its own value.
        moved_SDP[:, d, p] = np.roll(asked_SDP[:, d, p], n_asked // 2)
        change_SD = effects.of_domains(moved_SDP) - own_SD
        importance_CD[c] = np.sqrt(np.mean(change_SD**2, axis=0))
    return importance_CD


def rank_covariates(importance_CD: np.ndarray) -> np.ndarray:
    """Positions of the covariates, those first that move the effects of all domains most."""
    return np.argsort(-np.sqrt(np.mean(importance_CD**2, axis=1)), kind="stable")


def extreme_states(state_SDP: np.ndarray, column: int) -> tuple[int, int]:
    """Positions of the states with the least and the largest value of a covariate.

    Args:
        state_SDP: distinct pool states.
        column: the covariate, counted domain by domain.
    """
    value_S = state_SDP.reshape(len(state_SDP), -1)[:, column]
    return int(np.argmin(value_S)), int(np.argmax(value_S))


# ---------------------------------------------------------------------------- three domains


@dataclass(frozen=True, eq=False)
class Triangle:
    """Gains over three domains' shares, all others held.

    Attributes:
        domains: positions of the three domains; corners in this order.
        total: share that the three divide among themselves.
        corners_M33: corners of each cell as parts of the total, in barycentric coordinates;
            shape (M, 3, 3).
        gain_M: gain at the middle of each cell.
    """

    domains: tuple[int, int, int]
    total: float
    corners_M33: np.ndarray
    gain_M: np.ndarray

    def place(self, mixture: np.ndarray) -> np.ndarray:
        """Barycentric coordinates of mixtures among the three, (..., 3); nan without share."""
        part = np.asarray(mixture, dtype=float)[..., list(self.domains)]
        with np.errstate(invalid="ignore"):
            return part / part.sum(axis=-1, keepdims=True)


def triangle(effects: Effects, state_DP: np.ndarray, mixture_D: np.ndarray) -> Triangle | None:
    """Gains on a grid over the three domains that a mixture gives most; None below three domains.

    Args:
        effects: the model.
        state_DP: the pool's covariates.
        mixture_D: the recommended mixture; its other shares are held.
    """
    if len(mixture_D) < 3:
        return None
    first, second, third = (int(d) for d in np.argsort(-mixture_D, kind="stable")[:3])
    chosen = (first, second, third)
    total = float(mixture_D[list(chosen)].sum())
    corners_M33 = _cells(N_CELL_ROWS)
    mixture_MD = np.repeat(mixture_D[None], len(corners_M33), axis=0)
    mixture_MD[:, list(chosen)] = total * corners_M33.mean(axis=1)
    return Triangle(chosen, total, corners_M33, effects.gain(state_DP, mixture_MD)[0])


def _cells(n_rows: int) -> np.ndarray:
    """Corners of the n x n small triangles of a triangle; barycentric, shape (n x n, 3, 3)."""
    cells = []
    for i in range(n_rows):
        for j in range(n_rows - i):
            k = n_rows - 1 - i - j
            cells.append([(i + 1, j, k), (i, j + 1, k), (i, j, k + 1)])
            if k > 0:
                cells.append([(i + 1, j + 1, k - 1), (i + 1, j, k), (i, j + 1, k)])
    return np.array(cells) / n_rows
