"""Configurations of trainers that mix rows of text: `datasets`, LLaMA-Factory, TRL, axolotl.

Syntax: the sources of datasets 5.2.0 (`interleave_datasets`), llamafactory 0.9.5
(`data/parser.py`, `hparams/data_args.py`), trl 1.16.0 (`DatasetMixtureConfig`) and axolotl 0.19.0
(`utils/schemas/datasets.py`, `utils/data/shared.py`). All read files through
`datasets.load_dataset`. Each function takes the folder, the export and the written weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.exporter import Export
from causalmix_pipeline.adapters.trainer_sources import Source

_LOAD_MIXTURE = '''"""Loads the mixture that `interleave.json` beside this file describes."""

import json
from pathlib import Path

from datasets import interleave_datasets, load_dataset


def load_mixture(streaming=True):
    """The domains of the mixture, drawn row by row."""
    text = (Path(__file__).parent / "interleave.json").read_text(encoding="utf-8")
    plan = json.loads(text)
    parts = [
        load_dataset(
            source["builder"],
            data_files=source["data_files"],
            split="train",
            streaming=streaming,
        ).select_columns(plan["columns"])
        for source in plan["sources"]
    ]
    return interleave_datasets(
        parts,
        probabilities=[source["probability"] for source in plan["sources"]],
        seed=plan["seed"],
        stopping_strategy=plan["stopping_strategy"],
    )
'''


def kept(export: Export, weight_D: np.ndarray) -> Iterator[tuple[Source, Any]]:
    """The sources that have a weight, each with its weight as a plain number."""
    for source, weight in zip(export.sources, weight_D.tolist(), strict=True):
        if weight > 0:
            yield source, weight


def to_yaml(value: dict) -> str:
    """A dictionary as YAML, in its own order."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000)


def to_json(value: Any) -> str:
    """A value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def paths_of(source: Source) -> list[str]:
    """Absolute paths of a source's files."""
    return [file.path for file in source.files]


def datasets_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`interleave.json`, and the function that reads it.

    A sample has its repeats in its files, so it is drawn without replacement, to its end.
    """
    sources = [
        {
            "id": source.id,
            "domain": source.domain,
            "probability": probability,
            "builder": source.builder,
            "data_files": paths_of(source),
        }
        for source, probability in kept(export, weight_D)
    ]
    rows = sum(
        round(s.share * export.budget_tokens / s.mean_tokens) for s, _ in kept(export, weight_D)
    )
    plan = {
        "stopping_strategy": "all_exhausted_without_replacement"
        if export.sample
        else "all_exhausted",
        "seed": export.seed,
        "rows_of_the_budget": rows,
        "columns": export.text_fields,
        "sources": sources,
    }
    return {"interleave.json": to_json(plan), "load_mixture.py": _LOAD_MIXTURE}


def llama_factory_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`dataset_info.json`, and the keys of a training file for whole and for streamed data."""
    info, weights = {}, []
    for source, n_rows in kept(export, weight_D):
        for name, path, rows in _entries(source, n_rows, export, folder):
            info[name] = {"file_name": path, "num_samples": rows, **_columns(export)}
            weights.append(rows)
    names = {"dataset_dir": str(folder), "dataset": ",".join(info)}
    shares = [rows / sum(weights) for rows in weights]
    streaming = {
        **names,
        "streaming": True,
        "mix_strategy": "interleave_once" if export.sample else "interleave_over",
        "interleave_probs": ",".join(map(repr, shares)),
    }
    return {
        "dataset_info.json": to_json(info),
        "mixture.yaml": to_yaml({**names, "mix_strategy": "concat"}),
        "mixture_streaming.yaml": to_yaml(streaming),
    }


def _entries(
    source: Source, n_rows: int, export: Export, folder: Path
) -> Iterator[tuple[str, str, int]]:
    """Name, path and rows of a domain's entries: a dataset is one file, or a folder of them."""
    if export.sample:
        yield source.id, str(Path(source.files[0].path).parent.relative_to(folder)), n_rows
        return
    total = sum(file.rows for file in source.files)
    given = 0
    before = 0
    for i, file in enumerate(source.files):
        before += file.rows
        rows = math.floor(n_rows * before / total + 0.5) - given  # of all together, no row is lost
        given += rows
        if rows:
            yield source.id if i == 0 else f"{source.id}.{i + 1}", file.path, rows


def _columns(export: Export) -> dict[str, Any]:
    """Which columns LLaMA-Factory reads; text alone is for its stage `pt`."""
    fields = export.text_fields
    if len(fields) == 2:
        return {"columns": {"prompt": fields[0], "response": fields[1]}}
    if export.has_prompts:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant", "system_tag": "system"}  # fmt: skip
        return {"formatting": "sharegpt", "columns": {"messages": fields[0]}, "tags": tags}
    return {"columns": {"prompt": fields[0]}}


def trl_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`mixture.yaml` with `fraction`, a share of rows; a sample needs none, it is concatenated."""
    datasets = [
        {
            "path": source.builder,
            "data_files": paths_of(source),
            "split": "train",
            "columns": export.text_fields,
            **({} if export.sample else {"fraction": fraction}),
        }
        for source, fraction in kept(export, weight_D)
    ]
    return {"mixture.yaml": to_yaml({"datasets": datasets, "streaming": False})}


def axolotl_files(folder: Path, export: Export, weight_D: np.ndarray) -> dict[str, str]:
    """`mixture.yaml` that reads the sample: as text, or as prompts and responses."""
    kind: Any = "completion"
    if export.has_prompts:
        kind = {"field_instruction": "prompt", "field_output": "response",
                "format": "{instruction}", "no_input_format": "{instruction}"}  # fmt: skip
    dataset = {
        "path": str(Path(export.sample_files[0]).parent),
        "ds_type": "json" if export.sample == "jsonl" else "parquet",
        "data_files": list(export.sample_files),
        "split": "train",
        "type": kind,
        **({} if export.has_prompts else {"field": "text"}),
    }
    return {"mixture.yaml": to_yaml({"datasets": [dataset], "shuffle_merged_datasets": False})}
