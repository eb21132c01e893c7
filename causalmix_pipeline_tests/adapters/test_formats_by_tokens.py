"""Each configuration is read again: by the trainer's library where it is installed."""

import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.run_tables import import_runs
from causalmix_pipeline.adapters.table_files import Table
from causalmix_pipeline.adapters.trainer_formats import hand_over
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline_tests.adapters.exported_pool import (
    HOSTILE,
    export_of,
    mixture_of,
    write_pool,
)

CASES = [5, 40]


def make(tmp_path: Path, name: str, n_domains: int, *, budget: int = 50_000, sample=None):
    """An export in a format; returns it and its folder."""
    labels = [f"domain_{d}" for d in range(n_domains)]
    pool = write_pool(tmp_path / "pool", labels, n=20)
    export = export_of(pool, labels, mixture_of(n_domains), budget=budget)
    return hand_over(tmp_path / "out", export, name, pool, sample=sample), tmp_path / "out"


def drawn(n_domains: int) -> list[float]:
    """Shares without the zeros."""
    return [share for share in mixture_of(n_domains) if share]


# ---------------------------------------------------------------------------- Megatron-LM


def parse_blend(items: list[str]) -> tuple[list[str], list[float]]:
    """Weights and prefixes in turn, as Megatron-LM documents `--data-path`."""
    return items[1::2], [float(weight) for weight in items[::2]]


@pytest.mark.parametrize("n_domains", CASES)
@pytest.mark.parametrize("real", [False, True], ids=["by hand", "megatron-core"])
def test_megatron_reads_weights_that_are_shares_of_tokens(tmp_path, n_domains, real):
    parse = parse_blend
    if real:
        parse = pytest.importorskip("megatron.core.datasets.utils").get_blend_from_list
    _, folder = make(tmp_path, "megatron", n_domains)

    prefixes, weights = parse((folder / "blend.txt").read_text().split())
    split = json.loads((folder / "blend.json").read_text())

    assert weights == pytest.approx(drawn(n_domains), rel=1e-12)
    assert prefixes[0] == f"{folder}/tokens/domain_0_text_document"
    assert parse(split["train"]) == (prefixes, weights)
    assert split["valid"] is None and split["test"] is None


def test_megatron_refuses_a_folder_with_blanks(tmp_path):
    with pytest.raises(ConfigError, match=r"must have no blanks in its path, got '.*my files/out'"):
        make(tmp_path / "my files", "megatron", 5)


# ---------------------------------------------------------------------------- OLMo-core


@pytest.mark.parametrize("n_domains", CASES)
def test_olmo_core_gets_target_ratios(tmp_path, n_domains):
    handed, folder = make(tmp_path, "olmo_core", n_domains)

    read = yaml.safe_load((folder / "source_mixture.yaml").read_text(encoding="utf-8"))

    sources = read["source_list"]["sources"]
    assert [s["target_ratio"] for s in sources] == pytest.approx(drawn(n_domains), rel=1e-12)
    assert sum(s["target_ratio"] for s in sources) == pytest.approx(1.0)
    available = dict(zip(handed.export.domains, handed.export.available_D, strict=True))
    for source in sources:
        room = source["max_repetition_ratio"] * available[source["source_name"]]
        assert room >= source["target_ratio"] * read["requested_tokens"]
        assert source["max_repetition_ratio"] >= 1


@pytest.mark.parametrize("n_domains", CASES)
def test_olmo_core_itself_builds_the_mixture(tmp_path, n_domains):
    """Its own builder over token files as large as the pool's domains."""
    module = pytest.importorskip("olmo_core.data.source_mixture")
    handed, folder = make(tmp_path, "olmo_core", n_domains, budget=2_000_000)
    available = dict(zip(handed.export.domains, handed.export.available_D, strict=True))
    config = module.SourceMixtureDatasetConfig.from_yaml(folder / "source_mixture.yaml")
    for source in config.source_list.sources:
        path = folder / "tokens" / source.source_name / "part-0.npy"
        path.parent.mkdir(parents=True)
        np.zeros(available[source.source_name], dtype=np.uint16).tofile(path)
    config.global_batch_size, config.render_tables, config.quiet = 64, False, True

    built = config.build(npdtype=np.uint16, sequence_length=8)

    tokens = {o.name: sum(p.tokens for p in o.path_tokens) for o in built.sources}
    shares = np.array([tokens.get(d, 0) for d in handed.export.domains]) / sum(tokens.values())
    assert np.abs(shares - mixture_of(n_domains)).max() < 0.001


# ---------------------------------------------------------------------------- torchtitan


@pytest.mark.parametrize("n_domains", CASES)
def test_torchtitan_gets_weights_that_are_shares_of_tokens(tmp_path, n_domains):
    _, folder = make(tmp_path, "torchtitan", n_domains)

    plan = json.loads((folder / "sources.json").read_text(encoding="utf-8"))

    weights = [source["weight"] for source in plan["sources"]]
    assert weights == pytest.approx(drawn(n_domains), rel=1e-12)
    assert all(Path(f).is_file() for source in plan["sources"] for f in source["data_files"])
    compile((folder / "torchtitan_mixture.py").read_text(), "torchtitan_mixture.py", "exec")


def test_torchtitan_itself_draws_sequences_by_these_weights(tmp_path, monkeypatch):
    text = pytest.importorskip("torchtitan.hf_datasets.text_datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _, folder = make(tmp_path, "torchtitan", 5, sample="jsonl")
    monkeypatch.syspath_prepend(str(folder))

    class Words:
        """A tokenizer: the id of a word is the number of words of its document."""

        def encode(self, text, add_bos, add_eos):
            return [len(text.split())] * (len(text.split()) + 1)

    config = importlib.import_module("torchtitan_mixture").dataloader()
    loader = text.InterleavedHuggingFaceTextDataLoader(
        config, dp_world_size=1, dp_rank=0, tokenizer=Words(), seq_len=4, local_batch_size=1
    )
    assert [s.weight for s in config.sources] == pytest.approx(drawn(5), rel=1e-12)
    batches = iter(loader)
    assert next(batches)[0]["input"].shape == (1, 4)
    del sys.modules["torchtitan_mixture"]


# ---------------------------------------------------------------------------- MosaicML streaming


@pytest.mark.parametrize("n_domains", CASES)
def test_mosaic_streams_choose_rows_or_share_tokens(tmp_path, n_domains):
    handed, folder = make(tmp_path, "mosaic_streaming", n_domains, budget=3_000_000)

    rows = yaml.safe_load((folder / "streams.yaml").read_text())["streams"]
    packed = yaml.safe_load((folder / "streams_packed.yaml").read_text())["streams"]

    tokens_D = np.array(
        [rows.get(s.id, {"choose": 0})["choose"] * s.mean_tokens for s in handed.export.sources]
    )
    assert np.abs(tokens_D / tokens_D.sum() - mixture_of(n_domains)).max() < 0.001
    proportions = [stream["proportion"] for stream in packed.values()]
    assert proportions == pytest.approx(drawn(n_domains), rel=1e-12)


@pytest.mark.parametrize("n_domains", CASES)
def test_streaming_itself_derives_the_same_rows(tmp_path, n_domains):
    module = pytest.importorskip("streaming.base.stream")
    handed, folder = make(tmp_path, "mosaic_streaming", n_domains, budget=3_000_000)
    for name in ("streams.yaml", "streams_packed.yaml"):
        read = yaml.safe_load((folder / name).read_text())["streams"]
        streams = [module.Stream(**stream) for stream in read.values()]
        samples = np.array([s.rows for s in handed.export.sources if s.is_drawn])
        epoch = None if name == "streams.yaml" else 1_000_000

        total = module.Stream.apply_weights(streams, samples, epoch, 0)

        share = np.array([stream.choose for stream in streams]) / total
        if name == "streams.yaml":
            share *= [s.mean_tokens for s in handed.export.sources if s.is_drawn]
        assert np.abs(share / share.sum() - drawn(n_domains)).max() < 0.001


# ---------------------------------------------------------------------------- OLMix


@pytest.mark.parametrize("n_domains", CASES)
def test_olmix_gets_one_row_with_the_zeros(tmp_path, n_domains):
    _, folder = make(tmp_path, "olmix", n_domains)

    frame = pl.read_csv(folder / "ratios.csv")

    assert frame.columns[:3] == ["run", "name", "index"] and frame.height == 1
    shares = frame.select(pl.exclude("run", "name", "index")).row(0)
    assert shares == pytest.approx(mixture_of(n_domains), rel=1e-12)


def test_olmix_labels_come_back_exactly(tmp_path):
    pool = write_pool(tmp_path / "pool", HOSTILE)
    export = export_of(pool, HOSTILE, [1 / 7] * 7, budget=3000)

    hand_over(tmp_path / "out", export, "olmix", pool)

    with open(tmp_path / "out" / "ratios.csv", newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert header[3:] == HOSTILE
    assert [float(cell) for cell in row[3:]] == pytest.approx([1 / 7] * 7, rel=1e-12)


def test_the_row_is_a_run_of_a_table_that_can_be_fitted(tmp_path):
    """Copied under the runs of a swarm, with metrics, it is read like any other run."""
    _, folder = make(tmp_path, "olmix", 5)
    row = pl.read_csv(folder / "ratios.csv")
    rng = np.random.default_rng(0)
    names = row.columns[3:]
    shares = rng.dirichlet(np.ones(5), 20)
    runs = pl.DataFrame(
        {"run": [f"r{i}" for i in range(20)], **dict(zip(names, shares.T, strict=True))}
    )
    ratios = pl.concat([runs, row.select("run", *names)], how="vertical_relaxed")
    metrics = ratios.select("run", loss=pl.lit(1.0) + pl.col(names[0]))

    found = import_runs(Table(ratios, "ratios.csv"), Table(metrics, "metrics.csv"))

    assert "recommended" in found.runs.run_ids


def test_olmix_refuses_a_domain_that_is_named_like_a_key(tmp_path):
    pool = write_pool(tmp_path / "pool", ["run", "b"])
    export = export_of(pool, ["run", "b"], [0.5, 0.5], budget=3000)

    with pytest.raises(ConfigError, match=r"named like a column of OLMix.*got 'run'"):
        hand_over(tmp_path / "out", export, "olmix", pool)
