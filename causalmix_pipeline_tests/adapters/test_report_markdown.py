"""The Markdown of a report, read by a real parser: answers, tables, and names that stay text."""

import dataclasses
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from causalmix_pipeline.adapters.report_markdown import (
    MOST_LETTERS,
    markdown_name,
    render_markdown,
    write_markdown,
)
from causalmix_pipeline_tests.adapters.test_report_html import TOP_UP, frame, report_data

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>|`a`*b*_c_\n[x](javascript:alert(1))',
    "\u202e![i](http://example.com/x.png) 'evil' " + "W" * 300,
)

PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


class _Page(HTMLParser):
    """Tags with their attributes, and the cells of each row of the tables."""

    def __init__(self, markdown: str):
        super().__init__()
        self.tags: list[tuple[str, list]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._in_cell = False
        self.feed(PARSER.render(markdown))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def test_the_five_answers_stand_before_the_tables():
    text = _Page(render_markdown(report_data())).text

    questions = ("What to train on:", "How much better:", "How sure:", "Why:",
                 "What would change it:")  # fmt: skip
    places = [text.index(question) for question in questions]
    assert places == sorted(places)
    assert places[-1] < text.index("change, points")
    assert "Train on math 50%, manuals 30%, prose 20%." in text
    assert "+0.046 bits per byte over the reference mixture (natural)" in text
    assert "90% interval +0.031 to +0.061, all of it a gain" in text


def test_tables_hold_mixture_gains_limits_and_origins():
    rows = _Page(render_markdown(report_data())).rows

    assert ["math", "50%", "20%", "20%", "+30.0"] in rows
    assert ["solving", "75%", "+0.050", "+0.030", "+0.070"] in rows
    assert ["prose: least share", "0.200", "0.200", "yes"] in rows
    assert ["verdict", "supported"] in rows
    assert ["live pool", "9c1f3a7d"] in rows


def test_an_unsupported_pool_promises_nothing():
    mixtures = dict(report_data().mixtures)
    mixtures["recommended"] = mixtures["reference"]

    text = render_markdown(report_data(verdict="unsupported", mixtures=mixtures, top_up=TOP_UP))

    assert "No gain is promised" in text
    assert "The 2 proxy runs of the top-up plan" in text
    assert "Gain on each task" not in text


def test_where_limits_forbid_the_reference_the_heading_says_so():
    text = render_markdown(report_data(verdict="unsupported"))

    assert text.startswith("# Nearest to the reference mixture that the limits allow\n")


def test_gains_of_tasks_that_are_no_losses_are_in_their_own_units():
    data = report_data(losses=frozenset(), unconstrained_gain=0.5)

    text = render_markdown(data)

    assert "gain, the tasks' own units" in text
    assert "Without any limit: +0.500, in the tasks' own units." in text
    assert "bits per byte" not in text
    assert "gain, bits per byte" in render_markdown(report_data())


def test_hostile_names_neither_run_nor_break_tables_nor_become_links():
    evil = HOSTILE[1]
    data = report_data(
        domains=HOSTILE,
        covariates=frame("covariates", [(evil, evil, 9.0, [0.1, 0.2])]),
        task_gains=frame("task_gains", [(HOSTILE[0], 1.0, 0.1, 0.0, 0.2, None)]),
        slack=frame("slack", [(HOSTILE[2], 0.1, 0.1, 0.0, True)]),
        provenance=dict.fromkeys(HOSTILE, evil),
        reference_name=evil,
        policy=evil,
    )

    markdown = render_markdown(data)
    page = _Page(markdown)

    assert {tag for tag, _ in page.tags} <= {
        "h1", "h2", "p", "ul", "li", "strong", "code", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert not [attrs for tag, attrs in page.tags if any(name != "style" for name, _ in attrs)]
    assert [len(row) for row in page.rows[:4]] == [5, 5, 5, 5]
    assert page.rows[1][0] == HOSTILE[0]
    assert "\u202e" not in markdown and "[U+202E]" in page.text


@given(st.text(min_size=1, max_size=2 * MOST_LETTERS))
def test_any_name_is_shown_in_one_cell_and_as_it_is(name):
    page = _Page(f"| a | b |\n| --- | --- |\n| {markdown_name(name)} | 1 |\n")

    assert [len(row) for row in page.rows] == [2, 2]
    assert {tag for tag, _ in page.tags} <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    if name.isprintable() and len(name) <= MOST_LETTERS and name == name.strip():
        assert page.rows[1][0] == name


@pytest.mark.parametrize("name", ["code_reasoning", "math: tokens available", "v1.2-b", "a"])
def test_a_harmless_name_stands_as_it_is(name):
    assert markdown_name(name) == name


@pytest.mark.parametrize("name", ["@team", "www.example.com", "http://a.b", "_a_", "a  b", "1. "])
def test_what_markdown_might_act_on_stands_in_code(name):
    assert markdown_name(name).startswith("<code>")


def test_a_gain_that_may_be_none_says_so():
    gains = frame("gains", [("recommended", 0.046, -0.01, 0.1)])
    unknown = frame("gains", [("recommended", 0.046, None, None)])

    assert "no gain at all is possible too" in render_markdown(report_data(gains=gains))
    assert "gives no interval" in render_markdown(report_data(gains=unknown))


def test_the_file_is_written_whole(tmp_path):
    path = write_markdown(tmp_path / "report.md", report_data())

    assert path.read_text(encoding="utf-8") == render_markdown(report_data())
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_without_limits_the_list_of_them_says_none():
    data = dataclasses.replace(report_data(), slack=report_data().slack.clear())

    assert "None is set." in render_markdown(data)
