"""Pools with a known truth, of several families: the referee that no estimator here was made for.

Each family says what mixtures do in another way, so a method that wins only on its own assumptions
doesn't win here:

    power_law       loss = E + C (what the domains teach) ** -b, tokens beyond the unique ones of a
                    small domain count less and less (Muennighoff et al., arXiv 2305.16264)
    log_linear      loss = c + exp(-(b . shares)), b moved by the state (arXiv 2403.16952)
    interaction     pairs of domains help each other, more or less so by the state of both
    threshold       a domain helps once its share is past a level that its state decides: kinks
    saturation      a domain's curve bends early or late, its height decided by its state
    same_for_all    the curves of `saturation`, the same in every state

Outcomes have a main effect of the state as large as that of mixtures, and seed noise. Designs:

    randomised      4 mixtures in each state, drawn whatever the state
    confounded      one mixture a state, leaning to what the state's main effect depends on
    hidden          the same, by a cause that isn't among the covariates
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import polars as pl

#: Shape of every pool: domains, covariates of each, metrics; and weights of the metrics.
N_DOMAINS, N_COVARIATES, N_METRICS = 6, 4, 1
WEIGHTS_T = np.ones(1)

#: Standard deviations of the seed noise and of the state's main effect; that of mixtures is 1.
NOISE, MAIN_EFFECT = 0.25, 1.0

#: Mixtures of each state of a randomised design.
PER_STATE = 4

#: How strongly a confounded design leans.
LEAN = 1.5

Curve = Callable[[dict, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class World:
    """A truth. Outcomes are larger-is-better; `is_loss` says that they are minus a loss > 0.

    Attributes:
        family: key of `FAMILIES`.
        parts: the drawn constants of the family.
        main_TC: main effect of the covariates, unit length a metric; shape (T, D x P).
        scale_T: divides the mixture's part: its standard deviation over mixtures is 1.
    """

    family: str
    parts: dict = field(repr=False)
    main_TC: np.ndarray = field(repr=False)
    scale_T: np.ndarray = field(repr=False)

    @classmethod
    def draw(cls, family: str, seed: int) -> "World":
        """Draw the constants of a truth."""
        rng = np.random.default_rng([seed, list(FAMILIES).index(family)])
        shape_TD, shape_DP = (N_METRICS, N_DOMAINS), (N_DOMAINS, N_COVARIATES)
        direction_DP = rng.normal(size=shape_DP) * (rng.uniform(size=shape_DP) < 0.6)
        length_D1 = np.linalg.norm(direction_DP, axis=1, keepdims=True)
        parts = {
            "strength_TD": rng.exponential(size=shape_TD) * (rng.uniform(size=shape_TD) < 0.8),
            "bend_TD": rng.uniform(0.03, 0.3, size=shape_TD),
            "direction_DP": direction_DP / np.maximum(length_D1, 1e-9),
            "pair_TDD": rng.normal(size=(N_METRICS, N_DOMAINS, N_DOMAINS)),
            "exponent_T": rng.uniform(0.2, 0.6, size=N_METRICS),
            "unique_D": np.exp(rng.normal(-1.5, 0.5, size=N_DOMAINS)),
        }
        parts["strength_TD"][np.arange(N_METRICS), rng.permutation(N_DOMAINS)[:N_METRICS]] += 1
        main_TC = rng.normal(size=(N_METRICS, N_DOMAINS * N_COVARIATES))
        main_TC /= np.linalg.norm(main_TC, axis=1, keepdims=True)
        world = cls(family, parts, main_TC, np.ones(N_METRICS))
        mixture_MD = rng.dirichlet(np.ones(N_DOMAINS), size=200)
        states = rng.normal(size=(20, *shape_DP))
        spread_ST = np.stack([world._taught(s, mixture_MD).std(axis=0) for s in states])
        return cls(family, parts, main_TC, spread_ST.mean(axis=0))

    @property
    def is_loss(self) -> bool:
        """Whether a table of this world holds losses."""
        return self.family in ("power_law", "log_linear")

    def outcome(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Expected outcome without seed noise; shape (M, T)."""
        main_T = MAIN_EFFECT * self.main_TC @ state_DP.ravel()
        return self._taught(state_DP, np.atleast_2d(mixture_MD)) / self.scale_T + main_T

    def weighted(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """The weighted outcome; shape (M,)."""
        return self.outcome(state_DP, mixture_MD) @ WEIGHTS_T

    def _taught(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        return FAMILIES[self.family](self.parts, state_DP, mixture_MD)


def _lift(parts: dict, state_DP: np.ndarray, size: float) -> np.ndarray:
    """Factor by which a domain's state changes what it teaches, bounded; shape (D,)."""
    return np.exp(2 * size * np.tanh((state_DP * parts["direction_DP"]).sum(axis=1) / 2))


def _power_law(parts: dict, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
    unique_D = parts["unique_D"] * np.exp(0.7 * state_DP[:, 0])
    repeats_MD = np.maximum(mixture_MD / unique_D - 1, 0)
    read_MD = np.minimum(mixture_MD, unique_D) + unique_D * 4 * (1 - np.exp(-repeats_MD / 4))
    value_TD = parts["strength_TD"] * _lift(parts, state_DP, 0.7)
    taught_MT = 0.05 + read_MD @ value_TD.T
    return -(taught_MT ** -parts["exponent_T"])


def _log_linear(parts: dict, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
    slope_TD = parts["strength_TD"] * _lift(parts, state_DP, 0.7)
    return -np.exp(-mixture_MD @ slope_TD.T)


def _interaction(parts: dict, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
    lift_D = _lift(parts, state_DP, 0.5)
    root_MD = np.sqrt(mixture_MD)
    alone_MT = mixture_MD @ (parts["strength_TD"] * lift_D).T
    pair_TDD = parts["pair_TDD"] * np.sqrt(np.outer(lift_D, lift_D))
    return alone_MT + np.einsum("md,tde,me->mt", root_MD, pair_TDD, root_MD)


def _threshold(parts: dict, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
    level_D = 0.15 / _lift(parts, state_DP, 0.5)
    past_MD = np.clip((mixture_MD - level_D) / 0.1, 0, 1) + 0.3 * mixture_MD
    return past_MD @ parts["strength_TD"].T


def _saturation(parts: dict, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
    slope_TD = parts["strength_TD"] * _lift(parts, state_DP, 0.7)
    bent_MTD = mixture_MD[:, None] / (mixture_MD[:, None] + parts["bend_TD"])
    return (bent_MTD * slope_TD).sum(axis=2)


def _same_for_all(parts: dict, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
    return _saturation(parts, np.zeros_like(state_DP), mixture_MD)


FAMILIES: dict[str, Curve] = {
    "power_law": _power_law,
    "log_linear": _log_linear,
    "interaction": _interaction,
    "threshold": _threshold,
    "saturation": _saturation,
    "same_for_all": _same_for_all,
}

DOMAINS = tuple(f"domain_{d}" for d in range(N_DOMAINS))
METRICS = tuple(f"metric_{t}" for t in range(N_METRICS))
COVARIATES = tuple(f"{d}__covariate_{p}" for d in DOMAINS for p in range(N_COVARIATES))


@dataclass(frozen=True, eq=False)
class Tables:
    """What a user would have: three frames with a row per run."""

    ratios: pl.DataFrame
    metrics: pl.DataFrame
    covariates: pl.DataFrame


def draw_runs(
    world: World, design: str, n_runs: int, seed: int, state_DP: np.ndarray | None = None
) -> Tables:
    """Run `n_runs` proxies; all in one state if one is given."""
    rng = np.random.default_rng([seed, 7])
    per_state = PER_STATE if design == "randomised" else 1
    n_states = -(-n_runs // per_state)
    state_NDP = rng.normal(size=(n_states, N_DOMAINS, N_COVARIATES)).repeat(per_state, axis=0)
    state_NDP = state_NDP[:n_runs]
    if state_DP is not None:
        state_NDP = np.repeat(state_DP[None], n_runs, axis=0)
    strength_N = np.exp(rng.uniform(np.log(0.4), np.log(3.0), size=n_runs))
    mixture_ND = np.stack([rng.dirichlet(np.full(N_DOMAINS, s)) for s in strength_N])
    hidden_N = np.zeros(n_runs)
    if design != "randomised":
        push_ND, hidden_N = _lean(world, design, state_NDP, rng)
        mixture_ND = np.maximum(mixture_ND, 1e-4) * np.exp(push_ND)
        mixture_ND /= mixture_ND.sum(axis=1, keepdims=True)
    outcome_NT = np.vstack(
        [world.outcome(s, m) for s, m in zip(state_NDP, mixture_ND, strict=True)]
    )
    outcome_NT += hidden_N[:, None] + rng.normal(0, NOISE, size=outcome_NT.shape)
    return _tables(world, mixture_ND, outcome_NT, state_NDP)


def _lean(
    world: World, design: str, state_NDP: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Logs by which shares are pushed, (N, D), and what a hidden cause adds to outcomes, (N,).

    A confounded domain gets more where its own part of the state's main effect is good: then its
    share goes with good outcomes that it didn't cause.
    """
    n_runs = len(state_NDP)
    if design == "confounded":
        main_DP = (WEIGHTS_T @ world.main_TC).reshape(N_DOMAINS, N_COVARIATES)
        part_ND = (state_NDP * main_DP).sum(axis=2)
        return LEAN * part_ND / part_ND.std(), np.zeros(n_runs)
    cause_N = rng.normal(size=n_runs)
    return LEAN * np.outer(cause_N, rng.normal(size=N_DOMAINS)), MAIN_EFFECT * cause_N


def _tables(world: World, mixture_ND, outcome_NT, state_NDP) -> Tables:
    names = [f"run_{i:05d}" for i in range(len(mixture_ND))]
    value_NT = outcome_NT
    if world.is_loss:  # lifted above 0, as losses are
        value_NT = 8.0 - outcome_NT
    return Tables(
        pl.DataFrame({"run": names}).hstack(pl.DataFrame(mixture_ND, schema=list(DOMAINS))),
        pl.DataFrame({"run": names}).hstack(pl.DataFrame(value_NT, schema=list(METRICS))),
        pl.DataFrame({"run": names}).hstack(
            pl.DataFrame(state_NDP.reshape(len(names), -1), schema=list(COVARIATES))
        ),
    )


def draw_pools(n_pools: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """New states, each covariate moved by `shift` standard deviations up or down; (S, D, P)."""
    rng = np.random.default_rng([seed, 11])
    sign_DP = rng.choice([-1.0, 1.0], size=(N_DOMAINS, N_COVARIATES))
    return rng.normal(size=(n_pools, N_DOMAINS, N_COVARIATES)) + shift * sign_DP


def pools_frame(state_SDP: np.ndarray) -> pl.DataFrame:
    """The states as `recommend` reads them."""
    names = [f"pool_{s:03d}" for s in range(len(state_SDP))]
    return pl.DataFrame({"pool": names}).hstack(
        pl.DataFrame(state_SDP.reshape(len(names), -1), schema=list(COVARIATES))
    )
