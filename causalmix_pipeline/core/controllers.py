"""Controllers: rules that set the mixture of a training run while it trains.

A run is cut into blocks. A controller sees what a block gave (losses of each domain, tokens, and
where it asks for more a probe: some training windows of each domain, at the weights of the block's
end) and returns the shares of the next block. It is a function of what it saw, of its settings and
of a seed alone: a run that was killed gives it the same blocks again and goes on.

Four rivals of a static mixture, as published: a schedule written down beforehand, an Exp3 bandit
(arXiv 2312.02406), DoReMi (arXiv 2305.10429) and an actor-critic (arXiv 2505.23878, in
`core.actor_critic`). Where they deviate from the paper, their docstrings say so. In all of them a
block, not a step, is the unit of an update, and a domain without a share at the start gets none.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.mixture import check_mixture
from causalmix_pipeline.core.proxy import dial

#: Raise when the same settings would give other shares: it is part of a controlled run's name.
#: Where that holds for one controller alone, raise its `revision`.
CONTROL_VERSION = 2

#: What the losses of a bandit are divided by where it sums them, as in the authors' code.
REWARD_SCALE = 10.0


@dataclass(frozen=True, eq=False)
class Probe:
    """What training windows of each domain show at the end of a block; nothing is learned of them.

    Attributes:
        loss_D: nats per token.
        excess_D: nats per token above a reference model, each token's at least 0; None where no
            controller asks for it.
        gram_DD: inner products of the domains' gradients; None where no controller asks for it.
    """

    loss_D: np.ndarray
    excess_D: np.ndarray | None = None
    gram_DD: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class BlockSeen:
    """What a controller sees of a block that has ended.

    Attributes:
        step: finished steps of the run.
        steps: steps of the whole run.
        loss_D: mean training loss of the block, nats per token; nan for a domain not read in it.
        tokens_D: tokens of each domain read in the block.
        probe: None where the controller asks for none.
    """

    step: int
    steps: int
    loss_D: np.ndarray
    tokens_D: np.ndarray
    probe: Probe | None = None

    def of(self, active: np.ndarray) -> BlockSeen:
        """The same of some domains, given as booleans (D,)."""
        probe = self.probe
        if probe is not None:
            excess, gram = probe.excess_D, probe.gram_DD
            probe = Probe(
                probe.loss_D[active],
                None if excess is None else excess[active],
                None if gram is None else gram[np.ix_(active, active)],
            )
        return BlockSeen(self.step, self.steps, self.loss_D[active], self.tokens_D[active], probe)

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON holds; `from_dict` reads them back, bit for bit."""
        values = {"step": self.step, "steps": self.steps}
        arrays = {"loss_D": self.loss_D.tolist(), "tokens_D": self.tokens_D.tolist()}
        probe = None
        if self.probe is not None:
            parts = {f.name: getattr(self.probe, f.name) for f in fields(self.probe)}
            probe = {name: None if a is None else a.tolist() for name, a in parts.items()}
        return values | arrays | {"probe": probe}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockSeen:
        """Inverse of `to_dict`."""
        probe = values["probe"]
        if probe is not None:
            excess, gram = (
                None if probe[name] is None else np.array(probe[name], dtype=float)
                for name in ("excess_D", "gram_DD")
            )
            probe = Probe(np.array(probe["loss_D"], dtype=float), excess, gram)
        return cls(
            values["step"],
            values["steps"],
            np.array(values["loss_D"], dtype=float),
            np.array(values["tokens_D"], dtype=np.int64),
            probe,
        )


class MixtureController(Protocol):
    """Sets the shares of a run block by block."""

    def next_shares(self, seen: BlockSeen | None) -> np.ndarray:
        """Shares of the next block, shape (D,), >= 0, sum 1.

        Args:
            seen: the block that has just ended; None before the first one.
        """
        ...


@dataclass(frozen=True)
class ControllerConfig(ABC):
    """Settings of a controller; the part of a run's spec that says who sets its mixture.

    Attributes:
        kind: name of the controller.
        revision: of this controller, beside the version of all.
        needs_reference: whether probes tell the excess over a reference model.
        needs_gradients: whether probes tell how gradients agree.
    """

    kind: ClassVar[str] = ""
    revision: ClassVar[int] = 0
    needs_reference: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    @property
    def n_probed(self) -> int:
        """Windows, or packed sequences, of each domain in a probe; 0 where none is asked for."""
        return 0

    @abstractmethod
    def build(self, mixture_D: np.ndarray, *, seed: int) -> MixtureController:
        """The controller of a run that starts from a mixture without zeros."""

    @abstractmethod
    def ends(self, steps: int) -> list[int]:
        """Finished steps at the end of each block of a run."""

    def start(self, mixture_D: np.ndarray) -> np.ndarray:
        """Positive for the domains that the controller may read; shape (D,)."""
        return mixture_D

    def to_dict(self) -> dict[str, Any]:
        """Kind, version and all settings, in values that JSON holds."""
        settings = json.loads(json.dumps(asdict(self)))  # lists, as they are read back
        return {"kind": self.kind, "version": CONTROL_VERSION + self.revision, **settings}

    @classmethod
    def describe(cls) -> dict[str, str]:
        """What each setting is, by name."""
        return {each.name: each.metadata["description"] for each in fields(cls)}

    def _require(self, name: str, holds: bool, rule: str, way_out: str) -> None:
        """Raise the error of a setting that breaks its rule."""
        if not holds:
            value = getattr(self, name)
            raise ConfigError(f"controller.{name} must be {rule}, got {value!r}. {way_out}.")


@dataclass(frozen=True)
class StaticMixture(ControllerConfig):
    """One mixture for the whole run: what a run without a controller does, bit for bit.

    A spec with it is the spec without a controller, by the same name.
    """

    kind: ClassVar[str] = "static"

    def build(self, mixture_D: np.ndarray, *, seed: int) -> MixtureController:
        """A controller that looks at nothing."""
        return _Planned([mixture_D])

    def ends(self, steps: int) -> list[int]:
        """One block."""
        return [steps]


@dataclass(frozen=True)
class Schedule(ControllerConfig):
    """Stages written down beforehand, each a part of the training with a mixture of its own.

    A stage is a block: it has its shares to within two windows or one packed sequence, and reads
    nothing of a domain without a share in it. The run's own mixture isn't read.

    Attributes:
        stages: for each stage its part of the steps, > 0 and together 1, and its mixture.
        probe_windows: windows or sequences of each domain whose loss is measured at the end of
            each stage but the last, for the run's record; nothing is decided by it.
    """

    kind: ClassVar[str] = "schedule"
    stages: tuple[tuple[float, tuple[float, ...]], ...] = dial(
        (), "Stages in their order: part of the training (together 1) and mixture of each."
    )
    probe_windows: int = dial(
        0, "Windows of each domain whose loss is measured after each stage but the last; >= 0."
    )

    def __post_init__(self) -> None:
        """Check the parts and each mixture."""
        stages = tuple((float(part), tuple(map(float, mixture))) for part, mixture in self.stages)
        object.__setattr__(self, "stages", stages)
        self._require("stages", len(stages) > 0, "one stage or more", "Give a part and a mixture")
        parts = [part for part, _ in stages]
        self._require(
            "stages",
            min(parts) > 0 and abs(sum(parts) - 1) < 1e-6,
            "parts of the training > 0 that sum to 1",
            "Divide each part by the sum",
        )
        self._require(
            "stages",
            len({len(mixture) for _, mixture in stages}) == 1,
            "mixtures over the same domains",
            "Give each stage a share for every domain",
        )
        for number, (_, mixture) in enumerate(stages):
            check_mixture(np.array(mixture), field=f"controller.stages[{number}]")
        self._require("probe_windows", self.probe_windows >= 0, ">= 0", "Write 0 for none")

    @property
    def n_probed(self) -> int:
        """Windows, or packed sequences, of each domain in a probe."""
        return self.probe_windows

    def to_dict(self) -> dict[str, Any]:
        """As of every controller; without a probe it isn't named, as before there was one."""
        values = super().to_dict()
        if not self.probe_windows:
            del values["probe_windows"]
        return values

    def build(self, mixture_D: np.ndarray, *, seed: int) -> MixtureController:
        """A controller that looks at nothing."""
        active = self._shares_SD().max(0) > 0
        return _Planned(list(self._shares_SD()[:, active]))

    def ends(self, steps: int) -> list[int]:
        """One block for each stage; at least a step each.

        Raises:
            ConfigError: if the run is shorter than its stages.
        """
        parts = np.array([part for part, _ in self.stages])
        ends = np.rint(np.cumsum(parts) / parts.sum() * steps).astype(int).tolist()
        self._require(
            "stages",
            all(a < b for a, b in zip([0, *ends], ends, strict=False)),
            f"parts of at least one of {steps} steps",
            "Lengthen the run or leave a stage out",
        )
        return ends

    def start(self, mixture_D: np.ndarray) -> np.ndarray:
        """Largest share of each domain in any stage."""
        if len(mixture_D) != len(self.stages[0][1]):
            raise ConfigError(
                f"controller.stages must have mixtures over {len(mixture_D)} domains, got "
                f"{len(self.stages[0][1])}. Give a share for every domain."
            )
        return self._shares_SD().max(0)

    def _shares_SD(self) -> np.ndarray:
        return np.array([mixture for _, mixture in self.stages])


class _Planned:
    """Shares that are known beforehand, one after the other."""

    def __init__(self, shares: list[np.ndarray]) -> None:
        self._shares = iter(shares)

    def next_shares(self, seen: BlockSeen | None) -> np.ndarray:
        return next(self._shares)


@dataclass(frozen=True)
class BlockedConfig(ControllerConfig):
    """Settings that all controllers have that decide anew for each of many blocks."""

    blocks: int = dial(50, "Blocks of a run, as many as it has steps at most; >= 2.")

    def __post_init__(self) -> None:
        """Check the blocks."""
        self._require("blocks", self.blocks >= 2, ">= 2", "One block has a static mixture")

    def ends(self, steps: int) -> list[int]:
        """Blocks of equal length, to a step."""
        n = min(self.blocks, steps)
        return [steps * (block + 1) // n for block in range(n)]


@dataclass(frozen=True)
class ProbingConfig(BlockedConfig):
    """Settings of the controllers that ask for a probe after each block."""

    probe_windows: int = dial(4, "Windows or sequences of each domain in a probe; >= 1.")

    def __post_init__(self) -> None:
        """Check the blocks and the probe."""
        super().__post_init__()
        self._require("probe_windows", self.probe_windows >= 1, ">= 1", "Give a count")

    @property
    def n_probed(self) -> int:
        """Windows, or packed sequences, of each domain in a probe."""
        return self.probe_windows


@dataclass(frozen=True)
class OnlineBandit(BlockedConfig):
    """Exp3 over domains, whose reward is the loss of what was read: online data mixing.

    Source: arXiv 2312.02406, algorithm 1, and the code of its authors. With D domains, after the
    t-th block with shares p, losses L and n_d of its n tokens read of domain d (only domains that
    were read are updated):

        R_d <- a R_d + (1 - a) L_d / p_d                    memory "average", the paper's
        R_d <- R_d + (n_d / n) (L_d / 10) / p_d             memory "sum", plain Exp3
        e_t  = min(1 / D, sqrt(ln D / (D t)))
        p_d <- (1 - D e_t) exp(e_{t-1} R_d) / sum_j exp(e_{t-1} R_j) + e_t

    With "average" the rewards stay bounded while e_t falls, so the shares end near equal ones;
    "sum" goes to the domain with the largest loss. It costs no extra tokens.

    Deviations: t counts blocks, not steps, so e_t is larger; all domains of a block are updated
    together, in plain Exp3 by the mean over the block's tokens as if each had been a draw; the
    first block has the starting mixture.
    """

    kind: ClassVar[str] = "online_bandit"
    smoothing: float = dial(0.9, "What a moving average of rewards keeps, a; in [0, 1).")
    memory: str = dial("average", "average: rewards are averaged over blocks; sum: plain Exp3.")

    def __post_init__(self) -> None:
        """Check each setting."""
        super().__post_init__()
        self._require("smoothing", 0 <= self.smoothing < 1, "in [0, 1)", "The paper has 0.9")
        self._require("memory", self.memory in ("average", "sum"), "average or sum", "Choose one")

    def build(self, mixture_D: np.ndarray, *, seed: int) -> MixtureController:
        """A bandit without rewards so far."""
        return _Bandit(self, mixture_D)


class _Bandit:
    """Exp3; see `OnlineBandit`."""

    def __init__(self, config: OnlineBandit, mixture_D: np.ndarray) -> None:
        self.config, self.shares_D = config, mixture_D
        self.reward_D = np.zeros(len(mixture_D))
        self.exploration, self.t = 1 / len(mixture_D), 0

    def next_shares(self, seen: BlockSeen | None) -> np.ndarray:
        if seen is None:
            return self.shares_D
        read = np.isfinite(seen.loss_D)
        weighted = seen.loss_D[read] / self.shares_D[read]
        if self.config.memory == "average":
            keep = self.config.smoothing
            self.reward_D[read] = keep * self.reward_D[read] + (1 - keep) * weighted
        else:
            drawn = seen.tokens_D[read] / seen.tokens_D.sum()
            self.reward_D[read] += drawn * weighted / REWARD_SCALE
        self.t += 1
        n = len(self.shares_D)
        before = self.exploration
        self.exploration = min(1 / n, float(np.sqrt(np.log(n) / (n * self.t))))
        gibbs_D = softmax(before * self.reward_D)
        self.shares_D = (1 - n * self.exploration) * gibbs_D + self.exploration
        return self.shares_D


@dataclass(frozen=True)
class DoReMi(ProbingConfig):
    """Group-robust weights: more of the domains in which a model lags most behind a reference.

    Source: arXiv 2305.10429, algorithm 1. A reference model is trained on the starting mixture.
    Weights start from equal ones. Then, with l and r the losses of a token under the model and the
    reference, after each block:

        x_d  = mean over tokens of domain d of max(l - r, 0)
        a_d <- a_d exp(step_size x_d), divided by their sum
        a_d <- (1 - smoothing) a_d + smoothing / D

    The paper's result is the mean of the weights over the run (`mean_shares` of the run's record),
    with which a model is then trained anew, static: its compute is that of all three runs.

    Deviations: domains are sampled by their weights, where the paper samples them equally and
    weights their losses, the same gradient in expectation; weights change with a block, not a
    step; the excess is taken from a probe with equal windows of each domain at the block's end,
    not from the batch.
    """

    kind: ClassVar[str] = "doremi"
    revision: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = True
    step_size: float = dial(1.0, "Step of the weights in each block; the paper's eta; > 0.")
    smoothing: float = dial(1e-3, "Equal shares mixed into the weights; the paper's c; in (0, 1).")

    def __post_init__(self) -> None:
        """Check each setting."""
        super().__post_init__()
        self._require("step_size", self.step_size > 0, "> 0", "The paper has 1")
        self._require(
            "smoothing",
            0 < self.smoothing < 1,
            "in (0, 1)",
            "A weight that has fallen to 0 would never rise again; the paper has 0.001",
        )

    def build(self, mixture_D: np.ndarray, *, seed: int) -> MixtureController:
        """Equal weights; the mixture is that of the reference."""
        return _RobustWeights(self, len(mixture_D))


class _RobustWeights:
    """The weights of DoReMi."""

    def __init__(self, config: DoReMi, n_domains: int) -> None:
        self.config, self.shares_D = config, np.full(n_domains, 1 / n_domains)

    def next_shares(self, seen: BlockSeen | None) -> np.ndarray:
        if seen is None:
            return self.shares_D
        assert seen.probe is not None
        assert seen.probe.excess_D is not None
        excess_D = seen.probe.excess_D
        weights_D = softmax(np.log(self.shares_D) + self.config.step_size * excess_D)
        equal = self.config.smoothing
        self.shares_D = (1 - equal) * weights_D + equal / len(weights_D)
        return self.shares_D


def softmax(logits_D: np.ndarray) -> np.ndarray:
    """Exponentials over their sum, along the last axis."""
    exponentials = np.exp(logits_D - logits_D.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
