"""The data files of a pool: in a folder, by a pattern or one by one, on disk or object storage.

A folder that Hugging Face `datasets` saved is read by its own list of files: other `.arrow` files
beside them are caches of past computations, no documents.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from dataclasses import dataclass
from errno import ELOOP, ENOENT, ENOTDIR
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, BinaryIO

from causalmix_pipeline.core.errors import PoolError

#: Ending of a file's name -> how it's written. `.feather` is Arrow's file format, version 2.
FORMATS = {
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
#: Second ending -> compression; for lines of text only, the other formats compress by themselves.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
#: Bytes asked of object storage at a time.
REMOTE_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class PoolFile:
    """A data file of a pool; can be sent to a worker.

    Attributes:
        url: local path, or URL that fsspec knows (s3://...).
        name: path below the pool's location, for tables and errors.
        size: bytes; -1 where a dataset's own list names a file that isn't there.
        version: changes with the file: both its times of change in nanoseconds (that of the
            content can be set, and is by `rsync -t` or `touch`), or the storage's ETag.
        format: "jsonl", "csv", "parquet" or "arrow".
    """

    url: str
    name: str
    size: int
    version: str
    format: str

    @property
    def compression(self) -> str | None:
        """How the file is packed: "gzip", "zstd", or None."""
        return COMPRESSIONS.get(os.path.splitext(self.url)[1])

    @property
    def folder(self) -> str:
        """Name of the folder that holds the file."""
        return as_text(os.path.basename(os.path.dirname(self.url)))

    @property
    def stem(self) -> str:
        """The file's name without the endings that say how it's written."""
        stem, ending = os.path.splitext(os.path.basename(self.url))
        if ending in COMPRESSIONS:
            stem = os.path.splitext(stem)[0]
        return as_text(stem)

    def open(self) -> BinaryIO:
        """Open the bytes as they are stored."""
        if not is_url(self.url):
            return open(self.url, "rb", buffering=2**20)
        from fsspec.core import url_to_fs

        storage, path = url_to_fs(self.url)
        return storage.open(path, "rb", block_size=REMOTE_BLOCK_BYTES)


def is_url(location: str | Path) -> bool:
    """Say whether a location is a URL rather than a local path."""
    return "://" in str(location)


def as_text(name: str) -> str:
    """A path or reason as UTF-8 can carry it, whatever bytes a file's name or a bad row holds."""
    return name.encode("utf-8", "replace").decode("utf-8")


def pool_files(location: str | Path) -> list[PoolFile]:
    """The data files of a pool, sorted; hidden files and files being written are left out.

    Args:
        location: a folder (searched with all its folders), a file, a pattern with `*`, `?`,
            `[...]` or `**`, or a folder saved by Hugging Face `datasets`; a local path or a URL.

    Raises:
        PoolError: if there's nothing at the location, or no data file.
    """
    found = _list_remote(str(location)) if is_url(location) else _list_local(Path(location))
    if found is None:
        raise PoolError(
            f"pools: {as_text(str(location))} is not a folder, nor a file or pattern of files. "
            "Check `pools` in the settings."
        )
    visible = {name: f for name, f in found.items() if not _is_hidden(name)}
    files = _with_datasets(visible)
    if not files:
        raise PoolError(
            f"pools: {as_text(str(location))} holds no .jsonl or .parquet file, nor one of "
            ".csv, .arrow, .feather (.jsonl and .csv also with .gz or .zst). Put documents there, "
            "in one folder per domain or with a domain column (`columns.domain`)."
        )
    return sorted(files, key=lambda file: file.url)


def pool_fingerprint(location: str | Path) -> str:
    """A hash of the pool's file names and contents.

    On object storage the ETag stands for a file's content where the storage gives one.

    Raises:
        PoolError: as `pool_files`.
    """
    digest = hashlib.sha256()
    for file in pool_files(location):
        n_parts = file.name.count("/") + 1  # the name itself may have lost bytes that aren't UTF-8
        digest.update(os.fsencode("/".join(file.url.split("/")[-n_parts:])) + b"\0")
        if file.size < 0 or (is_url(file.url) and file.version):
            digest.update(f"{file.version} {file.size}".encode())
            continue
        with file.open() as raw:
            digest.update(hashlib.file_digest(raw, "sha256").digest())  # pyright: ignore
    return digest.hexdigest()


def _format_of(name: str) -> str | None:
    stem, ending = os.path.splitext(name)
    if ending in COMPRESSIONS:
        kind = FORMATS.get(os.path.splitext(stem)[1])
        return kind if kind in ("jsonl", "csv") else None
    return FORMATS.get(ending)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _list_local(location: Path) -> dict[str, PoolFile] | None:
    """Every file at a location by its name below it, or None if there's nothing."""
    location = Path(os.path.abspath(location))  # a folder given as "." has a name, too
    if location.is_dir():
        root, paths = location, location.rglob("*")
    elif location.exists():
        root, paths = location.parent, [location]
    elif glob.has_magic(str(location)):
        root = location
        while glob.has_magic(str(root)):
            root = root.parent
        paths = [Path(path) for path in glob.iglob(str(location), recursive=True)]
        if not paths:
            return None
    else:
        return None
    found = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            if error.errno in (ENOENT, ENOTDIR, ELOOP):  # removed just now, or a link to nowhere
                continue
            raise
        if S_ISREG(stat.st_mode):
            name = path.relative_to(root).as_posix()
            if path != location:  # a link that a person named is followed
                _refuse_outside(path, root, name)
            version, format_ = f"{stat.st_mtime_ns} {stat.st_ctime_ns}", _format_of(name) or ""
            found[name] = PoolFile(str(path), as_text(name), stat.st_size, version, format_)
    return found


def _refuse_outside(path: Path, root: Path, name: str) -> None:
    """Refuse a link out of the pool: whoever fills the folder would choose what else is read.

    The cache of `huggingface_hub` has its files in a folder beside the one of links.
    """
    real, inside = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    if not (real.is_relative_to(inside) or real.is_relative_to(blobs)):
        raise PoolError(
            f"pools: {as_text(name)} must be a file in the pool's folder {as_text(str(root))}, "
            f"got a link to {as_text(str(real))}: copy or hard-link the file, or name the folder "
            "that it is in as the pool."
        )


def _list_remote(location: str) -> dict[str, PoolFile] | None:
    """As `_list_local`, for a URL."""
    from fsspec.core import url_to_fs

    storage, path = url_to_fs(location)
    storage.invalidate_cache()  # the pool may have changed since this process last looked
    if glob.has_magic(path) and not storage.exists(path):
        root = path
        while glob.has_magic(root):
            root = os.path.dirname(root)
        listed = storage.glob(path, detail=True)
    else:
        listed = storage.find(path, detail=True)
        root = os.path.dirname(path) if list(listed) == [path] else path
    found = {}
    for key, about in listed.items():
        if about["type"] != "file":
            continue
        name = os.path.relpath(key, root)
        version = about.get("ETag") or about.get("LastModified") or about.get("mtime") or ""
        found[name] = PoolFile(
            storage.unstrip_protocol(key),
            as_text(name),
            about["size"],
            str(version).strip('"'),
            _format_of(name) or "",
        )
    return found or None


def _with_datasets(found: dict[str, PoolFile]) -> list[PoolFile]:
    """Keep data files; in a folder that `datasets` saved, those that its list names."""
    chosen = {name: file for name, file in found.items() if file.format}
    for name, file in found.items():
        folder, base = os.path.split(name)
        if base == "dataset_dict.json":
            listed = [f"{split}/state.json" for split in _listed(file, "splits")]
            _add_missing(chosen, found, file, folder, listed)
        elif base in ("state.json", "dataset_info.json"):
            for other in _arrow_files(chosen, folder):
                if os.path.basename(other).startswith(("cache-", "indices")):
                    del chosen[other]
        if base == "state.json":
            listed = _listed(file, "_data_files")
            for other in _arrow_files(chosen, folder) if listed else []:
                if os.path.basename(other) not in listed:
                    del chosen[other]
            _add_missing(chosen, found, file, folder, listed)
    return list(chosen.values())


def _arrow_files(chosen: dict[str, PoolFile], folder: str) -> list[str]:
    return [n for n, f in chosen.items() if os.path.dirname(n) == folder and f.format == "arrow"]


def _listed(file: PoolFile, key: str) -> list[str]:
    """Names in a list file of `datasets`; empty if it's damaged or names anything but names."""
    try:
        with file.open() as raw:
            entries = json.loads(raw.read(2**20))[key]
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    is_plain = all(isinstance(name, str) and name and "/" not in name for name in names)
    return names if is_plain else []


def _add_missing(
    chosen: dict[str, PoolFile],
    found: dict[str, PoolFile],
    file: PoolFile,
    folder: str,
    listed: list[str],
) -> None:
    """Add what a dataset's list names and isn't there, or the list itself if it's damaged.

    Reading such a file fails, so the loss is named in the quarantine table.
    """
    if not listed:
        chosen[file.name] = PoolFile(file.url, file.name, file.size, file.version, "arrow")
    for name in listed:
        path = f"{folder}/{name}" if folder else name
        if path not in found:
            url = f"{os.path.dirname(file.url)}/{name}"
            chosen[path] = PoolFile(url, as_text(path), -1, "missing", "arrow")


class _Inflated(io.RawIOBase):
    """Decompressed bytes of a file, refused as soon as they outgrow what is stored too far."""

    #: Decompressed at a time. Small: what a step made before it met damage is lost.
    STEP_BYTES = 2**10
    #: A file that inflates to less than this is no bomb, however well it packs.
    FLOOR_BYTES = 16 * 2**20

    def __init__(self, raw: BinaryIO, codec: str, max_ratio: float) -> None:
        import pyarrow as pa

        self._raw, self._max_ratio = raw, max_ratio
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
        self._n_bytes = 0
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error is not None:
            raise self._error
        n = 0
        try:
            while n < len(buffer):
                piece = self._stream.read(min(self.STEP_BYTES, len(buffer) - n))
                if not piece:
                    break
                buffer[n : n + len(piece)] = piece
                n += len(piece)
        except OSError as error:
            self._error = error
        self._n_bytes += n
        limit = self._max_ratio * self._raw.tell()
        if self._n_bytes > max(limit, self.FLOOR_BYTES):
            self._error = OSError(
                f"decompresses to more than {self._max_ratio:g} times its bytes "
                f"({self._n_bytes} from {self._raw.tell()}), so it's taken for a bomb"
            )
        if n == 0 and self._error is not None:
            raise self._error
        return n

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._raw.close()
        super().close()


def open_plain(file: PoolFile, *, max_decompression_ratio: float) -> IO[bytes]:
    """Open a file of lines; compressed ones are decompressed while they are read.

    Raises:
        OSError: while opening or reading, if it can't be read or inflates too far.
    """
    raw = file.open()
    if file.compression is None:
        return io.BufferedReader(raw, 2**20) if is_url(file.url) else raw  # pyright: ignore
    if file.size == 0:
        raw.close()
        raise OSError(f"an empty file is no {file.compression} stream")
    return io.BufferedReader(_Inflated(raw, file.compression, max_decompression_ratio), 2**16)
