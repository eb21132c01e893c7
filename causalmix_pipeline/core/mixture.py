"""The simplex of mixtures: checks, projections, distances, low-discrepancy designs.

A mixture over D domains is a vector of shares of training tokens, each >= 0, together 1.
Source of the design: exact Dirichlet marginals by gamma quantiles of scrambled Sobol points
(a Dirichlet vector is a vector of independent gammas divided by its sum).
"""

from __future__ import annotations

import numpy as np

from causalmix_pipeline.core.errors import ConfigError

#: Largest deviation of a mixture's sum from 1 that still counts as rounding.
SUM_TOLERANCE = 1e-6


def is_on_simplex(mixture: np.ndarray, *, tolerance: float = SUM_TOLERANCE) -> bool:
    """Tell whether every row has shares >= 0 that sum to 1, within `tolerance`."""
    mixture = np.asarray(mixture, dtype=float)
    return bool(
        np.isfinite(mixture).all()
        and (mixture >= -tolerance).all()
        and (np.abs(mixture.sum(axis=-1) - 1.0) <= tolerance).all()
    )


def check_mixture(mixture_D: np.ndarray, *, field: str) -> np.ndarray:
    """Return the mixture as floats, exactly normalised.

    Args:
        mixture_D: shares; shape (D,).
        field: the name of the setting or column, for the message.

    Raises:
        ConfigError: if a share is negative or not finite, or the sum is not 1 within 1e-6.
    """
    mixture_D = np.asarray(mixture_D, dtype=float)
    if not is_on_simplex(mixture_D):
        raise ConfigError(
            f"{field} must be shares >= 0 that sum to 1, got {mixture_D.tolist()} with sum "
            f"{mixture_D.sum():.6g}. Divide each share by the sum."
        )
    clipped_D = np.clip(mixture_D, 0.0, None)
    return clipped_D / clipped_D.sum()


def kl_divergence(mixture: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence KL(mixture || reference), in nats.

    Args:
        mixture: one mixture (D,) or many (M, D).
        reference_D: shape (D,); a domain without share here may have none in the mixture.

    Returns:
        Shape () or (M,), >= 0; infinite where the mixture uses a domain the reference doesn't.
    """
    mixture = np.asarray(mixture, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = mixture * (np.log(mixture) - np.log(reference_D))
    terms = np.where(mixture > 0, terms, 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)


def project_to_box(mixture: np.ndarray, lower_D: np.ndarray, upper_D: np.ndarray) -> np.ndarray:
    """The nearest mixture (L2) with every share between its bounds.

    The projection is clip(mixture + shift, lower, upper) with one shift per row that makes the
    sum 1; the sum grows with the shift, so the shift is found by bisection.

    Args:
        mixture: one mixture (D,) or many (M, D), not necessarily normalised.
        lower_D: least shares, sum <= 1; shape (D,).
        upper_D: most shares, sum >= 1; shape (D,).
    """
    rows = np.atleast_2d(np.asarray(mixture, dtype=float))
    low = np.min(lower_D - rows, axis=1)  # every share at its lower bound
    high = np.max(upper_D - rows, axis=1)  # every share at its upper bound
    for _ in range(60):
        middle = (low + high) / 2
        total = np.clip(rows + middle[:, None], lower_D, upper_D).sum(axis=1)
        low = np.where(total < 1.0, middle, low)
        high = np.where(total < 1.0, high, middle)
    projected = np.clip(rows + ((low + high) / 2)[:, None], lower_D, upper_D)
    return projected.reshape(np.shape(mixture))


def shrink_into_trust_region(
    mixture: np.ndarray, center_D: np.ndarray, reference_D: np.ndarray, radius: float
) -> np.ndarray:
    """Move each mixture straight towards `center_D` until KL(mixture || reference) <= radius.

    The divergence is convex along the line, so bisection finds the border.

    Args:
        mixture: one mixture (D,) or many (M, D).
        center_D: a mixture inside the region; shape (D,).
        reference_D: the mixture the divergence is measured from; shape (D,).
        radius: in nats, > 0.
    """
    rows = np.atleast_2d(np.asarray(mixture, dtype=float))
    inside = np.zeros(len(rows))
    outside = np.ones(len(rows))
    fits = kl_divergence(rows, reference_D) <= radius
    for _ in range(50):
        middle = (inside + outside) / 2
        moved = center_D + middle[:, None] * (rows - center_D)
        ok = kl_divergence(moved, reference_D) <= radius
        inside = np.where(ok, middle, inside)
        outside = np.where(ok, outside, middle)
    step = np.where(fits, 1.0, inside)
    return (center_D + step[:, None] * (rows - center_D)).reshape(np.shape(mixture))


def sobol_uniforms(n_points: int, n_dims: int, *, seed: int) -> np.ndarray:
    """Scrambled Sobol points in (0, 1); point i is the same whatever `n_points` is.

    Returns:
        Shape (n_points, n_dims).
    """
    from scipy.stats import qmc

    sampler = qmc.Sobol(n_dims, scramble=True, seed=seed)
    # A power of two avoids the balance warning; the prefix is cut off afterwards.
    exponent = max(int(np.ceil(np.log2(max(n_points, 2)))), 1)
    return np.clip(sampler.random_base2(exponent)[:n_points], 1e-9, 1 - 1e-9)


def dirichlet_design(
    n_mixtures: int, n_domains: int, *, strength_range: tuple[float, float], seed: int
) -> np.ndarray:
    """Mixtures that fill the simplex widely, from sparse to flat.

    One Sobol dimension draws the Dirichlet strength, log-uniform in `strength_range`; the other D
    become gamma quantiles of that shape. Row i is the same whatever `n_mixtures` is.

    Args:
        n_mixtures: number of rows, >= 1.
        n_domains: D, >= 2.
        strength_range: least and largest Dirichlet concentration of each domain, > 0.
        seed: scrambles the Sobol sequence.

    Returns:
        Shape (n_mixtures, D), on the simplex.
    """
    stages_NSD = staged_dirichlet_design(
        n_mixtures, 1, n_domains, strength_range=strength_range, seed=seed
    )
    return stages_NSD[:, 0]


def staged_dirichlet_design(
    n_runs: int, n_stages: int, n_domains: int, *, strength_range: tuple[float, float], seed: int
) -> np.ndarray:
    """Several mixtures a run, drawn independently of each other, each as in `dirichlet_design`.

    The dimensions of all stages are of one Sobol sequence: two sequences that are scrambled apart
    would be functions of each other.

    Args:
        n_runs: number of rows, >= 1; row i is the same whatever it is.
        n_stages: S, >= 1.
        n_domains: D, >= 2.
        strength_range: least and largest Dirichlet concentration of each domain, > 0.
        seed: scrambles the Sobol sequence.

    Returns:
        Shape (n_runs, S, D), each stage on the simplex.
    """
    from scipy.special import gammaincinv

    low, high = strength_range
    if not 0 < low <= high < np.inf:
        raise ConfigError(
            "design.strength_range must be 0 < least <= largest < inf, "
            f"got {list(strength_range)}. Start from (0.4, 3)."
        )
    uniforms = sobol_uniforms(n_runs, n_stages * (n_domains + 1), seed=seed)
    uniforms_NSC = uniforms.reshape(n_runs, n_stages, n_domains + 1)
    strength_NS = low * (high / low) ** uniforms_NSC[..., 0]
    gammas_NSD = gammaincinv(strength_NS[..., None], uniforms_NSC[..., 1:])
    gammas_NSD = np.maximum(gammas_NSD, 1e-12)
    return gammas_NSD / gammas_NSD.sum(axis=-1, keepdims=True)
