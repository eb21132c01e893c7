"""The search for the best mixture inside constraints; every policy and table uses this one.

Candidates all over the simplex, then random steps around the best, then sequential quadratic
programming by differences (SciPy's SLSQP) from the best. The steps serve estimators that are
stepwise, the programming those that are smooth: with many domains random steps alone stop far from
the optimum. At last the best are compared once more, by the whole estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import dirichlet_design, kl_divergence

#: Candidates all over the simplex; vertices and their halves with the reference come on top.
N_CANDIDATES = 384
#: Mixtures carried on, steps tried from each, rounds, and the part of the step left in each. Up to
#: `FEW_DOMAINS`, fewer rounds lose 3e-5 standard deviations of the outcome.
N_STARTS, N_STEPS, N_ROUNDS, SHRINK = 8, 8, 5, 0.5
FEW_DOMAINS, FEW_ROUNDS = 8, 3
#: Most iterations of SLSQP, and the share by which it takes differences.
POLISH_ITERATIONS, DIFFERENCE = 50, 1e-5
#: How many of the best are compared by a stack's stepwise members too.
N_FINAL = 48

#: The value of each mixture, and by how much the worst guard rail is passed: below 0 where all are
#: kept, -inf where there are none; (M,) each.
Judge = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search came to.

    Attributes:
        mixture_D: the best mixture.
        only_start: whether it's the start, since guard rails forbid whatever is better.
    """

    mixture_D: np.ndarray
    only_start: bool = False


def find_optimum(
    quick: Judge,
    whole: Judge,
    constraints: Constraints,
    domains: Sequence[str],
    seed: int,
    starts: Sequence[np.ndarray] = (),
) -> Found:
    """Find the mixture of the highest value.

    The reference, brought into the constraints, stays in the race to the end: where no gain is
    seen anywhere, it's kept.

    Args:
        quick: judges the mixtures of the search; smooth, where it can be.
        whole: judges the last ones.
        constraints: what mixtures are brought into; guard rails are the judges' to tell.
        domains: names, for messages.
        seed: of candidates and steps.
        starts: further mixtures to begin from.

    Raises:
        ConfigError: if no mixture satisfies the constraints.
    """
    tried_MD = constraints.project(candidates(constraints, seed, starts), domains)
    start_D = tried_MD[0]
    value_M, excess_M = quick(tried_MD)
    scale = float(np.ptp(value_M)) or 1.0
    rng = np.random.default_rng([seed, 1])
    for round_ in range(FEW_ROUNDS if len(domains) <= FEW_DOMAINS else N_ROUNDS):
        best = _order(value_M, excess_M)[:N_STARTS]
        noise = rng.normal(scale=0.1 * SHRINK**round_, size=(len(best), N_STEPS, len(domains)))
        moved = (tried_MD[best][:, None] + noise).reshape(-1, len(domains))
        moved = constraints.project(moved, domains)
        value, excess = quick(moved)
        tried_MD = np.vstack([tried_MD, moved])
        value_M, excess_M = np.append(value_M, value), np.append(excess_M, excess)
    best = _order(value_M, excess_M)[:N_FINAL]
    polished_D = polish(quick, constraints, domains, tried_MD[best[0]], scale)
    last_MD = np.vstack([polished_D, tried_MD[best], start_D])
    last_value_M, last_excess_M = whole(last_MD)
    winner = int(_order(last_value_M, last_excess_M)[0])
    kept_off = bool(((value_M > value_M[0]) & (excess_M > 0)).any())
    return _checked(start_D, last_MD, last_excess_M, winner, kept_off)


def retreat(judge: Judge, start_D: np.ndarray, mixture_D: np.ndarray) -> Found:
    """Go back from a mixture straight towards the start, just as far as guard rails ask for."""
    path_MD = start_D + np.linspace(1, 0, 129)[:, None] * (mixture_D - start_D)
    path_MD[0] = mixture_D
    excess_M = judge(path_MD)[1]
    winner = int(np.argmin(np.maximum(excess_M, 0)))
    return _checked(start_D, path_MD, excess_M, winner, bool((excess_M > 0).any()))


def _checked(
    start_D: np.ndarray,
    tried_MD: np.ndarray,
    excess_M: np.ndarray,
    winner: int,
    kept_off: bool,
) -> Found:
    """The winner, if guard rails allow it; `kept_off`: whether they forbid something better."""
    if excess_M[winner] > 0:
        raise ConfigError(
            f"guard_rails: of {len(tried_MD)} mixtures inside the other constraints none keeps "
            f"them; the nearest passes one by {excess_M[winner]:.3g}. Loosen guard_rails, or let "
            "shares reach the reference, which keeps all of them."
        )
    stays = bool(np.abs(tried_MD[winner] - start_D).max() < 1e-6)
    return Found(start_D if stays else tried_MD[winner], only_start=stays and kept_off)


def _order(value_M: np.ndarray, excess_M: np.ndarray) -> np.ndarray:
    """Best first: those that keep the guard rails by value, then the others by what they pass."""
    return np.lexsort((-value_M, np.maximum(excess_M, 0)))


@lru_cache(maxsize=8)
def spread_mixtures(n_domains: int, seed: int) -> np.ndarray:
    """Candidates all over the simplex, sparse and flat; shape (N_CANDIDATES, D)."""
    return dirichlet_design(N_CANDIDATES, n_domains, strength_range=(0.3, 3.0), seed=seed)


def candidates(constraints: Constraints, seed: int, starts: Sequence[np.ndarray]) -> np.ndarray:
    """The reference, then further starts, vertices and candidates."""
    reference_D = np.asarray(constraints.reference_D)
    n_domains = len(reference_D)
    spread_MD = spread_mixtures(n_domains, seed).copy()
    # Half of them pulled towards the reference, where a tight region would crowd its border.
    pull = np.linspace(0.1, 0.9, N_CANDIDATES // 2)[:, None]
    spread_MD[::2] = pull * spread_MD[::2] + (1 - pull) * reference_D
    vertices = np.eye(n_domains)
    return np.vstack([reference_D, *starts, spread_MD, vertices, (vertices + reference_D) / 2])


def polish(
    judge: Judge,
    constraints: Constraints,
    domains: Sequence[str],
    start_D: np.ndarray,
    scale: float,
    iterations: int = POLISH_ITERATIONS,
) -> np.ndarray:
    """Climb from a mixture as far as the value and the constraints allow, by differences."""
    from scipy.optimize import minimize

    n_domains = len(domains)
    lower_D, upper_D = constraints.box(domains)
    steps = np.vstack([np.zeros(n_domains), DIFFERENCE * np.eye(n_domains)])
    known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def ask(point_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value and excess here and a little further in each domain, asked once."""
        key = point_D.tobytes()
        if key not in known:
            value, excess = judge(np.maximum(point_D, 0) + steps)
            known[key] = value / scale, excess / scale
        return known[key]

    def climb(point_D: np.ndarray) -> tuple[float, np.ndarray]:
        value = ask(point_D)[0]
        return -value[0], -(value[1:] - value[0]) / DIFFERENCE

    def margin(point_D: np.ndarray) -> float:
        return -ask(point_D)[1][0] - 1e-6  # inside, whatever the rounding

    def margin_slope(point_D: np.ndarray) -> np.ndarray:
        excess = ask(point_D)[1]
        return -(excess[1:] - excess[0]) / DIFFERENCE

    rules = [{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(n_domains)}]
    if constraints.guard_rails:
        rules.append({"type": "ineq", "fun": margin, "jac": margin_slope})
    if constraints.trust_radius is not None:
        rules.append(_trust_rule(constraints.reference_D, constraints.trust_radius))
    found = minimize(
        climb,
        start_D,
        jac=True,
        method="SLSQP",
        bounds=list(zip(lower_D, upper_D, strict=True)),
        constraints=rules,
        options={"maxiter": iterations, "ftol": 1e-7},
    )
    return constraints.project(found.x if np.isfinite(found.x).all() else start_D, domains)


def _trust_rule(reference_D: np.ndarray, radius: float) -> dict:
    """KL(mixture || reference) <= radius, as SLSQP takes it; domains of no share are bounded."""
    reference_D = np.maximum(reference_D, 1e-12)
    return {
        "type": "ineq",
        "fun": lambda p: radius - float(kl_divergence(np.maximum(p, 0), reference_D)),
        "jac": lambda p: -(np.log(np.maximum(p, 1e-12) / reference_D) + 1),
    }
