"""A project as the command line works on it: settings, definitions, instance, values of assets."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from upath import UPath

from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.automation.staleness import refresh, stale_assets
from causalmix_pipeline.console import Work, progress_line
from causalmix_pipeline.core.errors import CausalMixError, ConfigError
from causalmix_pipeline.resources.instance import close_dead_runs, ensure_instance
from causalmix_pipeline.resources.observation import (
    EXPERIMENT_POOL,
    LIVE_POOL,
    observe_pool,
    observed_version,
)
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import config_path, load_settings

#: Settings file that `causalmix demo` writes; used where there is no other.
DEMO_CONFIG = Path("data/demo.yaml")

#: Assets that are made only when a person asks for them by name.
ON_REQUEST = ("validation_runs", "covariate_choice")


def find_config(given: Path | None) -> Path:
    """The settings file to work with: the one named, the usual one, else the demo's."""
    if given is not None:
        return given
    usual = config_path()
    return DEMO_CONFIG if not usual.exists() and DEMO_CONFIG.exists() else usual


@dataclass(frozen=True, eq=False)
class Workspace:
    """A project, opened.

    Attributes:
        config_file: its settings file.
        settings: what the file says.
        defs: Dagster's definitions for it.
        instance: Dagster's instance in the project's data folder.
        console: where to print.
    """

    config_file: Path
    settings: Settings
    defs: dg.Definitions
    instance: dg.DagsterInstance
    console: Console

    def value(self, asset: str) -> Any:
        """The value of an asset as it was made last.

        Raises:
            FileNotFoundError: if it was never made.
            PoolError: if its file was damaged.
        """
        return read_value(UPath(self.settings.assets_root) / f"{asset}.parquet")

    def n_proxy_runs(self) -> int:
        """Finished proxy runs in the run store."""
        return RunStore(self.settings.run_store_root).n_records()

    def selection(self, *, live_only: bool = False) -> dg.AssetSelection:
        """What a refresh may make: everything that needs no request, or the live side."""
        from causalmix_pipeline.automation.conditions import LIVE_SIDE

        return LIVE_SIDE if live_only else dg.AssetSelection.all() - dg.AssetSelection.assets(
            *ON_REQUEST
        )  # fmt: skip

    def bring_up_to_date(
        self, selection: dg.AssetSelection, *, tags: Mapping[str, str] | None = None
    ) -> list[str]:
        """Observe the pools and materialise what is stale, with a progress line.

        Args:
            selection: what may be made.
            tags: of the Dagster runs.

        Returns:
            Names of the assets that were made, in order.
        """
        if observed_version(self.instance, EXPERIMENT_POOL) is None:
            # Adopted once; later changes of it need a person (the job adopt_experiment_pool).
            observe_pool(self.instance, self.settings, EXPERIMENT_POOL)
        observe_pool(self.instance, self.settings, LIVE_POOL)
        found = stale_assets(self.defs, self.instance, selection)
        keys = [*found.reasons, *found.maybe]
        if not keys:
            return []
        work = Work(step_names(self.defs, keys))
        with self.quiet_log(), progress_line(self.console, work) as on_event:
            made = refresh(self.defs, self.instance, selection, tags=tags, on_event=on_event)
        return [key.to_user_string() for key in made]

    @contextlib.contextmanager
    def quiet_log(self) -> Iterator[Path]:
        """Send what libraries write to `data/logs`; the screen keeps the progress line."""
        path = self.log_path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            yield path

    @property
    def log_path(self) -> Path:
        """Where the newest command keeps what libraries wrote to standard error."""
        return self.settings.data_path / "logs" / "causalmix.log"


def step_names(defs: dg.Definitions, keys: list[dg.AssetKey]) -> list[str]:
    """The steps that make assets: an asset's name, or the names of its ops."""
    names: list[str] = []
    for key in keys:
        name = key.path[-1]
        if name == "proxy_runs":
            names += ["pending_proxy_runs", "train_proxy_runs", "collect_proxy_runs"]
        else:
            names.append(name)
    return names


@contextlib.contextmanager
def open_workspace(
    config_file: Path | None, console: Console, *, must_exist: bool = True
) -> Iterator[Workspace]:
    """Open a project alone: dead runs are closed first, and no other command may work on it.

    Raises:
        ConfigError: if the settings break a rule, or another command is at work.
    """
    path = find_config(config_file)
    settings = load_settings(path, missing_ok=not must_exist)
    with hold_project(settings.data_path), ensure_instance(settings.data_path) as instance:
        from causalmix_pipeline.definitions import build_definitions

        closed = close_dead_runs(instance)
        if closed:
            console.print(
                f"Closed {len(closed)} run{'s' if len(closed) > 1 else ''} whose process was "
                "killed; finished proxy runs are kept."
            )
        yield Workspace(path, settings, build_definitions(path), instance, console)


@contextlib.contextmanager
def hold_project(data_path: Path) -> Iterator[None]:
    """Keep other commands off a project's data; the hold ends with this process.

    Raises:
        ConfigError: if another command holds it.
    """
    data_path.mkdir(parents=True, exist_ok=True)
    handle = os.open(data_path / ".causalmix.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode() or "unknown"
            raise ConfigError(
                f"data_dir ({data_path}) must be free, but another causalmix command works on it "
                f"(process {holder.strip()}): wait for it, or stop it."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def root_cause(error: BaseException) -> CausalMixError | None:
    """The error of ours that Dagster wrapped, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CausalMixError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
