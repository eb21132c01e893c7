"""The run store: finished proxy runs, and the inputs that workers read, by content hash.

One file per finished run, on a disk or in object storage: a record is whole or absent. A lock per
run, held through `flock`, dies with its holder.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from causalmix_pipeline.adapters.blobs import Blobs, open_blobs, root_of, write_atomically
from causalmix_pipeline.adapters.tokenizer import TokenStore
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec

#: What a token store is made of.
TOKEN_FILES = ("tokens.bin", "offsets.npy", "ids.txt")


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
    """Finished runs and what workers read, in a folder or below a URL.

    Attributes:
        root: folder or URL (`s3://bucket/folder`); holds `runs/`, `locks/`, `states/`, `tokens/`,
            `eval/`.
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
        """Keep the record of a finished run; in object storage, the first one that comes."""
        values = asdict(record)
        content = json.dumps({"record": values, "sha256": _seal(values)}, sort_keys=True, indent=1)
        # Under a URL no lock spans machines: what was read once must not change.
        blobs = self._blobs
        write = blobs.write if isinstance(self.root, Path) else blobs.write_new
        write(_record_name(record.key), content.encode())

    def missing(self, specs: Sequence[ProxySpec]) -> list[ProxySpec]:
        """The specs without a record, each once, in their order."""
        unique = {spec.key: spec for spec in specs}
        present = set(self._blobs.names("runs"))
        return [spec for key, spec in unique.items() if _record_name(key) not in present]

    def n_records(self) -> int:
        """Number of finished runs."""
        return sum(name.endswith(".json") for name in self._blobs.names("runs"))

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
        """Ids of a pool state's documents in reading order, a domain each."""
        with np.load(io.BytesIO(self._blobs.read(f"states/{state_hash}.npz"))) as arrays:
            return [arrays[name] for name in sorted(arrays.files)]

    def put_eval(self, eval_hash: str, evaluation: EvalWindows) -> None:
        """Keep the evaluation windows."""
        tasks = list(evaluation.windows)
        numbers = [[evaluation.n_bytes[t], evaluation.unigram_nats[t]] for t in tasks]
        arrays = {f"w{i:03d}": evaluation.windows[t] for i, t in enumerate(tasks)}
        arrays |= {"tasks": np.array(tasks), "numbers": np.array(numbers)}
        self._put_arrays(f"eval/{eval_hash}.npz", arrays)

    def evaluation(self, eval_hash: str) -> EvalWindows:
        """Read the evaluation windows."""
        with np.load(io.BytesIO(self._blobs.read(f"eval/{eval_hash}.npz"))) as arrays:
            tasks = arrays["tasks"].tolist()
            numbers = arrays["numbers"]
            return EvalWindows(
                windows={t: arrays[f"w{i:03d}"] for i, t in enumerate(tasks)},
                n_bytes={t: int(numbers[i, 0]) for i, t in enumerate(tasks)},
                unigram_nats={t: float(numbers[i, 1]) for i, t in enumerate(tasks)},
            )

    def _put_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays, unless they are there: names are content hashes."""
        if self._blobs.exists(name):
            return
        content = io.BytesIO()
        np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
        self._blobs.write_new(name, content.getvalue())

    def has_tokens(self, tokens_hash: str) -> bool:
        """Tell whether a token store is kept, whole."""
        if isinstance(self.root, Path):
            return (self.root / "tokens" / tokens_hash).exists()
        return self._blobs.exists(f"tokens/{tokens_hash}/manifest.json")

    def put_tokens(
        self,
        tokens_hash: str,
        batches: Iterable[tuple[Sequence[str], Sequence[np.ndarray]]],
        vocab_size: int,
    ) -> None:
        """Keep a token store, unless it is there.

        In object storage a manifest with the checksum of each file is written last: a store
        without one is unfinished, and written again.

        Args:
            tokens_hash: its name.
            batches: document ids and their token ids.
            vocab_size: number of tokens.
        """
        if self.has_tokens(tokens_hash):
            return
        if isinstance(self.root, Path):
            TokenStore.write(self.root / "tokens" / tokens_hash, batches, vocab_size)
            return
        blobs, name = self._blobs, f"tokens/{tokens_hash}"
        sums = {}
        with tempfile.TemporaryDirectory() as folder:
            built = TokenStore.write(Path(folder) / tokens_hash, batches, vocab_size).folder
            for file in TOKEN_FILES:
                content = (built / file).read_bytes()
                sums[file] = hashlib.sha256(content).hexdigest()
                blobs.write(f"{name}/{file}", content)
        blobs.write(f"{name}/manifest.json", json.dumps(sums, indent=1).encode())

    def token_store(self, tokens_hash: str) -> TokenStore:
        """The token store of that name; under a URL it is fetched into the cache once.

        Raises:
            ProxyError: if what was fetched isn't what was written.
        """
        folder = self._local_root / "tokens" / tokens_hash
        if not isinstance(self.root, Path):
            with self.locked([f"tokens-{tokens_hash}"]):  # one process fetches, others wait
                if not folder.exists():
                    self._fetch_tokens(tokens_hash, folder)
        return TokenStore(folder)

    def _fetch_tokens(self, tokens_hash: str, folder: Path) -> None:
        name, building = f"tokens/{tokens_hash}", folder.with_name(f".{tokens_hash}.fetching")
        shutil.rmtree(building, ignore_errors=True)  # of a killed process
        try:
            sums = json.loads(self._blobs.read(f"{name}/manifest.json"))
        except ValueError:
            sums = {}
        for file in TOKEN_FILES:
            content = self._blobs.read(f"{name}/{file}")
            found = hashlib.sha256(content).hexdigest()
            if sums.get(file) != found:
                raise ProxyError(
                    f"{self._blobs.place(f'{name}/{file}')} must hold what its manifest says, got "
                    f"SHA-256 {found}: it was damaged. Delete {self._blobs.place(name)} and "
                    "materialise the experiment pool again."
                )
            write_atomically(building / file, content)
        building.rename(folder)


def _record_name(key: str) -> str:
    return f"runs/{key[:2]}/{key}.json"


def _seal(values: dict) -> str:
    """Checksum of a record's values: a changed digit would otherwise be read as an outcome."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed loss in nats as bits per UTF-8 byte."""
    return nats / math.log(2) / n_bytes
