"""A pool of any size from the demo's text: documents of seven domains in Parquet files.

A document is put together from short pieces (some lines or sentences) of many documents of one
source, in random order, so that it's new but reads like its domain. Two in a hundred are an earlier
document of the file with one word more: near-duplicates, and no others are. The same seed gives the
same documents on every machine and Python version.

    python -m causalmix_pipeline_tests.benchmarks.generated_pool FOLDER --documents 800000
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from bisect import bisect
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from random import Random

import polars as pl

from causalmix_pipeline.adapters.demo_pool import assemble_demo_pool

#: (domain, source) and its pieces.
Pieces = dict[tuple[str, str], list[str]]

#: Characters of a piece: lines or sentences are joined up to the first, and cut at the second.
PIECE_CHARS = (60, 240)
#: A document has at least this many pieces: two that share four fifths of them don't occur.
LEAST_PIECES = 6
#: Characters of a document: least, most, and centre and spread of the log-normal length.
DOCUMENT_CHARS = (300, 4000)
LENGTH_CENTRE, LENGTH_SPREAD = math.log(980), 0.6
#: Share of documents that are near-duplicates of an earlier one of their file.
NEAR_DUPLICATES = 0.02
#: Rows of a row group.
ROW_GROUP = 20_000

_ENDS = re.compile(r"(?<=[.!?] )|(?<=\n)")


def read_pieces(experiment_dir: Path) -> Pieces:
    """Pieces of each source of an assembled demo pool (`<domain>/<source>.jsonl`)."""
    return {
        (path.parent.name, path.stem): cut_pieces(
            json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()
        )
        for path in sorted(experiment_dir.glob("*/*.jsonl"))
    }


def cut_pieces(texts: Iterable[str]) -> list[str]:
    """Different pieces of texts, in the order of the texts; each ends in white space."""
    pieces: dict[str, None] = {}
    least, most = PIECE_CHARS
    for text in texts:
        piece = ""
        for part in _ENDS.split(text):
            piece += part
            if len(piece) >= least:
                piece = piece[:most]
                pieces[piece if piece[-1].isspace() else piece + "\n"] = None
                piece = ""
    return list(pieces)


def draw_documents(pieces: Pieces, n: int, *, seed: str) -> pl.DataFrame:
    """Draw documents.

    Args:
        pieces: of each source; a source's share of the documents is that of its characters.
        n: documents.
        seed: other seeds give other documents.

    Returns:
        Columns `text`, `domain`, `source`, and `quality`, a number in 0..1.
    """
    rng = Random(seed)
    draw = rng.random  # the only stream that Python promises to keep
    names = list(pieces)
    borders = list(accumulate(sum(map(len, pieces[name])) for name in names))
    texts: list[str] = []
    sources: list[int] = []
    qualities: list[float] = []
    for i in range(n):
        if i and draw() < NEAR_DUPLICATES:
            first = int(draw() * i)
            text = f"{texts[first].rstrip()} {int(draw() * 1e9)}"
            source = sources[first]
        else:
            source = bisect(borders, draw() * borders[-1])
            text = _draw_text(pieces[names[source]], rng)
        texts.append(text)
        sources.append(source)
        qualities.append(draw())
    return pl.DataFrame(
        {
            "text": texts,
            "domain": [names[source][0] for source in sources],
            "source": [names[source][1] for source in sources],
            "quality": qualities,
        }
    )


def _draw_text(pieces: list[str], rng: Random) -> str:
    """One document: random pieces until its length is reached."""
    draw, n = rng.random, len(pieces)
    # Box and Muller's normal number, from the stream that is kept.
    normal = math.sqrt(-2 * math.log(1 - draw())) * math.cos(2 * math.pi * draw())
    least, most = DOCUMENT_CHARS
    wanted = min(max(math.exp(LENGTH_CENTRE + LENGTH_SPREAD * normal), least), most)
    parts: list[str] = []
    length = 0
    while length < wanted or len(parts) < LEAST_PIECES:
        piece = pieces[int(draw() * n)]
        parts.append(piece)
        length += len(piece)
    return "".join(parts)[:most].rstrip()


def write_file(pieces: Pieces, path: Path, n: int, *, seed: int, name: str) -> None:
    """Write a file of n documents; they depend on the seed and the name alone."""
    documents = draw_documents(pieces, n, seed=f"{seed} {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    documents.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP)


def write_pool(
    pieces: Pieces, folder: Path, n_documents: int, *, n_files: int = 40, seed: int = 0
) -> None:
    """Write a pool of files `part-000.parquet` and so on, as many documents in each."""
    borders = [n_documents * i // n_files for i in range(n_files + 1)]
    for i in range(n_files):
        name = f"part-{i:03d}.parquet"
        write_file(pieces, folder / name, borders[i + 1] - borders[i], seed=seed, name=name)


def demo_pieces(folder: Path | None = None) -> Pieces:
    """Pieces of the demo pool, assembled below `folder` or reused there."""
    if folder is not None:
        return read_pieces(assemble_demo_pool(folder).experiment_dir)
    with tempfile.TemporaryDirectory() as scratch:
        return read_pieces(assemble_demo_pool(Path(scratch) / "demo").experiment_dir)


def main() -> None:
    """Write a pool and say how long it took."""
    parser = argparse.ArgumentParser(description="Write a generated pool.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=800_000)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo-pool", type=Path, help="where the demo pool is or is assembled")
    options = parser.parse_args()
    pieces = demo_pieces(options.demo_pool)
    began = time.perf_counter()
    write_pool(pieces, options.folder, options.documents, n_files=options.files, seed=options.seed)
    print(f"{options.documents:,} documents in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
