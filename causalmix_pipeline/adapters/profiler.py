"""Profiles a pool: reads it once, scores what is new, and returns a row per document.

    files -> (workers) read, door, spool new texts -> (workers) score chunks -> score store -> frame

Memory is that of a few chunks in each worker and of one row of numbers per document here; texts
are never all in memory. What is kept is kept by content, so a rerun, after a kill too, goes on
where it was: only the chunks in flight are scored again.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.file_catalogues import Catalogues, catalogue_name
from causalmix_pipeline.adapters.near_duplicates import (
    MinHashScorer,
    flag_near_duplicates,
    signature_arrays,
)
from causalmix_pipeline.adapters.noisy_twins import add_noisy_twins
from causalmix_pipeline.adapters.pool_door import DoorRules
from causalmix_pipeline.adapters.pool_files import PoolFile, pool_files
from causalmix_pipeline.adapters.pool_reader import (
    DOCUMENT_SCHEMA,
    QUARANTINE_SCHEMA,
    ColumnMap,
    PoolDocuments,
    check_usable,
    distinct_documents,
    read_batches,
)
from causalmix_pipeline.adapters.score_store import ScoreStore
from causalmix_pipeline.core.covariates import SAMPLE_BYTES, SAMPLE_CHARS
from causalmix_pipeline.core.document_sample import sample_documents
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.scoring import Scorer
from causalmix_pipeline.core.work import InProcess, WorkBackend

#: Bytes of text in a chunk, the unit of scoring: about a few seconds of work.
CHUNK_BYTES = 8 * 2**20
#: What a whole chunk takes on the disk, compressed, about.
SPOOLED_CHUNK_BYTES = 4 * 2**20
#: Less is read or scored in this process: starting others takes longer.
SMALL_WORK_BYTES = 6 * 2**20
#: Documents of a sample that one task scores with a model.
SAMPLE_TASK_DOCUMENTS = 32

#: Called with what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScorerPlan:
    """A scorer, and how many documents it scores.

    Attributes:
        scorer: measures the metrics.
        budget_tokens: tokens of each domain that are scored, the documents with the lowest content
            hash of each source first; None scores every document.
    """

    scorer: Scorer
    budget_tokens: int | None = None


@dataclass(frozen=True)
class PoolSpec:
    """Which documents a pool has: where they are and how they are read.

    Attributes:
        location: folder, glob, file or URL.
        columns: what the files' columns mean.
        rules: what the door refuses.
        domains: keep these only; None keeps all.
        max_rejected_share: refuse the pool if more of it is quarantined; 0..1.
        noise_seed: append noisy twins drawn with this seed; None appends none.
    """

    location: str | Path
    columns: ColumnMap = field(default_factory=ColumnMap)
    rules: DoorRules = field(default_factory=DoorRules)
    domains: tuple[str, ...] | None = None
    max_rejected_share: float = 1.0
    noise_seed: int | None = None


@dataclass(frozen=True, eq=False)
class PoolProfile:
    """What is known of a pool's documents.

    Attributes:
        documents: a row per distinct (domain, text), sorted by domain, `augmented` and id: where it
            stands, its copies, every metric; no text.
        quarantine: refused rows and files, with the reason.
        n_rows: rows that were read.
        n_scored: documents that each scorer scored now, by its key.
    """

    documents: pl.DataFrame
    quarantine: pl.DataFrame
    n_rows: int
    n_scored: dict[str, int]

    @property
    def rejected_share(self) -> float:
        """Refused rows and files over all rows and refused files."""
        return PoolDocuments(self.documents, self.quarantine, self.n_rows).rejected_share


def pool_batches(
    file: PoolFile, spec: PoolSpec
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame, int]]:
    """Read one file of a pool: documents with `augmented`, `twin_of`, `fold_id`; refused rows."""
    for batch in read_batches(file, spec.columns, spec.rules):
        documents = batch.documents
        if spec.domains is not None:
            documents = documents.filter(pl.col("domain").is_in(list(spec.domains)))
        if spec.noise_seed is not None and documents.height:
            documents = add_noisy_twins(documents, seed=spec.noise_seed)
        else:
            documents = documents.with_columns(
                augmented=pl.lit(False), twin_of=pl.lit(None, dtype=pl.String)
            )
        documents = documents.with_columns(fold_id=pl.coalesce("twin_of", "document_id"))
        yield documents, batch.quarantine, batch.n_rows


def profile_pool(
    spec: PoolSpec,
    plans: Sequence[ScorerPlan],
    *,
    store: ScoreStore,
    workers: WorkBackend,
    scratch: Path | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> PoolProfile:
    """Profile a pool.

    Args:
        spec: the pool.
        plans: what to measure; one of them scores `n_bytes`, one `n_tokens`.
        store: scores that are known, and where new ones are kept.
        workers: where files are read and chunks scored; a little is done in this process.
        scratch: folder for texts in flight, removed at the end; None takes one beside the store.
        on_progress: told what is being done and how far it is.

    Raises:
        PoolError: if there's no usable document, a domain has none, or too much was rejected.
        WorkError: if a worker can't go on.
    """
    scratch = scratch or store.root.parent / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with store.locked():
        # The lock is held, so what lies here is of a killed profile.
        for left in scratch.glob("profile-*"):
            shutil.rmtree(left, ignore_errors=True)
        spool = Path(tempfile.mkdtemp(prefix="profile-", dir=scratch))
        try:
            job = _Profile(spec, plans, store, workers, spool, on_progress)
            return job.run()
        finally:
            shutil.rmtree(spool, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class _Profile:
    """One profile under way."""

    spec: PoolSpec
    plans: Sequence[ScorerPlan]
    store: ScoreStore
    workers: WorkBackend
    spool: Path
    on_progress: Progress

    def run(self) -> PoolProfile:
        whole = [plan.scorer for plan in self.plans if plan.budget_tokens is None]
        sampled = [plan for plan in self.plans if plan.budget_tokens is not None]
        manifest, quarantine, n_rows, ratios = self._read(whole)
        documents, n_scored = manifest, {}
        for scorer, scores, n_new in self._scores(whole, manifest):
            n_scored[scorer.key] = n_new
            if isinstance(scorer, MinHashScorer):
                scores = _near_duplicate_column(manifest, scores)
            documents = documents.hstack(scores)
        documents = documents.with_columns(
            bytes_per_token=pl.col("n_bytes") / pl.col("n_tokens").clip(1),
            sample_compress_ratio=pl.col("domain").replace_strict(
                ratios, default=None, return_dtype=pl.Float64
            ),
        )
        for plan in sampled:
            assert plan.budget_tokens is not None
            sample = sample_documents(documents, budget_tokens=plan.budget_tokens)
            n_scored[plan.scorer.key] = self._score_sample(plan.scorer, sample)
            scores = self.store.read(plan.scorer).unique("document_id", keep="first")
            scores = scores.join(sample, on="document_id", how="semi")
            documents = documents.join(scores, on="document_id", how="left", maintain_order="left")
        for plan in self.plans:
            self.store.tidy(plan.scorer)
        keys = ";".join(sorted(plan.scorer.key for plan in self.plans))
        documents = documents.with_columns(scorers=pl.lit(keys))
        return PoolProfile(documents, quarantine, n_rows, n_scored)

    # ------------------------------------------------------------------ reading

    def _read(
        self, scorers: Sequence[Scorer]
    ) -> tuple[pl.DataFrame, pl.DataFrame, int, dict[str, float]]:
        """Read what isn't catalogued: distinct documents, quarantine, rows, samples' compression.

        The first time, every text will be scored: it is spooled while it's read.
        """
        spec, files = self.spec, pool_files(self.spec.location)
        names = [
            catalogue_name(file, spec.columns, spec.rules, spec.domains, spec.noise_seed)
            for file in files
        ]
        first_time = not all(map(self.store.has_scores, scorers))
        tasks = [
            _ReadTask(file, number, spec, self.spool, self.catalogues, name, first_time)
            for number, (file, name) in enumerate(zip(files, names, strict=True))
            if first_time or self.catalogues.n_rows(name) is None
        ]
        small = sum(task.file.size for task in tasks) < SMALL_WORK_BYTES
        self._run(_read_file, tasks, "files read", is_small=small)
        self.catalogues.keep_only(names)

        def of_all(kind: str) -> list[pl.DataFrame]:
            return [part for name in names for part in self.catalogues.read(name, kind)]

        n_rows = sum(self.catalogues.n_rows(name) or 0 for name in names)
        nothing = pl.DataFrame(schema=DOCUMENT_SCHEMA | {"augmented": pl.Boolean}).drop("text")
        parts = of_all("documents")
        frame = distinct_documents(pl.concat(parts) if parts else nothing)
        quarantine = pl.concat([pl.DataFrame(schema=QUARANTINE_SCHEMA), *of_all("quarantine")])
        originals = frame.filter(~pl.col("augmented"))
        check_usable(
            PoolDocuments(originals, quarantine, n_rows),
            spec.location,
            spec.domains,
            spec.max_rejected_share,
        )
        ratios = _sample_ratios(of_all("sample"))
        return frame.sort("domain", "augmented", "document_id"), quarantine, n_rows, ratios

    @property
    def catalogues(self) -> Catalogues:
        """What the files of this pool held when they were read last."""
        place = hashlib.blake2b(str(self.spec.location).encode(), digest_size=8).hexdigest()
        return Catalogues(self.store.root / ".files" / place)

    def _bring_texts(self, documents: pl.DataFrame) -> None:
        """Bring texts into the spool that aren't there, by reading their files again.

        Args:
            documents: `document_id` and `file`.

        Raises:
            PoolError: if the files lack one by now.
        """
        absent = documents.join(self._spooled_ids(), on="document_id", how="anti")
        if absent.is_empty():
            return
        only = self.spool / f"only-{absent.height}.npy"
        np.save(only, np.unique(_as_keys(absent["document_id"])))
        names = set(absent["file"].unique().to_list())
        taken = [int(path.name.split("-")[1]) for path in self.spool.glob("texts-*.parquet")]
        offset = max(taken, default=-1) + 1
        files = [file for file in pool_files(self.spec.location) if file.name in names]
        tasks = [
            _ReadTask(file, offset + i, self.spec, self.spool, None, "", False, only)
            for i, file in enumerate(files)
        ]
        small = sum(file.size for file in files) < SMALL_WORK_BYTES
        self._run(_read_file, tasks, "files read again", is_small=small)
        lost = absent.join(self._spooled_ids(), on="document_id", how="anti").height
        if lost:
            raise PoolError(
                f"{self.spec.location} must stay as it is while it is profiled, but lost {lost} "
                "documents: profile it again."
            )

    def _spooled_ids(self) -> pl.DataFrame:
        """Ids in the spool, each with the first chunk that holds it."""
        chunks = sorted(self.spool.glob("texts-*.parquet"))
        found = [
            pl.read_parquet(chunk, columns=["document_id"]).with_columns(chunk=pl.lit(number))
            for number, chunk in enumerate(chunks)
        ]
        nothing = pl.DataFrame(schema={"document_id": pl.String, "chunk": pl.Int32})
        return pl.concat([nothing, *found]).unique("document_id", keep="first", maintain_order=True)

    # ------------------------------------------------------------------ scoring

    def _scores(
        self, scorers: Sequence[Scorer], manifest: pl.DataFrame
    ) -> Iterator[tuple[Scorer, pl.DataFrame, int]]:
        """Score what has no score.

        Yields:
            Each scorer, its metrics of the manifest's rows in their order, and how many documents
            are new.
        """
        ids = manifest.select("document_id", "file")
        kept, missing = {}, {}
        first_time = ids.unique("document_id", keep="first")
        for scorer in scorers:
            scores = self.store.read(scorer)
            if scores.height:
                kept[scorer.key] = _beside(ids, scores)
                absent = ids.filter(kept[scorer.key][FOUND].is_null())
                missing[scorer.key] = absent.unique("document_id", keep="first")
            else:
                missing[scorer.key] = first_time  # the same frame for all
        parts = self._score_chunks(scorers, missing)
        for scorer in scorers:
            values = kept.pop(scorer.key, None)
            if parts[scorer.key]:
                new = _beside(ids, self.store.read(scorer, parts[scorer.key]))
                values = new if values is None else _filled(values, new)
            assert values is not None and values[FOUND].null_count() == 0, scorer.key
            yield scorer, values.drop(FOUND), missing[scorer.key].height

    def _score_chunks(
        self, scorers: Sequence[Scorer], missing: dict[str, pl.DataFrame]
    ) -> dict[str, list[str]]:
        """Score the missing documents; returns the names of each scorer's new parts."""
        parts: dict[str, list[str]] = {scorer.key: [] for scorer in scorers}
        frames = {id(frame): frame for frame in missing.values()}
        wanted = pl.concat(frames.values())
        wanted = wanted.unique("document_id") if len(frames) > 1 else wanted
        if wanted.is_empty():
            return parts
        self._bring_texts(wanted)
        chunks = sorted(self.spool.glob("texts-*.parquet"))
        sizes = [chunk.stat().st_size for chunk in chunks]
        groups = _grouped(sizes)
        ids = self._spooled_ids().with_columns(
            task=pl.col("chunk").replace_strict(list(range(len(groups))), groups)
        )
        asked: list[list[tuple[Scorer, pl.Series]]] = [[] for _ in range(groups[-1] + 1)]
        for key, frame in frames.items():
            for (number,), part in ids.join(frame, on="document_id", how="semi").group_by("task"):
                assert isinstance(number, int)
                for scorer in scorers:
                    if id(missing[scorer.key]) == key:
                        asked[number].append((scorer, part["document_id"]))
        tasks = [
            _ScoreTask(
                tuple(c for c, g in zip(chunks, groups, strict=True) if g == number),
                tuple(of_task),
                self.store,
            )
            for number, of_task in enumerate(asked)
            if of_task
        ]
        small = sum(sizes) < SMALL_WORK_BYTES
        for found in self._run(_score_chunk, tasks, "chunks scored", is_small=small):
            for key, name in found:
                parts[key].append(name)
        return parts

    def _score_sample(self, scorer: Scorer, sample: pl.DataFrame) -> int:
        """Score the documents of a sample that have no score; returns how many."""
        known = self.store.read(scorer)
        missing = sample.join(known, on="document_id", how="anti").unique("document_id")
        if missing.is_empty():
            return 0
        self._bring_texts(missing.select("document_id", "file"))
        texts = _spooled(self.spool, missing.select("document_id"))
        # Long documents first: the last tasks are short, and no worker waits long for another.
        texts = texts.sort(pl.col("text").str.len_bytes(), "document_id", descending=[True, False])
        tasks = []
        for number, part in enumerate(texts.iter_slices(SAMPLE_TASK_DOCUMENTS)):
            chunk = self.spool / f"asked-{scorer.key}-{number:06d}.parquet"
            part.write_parquet(chunk, compression="lz4")
            tasks.append(_ScoreTask((chunk,), ((scorer, part["document_id"]),), self.store))
        # A model may take a minute for a task.
        what = f"parts scored by {scorer.key.split('-')[0]}"
        self._run(_score_chunk, tasks, what, is_small=len(tasks) == 1)
        return missing.height

    def _run(self, function: Callable, tasks: Sequence, what: str, *, is_small: bool) -> list:
        """Run tasks and return their results in order; a little work is done in this process."""
        results: list = [None] * len(tasks)
        done = 0

        def on_done(index: int, result: object) -> None:
            nonlocal done
            results[index] = result
            done += 1
            self.on_progress(what, done, len(tasks))

        workers = InProcess() if is_small else self.workers
        workers.run(function, tasks, on_done)
        return results


# ---------------------------------------------------------------------------- a first look


@dataclass(frozen=True, eq=False)
class PoolSurvey:
    """A pool as a first look sees it.

    Attributes:
        sample: documents of the reader's frame, the lowest content hashes first, distinct.
        documents_of: rows of each domain, copies included.
        quarantine: refused rows and files.
        n_rows: rows that were read.
    """

    sample: pl.DataFrame
    documents_of: dict[str, int]
    quarantine: pl.DataFrame
    n_rows: int


def survey_pool(spec: PoolSpec, *, max_bytes: int) -> PoolSurvey:
    """Read a pool once: what it holds, and a sample of at most `max_bytes` of text.

    Raises:
        PoolError: if there's no usable document, a domain has none, or too much was rejected.
    """
    sample, refused, n_rows = pl.DataFrame(), [pl.DataFrame(schema=QUARANTINE_SCHEMA)], 0
    counts: dict[str, int] = {}
    for file in pool_files(spec.location):
        for documents, quarantine, n in pool_batches(file, spec):
            n_rows += n
            refused.append(quarantine)
            for domain, count in documents["domain"].value_counts().iter_rows():
                counts[domain] = counts.get(domain, 0) + count
            kept = documents.drop("augmented", "twin_of", "fold_id")
            if sample.height and sample["text"].str.len_bytes().sum() >= max_bytes:
                kept = kept.filter(pl.col("document_id") < sample["document_id"][-1])
            if kept.height:
                both = pl.concat([sample, kept]) if sample.height else kept
                both = both.sort("document_id", "domain", "file", "row").unique(
                    ["domain", "document_id"], keep="first", maintain_order=True
                )
                size = pl.col("text").str.len_bytes()
                sample = both.filter(size.cum_sum() - size < max_bytes)
    quarantine = pl.concat(refused)
    found = PoolDocuments(pl.DataFrame({"domain": list(counts)}), quarantine, n_rows)
    check_usable(found, spec.location, spec.domains, spec.max_rejected_share)
    return PoolSurvey(sample.sort("domain", "document_id"), counts, quarantine, n_rows)


# ---------------------------------------------------------------------------- in the workers


@dataclass(frozen=True)
class _ReadTask:
    """A file to read.

    Attributes:
        file: which.
        number: of its chunks in the spool.
        spec: how it is read.
        spool: folder for texts.
        catalogues: where its rows are kept; None keeps none.
        name: of its catalogue.
        spool_all: bring every text into the spool.
        only: keys of the documents whose texts are brought into the spool; None for none.
    """

    file: PoolFile
    number: int
    spec: PoolSpec
    spool: Path
    catalogues: Catalogues | None
    name: str
    spool_all: bool
    only: Path | None = None


def _read_file(task: _ReadTask) -> None:
    """Bring texts of a file into the spool, and its rows into a catalogue."""
    only = np.load(task.only, mmap_mode="r") if task.only else np.zeros(0, dtype=np.uint64)
    texts = _ChunkWriter(task.spool, f"texts-{task.number:06d}", CHUNK_BYTES)
    folder = task.spool / f"file-{task.number:06d}"
    folder.mkdir(exist_ok=True)
    rows = _ChunkWriter(folder, "documents", 8 * CHUNK_BYTES)
    sample, n_rows, refused = pl.DataFrame(), 0, [pl.DataFrame(schema=QUARANTINE_SCHEMA)]
    for documents, quarantine, n in pool_batches(task.file, task.spec):
        n_rows += n
        refused.append(quarantine)
        wanted = documents
        if not task.spool_all:
            wanted = documents.filter(pl.Series(_among(_as_keys(documents["document_id"]), only)))
        texts.add(wanted.select(TEXT_COLUMNS))
        if task.catalogues is not None:
            rows.add(documents.drop("text", "fold_id"))
            sample = _lowest(sample, documents.filter(~pl.col("augmented")))
    texts.close()
    if task.catalogues is not None:
        rows.close()
        pl.concat(refused).write_parquet(folder / "quarantine.parquet")
        if sample.height:
            sample.write_parquet(folder / "sample.parquet", compression="zstd")
        task.catalogues.write(task.name, sorted(folder.iterdir()), n_rows)


#: What a scorer sees of a document.
TEXT_COLUMNS = ["document_id", "fold_id", "text", "prompt_chars"]


@dataclass(frozen=True)
class _ScoreTask:
    """Spooled chunks, and which of their documents each scorer scores."""

    chunks: tuple[Path, ...]
    asked: tuple[tuple[Scorer, pl.Series], ...]
    store: ScoreStore


def _score_chunk(task: _ScoreTask) -> list[tuple[str, str]]:
    """Score chunks and keep the scores; returns keys of scorers and names of their parts."""
    documents = pl.concat([pl.read_parquet(chunk) for chunk in task.chunks]).unique(
        "document_id", keep="first", maintain_order=True
    )
    names = []
    for scorer, ids in task.asked:
        wanted = pl.DataFrame({"document_id": ids})
        part = documents.join(wanted, on="document_id", how="semi", maintain_order="left")
        name = task.store.write(scorer, scorer.score(part))
        if name is not None:
            names.append((scorer.key, name))
    return names


@dataclass(eq=False)
class _ChunkWriter:
    """Collects frames and writes them as numbered Parquet files of about `chunk_bytes`."""

    folder: Path
    name: str
    chunk_bytes: int
    parts: list[pl.DataFrame] = field(default_factory=list)
    size: int = 0
    n_written: int = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Add rows."""
        if frame.height:
            self.parts.append(frame)
            self.size += int(frame.estimated_size())
            if self.size >= self.chunk_bytes:
                self.close()

    def close(self) -> None:
        """Write what was collected."""
        if self.parts:
            path = self.folder / f"{self.name}-{self.n_written:06d}.parquet"
            pl.concat(self.parts).write_parquet(path, compression="lz4")
            self.parts, self.size, self.n_written = [], 0, self.n_written + 1


# ---------------------------------------------------------------------------- small parts


def _grouped(sizes: Sequence[int]) -> list[int]:
    """Numbers of tasks for chunks of these bytes: neighbours share one up to a chunk's size."""
    groups, number, filled = [], 0, 0
    for size in sizes:
        if filled and filled + size > SPOOLED_CHUNK_BYTES:
            number, filled = number + 1, 0
        groups.append(number)
        filled += size
    return groups


def _as_keys(ids: pl.Series) -> np.ndarray:
    """The first 64 bits of document ids; shape (n,), uint64.

    Two of a million documents agree in them with odds of 3e-8; such a one would be scored late.
    """
    return ids.str.head(16).str.to_integer(base=16, dtype=pl.UInt64).to_numpy()


def _among(keys: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Tell which keys a sorted array holds."""
    if known is None or not len(known):
        return np.zeros(len(keys), dtype=bool)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return known[place] == keys


def _spooled(spool: Path, wanted: pl.DataFrame) -> pl.DataFrame:
    """Texts of the wanted documents that lie in the spool."""
    found = [
        pl.DataFrame(schema=dict.fromkeys(TEXT_COLUMNS[:3], pl.String) | {"prompt_chars": pl.Int64})
    ]
    for chunk in sorted(spool.glob("texts-*.parquet")):
        found.append(pl.read_parquet(chunk).join(wanted, on="document_id", how="semi"))
    return pl.concat(found).unique("document_id", keep="first", maintain_order=True)


def _lowest(sample: pl.DataFrame, documents: pl.DataFrame) -> pl.DataFrame:
    """The documents with the lowest content hash of each domain, up to the sample's bytes.

    Copies count: they are what the compression of a whole sample sees.
    """
    if documents.is_empty():
        return sample
    columns = ["domain", "document_id", "file", "row"]
    if sample.height:
        full = sample.group_by("domain").agg(
            n=pl.col("n_bytes").sum(), highest=pl.col("document_id").max()
        )
        documents = documents.join(full, on="domain", how="left").filter(
            (pl.col("n") < SAMPLE_BYTES).fill_null(True)
            | (pl.col("document_id") <= pl.col("highest"))
        )
    fresh = documents.select(*columns, text=pl.col("text").str.slice(0, SAMPLE_CHARS)).with_columns(
        n_bytes=pl.col("text").str.len_bytes().cast(pl.Int64)
    )
    both = pl.concat([sample, fresh]) if sample.height else fresh
    before = (pl.col("n_bytes").cum_sum() - pl.col("n_bytes")).over("domain")
    return both.sort(columns).filter(before < SAMPLE_BYTES)


def _sample_ratios(samples: Sequence[pl.DataFrame]) -> dict[str, float]:
    """Compressed over plain bytes of each domain's sample."""
    sample = pl.DataFrame()
    for part in samples:
        sample = _lowest(sample, part) if sample.height else part
    if sample.is_empty():
        return {}
    return {
        domain: sample_compress_ratio("\n\n".join(texts).encode())
        for domain, texts in sample.sort("domain", "document_id", "file", "row")
        .group_by("domain", maintain_order=True)
        .agg("text")
        .iter_rows()
    }


def sample_compress_ratio(sample: bytes) -> float:
    """Compressed bytes over bytes of a sample of a domain; low where documents repeat each other.

    Zstandard at level 3: its window holds the whole sample, so copies far apart are seen.
    """
    import zstandard

    if not sample:
        return 1.0
    return len(zstandard.ZstdCompressor(level=3).compress(sample)) / len(sample)


#: Marks rows that have scores.
FOUND = "_found"


def _beside(ids: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """Scores in the order of ids, and whether there are any; null where there are none."""
    marked = scores.with_columns(pl.lit(True).alias(FOUND))
    joined = ids.select("document_id").join(
        marked, on="document_id", how="left", maintain_order="left"
    )
    if joined.height > ids.height:  # scored twice around a crash, with the same values
        return _beside(ids, scores.unique("document_id", keep="first"))
    return joined.drop("document_id")


def _filled(values: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """Values, and the new ones where there were none."""
    was = values[FOUND].is_not_null()
    return values.select(
        pl.when(was).then(pl.col(name)).otherwise(new[name]).alias(name) for name in values.columns
    )


def _near_duplicate_column(documents: pl.DataFrame, signatures: pl.DataFrame) -> pl.DataFrame:
    """Flag near-duplicates among the documents of a domain; noisy twins apart.

    The flag of an original is the same in a pool that has no twins.

    Args:
        documents: `domain` and `augmented`.
        signatures: `bands` and `sketch` of the same rows.
    """
    flags = np.zeros(documents.height)
    labels = documents.select("domain", "augmented").with_row_index("row")
    for part in labels.partition_by("domain", "augmented"):
        rows = part["row"].to_numpy()
        found = signatures[rows]
        flags[rows] = flag_near_duplicates(*signature_arrays(found["bands"], found["sketch"]))
    return pl.DataFrame({"near_duplicate": flags})


def document_batches(spec: PoolSpec, document_ids: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Read documents of a pool again, each once; frames as the reader makes them.

    Raises:
        PoolError: at the end, if the pool's files lack one.
    """
    wanted = set(document_ids)
    for file in pool_files(spec.location):
        for batch, _, _ in pool_batches(file, spec):
            new = batch.filter(pl.col("document_id").is_in(list(wanted))).unique(
                "document_id", keep="first", maintain_order=True
            )
            wanted.difference_update(new["document_id"].to_list())
            yield new
    if wanted:
        raise PoolError(
            f"{spec.location} must be as it was when it was profiled, but lacks "
            f"{len(wanted)} of {len(document_ids)} documents: profile it again."
        )
