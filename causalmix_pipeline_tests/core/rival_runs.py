"""A trainer that computes outcomes from mixtures: what rivals gain is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.rivals import Size, Track

SMALL, LARGE = ProxyConfig(steps=100), ProxyConfig(hidden=64, layers=2, steps=100)
SIZES = (Size("32x1", SMALL, 10.0), Size("64x2", LARGE, 80.0))
TRACK = Track(("first", "second"), (1, 2, 3), "tokens", "evaluation", "engine")
EQUAL_MD = np.full((2, 3), 1 / 3)

#: What a controlled run costs beside a static one.
CONTROLLED_COST = 1.5
#: The mean shares of every controlled run.
MEAN_SHARES = (0.5, 0.3, 0.2)


class Trainer:
    """Counts what it trains; a run's bits per byte are `loss(spec)`, or it diverges with None."""

    def __init__(self, loss: Callable[[ProxySpec], float | None]) -> None:
        self.loss, self.trained = loss, {}

    def __call__(self, specs: Sequence[ProxySpec]) -> list[ProxyRecord]:
        """The record of each run, in order."""
        self.trained |= {spec.key: spec for spec in specs}
        return [self.record(spec) for spec in specs]

    def record(self, spec: ProxySpec) -> ProxyRecord:
        """What a run leaves."""
        loss, control = self.loss(spec), None
        if spec.controller is not None:
            total = CONTROLLED_COST * spec.config.tokens
            control = {"mean_shares": list(MEAN_SHARES), "total_tokens": total}
        bits = {} if loss is None else {"task": loss}
        return ProxyRecord(spec.key, {}, bits, {}, [1.0], loss is None, 0.0, control=control)
