"""The generated pool is the same every time, and holds the near-duplicates that were planted."""

from pathlib import Path
from random import Random

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.near_duplicates import (
    MinHashScorer,
    flag_near_duplicates,
    signature_arrays,
)
from causalmix_pipeline_tests.benchmarks.generated_pool import (
    DOCUMENT_CHARS,
    PIECE_CHARS,
    cut_pieces,
    draw_documents,
    write_pool,
)

WORDS = ["sum", "angle", "prime", "factor", "the", "house", "stood", "because", "rain", "return"]


@pytest.fixture(scope="module")
def pieces():
    rng = Random(1)
    return {
        (domain, "first"): cut_pieces(
            "\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(40)) for _ in range(20)
        )
        for domain in ("math", "prose")
    }


def test_pieces_are_different_and_end_in_white_space():
    pieces = cut_pieces([f"{'word ' * 20}. And so on. Short.", f"{'word ' * 20}. And so on.", ""])

    assert pieces == [f"{'word ' * 20}. "]


def test_a_piece_without_an_end_is_cut():
    (piece,) = cut_pieces(["x" * 1000])

    assert piece == "x" * PIECE_CHARS[1] + "\n"


def test_the_same_seed_gives_the_same_documents_and_another_gives_none_of_them(pieces):
    first, again = (draw_documents(pieces, 300, seed="1") for _ in range(2))
    other = draw_documents(pieces, 300, seed="2")

    assert first.equals(again)
    assert not set(first["text"]) & set(other["text"])


def test_the_first_document_is_that_of_every_machine():
    row = draw_documents({("math", "first"): ["one two ", "three\n"]}, 1, seed="1").row(0)

    assert row[0].startswith("three\none two one two one two one two three\nthree\n")
    assert (len(row[0]), row[3]) == (1123, pytest.approx(0.6751897195633995, abs=1e-15))


def test_documents_have_their_lengths(pieces):
    lengths = draw_documents(pieces, 2000, seed="1")["text"].str.len_chars()

    least, most = DOCUMENT_CHARS
    assert least <= lengths.min()
    assert lengths.max() <= most + 12
    assert 1150 < lengths.mean() < 1350


def test_only_planted_documents_are_near_duplicates(pieces):
    documents = draw_documents(pieces, 2000, seed="1").with_row_index("document_id")
    one_word_less = documents["text"].str.replace(r"( \d+)+$", "")
    planted = one_word_less.is_duplicated()
    signed = MinHashScorer().score(documents)

    flagged = flag_near_duplicates(*signature_arrays(signed["bands"], signed["sketch"]))

    assert 0.03 < planted.mean() < 0.05  # both of a pair are near-duplicates
    assert np.mean(flagged & ~planted.to_numpy()) == 0
    assert flagged.sum() > 0.98 * planted.sum()


def test_a_pool_is_written_to_its_files(pieces, tmp_path: Path):
    write_pool(pieces, tmp_path, 103, n_files=4)

    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"part-{i:03d}.parquet" for i in range(4)]
    assert [pl.read_parquet(file).height for file in files] == [25, 26, 26, 26]
    both = pl.concat(pl.read_parquet(file) for file in files)
    assert both.columns == ["text", "domain", "source", "quality"]
    assert both["text"].is_unique().all()
    assert set(both["domain"]) == {"math", "prose"}
