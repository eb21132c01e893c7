"""The files of a pool are found wherever it is, and none is left out in silence."""

from __future__ import annotations

import gzip
import json
import os
import zlib

import pytest
import zstandard

from causalmix_pipeline.adapters.pool_files import open_plain, pool_files, pool_fingerprint
from causalmix_pipeline.adapters.pool_reader import ColumnMap, read_pool
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline_tests.adapters.s3_server import s3_environment, s3_server


def put(root, *names: str, content: bytes = b'{"text": "a"}') -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(location) -> list[str]:
    return [file.name for file in pool_files(location)]


# Folders, files and patterns


def test_hidden_unfinished_and_other_files_are_left_out(tmp_path):
    put(tmp_path, "a/x.jsonl", "a/.x.jsonl", ".cache/x.jsonl", "a/x.jsonl.part", "a/notes.txt")
    put(tmp_path, "a/x.gz", "a/x.parquet.gz", "a/.hidden/x.csv")

    assert names(tmp_path) == ["a/x.jsonl"]


def test_a_file_is_known_by_its_endings(tmp_path):
    known = {
        "a.jsonl": ("jsonl", None),
        "b.jsonl.gz": ("jsonl", "gzip"),
        "c.jsonl.zst": ("jsonl", "zstd"),
        "d.v2.csv": ("csv", None),
        "e.csv.gz": ("csv", "gzip"),
        "f.csv.zst": ("csv", "zstd"),
        "g.parquet": ("parquet", None),
        "h.arrow": ("arrow", None),
        "i.feather": ("arrow", None),
    }
    put(tmp_path, *known)
    files = pool_files(tmp_path)

    assert {file.name: (file.format, file.compression) for file in files} == known
    assert [file.stem for file in files] == ["a", "b", "c", "d.v2", *"efghi"]


def test_a_single_file_is_a_pool(tmp_path):
    put(tmp_path, "math/x.jsonl", "math/y.jsonl")
    (file,) = pool_files(str(tmp_path / "math/x.jsonl"))

    assert (file.name, file.folder, file.stem) == ("x.jsonl", "math", "x")


def test_a_pattern_chooses_files_and_names_them_below_its_fixed_part(tmp_path):
    put(tmp_path, "math/x.jsonl", "math/y.csv", "code/x.jsonl", "code/deep/x.jsonl")

    assert names(tmp_path / "*/*.jsonl") == ["code/x.jsonl", "math/x.jsonl"]
    assert len(names(tmp_path / "**/*.jsonl")) == 3
    with pytest.raises(PoolError, match="nor a file or pattern of files"):
        pool_files(tmp_path / "*/*.parquet")


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    put(tmp_path, "data[1]/x.jsonl")

    assert names(tmp_path / "data[1]") == ["x.jsonl"]


@pytest.mark.parametrize("location", ["absent", "absent/x.jsonl", "file:///absent/pool"])
def test_a_location_that_is_not_there_is_refused(tmp_path, location):
    path = location if "://" in location else tmp_path / location

    with pytest.raises(PoolError, match=r"pools: .*absent.* is not a folder.* Check `pools`"):
        pool_files(path)


def test_an_empty_folder_is_refused(tmp_path):
    put(tmp_path, "a/notes.txt")
    (tmp_path / "folder.jsonl").mkdir()

    with pytest.raises(PoolError, match=r"holds no \.jsonl or \.parquet file.*Put documents there"):
        pool_files(tmp_path)


# Datasets saved by Hugging Face


def save_dataset(path, texts: list[str], **options) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(path, **options)


def test_a_saved_dataset_is_read_by_its_own_list_and_not_its_caches(tmp_path):
    save_dataset(tmp_path / "set", [f"text {i}" for i in range(10)], num_shards=3)
    put(tmp_path, "set/cache-1234.arrow", "set/left-over.arrow")
    documents = read_pool(tmp_path / "set", ColumnMap()).documents

    assert names(tmp_path) == [f"set/data-0000{i}-of-00003.arrow" for i in range(3)]
    assert sorted(documents["text"]) == [f"text {i}" for i in range(10)]


def test_all_splits_of_a_saved_dataset_are_read(tmp_path):
    import datasets

    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(3)]})
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")

    documents = read_pool(tmp_path, ColumnMap()).documents

    assert documents["domain"].to_list() == ["test"] * 3 + ["train"] * 3


def test_a_shard_or_split_that_is_gone_is_named(tmp_path):
    save_dataset(tmp_path / "set/train", ["a", "b"], num_shards=2)
    (tmp_path / "set/train/data-00001-of-00002.arrow").unlink()
    put(tmp_path, "set/dataset_dict.json", content=b'{"splits": ["train", "test"]}')
    pool = read_pool(tmp_path, ColumnMap())

    assert pool.documents["text"].to_list() == ["a"]
    assert pool.quarantine["file"].to_list() == [
        "set/test/state.json",
        "set/train/data-00001-of-00002.arrow",
    ]
    assert pool.quarantine["reason"].str.contains("No such file").all()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"_data_files": [{"filename": "../x.arrow"}]}', b"[" * 99999]
)
def test_a_damaged_list_is_named_and_the_shards_are_read_without_it(tmp_path, content):
    save_dataset(tmp_path / "set", ["a"])
    put(tmp_path, "set/state.json", content=content)
    put(tmp_path, "set/cache-12.arrow", "set/indices.arrow")
    pool = read_pool(tmp_path, ColumnMap())

    assert pool.documents["text"].to_list() == ["a"]
    assert pool.quarantine["file"].to_list() == ["set/state.json"]


# Fingerprint


def test_the_fingerprint_follows_names_and_contents_alone(tmp_path):
    put(tmp_path, "a/x.jsonl")
    before = pool_fingerprint(tmp_path)
    os.utime(tmp_path / "a/x.jsonl", (1, 1))
    put(tmp_path, "a/.hidden.jsonl")
    assert pool_fingerprint(tmp_path) == before

    put(tmp_path, "a/x.jsonl", content=b"two")
    changed = pool_fingerprint(tmp_path)
    (tmp_path / "a/x.jsonl").rename(tmp_path / "a/y.jsonl")

    assert len({before, changed, pool_fingerprint(tmp_path)}) == 3


def test_names_that_are_not_utf8_have_their_own_fingerprints(tmp_path):
    for name, folder in ((b"caf\xe9", "one"), (b"caf\xe8", "two")):
        os.makedirs(os.fsencode(tmp_path / folder) + b"/" + name)
        with open(os.fsencode(tmp_path / folder) + b"/" + name + b"/x.jsonl", "wb") as file:
            file.write(b"{}")

    assert names(tmp_path / "one") == names(tmp_path / "two") == ["caf?/x.jsonl"]
    assert pool_fingerprint(tmp_path / "one") != pool_fingerprint(tmp_path / "two")


# Compressed files


def read_all(path, ratio: float = 200.0) -> bytes:
    (file,) = pool_files(path)
    with open_plain(file, max_decompression_ratio=ratio) as lines:
        return b"".join(lines)


PACK = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("ending", PACK)
def test_parts_packed_one_after_another_are_one_file(tmp_path, ending):
    packed = PACK[ending](b"one\n") + PACK[ending](b"two\n")
    put(tmp_path, f"x.jsonl.{ending}", content=packed)

    assert read_all(tmp_path) == b"one\ntwo\n"


@pytest.mark.parametrize("ending", PACK)
def test_lines_before_the_cut_of_a_packed_file_are_read(tmp_path, ending):
    rows = [os.urandom(50).hex().encode() + b"\n" for _ in range(5000)]
    packed = PACK[ending](b"".join(rows))
    put(tmp_path, f"x.jsonl.{ending}", content=packed[: len(packed) * 9 // 10])
    (file,) = pool_files(tmp_path)
    kept = []
    lines = open_plain(file, max_decompression_ratio=200.0)
    with pytest.raises(OSError, match="Truncated"):
        while True:
            kept.append(lines.readline())
    lines.close()

    assert kept == rows[: len(kept)]
    assert len(kept) > 1000


@pytest.mark.parametrize("ending", PACK)
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, ending):
    piece = b"0" * 2**20
    if ending == "gz":
        packer = zlib.compressobj(9, wbits=31)
        packed = b"".join(packer.compress(piece) for _ in range(300)) + packer.flush()
    else:
        packed = zstandard.compress(piece * 300)
    put(tmp_path, f"x.jsonl.{ending}", content=packed)

    with pytest.raises(OSError, match=r"more than 200 times its bytes \((\d{8}) from"):
        read_all(tmp_path)


def test_a_small_file_that_packs_well_is_no_bomb(tmp_path):
    content = b"the same line\n" * 100_000
    put(tmp_path, "x.jsonl.gz", content=gzip.compress(content))

    assert read_all(tmp_path) == content


def test_an_empty_packed_file_is_no_packed_file(tmp_path):
    put(tmp_path, "x.jsonl.gz", content=b"")

    with pytest.raises(OSError, match="an empty file is no gzip stream"):
        read_all(tmp_path)


# Object storage


@pytest.fixture
def bucket(monkeypatch):
    import fsspec

    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        storage = fsspec.filesystem("s3")
        storage.mkdir("bucket")
        yield storage


def test_folders_files_and_patterns_of_object_storage(bucket):
    for key in ("pool/math/x.jsonl", "pool/co de/y.csv.gz", "pool/.tmp/z.jsonl", "pool/read.me"):
        bucket.pipe_file(f"bucket/{key}", b'{"text": "a"}')

    assert (
        names("s3://bucket/pool")
        == names("s3://bucket/pool/")
        == ["co de/y.csv.gz", "math/x.jsonl"]
    )
    assert names("s3://bucket/pool/*/*.jsonl") == ["math/x.jsonl"]
    (file,) = pool_files("s3://bucket/pool/math/x.jsonl")
    assert (file.name, file.folder, file.size) == ("x.jsonl", "math", 13)
    with file.open() as raw:
        assert json.loads(raw.read()) == {"text": "a"}
    with pytest.raises(PoolError, match="s3://bucket/absent is not a folder"):
        pool_files("s3://bucket/absent")


def test_a_change_of_object_storage_is_seen_by_the_same_process(bucket):
    """The change comes from another client, as another machine's does: no cache knows of it."""
    import fsspec

    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket.pipe_file("bucket/pool/x.jsonl", b"one")
    before = pool_fingerprint("s3://bucket/pool")
    assert pool_fingerprint("s3://bucket/pool") == before

    bucket.pipe_file("bucket/pool/x.jsonl", b"two")
    changed = pool_fingerprint("s3://bucket/pool")
    bucket.pipe_file("bucket/pool/y.jsonl", b"two")

    assert len({before, changed, pool_fingerprint("s3://bucket/pool")}) == 3
