"""Loops over bytes, words and tokens, compiled by numba; import this module inside functions only.

All read a batch of documents as one array of UTF-8 bytes (`text_B`) and the documents' borders in
it (`offsets`, shape (N + 1,)). `kinds` holds the kinds of each code point (`text_scores`). Each
function has one signature, so it is compiled once: when the module is imported for the first time.
The machine code is kept beside this file, or in the user's cache folder where this one can't be
written, and compiled again in each process where neither can. Processes that start together may
compile the same code twice and keep one; a file of the cache appears whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types  # pyright: ignore[reportAttributeAccessIssue]

#: Bits of `kinds`.
LETTER, DIGIT, BLANK, WORD, SPLITS = 1, 2, 4, 8, 16

#: FNV-1a, 64 bits (draft-eastlake-fnv); the hash of words, equal on every platform.
FNV_START = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)

#: Longest marker word looked for, in characters.
LONGEST_MARKER = 16

#: MTLD: the type-token ratio that ends a factor. HD-D: words drawn.
MTLD_RATIO = 0.72
HDD_DRAWS = 42

#: vocd-D: sizes of the samples, samples of each size, repetitions (McKee, Malvern & Richards 2000).
VOCD_SIZES = (35, 50)
VOCD_SAMPLES = 100
VOCD_TRIALS = 3

#: Words of these lengths count as plausible.
PLAUSIBLE_WORD = (2, 12)


def _read(dtype: Any, n_axes: int = 1) -> Any:
    """Array that is only read: bytes of Python and memory-mapped files can't be written."""
    return types.Array(dtype, n_axes, "C", readonly=True)


BYTES, INTS, HASHES = _read(types.uint8), _read(types.int64), _read(types.uint64)
FLOATS_2D = types.float64[:, ::1]


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for one signature; keep the machine code where a folder allows it."""

    def compile_function(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature[0](*signature[1:]), cache=True)(function)
        except (RuntimeError, OSError):  # no folder for the cache, or a full disk
            return njit(signature[0](*signature[1:]))(function)

    return compile_function


@njit
def _code_point(text_B, i):
    """The code point at a byte, and where the next one starts."""
    first = np.int64(text_B[i])
    if first < 0x80:
        return first, i + 1
    if first < 0xE0:
        return ((first & 0x1F) << 6) | (np.int64(text_B[i + 1]) & 0x3F), i + 2
    second = np.int64(text_B[i + 1]) & 0x3F
    third = np.int64(text_B[i + 2]) & 0x3F
    if first < 0xF0:
        return ((first & 0x0F) << 12) | (second << 6) | third, i + 3
    fourth = np.int64(text_B[i + 3]) & 0x3F
    return ((first & 0x07) << 18) | (second << 12) | (third << 6) | fourth, i + 4


@njit
def _mix(x):
    """Spread the bits of a hash (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit
def _longest(offsets):
    """Length of the longest document, at least 1."""
    longest = 1
    for d in range(len(offsets) - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    return longest


@njit
def _table_size(n):
    """Slots of a hash table for n keys: a power of two, at most half full."""
    size = 16
    while size < 2 * n:
        size *= 2
    return size


@njit
def _find(key, keys, stamps, stamp, size):
    """Slot of a key, or the free slot where it belongs; other stamps' slots are free."""
    slot = np.int64(_mix(key) & np.uint64(size - 1))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & (size - 1)
    return slot


@njit
def _word_ids(text_B, start, end, kinds, ids, keys, values, stamps, stamp, size):
    """Number the words of a document from 0 in the order of their first use.

    Returns the numbers of words and of different words; `ids` holds a number for each word.
    """
    n_words, n_types = 0, 0
    i = start
    inside = False
    key = FNV_START
    while i < end or inside:
        is_word = False
        if i < end:
            point, i = _code_point(text_B, i)
            is_word = kinds[point] & WORD != 0
            if is_word:
                if not inside:
                    key = FNV_START
                key = (key ^ np.uint64(point)) * FNV_PRIME
        if inside and not is_word:
            slot = _find(key, keys, stamps, stamp, size)
            if stamps[slot] != stamp:
                stamps[slot], keys[slot], values[slot] = stamp, key, n_types
                n_types += 1
            ids[n_words] = values[slot]
            n_words += 1
        inside = is_word
    return n_words, n_types


@njit
def _hdd(counts, n_types, n_words, absent):
    """Sum over words of the chance to be among those drawn, over the number drawn.

    `absent[f]`: the chance that none of f equal words is drawn, by recursion over f.
    """
    draws = min(HDD_DRAWS, n_words)
    most = 0
    for t in range(n_types):
        most = max(most, counts[t])
    absent[0] = 1.0
    for f in range(most):
        absent[f + 1] = absent[f] * max(n_words - f - draws, 0) / (n_words - f)
    total = 0.0
    for t in range(n_types):
        total += 1.0 - absent[counts[t]]
    return total / draws


@njit
def _count_types(ids, n_words, n_types, counts):
    counts[:n_types] = 0
    for w in range(n_words):
        counts[ids[w]] += 1


@njit
def _factors(ids, n_words, seen, stamp, backwards):
    """MTLD factors in one direction, the last one in part; and the next unused stamp."""
    stamp += 1
    factors, n, n_types = 0.0, 0, 0
    for w in range(n_words):
        word = ids[n_words - 1 - w] if backwards else ids[w]
        n += 1
        if seen[word] != stamp:
            seen[word] = stamp
            n_types += 1
        if n_types / n <= MTLD_RATIO:
            factors += 1.0
            n, n_types = 0, 0
            stamp += 1
    if n > 0:
        factors += (1.0 - n_types / n) / (1.0 - MTLD_RATIO)
    return factors, stamp


@compiled(types.int64[:, ::1], BYTES, INTS, BYTES)
def count_characters(text_B: np.ndarray, offsets: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Characters, letters, digits, blanks, symbols of each document; shape (N, 5)."""
    counts = np.zeros((len(offsets) - 1, 5), dtype=np.int64)
    for d in range(len(counts)):
        i = offsets[d]
        n_chars, n_letters, n_digits, n_blanks = 0, 0, 0, 0
        while i < offsets[d + 1]:
            point, i = _code_point(text_B, i)
            kind = kinds[point]
            n_chars += 1
            n_letters += kind & LETTER
            n_digits += (kind & DIGIT) >> 1
            n_blanks += (kind & BLANK) >> 2
        counts[d] = (n_chars, n_letters, n_digits, n_blanks,
                     n_chars - n_letters - n_digits - n_blanks)  # fmt: skip
    return counts


@compiled(types.int64[:, ::1], BYTES, INTS, BYTES, HASHES)
def count_markers(
    text_B: np.ndarray, offsets: np.ndarray, kinds: np.ndarray, markers: np.ndarray
) -> np.ndarray:
    """Words, and words whose FNV-1a hash is among `markers`, of each document; shape (N, 2).

    Letters A to Z are read as a to z, and the long s as s (the simple folds of Unicode that reach
    ASCII letters of a marker).
    """
    counts = np.zeros((len(offsets) - 1, 2), dtype=np.int64)
    for d in range(len(counts)):
        i = offsets[d]
        length = 0
        key = FNV_START
        while i < offsets[d + 1] or length:
            is_word = False
            if i < offsets[d + 1]:
                point, i = _code_point(text_B, i)
                is_word = kinds[point] & WORD != 0
                if is_word:
                    if 65 <= point <= 90:
                        point += 32
                    elif point == 0x17F:
                        point = 115
                    if length == 0:
                        key = FNV_START
                    key = (key ^ np.uint64(point)) * FNV_PRIME
                    length += 1
            if length and not is_word:
                counts[d, 0] += 1
                if length <= LONGEST_MARKER:
                    for m in range(len(markers)):
                        if markers[m] == key:
                            counts[d, 1] += 1
                            break
                length = 0
    return counts


@compiled(FLOATS_2D, BYTES, INTS, BYTES)
def lexical_diversity(text_B: np.ndarray, offsets: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """MTLD and HD-D of each document; shape (N, 2), NaN where there is no word."""
    found = np.full((len(offsets) - 1, 2), np.nan)
    most = _longest(offsets) // 2 + 1
    ids = np.empty(most, dtype=np.int64)
    counts = np.empty(most, dtype=np.int64)
    seen = np.zeros(most, dtype=np.int64)
    absent = np.empty(most + 1)
    size = _table_size(most)
    keys, values = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.int64)
    stamps = np.full(size, -1, dtype=np.int64)
    stamp = 0
    for d in range(len(found)):
        start, end = offsets[d], offsets[d + 1]
        own_size = _table_size((end - start) // 2 + 1)
        n_words, n_types = _word_ids(
            text_B, start, end, kinds, ids, keys, values, stamps, d, own_size
        )
        if n_words == 0:
            continue
        forwards, stamp = _factors(ids, n_words, seen, stamp, False)
        backwards, stamp = _factors(ids, n_words, seen, stamp, True)
        # A text without a repeated word has no factor at all: it counts as one.
        forwards = forwards if forwards > 0 else 1.0
        backwards = backwards if backwards > 0 else 1.0
        found[d, 0] = (n_words / forwards + n_words / backwards) / 2
        _count_types(ids, n_words, n_types, counts)
        found[d, 1] = _hdd(counts, n_types, n_words, absent)
    return found


@njit
def _expected_ratio(n, diversity):
    """Type-token ratio of n words at a diversity D (McKee, Malvern & Richards 2000)."""
    return diversity / n * (math.sqrt(1.0 + 2.0 * n / diversity) - 1.0)


@njit
def _misfit(log_diversity, ratios):
    total = 0.0
    for k in range(len(ratios)):
        total += (ratios[k] - _expected_ratio(VOCD_SIZES[0] + k, math.exp(log_diversity))) ** 2
    return total


@njit
def _fitted_diversity(ratios):
    """D of least squared misfit, by golden section over log D between .01 and 100,000."""
    low, high = math.log(0.01), math.log(1e5)
    step = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - step * (high - low), low + step * (high - low)
    f_left, f_right = _misfit(left, ratios), _misfit(right, ratios)
    for _ in range(60):
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - step * (high - low)
            f_left = _misfit(left, ratios)
        else:
            low, left, f_left = left, right, f_right
            right = low + step * (high - low)
            f_right = _misfit(right, ratios)
    return math.exp((low + high) / 2)


@njit
def _sampled_ratios(ids, n_words, order, seen, state, stamp, ratios):
    """Mean type-token ratio of random samples of each size, drawn without replacement."""
    for k in range(len(ratios)):
        n = VOCD_SIZES[0] + k
        total = 0
        for _ in range(VOCD_SAMPLES):
            stamp += 1
            for j in range(n):
                state += np.uint64(0x9E3779B97F4A7C15)
                draw = _mix(state) >> np.uint64(32)
                pick = j + np.int64((draw * np.uint64(n_words - j)) >> np.uint64(32))
                order[j], order[pick] = order[pick], order[j]
                word = ids[order[j]]
                if seen[word] != stamp:
                    seen[word] = stamp
                    total += 1
        ratios[k] = total / (n * VOCD_SAMPLES)
    return state, stamp


@compiled(types.float64[::1], BYTES, INTS, BYTES, HASHES)
def vocd(
    text_B: np.ndarray, offsets: np.ndarray, kinds: np.ndarray, seeds: np.ndarray
) -> np.ndarray:
    """vocd-D of each document, shape (N,).

    NaN under 50 words, and where no sample has a repeated word: no finite D fits.
    """
    found = np.full(len(offsets) - 1, np.nan)
    most = _longest(offsets) // 2 + 1
    ids, order = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    seen = np.zeros(most, dtype=np.int64)
    size = _table_size(most)
    keys, values = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.int64)
    stamps = np.full(size, -1, dtype=np.int64)
    ratios = np.empty(VOCD_SIZES[1] - VOCD_SIZES[0] + 1)
    stamp = 0
    for d in range(len(found)):
        start, end = offsets[d], offsets[d + 1]
        own_size = _table_size((end - start) // 2 + 1)
        n_words, _ = _word_ids(text_B, start, end, kinds, ids, keys, values, stamps, d, own_size)
        if n_words < VOCD_SIZES[1]:
            continue
        state = seeds[d]
        total = 0.0
        for w in range(n_words):
            order[w] = w
        for _ in range(VOCD_TRIALS):
            state, stamp = _sampled_ratios(ids, n_words, order, seen, state, stamp, ratios)
            total += _fitted_diversity(ratios) if ratios.min() < 1.0 else np.nan
        found[d] = total / VOCD_TRIALS
    return found


@njit
def _distinct_lines(text_B, start, end, kinds, keys, stamps, stamp, size):
    """Lines that aren't blank, and different ones; blanks at their ends don't count."""
    n_lines, n_distinct = 0, 0
    i = start
    key, kept = FNV_START, FNV_START
    filled = False
    while i < end:
        point, i = _code_point(text_B, i)
        if kinds[point] & BLANK == 0:
            key = (key ^ np.uint64(point)) * FNV_PRIME
            kept = key
            filled = True
        elif filled:
            key = (key ^ np.uint64(point)) * FNV_PRIME
        if (point == 10 or i >= end) and filled:
            n_lines += 1
            slot = _find(kept, keys, stamps, stamp, size)
            if stamps[slot] != stamp:
                stamps[slot], keys[slot] = stamp, kept
                n_distinct += 1
        if point == 10:
            key, filled = FNV_START, False
    return n_lines, n_distinct


@njit
def _plausible_words(text_B, start, end, kinds):
    """Words of letters alone with a plausible length."""
    n_plausible, length = 0, 0
    only_letters = True
    i = start
    while i < end or length:
        is_word = False
        if i < end:
            point, i = _code_point(text_B, i)
            is_word = kinds[point] & WORD != 0
            if is_word:
                only_letters = (only_letters or length == 0) and kinds[point] & LETTER != 0
                length += 1
        if length and not is_word:
            if only_letters and PLAUSIBLE_WORD[0] <= length <= PLAUSIBLE_WORD[1]:
                n_plausible += 1
            length = 0
    return n_plausible


@compiled(FLOATS_2D, BYTES, INTS, BYTES)
def style_signs(text_B: np.ndarray, offsets: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Signs of clean text, each in 0..1; shape (N, 4), NaN where a sign isn't defined.

    Share of distinct lines, of letters and blanks among the characters, of plausible words among
    the words; HD-D of a text of at least 42 words.
    """
    found = np.full((len(offsets) - 1, 4), np.nan)
    most = _longest(offsets) // 2 + 1
    ids, counts = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    absent = np.empty(most + 1)
    size = _table_size(most)
    keys, values = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.int64)
    stamps = np.full(size, -1, dtype=np.int64)
    for d in range(len(found)):
        start, end = offsets[d], offsets[d + 1]
        own_size = _table_size((end - start) // 2 + 1)
        n_lines, n_distinct = _distinct_lines(
            text_B, start, end, kinds, keys, stamps, 2 * d, own_size
        )
        if n_lines:
            found[d, 0] = n_distinct / n_lines
        n_chars, n_clean = 0, 0
        i = start
        while i < end:
            point, i = _code_point(text_B, i)
            n_chars += 1
            n_clean += 1 if kinds[point] & (LETTER | BLANK) else 0
        if n_chars:
            found[d, 1] = n_clean / n_chars
        n_words, n_types = _word_ids(
            text_B, start, end, kinds, ids, keys, values, stamps, 2 * d + 1, own_size
        )
        if n_words:
            found[d, 2] = _plausible_words(text_B, start, end, kinds) / n_words
        if n_words >= HDD_DRAWS:
            _count_types(ids, n_words, n_types, counts)
            found[d, 3] = _hdd(counts, n_types, n_words, absent)
    return found


@compiled(
    FLOATS_2D,
    _read(types.uint32), INTS, INTS, _read(types.float32, 2), _read(types.float32, 3),
)  # fmt: skip
def token_sums(
    tokens: np.ndarray,
    offsets: np.ndarray,
    halves: np.ndarray,
    bits_2V: np.ndarray,
    bits_2VV: np.ndarray,
) -> np.ndarray:
    """Entropy, share of distinct pairs, bits per token and per pair of each document; (N, 4)."""
    found = np.zeros((len(offsets) - 1, 4))
    vocab_size = bits_2V.shape[1]
    counts = np.zeros(vocab_size, dtype=np.int64)
    size = _table_size(_longest(offsets))
    keys = np.empty(size, dtype=np.uint64)
    stamps = np.full(size, -1, dtype=np.int64)
    for d in range(len(found)):
        start, end, half = offsets[d], offsets[d + 1], halves[d]
        n = end - start
        if n == 0:
            continue
        own_size = _table_size(n)
        n_distinct, bits, pair_bits = 0, 0.0, 0.0
        for i in range(start, end):
            token = np.int64(tokens[i])
            counts[token] += 1
            bits += bits_2V[half, token]
            if i > start:
                before = np.int64(tokens[i - 1])
                pair_bits += bits_2VV[half, before, token]
                key = np.uint64(before * vocab_size + token)
                slot = _find(key, keys, stamps, d, own_size)
                if stamps[slot] != d:
                    stamps[slot], keys[slot] = d, key
                    n_distinct += 1
        entropy = 0.0
        for i in range(start, end):
            token = np.int64(tokens[i])
            if counts[token]:
                share = counts[token] / n
                entropy -= share * math.log2(share)
                counts[token] = 0
        pairs = max(n - 1, 1)
        found[d] = (max(entropy, 0.0), n_distinct / pairs, bits / n, pair_bits / pairs)
    return found


@compiled(
    types.int64[::1],
    BYTES, INTS, _read(types.uint32), INTS, _read(types.int32), _read(types.float32, 2),
    _read(types.float32), INTS,
)  # fmt: skip
def likeliest_languages(
    text_B: np.ndarray,
    offsets: np.ndarray,
    moves: np.ndarray,
    rows: np.ndarray,
    outputs: np.ndarray,
    table_FC: np.ndarray,
    prior_C: np.ndarray,
    aliases: np.ndarray,
) -> np.ndarray:
    """Class of the highest score of each document, shape (N,).

    Args:
        text_B: bytes.
        offsets: borders.
        moves: next state of the automaton, by row and byte.
        rows: where a state's row starts in `moves`.
        outputs: feature that a state ends, or -1.
        table_FC: log probability of each feature in each class.
        prior_C: log probability of each class.
        aliases: pairs of classes that share one label, the first and its double, in a row.
    """
    found = np.zeros(len(offsets) - 1, dtype=np.int64)
    counts = np.zeros(len(table_FC), dtype=np.int64)
    visited = np.empty(len(table_FC), dtype=np.int64)
    scores = np.empty(len(prior_C), dtype=np.float32)
    for d in range(len(found)):
        state, n_visited = np.int64(0), 0
        for i in range(offsets[d], offsets[d + 1]):
            state = np.int64(moves[rows[state] + text_B[i]])
            feature = outputs[state]
            if feature >= 0:
                if counts[feature] == 0:
                    visited[n_visited] = feature
                    n_visited += 1
                counts[feature] += 1
        if n_visited == 0:
            continue  # no feature: all scores are equal, the first class stands
        scores[:] = prior_C
        for v in range(n_visited):
            feature = visited[v]
            weight = np.float32(math.log1p(counts[feature]))
            counts[feature] = 0
            row = table_FC[feature]
            for c in range(len(scores)):
                scores[c] += weight * row[c]
        for a in range(0, len(aliases), 2):
            first, double = aliases[a], aliases[a + 1]
            scores[first] = max(scores[first], scores[double])
            scores[double] = -np.inf
        found[d] = np.argmax(scores)
    return found


@compiled(types.Tuple((types.uint64[::1], types.uint64[::1])), BYTES, INTS, BYTES, types.int64)
def shingle_hashes(
    text_B: np.ndarray, offsets: np.ndarray, kinds: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `width` words between white space, and the documents' borders.

    A document of fewer words is one shingle.
    """
    n_documents = len(offsets) - 1
    hashes = np.empty((len(text_B) + 1) // 2 + 1 + n_documents, dtype=np.uint64)
    borders = np.zeros(n_documents + 1, dtype=np.uint64)
    words = np.zeros(_longest(offsets) // 2 + 2, dtype=np.uint64)
    n = 0
    for d in range(n_documents):
        n_words = 0
        i = offsets[d]
        inside = False
        key = FNV_START
        while i < offsets[d + 1] or inside:
            is_word = False
            if i < offsets[d + 1]:
                point, i = _code_point(text_B, i)
                is_word = kinds[point] & SPLITS == 0
                if is_word:
                    if not inside:
                        key = FNV_START
                    key = (key ^ np.uint64(point)) * FNV_PRIME
            if inside and not is_word:
                words[n_words] = _mix(key)
                n_words += 1
            inside = is_word
        for first in range(max(n_words - width + 1, 1)):
            key = FNV_START
            for w in range(first, min(first + width, n_words)):
                key = _mix((key ^ words[w]) * FNV_PRIME)
            hashes[n] = key
            n += 1
        borders[d + 1] = n
    return hashes[:n].copy(), borders


@njit
def _equal_bytes(sketches, a, b):
    equal = 0
    for j in range(sketches.shape[1]):
        equal += sketches[a, j] == sketches[b, j]
    return equal


@compiled(types.uint64[::1], _read(types.uint8, 2))
def hash_sketches(sketches: np.ndarray) -> np.ndarray:
    """One hash of each row, shape (N,)."""
    hashes = np.empty(len(sketches), dtype=np.uint64)
    for d in range(len(sketches)):
        key = FNV_START
        for j in range(sketches.shape[1]):
            key = (key ^ np.uint64(sketches[d, j])) * FNV_PRIME
        hashes[d] = _mix(key)
    return hashes


@compiled(
    types.void,
    types.boolean[::1], HASHES, INTS, _read(types.uint8, 2), types.int64, types.int64,
)  # fmt: skip
def flag_buckets(
    flags: np.ndarray,
    band: np.ndarray,
    order: np.ndarray,
    sketches: np.ndarray,
    least_equal: int,
    most_compared: int,
) -> None:
    """Flag the documents of one band that have a neighbour in their bucket.

    Args:
        flags: result so far, of all bands; changed in place.
        band: hash of each document in this band. Documents stand in the order of their content.
        order: sorts `band`.
        sketches: of each document.
        least_equal: bytes of two sketches that must be equal.
        most_compared: members up to which all pairs of a bucket are compared; in a larger one each
            member is compared with the one before and with at most as many representatives.
    """
    representatives = np.empty(most_compared, dtype=np.int64)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and band[order[end]] == band[order[start]]:
            end += 1
        if end - start > 1:
            members = np.sort(order[start:end])  # by content, whatever the order of the rows
            n_kept = 0
            for m in range(len(members)):
                own = members[m]
                is_new = True
                if m and _equal_bytes(sketches, own, members[m - 1]) >= least_equal:
                    flags[own] = flags[members[m - 1]] = True
                    is_new = _equal_bytes(sketches, own, members[m - 1]) < sketches.shape[1]
                if not is_new:
                    continue  # the same sketch again: its first copy stands for it
                for r in range(n_kept):
                    other = representatives[r]
                    if flags[own] and flags[other]:
                        continue
                    if _equal_bytes(sketches, own, other) >= least_equal:
                        flags[own] = flags[other] = True
                if n_kept < most_compared:
                    representatives[n_kept] = own
                    n_kept += 1
        start = end
