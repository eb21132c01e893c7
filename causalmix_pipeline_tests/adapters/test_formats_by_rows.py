"""Each configuration is read again: by the trainer's library where it is installed."""

import importlib.util
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from causalmix_pipeline.adapters.trainer_formats import hand_over
from causalmix_pipeline_tests.adapters.exported_pool import (
    export_of,
    mixture_of,
    n_words,
    write_pool,
)

CASES = [5, 40]


def make(tmp_path: Path, name: str, n_domains: int, *, budget: int, sample=None, n=20, **pool):
    """An export in a format; returns it and its folder."""
    labels = [f"domain_{d}" for d in range(n_domains)]
    spec = write_pool(tmp_path / "pool", labels, n=n, **pool)
    export = export_of(spec, labels, mixture_of(n_domains), budget=budget)
    return hand_over(tmp_path / "out", export, name, spec, sample=sample), tmp_path / "out"


def by_tokens(export, rows_of_id: Mapping[str, float]) -> np.ndarray:
    """Shares of tokens of rows drawn by id."""
    tokens_D = [rows_of_id.get(s.id, 0.0) * s.mean_tokens for s in export.sources]
    return np.array(tokens_D) / sum(tokens_D)


def tokens_in(rows) -> Counter:
    """Tokens of rows by domain."""
    counts = Counter()
    for row in rows:
        counts[row["domain"]] += n_words(row["text"])
    return counts


def no_cache(monkeypatch, tmp_path) -> None:
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# ---------------------------------------------------------------------------- datasets


def loader_of(folder: Path):
    """The module that was written beside the plan."""
    spec = importlib.util.spec_from_file_location("load_mixture", folder / "load_mixture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("n_domains", CASES)
def test_datasets_gets_probabilities_of_rows(tmp_path, n_domains):
    handed, folder = make(tmp_path, "datasets", n_domains, budget=5000)

    plan = json.loads((folder / "interleave.json").read_text(encoding="utf-8"))

    probabilities = {s["id"]: s["probability"] for s in plan["sources"]}
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert min(probabilities.values()) > 0
    shares = by_tokens(handed.export, probabilities)
    assert np.abs(shares - mixture_of(n_domains)).max() < 1e-9


def read_domains_too(folder: Path) -> None:
    """Have the written loader return the labels, which it drops."""
    plan = json.loads((folder / "interleave.json").read_text(encoding="utf-8"))
    plan["columns"].append("domain")
    (folder / "interleave.json").write_text(json.dumps(plan), encoding="utf-8")


def test_datasets_draws_the_mixtures_shares_of_tokens(tmp_path):
    """Within four standard errors of a ratio of sums over rows; rows by tokens miss by far more."""
    pytest.importorskip("datasets")
    handed, folder = make(tmp_path, "datasets", 5, budget=5000, n=1000)
    assert set(next(iter(loader_of(folder).load_mixture()))) == {"text"}
    read_domains_too(folder)

    rows = list(itertools.islice(loader_of(folder).load_mixture(), 2000))

    assert len(rows) == 2000
    n_tokens = np.array([n_words(row["text"]) for row in rows])
    for domain, share in zip(handed.export.domains, handed.export.mixture_D, strict=True):
        own = n_tokens * [row["domain"] == domain for row in rows]
        found = own.sum() / n_tokens.sum()
        error = np.sqrt(((own - found * n_tokens) ** 2).sum()) / n_tokens.sum()
        assert abs(found - share) <= 4 * error
        assert error < 0.02


@pytest.mark.parametrize("n_domains", CASES)
def test_datasets_reads_a_sample_to_its_end_with_exact_shares(tmp_path, n_domains):
    pytest.importorskip("datasets")
    handed, folder = make(tmp_path, "datasets", n_domains, budget=20_000, sample="jsonl")
    module = loader_of(folder)
    read_domains_too(folder)

    tokens = tokens_in(module.load_mixture())

    assert tokens == {d: n for d, n in handed.export.tokens_of().items() if n}
    shares = np.array([tokens[d] for d in handed.export.domains]) / tokens.total()
    assert np.abs(shares - handed.achieved_D).max() < 1e-12


# ---------------------------------------------------------------------------- LLaMA-Factory


@pytest.mark.parametrize("n_domains", CASES)
@pytest.mark.parametrize("sample", [None, "parquet"])
def test_llama_factory_gets_rows_and_probabilities(tmp_path, n_domains, sample):
    handed, folder = make(tmp_path, "llama_factory", n_domains, budget=300_000, sample=sample)

    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    whole = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))
    streaming = yaml.safe_load((folder / "mixture_streaming.yaml").read_text(encoding="utf-8"))

    rows = Counter()
    for name, entry in info.items():
        rows[name.partition(".")[0]] += entry["num_samples"]
        assert (folder / entry["file_name"]).exists()
    assert np.abs(by_tokens(handed.export, rows) - mixture_of(n_domains)).max() < 0.001
    assert whole["mix_strategy"] == "concat" and whole["dataset"].split(",") == list(info)
    drawn = defaultdict(float)
    probabilities = map(float, streaming["interleave_probs"].split(","))
    for name, probability in zip(streaming["dataset"].split(","), probabilities, strict=True):
        drawn[name.partition(".")[0]] += probability
    assert np.abs(by_tokens(handed.export, drawn) - mixture_of(n_domains)).max() < 0.001


@pytest.mark.parametrize("sample", [None, "jsonl"])
def test_llama_factory_itself_reads_rows_and_probabilities(tmp_path, sample, monkeypatch):
    """Its own parser, and its own loader of one dataset."""
    parser = pytest.importorskip("llamafactory.data.parser", exc_type=ImportError)
    arguments = pytest.importorskip("llamafactory.hparams.data_args", exc_type=ImportError)
    no_cache(monkeypatch, tmp_path)
    handed, folder = make(tmp_path, "llama_factory", 5, budget=5000, sample=sample)
    for name in ("mixture.yaml", "mixture_streaming.yaml"):
        keys = yaml.safe_load((folder / name).read_text(encoding="utf-8"))

        found = arguments.DataArguments(template="default", **keys)

        entries = parser.get_dataset_list(found.dataset, found.dataset_dir)
        rows = Counter()
        for entry in entries:
            rows[str(entry).split("domains/")[-1]] += entry.num_samples
            assert entry.load_from == "file" and entry.prompt == "text"
        expected = sum(yaml.safe_load((folder / "dataset_info.json").read_text())[n]["num_samples"]
                       for n in found.dataset)  # fmt: skip
        assert rows.total() == expected
    assert sum(found.interleave_probs) == pytest.approx(1.0)
    assert handed.achieved_D.sum() == pytest.approx(1.0)


def test_a_domains_rows_are_split_over_its_files_and_none_is_lost(tmp_path):
    _, folder = make(tmp_path, "llama_factory", 5, budget=2001)

    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    told = json.loads((folder / "domains.json").read_text(encoding="utf-8"))

    for row in told["domains"]:
        parts = [v["num_samples"] for k, v in info.items() if k.partition(".")[0] == row["id"]]
        assert sum(parts) == row["weight"]
        assert len(parts) in (0, 2) and max(parts, default=0) - min(parts, default=0) <= 1


def test_llama_factory_learns_which_column_is_the_response(tmp_path):
    for sample in (None, "jsonl"):
        _, folder = make(tmp_path / str(sample), "llama_factory", 5, budget=900, sample=sample,
                         prompts=True)  # fmt: skip

        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))

        assert info["domain_0"]["columns"] == {"prompt": "prompt", "response": "response"}


# ---------------------------------------------------------------------------- TRL


@pytest.mark.parametrize("n_domains", CASES)
def test_trl_gets_fractions_of_rows(tmp_path, n_domains):
    handed, folder = make(tmp_path, "trl", n_domains, budget=5000)

    read = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))

    ids = [s.id for s in handed.export.sources if s.is_drawn]
    fractions = [part["fraction"] for part in read["datasets"]]
    rows = dict(zip(ids, fractions, strict=True))
    assert np.abs(by_tokens(handed.export, rows) - mixture_of(n_domains)).max() < 1e-9
    assert all(Path(f).is_file() for part in read["datasets"] for f in part["data_files"])


@pytest.mark.parametrize("n_domains", CASES)
def test_trl_itself_reads_a_sample_whole(tmp_path, n_domains, monkeypatch):
    utils = pytest.importorskip("trl.scripts.utils")
    no_cache(monkeypatch, tmp_path)
    handed, folder = make(tmp_path, "trl", n_domains, budget=20_000, sample="jsonl")
    read = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))
    for part in read["datasets"]:
        part["columns"].append("domain")

    data = utils.get_dataset(utils.DatasetMixtureConfig(**read))["train"]

    assert tokens_in(data) == {d: n for d, n in handed.export.tokens_of().items() if n}


def test_trl_itself_takes_fractions_of_the_pools_files(tmp_path, monkeypatch):
    utils = pytest.importorskip("trl.scripts.utils")
    no_cache(monkeypatch, tmp_path)
    handed, folder = make(tmp_path, "trl", 5, budget=20_000)
    read = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))
    for part in read["datasets"]:
        part["columns"].append("domain")

    fractions = [part["fraction"] for part in read["datasets"]]

    data = utils.get_dataset(utils.DatasetMixtureConfig(**read))["train"]

    rows = Counter(data["domain"])
    for source, fraction in zip(
        [s for s in handed.export.sources if s.is_drawn],
        fractions,
        strict=True,
    ):
        assert abs(rows[source.domain] - fraction * len(data)) <= 1


# ---------------------------------------------------------------------------- axolotl


@pytest.mark.parametrize("n_domains", CASES)
def test_axolotl_reads_the_sample_as_datasets_does(tmp_path, n_domains):
    """`load_dataset(ds_type, data_files=...)` is what axolotl 0.19 calls for a local folder."""
    datasets = pytest.importorskip("datasets")
    handed, folder = make(tmp_path, "axolotl", n_domains, budget=20_000)
    read = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))
    (part,) = read["datasets"]
    assert Path(part["path"]) == folder / "sample" and part["field"] == "text"

    rows = datasets.load_dataset(
        part["ds_type"], data_files=part["data_files"], split=part["split"], streaming=True
    )

    assert tokens_in(rows) == {d: n for d, n in handed.export.tokens_of().items() if n}


def test_axolotl_trains_on_responses_where_there_are_prompts(tmp_path):
    _, folder = make(tmp_path, "axolotl", 5, budget=900, prompts=True, sample="parquet")

    read = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))

    (part,) = read["datasets"]
    assert part["ds_type"] == "parquet" and part["type"]["field_output"] == "response"
