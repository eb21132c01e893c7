"""What the files of a pool held when they were read, so that an unchanged file isn't read again.

A catalogue is a folder: the documents of one file without their texts, the refused rows, a sample
of the text. It is named by the file's content and by how it was read, appears whole or not at all,
and is checked against its own list of hashes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from causalmix_pipeline.adapters.pool_door import ColumnMap, DoorRules
from causalmix_pipeline.adapters.pool_files import PoolFile, is_url

#: Raise when the reader gives other rows for the same bytes.
READER_VERSION = 1
#: Written last: the number of rows, and the hash of each part.
LIST = "catalogue.json"


def catalogue_name(file: PoolFile, *how: ColumnMap | DoorRules | tuple | int | None) -> str:
    """Names the content of a file and how it is read; 32 hex digits.

    On object storage the version (the ETag) stands for the content.

    Raises:
        OSError: if the file can't be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if is_url(file.url):
        digest.update(f"{file.version} {file.size}".encode())
    elif file.size >= 0:
        with file.open() as raw:
            digest.update(hashlib.file_digest(raw, "blake2b").digest())  # pyright: ignore
    # Names become domains and sources.
    plain = [READER_VERSION, file.name, file.folder, file.stem, file.format, file.compression]
    plain += [asdict(part) if isinstance(part, ColumnMap | DoorRules) else part for part in how]
    digest.update(json.dumps(plain).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Catalogues:
    """Catalogues of one pool's files.

    Attributes:
        root: folder that holds them.
    """

    root: Path

    def write(self, name: str, parts: Iterable[Path], n_rows: int) -> None:
        """Keep Parquet files as a catalogue; they are moved.

        Args:
            name: of the catalogue.
            parts: files named `documents-N`, `quarantine` or `sample`.
            n_rows: rows of the pool's file.
        """
        target, building = self.root / name, self.root / f".{name}.{os.getpid()}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        sums = {}
        for part in parts:
            sums[part.name] = _sum(part.read_bytes())
            shutil.move(part, building / part.name)
        (building / LIST).write_text(json.dumps({"n_rows": n_rows, "parts": sums}))
        if target.exists():  # a damaged one
            shutil.rmtree(target)
        building.rename(target)

    def n_rows(self, name: str) -> int | None:
        """Rows of the file, or None where there is no whole catalogue of that name."""
        try:
            listed = json.loads((self.root / name / LIST).read_text())
            for part, wanted in listed["parts"].items():
                if _sum((self.root / name / part).read_bytes()) != wanted:
                    return None
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        return int(listed["n_rows"])

    def read(self, name: str, kind: str, columns: list[str] | None = None) -> list[pl.DataFrame]:
        """The parts of one kind: `documents`, `quarantine`, `sample`."""
        paths = sorted((self.root / name).glob(f"{kind}*.parquet"))
        return [pl.read_parquet(io.BytesIO(p.read_bytes()), columns=columns) for p in paths]

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the catalogues of files that the pool hasn't any more."""
        kept = set(names)
        for folder in self.root.glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _sum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
