"""Sections of `causalmix.yaml` that say what becomes of a study: policy, export, automation."""

import dataclasses
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from causalmix_pipeline.core.controller_tuning import CONTROLLERS, check_values, make_controller
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.resources.study_settings import ProxySize, Section, Share

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

#: An owner that Dagster takes: its own rule for addresses, and a team with a name.
_OWNER = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,7}"
    r"|team:\w[\w .-]{0,98}"
)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


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
