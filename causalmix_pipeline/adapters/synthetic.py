"""A pool generator with a known effect: proxy runs without proxies, for tests and a first look.

The outcome of a task is concave in each domain's share, its slope depends on that domain's own
covariates, diversity pays or costs, and the state has a main effect of its own. None of it is
of the form that an estimator here assumes, so that a good score isn't a matter of course.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.core.runs import RunTable

#: Monte Carlo draws that put each task's outcome on the scale of 1 standard deviation.
_SCALE_DRAWS = 400


@dataclass(frozen=True, eq=False)
class SyntheticPool:
    """A truth: expected outcomes as a function of pool state and mixture.

    Attributes:
        strength_TD: how much of a task a domain teaches; shape (T, D).
        half_TD: share at which the curve bends, in (0, 1); shape (T, D).
        direction_DP: what of a domain's covariates makes it teach better; shape (D, P).
        diversity_T: what an even mixture adds to a task; shape (T,).
        main_TDP: main effect of the covariates on a task; shape (T, D, P).
        state_effect: how strongly the covariates change what a domain teaches; 0 for not at all.
        scale_T: divides the outcome: its standard deviation over mixtures within a state is 1.
    """

    strength_TD: np.ndarray
    half_TD: np.ndarray
    direction_DP: np.ndarray
    diversity_T: np.ndarray
    main_TDP: np.ndarray
    state_effect: float
    scale_T: np.ndarray

    @classmethod
    def draw(
        cls,
        n_domains: int = 6,
        n_covariates: int = 4,
        n_tasks: int = 3,
        *,
        state_effect: float = 0.7,
        seed: int = 0,
    ) -> SyntheticPool:
        """Draw a truth.

        Args:
            n_domains: D, at least 2.
            n_covariates: P, 0 or more; about half of them matter.
            n_tasks: T, at least 1.
            state_effect: log of the change of a domain's strength for one standard deviation.
            seed: decides the truth.
        """
        rng = np.random.default_rng(seed)
        shape_TD, shape_DP = (n_tasks, n_domains), (n_domains, n_covariates)
        direction_DP = rng.normal(size=shape_DP) * (rng.uniform(size=shape_DP) < 0.5)
        size_D = np.linalg.norm(direction_DP, axis=1, keepdims=True)
        parts = {
            "strength_TD": rng.exponential(size=shape_TD) * (rng.uniform(size=shape_TD) < 0.7),
            "half_TD": rng.uniform(0.03, 0.3, size=shape_TD),
            "direction_DP": direction_DP / np.where(size_D > 0, size_D, 1.0),
            "diversity_T": rng.normal(0.0, 0.3, size=n_tasks),
            "main_TDP": rng.normal(size=(n_tasks, *shape_DP)) / max(n_domains * n_covariates, 1),
            "state_effect": state_effect if n_covariates else 0.0,
        }
        parts["strength_TD"][np.arange(n_tasks), np.arange(n_tasks) % n_domains] += 1.0
        unscaled = cls(**parts, scale_T=np.ones(n_tasks))
        mixture_MD = rng.dirichlet(np.ones(n_domains), size=_SCALE_DRAWS)
        state_DP = np.zeros(shape_DP)
        return cls(**parts, scale_T=unscaled.expected_outcome(state_DP, mixture_MD).std(axis=0))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of domains D, covariates P and tasks T."""
        return (*self.direction_DP.shape, len(self.strength_TD))

    def expected_outcome(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the outcome without seed noise; shape (M, T)."""
        mixture_MD = np.atleast_2d(mixture_MD)
        quality_D = (state_DP * self.direction_DP).sum(axis=1)
        slope_TD = self.strength_TD * np.exp(self.state_effect * np.tanh(quality_D / 2) * 2)
        share_MTD = mixture_MD[:, None, :]
        taught_MT = (slope_TD * share_MTD / (share_MTD + self.half_TD)).sum(axis=2)
        even_M = 1 - (mixture_MD**2).sum(axis=1)
        main_T = (self.main_TDP * state_DP).sum(axis=(1, 2))
        return (taught_MT + even_M[:, None] * self.diversity_T + main_T) / self.scale_T

    def expected_gain(
        self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray
    ) -> np.ndarray:
        """Return the true gain over the reference mixture; shape (M, T)."""
        return self.expected_outcome(state_DP, mixture_MD) - self.expected_outcome(
            state_DP, reference_D
        )

    def draw_states(self, n_states: int, rng: np.random.Generator) -> np.ndarray:
        """Return standard normal covariates, shape (S, D, P)."""
        return rng.normal(size=(n_states, *self.direction_DP.shape))

    def run_table(
        self,
        n_states: int = 32,
        mixtures_per_state: int = 4,
        *,
        noise: float = 0.2,
        n_repeats: int = 0,
        confounding: float = 0.0,
        seed: int = 0,
    ) -> RunTable:
        """Draw proxy runs of this truth.

        Args:
            n_states: S, number of pool states.
            mixtures_per_state: mixtures for each state; Dirichlet of strength log-uniform .4-3.
            noise: standard deviation of the seed noise; the mixture's is 1.
            n_repeats: how many of the first runs are run twice more, with other seeds.
            confounding: how far a mixture leans to domains that are good in its state; 0 is
                a random design, 2 a strongly observational one.
            seed: decides states, mixtures and noise.
        """
        rng = np.random.default_rng(seed)
        n_domains, n_covariates, n_tasks = self.shape
        state_SDP = self.draw_states(n_states, rng)
        states, mixtures = [], []
        for s in range(n_states):
            lean_D = np.exp(confounding * (state_SDP[s] * self.direction_DP).sum(axis=1))
            for _ in range(mixtures_per_state):
                strength = np.exp(rng.uniform(np.log(0.4), np.log(3.0)))
                share_D = rng.dirichlet(np.full(n_domains, strength)) * lean_D
                states.append(s)
                mixtures.append(share_D / share_D.sum())
        cell_N = np.concatenate([np.arange(len(states)), np.repeat(np.arange(n_repeats), 2)])
        state_N, mixture_ND = np.array(states)[cell_N], np.array(mixtures)[cell_N]
        outcome_NT = np.vstack(
            [
                self.expected_outcome(state_SDP[s], mixture_D)
                for s, mixture_D in zip(state_N, mixture_ND, strict=True)
            ]
        )
        return RunTable(
            domains=tuple(f"domain_{d}" for d in range(n_domains)),
            covariates=tuple(f"covariate_{p}" for p in range(n_covariates)),
            tasks=tuple(f"task_{t}" for t in range(n_tasks)),
            run_ids=tuple(f"run_{i:05d}" for i in range(len(cell_N))),
            state_ids=state_N,
            state_NDP=state_SDP[state_N],
            mixture_ND=mixture_ND,
            outcome_NT=outcome_NT + rng.normal(0.0, noise, size=outcome_NT.shape),
            repeat_of_N=cell_N,
        )
