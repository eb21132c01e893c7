"""Characters, compression, connectives, style: against regular expressions, zlib, sums by hand."""

from __future__ import annotations

import re
import unicodedata
import zlib
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.text_scores import (
    LOGICAL_WORDS,
    CharacterScorer,
    CompressionScorer,
    LogicalWordsScorer,
    StyleScorer,
)
from causalmix_pipeline_tests.adapters.scored_frames import HARD_TEXTS, frame_of

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
TEXT_SCORERS = (CharacterScorer(), CompressionScorer(), LogicalWordsScorer(), StyleScorer())


def metrics_of(text: str) -> dict:
    row = {}
    for scorer in TEXT_SCORERS:
        row |= scorer.score(frame_of(text)).row(0, named=True)
    return row


def counted_by_polars(text: str) -> dict:
    """The same shares and rates by regular expressions."""
    column = pl.col("text")
    n_chars = column.str.len_chars().clip(1)
    markers = r"(?i)\b(?:" + "|".join(LOGICAL_WORDS) + r")\b"
    counted = pl.DataFrame({"text": [text]}).select(
        n_bytes=column.str.len_bytes(),
        letter_share=column.str.count_matches(r"\p{L}") / n_chars,
        digit_share=column.str.count_matches(r"\p{Nd}") / n_chars,
        blank_share=column.str.count_matches(r"\s") / n_chars,
        symbol_share=column.str.count_matches(r"[^\p{L}\p{Nd}\s]") / n_chars,
        logical_words=column.str.count_matches(markers)
        * 100
        / column.str.count_matches(r"\w+").clip(1),
    )
    return counted.row(0, named=True)


# Characters


def test_characters_are_counted_by_kind():
    found = metrics_of("Äb1 ٣!\n")  # two letters, two digits (one Arabic), two blanks, one symbol

    assert found["letter_share"] == pytest.approx(2 / 7)
    assert found["digit_share"] == pytest.approx(2 / 7)
    assert found["blank_share"] == pytest.approx(2 / 7)
    assert found["symbol_share"] == pytest.approx(1 / 7)
    assert found["n_bytes"] == 9


@SLOW
@given(UNICODE)
def test_shares_and_rates_are_those_of_regular_expressions(text):
    found, counted = metrics_of(text), counted_by_polars(text)

    assert {name: found[name] for name in counted} == counted


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_documents_count_alike_by_regular_expressions(text):
    found, counted = metrics_of(text), counted_by_polars(text)

    assert {name: found[name] for name in counted} == counted


@SLOW
@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFF), max_size=60))
def test_letters_and_digits_are_those_of_the_unicode_database(text):
    found = metrics_of(text)
    kinds = [unicodedata.category(c) for c in text]
    n = max(len(text), 1)

    assert found["letter_share"] == pytest.approx(sum(k[0] == "L" for k in kinds) / n)
    assert found["digit_share"] == pytest.approx(sum(k == "Nd" for k in kinds) / n)


def test_shares_are_those_of_datatrove():
    from datatrove.data import Document
    from datatrove.pipeline.stats import DocStats

    text = "The 3 cats, all 12 of them, sat.\nThey sat on\tthe mat; it was 99% cat!"
    # The class itself asks for a package that these formulas don't use.
    patterns = SimpleNamespace(elipsis_regex=re.compile("…"), punc_regex=re.compile("[.,;!]"))
    theirs = DocStats.extract_stats(patterns, Document(text=text, id="0"))
    ours = metrics_of(text)

    assert ours["digit_share"] == pytest.approx(theirs["digit_ratio"])
    assert ours["blank_share"] == pytest.approx(theirs["white_space_ratio"])
    assert ours["blank_share"] + ours["symbol_share"] == pytest.approx(
        theirs["non_alpha_digit_ratio"]
    )


# Compression


@SLOW
@given(UNICODE)
def test_the_ratio_is_that_of_zlib(text):
    raw = text.encode()

    assert metrics_of(text)["compress_ratio"] == len(zlib.compress(raw, 6)) / max(len(raw), 1)


def test_a_long_text_is_compressed_at_level_6():
    text = " ".join(str(i * i % 997) for i in range(3000))
    sizes = {level: len(zlib.compress(text.encode(), level)) for level in (1, 6)}

    assert sizes[1] != sizes[6]
    assert metrics_of(text)["compress_ratio"] == sizes[6] / len(text)


def test_repeated_text_compresses():
    assert metrics_of("abc " * 200)["compress_ratio"] < 0.05
    assert metrics_of("q8#Zt!4x")["compress_ratio"] > 1


# Connectives


@pytest.mark.parametrize(
    ("text", "by_hand"),
    [
        ("If it rains, then we stay because we must.", 3 / 9),
        ("BECAUSE", 1.0),
        ("nothing of the sort here", 0.0),
        ("soup thenceforth iffy if_ so2", 0.0),  # whole words only
        ("so-so", 1.0),
        ("!!!", 0.0),
        ("नमस्ते if दुनिया", 1 / 3),  # a mark belongs to its word
    ],
)
def test_connectives_are_counted_per_hundred_words(text, by_hand):
    assert metrics_of(text)["logical_words"] == pytest.approx(100 * by_hand)


@SLOW
@given(
    st.lists(st.sampled_from([*LOGICAL_WORDS, "İf", "\u017fo", "SINCE", "_", " ", ".", "é", "x"]))
)
def test_connectives_are_those_of_a_regular_expression(parts):
    text = "".join(parts)

    assert metrics_of(text)["logical_words"] == counted_by_polars(text)["logical_words"]


# Style


def slow_composite(text: str) -> float | None:
    """The composite by its docstring."""
    text = text.lower()
    words = re.findall(r"\w+", text)
    if not words:
        return None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    signs = [
        len(set(lines)) / len(lines),
        sum(c.isalpha() or c.isspace() for c in text) / len(text),
        sum(w.isalpha() and 2 <= len(w) <= 12 for w in words) / len(words),
    ]
    n = len(words)
    if n >= 42:
        drawn = 0.0
        for word in set(words):
            absent = 1.0
            for k in range(42):
                absent *= max(n - words.count(word) - k, 0) / (n - k)
            drawn += 1 - absent
        signs.append(drawn / 42)
    return sum(signs) / len(signs)


@SLOW
@given(
    st.lists(st.sampled_from(["the", "Cat", "x", "42", "\n", " ", "  ", ".", "zq_", "aaaa" * 4]))
)
def test_the_composite_is_the_mean_of_its_signs(parts):
    text = " ".join(parts) * 3

    assert metrics_of(text)["writing_style_composite"] == pytest.approx(slow_composite(text))


def test_prose_is_above_noise_and_boilerplate():
    words = ["rain", "fell", "over", "the", "old", "town", "while", "people", "hurried", "home"]
    prose = "\n".join(" ".join(words[i:] + words[:i]) for i in range(8))
    noise = prose[::3].replace("e", "#").replace("o", "{1").replace(" ", ";9")
    found = {name: metrics_of(text)["writing_style_composite"]
             for name, text in {"prose": prose, "noise": noise,
                                "boilerplate": "click here to accept\n" * 40}.items()}  # fmt: skip

    assert found["prose"] > found["noise"] + 0.2
    assert found["prose"] > found["boilerplate"] + 0.2


@pytest.mark.parametrize(
    ("text", "by_hand"),
    [("a\nb\nA", 2 / 3), ("a\n a \n\n\na", 1 / 3), ("a b\na  b", 1.0), ("\n \n", None), ("", None)],
)
def test_repeated_lines_are_counted_without_case_and_outer_blanks(text, by_hand):
    assert metrics_of(text)["unique_line_ratio"] == (
        None if by_hand is None else pytest.approx(by_hand)
    )
