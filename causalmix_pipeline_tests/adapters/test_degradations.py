"""Known damage to one domain of real text is seen there, by the covariates that should, alone."""

from __future__ import annotations

import ast
import json
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from random import Random

import polars as pl
import pytest

from causalmix_pipeline.adapters.experiment import PoolTokenizer
from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.adapters.pool_reader import read_pool
from causalmix_pipeline.adapters.profiler import ScorerPlan
from causalmix_pipeline.adapters.score_store import ScoreStore
from causalmix_pipeline.adapters.scorers import model_free_plans
from causalmix_pipeline.core.covariates import METRICS
from causalmix_pipeline_tests.benchmarks.degradations import (
    DEGRADATIONS,
    SEEN,
    compare,
    false_alarms,
    profile,
    read_texts,
    sample_ratio_error,
    shuffle_lines,
    write_degraded,
)

DOCUMENTS = 300
#: What must move by more than 3 standard errors in the spoiled domain, and where to.
EXPECTED = {
    "noise": "+compress_ratio +bigram_cross_entropy -bytes_per_token +hdd +mtld",
    "shuffled lines": "+mtld",
    "near-duplicates": "+near_duplicate",
    "exact copies": "+duplicate_share -log2_tokens",
    "truncation": "-log2_tokens -token_entropy +compress_ratio +unique_bigram_ratio",
    "other language": "-language_share_en -logical_words",
}
#: What can't see the order of words.
BAGS = ("letter_share", "digit_share", "blank_share", "symbol_share", "logical_words", "hdd")


def library_texts() -> Iterator[tuple[str, str]]:
    """(domain, text): docstrings and functions of the standard library of this Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.split("\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(source)
        for node in ast.walk(module):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield "docstrings", ast.get_docstring(node) or ""
        for node in module.body:
            if isinstance(node, ast.FunctionDef):
                yield "functions", "\n".join(lines[node.lineno - 1 : node.end_lineno])


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A pool of two domains, 300 documents each."""
    pool, texts = tmp_path_factory.mktemp("pool"), {"docstrings": {}, "functions": {}}
    for domain, text in library_texts():
        if 400 <= len(text) <= 3000 and len(texts[domain]) < DOCUMENTS:
            texts[domain][text] = None
        if all(len(found) == DOCUMENTS for found in texts.values()):
            break
    for domain, found in texts.items():
        (pool / domain).mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
        (pool / domain / "library.jsonl").write_text(lines, encoding="utf-8")
    return pool


@pytest.fixture(scope="module")
def plans(clean, tmp_path_factory) -> list[ScorerPlan]:
    """Everything that needs no model, on the clean pool's tokenizer."""
    tokenizer = PoolTokenizer.fit(read_pool(clean, ColumnMap()).documents, vocab_size=512)
    tokens = tokenizer.scorer(tmp_path_factory.mktemp("tokenizers"))
    return model_free_plans(tokens, vocd_budget_tokens=5_000)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ScoreStore:
    return ScoreStore(tmp_path_factory.mktemp("store") / "scores")


@pytest.fixture(scope="module")
def before(clean, plans, store) -> pl.DataFrame:
    return profile(clean, plans, store)


@pytest.fixture(scope="module", params=list(DEGRADATIONS))
def spoiled(request, clean, plans, store, before, tmp_path_factory) -> tuple[str, pl.DataFrame]:
    """(degradation, moves) of a pool whose functions are spoiled."""
    pool = tmp_path_factory.mktemp("spoiled")
    write_degraded(clean, pool, "functions", request.param, seed=0)
    after = profile(pool, plans, store)
    return request.param, compare(before, after, ["docstrings", "functions"])


def test_a_degradation_moves_the_covariates_that_should_see_it(spoiled):
    kind, moves = spoiled
    here = moves.filter(pl.col("domain") == "functions")
    z = dict(here.select("covariate", "z").iter_rows())

    wrong = [
        f"{name} {z[name[1:]]:+.1f}"
        for name in EXPECTED[kind].split()
        if (z[name[1:]] if name[0] == "+" else -z[name[1:]]) <= SEEN
    ]
    assert not wrong
    if kind == "shuffled lines":
        assert max(abs(z[name]) for name in BAGS) < 0.5


def test_the_covariates_of_the_other_domain_stay(spoiled):
    _, moves = spoiled
    there = moves.filter(
        (pl.col("domain") == "docstrings") & (pl.col("covariate") != "sample_compress_ratio")
    )

    assert set(METRICS) <= set(there["covariate"])
    assert (there["z"] == 0).all()
    assert (there["se"] == 0).all()  # documents that stay cancel
    still = moves.filter(pl.col("covariate") == "sample_compress_ratio", domain="docstrings")
    assert still["difference"].to_list() == [0.0]


def test_random_halves_of_a_domain_are_seldom_three_standard_errors_apart(before):
    share, n_moves = false_alarms(before, "docstrings", splits=20)

    assert n_moves > 20 * len(METRICS) * 0.9
    assert share < 0.02


# The damage itself


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_the_damage_is_done_to_one_domain_and_repeats(kind, clean, tmp_path):
    for name in ("once", "again"):
        write_degraded(clean, tmp_path / name, "functions", kind, seed=0)

    was, now = read_texts(clean, "functions"), read_texts(tmp_path / "once", "functions")
    changed = sum(a != b for a, b in zip(was, now, strict=True)) / len(was)
    share = {"noise": 1 / 3, "near-duplicates": 1 / 5, "exact copies": 1 / 5,
             "other language": 1 / 3}  # fmt: skip
    assert changed == pytest.approx(share.get(kind, 1.0), abs=0.05)
    assert read_texts(tmp_path / "again", "functions") == now
    assert read_texts(tmp_path / "once", "docstrings") == read_texts(clean, "docstrings")


def test_shuffled_lines_keep_every_word_and_the_white_space_in_its_place():
    text = "one\n\n  two three\n" + "long words here " * 20 + "\n" + "x" * 200 + " end\n"

    (shuffled,) = shuffle_lines([text], Random(1))

    assert shuffled != text
    assert Counter(shuffled.split()) == Counter(text.split())
    assert Counter(shuffled) == Counter(text)


def test_the_error_of_a_domains_compression_is_what_samples_differ_by():
    rng = Random(0)
    # Documents of one letter or of random ones: samples differ by how many of each they hold.
    texts = [
        ("".join(rng.choices("abcdefgh", k=3999)) if rng.random() < 0.5 else "a" * 3990)
        + f"{i:09d}"
        for i in range(2000)
    ]

    error = sample_ratio_error(texts, seed=0)

    # 33 documents a sample; a random one compresses to about 3/8.
    assert error == pytest.approx(0.375 * 0.5 / 33**0.5, rel=0.35)
    assert isnan(sample_ratio_error(texts[:60], seed=0))
