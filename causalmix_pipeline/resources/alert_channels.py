"""Where alerts go: a line in `data/alerts.jsonl` always, a webhook and a command if they are set.

The file is the only record. An alert is written first, with `delivery: waiting` (or `off`). What
came of handing it over follows in a short line of kind `delivery` with the alert's id, so that a
process killed at any moment loses no alert, and sends one twice at most in the instant between an
answer and its line; receivers can tell by `id`.
"""

import http.client
import json
import math
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from causalmix_pipeline.resources.settings import Settings

#: Seconds that a webhook may take to answer, each time it is tried.
WEBHOOK_TIMEOUT_SECONDS = 10.0

#: A webhook is tried again at once this many times; it may just have been restarted.
WEBHOOK_RETRIES = 2

#: Seconds of a look after which no further alert is handed over. With one webhook (30 s) and one
#: command (15 s) that don't answer, the look still ends within the 60 s that Dagster gives it.
DELIVERY_SECONDS = 10.0

#: Bytes at the end of the file in which an alert is looked for before it is written again.
_TAIL_BYTES = 1 << 20

#: What is posted to: `user@` would be looked up as a part of the host's name.
_URL = re.compile(r"https?://[^/?#@\s]+([/?#]\S*)?", re.IGNORECASE)

SENT = "sent"


@dataclass
class Waiting:
    """An alert that someone has yet to get.

    Attributes:
        alert: as it was written.
        offset: where its line starts, in bytes.
        attempt: how often it was handed over in vain.
        channels: what came of it so far, by channel.
    """

    alert: dict[str, Any]
    offset: int
    attempt: int
    channels: dict[str, str]


@dataclass(frozen=True)
class AlertLog:
    """`alerts.jsonl`: appended to, never rewritten; a broken last line of a crash is passed over.

    Attributes:
        path: the file; it and its folder are made at the first write.
    """

    path: Path

    def write(self, alert: Mapping[str, Any]) -> bool:
        """Append an alert unless one with its id is among the newest; tell whether it was new."""
        newest = self._lines(self._size() - _TAIL_BYTES)
        if any(line.get("id") == alert["id"] for _, _, line in newest):
            return False
        self._append(alert)
        return True

    def note(self, waiting: Waiting, delivery: str) -> None:
        """Append what came of an alert: `sent`, `failed`, `given up` or `off`."""
        self._append(
            {
                "time": now(),
                "kind": "delivery",
                "id": waiting.alert["id"],
                "delivery": delivery,
                "attempt": waiting.attempt,
                "channels": waiting.channels,
            }
        )

    def waiting(self, offset: int) -> tuple[list[Waiting], int]:
        """Alerts from a place in the file on that are still to be handed over, oldest first.

        Args:
            offset: bytes to pass over; a file that is shorter was begun anew, and is read whole.

        Returns:
            The alerts, and where the last whole line ends, in bytes.
        """
        found: dict[str, Waiting] = {}
        offset = offset if offset <= self._size() else 0
        end = offset
        for start, stop, line in self._lines(offset):
            end = stop
            key, delivery = str(line.get("id")), line.get("delivery")
            if delivery == "waiting":
                found.setdefault(key, Waiting(line, start, 0, {}))
            elif line.get("kind") == "delivery" and key in found:
                found[key].attempt = int(line["attempt"])
                found[key].channels = dict(line["channels"])
                if delivery != "failed":
                    del found[key]
        return list(found.values()), end

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _lines(self, offset: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Start, end and content of each whole line from an offset on; {} for a broken one."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            start = max(offset, 0)
            file.seek(start)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return  # still being written
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = None
                end = start + len(raw)
                yield start, end, line if isinstance(line, dict) else {}
                start = end

    def _append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, ensure_ascii=True, allow_nan=False)
        with open(self.path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(f"{text}\n".encode("ascii"))  # one write: lines of two processes don't mix
            os.fsync(file.fileno())


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that aren't finite become text, long text is cut."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    text = str(value)
    return text if len(text) <= 2000 else f"{text[:2000]}..."


def deliver_waiting(log: AlertLog, settings: Settings, offset: int) -> tuple[int, list[str]]:
    """Hand over what waits, oldest first, and write down what came of it.

    A receiver that fails raises nothing: what it missed is tried again at the next look.

    Args:
        log: where alerts wait.
        settings: who gets them.
        offset: where the first alert may wait, in bytes.

    Returns:
        Where the first that still waits starts, in bytes; a sentence for each that failed, which
        never holds the URL.
    """
    waiting, end = log.waiting(offset)
    ends, told = time.monotonic() + DELIVERY_SECONDS, []
    left: list[int] = []
    for one in waiting:
        if time.monotonic() > ends:
            left.append(one.offset)
            continue
        one.channels |= _hand_over(one, settings)
        one.attempt += 1
        delivery = _outcome(one, settings)
        log.note(one, delivery)
        if delivery == "failed":
            left.append(one.offset)
        if delivery in ("failed", "given up"):
            what = ", ".join(f"{k}: {v}" for k, v in one.channels.items() if v != SENT)
            end_of = "given up" if delivery == "given up" else "tried again at the next look"
            told.append(f"An alert wasn't handed over ({what}); attempt {one.attempt}, {end_of}.")
    return min(left, default=end), told


def _outcome(one: Waiting, settings: Settings) -> str:
    if not settings.alerts.is_on:
        return "off"
    if all(state == SENT for state in one.channels.values()):
        return SENT
    return "given up" if one.attempt >= settings.alerts.attempts else "failed"


def _hand_over(one: Waiting, settings: Settings) -> dict[str, str]:
    """What came of each channel that is set and hasn't got the alert yet."""
    alerts, states = settings.alerts, {}
    body = json.dumps({k: v for k, v in one.alert.items() if k != "delivery"}).encode()
    if alerts.webhook_env and one.channels.get("webhook") != SENT:
        states["webhook"] = _post(alerts.webhook_url(), body, alerts.webhook_env)
    if alerts.command and one.channels.get("command") != SENT:
        states["command"] = _run(
            list(alerts.command), body, settings.root, alerts.command_timeout_seconds
        )
    return states


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive as a GET without the alert."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str | None, body: bytes, variable: str) -> str:
    """Post to a webhook; `sent`, or why not, without a word of the URL."""
    if url is None:
        return f"the environment variable {variable} isn't set"
    if not _URL.fullmatch(url):
        return f"the environment variable {variable} doesn't hold an http(s) URL without user@"
    opener = urllib.request.build_opener(_NoRedirect)
    state = ""
    for _ in range(1 + WEBHOOK_RETRIES):
        try:
            request = urllib.request.Request(
                url, body, {"Content-Type": "application/json"}, method="POST"
            )
            with opener.open(request, timeout=WEBHOOK_TIMEOUT_SECONDS):
                return SENT
        except urllib.error.HTTPError as error:
            error.close()
            state = f"HTTP status {error.code}"
        except urllib.error.URLError as error:
            state = _why(error.reason)
        except (OSError, http.client.HTTPException, ValueError) as error:
            state = _why(error)
    return state


def _why(error: Any) -> str:
    """The kind of an error, without its text, which may quote the URL."""
    if isinstance(error, ConnectionError | FileNotFoundError | PermissionError) and error.errno:
        return os.strerror(error.errno)
    return type(error).__name__


def _run(command: list[str], body: bytes, folder: Path, timeout: float) -> str:
    """Start a command with the alert on standard input; `sent`, or why it failed."""
    try:
        done = subprocess.run(
            command,
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"killed after {timeout:g} s"
    except (OSError, ValueError) as error:
        return _why(error)
    return SENT if done.returncode == 0 else f"exit status {done.returncode}"
