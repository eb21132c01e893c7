"""What must stay closed: ports, secrets, pickles of others, files outside of a pool."""

import ast
import base64
import gzip
import json
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import polars as pl
import psutil
import pytest
import yaml
import zstandard

from causalmix_pipeline.adapters.pool_files import pool_files
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.score_store import ScoreStore, _name_of
from causalmix_pipeline.adapters.sealed_frames import read_value, write_value
from causalmix_pipeline.automation.alerts import alert_log, look_for_alerts, make_alert
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.adapters.s3_server import s3_environment, s3_server
from causalmix_pipeline_tests.postgres_server import free_port, postgres_folder, postgres_server
from causalmix_pipeline_tests.test_cli import call

PACKAGE = Path(__file__).parents[1] / "causalmix_pipeline"

#: Part of every secret that is planted.
CANARY = "c4n4ryS3CRETc4n4ry"
FORMS = [CANARY.encode(), CANARY[::-1].encode()] + [
    # As base64 wherever it begins within a text; the ends depend on what stands beside.
    base64.b64encode(b"x" * shift + CANARY.encode())[4:-4]
    for shift in range(3)
]


# ---------------------------------------------------------------------------- finding a canary


def decoded(content: bytes, name: str = "") -> Iterator[bytes]:
    """A file's bytes, as they are and unpacked in all ways that this project packs."""
    yield content
    if name.endswith(".gz"):
        yield gzip.decompress(content)
    if name.endswith(".zst"):
        yield zstandard.ZstdDecompressor().stream_reader(content).read()
    if content[:4] == b"PAR1":
        yield str(pl.read_parquet(content).to_dicts()).encode()
    for start in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", content):  # Dagster packs snapshots so
        try:
            yield zlib.decompressobj().decompress(content[start.start() :], 2**24)
        except zlib.error:
            continue
    for packed in re.findall(rb"\\x([0-9a-f]{40,})", content):  # binary columns of a dump
        yield from decoded(bytes.fromhex(packed.decode()))


def holds_canary(content: bytes, name: str = "") -> bool:
    return any(form in text for text in decoded(content, name) for form in FORMS)


def files_with_canary(root: Path) -> list[str]:
    found = []
    for path in root.rglob("*"):
        if path.is_file() and holds_canary(path.read_bytes(), path.name):
            found.append(str(path.relative_to(root)))
        if path.suffix == ".db":
            with sqlite3.connect(path) as database:
                rows = "\n".join(database.iterdump()).encode()
            database.close()
            found += [f"{path.name} (rows)"] if holds_canary(rows) else []
    return found


def test_the_search_finds_a_canary_in_every_packing(tmp_path):
    text = f"some text {CANARY} and more".encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    write_value(tmp_path / "d.parquet", pl.DataFrame({"x": [text.decode()] * 300}))
    (tmp_path / "e.bin").write_bytes(b"abc" + zlib.compress(text) + b"def")
    (tmp_path / "f.txt").write_bytes(base64.b64encode(b"y" + text))
    with sqlite3.connect(tmp_path / "g.db") as database:
        database.execute("CREATE TABLE t (body TEXT)")
        database.execute("INSERT INTO t VALUES (?)", ("z" * 4000 + CANARY + "z" * 9000,))
    database.close()
    (tmp_path / "h.sql").write_text(f"INSERT \\x{zlib.compress(text).hex()}")
    (tmp_path / "clean.txt").write_text("c4n4ry")

    assert {name[0] for name in files_with_canary(tmp_path)} == set("abcdefgh")


# ---------------------------------------------------------------------------- secrets


@pytest.fixture
def secrets(project_file, monkeypatch):
    """A project with secrets for PostgreSQL, S3 and a webhook that doesn't answer; its services.

    Yields the settings file and the URL of the database.
    """
    if postgres_folder() is None:
        pytest.skip("needs PostgreSQL's programs, on PATH or below /usr/lib/postgresql")
    from s3fs import S3FileSystem

    with postgres_server(f"{CANARY}-db") as url, s3_server() as endpoint:
        environment = s3_environment(endpoint) | {
            "AWS_SECRET_ACCESS_KEY": f"{CANARY}-s3",
            "AWS_SESSION_TOKEN": f"{CANARY}-token",
            "AWS_MAX_ATTEMPTS": "1",
            "TEAM_POSTGRES": url,
            "TEAM_HOOK": f"http://127.0.0.1:{free_port()}/hook/{CANARY}",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir("bucket")
        raw = yaml.safe_load(project_file.read_text())
        raw |= {
            "storage": "s3://bucket/team",
            "instance": {"storage": "postgres", "postgres_env": "TEAM_POSTGRES"},
            "alerts": {"webhook_env": "TEAM_HOOK"},
        }
        project_file.write_text(yaml.safe_dump(raw))
        yield project_file, url


def dumped(url: str) -> bytes:
    """Everything that a database holds, as SQL."""
    binary = postgres_folder()
    assert binary is not None
    parts = urlsplit(url)
    address = ["-h", str(parts.hostname), "-p", str(parts.port), "-U", str(parts.username)]
    command = [binary / "pg_dump", *address, "-d", parts.path[1:]]
    environment = os.environ | {"PGPASSWORD": str(parts.password)}
    return subprocess.run(command, capture_output=True, check=True, env=environment).stdout


def uploaded() -> Iterator[tuple[str, bytes]]:
    """Every object in the bucket."""
    from s3fs import S3FileSystem

    files = S3FileSystem()
    for name in files.find("bucket"):
        yield name, files.cat_file(name)


@pytest.mark.timeout(600)
def test_secrets_of_the_environment_reach_no_file_table_object_or_message(secrets, monkeypatch):
    """Also where the webhook, the object store and the database fail."""
    config, url = secrets
    settings = load_settings(config)
    monkeypatch.chdir(config.parent)  # so that traces are kept there
    status, printed = call("plan", "--config", str(config))
    assert status == 0, printed
    with ensure_instance(settings.data_path, settings.instance) as instance:
        printed += instance.info_str()
        alert = make_alert(settings, "run_failure", "1", "Failed.", run_id=None, details={})
        alert_log(settings).write(alert)
        problems = look_for_alerts(instance, settings, [], None)[2]
        assert "wasn't handed over" in problems[0]
        runs = instance.get_runs()
        assert runs
        printed += problems[0] + str([run.tags for run in runs])
    for command in ("status", "doctor"):
        printed += call(command, "--config", str(config))[1]
    objects = list(uploaded())
    tables = dumped(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    clear_s3()
    status, text = call("plan", "--config", str(config))
    assert status != 0
    printed += text
    tables += dumped(url)
    assert "EndpointConnectionError" in call("doctor", "--config", str(config))[1]
    monkeypatch.setenv("TEAM_POSTGRES", url.rpartition(":")[0] + ":1/dagster")
    for command in ("plan", "status", "doctor"):
        status, text = call(command, "--config", str(config))
        assert status == 2 and "127.0.0.1:1/dagster" in "".join(text.split()), text
        printed += text

    assert len(objects) > 5 and b"ASSET_MATERIALIZATION" in tables
    assert [name for name, content in objects if holds_canary(content, name)] == []
    assert not holds_canary(tables)
    assert files_with_canary(config.parent) == []
    assert not holds_canary("".join(printed.split()).encode())


def clear_s3() -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


# ---------------------------------------------------------------------------- the UI


def wait_for_port(port: int, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5).close()
        except OSError:
            assert process.poll() is None and time.monotonic() < ends, log.read_text()[-3000:]
            time.sleep(0.3)


def ask(port: int, query: str) -> str:
    """The answer of the UI's own interface."""
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.timeout(300)
def test_the_ui_listens_on_this_machine_alone_and_shows_no_secret(secrets):
    config, _ = secrets
    port, log = free_port(), config.parent / "ui.log"
    command = [sys.executable, "-m", "causalmix_pipeline.cli", "ui", "--port", str(port)]
    with open(log, "w") as sink:
        process = subprocess.Popen(
            [*command, "--config", str(config)], cwd=config.parent, stdout=sink, stderr=sink
        )
    family: list[psutil.Process] = []
    try:
        wait_for_port(port, process, log)
        answer = ask(port, "{instance {info} version}")
        assert "PostgresRunStorage" in answer
        main = psutil.Process(process.pid)
        family = [main, *main.children(recursive=True)]
        listening = {
            (place.laddr.ip, place.laddr.port)
            for member in family
            for place in member.net_connections(kind="inet")
            if place.status == psutil.CONN_LISTEN
        }
        arguments = "\0".join(word for member in family for word in member.cmdline())
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(40)
        finally:
            for member in family:
                if member.is_running():
                    member.kill()
            process.wait(10)

    assert ("127.0.0.1", port) in listening
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1"}
    assert not holds_canary((answer + arguments).encode())
    assert files_with_canary(config.parent) == []


# ---------------------------------------------------------------------------- pickles


#: Reads and writes pickles of its own processes only, through their pipes.
MAY_PICKLE = {"adapters/local_workers.py"}
RISKY_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}


def risky(path: Path) -> list[str]:
    """Ways in a module to run what a file says."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            safe_torch = name == "torch.load" and options.get("weights_only") is True
            ends = name.endswith(("torch.load", "read_pickle", "to_pickle"))
            if name in RISKY_CALLS or (ends and not safe_torch):
                found.append(name)
            for option in ("allow_pickle", "trust_remote_code", "shell"):
                found += [option] if options.get(option) is True else []
    return found


def test_no_module_runs_what_a_file_says():
    risks = {str(p.relative_to(PACKAGE)): risky(p) for p in sorted(PACKAGE.rglob("*.py"))}

    assert {name for name, found in risks.items() if found} == MAY_PICKLE
    assert risks["adapters/local_workers.py"] == ["pickle"]


def test_the_search_for_risky_calls_finds_them(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import joblib\nfrom pickle import loads\neval('1')\nnp.load(f, allow_pickle=True)\n"
        "torch.load(f)\ntorch.load(f, weights_only=True)\nsubprocess.run('x', shell=True)\n"
        "np.load(f, allow_pickle=False)\n"
    )

    assert sorted(risky(path)) == sorted(
        ["joblib", "pickle", "eval", "allow_pickle", "torch.load", "shell"]
    )


class Bomb:
    """Makes a folder as soon as it is read as a pickle."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def array_with(bomb: Bomb, path: Path) -> bytes:
    """A NumPy archive whose array is made of pickles."""
    np.savez(path, d00000=np.array([bomb], dtype=object))
    return path.read_bytes()


def test_a_pickle_in_the_place_of_our_files_is_never_run(tmp_path):
    bomb = Bomb(tmp_path / "ran")
    content, archive = pickle.dumps(bomb), array_with(bomb, tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        (tmp_path / "ran").stat()
    store = RunStore(tmp_path / "store")
    key, state, tokens = "ab" + "0" * 14, "cd" + "0" * 14, "ef" + "0" * 14
    planted = {
        tmp_path / "assets" / "run_table.parquet": content,
        Path(store.path_of(key)): content,
        tmp_path / "store" / "states" / f"{state}.npz": archive,
        tmp_path / "store" / "evals" / f"{state}.npz": archive,
        tmp_path / "store" / "tokens" / tokens / "offsets.npy": content,
    }
    for path, what in planted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what)

    with pytest.raises(PoolError, match="can't be read"):
        read_value(tmp_path / "assets" / "run_table.parquet")
    for read in (
        lambda: store.get(key),
        lambda: store.state(state),
        lambda: store.evaluation(state),
        lambda: store.token_store(tokens).offsets(),
    ):
        with pytest.raises(Exception, match=r".+"):
            read()
    assert not (tmp_path / "ran").exists()


class _Scorer:
    """A scorer's name, all that is needed to look for its scores."""

    key = "some_scorer"


def test_a_pickle_among_the_scores_is_never_run(tmp_path):
    """Even under the name that its content asks for."""
    bomb = Bomb(tmp_path / "ran")
    content = pickle.dumps(bomb)
    store = ScoreStore(tmp_path / "scores")
    for name in (_name_of(content), "0" * 32):
        path = tmp_path / "scores" / _Scorer.key / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with pytest.raises(Exception, match=r".+"):
        store.read(_Scorer())  # type: ignore[arg-type]

    assert not (tmp_path / "ran").exists()


def test_a_bomb_goes_off_where_a_pickle_is_read(tmp_path):
    """So that the tests above say something."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").rmdir()
    array_with(Bomb(tmp_path / "ran"), tmp_path / "x.npz")
    np.load(tmp_path / "x.npz", allow_pickle=True)["d00000"]
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------- outside of a pool


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "a"}\n')


def test_a_link_out_of_the_pool_is_refused_and_one_within_it_is_read(tmp_path):
    pool = tmp_path / "pool"
    write(pool / "math/a.jsonl")
    (pool / "code").mkdir()
    (pool / "code/b.jsonl").symlink_to("../math/a.jsonl")
    assert [file.name for file in pool_files(pool)] == ["code/b.jsonl", "math/a.jsonl"]
    write(tmp_path / "secret.jsonl")

    for target in ("../../secret.jsonl", str(tmp_path / "secret.jsonl")):
        (pool / "code/c.jsonl").symlink_to(target)
        for location in (pool, pool / "*" / "*.jsonl"):
            with pytest.raises(PoolError, match=r"code/c.jsonl must be.*got a link to .*secret"):
                pool_files(location)
        (pool / "code/c.jsonl").unlink()


def test_a_folder_behind_a_link_isnt_read_and_a_linked_pool_is(tmp_path):
    write(tmp_path / "other/secret.jsonl")
    write(tmp_path / "pool/math/a.jsonl")
    (tmp_path / "pool/code").symlink_to(tmp_path / "other")
    (tmp_path / "live").symlink_to("pool")
    (tmp_path / "one.jsonl").symlink_to("other/secret.jsonl")

    assert [file.name for file in pool_files(tmp_path / "live")] == ["math/a.jsonl"]
    assert [file.name for file in pool_files(tmp_path / "one.jsonl")] == ["one.jsonl"]
    with pytest.raises(PoolError, match="got a link"):
        pool_files(tmp_path / "pool/**/*.jsonl")


def test_the_cache_of_hugging_face_is_read_though_its_files_are_links(tmp_path):
    write(tmp_path / "blobs/0a1b")
    (tmp_path / "snapshots/main/math").mkdir(parents=True)
    (tmp_path / "snapshots/main/math/a.jsonl").symlink_to("../../../blobs/0a1b")

    assert [file.name for file in pool_files(tmp_path / "snapshots/main")] == ["math/a.jsonl"]
