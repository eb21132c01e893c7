"""A small pool of three domains and proxies of 20 steps, for the tests that train for real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.experiment import (
    DrawnStates,
    PoolTokenizer,
    build_evaluation,
    draw_states,
    keep_states,
    make_specs,
    write_token_store,
)
from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.profiler import PoolSpec, profile_pool
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.score_store import ScoreStore
from causalmix_pipeline.adapters.scorers import model_free_plans
from causalmix_pipeline.core.design import Design, DesignPlan, make_design
from causalmix_pipeline.core.pool_state import StateRanges
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.work import InProcess

DOMAINS = ("code", "math", "prose")
TASKS = ("code", "math")
CONFIG = ProxyConfig(hidden=32, vocab_size=300, sequence_length=32, batch_size=4, steps=20)
WORDS = {
    "code": "def return if else for in range len self none true import from class",
    "math": "sum of and is 12 7 345 equals plus minus times half angle prove then",
    "prose": "the old house stood quiet because rain fell upon hills and nobody came home",
}


def draw_texts(domain: str, n: int, *, seed: int) -> list[str]:
    """Documents of 20 to 60 words of the domain."""
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    return [" ".join(rng.choice(WORDS[domain].split(), rng.integers(20, 60))) for _ in range(n)]


def make_documents(n: int = 30) -> pl.DataFrame:
    """The reader's frame: n documents a domain from two sources."""
    rows = [
        {
            "document_id": document_id(text),
            "domain": domain,
            "source": ("first", "second")[i % 2],
            "group": document_id(text),
            "file": f"{domain}.jsonl",
            "row": i,
            "copies": 1,
            "text": text,
        }
        for domain in DOMAINS
        for i, text in enumerate(draw_texts(domain, n, seed=0))
    ]
    return pl.DataFrame(rows).sort("domain", "document_id")


def write_pool(folder: Path, documents: pl.DataFrame, **options) -> PoolSpec:
    """Write documents as one JSONL file a domain."""
    folder.mkdir(parents=True, exist_ok=True)
    for (domain,), part in documents.group_by("domain", maintain_order=True):
        rows = part.sort("row").select("text", "domain", "source").to_dicts()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{domain}.jsonl").write_text(lines)
    return PoolSpec(folder, ColumnMap(domain="domain", source="source"), **options)


def profiled(spec: PoolSpec, tokenizer: PoolTokenizer, root: Path) -> pl.DataFrame:
    """The documents frame of a pool, all model-free metrics."""
    plans = model_free_plans(tokenizer.scorer(root / "tokenizers"), vocd_budget_tokens=2_000)
    store = ScoreStore(root / "scores")
    return profile_pool(spec, plans, store=store, workers=InProcess()).documents


@dataclass(frozen=True)
class SmallExperiment:
    """Everything that a backend needs to train the runs of a small design."""

    store: RunStore
    documents: pl.DataFrame
    states: DrawnStates
    design: Design
    specs: list[ProxySpec]


def build_experiment(
    root: Path, *, n_runs: int = 4, config: ProxyConfig = CONFIG, panel_mixtures: int = 0
) -> SmallExperiment:
    """Take documents to the specs of proxy runs, with all that workers read in the store."""
    documents = make_documents()
    tokenizer = PoolTokenizer.fit(documents, vocab_size=config.vocab_size)
    spec = write_pool(root / "pool", documents)
    scored = profiled(spec, tokenizer, root)
    store = RunStore(root)
    tokens_hash = write_token_store(store, spec, scored, tokenizer)
    plan = DesignPlan(n_runs=n_runs, panel_mixtures=panel_mixtures)
    design = make_design(plan, len(DOMAINS))
    states = draw_states(scored, DOMAINS, StateRanges(), n_states=plan.n_states, seed=0)
    hashes = keep_states(store, scored, DOMAINS, states.memberships)
    texts = {task: draw_texts(task, 8, seed=9) for task in TASKS}
    evaluation, eval_hash = build_evaluation(
        texts, tokenizer, sequence_length=config.sequence_length
    )
    store.put_eval(eval_hash, evaluation)
    specs = make_specs(design, hashes, tokens_hash=tokens_hash, eval_hash=eval_hash, config=config)
    return SmallExperiment(store, scored, states, design, specs)
