"""Tokens per CPU second of the LM scorer, against a plain loop of one document at a time.

Both compute normalized loss, high-entropy sum and perplexity of the same documents with the same
weights, on one thread, in turns, in one process. The documents are real: the demo pool's, some of
each source, cut at 512 tokens; a second row has only their first 64 tokens, the length of short
chat turns. Run:

    OMP_NUM_THREADS=1 python -m causalmix_pipeline_tests.benchmarks.lm_scoring
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.demo_pool import assemble_demo_pool
from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.scorer_weights import fetch_scorer
from causalmix_pipeline.adapters.transformers_lm import LMScorer


def draw_documents(pool: Path, per_source: int) -> pl.DataFrame:
    """The documents with the lowest ids of each file of a pool."""
    rows = []
    for file in sorted((pool / "experiment").glob("*/*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        rows += sorted((document_id(text), text) for text in texts)[:per_source]
    return pl.DataFrame(rows, schema=["document_id", "text"], orient="row").with_columns(
        prompt_chars=pl.lit(0, dtype=pl.Int64)
    )


def plain_loop(model: Any, tokenizer: Any, texts: list[str], max_tokens: int) -> np.ndarray:
    """The three metrics, a document at a time: whole logits, log softmax, entropy."""
    import torch

    rows = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.inference_mode():
            log_p = model(**tokens).logits[0, :-1].log_softmax(-1)
            loss = -log_p.gather(-1, tokens["input_ids"][0, 1:, None])[:, 0].double().numpy()
            entropy = -(log_p.exp() * log_p).sum(-1).double().numpy()
        high = entropy[entropy >= np.quantile(entropy, 0.995)]
        rows.append((loss.mean() / np.log(2), high.sum() / np.log(2), np.exp(loss.mean())))
    return np.array(rows)


def main() -> None:
    """Print a table: tokens per CPU second, their ratio, the largest difference of a value."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="LM scoring against a plain loop.")
    parser.add_argument("--scorers", type=Path, default=Path("data/scorers"))
    parser.add_argument("--pool", type=Path, default=Path("data/benchmark_pool"))
    parser.add_argument("--per-source", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one counts")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[1024])
    options = parser.parse_args()
    if not (options.pool / "experiment").is_dir():
        assemble_demo_pool(options.pool)
    folder = fetch_scorer(options.scorers)
    scorer = LMScorer.open(folder, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    scorer.load()  # not timed
    documents = draw_documents(options.pool, options.per_source)
    texts = documents["text"].to_list()
    print(f"{'cut':>6}{'engine':>20}{'tokens':>9}{'tokens/s':>10}{'ratio':>7}{'difference':>12}")
    for max_tokens in options.max_tokens:
        engines = {
            f"batches of {size}": replace(scorer, max_tokens=max_tokens, batch_tokens=size)
            for size in options.batch_tokens
        }
        n_tokens = sum(
            len(tokenizer(t, truncation=True, max_length=max_tokens)["input_ids"]) for t in texts
        )
        best: dict[str, float] = {}
        difference: dict[str, float] = {"plain loop": 0.0}
        for _ in range(options.rounds):
            start = time.process_time()
            plain = plain_loop(model, tokenizer, texts, max_tokens)
            timed = {"plain loop": time.process_time() - start}
            for name, engine in engines.items():
                start = time.process_time()
                values = engine.score(documents).drop("document_id").to_numpy()
                timed[name] = time.process_time() - start
                difference[name] = float(np.abs(values / plain - 1).max())
            best = {name: min(best.get(name, np.inf), each) for name, each in timed.items()}
        for name, seconds in best.items():
            ratio = best["plain loop"] / seconds
            print(
                f"{max_tokens:>6}{name:>20}{n_tokens:>9}{n_tokens / seconds:>10.0f}"
                f"{ratio:>7.2f}{difference[name]:>12.1e}"
            )


if __name__ == "__main__":
    main()
