"""A proxy run: one proxy model trained on one mixture of one pool state with one seed.

A run is named by the hash of everything that its outcome depends on, so a changed seed, setting,
document or engine never reads an old result, and an unchanged one is never trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from causalmix_pipeline.core.controllers import ControllerConfig, StaticMixture
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig

#: Raise when the same spec would give another outcome: sampler, engine, evaluation.
CODE_VERSION = 1


@dataclass(frozen=True)
class ProxySpec:
    """Everything that a proxy run's outcome depends on.

    Attributes:
        state_hash: content hash of the pool state.
        tokens_hash: name of the token store that holds the state's documents.
        eval_hash: name of the evaluation windows.
        mixture: share of training tokens of each domain, in the state's order of domains; what a
            controller starts from.
        data_seed: order of domains over the run.
        config: model and training.
        engine: training code and the versions of its libraries.
        controller: what sets the mixture during the run; None keeps it.
    """

    state_hash: str
    tokens_hash: str
    eval_hash: str
    mixture: tuple[float, ...]
    data_seed: int
    config: ProxyConfig | PretrainedConfig
    engine: str
    controller: ControllerConfig | None = None

    def __post_init__(self) -> None:
        """Take a static controller as none: it is the same run."""
        if isinstance(self.controller, StaticMixture):
            object.__setattr__(self, "controller", None)

    def to_dict(self) -> dict:
        """The spec as plain values; shares rounded to 1e-12. Without a controller it has none."""
        values = asdict(self)
        values["mixture"] = [round(float(share), 12) for share in self.mixture]
        values["config"] = self.config.to_dict()
        del values["controller"]
        if self.controller is not None:
            values["controller"] = self.controller.to_dict()
        values["code_version"] = CODE_VERSION
        return values

    @property
    def key(self) -> str:
        """The run's id: 32 hex digits of the SHA-256 of its spec."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ProxyRecord:
    """What a finished proxy run leaves.

    Attributes:
        key: id of its spec.
        spec: the spec as plain values.
        bits_per_byte: held-out loss of each task.
        nats_per_token: the same loss per predicted token.
        train_loss: nats per token, means over equal stretches of the run.
        diverged: the loss wasn't finite, or ended above that of a uniform guess.
        cpu_seconds: this run's part of its stack's processor time.
        scores: score of each task that isn't held-out loss, such as the share of right answers.
        epochs: how often the run read each domain's data, in the spec's order of domains; empty
            in a record of an earlier version.
        seconds: wall-clock time of the run's stack; 0 in a record of an earlier version.
        control: what a controller did and cost (`ControlledRun.told`); None in a static run.
    """

    key: str
    spec: dict
    bits_per_byte: dict[str, float]
    nats_per_token: dict[str, float]
    train_loss: list[float]
    diverged: bool
    cpu_seconds: float
    scores: dict[str, float] = field(default_factory=dict)
    epochs: list[float] = field(default_factory=list)
    seconds: float = 0.0
    control: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values; a static run's has no `control`."""
        values = asdict(self)
        if self.control is None:
            del values["control"]
        return values


@runtime_checkable
class ProxyBackend(Protocol):
    """Where proxy runs are trained."""

    def train(
        self,
        specs: Sequence[ProxySpec],
        on_done: Callable[[Sequence[ProxyRecord]], None],
        *,
        on_failed: Callable[[ProxySpec, str], None] | None = None,
        on_started: Callable[[Sequence[ProxySpec]], None] | None = None,
    ) -> None:
        """Train each spec that has no record yet and keep its record.

        Args:
            specs: the runs to train.
            on_done: called with the records of each batch of runs as it ends.
            on_failed: called with a run that is given up, and why.
            on_started: called with runs as a worker takes them.
        """
        ...
