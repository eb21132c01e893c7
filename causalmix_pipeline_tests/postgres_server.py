"""A real PostgreSQL server in a folder of its own, for tests of the postgres profile."""

import glob
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Starts the server and ends it when standard input closes, also if the tests are killed.
_WATCHED = '"$@" & server=$!; cat > /dev/null; kill -INT $server; wait $server'


def postgres_folder() -> Path | None:
    """The folder of the server's programs, or None where there are none."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    newest = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda name: -_version(name))
    found = [f for f in (*folders, *map(Path, newest)) if (f / "postgres").exists()]
    return found[0] if found else None


def _version(name: str) -> float:
    try:
        return float(Path(name).parent.name)
    except ValueError:
        return 0.0


def _other_user() -> dict:
    """Arguments of `subprocess` to be another user than root, as which PostgreSQL doesn't run."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def postgres_server(password: str | None = None) -> Iterator[str]:
    """Start a server with an empty database `dagster`; yields its URL, with a password."""
    binaries, user = postgres_folder(), _other_user()
    assert binaries is not None, "look at postgres_folder() first, and skip"
    root = Path(tempfile.mkdtemp(prefix="causalmix-postgres-"))
    password, port = password or secrets.token_hex(16), free_port()
    try:
        (root / "password").write_text(password)
        if user:
            for path in (root, root / "password"):
                os.chown(path, user["user"], user["group"])
        options = ["--auth=scram-sha-256", "--username=team", f"--pwfile={root / 'password'}"]
        subprocess.run(
            [binaries / "initdb", "--no-sync", "--encoding=UTF8", "--locale=C", *options,
             "-D", root / "files"],
            check=True, capture_output=True, cwd=root, **user,
        )  # fmt: skip
        settings = ["fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories="]
        command = [binaries / "postgres", "-D", root / "files", "-p", str(port)]
        command += [part for setting in settings for part in ("-c", setting)]
        with (
            open(root / "log", "w") as log,
            subprocess.Popen(
                ["sh", "-c", _WATCHED, "sh", *command],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=root, **user,
            ) as server,
        ):  # fmt: skip
            try:
                address = f"team:{password}@127.0.0.1:{port}"
                _create_database(f"postgresql://{address}/postgres", server, root / "log")
                yield f"postgresql+psycopg2://{address}/dagster"
            finally:
                assert server.stdin is not None
                server.stdin.close()
                server.wait(60)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _create_database(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    import psycopg2

    ends = time.monotonic() + seconds
    while True:
        try:
            connection = psycopg2.connect(url)
            break
        except psycopg2.OperationalError:
            assert server.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE dagster")
    connection.close()
