"""What `causalmix.yaml` may say: every section, field, default and rule.

The sections are in `study_settings.py` and `serving_settings.py`; what holds between them is here.
Reading the file and writing a commented one is in `settings_file.py`. Paths are kept as the user
wrote them and resolved against the folder of the file, so a project can be moved.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from causalmix_pipeline.core.covariates import (
    DOMAIN_COVARIATES,
    METRICS,
    MODEL_METRICS,
    base_of,
    check_covariate_names,
    tasks_asked,
)
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.scale import (
    FEWEST_STATES,
    SIZE_COVARIATE,
    log2_parameters,
    sizes_of_states,
)
from causalmix_pipeline.resources.serving_settings import (
    Alerts,
    Automation,
    Compare,
    Export,
    Instance,
    Policy,
    Quality,
)
from causalmix_pipeline.resources.study_settings import (
    DEFAULT_COVARIATES,
    PRESET_RUNS,
    Backend,
    Budget,
    Columns,
    Design,
    EstimatorName,
    ImportedRuns,
    Pools,
    Profile,
    Proxy,
    Section,
    Task,
)

#: A project's name: it becomes a part of keys, and a folder.
_PROJECT_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


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
                "metric's quantiles (mtld_p10, _p50, _p90), language_share_<ISO code> and "
                "log2_task_like_<task>"
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
        held_out = [task.name for task in self.tasks if task.kind == "loss"]
        for task in tasks_asked(self.covariates):
            if task not in held_out:
                raise ValueError(
                    f"covariates: log2_task_like_{task} must name a task with held-out text, kind "
                    f"loss ({', '.join(held_out) or 'none is set'}): correct the name, or take it "
                    "off the list"
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
