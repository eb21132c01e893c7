"""What killed processes left below `data_dir`, and values that were damaged."""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from causalmix_pipeline.adapters.blobs import open_blobs, root_of
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.findings import Finding
from causalmix_pipeline.resources.settings import Settings

#: Folders below `data_dir` that only this package writes to. A pool may lie there, too, and what a
#: person copies into it may have a name like one of ours.
OURS = (
    "assets", "calibration", "dagster_home", "export", "history", "logs", "profile", "quarantine",
    "reports", "run_store", "scorers", "scores", "tokenizers", "top_ups",
)  # fmt: skip

#: Seconds without a write after which a file of a process that isn't seen here is left over. The
#: process may be on another machine that shares the disk.
QUIET_SECONDS = 600

#: Seconds after which one is that doesn't tell its process, or whose process id lives.
OLD_SECONDS = 86_400

#: `.NAME.PID.tmp` and the like, of writers that name their process.
_BY_PROCESS = re.compile(r"\..+\.(?P<pid>\d+)\.(tmp|writing|building)")

#: Of writers that don't.
_NAMELESS = re.compile(r"\.(step-\d+\.building|[0-9a-f]+\.fetching|fetch-.+)")


def check_leftovers(settings: Settings) -> Iterator[Finding]:
    """Temporary files and folders of processes that are gone."""
    places = find_leftovers(settings)
    if not places:
        yield Finding("leftovers", "ok", "no temporary file of a killed process")
        return
    size = sum(map(size_of, places)) / 1e6

    def mend() -> str:
        removed = [place for place in places if remove_leftover(settings, place)]
        return f"Removed {len(removed)}: {_named(removed, settings)}."

    detail = (
        f"{len(places)} of killed processes, {size:.1f} MB: {_named(places, settings)}; "
        "causalmix doctor --mend removes them"
    )
    yield Finding("leftovers", "warning", detail, mend)


def _named(places: list[Path], settings: Settings) -> str:
    root = settings.data_path
    names = [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in places[:5]]
    return ", ".join([*names, *(["..."] if len(places) > 5 else [])])


def find_leftovers(settings: Settings) -> list[Path]:
    """Files and folders that a killed process left; nothing of one that lives."""
    found = [p for p in settings.data_path.glob(".demo-????????*") if is_left(p)]
    roots = [settings.data_path / name for name in OURS]
    store = root_of(settings.run_store_root)
    if isinstance(store, Path) and store.parent != settings.data_path:
        roots += [store, store.parent / "assets"]
    for root in roots:
        for folder, folders, files in os.walk(root):
            left = [name for name in (*folders, *files) if is_left(Path(folder, name))]
            found += [Path(folder, name) for name in left]
            folders[:] = [name for name in folders if name not in left and name[0] != "."]
    return sorted([*found, *_scratch_of_profiles(settings)])


def is_left(path: Path) -> bool:
    """Tell whether something is temporary, and its writer is gone."""
    named = _BY_PROCESS.fullmatch(path.name)
    is_ours = named or _NAMELESS.fullmatch(path.name) or path.name.startswith(".demo-")
    if not is_ours:
        return False
    try:
        quiet = time.time() - last_write(path)
    except FileNotFoundError:  # its writer finished just now
        return False
    if named and not _is_running(int(named["pid"])):
        return quiet > QUIET_SECONDS
    return quiet > OLD_SECONDS


def last_write(path: Path) -> float:
    """Seconds since 1970 of the newest write to a file, or below a folder."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(place.lstat().st_mtime for place in (path, *inside))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _scratch_of_profiles(settings: Settings) -> list[Path]:
    """Texts that a killed profile left; none while a profile is at work."""
    found = list((settings.data_path / "scratch").glob("profile-*"))
    lock = settings.data_path / "scores" / ".lock"
    if not found or not lock.exists():
        return [place for place in found if time.time() - last_write(place) > OLD_SECONDS]
    return found if _is_free(lock) else []


def _is_free(lock: Path) -> bool:
    """Tell whether no process holds a lock."""
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def remove_leftover(settings: Settings, place: Path) -> bool:
    """Remove something that is left over, unless that changed meanwhile."""
    of_profile = place.name.startswith("profile-") and place in _scratch_of_profiles(settings)
    if not of_profile and not is_left(place):
        return False
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
    return not place.exists()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links aren't followed."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    total = 0
    for place in (path, *inside):
        try:
            total += 0 if place.is_dir() else place.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def check_values(settings: Settings) -> Iterator[Finding]:
    """Stored values of assets against the digest that they were sealed with."""
    from upath import UPath

    root = root_of(settings.assets_root)
    try:
        names = [name for name in open_blobs(root).names("") if name.endswith(".parquet")]
    except Exception as error:  # object stores fail in their libraries' own ways
        why = f"{root} must answer, got {type(error).__name__}: check `storage`, network and keys"
        yield Finding("stored values", "wrong", why)
        return
    broken = []
    for name in names:
        try:
            read_value(UPath(root) / name)
        except PoolError as error:
            broken.append(str(error))
        except FileNotFoundError:
            continue
    for message in broken:
        yield Finding("stored value", "wrong", message)
    if not broken:
        yield Finding("stored values", "ok", f"{len(names)} as they were written")
