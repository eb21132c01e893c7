"""Assets keep their values, on a disk and in object storage; evil names write nothing."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from s3fs import S3FileSystem
from upath import UPath

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.resources.frame_store import FrameStore, check_slug


def sample_frame(n: int) -> pl.DataFrame:
    return pl.DataFrame({"text": [f"döc {i}" for i in range(n)], "value": [0.5] * n})


@dg.asset
def numbers() -> pl.DataFrame:
    return sample_frame(3)


@dg.asset
def total(numbers: pl.DataFrame) -> dict:
    return {"rows": numbers.height}


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "", "A", "a b", "é", "'; DROP TABLE"])
def test_a_name_that_could_leave_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="lower-case letters"):
        check_slug(name)


def test_an_asset_keeps_its_value_with_rows_and_columns_as_metadata(tmp_path):
    @dg.asset
    def numbers() -> pl.DataFrame:
        return sample_frame(3)

    @dg.asset
    def total(numbers: pl.DataFrame) -> dict:
        return {"rows": numbers.height}

    store = FrameStore(base_dir=str(tmp_path / "assets"))
    result = dg.materialize([numbers, total], resources={"io_manager": store})

    metadata = result.asset_materializations_for_node("numbers")[0].metadata
    assert metadata["dagster/row_count"].value == 3
    columns = metadata["dagster/column_schema"].value.columns
    assert [(column.name, column.type) for column in columns][:2] == [
        ("text", "String"),
        ("value", "Float64"),
    ]
    assert read_value(tmp_path / "assets" / "total.parquet") == {"rows": 3}


def test_an_asset_key_or_partition_that_is_no_slug_writes_nothing(tmp_path):
    evil = dg.StaticPartitionsDefinition(["../../evil"])

    @dg.asset(partitions_def=evil)
    def numbers() -> pl.DataFrame:
        return sample_frame(3)

    store = FrameStore(base_dir=str(tmp_path / "assets"))
    result = dg.materialize(
        [numbers],
        resources={"io_manager": store},
        partition_key="../../evil",
        raise_on_error=False,
    )

    assert not result.success
    assert [path for path in Path(tmp_path).rglob("*") if path.is_file()] == []


# Object storage


def test_assets_keep_and_load_their_values_in_object_storage(bucket):
    store = FrameStore(base_dir=f"{bucket}/assets/")
    result = dg.materialize([numbers, total], resources={"io_manager": store})

    assert result.success
    assert read_value(UPath(f"{bucket}/assets/numbers.parquet")).equals(sample_frame(3))
    assert read_value(UPath(f"{bucket}/assets/total.parquet")) == {"rows": 3}
    assert sorted(S3FileSystem().find("bucket")) == [
        "bucket/team/assets/numbers.parquet",
        "bucket/team/assets/total.parquet",
    ]


def test_a_value_of_an_earlier_run_is_loaded_from_object_storage(bucket):
    resources = {"io_manager": FrameStore(base_dir=bucket)}
    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([numbers], resources=resources, instance=instance)
        result = dg.materialize(
            [numbers, total], resources=resources, instance=instance, selection="total"
        )

    assert result.output_for_node("total") == {"rows": 3}


def test_a_damaged_value_in_object_storage_stops_what_reads_it(bucket):
    resources = {"io_manager": FrameStore(base_dir=bucket)}
    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([numbers], resources=resources, instance=instance)
        UPath(f"{bucket}/numbers.parquet").write_bytes(b"PAR1 half")
        with pytest.raises(PoolError, match=r"s3://bucket/team/numbers.parquet can't be read"):
            dg.materialize(
                [numbers, total], resources=resources, instance=instance, selection="total"
            )


def test_partitions_are_objects_below_their_asset(bucket):
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["one", "two"]))
    def parts() -> pl.DataFrame:
        return sample_frame(2)

    resources = {"io_manager": FrameStore(base_dir=bucket)}
    for key in ("one", "two"):
        dg.materialize([parts], resources=resources, partition_key=key)

    assert S3FileSystem().find("bucket") == [
        "bucket/team/parts/one.parquet",
        "bucket/team/parts/two.parquet",
    ]


def test_a_write_to_a_bucket_that_is_not_there_fails_and_makes_none(bucket):
    resources = {"io_manager": FrameStore(base_dir="s3://another/assets")}
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        dg.materialize([numbers], resources=resources)

    assert S3FileSystem().ls("") == ["bucket"]
