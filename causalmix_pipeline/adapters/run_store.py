"""The run store: finished proxy runs, and the inputs that workers read, by content hash.

One file per finished run, on a disk or in object storage: a record is whole or absent. A lock per
run, held through `flock`, dies with its holder. What was damaged since it was written is never read
as data: each file carries a SHA-256, or has it in a manifest beside it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import platform
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.blobs import Blobs, open_blobs, root_of, write_atomically
from causalmix_pipeline.adapters.tokenizer import MANIFEST, TokenBatch, TokenStore
from causalmix_pipeline.core.errors import DiskFullError, ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.tasks import HarnessTask, Question

logger = logging.getLogger(__name__)

#: What a token store is made of.
TOKEN_FILES = ("tokens.bin", "offsets.npy", "ids.txt")
#: What it has besides where prompts carry no loss.
PROMPT_FILE = "prompt.npy"


@dataclass(frozen=True)
class EvalWindows:
    """What runs are scored on: held-out text of tasks, cut into windows, and questions of others.

    Attributes:
        windows: task to token ids; each shape (W, L + 1).
        n_bytes: task to UTF-8 bytes of the predicted tokens.
        unigram_nats: task to the entropy of its own token frequencies, nats per token: what no
            model without context can beat.
        questions: task to its questions.
        harness: task to its place in the lm-evaluation-harness; for pretrained models only.
        tokenizer: the JSON of the pool's BPE, or the folder of the pretrained model, that made the
            token ids; "" where there are no questions.
    """

    windows: dict[str, np.ndarray]
    n_bytes: dict[str, int]
    unigram_nats: dict[str, float]
    questions: dict[str, list[Question]] = field(default_factory=dict)
    harness: dict[str, HarnessTask] = field(default_factory=dict)
    tokenizer: str = ""

    @property
    def names_folders(self) -> bool:
        """Whether it names folders, which may move while their content, and its hash, stay."""
        return bool(self.harness) or (self.tokenizer != "" and not self.tokenizer.startswith("{"))

    def questions_json(self) -> bytes:
        """Questions, harness tasks and tokenizer, as they are kept; the same bytes every time."""
        values = {
            "questions": {t: [asdict(q) for q in of] for t, of in self.questions.items()},
            "harness": {task: asdict(place) for task, place in self.harness.items()},
            "tokenizer": self.tokenizer,
        }
        return json.dumps(values, sort_keys=True).encode()


@dataclass(frozen=True)
class FailedRun:
    """Why a run was given up.

    Attributes:
        key: id of its spec.
        spec: the spec as plain values.
        reason: the error, in one paragraph.
        tries: how often it was tried, in all calls since it last had a record.
        versions: Python, the package and its libraries by name.
    """

    key: str
    spec: dict
    reason: str
    tries: int
    versions: dict[str, str]


@dataclass(frozen=True)
class RunStore:
    """Finished runs and what workers read, in a folder or below a URL.

    Attributes:
        root: folder or URL (`s3://bucket/folder`); holds `runs/`, `locks/`, `states/`, `tokens/`,
            `eval/`, and where something went wrong `failed/` and `quarantine/`.
        cache: folder on this machine for a root that is a URL: its token stores, which workers map
            into memory, and its locks. It may be deleted while nothing trains.
    """

    root: Path | str
    cache: Path = Path("~/.cache/causalmix")

    def __post_init__(self) -> None:
        """Take a local folder as a Path."""
        object.__setattr__(self, "root", root_of(self.root))

    @property
    def _blobs(self) -> Blobs:
        return open_blobs(self.root)

    @property
    def _local_root(self) -> Path:
        """The root, or what stands for it on this machine."""
        if isinstance(self.root, Path):
            return self.root
        return self.cache.expanduser() / hashlib.sha256(self.root.encode()).hexdigest()[:16]

    def path_of(self, key: str) -> Path | str:
        """Where the record of a run is kept: a file, or the URL of an object."""
        return self._blobs.place(_record_name(key))

    def place(self, folder: str) -> Path | str:
        """Where a folder of the store is, as a person would look for it."""
        return self._blobs.place(folder)

    def get(self, key: str) -> ProxyRecord | None:
        """Return the record of a finished run, or None.

        Raises:
            ProxyError: if the record's file is damaged or belongs to another spec.
        """
        path = self.path_of(key)
        try:
            raw = self._blobs.read(_record_name(key))
        except FileNotFoundError:
            return None
        try:
            values = _unsealed(raw, key)
        except ValueError as error:
            raise ProxyError(
                f"the record of proxy run {key} is damaged ({error}). Materialise proxy_runs "
                f"again, which moves {path} to quarantine/ and trains the run again."
            ) from error
        try:
            return ProxyRecord(**values)
        except TypeError as error:
            raise ProxyError(
                f"{path} was written by another version of this package ({error}). Use that "
                "version, or delete the file to train the run again."
            ) from error

    def put(self, record: ProxyRecord) -> None:
        """Keep the record of a finished run; in object storage, the first one that comes."""
        values = record.to_dict()
        content = json.dumps({"record": values, "sha256": _seal(values)}, sort_keys=True, indent=1)
        # Under a URL no lock spans machines: what was read once must not change.
        blobs = self._blobs
        write = blobs.write if isinstance(self.root, Path) else blobs.write_new
        write(_record_name(record.key), content.encode())
        shutil.rmtree(self.scratch(record.key), ignore_errors=True)

    def missing(self, specs: Sequence[ProxySpec]) -> list[ProxySpec]:
        """The specs without a sound record, each once, in their order: every one is verified."""
        unique = {_record_name(spec.key): spec for spec in specs}
        found = self._blobs.read_those(list(unique))
        return [
            spec
            for name, spec in unique.items()
            if name not in found or not _is_sound(found[name], spec.key)
        ]

    def quarantine_damaged(self, keys: Sequence[str]) -> None:
        """Move damaged records to `quarantine/`; hold the locks of the runs meanwhile."""
        names = {_record_name(key): key for key in keys}
        for name, raw in self._blobs.read_those(list(names)).items():
            if not _is_sound(raw, names[name]):
                place = f"quarantine/{names[name]}.{hashlib.sha256(raw).hexdigest()[:8]}.json"
                self._blobs.move(name, place)
                logger.warning(
                    "the record of proxy run %s was damaged: moved to %s, the run is trained again",
                    names[name],
                    self._blobs.place(place),
                )

    def put_failed(self, spec: ProxySpec, reason: str, tries: int) -> None:
        """Keep why a run was given up; it stays missing."""
        name = _failed_name(spec.key)
        before = self._failed(self._blobs.read_those([name]).get(name, b""))
        failed = FailedRun(
            spec.key, spec.to_dict(), reason, tries + (before.tries if before else 0), _versions()
        )
        self._blobs.write(name, json.dumps(asdict(failed), sort_keys=True, indent=1).encode())

    def failed(self, keys: Sequence[str]) -> dict[str, FailedRun]:
        """Those of the runs that were given up and have no record since, by key."""
        names = set(self._blobs.names("failed")) & {_failed_name(key) for key in keys}
        found = map(self._failed, self._blobs.read_those(sorted(names)).values())
        return {failed.key: failed for failed in found if failed is not None}

    def forget_failed(self, keys: Iterable[str]) -> None:
        """Remove why runs were given up: they have records now."""
        present = set(self._blobs.names("failed"))
        for name in map(_failed_name, keys):
            if name in present:
                self._blobs.remove(name)

    @staticmethod
    def _failed(raw: bytes) -> FailedRun | None:
        try:
            return FailedRun(**json.loads(raw))
        except (ValueError, TypeError):  # damaged: it only told why
            return None

    def n_records(self) -> int:
        """Number of finished runs."""
        return sum(name.endswith(".json") for name in self._blobs.names("runs"))

    def scratch(self, key: str) -> Path:
        """Folder on this machine for what an unfinished run keeps; removed with its record."""
        return self._local_root / "scratch" / key

    @contextmanager
    def disk_full_told(self) -> Iterator[None]:
        """Name the disk where a write inside finds it full.

        Raises:
            DiskFullError: in place of the system's error.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                f"the disk of {error.filename or self._local_root} is full ({error.strerror}). "
                "What was finished is kept and nothing is half-written: make room on it, or move "
                "data_dir to a larger disk, and start again to go on."
            ) from error

    @contextmanager
    def locked(self, keys: Sequence[str]) -> Iterator[None]:
        """Hold the locks of runs; waits while another process trains one of them.

        A root that is a URL is locked for this machine alone: two machines may train the same run
        twice. They compute the same, and the first record is kept.
        """
        folder = self._local_root / "locks"
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
        arrays = {f"d{i:05d}": ids for i, ids in enumerate(documents.values())}
        self._put_arrays(f"states/{state_hash}.npz", arrays)

    def state(self, state_hash: str) -> list[np.ndarray]:
        """Ids of a pool state's documents in reading order, a domain each.

        Raises:
            ProxyError: if the file is damaged.
        """
        arrays = self._arrays(f"states/{state_hash}.npz", "pool_states")
        return [arrays[name] for name in sorted(arrays)]

    def put_eval(self, eval_hash: str, evaluation: EvalWindows) -> None:
        """Keep the evaluation: its windows and questions."""
        tasks = list(evaluation.windows)
        numbers = [[evaluation.n_bytes[t], evaluation.unigram_nats[t]] for t in tasks]
        arrays = {f"w{i:03d}": evaluation.windows[t] for i, t in enumerate(tasks)}
        arrays |= {"tasks": np.array(tasks, "U"), "numbers": np.array(numbers)}
        if evaluation.questions or evaluation.harness:
            arrays["questions"] = np.frombuffer(evaluation.questions_json(), dtype=np.uint8)
        self._put_arrays(f"eval/{eval_hash}.npz", arrays, again=evaluation.names_folders)

    def evaluation(self, eval_hash: str) -> EvalWindows:
        """Read the evaluation.

        Raises:
            ProxyError: if the file is damaged.
        """
        arrays = self._arrays(f"eval/{eval_hash}.npz", "eval_tasks")
        tasks = arrays["tasks"].tolist()
        numbers = arrays["numbers"]
        return EvalWindows(
            windows={t: arrays[f"w{i:03d}"] for i, t in enumerate(tasks)},
            n_bytes={t: int(numbers[i, 0]) for i, t in enumerate(tasks)},
            unigram_nats={t: float(numbers[i, 1]) for i, t in enumerate(tasks)},
            **_questions_of(arrays["questions"].tobytes() if "questions" in arrays else b""),
        )

    def _arrays(self, name: str, asset: str) -> dict[str, np.ndarray]:
        """Read arrays whole, which verifies the checksum of each."""
        raw = self._blobs.read(name)
        try:
            _check_arrays(raw)
            with np.load(io.BytesIO(raw)) as arrays:
                return {member: arrays[member] for member in arrays.files}
        except _ARRAY_ERRORS as error:
            raise ProxyError(
                f"{self._blobs.place(name)} is damaged ({error}). Delete it and materialise "
                f"{asset} again; finished proxy runs stay."
            ) from error

    def _put_arrays(self, name: str, arrays: dict[str, np.ndarray], *, again: bool = False) -> None:
        """Keep arrays, unless they are there: names are content hashes."""
        if self._blobs.exists(name) and not again:
            return
        content = io.BytesIO()
        np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
        write = self._blobs.write if again else self._blobs.write_new
        with self.disk_full_told():
            write(name, _sealed_arrays(content.getvalue()))

    def has_tokens(self, tokens_hash: str) -> bool:
        """Tell whether a token store is kept, whole."""
        if isinstance(self.root, Path):
            return (self.root / "tokens" / tokens_hash).exists()
        return self._blobs.exists(f"tokens/{tokens_hash}/manifest.json")

    def put_tokens(
        self,
        tokens_hash: str,
        batches: Iterable[TokenBatch],
        vocab_size: int,
    ) -> None:
        """Keep a token store, unless it is there.

        In object storage a manifest with the checksum of each file is written last: a store
        without one is unfinished, and written again.

        Args:
            tokens_hash: its name.
            batches: document ids, their token ids, and perhaps their prompts.
            vocab_size: number of tokens.
        """
        if self.has_tokens(tokens_hash):
            return
        if isinstance(self.root, Path):
            with self.disk_full_told():
                TokenStore.write(self.root / "tokens" / tokens_hash, batches, vocab_size)
            return
        blobs, name = self._blobs, f"tokens/{tokens_hash}"
        sums = {}
        with tempfile.TemporaryDirectory() as folder:
            built = TokenStore.write(Path(folder) / tokens_hash, batches, vocab_size).folder
            for file in (*TOKEN_FILES, PROMPT_FILE):
                if file == PROMPT_FILE and not (built / file).exists():
                    continue
                content = (built / file).read_bytes()
                sums[file] = hashlib.sha256(content).hexdigest()
                blobs.write(f"{name}/{file}", content)
        blobs.write(f"{name}/manifest.json", json.dumps(sums, indent=1).encode())

    def token_store(self, tokens_hash: str) -> TokenStore:
        """The token store of that name; under a URL it is fetched into the cache once.

        Raises:
            ProxyError: if it isn't what was written; looked at once a process.
        """
        folder = self._local_root / "tokens" / tokens_hash
        if not isinstance(self.root, Path):
            with self.locked([f"tokens-{tokens_hash}"]):  # one process fetches, others wait
                if not folder.exists():
                    self._fetch_tokens(tokens_hash, folder)
        return _verified_tokens(folder)

    def _fetch_tokens(self, tokens_hash: str, folder: Path) -> None:
        name, building = f"tokens/{tokens_hash}", folder.with_name(f".{tokens_hash}.fetching")
        shutil.rmtree(building, ignore_errors=True)  # of a killed process
        try:
            sums = json.loads(self._blobs.read(f"{name}/manifest.json"))
        except ValueError:
            sums = {}
        for file in (*TOKEN_FILES, *(file for file in sums if file == PROMPT_FILE)):
            content = self._blobs.read(f"{name}/{file}")
            found = hashlib.sha256(content).hexdigest()
            if sums.get(file) != found:
                raise ProxyError(
                    f"{self._blobs.place(f'{name}/{file}')} must hold what its manifest says, got "
                    f"SHA-256 {found}: it was damaged. Delete {self._blobs.place(name)} and "
                    "materialise the experiment pool again."
                )
            write_atomically(building / file, content)
        write_atomically(building / MANIFEST, json.dumps(sums, indent=1).encode())
        building.rename(folder)


#: What stands before the checksum of an `.npz` file.
_SEAL = b"sha256 "

#: What reading a damaged `.npz` file may raise.
_ARRAY_ERRORS = (
    zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, RuntimeError,
    SyntaxError, TypeError, struct.error, OverflowError, MemoryError,
)  # fmt: skip


def _questions_of(content: bytes) -> dict[str, Any]:
    """Inverse of `EvalWindows.questions_json`, as arguments."""
    if not content:
        return {}
    values = json.loads(content)
    return {
        "questions": {
            task: [
                Question(
                    **question
                    | {
                        "prompt": tuple(question["prompt"]),
                        "options": tuple(map(tuple, question["options"])),
                        "option_bytes": tuple(question["option_bytes"]),
                    }
                )
                for question in of_task
            ]
            for task, of_task in values["questions"].items()
        },
        "harness": {task: HarnessTask(**place) for task, place in values["harness"].items()},
        "tokenizer": values["tokenizer"],
    }


@lru_cache(maxsize=8)
def _verified_tokens(folder: Path) -> TokenStore:
    """A token store whose files are what was written."""
    tokens_of = TokenStore(folder)
    damaged = tokens_of.damaged_file()
    if damaged is not None:
        raise ProxyError(
            f"{folder / damaged} is damaged: its checksum differs from that of its writing. Delete "
            f"{folder} and materialise the experiment pool again; finished proxy runs stay."
        )
    return tokens_of


def _record_name(key: str) -> str:
    return f"runs/{key[:2]}/{key}.json"


def _failed_name(key: str) -> str:
    return f"failed/{key}.json"


def _sealed_arrays(raw: bytes) -> bytes:
    """An `.npz` file with its SHA-256 as the comment of the zip: the CRCs don't see a lost member.

    The last two bytes of a zip without a comment are the comment's length.
    """
    comment = _SEAL + hashlib.sha256(raw[:-2]).hexdigest().encode()
    return raw[:-2] + len(comment).to_bytes(2, "little") + comment


def _check_arrays(raw: bytes) -> None:
    """Raise ValueError if a sealed `.npz` file was changed; earlier versions didn't seal."""
    start = len(raw) - len(_SEAL) - 64
    if start > 0 and raw[start:].startswith(_SEAL):
        found = hashlib.sha256(raw[: start - 2]).hexdigest().encode()
        if raw[start + len(_SEAL) :] != found:
            raise ValueError("its checksum differs")


def _unsealed(raw: bytes, key: str) -> dict:
    """The values of a record's file.

    Raises:
        ValueError: if it is damaged, or belongs to another run.
    """
    try:
        sealed = json.loads(raw)
        values, checksum = sealed["record"], sealed["sha256"]
        found = values["key"]
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"it lacks {error}") from error
    if checksum != _seal(values):
        raise ValueError("its checksum differs")
    if found != key:
        raise ValueError(f"it holds the record of run {found}")
    return values


def _is_sound(raw: bytes, key: str) -> bool:
    try:
        _unsealed(raw, key)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """What may be to blame for a failed run, by name."""
    found = {"python": platform.python_version()}
    for name in ("causalmix-pipeline", "torch", "numpy", "transformers", "peft", "ray"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _seal(values: dict) -> str:
    """Checksum of a record's values: a changed digit would otherwise be read as an outcome."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed loss in nats as bits per UTF-8 byte."""
    return nats / math.log(2) / n_bytes
