"""Whole files below a root, on a local disk or in object storage by URL (`s3://bucket/folder`).

A file is whole or absent to every reader: on a disk it is written under a temporary name, fsynced
and renamed; an object store shows an object once its upload has ended. Object storage goes through
fsspec, which takes the endpoint and the keys from the usual variables and files of each service.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


def root_of(location: str | Path) -> Path | str:
    """A local folder as a Path (also from `file://`), any other URL without its last slash."""
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return Path(location)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text.rstrip("/")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by its whole new content: after a crash it holds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # such as a full disk: what was written takes room
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Blobs(Protocol):
    """Files below a root, read and written whole. A name is a path below the root, with slashes."""

    def place(self, name: str) -> Path | str:
        """The file's path or URL, as a person would look for it."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: if there is none.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        ...

    def write_new(self, name: str, content: bytes) -> None:
        """Write a file, unless there is one: the first writer wins."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def read_those(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those files that there are, by name; many at once where that is faster."""
        ...

    def move(self, name: str, new_name: str) -> None:
        """Give a file another name."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, at any depth, sorted; none if there is no folder."""
        ...


def open_blobs(root: str | Path) -> Blobs:
    """The files below a local folder or a URL."""
    place = root_of(root)
    return LocalBlobs(place) if isinstance(place, Path) else ObjectBlobs(place)


@dataclass(frozen=True)
class LocalBlobs:
    """Files below a local folder, which is made at the first write.

    Attributes:
        root: the folder.
    """

    root: Path

    def place(self, name: str) -> Path:
        """The file's path."""
        return self.root / name

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        write_atomically(self.root / name, content)

    def write_new(self, name: str, content: bytes) -> None:
        """Write a file, unless there is one. Two writers at the same moment: the last one wins."""
        if not self.exists(name):
            self.write(name, content)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.root / name).exists()

    def read_those(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those files that there are, by name."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def move(self, name: str, new_name: str) -> None:
        """Give a file another name."""
        (self.root / new_name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).replace(self.root / new_name)

    def remove(self, name: str) -> None:
        """Remove a file, unless another process did."""
        (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, but for unfinished ones."""
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in (self.root / folder).rglob("*")
            if not path.name.startswith(".") and path.is_file()
        )


@dataclass(frozen=True)
class ObjectBlobs:
    """Objects below a URL that fsspec can open; the bucket must exist.

    Attributes:
        root: the URL, without a slash at its end.
    """

    root: str

    def place(self, name: str) -> str:
        """The object's URL."""
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        """The content of an object."""
        return self._files.cat_file(self.place(name))

    def write(self, name: str, content: bytes) -> None:
        """Write an object, or replace it."""
        self._files.pipe_file(self.place(name), content)

    def write_new(self, name: str, content: bytes) -> None:
        """Write an object, unless there is one; the store itself decides who was first."""
        try:
            self._files.pipe_file(self.place(name), content, mode="create")
        except OSError:  # stores name the refusal each in their own way
            if not self.exists(name):
                raise

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        return self._files.exists(self.place(name))

    def read_those(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of those objects that there are, by name; fetched many at a time."""
        if not names:
            return {}
        files = self._files
        paths = {name: files._strip_protocol(self.place(name)) for name in names}
        answers = files.cat(list(paths.values()), on_error="return")
        found = {}
        for name, path in paths.items():
            answer = answers[path]
            if isinstance(answer, FileNotFoundError):
                continue
            if isinstance(answer, BaseException):
                raise answer
            found[name] = answer
        return found

    def move(self, name: str, new_name: str) -> None:
        """Give an object another name: a copy is made before it is removed."""
        self.write(new_name, self.read(name))
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove an object."""
        self._files.rm_file(self.place(name))

    def names(self, folder: str) -> list[str]:
        """Names of all objects below a folder."""
        files = self._files
        start = len(files._strip_protocol(self.root)) + 1
        return sorted(path[start:] for path in files.find(self.place(folder)))

    @property
    def _files(self) -> Any:
        import fsspec

        # Listings are never cached: other processes and machines write here too.
        return fsspec.url_to_fs(self.root, use_listings_cache=False)[0]
