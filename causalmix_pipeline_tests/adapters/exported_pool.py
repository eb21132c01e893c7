"""Small pools to export: any number of domains, one folder each or mixed in the same files."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.exporter import Export, make_export
from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.pool_reader import read_pool
from causalmix_pipeline.adapters.profiler import PoolSpec

#: Labels that try to be more than text.
HOSTILE = [
    "<script>window.hacked=1</script>",
    "\u202e!evil 'quotes' \"double\"",
    "W" * 300,
    "two\nlines\r\nand a tab\t",
    "../../etc/passwd",
    "a,b;c|d",
    "{%raw%}: [yaml, *anchor] &x #",
]


def write_pool(
    root: Path, labels: Sequence[str], *, n: int = 40, apart: bool = True, prompts: bool = False
) -> PoolSpec:
    """Write documents whose lengths differ by domain, as many more words as the domain's place.

    Args:
        root: the pool's folder.
        labels: of the domains.
        n: documents of each.
        apart: whether each domain has files of its own.
        prompts: whether documents are prompts and responses.
    """
    rng = random.Random(len(labels))
    root.mkdir(parents=True)
    for part in ("one", "two"):
        lines: list[str] = []
        for d, label in enumerate(labels):
            rows = [document(rng, label, 5 + 3 * d, prompts) for _ in range(n // 2)]
            lines += map(json.dumps, rows)
            if apart:
                (root / f"{d:02d}-{part}.jsonl").write_text("\n".join(lines) + "\n")
                lines = []
        if lines:
            rng.shuffle(lines)
            (root / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    columns = ColumnMap(domain="domain")
    if prompts:
        columns = replace(columns, prompt="prompt", response="response")
    return PoolSpec(root, columns)


def document(rng: random.Random, label: str, n_words: int, prompts: bool) -> dict:
    """A row of a pool."""
    words = [f"{rng.random():.9f}" for _ in range(rng.randint(n_words, 2 * n_words))]
    if prompts:
        return {"prompt": f'"{words[0]}"\n?', "response": " ".join(words[1:]), "domain": label}
    return {"text": " ".join(words) + '\n"\u2028é', "domain": label}


def n_words(text: str) -> int:
    """What stands for the tokens of a text."""
    return len(text.split())


def documents_of(pool: PoolSpec) -> pl.DataFrame:
    """The documents frame of a pool; words are its tokens."""
    frame = read_pool(pool.location, pool.columns).documents
    n_tokens = pl.Series([n_words(text) for text in frame["text"]], dtype=pl.Int64)
    return frame.drop("text").with_columns(n_tokens=n_tokens, augmented=pl.lit(False))


def export_of(
    pool: PoolSpec, labels: Sequence[str], mixture: Sequence[float], *, budget: int, seed: int = 0
) -> Export:
    """The export of a pool."""
    return make_export(
        np.array(mixture), labels, documents_of(pool), budget_tokens=budget, seed=seed,
        verdict="supported", fingerprints={"pool": "abc"}, columns=pool.columns,
    )  # fmt: skip


def mixture_of(n_domains: int) -> list[float]:
    """Uneven shares, every fifth of them 0."""
    raw = [0.0 if d % 5 == 3 else 1.0 + d % 7 for d in range(n_domains)]
    return [share / sum(raw) for share in raw]
