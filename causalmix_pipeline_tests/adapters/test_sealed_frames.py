"""Sealed values come back as they were or not at all: kills, flipped bits, foreign files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from upath import UPath

from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value, write_value
from causalmix_pipeline.core.errors import PoolError


def sample_frame(n: int = 200, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "text": [f"döc {i}" if i % 7 else None for i in range(n)],
            "value": rng.normal(size=n),
            "count": rng.integers(0, 9, n),
            "flag": rng.random(n) > 0.5,
            "shares": [[float(i), 1.0][: i % 3] if i % 5 else None for i in range(n)],
        }
    )


COLUMNS = {
    "text": st.text(max_size=8) | st.none(),
    "value": st.floats(allow_nan=False) | st.none(),
    "count": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "flag": st.booleans() | st.none(),
}
SCHEMA = {"text": pl.String, "value": pl.Float64, "count": pl.Int64, "flag": pl.Boolean}


@settings(
    max_examples=40,
    deadline=None,  # a flush waits for the disk
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.fixed_dictionaries(COLUMNS), max_size=6))
def test_a_frame_comes_back_as_it_was(tmp_path, rows):
    frame = pl.DataFrame(rows, schema=SCHEMA)

    write_value(tmp_path / "a.parquet", frame)

    assert_frame_equal(read_value(tmp_path / "a.parquet"), frame)


def test_lists_nan_and_nothing_come_back_as_they_were(tmp_path):
    for frame in (sample_frame(), pl.DataFrame({"x": [float("nan"), None, -0.0]}), sample_frame(0)):
        write_value(tmp_path / "a.parquet", frame)
        assert_frame_equal(read_value(tmp_path / "a.parquet"), frame)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None], "é": {"b": True}}, ["x", 1], {}])
def test_a_dictionary_or_list_comes_back_as_it_was(tmp_path, value):
    write_value(tmp_path / "a.parquet", value)

    assert read_value(tmp_path / "a.parquet") == value


def test_any_parquet_reader_reads_the_frame_and_its_schema(tmp_path):
    write_value(tmp_path / "a.parquet", sample_frame())

    assert_frame_equal(pl.read_parquet(tmp_path / "a.parquet"), sample_frame())
    assert (
        '"value": "Float64"' in pl.read_parquet_metadata(tmp_path / "a.parquet")["causalmix.schema"]
    )


@pytest.mark.parametrize("value", [3, "text", None, np.zeros(3)])
def test_a_value_of_another_kind_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match=f"got {type(value).__name__}"):
        write_value(tmp_path / "a.parquet", value)
    assert list(tmp_path.iterdir()) == []


def test_a_column_of_another_kind_is_refused_by_its_name():
    with pytest.raises(TypeError, match="column when"):
        content_digest(pl.DataFrame({"when": [0]}, schema={"when": pl.Date}))


def test_a_failed_write_leaves_the_old_value_and_no_rubbish(tmp_path):
    write_value(tmp_path / "a.parquet", {"old": 1})

    with pytest.raises(TypeError):
        write_value(tmp_path / "a.parquet", {"new": {1, 2}})

    assert read_value(tmp_path / "a.parquet") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_the_digest_is_that_of_the_content_not_of_the_layout():
    frame = sample_frame()
    pieces = pl.concat([frame[:50], frame[50:]], rechunk=False)

    assert content_digest(pieces) == content_digest(frame)
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.with_columns(value=pl.col("value") + 1e-12),
        lambda f: f.with_columns(text=pl.col("text").fill_null("")),
        lambda f: f.with_columns(count=pl.col("count").cast(pl.Int32)),
        lambda f: f.rename({"count": "n"}),
        lambda f: f.reverse(),
        lambda f: f[:-1],
        lambda f: f.with_columns(shares=pl.col("shares").list.reverse()),
        lambda f: f.with_columns(shares=pl.col("shares").fill_null([])),
    ],
)
def test_any_change_of_content_changes_the_digest(change):
    assert content_digest(change(sample_frame())) != content_digest(sample_frame())


def test_text_that_moves_between_rows_changes_the_digest():
    """Lengths count: the bytes of all rows together are the same here."""
    first, second = pl.DataFrame({"t": ["ab", "c"]}), pl.DataFrame({"t": ["a", "bc"]})

    assert content_digest(first) != content_digest(second)


@pytest.mark.filterwarnings("default")
def test_a_flipped_bit_is_never_read_as_another_value(tmp_path, capfd):
    """Polars reads many of these without complaint; a page holds no checksum of its own."""
    frame, path = sample_frame(), tmp_path / "a.parquet"
    write_value(path, frame)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    caught = silent_in_polars = 0
    for position in rng.choice(len(raw), 60, replace=False):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert_frame_equal(read_value(path), frame)
        except PoolError as error:
            assert str(path) in str(error)
            caught += 1
            silent_in_polars += "digest" in str(error)
    capfd.readouterr()  # what polars says of a panic
    assert caught >= 30  # the rest sits where no reader looks, and gave the value as it was
    assert silent_in_polars >= 1


def test_a_file_without_a_digest_is_refused(tmp_path):
    sample_frame().write_parquet(tmp_path / "a.parquet")

    with pytest.raises(PoolError, match=r"digest None.*materialise the asset a again"):
        read_value(tmp_path / "a.parquet")


def test_a_missing_value_says_which_asset_to_materialise(tmp_path):
    with pytest.raises(FileNotFoundError, match="materialise the asset run_table first"):
        read_value(tmp_path / "run_table.parquet")


WRITER = """
import sys
from pathlib import Path
import numpy as np, polars as pl
from causalmix_pipeline.adapters.sealed_frames import write_value
n = 0
while True:
    n += 1
    frame = pl.DataFrame({"n": np.full(200_000, n), "x": np.random.default_rng(n).random(200_000)})
    write_value(Path(sys.argv[1]), frame)
    print(n, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_value(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline()  # it wrote once
        ends = time.monotonic() + float(rng.uniform(0.5, 1.5))
        while time.monotonic() < ends:  # a reader never sees half of a value either
            assert read_value(path)["n"].n_unique() == 1
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()

        assert read_value(path)["n"].n_unique() == 1

    write_value(path, {"done": True})
    assert [left.name for left in tmp_path.iterdir()] == ["a.parquet"]


def test_the_unfinished_file_of_a_living_writer_is_left_alone(tmp_path):
    mine = tmp_path / f".a.parquet.{os.getppid()}.tmp"
    mine.write_text("half")

    write_value(tmp_path / "a.parquet", {})

    assert mine.exists()


# Object storage


def test_values_in_object_storage_come_back_as_they_were(bucket):
    frame, path = sample_frame(), UPath(f"{bucket}/a.parquet")

    for value in (frame, {"a": [1, None]}, ["x"]):
        write_value(path, value)
        back = read_value(path)
        assert back.equals(value) if value is frame else back == value


def test_a_flipped_bit_in_object_storage_is_refused_with_the_url(bucket):
    path = UPath(f"{bucket}/a.parquet")
    write_value(path, sample_frame())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4] ^= 1
    path.write_bytes(bytes(raw))

    with pytest.raises(PoolError, match=r"s3://bucket/team/a.parquet .*materialise the asset a"):
        read_value(path)


def test_a_missing_object_says_which_asset_to_materialise(bucket):
    with pytest.raises(FileNotFoundError, match=r"s3://.*materialise the asset run_table first"):
        read_value(UPath(f"{bucket}/run_table.parquet"))


def test_a_value_of_another_kind_writes_no_object(bucket):
    path = UPath(f"{bucket}/a.parquet")
    with pytest.raises(TypeError, match="got int"):
        write_value(path, 3)  # pyright: ignore[reportArgumentType]

    assert not path.exists()
