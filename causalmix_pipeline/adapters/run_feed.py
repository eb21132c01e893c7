"""The windows of tokens that a run of the tiny engine reads, step by step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.tokenizer import cut_windows
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.token_sampler import window_counts, window_schedule


@lru_cache(maxsize=2)
def windows_of_state(
    store: RunStore, tokens_hash: str, state_hash: str, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """All windows of a pool state, and where each domain's start; runs of one state follow."""
    tokens_of = store.token_store(tokens_hash)
    tokens, offsets = tokens_of.tokens(), tokens_of.offsets()
    domains = store.state(state_hash)
    places = tokens_of.positions(np.concatenate(domains))
    ends = np.cumsum([len(ids) for ids in domains])
    windows = [cut_windows(tokens, offsets, part, length) for part in np.split(places, ends[:-1])]
    return np.concatenate(windows), np.cumsum([0, *(len(part) for part in windows)])


class RunFeed:
    """The windows that one run reads, step by step."""

    def __init__(self, store: RunStore, spec: ProxySpec) -> None:
        """Lay out the order that the spec's mixture and seeds give."""
        config = spec.config
        assert isinstance(config, ProxyConfig)
        self.windows, starts = windows_of_state(
            store, spec.tokens_hash, spec.state_hash, config.sequence_length
        )
        counts_D, available_D = (
            window_counts(np.array(spec.mixture), config.windows),
            np.diff(starts),
        )
        domain_W, window_W = window_schedule(
            counts_D, available_D, seed=spec.data_seed, order_seed=int(spec.state_hash[:15], 16)
        )
        self.order = starts[domain_W] + window_W
        self.batch_size = config.batch_size
        #: How often each domain is read.
        self.epochs = [float(epochs) for epochs in counts_D / available_D]

    def batch(self, step: int) -> np.ndarray:
        """Token ids of one step; shape (B, L + 1)."""
        slots = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        return self.windows[slots].astype(np.int64)
