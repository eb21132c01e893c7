"""Which window of which domain a proxy run reads at which step.

Token-exact: over the whole run each domain gets its share of the windows to within one window.
Stateless: the schedule is a function of (shares, number of windows, seed). The order of data inside
a domain is a function of the pool state alone, so runs of one state share it.
"""

from __future__ import annotations

import numpy as np


def window_counts(mixture_D: np.ndarray, n_windows: int) -> np.ndarray:
    """Windows of each domain by largest remainder; sum is `n_windows`, each within 1 of its share.

    Returns:
        Integers, shape (D,).
    """
    exact_D = np.asarray(mixture_D, dtype=float) * n_windows
    counts_D = np.floor(exact_D + 1e-9).astype(np.int64)
    missing = n_windows - int(counts_D.sum())
    # Stable order: the larger remainder first, ties by domain order.
    order = np.argsort(-(exact_D - counts_D), kind="stable")
    counts_D[order[:missing]] += 1
    return counts_D


def domain_schedule(counts_D: np.ndarray, *, seed: int) -> np.ndarray:
    """The domain of each window, spread so that every stretch has about the run's shares.

    The j-th window of a domain with n windows gets a random time in [j/n, (j+1)/n); windows are
    read in order of time.

    Returns:
        Integers in 0..D-1, shape (sum(counts),).
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts_D)), counts_D)
    offsets = np.concatenate([np.arange(n) / max(n, 1) for n in counts_D])
    widths = np.repeat(1.0 / np.maximum(counts_D, 1), counts_D)
    times = offsets + widths * rng.random(len(labels))
    return labels[np.argsort(times, kind="stable")]


def window_schedule(
    counts_D: np.ndarray, available_D: np.ndarray, *, seed: int, order_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The domain and the window inside the domain that each slot of the run reads.

    A domain that is asked for more windows than it has is read again in a new order: an epoch.

    Args:
        counts_D: windows wanted of each domain; shape (D,).
        available_D: windows that each domain has; shape (D,), > 0 where wanted.
        seed: order of domains; the run's own.
        order_seed: order of windows inside the domains; the pool state's.

    Returns:
        Two integer arrays of shape (sum(counts),): domain, window.
    """
    domain_W = domain_schedule(counts_D, seed=seed)
    window_W = np.zeros(len(domain_W), dtype=np.int64)
    for d, (wanted, available) in enumerate(zip(counts_D, available_D, strict=True)):
        if wanted == 0:
            continue
        rng = np.random.default_rng([order_seed, d])
        n_epochs = -(-int(wanted) // int(available))
        order = np.concatenate([rng.permutation(available) for _ in range(n_epochs)])
        window_W[domain_W == d] = order[:wanted]
    return domain_W, window_W
