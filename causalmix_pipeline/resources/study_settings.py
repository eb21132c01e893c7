"""Sections of `causalmix.yaml` that say what a study is: pools, tasks, design, proxies, costs."""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from causalmix_pipeline.adapters.pool_door import ColumnMap
from causalmix_pipeline.core.covariates import (
    DOCUMENT_COLUMNS,
    DOMAIN_COVARIATES,
    METRICS,
    MODEL_METRICS,
    TASK_LIKE_PREFIX,
)
from causalmix_pipeline.core.design import MOST_STAGES
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.runs import OWN
from causalmix_pipeline.core.scale import SAME_SIZE

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

Share = Annotated[float, Field(ge=0.0, le=1.0)]

#: A live pool's name: it becomes a partition, a folder and a file's name.
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")


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
            if name in taken or name.startswith(TASK_LIKE_PREFIX):
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
