"""Whole files, on a disk and in a real object store: round trips, first writers, kills."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from causalmix_pipeline.adapters.blobs import (
    Blobs,
    LocalBlobs,
    ObjectBlobs,
    open_blobs,
    root_of,
    write_atomically,
)


@pytest.fixture(params=["disk", "object storage"])
def blobs(request, tmp_path) -> Blobs:
    """An empty root of each kind."""
    if request.param == "disk":
        return open_blobs(tmp_path / "root")
    return open_blobs(request.getfixturevalue("bucket"))


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    """Start a Python process on some code."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Both kinds


def test_a_file_is_read_as_it_was_written(blobs):
    for content in (b"one", b"", bytes(range(256)) * 100):
        blobs.write("runs/ab/x.json", content)
        assert blobs.read("runs/ab/x.json") == content


def test_a_missing_file_is_said_to_be_missing(blobs):
    assert not blobs.exists("runs/x")
    with pytest.raises(FileNotFoundError):
        blobs.read("runs/x")

    blobs.write("runs/x", b"1")

    assert blobs.exists("runs/x")


def test_the_first_writer_of_a_new_file_wins(blobs):
    blobs.write_new("a/x", b"first")
    blobs.write_new("a/x", b"second")

    assert blobs.read("a/x") == b"first"


def test_names_are_those_below_a_folder_at_any_depth(blobs):
    assert blobs.names("runs") == []

    for name in ("runs/b/2.json", "runs/a/1.json", "runs/3", "runs2/4", "other"):
        blobs.write(name, b"x")

    assert blobs.names("runs") == ["runs/3", "runs/a/1.json", "runs/b/2.json"]


def test_what_another_process_wrote_or_removed_is_seen_at_once(blobs):
    """A client that caches listings would not see it."""

    def elsewhere(action: str) -> None:
        code = f"import sys, fsspec; fs, path = fsspec.url_to_fs(sys.argv[1]); {action}"
        subprocess.run([sys.executable, "-c", code, str(blobs.place("a/x"))], check=True)

    blobs.write("a/y", b"2")
    assert blobs.names("a") == ["a/y"]
    elsewhere("fs.pipe_file(path, b'1')")
    written = blobs.names("a"), blobs.exists("a/x")
    elsewhere("fs.rm_file(path)")

    assert written == (["a/x", "a/y"], True)
    assert (blobs.names("a"), blobs.exists("a/x")) == (["a/y"], False)


def test_blobs_travel_to_a_worker(blobs):
    blobs.write("x", b"1")

    assert pickle.loads(pickle.dumps(blobs)).read("x") == b"1"


WRITER = """
import hashlib, sys
from causalmix_pipeline.adapters.blobs import open_blobs
blobs, n = open_blobs(sys.argv[1]), 0
while True:
    n += 1
    content = n.to_bytes(4, "big") * 2_000_000
    blobs.write("a/x", hashlib.sha256(content).digest() + content)
    print(n, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(blobs):
    for seconds in (0.05, 0.12, 0.3):
        with run_python(WRITER, blobs.root) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "1\n"
            time.sleep(seconds)
            writer.send_signal(signal.SIGKILL)

        content = blobs.read("a/x")
        assert hashlib.sha256(content[32:]).digest() == content[:32]
        assert len(content) == 32 + 8_000_000
        assert blobs.names("a") == ["a/x"]


# A disk


def test_a_local_root_may_be_a_path_a_string_or_a_file_url(tmp_path):
    for location in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert open_blobs(location) == LocalBlobs(tmp_path)
    assert root_of("data/runs") == Path("data/runs")


def test_an_unfinished_file_is_no_name(tmp_path):
    (tmp_path / f".x.json.{os.getpid()}.writing").write_bytes(b"half")
    write_atomically(tmp_path / "x.json", b"{}")
    (tmp_path / ".y.json.1.writing").write_bytes(b"half")

    assert LocalBlobs(tmp_path).names("") == ["x.json"]


# Object storage


def test_a_url_keeps_its_protocol_and_loses_its_last_slash():
    assert open_blobs("s3://bucket/a/b/") == ObjectBlobs("s3://bucket/a/b")
    assert ObjectBlobs("s3://bucket/a").place("x/y") == "s3://bucket/a/x/y"


def test_writers_at_the_same_moment_leave_the_content_of_the_first(bucket):
    code = (
        "import sys; from causalmix_pipeline.adapters.blobs import open_blobs\n"
        "blobs = open_blobs(sys.argv[1]); blobs.exists('x'); print('ready', flush=True)\n"
        "input(); blobs.write_new('x', sys.argv[2].encode()); print(blobs.read('x').decode())"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, bucket, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = {writer.communicate()[0] for writer in writers}

    assert len(seen) == 1


def test_a_refusal_for_another_reason_is_not_taken_for_a_first_writer(bucket):
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        open_blobs("s3://another/team").write_new("x", b"1")


def test_an_upload_in_parts_that_never_ended_is_no_object(bucket):
    import boto3

    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket="bucket", Key="team/a/x")["UploadId"]
    client.upload_part(
        Bucket="bucket", Key="team/a/x", UploadId=upload, PartNumber=1, Body=b"h" * 5 * 2**20
    )
    client.close()
    blobs = open_blobs(bucket)

    assert not blobs.exists("a/x")
    assert blobs.names("a") == []
    with pytest.raises(FileNotFoundError):
        blobs.read("a/x")


def test_a_file_sent_in_parts_is_read_as_it_was_written(bucket):
    """From 100 MB on, uploads and downloads go in parts."""
    blobs, content = open_blobs(bucket), os.urandom(2**20) * 101
    blobs.write("big", content)

    assert hashlib.sha256(blobs.read("big")).digest() == hashlib.sha256(content).digest()


# Several at once, moved, removed


def test_those_files_that_there_are_are_read_at_once(blobs):
    for i in range(30):
        blobs.write(f"runs/{i}", bytes([i]))

    found = blobs.read_those([f"runs/{i}" for i in (*range(25, 35), 3)])

    assert found == {f"runs/{i}": bytes([i]) for i in (25, 26, 27, 28, 29, 3)}
    assert blobs.read_those([]) == {}


def test_a_file_is_moved_to_a_new_folder_and_removed(blobs):
    blobs.write("runs/a", b"1")

    blobs.move("runs/a", "quarantine/b")

    assert not blobs.exists("runs/a")
    assert blobs.read("quarantine/b") == b"1"
    blobs.remove("quarantine/b")
    assert not blobs.exists("quarantine/b")
