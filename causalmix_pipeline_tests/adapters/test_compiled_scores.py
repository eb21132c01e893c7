"""What all scorers promise, and where compiled code is kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import polars as pl
import pytest

from causalmix_pipeline.adapters.language_scores import LanguageScorer
from causalmix_pipeline.adapters.lexical_scores import LexicalScorer, VocdScorer
from causalmix_pipeline.adapters.near_duplicates import MinHashScorer
from causalmix_pipeline.adapters.text_scores import (
    CharacterScorer,
    CompressionScorer,
    LogicalWordsScorer,
    StyleScorer,
)
from causalmix_pipeline.adapters.token_scores import CrossFittedModel, TokenScorer
from causalmix_pipeline.adapters.tokenizer import encode_texts, train_tokenizer
from causalmix_pipeline.core.scoring import Scorer
from causalmix_pipeline_tests.adapters.scored_frames import HARD_TEXTS, frame_of

NAMES = (
    "characters", "compression", "logical-words", "style", "lexical", "vocd", "language",
    "minhash", "tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> dict[str, Scorer]:
    tokenizer = train_tokenizer(["a cat sat on a mat"] * 9, vocab_size=270)
    encoded = encode_texts(tokenizer, ["a cat", "a mat"])
    model = CrossFittedModel.fit(encoded, ["0" * 32, "1" * 32], 270)
    tokens = TokenScorer.write(tmp_path_factory.mktemp("tokens"), tokenizer, model)
    found = [CharacterScorer(), CompressionScorer(), LogicalWordsScorer(), StyleScorer(),
             LexicalScorer(), VocdScorer(), LanguageScorer(), MinHashScorer(), tokens]  # fmt: skip
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_scorer_has_a_slug_for_a_key_and_names_its_columns(scorers, name):
    scorer = scorers[name]
    scored = scorer.score(frame_of("b", "a", "b"))

    assert isinstance(scorer, Scorer)
    assert re.fullmatch(rf"{name}-v1(-[a-z0-9-]+)?", scorer.key)
    assert scored.columns == ["document_id", *scorer.metrics]
    assert scored["document_id"].to_list() == frame_of("b", "a", "b")["document_id"].to_list()
    assert scored.row(0) == scored.row(2)


@pytest.mark.parametrize("name", NAMES)
def test_hard_documents_score_finite_or_null_alone_as_among_others(scorers, name):
    together = scorers[name].score(frame_of(*HARD_TEXTS))

    for column in together.select(pl.col(pl.Float64)):
        assert column.drop_nulls().is_finite().all()
    for i, text in enumerate(HARD_TEXTS):
        assert scorers[name].score(frame_of(text)).row(0) == together.row(i)


@pytest.mark.parametrize("name", NAMES)
def test_no_documents_score_as_an_empty_frame_of_the_same_columns(scorers, name):
    scorer = scorers[name]

    assert scorer.score(frame_of()).schema == scorer.score(frame_of("a")).schema
    assert scorer.score(frame_of()).height == 0


@pytest.mark.parametrize("text", ["ab cd\n", " ", "x", "日 "])
@pytest.mark.parametrize("name", NAMES)
def test_a_document_of_four_megabytes_is_scored(scorers, name, text):
    scored = scorers[name].score(frame_of("a b", text * (2**22 // len(text.encode())), "a b"))

    assert scored.height == 3
    assert scored.row(0) == scored.row(2)


def test_code_is_compiled_in_memory_where_no_folder_can_keep_it(tmp_path):
    """An install that can't be written, and a user without a home."""
    (tmp_path / "kept_nowhere.py").write_text(
        "from numba import types\n"
        "from causalmix_pipeline.adapters.compiled_scores import compiled\n"
        "@compiled(types.int64, types.int64)\n"
        "def double(x):\n    return 2 * x\n"
        "print(double(21), double.stats.cache_path)\n"
    )
    (tmp_path / "__pycache__").write_text("no folder")
    blocked = tmp_path / "blocked"
    blocked.write_text("no folder")
    away = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "kept_nowhere.py"],
        env={k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | away,
        capture_output=True,
        text=True,
    )

    assert done.stdout.split() == ["42", "None"], done.stderr


def test_the_scorers_load_nothing_heavy_before_they_score():
    code = (
        "import sys\n"
        "from causalmix_pipeline.adapters import (language_scores, lexical_scores, near_duplicates,"
        " text_scores, token_scores)\n"
        "heavy = {'numba', 'tiktoken', 'tokenizers', 'py3langid', 'rensa', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
