"""The run store: finished proxy runs, and the inputs that workers read, by content hash.

One file per finished run, written under a temporary name, fsynced and renamed: a record is whole
or absent. A lock per run, held through `flock`, dies with its holder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from causalmix_pipeline.adapters.tokenizer import TokenStore
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by its whole new content: after a crash it holds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class EvalWindows:
    """Held-out text of each task, cut into windows.

    Attributes:
        windows: task to token ids; each shape (W, L + 1).
        n_bytes: task to UTF-8 bytes of the predicted tokens.
        unigram_nats: task to the entropy of its own token frequencies, nats per token: what no
            model without context can beat.
    """

    windows: dict[str, np.ndarray]
    n_bytes: dict[str, int]
    unigram_nats: dict[str, float]


@dataclass(frozen=True)
class RunStore:
    """Folder of finished runs and of what workers read.

    Attributes:
        root: holds `runs/`, `locks/`, `states/`, `tokens/`, `eval/`.
    """

    root: Path

    def path_of(self, key: str) -> Path:
        """Where the record of a run is kept."""
        return self.root / "runs" / key[:2] / f"{key}.json"

    def get(self, key: str) -> ProxyRecord | None:
        """Return the record of a finished run, or None.

        Raises:
            ProxyError: if the record's file is damaged or belongs to another spec.
        """
        path = self.path_of(key)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            sealed = json.loads(raw)
            record = ProxyRecord(**sealed["record"])
            if sealed["sha256"] != _seal(sealed["record"]):
                raise ValueError("its checksum differs")
        except (ValueError, TypeError, KeyError) as error:
            raise ProxyError(
                f"the record of proxy run {key} is damaged ({error}). Delete {path} to train it "
                "again."
            ) from error
        if record.key != key:
            raise ProxyError(f"{path} holds the record of run {record.key}. Delete it.")
        return record

    def put(self, record: ProxyRecord) -> None:
        """Keep the record of a finished run."""
        values = asdict(record)
        content = json.dumps({"record": values, "sha256": _seal(values)}, sort_keys=True, indent=1)
        write_atomically(self.path_of(record.key), content.encode())

    def missing(self, specs: Sequence[ProxySpec]) -> list[ProxySpec]:
        """The specs without a record, each once, in their order."""
        unique = {spec.key: spec for spec in specs}
        return [spec for key, spec in unique.items() if not self.path_of(key).exists()]

    @contextmanager
    def locked(self, keys: Sequence[str]) -> Iterator[None]:
        """Hold the locks of runs; waits while another process trains one of them."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        held = []
        try:
            # Sorted, so that two processes never wait for each other.
            for key in sorted(set(keys)):
                handle = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
                held.append(handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            for handle in held:
                os.close(handle)

    def put_state(self, state_hash: str, documents: dict[str, np.ndarray]) -> None:
        """Keep a pool state: document ids (ASCII bytes) by domain, in reading order.

        Ids, not positions: a pool that grew gives its documents other positions, and a state of
        the old documents keeps its hash.
        """
        path = self.root / "states" / f"{state_hash}.npz"
        if not path.exists():
            arrays = {f"d{i:05d}": ids for i, ids in enumerate(documents.values())}
            _save_arrays(path, arrays)

    def state(self, state_hash: str) -> list[np.ndarray]:
        """Ids of a pool state's documents in reading order, a domain each."""
        with np.load(self.root / "states" / f"{state_hash}.npz") as arrays:
            return [arrays[name] for name in sorted(arrays.files)]

    def put_eval(self, eval_hash: str, evaluation: EvalWindows) -> None:
        """Keep the evaluation windows."""
        path = self.root / "eval" / f"{eval_hash}.npz"
        if path.exists():
            return
        tasks = list(evaluation.windows)
        numbers = [[evaluation.n_bytes[t], evaluation.unigram_nats[t]] for t in tasks]
        arrays = {f"w{i:03d}": evaluation.windows[t] for i, t in enumerate(tasks)}
        _save_arrays(path, {**arrays, "tasks": np.array(tasks), "numbers": np.array(numbers)})

    def evaluation(self, eval_hash: str) -> EvalWindows:
        """Read the evaluation windows."""
        with np.load(self.root / "eval" / f"{eval_hash}.npz") as arrays:
            tasks = arrays["tasks"].tolist()
            numbers = arrays["numbers"]
            return EvalWindows(
                windows={t: arrays[f"w{i:03d}"] for i, t in enumerate(tasks)},
                n_bytes={t: int(numbers[i, 0]) for i, t in enumerate(tasks)},
                unigram_nats={t: float(numbers[i, 1]) for i, t in enumerate(tasks)},
            )

    def token_store(self, tokens_hash: str) -> TokenStore:
        """The token store of that name."""
        return TokenStore(self.root / "tokens" / tokens_hash)


def _seal(values: dict) -> str:
    """Checksum of a record's values: a changed digit would otherwise be read as an outcome."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed loss in nats as bits per UTF-8 byte."""
    return nats / math.log(2) / n_bytes
