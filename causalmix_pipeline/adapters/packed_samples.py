"""Documents packed into sequences of one length, and which sequence a run reads when.

Plain text is one stream, cut at the end of a sequence. A document with a prompt is a sample: never
cut in two, since the rest would lack its prompt. Each document of a sequence has positions of its
own and predicts nothing of the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalmix_pipeline.adapters.tokenizer import TokenStore
from causalmix_pipeline.core.token_sampler import (
    EndlessOrder,
    domain_schedule,
    wanted_of_block,
)

#: Unfinished sequences that a sample may still go into; more waste less padding.
N_OPEN = 32


@dataclass(frozen=True, eq=False)
class PackedDomain:
    """The sequences of one domain, as pieces of the token store: S sequences of P pieces.

    Attributes:
        length: tokens of a sequence, L; what is missing is padding.
        piece_P3: where each piece begins and ends in the store's tokens, and where its loss begins.
        first_S: first piece of each sequence; shape (S + 1,).
        tokens_S: tokens of each sequence, padding apart.
        n_truncated: samples that were longer than a sequence, cut at its end.
        n_dropped: samples that had no token with loss left, and empty documents.
    """

    length: int
    piece_P3: np.ndarray
    first_S: np.ndarray
    tokens_S: np.ndarray
    n_truncated: int
    n_dropped: int

    def __len__(self) -> int:
        """Number of sequences, S."""
        return len(self.tokens_S)

    def rows(self, tokens: np.ndarray, sequence: int) -> SequenceRows:
        """One sequence with its tokens.

        Args:
            tokens: all token ids of the store.
            sequence: its number, 0..S-1.
        """
        ids = np.zeros(self.length, dtype=np.int64)
        # Padding has position 0 everywhere: each of its tokens is a document of its own.
        positions = np.zeros(self.length, dtype=np.int64)
        has_loss = np.zeros(self.length, dtype=bool)
        at = 0
        for begin, end, loss in self.piece_P3[
            self.first_S[sequence] : self.first_S[sequence + 1]
        ].tolist():
            n = end - begin
            ids[at : at + n] = tokens[begin:end]
            positions[at : at + n] = np.arange(n)
            has_loss[at + loss - begin : at + n] = True
            at += n
        return SequenceRows(ids, positions, has_loss, at)


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """A packed sequence.

    Attributes:
        ids_L: token ids; 0 where there is only padding.
        position_L: positions, from 0 in each document.
        has_loss_L: whether a token is predicted, from those of its document before it.
        n_tokens: tokens before the padding.
    """

    ids_L: np.ndarray
    position_L: np.ndarray
    has_loss_L: np.ndarray
    n_tokens: int


def pack_domain(
    store: TokenStore, documents: np.ndarray, *, length: int, response_only: bool
) -> PackedDomain:
    """Pack one domain's documents.

    Args:
        store: their tokens.
        documents: their ids as ASCII bytes, in reading order, repeats allowed.
        length: tokens of a sequence, L.
        response_only: prompts carry no loss.
    """
    positions = store.positions(documents)
    offsets, prompts = store.offsets(), store.prompts()
    begin_N, end_N = offsets[positions], offsets[positions + 1]
    prompt_N = prompts[positions]
    stream = _Stream(length)
    bins = _Bins(length)
    n_truncated = n_dropped = 0
    for begin, end, prompt in zip(begin_N.tolist(), end_N.tolist(), prompt_N.tolist(), strict=True):
        if prompt == 0:
            if begin == end:
                n_dropped += 1
            else:
                stream.add(begin, end)
            continue
        if end - begin > length:
            n_truncated += 1
            end = begin + length
        loss = begin + max(prompt if response_only else 1, 1)
        if loss >= end:
            n_dropped += 1
        else:
            bins.add(begin, end, loss)
    sequences = [s for s in stream.sequences + bins.sequences if any(p[2] < p[1] for p in s)]
    counts = [len(sequence) for sequence in sequences]
    return PackedDomain(
        length=length,
        piece_P3=np.array([p for s in sequences for p in s], dtype=np.int64).reshape(-1, 3),
        first_S=np.cumsum([0, *counts], dtype=np.int64),
        tokens_S=np.array([sum(p[1] - p[0] for p in s) for s in sequences], dtype=np.int64),
        n_truncated=n_truncated,
        n_dropped=n_dropped,
    )


Piece = tuple[int, int, int]


class _Stream:
    """Plain text, cut into sequences as it comes."""

    def __init__(self, length: int) -> None:
        self.length, self.room = length, 0
        self.sequences: list[list[Piece]] = []

    def add(self, begin: int, end: int) -> None:
        while begin < end:
            if self.room == 0:
                self.sequences.append([])
                self.room = self.length
            stop = min(end, begin + self.room)
            # A piece's first token has nothing before it to be predicted from.
            self.sequences[-1].append((begin, stop, begin + 1))
            self.room -= stop - begin
            begin = stop


class _Bins:
    """Whole samples, each into the oldest unfinished sequence that has room for it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.sequences: list[list[Piece]] = []
        self.open: list[tuple[int, int]] = []  # sequence, room left

    def add(self, begin: int, end: int, loss: int) -> None:
        n = end - begin
        for place, (sequence, room) in enumerate(self.open):
            if n <= room:
                self.sequences[sequence].append((begin, end, loss))
                self.open[place] = (sequence, room - n)
                if room == n:
                    del self.open[place]
                return
        self.sequences.append([(begin, end, loss)])
        if n < self.length:
            self.open.append((len(self.sequences) - 1, self.length - n))
            if len(self.open) > N_OPEN:
                # The fullest is the least likely to take another one.
                self.open.remove(min(self.open, key=lambda item: item[1]))


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which sequence a run reads when, over W sequences.

    Attributes:
        domain_W: domain of each, 0..D-1.
        sequence_W: its number inside the domain.
        tokens_D: tokens that are read of each domain.
        epochs_D: how often each domain is read: its tokens read over its tokens.
    """

    domain_W: np.ndarray
    sequence_W: np.ndarray
    tokens_D: np.ndarray
    epochs_D: np.ndarray

    def __len__(self) -> int:
        """Number of sequences, W."""
        return len(self.domain_W)


def token_schedule(
    mixture_D: np.ndarray,
    tokens_DS: Sequence[np.ndarray],
    n_tokens: int,
    *,
    seed: int,
    order_seed: int,
) -> Schedule:
    """A schedule whose tokens follow a mixture, each domain's to within one of its sequences.

    A domain is read in an order of its own, in a new one each time that it is read again. Each
    gets the sequences that fit into its share of the tokens; then the domains that lack most get
    one more, until the whole is nearest to `n_tokens`.

    Args:
        mixture_D: share of tokens of each domain; a share of zero draws nothing.
        tokens_DS: tokens of each domain's sequences, > 0; some where the share is > 0.
        n_tokens: tokens of the run.
        seed: order of domains; the run's own.
        order_seed: order inside the domains; the pool state's.
    """
    wanted_D = np.asarray(mixture_D, dtype=float) * n_tokens
    orders, ends = [], []
    for d, (wanted, tokens_S) in enumerate(zip(wanted_D, tokens_DS, strict=True)):
        if wanted <= 0:
            orders.append(np.zeros(0, dtype=np.int64))
            ends.append(np.zeros(1, dtype=np.int64))
            continue
        rng = np.random.default_rng([order_seed, d])
        n_epochs = int(wanted // tokens_S.sum()) + 1  # one sequence more than fits is there, too
        orders.append(np.concatenate([rng.permutation(len(tokens_S)) for _ in range(n_epochs)]))
        ends.append(np.cumsum([0, *tokens_S[orders[-1]]]))
    counts_D, read_D = _nearest_counts(ends, wanted_D, n_tokens)
    domain_W = domain_schedule(counts_D, seed=seed)
    sequence_W = np.zeros(len(domain_W), dtype=np.int64)
    for d, order in enumerate(orders):
        sequence_W[domain_W == d] = order[: counts_D[d]]
    available_D = np.array([max(int(tokens_S.sum()), 1) for tokens_S in tokens_DS])
    return Schedule(domain_W, sequence_W, read_D.astype(np.int64), read_D / available_D)


def _nearest_counts(
    ends: Sequence[np.ndarray], wanted_D: np.ndarray, n_tokens: float, *, at_least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of each domain, and their tokens, for the tokens wanted of each.

    Args:
        ends: for each domain the tokens of its first 0, 1, ... sequences in reading order.
        wanted_D: tokens of each domain.
        n_tokens: tokens of all.
        at_least: sequences of all; more tokens than wanted where they are few and long.
    """
    counts_D = np.array(
        [
            np.searchsorted(e, w + 1e-6, side="right") - 1
            for e, w in zip(ends, wanted_D, strict=True)
        ]
    )
    read_D = np.array([e[c] for e, c in zip(ends, counts_D, strict=True)], dtype=float)
    while True:
        d = int(np.argmax(np.where(wanted_D > 0, wanted_D - read_D, -np.inf)))
        left = n_tokens - read_D.sum()
        enough = counts_D.sum() >= at_least
        if counts_D[d] == len(ends[d]) - 1 or (enough and wanted_D[d] <= read_D[d]):
            break
        size = ends[d][counts_D[d] + 1] - ends[d][counts_D[d]]
        if enough and left < size / 2:
            break
        counts_D[d] += 1
        read_D[d] += size
    return counts_D, read_D


class BlockPacker:
    """The sequences of a run whose shares change from block to block.

    Attributes:
        tokens_DS: tokens of each domain's sequences.
        read_D: tokens read of each domain so far.
    """

    def __init__(self, tokens_DS: Sequence[np.ndarray], *, seed: int, order_seed: int) -> None:
        """Begin a run; the seeds are those of `token_schedule`."""
        self.tokens_DS, self.seed, self.n_blocks = tokens_DS, seed, 0
        n = len(tokens_DS)
        self.read_D, self._owed_D = np.zeros(n, dtype=np.int64), np.zeros(n)
        self._place_D = np.zeros(n, dtype=np.int64)
        self._orders = [
            EndlessOrder(len(tokens_S), seed=[order_seed, d])
            for d, tokens_S in enumerate(tokens_DS)
        ]

    def next_block(
        self, shares_D: np.ndarray, n_tokens: float, *, at_least: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Domain and sequence inside the domain of each slot of the next block.

        What rounding to whole sequences kept from a domain in earlier blocks is made up for: all
        blocks so far together are within one sequence of their shares. A share of 0 reads nothing;
        where a share falls to 0, the others are off by what that domain is owed, too.

        Args:
            shares_D: shares of tokens, shape (D,), sum 1.
            n_tokens: tokens of the block.
            at_least: sequences of the block: one a step.
        """
        wanted_D = wanted_of_block(shares_D, n_tokens, self._owed_D)
        ahead = [self._ahead(d, wanted, at_least) for d, wanted in enumerate(wanted_D)]
        ends = [np.cumsum([0, *self.tokens_DS[d][items]]) for d, items in enumerate(ahead)]
        counts_D, tokens_D = _nearest_counts(
            ends, np.maximum(wanted_D, 0), float(wanted_D.sum()), at_least=at_least
        )
        domain_W = domain_schedule(counts_D, seed=[self.seed, self.n_blocks])
        sequence_W = np.zeros(len(domain_W), dtype=np.int64)
        for d, items in enumerate(ahead):
            sequence_W[domain_W == d] = items[: counts_D[d]]
        self._owed_D = shares_D * n_tokens + self._owed_D - tokens_D
        self._place_D += counts_D
        self.read_D = self.read_D + tokens_D.astype(np.int64)
        self.n_blocks += 1
        return domain_W, sequence_W

    def _ahead(self, domain: int, wanted: float, at_least: int) -> np.ndarray:
        """Sequences of a domain that the next block may read, in their order."""
        if wanted <= 0:
            return np.zeros(0, dtype=np.int64)
        tokens_S = self.tokens_DS[domain]
        if not len(tokens_S):
            return self._orders[domain].take(0, 1)  # says what is wrong
        # More tokens than wanted lie in that many sequences, and in that many whole epochs, of
        # which the first one may have begun.
        by_shortest = int(wanted // tokens_S.min()) + 1
        by_epochs = (int(wanted // tokens_S.sum()) + 2) * len(tokens_S)
        count = max(min(by_shortest, by_epochs), at_least)
        return self._orders[domain].take(int(self._place_D[domain]), count)
