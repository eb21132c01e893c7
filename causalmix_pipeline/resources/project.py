"""The project resource: the settings file, and what is built from it."""

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from causalmix_pipeline.adapters.local_backend import LocalBackend
from causalmix_pipeline.adapters.pool_reader import ColumnMap
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.pool_state import StateRanges
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings


class Project(dg.ConfigurableResource):
    """Reads the settings file at each run, and builds from it what assets work with."""

    config_file: str = Field(
        description="Path of the settings file; change it to work on another project."
    )

    _settings: Settings | None = PrivateAttr(default=None)

    @property
    def settings(self) -> Settings:
        """The settings, read once a run; a missing file means the defaults."""
        if self._settings is None:
            self._settings = load_settings(self.config_file, missing_ok=True)
        return self._settings

    @property
    def columns(self) -> ColumnMap:
        """Which column of a pool's files holds what."""
        return ColumnMap(**self.settings.columns.model_dump())

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
        return RunStore(self.settings.data_path / "run_store")

    @property
    def backend(self) -> LocalBackend:
        """Where proxy runs are trained."""
        proxy = self.settings.proxy
        return LocalBackend(
            self.run_store, n_workers=proxy.workers, models_per_stack=proxy.models_per_stack
        )

    def folder(self, *parts: str) -> Path:
        """A folder or file below `data_dir`, by parts that the code names."""
        return self.settings.data_path.joinpath(*parts)


def default_resources(config_file: Path) -> dict[str, Any]:
    """The resources of the definitions, for a settings file."""
    from causalmix_pipeline.resources.frame_store import FrameStore

    settings = load_settings(config_file, missing_ok=True)
    return {
        "project": Project(config_file=str(config_file.resolve())),
        "io_manager": FrameStore(base_dir=str(settings.data_path / "assets")),
    }
