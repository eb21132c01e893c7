r"""Which covariate sees which degradation? One domain of a real pool is spoiled in known ways.

The pool is profiled before and after, on the clean pool's tokenizer, and the two profiles are
compared. A cell is the difference over its standard error; documents of both pools cancel. What
the table can't tell: whether a spoiled domain also trains worse.

    python -m causalmix_pipeline_tests.benchmarks.degradations --domain encyclopedia --domain math

takes a minute on one core; `--lm FOLDER` adds the metrics of a language model, on 20,000 tokens of
the spoiled domain: minutes a domain.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.demo_pool import assemble_demo_pool
from causalmix_pipeline.adapters.demo_sources import other_languages
from causalmix_pipeline.adapters.document_ids import document_id
from causalmix_pipeline.adapters.experiment import PoolTokenizer
from causalmix_pipeline.adapters.profiler import (
    PoolSpec,
    ScorerPlan,
    profile_pool,
    sample_compress_ratio,
    survey_pool,
)
from causalmix_pipeline.adapters.score_store import ScoreStore
from causalmix_pipeline.adapters.scorers import model_free_plans, model_plans
from causalmix_pipeline.adapters.text_scores import CharacterScorer
from causalmix_pipeline.core.covariates import (
    LANGUAGE_PREFIX,
    MODEL_METRICS,
    SAMPLE_BYTES,
    SAMPLE_CHARS,
    covariates_of,
)
from causalmix_pipeline.core.pool_change import compare_profiles
from causalmix_pipeline.core.work import InProcess

#: Standard errors from which a move counts as seen.
SEEN = 3.0
#: Share of the documents that noise or other languages take; of those that are copies.
SPOILED, COPIED = 1 / 3, 1 / 5
#: Share of a noisy document's characters that are replaced; of a near copy's words.
NOISE, EDITED = 0.1, 0.01
#: Longest piece of a line that is moved as one, characters.
LINE_CHARS = 80

# ---------------------------------------------------------------------------- degradations


def add_noise(texts: Sequence[str], rng: Random) -> list[str]:
    """A tenth of the characters of a third of the documents become random printable ones."""
    chosen = _some(texts, SPOILED, rng)
    return [_noisy(text, rng) if i in chosen else text for i, text in enumerate(texts)]


def shuffle_lines(texts: Sequence[str], rng: Random) -> list[str]:
    """The lines of every document in random order; long ones are cut at 80 characters first.

    What stands between two lines stays in its place: the characters and words are the same.
    """
    spoiled = []
    for text in texts:
        lines, between = _lines(text)
        rng.shuffle(lines)
        spoiled.append("".join(part for pair in zip(lines, between, strict=True) for part in pair))
    return spoiled


def add_near_copies(texts: Sequence[str], rng: Random) -> list[str]:
    """A fifth of the documents become copies of others with a hundredth of the words replaced."""
    return [
        _edited(text, rng) if i != source else text
        for i, (source, text) in enumerate(_sources(texts, rng))
    ]


def add_copies(texts: Sequence[str], rng: Random) -> list[str]:
    """A fifth of the documents become exact copies of others."""
    return [text for _, text in _sources(texts, rng)]


def truncate(texts: Sequence[str], rng: Random) -> list[str]:
    """Every document ends after a third of its characters."""
    return [text[: max(len(text) // 3, 1)] for text in texts]


def replace_by_other_languages(texts: Sequence[str], rng: Random) -> list[str]:
    """A third of the documents become talk in one of five languages, as long as they were.

    There are 170,000 characters of such talk: its short conversations are used several times over.
    """
    chosen, talk = _some(texts, SPOILED, rng), _talk()
    spoiled = []
    for i, text in enumerate(texts):
        if i in chosen:
            items = talk[rng.choice(sorted(talk))]
            parts: list[str] = []
            for item in rng.sample(items, len(items)):
                parts.append(item)
                if sum(map(len, parts)) >= len(text):
                    break
            text = "\n\n".join(parts)[: len(text)]
        spoiled.append(text)
    return spoiled


DEGRADATIONS: dict[str, Callable[[Sequence[str], Random], list[str]]] = {
    "noise": add_noise,
    "shuffled lines": shuffle_lines,
    "near-duplicates": add_near_copies,
    "exact copies": add_copies,
    "truncation": truncate,
    "other language": replace_by_other_languages,
}


def _some(texts: Sequence[str], share: float, rng: Random) -> set[int]:
    return set(rng.sample(range(len(texts)), round(share * len(texts))))


def _noisy(text: str, rng: Random) -> str:
    return "".join(chr(rng.randint(33, 126)) if rng.random() < NOISE else c for c in text)


def _sources(texts: Sequence[str], rng: Random) -> Iterator[tuple[int, str]]:
    """Of each document the place and text that it has now: its own, or another's that stays."""
    gone = _some(texts, COPIED, rng)
    kept = [i for i in range(len(texts)) if i not in gone]
    place = dict(zip(sorted(gone), rng.sample(kept, len(gone)), strict=True))
    return ((place.get(i, i), texts[place.get(i, i)]) for i in range(len(texts)))


def _edited(text: str, rng: Random) -> str:
    parts = re.split(r"(\s+)", text)
    words = [i for i, part in enumerate(parts) if part.strip()]
    pool = [parts[i] for i in words]
    for i in rng.sample(words, max(1, round(EDITED * len(words))) if words else 0):
        parts[i] = rng.choice(pool) + "s"
    return "".join(parts)


def _lines(text: str) -> tuple[list[str], list[str]]:
    """Pieces of at most 80 characters, a longer word apart, and the white space after each."""
    lines, between = [""], []
    for word, blank in re.findall(r"(\S*)(\s*)", text):
        lines[-1] += word
        if "\n" in blank or len(lines[-1]) + len(blank) >= LINE_CHARS:
            lines.append("")
            between.append(blank)
        else:
            lines[-1] += blank
    return lines, [*between, ""]


@lru_cache(maxsize=1)
def _talk() -> dict[str, list[str]]:
    talk: dict[str, list[str]] = {}
    for group, text in other_languages():
        talk.setdefault(group.split("-")[0], []).append(text)
    return talk


# ---------------------------------------------------------------------------- pools


def write_degraded(clean: Path, target: Path, domain: str, kind: str, *, seed: int) -> None:
    """Write a copy of a pool of JSONL files, a folder a domain, with one domain spoiled."""
    for path in sorted(clean.rglob("*.jsonl")):
        copy = target / path.relative_to(clean)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    rows = _rows(clean / domain)
    spoil, rng = DEGRADATIONS[kind], Random(f"{kind}/{domain}/{seed}")
    texts = spoil([row["text"] for _, row in rows], rng)
    for path in sorted({path for path, _ in rows}):
        lines = [
            json.dumps(row | {"text": text}, ensure_ascii=False) + "\n"
            for (of, row), text in zip(rows, texts, strict=True)
            if of == path
        ]
        (target / path.relative_to(clean)).write_text("".join(lines), encoding="utf-8")


def read_texts(pool: Path, domain: str) -> list[str]:
    """The texts of a domain, copies included."""
    return [row["text"] for _, row in _rows(pool / domain)]


def _rows(folder: Path) -> list[tuple[Path, dict]]:
    """The rows of a folder's files, each with its file."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        found += [(path, json.loads(line)) for line in lines if line]
    return found


def profile(
    pool: Path, plans: Sequence[ScorerPlan], store: ScoreStore, domain: str | None = None
) -> pl.DataFrame:
    """The documents frame of a pool, or of one domain of it, profiled in this process."""
    spec = PoolSpec(pool, domains=(domain,) if domain else None)
    return profile_pool(spec, plans, store=store, workers=InProcess()).documents


# ---------------------------------------------------------------------------- comparison


def compare(before: pl.DataFrame, after: pl.DataFrame, domains: Sequence[str]) -> pl.DataFrame:
    """Moves of every covariate that both pools have a value of; see `PoolChange.to_frame`."""
    empty = {name for name in before.columns if before[name].null_count() == before.height}
    names = dict.fromkeys([*covariates_of(before), *covariates_of(after)])
    return compare_profiles(before, after, domains, [n for n in names if n not in empty]).to_frame()


def sample_ratio_error(texts: Sequence[str], *, seed: int) -> float:
    """Standard error of `sample_compress_ratio`, of a domain's texts; nan under three samples.

    The domain is cut at random into samples of the size that a profile compresses, copies of a
    document side by side as in a profile; theirs is the standard deviation. (A bootstrap would draw
    documents twice and count its own copies.)
    """
    copies: dict[str, list[str]] = {}
    for text in texts:
        copies.setdefault(document_id(text), []).append(text)
    order = sorted(copies)
    Random(seed).shuffle(order)
    ratios, sample, size = [], [], 0
    for text in (text for identity in order for text in copies[identity]):
        sample.append(text[:SAMPLE_CHARS])
        size += len(sample[-1].encode())
        if size >= SAMPLE_BYTES:
            ratios.append(sample_compress_ratio("\n\n".join(sample).encode()))
            sample, size = [], 0
    return float(np.std(ratios, ddof=1)) if len(ratios) >= 3 else float("nan")


def with_sample_ratio_error(moves: pl.DataFrame, domain: str, error: float) -> pl.DataFrame:
    """The moves with a standard error for the domain's `sample_compress_ratio`."""
    here = (pl.col("domain") == domain) & (pl.col("covariate") == "sample_compress_ratio")
    return moves.with_columns(
        se=pl.when(here).then(error).otherwise("se"),
        z=pl.when(here).then(pl.col("difference") / error).otherwise("z"),
    ).with_columns(pl.col("se", "z").fill_nan(None))


def false_alarms(documents: pl.DataFrame, domain: str, *, splits: int = 100) -> tuple[float, int]:
    """Share of moves above 3 standard errors between random halves of a domain, and their number.

    The halves of one domain differ by chance alone, so about 0.3% is what it should be.
    """
    part = documents.filter(pl.col("domain") == domain).with_columns(
        sample_compress_ratio=pl.lit(None, dtype=pl.Float64)
    )
    rng, found = np.random.default_rng(0), []
    for _ in range(splits):
        first = rng.permutation(part.height) < part.height // 2
        halves = part.filter(pl.Series(first)), part.filter(pl.Series(~first))
        found.append(compare(*halves, [domain])["z"].drop_nulls())
    z = pl.concat(found).abs()
    return float((z > SEEN).mean()), len(z)  # pyright: ignore[reportArgumentType]


def cell(z: float | None) -> str:
    """A move in standard errors, bold above 3; empty where there is none."""
    if z is None:
        return ""
    text = "0" if z == 0 else f"{z:+.1f}"
    return f"**{text}**" if abs(z) > SEEN else text


def table(moves: pl.DataFrame, domain: str, covariates: Sequence[str]) -> str:
    """Markdown: a row per covariate of the spoiled domain, a column per degradation.

    Args:
        moves: of all degradations of the domain, with `degradation` and `spoiled`.
        domain: the spoiled one.
        covariates: in the order of the rows; others follow.
    """
    moves = moves.filter(pl.col("spoiled") == domain)
    outside = moves.filter(pl.col("domain") != domain)
    largest = outside.group_by("degradation", maintain_order=True).agg(pl.col("z").abs().max())["z"]
    wide = _wide(moves.filter(pl.col("domain") == domain), "z", covariates)
    lines = [[f"`{name}`", *map(cell, values)] for name, *values in wide.iter_rows()]
    return _markdown(
        [domain, *wide.columns[1:]], [*lines, ["other domains, largest", *map(cell, largest)]]
    )


def summary(moves: pl.DataFrame, covariates: Sequence[str]) -> str:
    """Markdown: spoiled domains whose covariate moved by more than 3 standard errors; as `table`.

    A covariate that isn't measured in all of the domains has both numbers.
    """
    inside = moves.filter(pl.col("domain") == pl.col("spoiled"))
    n_domains = inside["spoiled"].n_unique()
    counts = inside.group_by("degradation", "covariate", maintain_order=True).agg(
        seen=(pl.col("z").abs() > SEEN).sum(), n=pl.col("z").count()
    )
    counts = counts.filter(pl.col("n") > 0)
    text = pl.format("{} of {}", "seen", "n")
    counts = counts.with_columns(
        text=pl.when(pl.col("n") == n_domains).then(pl.col("seen").cast(pl.String)).otherwise(text),
        z=pl.when(pl.col("seen") > 0).then(float("inf")),
    )
    wide = _wide(counts, "text", covariates)
    rows = [[f"`{name}`", *(v or "" for v in values)] for name, *values in wide.iter_rows()]
    return _markdown([f"of {n_domains} domains", *wide.columns[1:]], rows)


def _wide(moves: pl.DataFrame, values: str, covariates: Sequence[str]) -> pl.DataFrame:
    """A row per covariate, a column per degradation; of the languages English and those seen."""
    order = {name: place for place, name in enumerate(covariates)}
    seen = pl.col("z").abs().max().over("covariate") > SEEN
    minor = pl.col("covariate").str.starts_with(LANGUAGE_PREFIX)
    english = pl.col("covariate") == LANGUAGE_PREFIX + "en"
    kept = moves.filter(~minor | english | seen).with_columns(
        place=pl.col("covariate").replace_strict(order, default=len(order))
    )
    wide = kept.pivot("degradation", index=["covariate", "place"], values=values)
    order_of_kinds = moves["degradation"].unique(maintain_order=True).to_list()
    return wide.sort("place", "covariate").select("covariate", *order_of_kinds)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Spoil, profile, compare; print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("data/demo"))
    parser.add_argument("--out", type=Path, default=Path("data/degradations"))
    parser.add_argument("--domain", action="append", help="spoiled; may be given several times")
    parser.add_argument("--kind", action="append", choices=list(DEGRADATIONS), help="default: all")
    parser.add_argument("--lm", type=Path, help="folder of a causal LM")
    parser.add_argument("--lm-tokens", type=int, default=20_000, help="tokens of each domain")
    parser.add_argument("--rater", type=Path, help="folder of a sequence classifier")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.pool / "experiment").exists():
        assemble_demo_pool(args.pool)
    clean, store = args.pool / "experiment", ScoreStore(args.out / "scores")
    sample = survey_pool(PoolSpec(clean), max_bytes=2**26).sample
    tokenizer = PoolTokenizer.fit(sample, vocab_size=1024)
    tokens = tokenizer.scorer(args.out / "tokenizers")
    plans = model_free_plans(tokens, vocd_budget_tokens=100_000)
    models = [
        ScorerPlan(tokens),
        ScorerPlan(CharacterScorer()),
        *model_plans(
            lm=args.lm, lm_budget_tokens=args.lm_tokens, rater=args.rater,
            rater_budget_tokens=args.lm_tokens, device="cpu",
        ),
    ]  # fmt: skip
    started = time.time()
    before = profile(clean, plans, store)
    domains = sorted(before["domain"].unique().to_list())
    print(f"clean pool profiled in {time.time() - started:.0f} s", flush=True)
    every: list[pl.DataFrame] = []
    rows = (*covariates_of(before), *MODEL_METRICS)
    for domain in args.domain or ["encyclopedia"]:
        error = sample_ratio_error(read_texts(clean, domain), seed=args.seed)
        before_models = profile(clean, models, store, domain)
        for kind in args.kind or DEGRADATIONS:
            with TemporaryDirectory(dir=args.out) as folder:
                pool = Path(folder)
                write_degraded(clean, pool, domain, kind, seed=args.seed)
                after = profile(pool, plans, store)
                after_models = profile(pool, models, store, domain)
                spoiled = sample_ratio_error(read_texts(pool, domain), seed=args.seed)
            # The other domains' scores are kept by content: models needn't see them.
            of_models = compare(before_models, after_models, [domain]).filter(
                pl.col("covariate").is_in(MODEL_METRICS)
            )
            moves = pl.concat([compare(before, after, domains), of_models])
            moves = with_sample_ratio_error(moves, domain, float(np.hypot(error, spoiled)))
            every.append(moves.with_columns(degradation=pl.lit(kind), spoiled=pl.lit(domain)))
        print(table(pl.concat(every), domain, rows), flush=True)
        share, n = false_alarms(before, domain)
        print(f"random halves of {domain}: {100 * share:.2f}% of {n} moves above {SEEN:g}\n")
    pl.concat(every).write_csv(args.out / "degradations.csv")
    print(summary(pl.concat(every), rows))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
