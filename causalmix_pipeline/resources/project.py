"""The project resource: the settings file, and what is built from it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from causalmix_pipeline.adapters.experiment import PoolTokenizer
from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.pool_door import DoorRules
from causalmix_pipeline.adapters.pool_reader import ColumnMap
from causalmix_pipeline.adapters.profiler import PoolSpec, ScorerPlan
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.score_store import ScoreStore
from causalmix_pipeline.adapters.scorers import model_free_plans, model_plans
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pool_state import StateRanges
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.resources.asset_keys import PROJECT_TAG
from causalmix_pipeline.resources.instance import PROCESS_TAG, process_tag
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings


class Project(dg.ConfigurableResource):
    """Reads the settings file at each run, and builds from it what assets work with."""

    config_file: str = Field(
        description="Path of the settings file; change it to work on another project."
    )
    project_name: str | None = Field(
        default=None, description="`project` of the settings, which becomes a tag of each run."
    )

    _settings: Settings | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Write down whose the run is, and its process, so that a killed one is noticed."""
        if context.run and context.instance:
            own = {PROJECT_TAG: self.project_name} if self.project_name else {}
            context.instance.add_run_tags(context.run.run_id, {PROCESS_TAG: process_tag(), **own})

    @property
    def settings(self) -> Settings:
        """The settings, read once a run; a missing file means the defaults."""
        if self._settings is None:
            self._settings = load_settings(self.config_file, missing_ok=True)
        return self._settings

    @property
    def columns(self) -> ColumnMap:
        """Which column of a pool's files holds what."""
        return column_map(self.settings)

    @property
    def design_plan(self) -> DesignPlan:
        """How many proxy runs to make and how they spread."""
        design = self.settings.design
        return DesignPlan(
            n_runs=self.settings.n_runs,
            mixtures_per_state=design.mixtures_per_state,
            strength_range=design.strength_range,
            panel_mixtures=design.noise_panel.mixtures,
            panel_seeds=design.noise_panel.seeds,
            seed=design.seed,
            stages=design.stages,
        )

    @property
    def state_ranges(self) -> StateRanges:
        """How far the drawn pool states reach."""
        states = self.settings.design.states
        return StateRanges(
            blend_sources=states.blend_sources,
            size_range=states.size_range,
            tilt_metric=states.tilt_metric,
            tilt_sd=states.tilt,
            repetition=states.duplication,
            noise=states.noise,
        )

    @property
    def run_store(self) -> RunStore:
        """Finished proxy runs and what workers read."""
        return RunStore(self.settings.run_store_root)

    @property
    def workers(self) -> LocalWorkers | RayWorkers:
        """Processes that score documents and train proxies."""
        backend = self.settings.backend
        if backend.kind == "ray":
            return RayWorkers(backend.address, max_retries=backend.max_retries)
        return LocalWorkers(backend.workers, max_retries=backend.max_retries)

    @property
    def device(self) -> str:
        """The kind of device that proxies are trained on: cpu or cuda.

        Raises:
            ConfigError: if the settings ask for a GPU and this machine, which trains, has none.
        """
        backend = self.settings.backend
        if backend.device == "auto":
            from_scratch = isinstance(self.settings.proxy.to_config(), ProxyConfig)
            if backend.address is not None and not from_scratch:
                raise ConfigError(
                    "backend.device must be cpu or cuda with a cluster's backend.address and "
                    "proxy.pretrained, got auto: this machine can't tell what the cluster has."
                )
            return "cpu" if from_scratch or not visible_gpus() else "cuda"
        if backend.device == "cuda" and backend.kind == "local" and not visible_gpus():
            raise ConfigError(
                "backend.device must be cpu or auto on a machine without a CUDA device, got cuda. "
                "Train on a machine that has one, or set backend.device: cpu."
            )
        return backend.device

    @property
    def backend(self) -> LocalBackend:
        """Where proxy runs are trained."""
        device, workers = self.device, self.workers
        if device == "cuda":
            gpus_per_run = self.settings.backend.gpus_per_run
            workers = (
                replace(workers, n_gpus_per_task=gpus_per_run)
                if isinstance(workers, RayWorkers)
                else replace(workers, gpus=visible_gpus())
            )
        return LocalBackend(
            self.run_store,
            models_per_stack=self.settings.proxy.models_per_stack,
            device=device,
            workers=workers,
        )

    def pool_spec(
        self,
        location: str | Path,
        domains: Sequence[str] | None,
        *,
        noise_seed: int | None = None,
    ) -> PoolSpec:
        """How a pool's files are read; `domains` None keeps all."""
        return PoolSpec(
            location,
            self.columns,
            door_rules(self.settings),
            domains=None if domains is None else tuple(domains),
            max_rejected_share=self.settings.quality.max_rejected_share,
            noise_seed=noise_seed,
        )

    @property
    def score_store(self) -> ScoreStore:
        """Scores of documents by content, and of which scorer."""
        return ScoreStore(self.settings.data_path / "scores")

    def scorer_plans(self, tokenizer: PoolTokenizer) -> list[ScorerPlan]:
        """What is measured of every document, and of a sample by models."""
        profile, root = self.settings.profile, self.settings.resolve
        return [
            *model_free_plans(
                tokenizer.scorer(self.folder("tokenizers")),
                vocd_budget_tokens=profile.vocd_budget_tokens,
            ),
            *model_plans(
                lm=None if profile.lm is None else root(profile.lm),
                lm_budget_tokens=profile.lm_budget_tokens,
                rater=None if profile.rater is None else root(profile.rater),
                rater_budget_tokens=profile.rater_budget_tokens,
                device=profile.device,
            ),
        ]

    def folder(self, *parts: str) -> Path:
        """A folder or file below `data_dir`, by parts that the code names."""
        return self.settings.data_path.joinpath(*parts)


def column_map(settings: Settings) -> ColumnMap:
    """Which column of a pool's files holds what."""
    return ColumnMap(**settings.columns.model_dump())


def door_rules(settings: Settings) -> DoorRules:
    """What of a pool's files is refused."""
    return DoorRules(
        max_document_bytes=settings.quality.max_document_bytes,
        max_decompression_ratio=settings.quality.max_decompression_ratio,
    )


def default_resources(config_file: Path) -> dict[str, Any]:
    """The resources of the definitions, for a settings file."""
    from causalmix_pipeline.resources.frame_store import FrameStore

    settings = load_settings(config_file, missing_ok=True)
    return {
        "project": Project(config_file=str(config_file.resolve()), project_name=settings.project),
        "io_manager": FrameStore(base_dir=settings.assets_root),
    }


def visible_gpus() -> tuple[str, ...]:
    """Names of the CUDA devices that this process may use; none without a CUDA build of torch."""
    from importlib.metadata import version

    if version("torch").endswith("+cpu"):  # known without loading it
        return ()
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    n_gpus = torch.cuda.device_count()
    names = (
        [name.strip() for name in named.split(",")] if named.strip() else map(str, range(n_gpus))
    )
    return tuple(names)[:n_gpus]
