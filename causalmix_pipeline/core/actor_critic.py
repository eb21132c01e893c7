"""An actor-critic that sets the mixture of a run from losses and the alignment of gradients.

Source: AC-ODM, arXiv 2505.23878: deep deterministic policy gradients (arXiv 1509.02971) in which
the model in training is the environment, the mixture the action, and the reward of a domain how
well its gradient agrees with that of all. Both networks are small and in numpy: they learn from
one transition a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from causalmix_pipeline.core.controllers import (
    BlockSeen,
    MixtureController,
    ProbingConfig,
    softmax,
)
from causalmix_pipeline.core.proxy import dial

#: Standardised entries of the state stay within this, as in the authors' code.
MAX_STANDARD = 3.0
#: Adam's two decay rates and epsilon.
ADAM = (0.9, 0.999, 1e-8)


@dataclass(frozen=True)
class RLScheduler(ProbingConfig):
    """Deep deterministic policy gradients whose action is the mixture of the next block.

    After a block, with g_d the gradient of domain d at the same weights:

        state      fraction of the run; tokens read, loss and change of loss of each domain, each
                   standardised over domains
        reward     w_d = <g_d, sum_j g_j> / sum_j |g_j|^2, averaged over blocks with weight
                   `averaging` on the past
        critic     Q(s, a) of D values, one a domain, fitted to r + discount Q'(s', m'(s'))
        actor      m(s) = (1 - floor) softmax(log mixture + network(s)) + floor mixture, ascends
                   sum_d m_d(s) Q_d(s, m(s))
        targets    Q' and m' follow Q and m by `follow` an update
        shares     m(s), and in the first `warmup` of the blocks the mixture plus normal noise, its
                   floor kept in the same way

    w_d is how fast a step on domain d lowers the losses of all domains together, to first order.

    Deviations. The paper leaves the domain itself out of the sum; then both of two domains have
    the same reward, so it is in (as in arXiv 2310.15393). The paper takes gradients from the batch
    and divides rewards by the sampling probabilities; here a probe has equal windows of each
    domain, so nothing is to be corrected. Rewards are divided by the gradients' size, in place of
    standardising them. The state has no norms of weights. Networks have one hidden layer of
    `hidden`, not five of 1024, and make `updates` updates a block, not one a step. The floor is
    ours: the objective is linear in the shares, so the actor goes to one domain alone. This is the
    mode without a proxy; the actor isn't passed on to a larger model.
    """

    kind: ClassVar[str] = "rl_scheduler"
    needs_gradients: ClassVar[bool] = True
    hidden: int = dial(32, "Width of the hidden layer of actor and critic; >= 1.")
    updates: int = dial(32, "Updates of both networks after each block; >= 1.")
    batch: int = dial(32, "Transitions of an update, drawn from all so far; >= 1.")
    learning_rate: float = dial(1e-3, "Adam's rate for both networks; > 0.")
    discount: float = dial(0.95, "What a reward one block later is worth; in [0, 1).")
    follow: float = dial(0.01, "How far the targets move in an update; in (0, 1].")
    averaging: float = dial(0.5, "Weight of earlier blocks in a reward; in [0, 1).")
    noise: float = dial(0.02, "Standard deviation of the shares' noise in the warm-up; >= 0.")
    warmup: float = dial(0.1, "Part of the blocks before the actor decides; in [0, 1).")
    floor: float = dial(0.1, "Part of each domain's starting share that it keeps; in [0, 1].")

    def __post_init__(self) -> None:
        """Check each setting."""
        super().__post_init__()
        for name in ("hidden", "updates", "batch"):
            self._require(name, getattr(self, name) >= 1, ">= 1", "Give a positive count")
        self._require("learning_rate", self.learning_rate > 0, "> 0", "Start from its default")
        self._require("follow", 0 < self.follow <= 1, "in (0, 1]", "Start from its default")
        self._require("noise", self.noise >= 0, ">= 0", "Write 0 for no noise")
        for name in ("discount", "averaging", "warmup"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)", "Start from its default")
        self._require("floor", 0 <= self.floor <= 1, "in [0, 1]", "Write 0 for no floor")

    def build(self, mixture_D: np.ndarray, *, seed: int) -> MixtureController:
        """An actor that has learned nothing."""
        return _ActorCritic(self, mixture_D, np.random.default_rng([seed, len(mixture_D)]))


class _ActorCritic:
    """The controller; see `RLScheduler`. B transitions, S entries of the state."""

    def __init__(
        self, config: RLScheduler, mixture_D: np.ndarray, rng: np.random.Generator
    ) -> None:
        self.config, self.mixture_D, self.rng = config, mixture_D, rng
        n, n_state = len(mixture_D), 3 * len(mixture_D) + 1
        actor, critic = (n_state, config.hidden, n), (n_state + n, config.hidden, n)
        self.actor, self.critic = Network(actor, rng), Network(critic, rng)
        self.later_actor, self.later_critic = self.actor.copy(), self.critic.copy()
        self.transitions: list[tuple[np.ndarray, ...]] = []
        self.reward_D: np.ndarray | None = None
        self.loss_D = np.zeros(n)
        self.read_D = np.zeros(n)
        self.state_S: np.ndarray | None = None
        self.shares_D = mixture_D

    def next_shares(self, seen: BlockSeen | None) -> np.ndarray:
        if seen is None:
            return self.shares_D
        reward_D = self._reward(seen)
        state_S = self._state(seen)
        if self.state_S is not None:
            self.transitions.append((self.state_S, self.shares_D, reward_D, state_S))
            for _ in range(self.config.updates):
                self._learn()
        self.state_S = state_S
        self.shares_D = self._act(seen.step / seen.steps)
        return self.shares_D

    def _reward(self, seen: BlockSeen) -> np.ndarray:
        assert seen.probe is not None
        gram_DD = seen.probe.gram_DD
        assert gram_DD is not None
        # Without any gradient no domain is better than another.
        reward_D = gram_DD.sum(1) / max(float(np.trace(gram_DD)), np.finfo(float).tiny)
        if self.reward_D is not None:
            keep = self.config.averaging
            reward_D = keep * self.reward_D + (1 - keep) * reward_D
        self.reward_D = reward_D
        return reward_D

    def _state(self, seen: BlockSeen) -> np.ndarray:
        assert seen.probe is not None
        change_D = np.zeros_like(self.loss_D)
        if self.state_S is not None:
            change_D = seen.probe.loss_D - self.loss_D
        self.loss_D = seen.probe.loss_D
        self.read_D = self.read_D + seen.tokens_D
        parts = [standardised(values_D) for values_D in (self.read_D, self.loss_D, change_D)]
        return np.concatenate([[seen.step / seen.steps], *parts])

    def _act(self, progress: float) -> np.ndarray:
        config = self.config
        if progress < config.warmup:
            noisy_D = self.mixture_D + self.rng.normal(0, config.noise, len(self.mixture_D))
            wanted_D = np.maximum(noisy_D, 0)
            wanted_D = wanted_D / wanted_D.sum() if wanted_D.sum() > 0 else self.mixture_D
        else:
            assert self.state_S is not None
            wanted_D = self._softmax(self.actor, self.state_S[None])[0]
        return self._floored(wanted_D)

    def _softmax(self, actor: Network, state_BS: np.ndarray) -> np.ndarray:
        """What an actor wants; the shares that it sets keep the floor."""
        return softmax(np.log(self.mixture_D) + actor.forward(state_BS))

    def _floored(self, wanted: np.ndarray) -> np.ndarray:
        floor = self.config.floor
        return (1 - floor) * wanted + floor * self.mixture_D

    def _learn(self) -> None:
        """One update of the critic, the actor and both targets."""
        config = self.config
        n = min(config.batch, len(self.transitions))
        drawn = self.rng.choice(len(self.transitions), n, replace=False)
        state, action, reward, later = (
            np.stack([self.transitions[i][part] for i in drawn]) for part in range(4)
        )
        later_action = self._floored(self._softmax(self.later_actor, later))
        value = self.later_critic.forward(np.concatenate([later, later_action], 1))
        error = self.critic.forward(np.concatenate([state, action], 1)) - (
            reward + config.discount * value
        )
        gradients, _ = self.critic.backward(2 * error / error.size)
        self.critic.adam(gradients, config.learning_rate)

        wanted = self._softmax(self.actor, state)
        policy = self._floored(wanted)
        value = self.critic.forward(np.concatenate([state, policy], 1))
        _, d_inputs = self.critic.backward(policy)
        d_policy = value + d_inputs[:, state.shape[1] :]
        # Through the softmax: its output times what exceeds the mean under it.
        d_logits = wanted * (d_policy - (wanted * d_policy).sum(1, keepdims=True))
        gradients, _ = self.actor.backward(-(1 - config.floor) * d_logits / n)
        self.actor.adam(gradients, config.learning_rate)
        self.later_actor.follow(self.actor, config.follow)
        self.later_critic.follow(self.critic, config.follow)


class Network:
    """A network of one hidden layer (tanh) with Adam; its last layer starts near zero."""

    def __init__(self, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
        """Draw the weights of `sizes` inputs, hidden units and outputs."""
        n_in, hidden, n_out = sizes
        self.weights = [
            rng.normal(0, n_in**-0.5, (n_in, hidden)),
            np.zeros(hidden),
            rng.normal(0, 0.01 * hidden**-0.5, (hidden, n_out)),
            np.zeros(n_out),
        ]
        self.means = [np.zeros_like(w) for w in self.weights]
        self.squares = [np.zeros_like(w) for w in self.weights]
        self.n_updates = 0

    def copy(self) -> Network:
        """A network with the same weights, to follow this one."""
        other = object.__new__(Network)
        other.__dict__ = {**self.__dict__, "weights": [w.copy() for w in self.weights]}
        return other

    def forward(self, inputs: np.ndarray) -> np.ndarray:
        """Outputs (B, O) of inputs (B, I); kept for `backward`."""
        first, bias, second, last_bias = self.weights
        self._inputs, self._hidden = inputs, np.tanh(inputs @ first + bias)
        return self._hidden @ second + last_bias

    def backward(self, d_out: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Gradients at the weights and at the inputs, from that at the last outputs."""
        d_hidden = (d_out @ self.weights[2].T) * (1 - self._hidden**2)
        gradients = [
            self._inputs.T @ d_hidden,
            d_hidden.sum(0),
            self._hidden.T @ d_out,
            d_out.sum(0),
        ]
        return gradients, d_hidden @ self.weights[0].T

    def adam(self, gradients: list[np.ndarray], rate: float) -> None:
        """Move the weights against the gradients (arXiv 1412.6980)."""
        first, second, epsilon = ADAM
        self.n_updates += 1
        for place, gradient in enumerate(gradients):
            mean = self.means[place] = first * self.means[place] + (1 - first) * gradient
            square = second * self.squares[place] + (1 - second) * gradient**2
            self.squares[place] = square
            mean = mean / (1 - first**self.n_updates)
            root = np.sqrt(square / (1 - second**self.n_updates))
            self.weights[place] = self.weights[place] - rate * mean / (root + epsilon)

    def follow(self, other: Network, rate: float) -> None:
        """Move the weights towards another network's."""
        self.weights = [
            (1 - rate) * own + rate * theirs
            for own, theirs in zip(self.weights, other.weights, strict=True)
        ]


def standardised(values_D: np.ndarray) -> np.ndarray:
    """Values less their mean, over their standard deviation, within `MAX_STANDARD`."""
    spread = float(values_D.std())
    centred_D = values_D - values_D.mean()
    return np.clip(centred_D / (spread + 1e-8), -MAX_STANDARD, MAX_STANDARD)
