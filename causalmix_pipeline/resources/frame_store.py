"""Where assets keep their values: one sealed Parquet file each, on a disk or in object storage."""

import re
from typing import Any, ClassVar

import dagster as dg
import polars as pl
from pydantic import Field, PrivateAttr
from upath import UPath

from causalmix_pipeline.adapters.blobs import root_of
from causalmix_pipeline.adapters.sealed_frames import read_value, write_value
from causalmix_pipeline.resources.columns import describe_column

#: Types of asset values. Named, since Dagster infers none from a `MaterializeResult` with checks.
FRAME = dg.PythonObjectDagsterType(pl.DataFrame, name="Frame")
VALUES = dg.PythonObjectDagsterType(dict, name="Values")

_SLUG = re.compile(r"[a-z0-9_]+")
#: Of a partition: a live pool's name.
_PARTITION = re.compile(r"[a-z0-9][a-z0-9_-]*")


class FrameStore(dg.ConfigurableIOManager, dg.UPathIOManager):
    """Keeps polars frames, and dictionaries that JSON can hold, as Parquet files."""

    base_dir: str = Field(
        description="Folder or URL (`s3://...`) of the asset storage; change it to keep values "
        "elsewhere."
    )

    extension: ClassVar[str] = ".parquet"
    _base_path: UPath = PrivateAttr()

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Point the store at its folder; it is made at the first write."""
        self._base_path = UPath(root_of(self.base_dir))

    def get_asset_relative_path(self, context: dg.InputContext | dg.OutputContext) -> UPath:
        """The asset's key as a path; only slugs, so no name leaves the folder."""
        return UPath(*[check_slug(part) for part in context.asset_key.path])

    def get_op_output_relative_path(self, context: dg.InputContext | dg.OutputContext) -> UPath:
        """The op's run, step and output under `ops/`."""
        parts = [re.sub(r"[^a-z0-9_]", "_", part.lower()) for part in context.get_identifier()]
        return UPath("ops", *parts)

    def make_safe_partition_path(self, base_path: UPath, partition: str) -> UPath:
        """The partition's file below the asset's; only names that leave no folder."""
        if not _PARTITION.fullmatch(partition):
            raise ValueError(
                "a partition must be lower-case letters, digits, _ and -, a letter or digit "
                f"first, got {partition!r}: rename the pool in pools.live"
            )
        return base_path / partition

    def make_directory(self, path: UPath) -> None:
        """Nothing: a write makes its folder, and object storage has none."""

    def dump_to_path(self, context: dg.OutputContext, obj: Any, path: UPath) -> None:
        """Write a value whole or not at all."""
        write_value(path, obj)

    def load_from_path(self, context: dg.InputContext, path: UPath) -> Any:
        """Read a value and check it against the digest in its footer."""
        return read_value(path)

    def get_metadata(self, context: dg.OutputContext, obj: Any) -> dict[str, Any]:
        """Rows and columns, as Dagster's catalogue shows them; nothing for a dictionary."""
        if not isinstance(obj, pl.DataFrame):
            return {}
        columns = [
            dg.TableColumn(name, str(kind), describe_column(name))
            for name, kind in obj.schema.items()
        ]
        return {
            "dagster/row_count": obj.height,
            "dagster/column_schema": dg.TableSchema(columns=columns),
        }


def value_path(base_dir: str, key: dg.AssetKey, partition: str | None = None) -> UPath:
    """Where the store keeps the value of an asset."""
    parts = [*key.path, *([] if partition is None else [partition])]
    return UPath(root_of(base_dir), *parts[:-1], f"{parts[-1]}{FrameStore.extension}")


def check_slug(part: str) -> str:
    """Return a part of a path that holds nothing but lower-case letters, digits, underscores.

    Raises:
        ValueError: for any other, such as `../../evil`.
    """
    if not _SLUG.fullmatch(part):
        raise ValueError(
            f"a stored name must be lower-case letters, digits and underscores, got {part!r}: "
            "keep names from data inside the frame, and store it under a slug"
        )
    return part
