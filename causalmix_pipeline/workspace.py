"""A project as the command line works on it: settings, definitions, instance, values of assets."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console

from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.automation.imported_tables import observe_tables
from causalmix_pipeline.automation.staleness import (
    last_made,
    materialise,
    refresh,
    stale_assets,
)
from causalmix_pipeline.console import Work, progress_line
from causalmix_pipeline.core.errors import CausalMixError, ConfigError, PoolError
from causalmix_pipeline.resources.asset_keys import asset_key, assets_named
from causalmix_pipeline.resources.frame_store import value_path
from causalmix_pipeline.resources.instance import close_dead_runs, ensure_instance
from causalmix_pipeline.resources.live_pools import settle_partitions
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
ON_REQUEST = ("validation_runs", "covariate_choice", "rivals")


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

    def value(self, asset: str, pool: str | None = None) -> Any:
        """The value of an asset as it was made last.

        Args:
            asset: its name.
            pool: name of the live pool that it's made of, where there are several.

        Raises:
            FileNotFoundError: if it was never made.
            PoolError: if its file was damaged.
        """
        return read_value(
            value_path(self.settings.assets_root, asset_key(self.settings, asset), pool)
        )

    def n_proxy_runs(self) -> int:
        """Finished proxy runs in the run store."""
        return RunStore(self.settings.run_store_root).n_records()

    def selection(self, *, live_only: bool = False) -> dg.AssetSelection:
        """What a refresh may make: everything that needs no request, or the live side."""
        from causalmix_pipeline.automation.conditions import LIVE_SIDE

        return LIVE_SIDE if live_only else dg.AssetSelection.all() - assets_named(*ON_REQUEST)

    @property
    def pools(self) -> list[str | None]:
        """Names of the live pools; None for the only one, without a name."""
        return list(self.settings.live_pools)

    def bring_up_to_date(
        self,
        selection: dg.AssetSelection,
        *,
        pool: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Observe the pools and materialise what is stale, with a progress line.

        Args:
            selection: what may be made.
            pool: name of the live pool; None where there are several leaves out what is made of
                one.
            tags: of the Dagster runs.

        Returns:
            Names of the assets that were made, in order.
        """
        if observed_version(self.instance, asset_key(self.settings, EXPERIMENT_POOL)) is None:
            # Adopted once; later changes of it need a person (the job adopt_experiment_pool).
            observe_pool(self.instance, self.settings, EXPERIMENT_POOL)
        if pool in self.pools:
            observe_pool(self.instance, self.settings, LIVE_POOL, pool)
        found = stale_assets(self.defs, self.instance, selection, pool=pool)
        keys = [*found.reasons, *found.maybe]
        if not keys:
            return []
        work = Work(step_names(self.defs, keys))
        with self.quiet_log(), progress_line(self.console, work) as on_event:
            made = refresh(
                self.defs, self.instance, selection, pool=pool, tags=tags, on_event=on_event
            )
        return [key.to_user_string() for key in made]

    def top_up(
        self, pool: str | None = None, *, tags: Mapping[str, str] | None = None
    ) -> list[str]:
        """Train the top-up plan of a live pool's recommendation, and recommend again.

        Args:
            pool: name of the live pool; None for the only one.
            tags: of the Dagster run.

        Returns:
            Names of the assets that were made; none where nothing is planned.
        """
        from causalmix_pipeline.assets.top_ups import TOP_UP_TAG
        from causalmix_pipeline.automation.jobs import TOP_UP

        if not self.value("recommended_mixture", pool)["top_up"]:
            return []
        keys = sorted(TOP_UP.resolve(self.defs.resolve_asset_graph()))
        work = Work([*step_names(self.defs, keys), "train_top_up_runs"])
        tags = {TOP_UP_TAG: "yes", **(tags or {})}
        with self.quiet_log(), progress_line(self.console, work) as on_event:
            materialise(self.defs, self.instance, keys, pool=pool, tags=tags, on_event=on_event)
        return [key.to_user_string() for key in keys]

    def chosen_pools(self, name: str | None) -> list[str | None]:
        """The live pool of a name, or all where none is given.

        Raises:
            ConfigError: if the settings have none of the name.
        """
        if name is None:
            return self.pools
        self.settings.live_location(name)
        return [name]

    def refresh_pools(
        self,
        pools: Sequence[str | None],
        selection: dg.AssetSelection,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> tuple[list[str], dict[str, Exception]]:
        """Bring up to date what is of no pool, then each pool; one that fails stops no other.

        Args:
            pools: names of the pools; [None] for the only one.
            selection: what may be made.
            tags: of the Dagster runs.

        Returns:
            Names of the assets that were made, with their pool; what went wrong with a pool.
        """
        made, problems = self.bring_up_to_date(selection, tags=tags), {}
        for pool in pools:
            if pool is None:
                continue
            try:
                names = self.bring_up_to_date(selection, pool=pool, tags=tags)
            except (dg.DagsterError, CausalMixError) as error:
                problems[pool] = root_cause(error) or error
                continue
            made += [f"{name} ({pool})" for name in names]
        return made, problems

    def pool_row(self, pool: str | None) -> dict[str, Any]:
        """A pool in a table of several: its state, when its mixture was made, gain and verdict."""
        from causalmix_pipeline.automation.conditions import LIVE_SIDE

        try:
            observe_pool(self.instance, self.settings, LIVE_POOL, pool)
            found = stale_assets(self.defs, self.instance, LIVE_SIDE, pool=pool)
            stale = [f"{key.path[-1]}: {reason}" for key, reason in found.reasons.items()]
            state = stale[0] if stale else "up to date"
        except PoolError as error:
            state = f"can't be read: {error}"
        made = last_made(self.instance, asset_key(self.settings, "recommended_mixture"), pool)
        row = {"pool": pool, "state": state, "made": made and made.timestamp}
        try:
            return row | {"recommended": self.value("recommended_mixture", pool)}
        except FileNotFoundError:
            return row | {"recommended": None}

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
        elif name == "top_up_runs":
            names += ["ask_for_top_up", "collect_top_ups"]
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
    with (
        hold_project(settings.data_path),
        ensure_instance(settings.data_path, settings.instance) as instance,
    ):
        from causalmix_pipeline.definitions import build_definitions

        closed = close_dead_runs(instance, settings)
        if closed:
            console.print(
                f"Closed {len(closed)} run{'s' if len(closed) > 1 else ''} whose process was "
                "killed; finished proxy runs are kept."
            )
        settle_partitions(instance, settings)
        observe_tables(instance, settings)
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
    """The error of ours that Dagster wrapped, if there is one.

    An error that is raised again while another is handled can stand in its own chain.
    """
    chain: list[BaseException] = []
    last: BaseException | None = error
    while last is not None and all(last is not known for known in chain):
        if isinstance(last, CausalMixError):
            return last
        chain.append(last)
        last = last.__cause__ or last.__context__
    return None
