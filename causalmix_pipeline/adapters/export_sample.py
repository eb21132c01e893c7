"""The documents of a mixture as shuffled shards, each as often as the mixture asks.

A uniform shuffle in bounded memory: every copy of every document goes to a shard drawn at random
while the pool's files are read once, in order; then each shard is shuffled by itself. Memory is
that of the manifest, of one batch of the reader, of the lines that wait to be appended, and of one
shard. The same manifest, pool and seed give the same bytes. A sample is whole or absent: it is made
in a hidden folder beside its place, and renamed; what a killed export left there is removed by the
next one.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.exporter import Export
from causalmix_pipeline.adapters.pool_door import SEPARATOR
from causalmix_pipeline.adapters.pool_files import PoolFile, pool_files
from causalmix_pipeline.adapters.pool_reader import read_batches
from causalmix_pipeline.adapters.profiler import PoolSpec
from causalmix_pipeline.adapters.trainer_sources import Source, SourceFile, domain_folder
from causalmix_pipeline.core.errors import ConfigError, PoolError

#: Tokens of a shard, about 40 MB of text: what is shuffled in memory at a time.
SHARD_TOKENS = 8_000_000

#: Bytes of lines that wait in memory before they are appended to their shards.
WAITING_BYTES = 48 * 2**20

#: Documents of a batch whose copies are placed at a time.
SENT_DOCUMENTS = 1024

#: Kinds of shards.
KINDS = ("jsonl", "parquet")

#: Streams of the seed: where copies go, and the order within a shard.
_PLACES, _ORDER = 1, 2

#: Called with what is counted, how much of it is done, and of how much.
OnProgress = Callable[[str, int, int], None]


def write_sample(
    folder: Path,
    export: Export,
    pool: PoolSpec,
    *,
    kind: str,
    by_domain: bool,
    before_swap: Callable[[Export], None] = lambda sampled: None,
    on_progress: OnProgress | None = None,
) -> Export:
    """Write the documents of an export, shuffled, with an `index.json` that counts them.

    Args:
        folder: `sample/` is written in it, or `domains/<id>/` for each domain.
        export: what to write, and the seed.
        pool: where the documents are and how they are read.
        kind: `jsonl` or `parquet`.
        by_domain: whether each domain gets a stream of its own; else they are mixed.
        before_swap: takes what is returned, when all is written and an older sample still stands.
        on_progress: takes rows and shards as they are done.

    Returns:
        The export with the sample's files, and sources that count its rows.

    Raises:
        ConfigError: for an unknown kind, a full disk, or another export into the same folder.
        PoolError: if the pool no longer holds the documents.
    """
    if kind not in KINDS:
        raise ConfigError(f"sample must be {' or '.join(KINDS)}, got {kind!r}: choose one.")
    place = _place(folder, by_domain)
    tell = on_progress or (lambda what, done, total: None)
    with _partial_folder(place) as partial:
        plan = _plan(export, by_domain)
        shards = _Shards(partial / "waiting", sum(plan.n_shards))
        _scatter(export, pool, plan, shards, tell)
        files = _shuffle(partial / "whole", export, plan, shards, kind, tell)
        sampled = _with_sample(export, files, place, kind)
        _write_synced(partial / "whole" / "index.json", _index(sampled, files).encode("utf-8"))
        before_swap(sampled)
        _put_in_place(partial / "whole", place)
    return sampled


def kept_sample(folder: Path, export: Export, *, by_domain: bool) -> Export | None:
    """The export with the sample that stands in the folder; None if it isn't of this very export.

    Its `index.json` must be what would be written of this export: mixture, documents, budget, seed
    and fingerprints are in it.
    """
    place = _place(folder, by_domain)
    try:
        text = (place / "index.json").read_text(encoding="utf-8")
        told = json.loads(text)
        files = [SourceFile(file["file"], file["rows"]) for file in told["files"]]
        sampled = _with_sample(export, files, place, told["kind"])
        is_whole = all((place / file.path).is_file() for file in files)
        return sampled if is_whole and text == _index(sampled, files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_sample(folder: Path, *, by_domain: bool, before: Callable[[], None]) -> None:
    """Remove the sample that stands in the folder, if there's one; a folder without index isn't.

    Args:
        folder: as for `write_sample`.
        by_domain: as for `write_sample`.
        before: called before a sample is removed.

    Raises:
        ConfigError: if another export writes a sample there.
    """
    place = _place(folder, by_domain)
    if not (place / "index.json").is_file():
        return
    with _partial_folder(place) as partial:
        before()
        place.rename(partial / "old")


def _place(folder: Path, by_domain: bool) -> Path:
    return folder.absolute() / ("domains" if by_domain else "sample")


def _with_sample(export: Export, files: Sequence[SourceFile], place: Path, kind: str) -> Export:
    """The export with the files of a sample, which are below its place."""
    is_mixed = place.name == "sample"
    return replace(
        export,
        sources=_counted(export, files, place),
        sample=kind,
        sample_files=tuple(str(place / file.path) for file in files) if is_mixed else (),
    )


@dataclass(frozen=True)
class _Plan:
    """Streams of a sample: folder and number of shards of each, and each domain's stream."""

    folders: tuple[str, ...]
    n_shards: tuple[int, ...]
    stream_of: Mapping[str, int]

    @property
    def first_shard(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.n_shards)[:-1]]).astype(np.int64)


def _plan(export: Export, by_domain: bool) -> _Plan:
    tokens = export.tokens_of()
    read = [source for source in export.sources if tokens[source.domain]]
    sizes = [tokens[source.domain] for source in read]
    folders = [source.id for source in read]
    if not by_domain:
        sizes, folders = [sum(sizes)], [""]
    n_shards = tuple(max(1, -(-size // SHARD_TOKENS)) for size in sizes)
    streams = {source.domain: i if by_domain else 0 for i, source in enumerate(read)}
    return _Plan(tuple(folders), n_shards, streams)


@dataclass
class _Shards:
    """Lines on their way to shards: in memory first, then appended to a file for each."""

    folder: Path
    n: int
    waiting: dict[int, list[bytes]] = field(default_factory=dict)
    n_bytes: int = 0

    def add(self, shard: int, line: bytes) -> None:
        """Keep a line of JSON for a shard; what waits is flushed when it reaches its limit."""
        self.waiting.setdefault(shard, []).append(line)
        self.n_bytes += len(line)
        if self.n_bytes >= WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what waits to the files."""
        self.folder.mkdir(exist_ok=True)
        for shard, lines in self.waiting.items():
            with open(self._path(shard), "ab") as file:
                file.write(b"\n".join([*lines, b""]))
        self.waiting, self.n_bytes = {}, 0

    def take(self, shard: int) -> list[bytes]:
        """The lines of a shard, in the order in which they came; its file is removed."""
        path = self._path(shard)
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]
        path.unlink()
        return lines

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}"


def _scatter(
    export: Export, pool: PoolSpec, plan: _Plan, shards: _Shards, tell: OnProgress
) -> None:
    """Read the pool once and send each copy of each document to its shard."""
    rng = np.random.default_rng([export.seed, _PLACES])
    files = {file.name: file for file in pool_files(pool.location)}
    wanted = export.manifest.select("file", "row", "document_id", "domain", "copies")
    total, done = export.manifest.height, 0
    for (name,), part in wanted.sort("file", "row").partition_by(
        "file", as_dict=True, maintain_order=True
    ).items():  # fmt: skip
        for found in _documents(files.get(str(name)), str(name), part, pool):
            for documents in found.iter_slices(SENT_DOCUMENTS):
                _send(documents, _shards_of(documents, plan, rng), shards, export)
            done += found.height
            tell("documents", done, total)
    shards.flush()


def _documents(
    file: PoolFile | None, name: str, wanted: pl.DataFrame, pool: PoolSpec
) -> Iterator[pl.DataFrame]:
    """The wanted documents of a file with their texts, batch by batch.

    Raises:
        PoolError: if one is missing or another text stands in its place.
    """
    left = wanted.height
    for batch in read_batches(file, pool.columns, pool.rules) if file is not None else ():
        found = batch.documents.drop("domain").join(
            wanted, on=["row", "document_id"], how="inner", maintain_order="left"
        )
        left -= found.height
        if found.height:
            yield found
        if not left:
            return
    raise PoolError(
        f"the pool must hold the documents that were profiled, but {left} of {wanted.height} are "
        f"no longer in {name}: it changed since. Run `causalmix refresh`, then export again."
    )


def _shards_of(documents: pl.DataFrame, plan: _Plan, rng: np.random.Generator) -> np.ndarray:
    """A shard for each copy of each document in turn, drawn from those of its stream."""
    stream = documents["domain"].replace_strict(plan.stream_of, return_dtype=pl.Int64).to_numpy()
    copies = documents["copies"].to_numpy()
    n_shards, first = np.array(plan.n_shards)[stream], plan.first_shard[stream]
    drawn = (rng.random(copies.sum()) * np.repeat(n_shards, copies)).astype(np.int64)
    return drawn + np.repeat(first, copies)


def _send(found: pl.DataFrame, shard_of: np.ndarray, shards: _Shards, export: Export) -> None:
    """Send the copies of documents to their shards, as lines of JSON that count the copies."""
    texts: list[pl.Expr] = [pl.col("text")]
    if export.has_prompts:
        n = pl.col("prompt_chars")
        prompt = pl.col("text").str.slice(0, (n - len(SEPARATOR)).clip(0))
        texts = [prompt.alias("prompt"), pl.col("text").str.slice(n).alias("response")]
    content = io.BytesIO()
    found.select(*texts, "domain", "source", "document_id").write_ndjson(content)
    lines = content.getvalue().split(b"\n")
    drawn = iter(shard_of)
    for line, copies in zip(lines, found["copies"].to_list(), strict=False):
        for copy in range(copies):
            shards.add(int(next(drawn)), b'%s,"copy":%d}' % (line[:-1], copy))


def _shuffle(
    whole: Path, export: Export, plan: _Plan, shards: _Shards, kind: str, tell: OnProgress
) -> list[SourceFile]:
    """Shuffle each shard by itself and write it; returns the files below the sample's folder."""
    whole.mkdir()
    files, shard = [], 0
    for folder, n_shards in zip(plan.folders, plan.n_shards, strict=True):
        (whole / folder).mkdir(exist_ok=True)
        n_written = 0
        for _ in range(n_shards):
            lines = shards.take(shard)
            order = np.random.default_rng([export.seed, _ORDER, shard]).permutation(len(lines))
            if lines:
                path = Path(folder) / f"part-{n_written:05d}.{kind}"
                content = b"\n".join([*(lines[i] for i in order.tolist()), b""])
                _write_synced(whole / path, content if kind == "jsonl" else _as_parquet(content))
                files.append(SourceFile(str(path), len(lines)))
                n_written += 1
            shard += 1
            tell("shards", shard, shards.n)
    return files


def _as_parquet(lines: bytes) -> bytes:
    names = json.loads(lines[: lines.index(b"\n")])
    schema = {name: pl.Int64 if name == "copy" else pl.String for name in names}
    content = io.BytesIO()
    pl.read_ndjson(lines, schema=schema).write_parquet(content, compression="zstd")
    return content.getvalue()


def _counted(export: Export, files: Sequence[SourceFile], place: Path) -> tuple[Source, ...]:
    """The sources with the sample's rows and tokens, and the shards of each domain's stream."""
    rows = dict(
        export.manifest.group_by("domain").agg(pl.col("copies").sum().cast(pl.Int64)).iter_rows()
    )
    tokens, sources = export.tokens_of(), []
    for source in export.sources:
        own = domain_folder(place.parent, source)
        sources.append(
            replace(
                source,
                rows=int(rows.get(source.domain, 0)),
                n_tokens=tokens[source.domain],
                files=tuple(
                    SourceFile(str(place / file.path), file.rows)
                    for file in files
                    if (place / file.path).parent == own
                ),
            )
        )
    return tuple(sources)


def _index(export: Export, files: Sequence[SourceFile]) -> str:
    """What `index.json` says of a sampled export: every file and domain with its counts."""
    total = sum(source.n_tokens for source in export.sources)
    counts = dict(export.manifest.group_by("domain").len().iter_rows())
    domains = [
        {
            "domain": source.domain,
            "id": source.id,
            "asked": source.share,
            "achieved": source.n_tokens / max(total, 1),
            "tokens": source.n_tokens,
            "rows": source.rows,
            "documents": int(counts.get(source.domain, 0)),
            "epochs": source.n_tokens / float(available) if available else 0.0,
        }
        for source, available in zip(export.sources, export.available_D, strict=True)
    ]
    told = {
        "kind": export.sample,
        "seed": export.seed,
        "budget_tokens": export.budget_tokens,
        "tokens": total,
        "rows": sum(file.rows for file in files),
        "domains": domains,
        "files": [{"file": file.path, "rows": file.rows} for file in files],
        "fingerprints": dict(export.fingerprints),
    }
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------- whole or absent


@contextmanager
def _partial_folder(place: Path) -> Iterator[Path]:
    """An empty hidden folder beside a place, held by this process alone, removed at the end."""
    partial = place.with_name(f".{place.name}.partial")
    handle = _locked(partial)
    try:
        try:
            _empty(partial)
            yield partial
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ConfigError(
                f"{place.parent} must have room for the sample, but its disk is full: lower "
                "--tokens, or choose another folder by --out."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def _locked(partial: Path) -> int:
    """Make a folder and lock it; again, where another export removed it before it was locked.

    Raises:
        ConfigError: if another export holds it.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(
                f"{partial.parent} must be free, but another export writes a sample there: wait "
                "for it, or choose another folder by --out."
            ) from error
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(whole: Path, place: Path) -> None:
    """Rename a finished folder to its place; what stood there moves out first."""
    old = whole.with_name("old")
    if place.exists():
        place.rename(old)
    whole.rename(place)
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
