"""Configurations of trainers that mix sequences of tokens, whose weights are shares of tokens.

Syntax: the sources of megatron-core 0.16.1 (`core/datasets/utils.py`, and Megatron-LM's
`--data-args-path`), ai2-olmo-core 3.0.0 (`data/source_mixture.py`), torchtitan 0.3.0
(`hf_datasets/text_datasets.py`), mosaicml-streaming 0.13.0 (`base/stream.py`; it can mix rows as
well), and the tables of allenai/olmix. Each function takes the folder, the export and the weights.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from causalmix_pipeline.adapters.exporter import Export
from causalmix_pipeline.adapters.formats_by_rows import kept, paths_of, to_json, to_yaml
from causalmix_pipeline.core.errors import ConfigError

#: Tokens of a global batch that OLMo-core's configuration must name; the user sets the run's own.
_OLMO_BATCH_TOKENS = 2**22

#: Room over the epochs of this profile's tokens, which the trainer's tokenizer counts otherwise.
_REPETITION_ROOM = 1.1

#: Columns of OLMix's tables that aren't domains.
_OLMIX_KEYS = ("run", "name", "index")

_TORCHTITAN = '''"""The mixture of `sources.json` beside this file, for torchtitan 0.3."""

import json
from functools import partial
from pathlib import Path

from datasets import load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import (
    DATASETS,
    HFDataSource,
    InterleavedHuggingFaceTextDataLoader,
)


def _load(path, builder, data_files):
    return load_dataset(builder, data_files=data_files, split="train")


def _text(sample, columns):
    parts = [sample[column] for column in columns]
    if isinstance(parts[0], list):  # a chat
        parts = [message["role"] + "\\n" + message["content"] for message in parts[0]]
    return "\\n\\n".join(parts)


def dataloader(**options):
    """Register the domains and return the configuration; `options` are further fields of it."""
    text = (Path(__file__).parent / "sources.json").read_text(encoding="utf-8")
    plan = json.loads(text)
    sources = []
    for source in plan["sources"]:
        files = {"builder": source["builder"], "data_files": source["data_files"]}
        DATASETS[source["id"]] = DatasetConfig(
            path=source["data_files"][0],
            loader=partial(_load, **files),
            sample_processor=partial(_text, columns=plan["columns"]),
        )
        sources.append(
            HFDataSource(dataset=source["id"], weight=source["weight"], infinite=True)
        )
    return InterleavedHuggingFaceTextDataLoader.Config(
        sources=sources, seed=plan["seed"], **options
    )
'''


def megatron_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`blend.txt`, weights and prefixes in turn; `blend.json`, the same for the training split.

    Raises:
        ConfigError: if the folder has blanks, at which Megatron-LM would cut a prefix.
    """
    if any(letter.isspace() for letter in str(folder)):
        raise ConfigError(
            f"the folder of a blend list must have no blanks in its path, got {str(folder)!r}: "
            "choose another by --out, or move the project."
        )
    pairs = [
        (repr(share), f"{folder}/tokens/{source.id}_text_document")
        for source, share in kept(export, weight_D)
    ]
    flat = [item for pair in pairs for item in pair]
    return {
        "blend.txt": "".join(f"{weight} {prefix}\n" for weight, prefix in pairs),
        "blend.json": to_json({"train": flat, "valid": None, "test": None}),
    }


def olmo_core_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`source_mixture.yaml`, which `SourceMixtureDatasetConfig.from_yaml` reads."""
    sources = [
        {
            "source_name": source.id,
            "target_ratio": share,
            "paths": [f"{folder}/tokens/{source.id}/*.npy"],
            "max_repetition_ratio": max(
                1.0, round(share * export.budget_tokens / int(available) * _REPETITION_ROOM, 4)
            ),
        }
        for (source, share), available in zip(
            kept(export, weight_D), export.available_D[weight_D > 0], strict=True
        )
    ]
    mixture = {
        "source_list": {"sources": sources},
        "requested_tokens": export.budget_tokens,
        "global_batch_size": _OLMO_BATCH_TOKENS,
        "seed": export.seed,
    }
    return {"source_mixture.yaml": to_yaml(mixture)}


def torchtitan_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`sources.json`, and the function that makes torchtitan's configuration of it."""
    plan = {
        "seed": export.seed,
        "columns": export.text_fields,
        "sources": [
            {
                "id": source.id,
                "domain": source.domain,
                "weight": share,
                "builder": source.builder,
                "data_files": paths_of(source),
            }
            for source, share in kept(export, weight_D)
        ],
    }
    return {"sources.json": to_json(plan), "torchtitan_mixture.py": _TORCHTITAN}


def mosaic_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`streams.yaml`, which counts rows, and `streams_packed.yaml`, with shares of tokens."""
    rows, packed = {}, {}
    for source, n_rows in kept(export, weight_D):
        rows[source.id] = {"local": f"{folder}/tokens/{source.id}", "choose": n_rows}
        packed[source.id] = {
            "local": f"{folder}/tokens/{source.id}_packed",
            "proportion": source.share,
        }
    return {
        "streams.yaml": to_yaml({"streams": rows}),
        "streams_packed.yaml": to_yaml({"streams": packed}),
    }


def olmix_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`ratios.csv`: run, name, index and a column for each domain, zeros too.

    Raises:
        ConfigError: if a domain has the name of one of the first columns.
    """
    taken = [domain for domain in export.domains if domain in _OLMIX_KEYS]
    if taken:
        raise ConfigError(
            f"a domain must not be named like a column of OLMix ({', '.join(_OLMIX_KEYS)}), got "
            f"{taken[0]!r}: rename it in the pool, or choose another format."
        )
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerow([*_OLMIX_KEYS, *export.domains])
    table.writerow(["recommended", "recommended", 0, *map(repr, weight_D.tolist())])
    return {"ratios.csv": content.getvalue()}
