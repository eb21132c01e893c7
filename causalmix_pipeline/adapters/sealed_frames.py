"""Sealed values: a frame, or a dictionary that JSON can hold, as one Parquet file.

Polars writes no page checksums, so a flipped bit in a page can be read as another number. Each file
therefore carries the digest of its content in its own footer, computed again at every read: one
file, readable by any Parquet reader, never silently wrong. The same digest is the data version of
an asset, so equal content is equal to Dagster.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.blobs import open_blobs
from causalmix_pipeline.core.errors import PoolError

if TYPE_CHECKING:
    from upath import UPath

DIGEST_KEY = "causalmix.digest"
KIND_KEY = "causalmix.kind"
SCHEMA_KEY = "causalmix.schema"


def content_digest(value: pl.DataFrame | dict | list) -> str:
    """Hex digest of what a value says, whatever its layout in memory or on disk.

    Null, NaN and text lengths count; row order counts. Floats are compared bit for bit.
    """
    if isinstance(value, pl.DataFrame):
        return _frame_digest(value)
    return hashlib.sha256(_to_json(value).encode()).hexdigest()


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _frame_digest(frame: pl.DataFrame) -> str:
    digest = hashlib.sha256(str(frame.height).encode())
    for series in frame.iter_columns():
        digest.update(f"\0{series.name}\0{series.dtype}\0".encode())
        _feed_series(digest, series)
    return digest.hexdigest()


def _feed_series(digest: Any, series: pl.Series) -> None:
    """Feed null mask and values of a column; lists as their lengths and their items."""
    digest.update(np.packbits(series.is_null().to_numpy()).tobytes())
    if isinstance(series.dtype, pl.List):
        digest.update(series.list.len().fill_null(0).to_numpy().astype(np.int64).tobytes())
        _feed_series(digest, series.drop_nulls().explode(empty_as_null=False))
    elif series.dtype == pl.String:
        filled = series.fill_null("")
        digest.update(filled.str.len_bytes().to_numpy().astype(np.int64).tobytes())
        digest.update(filled.str.join("").item().encode())
    elif series.dtype == pl.Binary:
        values = series.fill_null(b"").to_list()
        digest.update(np.fromiter(map(len, values), dtype=np.int64, count=len(values)).tobytes())
        digest.update(b"".join(values))
    elif series.dtype == pl.Boolean or series.dtype.is_numeric():
        filled = series.fill_null(False if series.dtype == pl.Boolean else 0)
        digest.update(np.ascontiguousarray(filled.to_numpy()).tobytes())
    elif series.dtype != pl.Null:  # a column of nulls is all in its mask
        raise TypeError(
            f"column {series.name} must hold numbers, text, bytes, booleans or lists of them, got "
            f"{series.dtype}: cast it before it is stored"
        )


def write_value(path: Path | UPath, value: pl.DataFrame | dict | list) -> None:
    """Write a frame or a JSON-able value, whole or not at all.

    A process killed at any moment leaves the old file or the new one: on a disk it is written to a
    temporary name, flushed, then renamed; in object storage it is one upload.

    Args:
        path: a local path, or an object's as a UPath.
        value: what to keep.

    Raises:
        TypeError: for a value of another kind.
    """
    is_frame = isinstance(value, pl.DataFrame)
    if not is_frame and not isinstance(value, dict | list):
        raise TypeError(
            f"an asset's value must be a polars DataFrame, a dict or a list, got "
            f"{type(value).__name__}: store what it is made of"
        )
    frame = value if is_frame else pl.DataFrame({"json": [_to_json(value)]})
    columns = {name: str(kind) for name, kind in frame.schema.items()}
    footer = {
        DIGEST_KEY: content_digest(frame),
        KIND_KEY: "frame" if is_frame else "json",
        SCHEMA_KEY: json.dumps(columns),
    }
    if isinstance(path, Path):
        _write_file(path, frame, footer)
    else:
        content = io.BytesIO()
        frame.write_parquet(content, compression="zstd", metadata=footer)
        open_blobs(str(path.parent)).write(path.name, content.getvalue())


def _write_file(path: Path, frame: pl.DataFrame, footer: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed writer
        if not _is_running(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        frame.write_parquet(temporary, compression="zstd", metadata=footer)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_value(path: Path | UPath) -> Any:
    """Read what `write_value` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        PoolError: if the file isn't what was written: a flipped bit, a foreign file.
    """
    way_out = f"Delete it and materialise the asset {path.stem} again."
    try:
        # Read once: opened by name again, the file could be the next one, renamed into place.
        content = open_blobs(str(path.parent)).read(path.name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} must be there, got no file: materialise the asset {path.stem} first."
        ) from error
    try:
        footer = pl.read_parquet_metadata(io.BytesIO(content))
        frame = pl.read_parquet(io.BytesIO(content))
        found = content_digest(frame)
    except (Exception, pl.exceptions.PanicException) as error:  # all ways a damaged file fails
        raise PoolError(f"{path} can't be read: {error}. {way_out}") from error
    if found != footer.get(DIGEST_KEY):
        raise PoolError(
            f"{path} must hold what was written (digest {footer.get(DIGEST_KEY)}), got {found}: "
            f"the file was damaged or changed by hand. {way_out}"
        )
    return json.loads(frame["json"][0]) if footer[KIND_KEY] == "json" else frame
