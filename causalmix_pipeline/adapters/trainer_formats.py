"""A mixture in the configuration of a trainer, with units converted and achieved shares told.

The mixture is in shares of training tokens. A trainer that draws rows draws domain d with
probability share_d / (mean tokens of a row of d), normalised; one that draws sequences of equal
length takes the shares as they are. Beside each configuration stand `domains.json`, which holds the
exact labels and numbers, and a README that shows them. Domains without share are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from causalmix_pipeline.adapters.export_sample import (
    OnProgress,
    kept_sample,
    remove_sample,
    write_sample,
)
from causalmix_pipeline.adapters.exporter import Export, ManifestExporter
from causalmix_pipeline.adapters.formats_by_rows import (
    axolotl_files,
    datasets_files,
    llama_factory_files,
    trl_files,
)
from causalmix_pipeline.adapters.formats_by_tokens import (
    megatron_files,
    mosaic_files,
    olmix_files,
    olmo_core_files,
    torchtitan_files,
)
from causalmix_pipeline.adapters.profiler import PoolSpec
from causalmix_pipeline.adapters.run_store import write_atomically
from causalmix_pipeline.adapters.trainer_sources import is_placed_below, placed_sources
from causalmix_pipeline.core.errors import ConfigError

#: Files of a configuration by name: what they hold.
Contents = dict[str, str]


def row_probabilities(export: Export) -> np.ndarray:
    """Probability that a drawn row is of each domain; of a sample its share of rows. Shape (D,)."""
    rows_D = np.array(
        [
            0.0
            if not source.is_drawn
            else source.rows
            if export.sample
            else source.share / source.mean_tokens
            for source in export.sources
        ]
    )
    return rows_D / rows_D.sum()


def row_counts(export: Export) -> np.ndarray:
    """Rows of each domain that make up the budget; of a sample those it has. Shape (D,)."""
    budget = export.budget_tokens
    counts = [
        0
        if not source.is_drawn
        else source.rows
        if export.sample
        else max(1, round(source.share * budget / source.mean_tokens))
        for source in export.sources
    ]
    return np.array(counts, dtype=np.int64)


def token_shares(export: Export) -> np.ndarray:
    """Share of tokens of each domain; shape (D,)."""
    return np.array([source.share if source.is_drawn else 0.0 for source in export.sources])


def all_shares(export: Export) -> np.ndarray:
    """The mixture as it is, also of domains without documents; shape (D,)."""
    return export.mixture_D


@dataclass(frozen=True)
class TrainerFormat:
    """The configuration of one trainer; an `Exporter`.

    Attributes:
        name: as settings and command line call it.
        trainer: the trainer and the version whose syntax this is.
        unit: what a weight counts: a row (document), or tokens.
        weigh: numbers of the domains as they are written, shape (D,); 0 leaves one out.
        files: makes the files from their folder, the export and the weights.
        usage: how the files are used, for the README.
        by_domain: whether a sample for it has a stream for each domain.
        needs_sample: kind of the sample that it can't do without; None if it can.
        reads_tokens: whether the trainer reads tokenised data, which the user makes.
    """

    name: str
    trainer: str
    unit: Literal["rows", "tokens"]
    weigh: Callable[[Export], np.ndarray]
    files: Callable[[Path, Export, np.ndarray], Contents]
    usage: str
    by_domain: bool = True
    needs_sample: str | None = None
    reads_tokens: bool = False

    def achieved(self, export: Export) -> np.ndarray:
        """Share of training tokens that each domain gets by the numbers written; shape (D,)."""
        tokens_D = self.weigh(export).astype(float)
        if self.unit == "rows":
            tokens_D *= [source.mean_tokens for source in export.sources]
        return tokens_D / tokens_D.sum()

    def write(self, folder: Path, export: Export) -> list[Path]:
        """Write the configuration, `domains.json` and `README.md`, each whole or not at all."""
        contents = self._contents(folder.absolute(), export)
        for name, text in contents.items():
            write_atomically(folder / name, text.encode("utf-8"))
        return [folder.absolute() / name for name in contents]

    def paths(self, folder: Path, export: Export) -> list[Path]:
        """The files that `write` makes."""
        return [folder / name for name in self._contents(folder.absolute(), export)]

    def _contents(self, folder: Path, export: Export) -> Contents:
        return {
            **self.files(folder, export, self.weigh(export)),
            "domains.json": self._numbers(export),
            "README.md": self._readme(folder, export),
        }

    def _numbers(self, export: Export) -> str:
        achieved_D, weight_D = self.achieved(export), self.weigh(export)
        told = {
            "trainer": self.trainer,
            "weight counts": self.unit,
            "budget_tokens": export.budget_tokens,
            "verdict": export.verdict,
            "seed": export.seed,
            "domains": [
                {
                    "domain": source.domain,
                    "id": source.id,
                    "asked": source.share,
                    "weight": weight_D[d].item(),
                    "mean_tokens": source.mean_tokens,
                    "achieved": float(achieved_D[d]),
                }
                for d, source in enumerate(export.sources)
            ],
        }
        return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

    def _readme(self, folder: Path, export: Export) -> str:
        achieved_D, weight_D = self.achieved(export), self.weigh(export)
        lines = [
            f"# Mixture for {self.trainer}",
            "",
            self.usage,
            "",
            self._whereabouts(folder, export),
            "",
            f"| id | domain | asked | weight ({self.unit}) | mean tokens of a row | achieved |",
            "| - | - | -: | -: | -: | -: |",
        ]
        lines += [
            f"| {source.id} | {markdown_label(source.domain)} | {source.share:.4%} | "
            f"{weight_D[d]:.8g} | {source.mean_tokens:.1f} | {achieved_D[d]:.4%} |"
            for d, source in enumerate(export.sources)
        ]
        return "\n".join([*lines, "", self._meaning(export), ""])

    def _whereabouts(self, folder: Path, export: Export) -> str:
        ask = f"`causalmix export --format {self.name} --sample jsonl`"
        if export.sample is not None:
            where = "`domains/<id>/`" if self.by_domain else "`sample/`"
            told = f"The documents are in {where}, each as often as the mixture asks."
        elif self.name == "olmix":
            return "It names no documents."
        elif any(is_placed_below(folder, source) for source in export.sources):
            told = f"The documents of each domain are in `domains/<id>/` once {ask} was run."
        else:
            told = f"The documents are in the pool's own files; {ask} copies those to train on."
        return told + (
            " Tokenise each domain to the path that the configuration names."
            if self.reads_tokens
            else ""
        )

    def _meaning(self, export: Export) -> str:
        unit = "tokens of the profile's tokenizer; another counts a little differently"
        return (
            f"Asked and achieved are shares of training tokens, in {unit}. Budget: "
            f"{export.budget_tokens:,} tokens. Exact numbers and labels: `domains.json`."
        )


def markdown_label(label: str, length: int = 60) -> str:
    """A label as one line of plain text in Markdown, cut where it is long."""
    text = label if len(label) <= length else label[: length - 1] + "…"
    return "".join(
        letter
        if letter.isalnum() or letter in " .,-…"
        else f"&#{ord(letter)};"
        if letter.isprintable()
        else letter.encode("unicode_escape").decode().replace("\\", "&#92;")
        for letter in text
    )


_ROWS, _TOKENS = "rows", "tokens"

#: Trainers by the name of their format; `json`, the hand-over itself, is in `exporter`.
TRAINERS: dict[str, TrainerFormat] = {
    found.name: found
    for found in (
        TrainerFormat(
            "datasets", "Hugging Face datasets 5.2", _ROWS, row_probabilities, datasets_files,
            "`load_mixture.py` reads `interleave.json` and returns the interleaved dataset: "
            "`from load_mixture import load_mixture; data = load_mixture()`; `data.take(n)` with "
            "`rows_of_the_budget` of the JSON ends it at the budget.",
        ),
        TrainerFormat(
            "llama_factory", "LLaMA-Factory 0.9.5", _ROWS, row_counts, llama_factory_files,
            "Copy the keys of `mixture.yaml` into the training file: each dataset gives "
            "`num_samples` rows, all are concatenated and shuffled. `mixture_streaming.yaml` "
            "draws with `interleave_probs`, for `streaming: true`, where `num_samples` isn't read.",
        ),
        TrainerFormat(
            "trl", "TRL 1.16", _ROWS, row_probabilities, trl_files,
            "`trl sft --config mixture.yaml`, or `DatasetMixtureConfig(**yaml)` and "
            "`get_dataset`. Without a sample TRL keeps the first rows of each file and repeats "
            "none, so the run is as long as the scarcest domain lets it be. Where documents are "
            "prompts and responses, rename `response` to the `completion` that TRL looks for.",
        ),
        TrainerFormat(
            "megatron", "Megatron-LM (core 0.16)", _TOKENS, token_shares, megatron_files,
            "`--data-args-path blend.txt`, or `--per-split-data-args-path blend.json`. The "
            "prefixes are those that `tools/preprocess_data.py --json-keys text --output-prefix "
            "tokens/<id>` writes.",
            reads_tokens=True,
        ),
        TrainerFormat(
            "olmo_core", "OLMo-core 3.0", _TOKENS, token_shares, olmo_core_files,
            "`SourceMixtureDatasetConfig.from_yaml(\"source_mixture.yaml\")`. Set "
            "`global_batch_size` (tokens) to that of the run; `max_repetition_ratio` has 10% of "
            "room, since another tokenizer counts differently.",
            reads_tokens=True,
        ),
        TrainerFormat(
            "torchtitan", "torchtitan 0.3", _TOKENS, token_shares, torchtitan_files,
            "torchtitan has no file format for data: put this folder on PYTHONPATH and, in the "
            "function of your config registry, `config.dataloader = "
            "torchtitan_mixture.dataloader()`. It draws sequences of equal length, so its weights "
            "are shares of tokens.",
        ),
        TrainerFormat(
            "mosaic_streaming", "MosaicML streaming 0.13", _ROWS, row_counts, mosaic_files,
            "`Stream(**stream)` for each of `streams.yaml` (`train_loader.dataset.streams` in "
            "LLM Foundry), where a sample is a document: `choose` is its number of samples. "
            "`streams_packed.yaml` is for samples packed to equal length: `proportion` is the "
            "share of tokens.",
            reads_tokens=True,
        ),
        TrainerFormat(
            "axolotl", "axolotl 0.19", _ROWS, row_counts, axolotl_files,
            "Copy the keys of `mixture.yaml` into the training file. axolotl has no weights: the "
            "sample already holds each document as often as the mixture asks, shuffled.",
            by_domain=False, needs_sample="jsonl",
        ),
        TrainerFormat(
            "olmix", "OLMix", _TOKENS, all_shares, olmix_files,
            "`ratios.csv` has the mixture as one row of a swarm.",
            by_domain=False,
        ),
    )
}  # fmt: skip

#: Names of all formats.
FORMATS = ("json", *TRAINERS)


@dataclass(frozen=True, eq=False)
class HandedOver:
    """What was written for a trainer.

    Attributes:
        name: of the format.
        paths: files of the configuration.
        export: what they were made of, with the sample if there is one.
        achieved_D: share of training tokens of each domain by the numbers written.
    """

    name: str
    paths: Sequence[Path]
    export: Export
    achieved_D: np.ndarray


def hand_over(
    folder: Path,
    export: Export,
    name: str,
    pool: PoolSpec,
    *,
    sample: str | None = None,
    on_progress: OnProgress | None = None,
) -> HandedOver:
    """Write an export in a trainer's format, and its documents where they are asked for.

    A sample that stands in the folder is named where it is of this very export, and is removed
    where it isn't. No configuration stands beside a sample of another export, after a kill either:
    an old one goes before its sample does.

    Args:
        folder: where the files go; made if it isn't there.
        export: the mixture and its documents.
        name: one of `FORMATS`.
        pool: where the documents are.
        sample: `jsonl` or `parquet` writes the documents as well; None where the format can do
            without.
        on_progress: takes rows and shards of the sample as they are done.

    Raises:
        ConfigError: for an unknown format or what the trainer's format can't hold.
        PoolError: if the pool changed since it was profiled, and a sample is asked for.
    """
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {name!r}: choose one.")
    chosen = TRAINERS.get(name, ManifestExporter())
    by_domain, kind = False, sample
    if isinstance(chosen, TrainerFormat):
        by_domain, kind = chosen.by_domain, sample or chosen.needs_sample

    def remove_files(new: Export) -> None:
        for path in chosen.paths(folder, new):
            path.unlink(missing_ok=True)

    if kind is not None:
        export = write_sample(
            folder, export, pool, kind=kind, by_domain=by_domain, before_swap=remove_files,
            on_progress=on_progress,
        )  # fmt: skip
    elif kept := kept_sample(folder, export, by_domain=by_domain):
        export = kept
    else:
        if by_domain:
            placed = placed_sources(export.sources, pool, folder.absolute())
            export = replace(export, sources=placed)
        remove_sample(folder, by_domain=by_domain, before=partial(remove_files, export))
    paths = chosen.write(folder, export)
    if isinstance(chosen, TrainerFormat):
        achieved_D = chosen.achieved(export)
    else:
        tokens_D = np.array([*export.tokens_of().values()], dtype=float)
        achieved_D = tokens_D / tokens_D.sum()
    return HandedOver(name, paths, export, achieved_D)
