"""Which window of which domain a proxy run reads at which step.

Token-exact: over the whole run each domain gets its share of the windows to within one window.
Stateless: the schedule is a function of (shares, number of windows, seed). The order of data inside
a domain is a function of the pool state alone, so runs of one state share it.

Where shares change from block to block (`BlockSampler`), what a block reads is a function of the
seeds and of the shares up to it, and each block has its shares to within two windows; read as one
block, a run is what `window_schedule` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from causalmix_pipeline.core.errors import ProxyError


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


def domain_schedule(counts_D: np.ndarray, *, seed: int | Sequence[int]) -> np.ndarray:
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


class EndlessOrder:
    """The order in which a domain of `size` items is read: a new one for each epoch."""

    def __init__(self, size: int, *, seed: Sequence[int]) -> None:
        """Begin with the first epoch's order."""
        self.size = size
        self._rng = np.random.default_rng(seed)
        self._order = np.zeros(0, dtype=np.int64)

    def take(self, start: int, count: int) -> np.ndarray:
        """Items `start` to `start + count` of the order, counted over all epochs; shape (count,).

        Raises:
            ProxyError: if the domain is empty and items are asked for.
        """
        if count and not self.size:
            raise ProxyError(
                "a domain with a share must have something to read, got nothing in this pool "
                "state. Give it a share of 0 in each stage of the controller, or add documents."
            )
        missing = start + count - len(self._order)
        if missing > 0:
            n_epochs = -(-missing // self.size)
            more = [self._rng.permutation(self.size) for _ in range(n_epochs)]
            self._order = np.concatenate([self._order, *more])
        return self._order[start : start + count]


def probe_items(size: int, count: int, *, seed: Sequence[int]) -> np.ndarray:
    """Items of a domain that a probe looks at, all of them where there are fewer.

    Args:
        size: items of the domain.
        count: items wanted.
        seed: of the pool state, the domain and the block.
    """
    return np.random.default_rng(seed).permutation(size)[:count]


def wanted_of_block(shares_D: np.ndarray, size: float, owed_D: np.ndarray) -> np.ndarray:
    """What a block is to read of each domain: its share, and what earlier blocks owe it.

    A domain without a share gets nothing: what it is owed is lent to the others by their shares,
    and it stays owed for the block in which the domain has a share again.

    Args:
        shares_D: shape (D,), sum 1.
        size: of the block, in windows or tokens.
        owed_D: in the same unit; below 0 where a domain has had too much.
    """
    lent = owed_D[shares_D == 0].sum()
    return np.where(shares_D == 0, 0.0, shares_D * size + owed_D + shares_D * lent)


class BlockSampler:
    """The windows of a run whose shares change from block to block.

    Attributes:
        available_D: windows that each domain has.
        read_D: windows read so far.
    """

    def __init__(self, available_D: np.ndarray, *, seed: int, order_seed: int) -> None:
        """Begin a run; the seeds are those of `window_schedule`."""
        self.available_D, self.seed, self.n_blocks = np.asarray(available_D), seed, 0
        self.read_D = np.zeros(len(self.available_D), dtype=np.int64)
        self._owed_D = np.zeros(len(self.available_D))
        self._orders = [
            EndlessOrder(int(size), seed=[order_seed, d]) for d, size in enumerate(available_D)
        ]

    def next_block(self, shares_D: np.ndarray, n_windows: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain and window inside the domain of each slot of the next block.

        What rounding kept from a domain in earlier blocks is made up for, so that a share of less
        than a window a block is read, too: all blocks so far together are within one window of
        their shares, and a block within two. A share of 0 reads nothing; where a share falls to 0,
        the others are off by what that domain is owed, too.

        Args:
            shares_D: shape (D,), sum 1; of domains with windows alone.
            n_windows: windows of the block.
        """
        counts_D = _whole_counts(wanted_of_block(shares_D, n_windows, self._owed_D), n_windows)
        self._owed_D = shares_D * n_windows + self._owed_D - counts_D
        domain_W = domain_schedule(counts_D, seed=[self.seed, self.n_blocks])
        window_W = np.zeros(n_windows, dtype=np.int64)
        for d, count in enumerate(counts_D.tolist()):
            window_W[domain_W == d] = self._orders[d].take(int(self.read_D[d]), count)
        self.read_D = self.read_D + counts_D
        self.n_blocks += 1
        return domain_W, window_W


def _whole_counts(wanted_D: np.ndarray, n_windows: int) -> np.ndarray:
    """Whole numbers >= 0 that sum to `n_windows`, by largest remainder."""
    counts_D = np.maximum(np.floor(wanted_D + 1e-9), 0).astype(np.int64)
    while counts_D.sum() > n_windows:  # others were owed less than nothing
        counts_D[np.argmax(np.where(counts_D > 0, counts_D - wanted_D, -np.inf))] -= 1
    missing = n_windows - int(counts_D.sum())
    remainder_D = np.where(wanted_D == 0, -np.inf, wanted_D - counts_D)
    counts_D[np.argsort(-remainder_D, kind="stable")[:missing]] += 1
    return counts_D
