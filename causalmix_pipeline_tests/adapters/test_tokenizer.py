"""Tokenizer and token store: no byte lost, no id changed, windows as a slow loop would cut them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.tokenizer import (
    END_ID,
    END_OF_TEXT,
    TokenStore,
    cut_windows,
    encode_texts,
    train_tokenizer,
    vocab_size_of,
)
from causalmix_pipeline.core.errors import PoolError

TEXTS = [f"the cat number {i} sat on the mat, and the dog {i * 7} ran" for i in range(60)]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=320)


def decode(ids: np.ndarray) -> str:
    """The text of token ids, by the library's own decoder."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(TOKENIZER).decode(ids.tolist(), skip_special_tokens=False)


# Tokenizer


def test_the_vocabulary_has_the_size_that_was_asked_for():
    assert vocab_size_of(TOKENIZER) == 320


def test_frequent_words_become_one_token():
    assert len(encode_texts(TOKENIZER, [" the the the"])[0]) == 3


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80))
def test_any_text_is_encoded_and_decoded_without_loss(text):
    ids = encode_texts(TOKENIZER, [text])[0]

    assert ids.max() < 320
    assert decode(ids) == text


def test_a_document_that_spells_the_end_of_text_is_only_text():
    """Else a document could cut itself into pieces, and its bytes would count as none."""
    ids = encode_texts(TOKENIZER, [f"a{END_OF_TEXT}b"])[0]

    assert END_ID not in ids
    assert decode(ids) == f"a{END_OF_TEXT}b"


HARD_TEXTS = [
    "it's we'll I'd",
    "日本語 テキスト",
    "a  b\n\n\tc",
    "12 345 ½²",
    "x" + " " * 64 + "the",
]
HARD_TEXTS += ["\x1c" * 64 + " the", "été naïve", "the" + "\n" * 64]
HARD_TOKENIZER = train_tokenizer([*TEXTS, *HARD_TEXTS * 30], vocab_size=420)


def encode_slowly(tokenizer_json: str, text: str) -> list[int]:
    """Token ids by the library that trained the tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text).ids


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=200)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
    | st.lists(st.sampled_from([*"ab'stldve 01²日é\n\t\x1c\x85\u00a0.!", "the", "cat", "   "])).map(
        "".join
    )
)
def test_ids_are_those_of_the_library_that_trained_the_tokenizer(text):
    for tokenizer_json in (TOKENIZER, HARD_TOKENIZER):
        ids = encode_texts(tokenizer_json, [text])[0]
        assert ids.tolist() == encode_slowly(tokenizer_json, text)


@pytest.mark.parametrize(
    "text",
    [
        " " * 12_000,
        "a" + " " * 12_000 + "b" + "\n" * 11_000 + "cat",
        "a" + " " * 9_999 + "b" + " " * 10_000 + "c" + " " * 10_001 + "d",
        " the" + "\n" * 15_000,
        "x" + " " * 12_001 + "the cat" + "\n" * 12_001 + " the",
        "a" + "\x1c" * 11_000 + "b",  # a blank to str.isspace, none to the words
    ],
)
def test_long_white_space_is_encoded_as_the_library_does(text):
    ids = encode_texts(HARD_TOKENIZER, [text])[0]

    assert ids.tolist() == encode_slowly(HARD_TOKENIZER, text)
    assert len(ids) < len(text) / 2  # so that a cut elsewhere would show


def test_a_million_blanks_are_encoded():
    """The pattern alone gives up on them."""
    ids = encode_texts(TOKENIZER, ["a" + " " * 2_000_000 + "b"])[0]

    assert decode(ids) == "a" + " " * 2_000_000 + "b"


def test_a_tokenizer_of_another_kind_is_refused():
    rules = json.loads(TOKENIZER)
    rules["pre_tokenizer"] = {"type": "Whitespace"}

    with pytest.raises(PoolError, match=r"must be a byte-level BPE .* got model BPE, words"):
        encode_texts(json.dumps(rules), ["a"])


def test_documents_are_encoded_alike_alone_and_among_thousands():
    texts = [f"{i} {TEXTS[i % 60]}" for i in range(1100)]
    together = encode_texts(TOKENIZER, texts)

    for i in (0, 999, 1000, 1099):
        np.testing.assert_array_equal(together[i], encode_texts(TOKENIZER, [texts[i]])[0])


def test_the_same_documents_give_the_same_tokenizer_in_another_process():
    code = (
        "from causalmix_pipeline.adapters.tokenizer import train_tokenizer\n"
        "import json, sys\n"
        "print(train_tokenizer(json.load(sys.stdin), vocab_size=320), end='')"
    )
    texts = json.dumps(TEXTS).encode()
    other = subprocess.run(
        [sys.executable, "-c", code], input=texts, capture_output=True, check=True
    )

    assert other.stdout.decode() == TOKENIZER


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(PoolError, match=r"proxy\.vocab_size must be >= 257 .* got 256"):
        train_tokenizer(TEXTS, vocab_size=256)


# Token store


def write_store(folder, encoded=None, vocab_size=300) -> TokenStore:
    encoded = encode_texts(TOKENIZER, TEXTS) if encoded is None else encoded
    ids = [f"doc{i:03d}" for i in range(len(encoded))]
    return TokenStore.write(folder, [(ids, encoded)], vocab_size)


def test_the_store_gives_back_each_document(tmp_path):
    encoded = encode_texts(TOKENIZER, TEXTS)
    store = write_store(tmp_path / "tokens", encoded)
    tokens, offsets = store.tokens(), store.offsets()

    assert tokens.dtype == np.uint16
    assert store.document_ids()[3] == "doc003"
    for i, ids in enumerate(encoded):
        np.testing.assert_array_equal(tokens[offsets[i] : offsets[i + 1]], ids)


def test_ids_beyond_two_bytes_are_kept_whole(tmp_path):
    encoded = [np.array([1, 70_000], np.uint32), np.array([2], np.uint32)]
    tokens = write_store(tmp_path / "tokens", encoded, vocab_size=100_000).tokens()

    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [1, 70_000, 2]


def test_a_store_that_exists_is_left_as_it_is(tmp_path):
    write_store(tmp_path / "tokens", [np.array([1, 2], np.uint32)])
    store = write_store(tmp_path / "tokens", [np.array([9], np.uint32)])

    assert store.tokens().tolist() == [1, 2]


def test_a_half_written_store_is_not_taken_for_one(tmp_path):
    """A killed writer leaves a folder under another name, which the next write ignores."""
    leftover = tmp_path / ".tokens.123.building"
    leftover.mkdir()
    (leftover / "tokens.bin").write_bytes(b"x")

    assert len(write_store(tmp_path / "tokens").document_ids()) == len(TEXTS)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["tokens"]


def test_documents_are_found_by_id_in_any_order_and_repeated(tmp_path):
    store = TokenStore.write(
        tmp_path / "t",
        [(["zz", "aa"], [np.array([1]), np.array([2])]), (["mm"], [np.array([3])])],
        10,
    )

    assert store.positions(np.array(["mm", "zz", "mm", "aa"], "S")).tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize("absent", ["bb", "zzz", "a"])
def test_a_document_that_the_store_lacks_is_named(tmp_path, absent):
    store = TokenStore.write(tmp_path / "t", [(["zz", "aa"], [np.array([1]), np.array([2])])], 10)

    with pytest.raises(PoolError, match=f"lacks document {absent} of a pool state"):
        store.positions(np.array(["aa", absent], "S"))


# Windows


def cut_slowly(documents: list[list[int]], length: int) -> list[list[int]]:
    """Join, then cut: a window of `length` predictions, the next starting on its last token."""
    stream = [token for document in documents for token in [*document, END_ID]]
    while len(stream) < length + 1:
        stream = (stream + stream)[: length + 1]
    windows, start = [], 0
    while start + length + 1 <= len(stream):
        windows.append(stream[start : start + length + 1])
        start += length
    return windows


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=80)
@given(
    st.lists(st.lists(st.integers(1, 500), max_size=12), min_size=1, max_size=6),
    st.data(),
    st.integers(1, 20),
)
def test_windows_are_those_of_a_slow_loop(documents, data, length):
    chosen = data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=1, max_size=8))
    tokens = np.array([token for document in documents for token in document], np.uint16)
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])])

    windows = cut_windows(tokens, offsets, np.array(chosen), length)

    assert windows.tolist() == cut_slowly([documents[i] for i in chosen], length)


def test_every_token_but_the_first_is_predicted_once():
    tokens, offsets = np.arange(1, 41), np.array([0, 40])
    windows = cut_windows(tokens, offsets, np.array([0]), 8)

    assert windows[:, 1:].ravel().tolist() == [*range(2, 41), END_ID]
