"""What `causalmix.yaml` may say: every section, field, default and rule.

Reading it and writing a commented one is in `settings_file.py`. Paths are kept as the user wrote
them and resolved against the folder of the file, so a project can be moved.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.core.controller_tuning import CONTROLLERS, check_values, make_controller
from causalmix_pipeline.core.covariates import (
    DOCUMENT_COLUMNS,
    DOMAIN_COVARIATES,
    METRICS,
    MODEL_METRICS,
    base_of,
    check_covariate_names,
)
from causalmix_pipeline.core.design import MOST_STAGES
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.runs import OWN
from causalmix_pipeline.core.scale import (
    FEWEST_STATES,
    SAME_SIZE,
    SIZE_COVARIATE,
    log2_parameters,
    sizes_of_states,
)

#: Proxy runs of each preset, without the noise panel; `design.n_runs` overrides it.
PRESET_RUNS = {"tests": 32, "demo": 128, "study": 512, "paper": 512, "longcot": 64}

#: Proxy settings of each preset, over the defaults of `core.proxy.ProxyConfig`.
PRESET_PROXY: dict[str, dict[str, Any]] = {
    "tests": {"hidden": 32, "layers": 1, "steps": 30},
    "demo": {"hidden": 32, "layers": 1, "steps": 1000},
    "study": {"hidden": 32, "layers": 1, "steps": 1000},
}

#: Recipe of each preset where `proxy.pretrained` is set, over the defaults of
#: `core.pretrained.PretrainedConfig`; `samples` documents are turned into tokens of the pool.
PRESET_PRETRAINED: dict[str, dict[str, Any]] = {
    "tests": {"samples": 100, "sequence_length": 256, "batch_sequences": 4},
    "demo": {"samples": 2_000, "sequence_length": 1024},
    "study": {"samples": 20_000},
    "paper": {"samples": 100_000, "batch_sequences": 32, "micro_batch": 8},
    "longcot": {
        "samples": 20_000,
        "sequence_length": 16_384,
        "batch_sequences": 8,
        "gradient_checkpointing": True,
    },
}

DEFAULT_COVARIATES = [
    "log2_tokens",
    "duplicate_share",
    "unigram_cross_entropy",
    "bigram_cross_entropy",
    "compress_ratio",
    "unique_bigram_ratio",
]

EstimatorName = Literal[
    "response_surface",
    "response_surface_blind",
    "structured_ridge",
    "causal_forest",
    "causal_forest_log",
    "causal_forest_raw",
    "causal_forest_ilr",
    "regmix",
    "lightgbm_state",
    "extra_trees",
    "log_linear",
    "stack",
]

FormatName = Literal[
    "json",
    "datasets",
    "llama_factory",
    "trl",
    "megatron",
    "olmo_core",
    "torchtitan",
    "mosaic_streaming",
    "axolotl",
    "olmix",
]

Share = Annotated[float, Field(ge=0.0, le=1.0)]

#: An owner that Dagster takes: its own rule for addresses, and a team with a name.
_OWNER = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,7}"
    r"|team:\w[\w .-]{0,98}"
)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

#: A live pool's name: it becomes a partition, a folder and a file's name.
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")

#: A project's name: it becomes a part of keys, and a folder.
_PROJECT_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


class Section(BaseModel):
    """A part of the settings: unknown keys are refused, values don't change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _ordered(field: str, pair: tuple[float, float]) -> None:
    if pair[0] > pair[1]:
        raise ValueError(
            f"{field} must be [least, largest] with least <= largest, got {list(pair)}: "
            "swap the two numbers"
        )


class Pools(Section):
    """Where the documents are: one folder pinned for the experiment, one that lives."""

    experiment: str = Field(
        default="data/experiment",
        min_length=1,
        description="Folder, glob or URL (s3://...) of the pinned pool that proxy runs train on; "
        "change it only when you adopt a new experiment, since every proxy run is then trained "
        "anew.",
    )
    live: str | dict[str, str] = Field(
        default="data/pool",
        description="Folder, glob or URL (s3://...) of the pool to recommend a mixture for; change "
        "its files at any time. For several pools over one experiment, a name and a location each: "
        "{web-2026w47: data/web, longcot: s3://pools/longcot}.",
    )

    @field_validator("live", mode="before")
    @classmethod
    def _check_live(cls, live: Any) -> Any:
        named = live if isinstance(live, dict) else {}
        for name in named:
            if not isinstance(name, str) or not _POOL_NAME.fullmatch(name):
                raise ValueError(
                    "pools.live must name each pool by lower-case letters, digits, _ and -, a "
                    f"letter or digit first, 60 characters at most, got {name!r}: rename it"
                    f"{'' if isinstance(name, str) else ', in quotation marks'}"
                )
        for field, location in [(f"pools.live.{name}", named[name]) for name in named] or [
            ("pools.live", live)
        ]:
            if not isinstance(location, str) or not location:
                raise ValueError(
                    f"{field} must be a folder, glob or URL, or, for several pools, a mapping of "
                    f"names to these, got {location!r}: write data/pool or {{a: data/a, b: data/b}}"
                )
        return live


class Columns(Section):
    """Which column of a pool's files holds what."""

    text: str = Field(
        default="text", min_length=1, description="Column with the text of the document."
    )
    prompt: str | None = Field(
        default=None,
        description="Column with the prompt, where documents are prompt and response; then set "
        "response, too, and text isn't read.",
    )
    response: str | None = Field(
        default=None, description="Column with the response to the prompt; set prompt, too."
    )
    messages: str | None = Field(
        default=None,
        description="Column with a chat: a list of {role, content}. The last assistant message is "
        "the response, what stands before it the prompt; text isn't read.",
    )
    domain: str | None = Field(
        default=None,
        description="Column with the domain's name; null takes the name of the file's folder.",
    )
    domain_from: Literal["folder", "file"] = Field(
        default="folder",
        description="What names the domain where no column does: the file's folder, or the file "
        "itself without its endings.",
    )
    source: str | None = Field(
        default=None,
        description="Column with where the document comes from; null takes the file's name "
        "without its ending.",
    )
    group: str | None = Field(
        default=None,
        description="Column that tells which documents belong together (one book, one "
        "repository): a group is never split between training and evaluation; null takes each "
        "document for itself.",
    )
    numbers: tuple[str, ...] = Field(
        default=(),
        description="Columns of numbers of your own, such as quality scores: each becomes a metric "
        "of the document, and a covariate by its name.",
    )

    @model_validator(mode="after")
    def _check(self):
        ColumnMap(**self.model_dump())  # its rules are the reader's
        taken = {*METRICS, *MODEL_METRICS, *DOMAIN_COVARIATES, *DOCUMENT_COLUMNS}
        for name in self.numbers:
            if name in taken:
                raise ValueError(
                    f"columns.numbers must not use the name of a metric or column of the "
                    f"pipeline, got {name!r}: rename the column in the files"
                )
        return self


class Profile(Section):
    """What is measured of documents besides the metrics that need no model."""

    lm: str | None = Field(
        default=None,
        description="Folder of a causal language model that scores documents (normalized_loss, "
        "hes, perplexity, ifd): a local Hugging Face model, or what `causalmix fetch-scorer` "
        "brought; null measures none of these.",
    )
    lm_budget_tokens: int = Field(
        default=100_000,
        ge=1_000,
        description="Tokens of each domain that the model scores; more gives smaller standard "
        "errors, at about 300 tokens a second and core for a model of 135M parameters.",
    )
    rater: str | None = Field(
        default=None,
        description="Folder of a local sequence classifier or regressor that rates documents "
        "(writing_style); null rates none.",
    )
    rater_budget_tokens: int = Field(
        default=200_000, ge=1_000, description="Tokens of each domain that the rater rates."
    )
    vocd_budget_tokens: int = Field(
        default=100_000,
        ge=1_000,
        description="Tokens of each domain whose vocd_d is fitted; it costs a hundred times the "
        "other metrics.",
    )
    device: str = Field(
        default="auto",
        min_length=1,
        description="Where models score: auto takes a GPU if there is one; cpu, cuda, cuda:1.",
    )


class Backend(Section):
    """Where documents are scored and proxies trained."""

    kind: Literal["local", "ray"] = Field(
        default="local",
        description="local: processes of this machine; ray: a Ray cluster, which must see the "
        "same data folder and pools.",
    )
    address: str | None = Field(
        default=None,
        description="Address of a running Ray cluster, such as auto or ray://head:10001; null "
        "starts one on this machine for the time of the work.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Processes on this machine; 0 takes one per core, or one per GPU where proxies "
        "are trained on GPUs. Ray has its own.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where proxies are trained: auto takes the CPU for those trained from scratch "
        "and a GPU, if there is one, for pretrained models; another device trains all runs anew.",
    )
    gpus_per_run: float = Field(
        default=1.0,
        gt=0.0,
        le=16.0,
        description="GPUs that Ray reserves for what a worker trains at once on cuda; a part of "
        "one, such as 0.25, lets several share it. On this machine each worker has one GPU.",
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        le=20,
        description="How often work is tried again after its process died, before it is given up.",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.address is not None and self.kind != "ray":
            raise ValueError(
                f"backend.address must be null unless backend.kind is ray, got {self.address!r}"
            )
        return self


class Task(Section):
    """One thing the trained model shall be good at."""

    name: str = Field(
        min_length=1,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Short name: lower-case letters, digits and underscores.",
    )
    path: str = Field(
        min_length=1,
        description="JSONL or Parquet file of held-out text or questions, none of it in a pool; "
        "for lm_eval a folder.",
    )
    kind: Literal["loss", "choice", "exact", "lm_eval"] = Field(
        default="loss",
        description="What is measured: loss (held-out text, bits per byte), choice (columns "
        "prompt, choices, answer: likelihood of the options), exact (prompt, answer: greedy "
        "generation), lm_eval (a task of the lm-evaluation-harness, in a folder with its YAML file "
        "and data; pretrained models only).",
    )
    weight: float = Field(
        default=1.0,
        ge=0.0,
        description="How much the task counts against the others; 0 only reports it.",
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        default=None,
        description="Which way is better; null minimises loss and maximises every other score.",
    )
    measure: Literal["probability", "accuracy"] = Field(
        default="probability",
        description="For choice: the mean probability of the right option, or the share of "
        "questions whose right option is likeliest. The first moves with every weight of a small "
        "model; the second is what benchmarks report, and noisier.",
    )
    max_questions: int | None = Field(
        default=None,
        ge=1,
        description="Ask at most this many questions, spread evenly over the file; null asks all.",
    )
    max_new_tokens: int = Field(
        default=64, ge=1, le=32_768, description="For exact: most tokens of a generated answer."
    )
    harness_task: str | None = Field(
        default=None,
        min_length=1,
        description="For lm_eval: the task's name in its YAML file.",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "loss" and self.direction == "maximize":
            raise ValueError(
                f"direction of task {self.name!r} must be minimize with kind loss, got maximize: "
                "less loss is better; leave it out"
            )
        if (self.kind == "lm_eval") != (self.harness_task is not None):
            raise ValueError(
                f"harness_task of task {self.name!r} must be given exactly with kind lm_eval, got "
                f"{self.harness_task!r} with kind {self.kind}: name the task in the YAML file, or "
                "leave it out"
            )
        for field, kinds in (
            ("measure", ["choice"]),
            ("max_new_tokens", ["exact"]),
            ("max_questions", ["choice", "exact", "lm_eval"]),
        ):
            if field in self.model_fields_set and self.kind not in kinds:
                raise ValueError(
                    f"{field} of task {self.name!r} must be left out with kind {self.kind}: it "
                    f"belongs to {' or '.join(kinds)}"
                )
        return self


class NoisePanel(Section):
    """Proxy runs repeated with other seeds, which measure the noise floor."""

    mixtures: int = Field(
        default=4,
        ge=2,
        le=64,
        description="Mixtures that are repeated; more gives a steadier noise floor.",
    )
    seeds: int = Field(
        default=3, ge=2, le=20, description="Proxy runs of each repeated mixture, seeds only apart."
    )


class States(Section):
    """How pool states are drawn from the experiment pool; they must reach as far as pools drift."""

    blend_sources: bool = Field(
        default=True,
        description="Whether each domain blends its sources in shares of its own in each state.",
    )
    size_range: tuple[Share, Share] = Field(
        default=(0.1, 1.0),
        description="Least and largest share of a domain's documents a state keeps, log-uniform; "
        "widen it where domains may shrink further.",
    )
    tilt: float = Field(
        default=0.5,
        ge=0.0,
        le=3.0,
        description="Strength of the preference for documents high or low in a metric, in standard "
        "deviations; 0 turns it off.",
    )
    tilt_metric: str = Field(
        default="compress_ratio",
        description="Document metric that the tilt prefers high or low values of.",
    )
    duplication: Share = Field(
        default=0.2,
        description="Share of (state, domain) pairs in which documents are repeated; 0 turns it "
        "off.",
    )
    noise: Share = Field(
        default=0.0,
        description="Share of (state, domain) pairs in which noisy copies replace documents; set "
        "it where a pool may get noisy, at the price of scoring each document twice.",
    )

    @model_validator(mode="after")
    def _check(self):
        _ordered("design.states.size_range", self.size_range)
        if self.size_range[0] <= 0:
            raise ValueError(
                f"design.states.size_range[0] must be > 0, got {self.size_range[0]:g}: a domain "
                "without documents has no covariates"
            )
        if self.tilt_metric not in METRICS:
            raise ValueError(
                f"design.states.tilt_metric must be a document metric, got {self.tilt_metric!r}; "
                f"known: {', '.join(METRICS)}"
            )
        return self


class Design(Section):
    """Which (pool state, mixture, seed) get a proxy run."""

    n_runs: int | None = Field(
        default=None,
        ge=8,
        le=100_000,
        description="Proxy runs without the noise panel; null takes the preset's (tests 32, demo "
        "128, study and paper 512, longcot 64). Raising it trains only the new runs.",
    )
    mixtures_per_state: int = Field(
        default=4,
        ge=2,
        le=64,
        description="Mixtures tried on each pool state; 4 spends a quarter of the profiling of 1.",
    )
    strength_range: tuple[float, float] = Field(
        default=(0.4, 3.0),
        description="Least and largest Dirichlet strength of the mixtures: below 1 sparse, above "
        "1 flat. Narrow ranges can't tell the level of the effects.",
    )
    noise_panel: NoisePanel = Field(
        default=NoisePanel(), description="Repeated runs, for the noise floor."
    )
    states: States = Field(default=States(), description="How pool states are drawn.")
    seed: int = Field(default=0, ge=0, description="Seed of states and mixtures; integer.")
    stages: int = Field(
        default=1,
        ge=1,
        le=MOST_STAGES,
        description="Equal parts of each proxy run with a mixture of their own, drawn "
        "independently: whether it matters when a domain is read, and a schedule where it does. "
        "1 keeps one mixture a run; another number trains every run anew.",
    )

    @model_validator(mode="after")
    def _check(self):
        _ordered("design.strength_range", self.strength_range)
        if self.strength_range[0] <= 0:
            raise ValueError(
                f"design.strength_range[0] must be > 0, got {self.strength_range[0]:g}: a "
                "Dirichlet strength is positive"
            )
        if self.n_runs is not None and self.n_runs % self.mixtures_per_state:
            raise ValueError(
                f"design.n_runs must be a multiple of design.mixtures_per_state "
                f"({self.mixtures_per_state}), got {self.n_runs}: the last state would have fewer "
                f"mixtures; use {-(-self.n_runs // self.mixtures_per_state) * self.mixtures_per_state}"  # noqa: E501
            )
        return self


#: Fields of a config that follow from `proxy.pretrained` itself.
NOT_OVERRIDDEN = ("model", "weights_hash")


class ProxySize(Section):
    """A further size of the proxies: what differs from the recipe, and how many states get it."""

    share: float = Field(
        default=0.25,
        gt=0.0,
        lt=1.0,
        description="Part of the design's pool states that are trained at this size, all mixtures "
        "of a state alike; the rest stays at the recipe's own size.",
    )
    hidden: int | None = Field(
        default=None, ge=1, description="Width of the residual stream; null takes the recipe's."
    )
    layers: int | None = Field(
        default=None, ge=1, description="Transformer layers; null takes the recipe's."
    )
    heads: int | None = Field(
        default=None, ge=1, description="Attention heads of a layer; null takes the recipe's."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        description="Peak learning rate; larger models want lower ones; null takes the recipe's.",
    )
    init_std: float | None = Field(
        default=None,
        gt=0.0,
        description="Standard deviation of the first weights; null takes the recipe's.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps of a run; null takes the recipe's."
    )
    bf16: bool | None = Field(
        default=None,
        description="Round the inputs of matrix products to bfloat16; null takes the recipe's.",
    )

    def to_config(self, recipe: ProxyConfig, number: int) -> ProxyConfig:
        """The recipe at this size, which is `proxy.sizes[number]`.

        Raises:
            ConfigError: if a field breaks a rule.
        """
        own = self.model_dump(exclude={"share"}, exclude_none=True)
        try:
            return dataclasses.replace(recipe, **own)
        except ConfigError as error:
            field = str(error).removeprefix("proxy.")
            raise ConfigError(f"proxy.sizes[{number}].{field}") from error


class Proxy(Section):
    """The models that are trained as proxies: small ones from scratch, or a pretrained one."""

    preset: Literal["tests", "demo", "study", "paper", "longcot"] = Field(
        default="demo",
        description="Size of model and experiment: tests (30 steps, plumbing only), demo (1,000 "
        "steps, minutes), study (demo's model, 512 runs, about an hour); paper (512 runs of "
        "100,000 samples) and longcot (64 runs, sequences of 16,384 tokens), which fine-tune "
        "`pretrained` on GPUs.",
    )
    pretrained: str | None = Field(
        default=None,
        min_length=1,
        description="Folder, GGUF file or hub id of a causal language model that is fine-tuned as "
        "the proxy, such as Qwen/Qwen2.5-0.5B; null trains small models from scratch.",
    )
    overrides: dict[str, Any] = Field(
        default={},
        description="Proxy settings that differ from the preset, such as {steps: 3000, hidden: "
        "64}, or with `pretrained` {method: lora, learning_rate: 1.0e-4, samples: 10000}; each "
        "change of what is learned trains all runs anew.",
    )
    models_per_stack: int | None = Field(
        default=None,
        ge=0,
        le=512,
        description="Models that one process trains at once in one set of tensors; null takes 4 "
        "on a CPU and 64 on a GPU, where one takes as long as 64; 0 measures what is fastest.",
    )
    sizes: list[ProxySize] = Field(
        default=[],
        description="Further sizes that part of the pool states is trained at, such as [{hidden: "
        "64, layers: 2, learning_rate: 0.01}]: tells how effects change with the size of the "
        "model, see policy.target_parameters. For models trained from scratch.",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.preset not in PRESET_PROXY and self.pretrained is None:
            raise ValueError(
                f"proxy.pretrained must be set with proxy.preset {self.preset}, got null: name the "
                "model to fine-tune, such as Qwen/Qwen2.5-0.5B"
            )
        known = [each.name for each in dataclasses.fields(ProxyConfig)]
        if self.pretrained is not None:
            names = [each.name for each in dataclasses.fields(PretrainedConfig)]
            known = ["samples", *(name for name in names if name not in NOT_OVERRIDDEN)]
        unknown = [name for name in self.overrides if name not in known]
        if unknown:
            raise ValueError(
                f"proxy.overrides.{unknown[0]} is no proxy setting; known: {', '.join(known)}"
            )
        try:
            self.to_config()
        except TypeError as error:
            raise ValueError(
                f"proxy.overrides must hold numbers where the recipe has them, got "
                f"{self.overrides}: {error}; YAML takes 1e-4 for text, so write 1.0e-4"
            ) from error
        self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        if self.sizes and self.pretrained is not None:
            raise ValueError(
                f"proxy.sizes must be [] with proxy.pretrained, got {len(self.sizes)} sizes and "
                f"{self.pretrained}: a pretrained model has the size it has; take one of them out"
            )
        if self.sizes and sum(size.share for size in self.sizes) >= 1:
            raise ValueError(
                "proxy.sizes: shares must sum to less than 1, so that states are left for the "
                f"recipe's own size, got {sum(size.share for size in self.sizes):g}: lower them"
            )
        counts = [config.n_parameters for config in self.size_configs()]
        for i, count in enumerate(counts):
            if i and min(abs(math.log2(count / other)) for other in counts[:i]) <= SAME_SIZE:
                raise ValueError(
                    f"proxy.sizes[{i - 1}] must have another number of parameters than the recipe "
                    f"and the sizes before it, got {count:,} among {', '.join(map(str, counts))}: "
                    "change hidden or layers"
                )

    def size_configs(self) -> list[ProxyConfig]:
        """The recipe at each size that is trained, its own first; none with `pretrained`."""
        recipe = self.to_config()
        if not isinstance(recipe, ProxyConfig):
            return []
        return [recipe, *(size.to_config(recipe, i) for i, size in enumerate(self.sizes))]

    @property
    def pool_vocab_size(self) -> int:
        """Tokens of the experiment pool's own tokenizer, which documents are measured by."""
        config = self.to_config()
        return config.vocab_size if isinstance(config, ProxyConfig) else ProxyConfig().vocab_size

    def to_config(self) -> ProxyConfig | PretrainedConfig:
        """The proxy model of the preset, with the overrides.

        With `pretrained` it's what is known before the model and the pool are read: without the
        model's hash, its tokens those of samples of one sequence each.
        """
        if self.pretrained is None:
            return ProxyConfig(**PRESET_PROXY[self.preset] | self.overrides)
        length = {"sequence_length": PretrainedConfig.sequence_length, **self._recipe}
        return self.to_pretrained(
            self.pretrained, weights_hash="", mean_tokens=length["sequence_length"]
        )

    @property
    def _recipe(self) -> dict[str, Any]:
        return PRESET_PRETRAINED[self.preset] | self.overrides

    def to_pretrained(
        self, model: str, *, weights_hash: str, mean_tokens: float
    ) -> PretrainedConfig:
        """The recipe of the preset, with the overrides, for a model and a pool.

        Args:
            model: where the model is: `pretrained`, its path made absolute.
            weights_hash: of the model.
            mean_tokens: tokens of a document of the experiment pool, which turn `samples` into
                tokens.
        """
        recipe = dict(self._recipe)
        samples = recipe.pop("samples")
        if not (isinstance(samples, int) and samples >= 1):
            raise ConfigError(f"proxy.overrides.samples must be >= 1, got {samples!r}.")
        tokens = recipe.pop("tokens", None) or max(
            math.ceil(samples * mean_tokens),
            recipe.get("sequence_length", PretrainedConfig.sequence_length),
        )
        return PretrainedConfig(model=model, weights_hash=weights_hash, tokens=tokens, **recipe)


class ImportedRuns(Section):
    """Runs made elsewhere, in tables: another team's, or those of a larger proxy."""

    source: str = Field(
        min_length=1,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Short name of where they are from: lower-case letters, digits, underscores.",
    )
    ratios: str = Field(
        min_length=1,
        description="CSV or Parquet file with a row per run: run, and a share for each domain, "
        "matched by name.",
    )
    metrics: str = Field(
        min_length=1,
        description="CSV or Parquet file with a row per run: run, and the value of each task in "
        "the task's own unit and direction (bits per byte for loss).",
    )
    covariates: str = Field(
        min_length=1,
        description="CSV or Parquet file with a row per run: run, and <domain>__<covariate> for "
        "each domain and each of `covariates`, as measured of the pool it was trained on.",
    )
    randomised: bool = Field(
        default=False,
        description="Whether the mixtures were drawn at random, whatever the pool; else the runs "
        "count as observational, and a check says so.",
    )
    metric_names: dict[str, str] = Field(
        default={},
        description="Column of the metrics for each task whose column isn't named like the task.",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.source == OWN:
            raise ValueError(
                f"imported_runs: source must be another name than {OWN}, which are the project's "
                "own runs: rename it"
            )
        return self


class Budget(Section):
    """What training may cost; beyond, it's refused until a person agrees."""

    max_hours: float | None = Field(
        default=None,
        gt=0.0,
        description="Most hours that the proxy runs to train may take on this hardware, by the "
        "estimate of `causalmix plan`; null sets no limit.",
    )
    max_gpu_hours: float | None = Field(
        default=None, gt=0.0, description="Most GPU hours that they may take; null sets no limit."
    )
    max_cost: float | None = Field(
        default=None,
        gt=0.0,
        description="Most money that they may cost, in `currency`; needs a price; null sets no "
        "limit.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None, ge=0.0, description="Price of one GPU for an hour; null counts none."
    )
    price_per_core_hour: float | None = Field(
        default=None, ge=0.0, description="Price of one core for an hour; null counts none."
    )
    currency: str = Field(
        default="USD", min_length=1, max_length=8, description="Unit of the prices, in words."
    )

    @model_validator(mode="after")
    def _check(self):
        prices = (self.price_per_gpu_hour, self.price_per_core_hour)
        if self.max_cost is not None and prices == (None, None):
            raise ValueError(
                f"budget.max_cost must come with budget.price_per_gpu_hour or "
                f"budget.price_per_core_hour, got {self.max_cost:g} and no price: set one"
            )
        return self


class Policy(Section):
    """How effects become a mixture, and what the mixture must keep to."""

    name: Literal["optimum", "search", "analytical"] = Field(
        default="optimum",
        description="optimum maximises the lower bound of the gain; search averages the best of "
        "100,000 random mixtures; analytical takes shares in proportion to positive effects, and "
        "needs estimators: [causal_forest_log].",
    )
    reference: Literal["natural", "equal", "fixed"] = Field(
        default="natural",
        description="Mixture that gains are measured from and that is kept where the evidence "
        "doesn't reach: natural (token shares of the live pool), equal, or fixed.",
    )
    fixed_mixture: dict[str, Share] | None = Field(
        default=None,
        description="Share of each domain, sum 1; with reference: fixed only.",
    )
    confidence_z: float = Field(
        default=1.0,
        ge=0.0,
        le=5.0,
        description="Standard errors taken off the gain before it is maximised; higher is more "
        "careful.",
    )
    trust_radius: float | None = Field(
        default=0.5,
        gt=0.0,
        description="Largest KL divergence of the mixture from the reference, in nats; null lifts "
        "the limit.",
    )
    least_share: Share = Field(default=0.0, description="Least share of every domain.")
    most_share: Share = Field(default=1.0, description="Most share of every domain.")
    max_epochs: float = Field(
        default=4.0,
        gt=0.0,
        description="Most times a domain's documents are repeated within the budget.",
    )
    budget_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of the planned training run; null takes the tokens of the live pool.",
    )
    guard_rails: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] = Field(
        default={},
        description="By task, the most that may be lost over the reference, in the task's own "
        "units; it holds for the gain less confidence_z standard errors, also with weight 0.",
    )
    target_parameters: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Number of parameters of the model that the mixture is for, such as 1.0e+9; "
        "needs proxy.sizes. Beyond the sizes trained the verdict is extrapolating, and intervals "
        "grow with the distance; null asks at the largest of them, the last size that is measured.",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.least_share > self.most_share:
            raise ValueError(
                f"policy.least_share must be <= policy.most_share ({self.most_share:g}), got "
                f"{self.least_share:g}: no mixture would fit"
            )
        if (self.reference == "fixed") != (self.fixed_mixture is not None):
            raise ValueError(
                "policy.fixed_mixture must be given exactly when policy.reference is fixed, got "
                f"reference {self.reference} and fixed_mixture {self.fixed_mixture}: set both or "
                "neither"
            )
        if self.fixed_mixture is not None and abs(sum(self.fixed_mixture.values()) - 1) > 1e-6:
            raise ValueError(
                "policy.fixed_mixture must sum to 1, got "
                f"{sum(self.fixed_mixture.values()):.6g}: divide each share by the sum"
            )
        return self


class Compare(Section):
    """What `causalmix compare` trains: the recommended mixture's rivals, on new pool states."""

    states: int = Field(
        default=16,
        ge=2,
        le=1000,
        description="New pool states, drawn from the experiment pool like the design's; more gives "
        "smaller standard errors.",
    )
    seeds: int = Field(
        default=3, ge=1, le=20, description="Runs of each rival on each state, seeds only apart."
    )
    larger: dict[str, Any] = Field(
        default={},
        description="What differs in the second, larger size, such as {hidden: 128, layers: 2, "
        "heads: 4, learning_rate: 0.002, init_std: 0.04}; empty takes the largest of proxy.sizes, "
        "else twice the width and a layer more. With proxy.pretrained there is one size.",
    )
    controllers: dict[str, dict[str, Any]] = Field(
        default={name: {} for name in CONTROLLERS},
        description="Rivals that set the mixture while a run trains, each with settings that stay "
        "as they are; the others are searched. One that isn't named is left out.",
    )
    tuning_runs: int | None = Field(
        default=None,
        ge=0,
        description="Runs' worth of training that the search over settings of each controller may "
        "cost, on pool states of its own; null takes the runs of the design, so that no rival is "
        "tuned less than the recommendation; 0 keeps the papers' settings.",
    )

    @model_validator(mode="after")
    def _check(self):
        for name, given in self.controllers.items():
            make_controller(name, given)
        known = [name for name in ProxySize.model_fields if name != "share"]
        unknown = [name for name in self.larger if name not in known]
        if unknown:
            raise ValueError(
                f"compare.larger.{unknown[0]} is no setting of a size; known: {', '.join(known)}"
            )
        defaults = {each.name: each.default for each in dataclasses.fields(ProxyConfig)}
        check_values("compare.larger", self.larger, defaults)
        return self


class Export(Section):
    """What is written for the trainer when a mixture is recommended."""

    formats: list[FormatName] = Field(
        default=["json"],
        description="Formats written into data/export, each but json in a folder of its name: "
        "json (mixture.json and manifest.parquet, always written), datasets, llama_factory, trl, "
        "megatron, olmo_core, torchtitan, mosaic_streaming, axolotl (copies the documents, since "
        "it has no weights), olmix. `causalmix export` writes one by hand.",
    )
    tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of the training run that is exported; null takes the budget of the "
        "recommendation (policy.budget_tokens).",
    )


class Quality(Section):
    """When documents are too bad to go on."""

    max_rejected_share: Share = Field(
        default=0.1,
        description="Largest share of rows of a pool that may be rejected (broken line, no text) "
        "before the run stops.",
    )
    max_document_bytes: int = Field(
        default=4 * 2**20,
        ge=1_000,
        le=64 * 2**20,
        description="Largest document, in UTF-8 bytes; a longer one is rejected.",
    )
    max_decompression_ratio: float = Field(
        default=200.0,
        gt=1.0,
        description="Most bytes that a byte of a compressed file may become; beyond, the file is "
        "rejected as a bomb.",
    )
    exclude_overlap: bool = Field(
        default=False,
        description="Whether documents that share 13 words in a row with a task's file are left "
        "out of both pools, and listed as rejected; otherwise they stop the experiment.",
    )


class Automation(Section):
    """How the daemon watches the live pool."""

    sensor_interval_seconds: int = Field(
        default=30,
        ge=30,
        le=86_400,
        description="Seconds between two looks at the live pool; below 30 the daemon does little "
        "else.",
    )
    quiet_seconds: int = Field(
        default=60,
        ge=0,
        le=86_400,
        description="Seconds without a change in the live pool before it is read, so that a copy "
        "in progress isn't.",
    )
    refresh_hour: int = Field(
        default=5, ge=0, le=23, description="Hour of the day (UTC) of the daily refresh."
    )
    fresh_days: int | None = Field(
        default=8,
        ge=1,
        le=3650,
        description="Days after which the UI warns that recommended_mixture or report is old; a "
        "pool that rests gets no new recommendation, so raise it, or set null, where that is fine.",
    )
    overdue_days: int = Field(
        default=90,
        ge=2,
        le=3650,
        description="Days after which the UI shows them as overdue instead; unused where "
        "fresh_days is null.",
    )
    owners: tuple[str, ...] = Field(
        default=(),
        description="Who looks after the assets, shown in the UI: email addresses, or team:<name>.",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.fresh_days is not None and self.overdue_days <= self.fresh_days:
            raise ValueError(
                f"automation.overdue_days must be > automation.fresh_days ({self.fresh_days}), got "
                f"{self.overdue_days}: raise it, or lower automation.fresh_days"
            )
        for i, owner in enumerate(self.owners):
            if not _OWNER.fullmatch(owner):
                raise ValueError(
                    f"automation.owners[{i}] must be an email address or team:<name>, got "
                    f"{owner!r}: write it like ann@example.com or team:data"
                )
        return self


class Alerts(Section):
    """Who is told of failed runs and checks and of a worse verdict, besides data/alerts.jsonl."""

    webhook_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds the webhook's http(s) URL; each "
        "alert is posted there as JSON; null posts none. The URL itself may be a secret, so it "
        "never stands here.",
    )
    command: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Program and arguments that get each alert as JSON on standard input, started "
        "without a shell in the folder of this file; null starts none.",
    )
    command_timeout_seconds: int = Field(
        default=10,
        ge=1,
        le=15,
        description="Seconds before the command is killed and counts as failed.",
    )
    attempts: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Looks at which an alert that couldn't be handed over is tried again, before "
        "it is given up.",
    )
    interval_seconds: int = Field(
        default=30,
        ge=30,
        le=86_400,
        description="Seconds between two looks at failed runs, failed checks and the verdict.",
    )

    @model_validator(mode="after")
    def _check(self):
        name = self.webhook_env
        if name is not None and not _VARIABLE.fullmatch(name):  # a URL put here may be a secret
            raise ValueError(
                "alerts.webhook_env must be the name of an environment variable (letters, digits, "
                f"underscores), got {len(name)} characters that aren't one: put the URL into a "
                "variable, and that variable's name here"
            )
        for i, part in enumerate(self.command or ()):
            if "\0" in part or (i == 0 and not part.strip()):
                raise ValueError(
                    f"alerts.command[{i}] must be text that a program can be given, got {part!r}: "
                    "write a list, such as [/usr/bin/logger, -t, causalmix]"
                )
        return self

    @property
    def is_on(self) -> bool:
        """Whether alerts are handed to anyone."""
        return self.webhook_env is not None or self.command is not None

    def webhook_url(self) -> str | None:
        """The webhook's URL as the environment has it now; None if it has none. Never log it."""
        return os.environ.get(self.webhook_env) or None if self.webhook_env else None


class Instance(Section):
    """Where Dagster keeps runs, events and schedules."""

    storage: Literal["sqlite", "postgres"] = Field(
        default="sqlite",
        description="Where Dagster keeps runs, events and schedules: sqlite, in files below "
        "data_dir, or postgres, on a server, once several people or code locations work at a time.",
    )
    postgres_env: str = Field(
        default="CAUSALMIX_POSTGRES_URL",
        description="Name of the environment variable that holds "
        "postgresql+psycopg2://user:password@host:port/database, a database of this project "
        "alone; read where storage is postgres. The URL is a secret, so it never stands here.",
    )

    @model_validator(mode="after")
    def _check(self):
        if not _VARIABLE.fullmatch(self.postgres_env):
            # Not quoted: it may well be the URL, with its password.
            raise ValueError(
                "instance.postgres_env must be the name of an environment variable (letters, "
                f"digits, _), got {len(self.postgres_env)} other characters: put the URL into a "
                "variable and write its name here"
            )
        return self


class Settings(Section):
    """The whole of `causalmix.yaml`."""

    data_dir: str = Field(
        default="data",
        min_length=1,
        description="Folder for everything that runs make: run store, asset storage, Dagster's "
        "home, reports.",
    )
    storage: str | None = Field(
        default=None,
        description="URL (s3://bucket/prefix) or folder for the run store and the values of "
        "assets, where several machines share them; null keeps them in data_dir.",
    )
    pools: Pools = Field(default=Pools(), description="Where the documents are.")
    columns: Columns = Field(default=Columns(), description="Which column holds what.")
    profile: Profile = Field(
        default=Profile(), description="What is measured of documents by models."
    )
    domains: list[str] | None = Field(
        default=None,
        description="Domains to mix, in the order of every table; null takes all that the "
        "experiment pool has, by name.",
    )
    tasks: list[Task] = Field(
        default=[],
        description="What the model shall be good at: name, held-out text and weight of each; at "
        "least one with weight > 0 before anything runs.",
    )
    covariates: list[str] = Field(
        default=DEFAULT_COVARIATES,
        min_length=1,
        description="What of each domain describes a pool state; add one where pools differ in "
        "ways these don't see.",
    )
    design: Design = Field(default=Design(), description="Which proxy runs are made.")
    proxy: Proxy = Field(default=Proxy(), description="How proxy runs are trained.")
    backend: Backend = Field(default=Backend(), description="Where scoring and training run.")
    budget: Budget = Field(default=Budget(), description="What training may cost.")
    estimators: list[EstimatorName] = Field(
        default=["response_surface", "structured_ridge", "causal_forest", "regmix"],
        min_length=1,
        description="Effect estimators that cross-validation chooses from, per task; each one "
        "costs seconds to a minute.",
    )
    imported_runs: list[ImportedRuns] = Field(
        default=[],
        description="Tables of runs made elsewhere, fitted together with the project's own; each "
        "source is put on the level of the own runs first.",
    )
    policy: Policy = Field(default=Policy(), description="How effects become a mixture.")
    compare: Compare = Field(default=Compare(), description="What the recommendation is held to.")
    export: Export = Field(default=Export(), description="What is written for the trainer.")
    quality: Quality = Field(default=Quality(), description="When documents are too bad.")
    automation: Automation = Field(default=Automation(), description="How the daemon watches.")
    alerts: Alerts = Field(default=Alerts(), description="Who is told when something fails.")
    project: str | None = Field(
        default=None,
        description="Name in front of each asset's key, where several projects share one Dagster "
        "instance: lower-case letters, digits and _; null puts none. Another name starts another "
        "history: assets count as never made.",
    )
    instance: Instance = Field(default=Instance(), description="Where Dagster keeps its runs.")
    seed: int = Field(default=0, ge=0, description="Seed of fits, searches and splits; integer.")

    _root: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _check(self):
        if self.project is not None and not _PROJECT_NAME.fullmatch(self.project):
            raise ValueError(
                "project must be lower-case letters, digits and _, a letter first, 60 at most, got "
                f"{self.project!r}: rename it, or set null where no other project shares the "
                "instance"
            )
        names = [task.name for task in self.tasks]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f"tasks[{i}].name must be used once, got {name!r} again: rename one of them"
                )
        if self.tasks and not any(task.weight > 0 for task in self.tasks):
            raise ValueError(
                "tasks must hold at least one weight > 0, got only 0: nothing would be wanted"
            )
        sources = [table.source for table in self.imported_runs]
        tasks = {task.name for task in self.tasks}
        for i, table in enumerate(self.imported_runs):
            if table.source in sources[:i]:
                raise ValueError(
                    f"imported_runs[{i}].source must be used once, got {table.source!r} again: "
                    "rename one of them"
                )
            odd = sorted(set(table.metric_names) - tasks)
            if odd:
                raise ValueError(
                    f"imported_runs[{i}].metric_names must give columns of tasks "
                    f"({', '.join(sorted(tasks))}), got {odd[0]!r}: write <task>: <column>"
                )
        unguarded = [name for name in self.policy.guard_rails if name not in names]
        if unguarded:
            raise ValueError(
                f"policy.guard_rails must name tasks ({', '.join(names) or 'none is set'}), got "
                f"{unguarded[0]!r}: correct the name"
            )
        unknown = check_covariate_names(self.covariates, self.columns.numbers)
        if unknown is not None:
            known = (*METRICS, *MODEL_METRICS, *DOMAIN_COVARIATES, *self.columns.numbers)
            raise ValueError(
                f"covariates must be known names, got {unknown!r}; known: {', '.join(known)}, a "
                "metric's quantiles (mtld_p10, _p50, _p90) and language_share_<ISO code>"
            )
        self._check_measured()
        self._check_sizes()
        self._check_larger()
        if self.domains is not None and len(set(self.domains)) < max(2, len(self.domains)):
            raise ValueError(
                f"domains must be two different names or more, got {self.domains}: with one "
                "domain there is nothing to mix; null takes all that are found"
            )
        same = pools_equal(self.pools)
        if same is not None:
            raise ValueError(
                f"{same} must differ from pools.experiment, got {self.pools.experiment!r} for "
                "both: copy the pool, so that a change of the one leaves the experiment as it is"
            )
        return self

    def _check_measured(self) -> None:
        """Each covariate must be measured with these settings."""
        for names, field, value in (
            (MODEL_METRICS[:4], "profile.lm", self.profile.lm),
            (MODEL_METRICS[4:], "profile.rater", self.profile.rater),
        ):
            asked = [name for name in self.covariates if base_of(name) in names]
            if asked and value is None:
                raise ValueError(
                    f"covariates must be measured, got {asked[0]!r}, which needs {field}: set it, "
                    "or take the covariate off the list"
                )

    def _check_larger(self) -> None:
        """The larger size of a comparison must be one, of models trained from scratch."""
        larger, config = self.compare.larger, self.proxy.to_config()
        if not larger:
            return
        if not isinstance(config, ProxyConfig):
            raise ValueError(
                f"compare.larger must be empty with proxy.pretrained, got {larger}: rivals of a "
                "pretrained model are trained as that model; leave it out"
            )
        try:
            size = dataclasses.replace(config, **larger)
        except ConfigError as error:
            raise ConfigError(str(error).replace("proxy.", "compare.larger.", 1)) from error
        costs = [each.flops / each.tokens for each in (config, size)]
        if costs[1] < costs[0]:
            field = "hidden" if "hidden" in larger else "layers"
            raise ValueError(
                f"compare.larger.{field} must make a model that costs at least the recipe's "
                f"{costs[0]:,.0f} FLOPs a token, got {larger}, which costs {costs[1]:,.0f}: make "
                "it larger"
            )

    def _check_sizes(self) -> None:
        """Each size must get pool states enough, and a target size needs sizes to go by."""
        sizes = self.proxy.sizes
        if not sizes and self.policy.target_parameters is not None:
            raise ValueError(
                "policy.target_parameters must be null without proxy.sizes, got "
                f"{self.policy.target_parameters:g}: runs of one size don't tell what size does; "
                "add one, such as {hidden: 64, layers: 2}"
            )
        shares = [size.share for size in sizes]
        n_states = -(-self.n_runs // self.design.mixtures_per_state)
        for k, share in enumerate([1 - sum(shares), *shares]):
            n_own = int((sizes_of_states(n_states, shares, seed=self.design.seed) == k).sum())
            if sizes and n_own < FEWEST_STATES:
                raise ValueError(
                    f"proxy.sizes must leave each size at least {FEWEST_STATES} pool states, got "
                    f"{n_own} of {n_states} for {f'sizes[{k - 1}]' if k else 'the recipe itself'} "
                    f"with share {share:g}: change share, or raise design.n_runs"
                )

    @property
    def run_covariates(self) -> list[str]:
        """`covariates`, and the size of the model where runs have several."""
        return [*self.covariates, SIZE_COVARIATE] if self.proxy.sizes else self.covariates

    @property
    def target_size(self) -> float:
        """Size of the model that the mixture is for, in log2 parameters; proxies have several."""
        trained = max(config.n_parameters for config in self.proxy.size_configs())
        return log2_parameters(self.policy.target_parameters or trained)

    @property
    def root(self) -> Path:
        """The folder that paths are relative to: that of the settings file."""
        return self._root

    def resolve(self, path: str) -> Path:
        """The path as an absolute one, relative to the folder of the settings file."""
        return (self._root / Path(path).expanduser()).resolve()

    @property
    def data_path(self) -> Path:
        """`data_dir` as an absolute path."""
        return self.resolve(self.data_dir)

    def locate(self, location: str) -> str | Path:
        """A pool's location: a URL as it is, a path as an absolute one."""
        return location if "://" in location else self.resolve(location)

    @property
    def experiment_path(self) -> str | Path:
        """`pools.experiment`: a URL, or an absolute path."""
        return self.locate(self.pools.experiment)

    @property
    def live_pools(self) -> dict[str | None, str | Path]:
        """Location of each live pool by its name, a URL or an absolute path; None names the one."""
        live = self.pools.live
        named = {None: live} if isinstance(live, str) else live
        return {name: self.locate(location) for name, location in named.items()}

    def live_location(self, pool: str | None) -> str | Path:
        """Where a live pool is; None stands for the one that has no name.

        Raises:
            ConfigError: if there is no such pool.
        """
        found = self.live_pools
        if pool in found:
            return found[pool]
        known = ", ".join(name for name in found if name is not None)
        raise ConfigError(
            f"the live pool must be one of pools.live ({known or 'which names none'}), got "
            f"{pool or 'no name'}: {'name one' if known else 'leave the name out'}, or add it to "
            "pools.live."
        )

    @property
    def live_path(self) -> str | Path:
        """Where the live pool is, if it's the only one, without a name.

        Raises:
            ConfigError: if there are several.
        """
        return self.live_location(None)

    @property
    def run_store_root(self) -> str | Path:
        """Where the run store is: below `storage`, else below `data_dir`."""
        root = self.locate(self.storage or self.data_dir)
        return root / "run_store" if isinstance(root, Path) else f"{root.rstrip('/')}/run_store"

    @property
    def assets_root(self) -> str:
        """Where the values of assets are: below `storage`, else below `data_dir`."""
        root = self.locate(self.storage or self.data_dir)
        return f"{str(root).rstrip('/')}/assets"

    @property
    def task_paths(self) -> dict[str, Path]:
        """Held-out text of each task, by its name, as absolute paths."""
        return {task.name: self.resolve(task.path) for task in self.tasks}

    @property
    def task_directions(self) -> dict[str, Literal["minimize", "maximize"]]:
        """Which way each task's score is better, by its name."""
        return {
            task.name: task.direction or ("minimize" if task.kind == "loss" else "maximize")
            for task in self.tasks
        }

    @property
    def task_weights(self) -> dict[str, float]:
        """Weight of each task, by its name, as written; not normalised."""
        return {task.name: task.weight for task in self.tasks}

    @property
    def n_runs(self) -> int:
        """Proxy runs without the noise panel: `design.n_runs`, or the preset's."""
        return self.design.n_runs or PRESET_RUNS[self.proxy.preset]

    def fingerprint(self, *names: str) -> str:
        """8 hex digits that change when one of the named sections or fields does."""
        chosen = self.model_dump(mode="json", include=set(names))
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]


def pools_equal(pools: Pools) -> str | None:
    """The field of a live pool that is the experiment's folder as written, or None."""
    named = pools.live if isinstance(pools.live, dict) else {None: pools.live}
    for name, location in named.items():
        if Path(pools.experiment) == Path(location):
            return "pools.live" if name is None else f"pools.live.{name}"
    return None
