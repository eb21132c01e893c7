"""Which documents of a pool share 13 words in a row with what models are evaluated on.

Words are runs of letters, digits and underscores, lower-cased; all else is a blank. Thirteen words
are the length that GPT-3's authors took (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.pool_files import pool_files
from causalmix_pipeline.adapters.profiler import PoolSpec, pool_batches

#: Words of an n-gram.
NGRAM = 13

_WORD = re.compile(r"\w+")
#: Odd, so that every word of an n-gram counts in its hash; the golden ratio's digits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def ngrams(text: str, n: int = NGRAM) -> set[str]:
    """The distinct word n-grams of a text."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def count_shared_ngrams(train: Iterable[str], evaluation: Iterable[str], n: int = NGRAM) -> int:
    """Count the distinct word n-grams that training and evaluation texts share.

    Args:
        train: training texts.
        evaluation: evaluation texts.
        n: words in an n-gram, >= 1.

    Returns:
        The number of distinct n-grams of `evaluation` that also stand in `train`.
    """
    held_out = set().union(*(ngrams(text, n) for text in evaluation))
    shared: set[str] = set()
    for text in train:
        shared |= ngrams(text, n) & held_out
    return len(shared)


@dataclass(eq=False)
class OverlapFinder:
    """Finds what a pool shares with evaluation data; keeps no text.

    Its memory is that of the evaluation data's n-grams: 8 bytes each, and one a task and domain.

    Attributes:
        tasks: T names.
        grams_G: hashes of all tasks' distinct n-grams, sorted.
        of_task_TG: which of them each task has.
        n_short: task to texts with fewer than 13 words, which can't be checked.
        seen_of: domain to which n-grams its documents held, (G,).
        hits: (task, domain) to documents hit, copies included.
    """

    tasks: tuple[str, ...]
    grams_G: np.ndarray
    of_task_TG: np.ndarray
    n_short: dict[str, int]
    seen_of: dict[str, np.ndarray] = field(default_factory=dict)
    hits: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]]) -> OverlapFinder:
        """Take the n-grams of evaluation data.

        Args:
            texts: task to its texts; a question is its prompt and an answer.
        """
        hashed = {task: _hashes(of_task) for task, of_task in texts.items()}
        parts = [np.unique(hash_N) for hash_N, _ in hashed.values()]
        grams_G = np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
        of_task_TG = np.zeros((len(texts), len(grams_G)), dtype=bool)
        for t, part in enumerate(parts):
            of_task_TG[t] = np.isin(grams_G, part)
        n_short = {
            task: len(texts[task]) - len(np.unique(text_N)) for task, (_, text_N) in hashed.items()
        }
        return cls(tuple(texts), grams_G, of_task_TG, n_short)

    def look(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Look at documents, count what they share, and say which they are.

        Args:
            documents: columns `domain` and `text`; some of a pool's.

        Returns:
            A row per document that shares an n-gram: its place in the frame, `index`, and `task`,
            the first that it shares with.
        """
        hash_N, document_N = _hashes(documents["text"].to_list())
        place_N = np.minimum(np.searchsorted(self.grams_G, hash_N), max(len(self.grams_G) - 1, 0))
        found_N = (
            self.grams_G[place_N] == hash_N if len(self.grams_G) else np.zeros(len(hash_N), bool)
        )
        place_N, document_N = place_N[found_N], document_N[found_N]
        domains = documents["domain"].to_numpy()
        first: dict[int, str] = {}
        for t, task in enumerate(self.tasks):
            hit = np.unique(document_N[self.of_task_TG[t, place_N]])
            for index in hit.tolist():
                first.setdefault(index, task)
            for domain, count in zip(*np.unique(domains[hit], return_counts=True), strict=True):
                self.hits[task, domain] = self.hits.get((task, domain), 0) + int(count)
        for domain in np.unique(domains[document_N]):
            seen_G = self.seen_of.setdefault(domain, np.zeros(len(self.grams_G), bool))
            seen_G[place_N[domains[document_N] == domain]] = True
        rows = sorted(first)
        return pl.DataFrame(
            {"index": rows, "task": [first[index] for index in rows]},
            schema={"index": pl.Int64, "task": pl.String},
        )

    def n_shared(self, task: str | None = None) -> int:
        """Distinct n-grams of a task, or of all, that stand in the documents seen."""
        seen_G = np.zeros(len(self.grams_G), bool)
        for of_domain_G in self.seen_of.values():
            seen_G |= of_domain_G
        if task is not None:
            seen_G &= self.of_task_TG[self.tasks.index(task)]
        return int(seen_G.sum())

    def table(self) -> list[dict]:
        """A row per task and domain that share something, and one per task that shares nothing."""
        rows = []
        for t, task in enumerate(self.tasks):
            domains = sorted(domain for of, domain in self.hits if of == task)
            short = self.n_short[task]
            for domain in domains:
                shared = int((self.seen_of[domain] & self.of_task_TG[t]).sum())
                rows.append(_row(task, domain, shared, self.hits[task, domain], short))
            if not domains:
                rows.append(_row(task, "none", 0, 0, short))
        return rows


def find_overlap(overlap: OverlapFinder, spec: PoolSpec) -> pl.DataFrame:
    """Read a pool once and look at every document.

    Returns:
        A row per document that shares an n-gram: `file`, `row`, `document_id` and `task`, the
        first that it shares with.
    """
    schema = {"document_id": pl.String, "file": pl.String, "row": pl.Int64, "task": pl.String}
    found = [pl.DataFrame(schema=schema)]
    for file in pool_files(spec.location):
        for documents, _, _ in pool_batches(file, spec):
            rows = overlap.look(documents)
            there = documents.select("document_id", "file", "row")[rows["index"].to_list()]
            found.append(there.with_columns(task=rows["task"]))
    return pl.concat(found)


def _row(task: str, domain: str, shared: int, documents: int, short: int) -> dict:
    return {
        "task": task,
        "domain": domain,
        "shared 13-grams": shared,
        "pool documents hit": documents,
        "texts too short to check": short,
    }


def _hashes(texts: Sequence[str], n: int = NGRAM) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each word n-gram of each text, and the position of its text; both (N,).

    64 bits: among a thousand million n-grams of a pool and a million of the tasks, one pair in
    twenty thousand such pools is taken for equal wrongly.
    """
    words: list[str] = []
    counts = []
    for text in texts:
        found = _WORD.findall(text.lower())
        words += found
        counts.append(len(found))
    if len(words) < n:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hash_W = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    n_grams = len(words) - n + 1
    hash_N = np.zeros(n_grams, np.uint64)
    for i in range(n):
        hash_N *= _MULTIPLIER
        hash_N += hash_W[i : i + n_grams]
    text_W = np.repeat(np.arange(len(texts)), counts)
    within_N = text_W[:n_grams] == text_W[n - 1 :]
    return hash_N[within_N], text_W[:n_grams][within_N]
