"""What `causalmix doctor` checks, and what it may mend.

Without `--mend` nothing is changed. With it, each finding that has a way to be mended is: what a
dead process left goes, what Dagster keeps is brought in order. A person's data, values of assets
and finished proxy runs are never removed, and nothing of a process that lives is touched.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from causalmix_pipeline.core.errors import CausalMixError, ConfigError, PoolError
from causalmix_pipeline.findings import Finding
from causalmix_pipeline.resources.settings import Settings

#: Free bytes on a disk below which the doctor warns, and below which it's wrong.
LOW_BYTES, FULL_BYTES = 2e9, 2e8


def examine(config: Path | None, *, mend: bool = False) -> list[Finding]:
    """All checks, in order.

    Args:
        config: the settings file; None takes the usual one.
        mend: whether what can be mended is.

    Raises:
        ConfigError: with `mend`, if another command works on the project.
    """
    with ExitStack() as stack:
        findings = []
        for found in _look(config, stack, alone=mend):
            findings.append(mended(found) if mend and found.mend else found)
        return findings


def mended(found: Finding) -> Finding:
    """What is left of a finding once it was mended."""
    import dagster as dg
    from sqlalchemy.exc import SQLAlchemyError

    assert found.mend is not None
    try:
        return Finding(found.what, "mended", found.mend())
    except (CausalMixError, dg.DagsterError, SQLAlchemyError, OSError) as error:
        return Finding(found.what, "wrong", f"{found.detail} Mending failed: {error}")


def _look(config: Path | None, stack: ExitStack, *, alone: bool) -> Iterator[Finding]:
    from causalmix_pipeline.doctor_files import check_leftovers, check_values
    from causalmix_pipeline.doctor_instance import check_instance
    from causalmix_pipeline.resources.settings_file import load_settings
    from causalmix_pipeline.workspace import find_config, hold_project

    yield from check_machine()
    path = find_config(config)
    try:
        settings = load_settings(path)
    except ConfigError as error:
        yield check_disk(Path.cwd())
        yield Finding("settings", "wrong", str(error))
        return
    yield Finding("settings", "ok", str(path))
    yield tried("device", lambda: device_of(path))
    if alone:
        stack.enter_context(hold_project(settings.data_path))
    for folder in disks(settings):
        yield check_disk(folder)
    for what, check in [*pool_checks(settings), *task_checks(settings)]:
        yield tried(what, check)
    yield from check_instance(path, settings, stack)
    yield from check_leftovers(settings)
    yield from check_values(settings)


def tried(what: str, check: Callable[[], str]) -> Finding:
    """A check's detail, or what went wrong in it."""
    try:
        return Finding(what, "ok", check())
    except CausalMixError as error:
        return Finding(what, "wrong", str(error))


# ---------------------------------------------------------------------------- the machine


def check_machine() -> Iterator[Finding]:
    """Python, cores and packages."""
    yield check_python()
    yield check_cores()
    for name, purpose, level in (
        ("torch", "proxy runs", "wrong"),
        ("econml", "causal_forest", "wrong"),
        ("lightgbm", "RegMix", "wrong"),
        ("dagster-webserver", "the UI", "warning"),
    ):
        yield check_package(name, purpose, level)
    yield check_ranges()
    yield from check_constraints()


def check_python() -> Finding:
    """Python 3.11, 3.12 or 3.13."""
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info < (3, 14)
    return Finding("Python", "ok" if fits else "wrong", f"{version} (3.11 to 3.13 are tested)")


def check_cores() -> Finding:
    """How many processes can train."""
    from causalmix_pipeline.adapters.local_workers import n_cores

    cores = n_cores()
    return Finding("cores", "ok" if cores >= 2 else "warning", f"{cores}; one proxy process each")


def device_of(config: Path) -> str:
    """What proxies are trained on.

    Raises:
        ConfigError: if the settings ask for a GPU that isn't there.
    """
    from causalmix_pipeline.resources.project import Project, visible_gpus

    device = Project(config_file=str(config.resolve())).device
    gpus = visible_gpus()
    return f"{device}; proxies train on it" + (f" ({len(gpus)} GPUs are visible)" if gpus else "")


def check_package(name: str, purpose: str, level: str) -> Finding:
    """A package that something needs."""
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, level, f"not installed; {purpose} needs it")


def check_ranges(package: str = "causalmix_pipeline") -> Finding:
    """Installed packages against the ranges that this package declares."""
    from packaging.requirements import Requirement

    extras = metadata.metadata(package).get_all("Provides-Extra") or []
    odd = []
    for requirement in map(Requirement, metadata.requires(package) or ()):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": e}) for e in extras):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if marker is None:
                odd.append(f"{requirement.name} isn't installed")
            continue
        if requirement.name != package and not requirement.specifier.contains(version, True):
            odd.append(f"{requirement.name} {version} isn't {requirement.specifier}")
    if not odd:
        return Finding("packages", "ok", "as declared")
    return Finding("packages", "wrong", f"{'; '.join(odd)}: pip install --upgrade {package}")


def check_constraints(path: Path | None = None) -> Iterator[Finding]:
    """Installed packages against `constraints.txt`, in a checkout; an installed wheel has none."""
    path = path or Path(__file__).parents[1] / "constraints.txt"
    if not path.is_file():
        return
    odd = []
    for line in path.read_text().splitlines():
        name, pinned, version = line.partition("==")
        if not pinned or name.startswith("#"):
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if found.partition("+")[0] != version.strip():
            odd.append(f"{name} {found} instead of {version.strip()}")
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        detail = f"{', '.join(odd[:5])}{more}: pip install -c constraints.txt -e ."
        yield Finding("constraints.txt", "warning", detail)
    else:
        yield Finding("constraints.txt", "ok", "every installed package is the tested version")


def disks(settings: Settings) -> list[Path]:
    """A folder on each disk that the project writes to."""
    from causalmix_pipeline.adapters.blobs import root_of

    places = [settings.data_path, root_of(settings.run_store_root)]
    there = [_existing(place) for place in places if isinstance(place, Path)]
    return list({folder.stat().st_dev: folder for folder in reversed(there)}.values())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_disk(folder: Path) -> Finding:
    """2 GB free for token stores and runs."""
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free at {folder} (2 GB wanted)"
    if free >= LOW_BYTES:
        return Finding("disk", "ok", detail)
    level = "warning" if free >= FULL_BYTES else "wrong"
    return Finding("disk", level, f"{detail}: make room, or move data_dir to a larger disk")


# ---------------------------------------------------------------------------- pools and tasks


def pool_checks(settings: Settings) -> list[tuple[str, Callable[[], str]]]:
    """All pools: can their documents be read?"""
    from causalmix_pipeline.adapters.profiler import PoolSpec, survey_pool
    from causalmix_pipeline.resources.project import column_map, door_rules

    def check(location: str | Path) -> str:
        spec = PoolSpec(
            location,
            column_map(settings),
            door_rules(settings),
            domains=None if settings.domains is None else tuple(settings.domains),
            max_rejected_share=settings.quality.max_rejected_share,
        )
        found = survey_pool(spec, max_bytes=0)
        return (
            f"{sum(found.documents_of.values()):,} documents in {len(found.documents_of)} domains, "
            f"{found.quarantine.height} rows refused"
        )

    places = {"experiment pool": settings.experiment_path}
    for name, place in settings.live_pools.items():
        places["live pool" if name is None else f"live pool {name}"] = place
    return [(what, lambda place=place: check(place)) for what, place in places.items()]


def task_checks(settings: Settings) -> list[tuple[str, Callable[[], str]]]:
    """Each task: is its held-out text there?"""
    from causalmix_pipeline.assets.design import read_text_column

    def check(path: Path, weight: float) -> str:
        if not path.is_file():
            raise PoolError(f"path must be a file with held-out text, got {path}, not there.")
        return (
            f"{len(read_text_column(path, settings.columns.text)):,} documents, weight {weight:g}"
        )

    if not settings.tasks:

        def refuse() -> str:
            raise ConfigError("tasks must hold at least one task, got none: see causalmix init.")

        return [("task list", refuse)]
    weights = settings.task_weights
    return [
        (f"task {name}", lambda path=path, name=name: check(path, weights[name]))
        for name, path in settings.task_paths.items()
    ]
