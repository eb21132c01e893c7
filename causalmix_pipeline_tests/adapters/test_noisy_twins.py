"""Noisy twins: how much noise, and what they depend on."""

from __future__ import annotations

import polars as pl
import pytest

from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.noisy_twins import add_noisy_twins


def make_documents(texts: dict[str, list[str]], prompt_chars: int = 0) -> pl.DataFrame:
    """The reader's frame, without the columns that twins don't read."""
    rows = [
        {
            "document_id": document_id(text, prompt_chars),
            "domain": domain,
            "text": text,
            "prompt_chars": prompt_chars,
        }
        for domain, part in texts.items()
        for text in part
    ]
    return pl.DataFrame(rows).sort("domain", "document_id")


POOL = make_documents({"b": ["one two three", "four five"], "a": ["six", "one two three", "x  y"]})


def test_a_twin_has_a_fifth_of_its_characters_replaced():
    text = "x" * 5000
    twin = add_noisy_twins(make_documents({"a": [text]}), seed=3).filter("augmented")["text"][0]

    assert len(twin) == len(text)
    assert sum(a != b for a, b in zip(text, twin, strict=True)) / 5000 == pytest.approx(
        0.2, abs=0.03
    )


def test_a_twin_depends_on_its_document_and_the_seed_alone():
    alone = add_noisy_twins(make_documents({"a": ["one two three"]}), seed=3).filter("augmented")
    among = add_noisy_twins(POOL, seed=3).filter(
        "augmented", domain="a", twin_of=alone["twin_of"][0]
    )

    assert among["text"].to_list() == alone["text"].to_list()
    other = add_noisy_twins(make_documents({"a": ["one two three"]}), seed=4).filter("augmented")
    assert other["text"].to_list() != alone["text"].to_list()


def test_twins_follow_the_originals_of_their_domain():
    frame = add_noisy_twins(POOL, seed=3)

    assert frame["domain"].to_list() == ["a"] * 6 + ["b"] * 4
    assert frame["augmented"].to_list() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    assert frame["twin_of"].drop_nulls().sort().to_list() == POOL["document_id"].sort().to_list()
    assert all(
        document_id(text) == i for text, i in frame.select("text", "document_id").iter_rows()
    )


def test_a_twin_is_divided_into_prompt_and_response_where_its_document_is():
    frame = add_noisy_twins(make_documents({"a": ["question\n\nanswer"]}, 10), seed=3)
    twin = frame.filter("augmented").row(0, named=True)

    assert twin["prompt_chars"] == 10
    assert twin["document_id"] == document_id(twin["text"], 10)
