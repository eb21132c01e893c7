"""Tables that the UI shows inline: short, and unbroken by names from data."""

import re
from xml.etree import ElementTree

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from causalmix_pipeline.assets.pictures import (
    INLINE_LIMIT,
    Strip,
    bar,
    by_domain_table,
    cell,
    histogram,
    loss_curves,
    markdown_table,
    moves_plot,
    number,
    rounded,
    strips_plot,
    svg_picture,
)

SVG = "{http://www.w3.org/2000/svg}"


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.floats() | st.none()}), max_size=60))
def test_a_table_stays_below_the_limit_and_keeps_its_columns(rows):
    text = markdown_table(rows).md_str

    assert len(text) < INLINE_LIMIT
    for line in text.splitlines()[2:]:
        if line.startswith("|"):
            assert line.replace("\\\\", "").replace("\\|", "").count("|") == 3


def test_rows_that_do_not_fit_are_counted():
    text = markdown_table([{"name": f"domain {i}", "share": 0.1234567} for i in range(200)]).md_str

    shown = text.count("domain")
    assert text.endswith(f"and {200 - shown} more")
    assert "0.123" in text


def test_nothing_is_told_as_nothing():
    assert markdown_table([]).md_str == "nothing"
    assert cell(None) == "-"


def test_a_long_name_is_cut():
    assert cell("x" * 90) == "x" * 23 + "..."
    assert cell("x" * 90, 60) == "x" * 57 + "..."


def test_bars_are_as_long_as_the_shares():
    assert bar(0.75, 20) == "█" * 15
    assert bar(0.26, 4) == "█"
    assert bar(0.28, 4) == "█▏"
    assert bar(-1.0) == ""
    assert bar(9.0, 4) == "████"


def test_a_histogram_has_a_bar_for_every_cell_with_a_value():
    assert histogram([0.0, 0.1, 0.9], 0, 1, cells=4) == "█··▄"
    assert histogram([2.0], 2, 2, cells=3) == "█··"
    assert histogram([], 0, 1, cells=2) == "··"


def test_numbers_have_three_digits_and_stand_to_the_right_of_their_columns():
    table = markdown_table([{"a": "x", "n": 1234567, "f": 0.0123456, "ok": True, "none": None}])

    assert table.md_str.splitlines()[1:] == ["|-|-:|-:|-|-|", "|x|1,234,567|0.0123|yes|-|"]
    assert rounded(13779.0) == "13,779"
    assert number(0.123456).value == 0.1235


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("<b>", r"\<b\>"),
        ("[x](javascript:y)", r"\[x\](javascript\:y)"),
        ("a|b", r"a\|b"),
        ("`c`", r"\`c\`"),
        ("http://a.b", "`http://a.b`"),
        ("a\n\u202eb\u0000", "a ?b?"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
    ],
)
def test_a_label_is_no_markdown_and_no_invisible_letter(label, shown):
    assert cell(label) == shown


def test_domains_are_columns_while_they_fit_and_rows_beyond():
    few, many = list("abc"), list("abcdefgh")

    narrow = by_domain_table(few, {"natural": [0.1, 0.2, 0.7]}, "mixture").md_str
    wide = by_domain_table(many, {"natural": [0.1] * 8}, "mixture").md_str

    assert narrow.splitlines()[0] == "|mixture|a|b|c|"
    assert wide.splitlines()[0] == "|domain|natural|"


def test_dots_of_a_strip_stand_between_its_ends_and_the_mark_where_its_value_is():
    strips = [Strip("math", [0.0, 0.5, 1.0, float("nan")], 0.5), Strip("<x>", [], None)]
    plot = ElementTree.fromstring(strips_plot(strips, "shares", limits=(0, 1)))

    places = [
        int(part.split()[0]) for part in plot.findall(f"{SVG}path")[0].get("d", "").split("M")[1:]
    ]
    (mark,) = plot.findall(f"{SVG}line[@class='mark']")
    assert places == sorted(places)
    assert len(places) == 3
    assert float(mark.get("x1", 0)) == places[1]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=1)


def moves(*rows: tuple[str, str, float | None, float | None]) -> pl.DataFrame:
    return pl.DataFrame(
        rows,
        schema={
            "domain": pl.String,
            "covariate": pl.String,
            "effect": pl.Float64,
            "effect_se": pl.Float64,
        },
        orient="row",
    )


numbers = st.none() | st.floats(-1e6, 1e6) | st.just(float("inf"))


@example([("", "", 2.6e-162, None)])
@given(st.lists(st.tuples(st.text(), st.text(), numbers, st.none() | st.floats(0, 1e6))))
def test_a_plot_keeps_bars_intervals_and_texts_inside_whatever_the_names(rows):
    plot = ElementTree.fromstring(moves_plot(moves(*rows)))

    width, height = float(plot.get("width", 0)), float(plot.get("height", 0))
    for line in plot.iter(f"{SVG}line"):
        assert all(0 <= float(line.get(side, -1)) <= width for side in ("x1", "x2"))
    for box in plot.findall(f"{SVG}rect[@class='bar']"):
        assert 0 <= float(box.get("x", -1)) <= width - float(box.get("width", width))
    for text in plot.iter(f"{SVG}text"):
        at, size = float(text.get("x", -1)), 7.2 * len(text.text or "")
        start = at - {"start": 0, "middle": size / 2, "end": size}[text.get("text-anchor", "")]
        assert start >= 0 and start + size <= width
        assert float(text.get("y", height)) < height


def test_bars_and_intervals_are_as_long_as_the_moves():
    plot = ElementTree.fromstring(
        moves_plot(moves(("code", "hes", -4.0, 0.5), ("math", "mtld", 2.0, 0.5)))
    )

    bars = [float(box.get("width", 0)) for box in plot.findall(f"{SVG}rect[@class='bar']")]
    errors = [
        float(line.get("x2", 0)) - float(line.get("x1", 0))
        for line in plot.findall(f"{SVG}line[@class='error']")
    ]
    assert bars[0] / bars[1] == pytest.approx(2, rel=0.01)
    assert errors[0] == pytest.approx(bars[0] * 2 * 1.645 * 0.5 / 4, rel=0.01)
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_bars_beyond_the_limit_are_counted_and_unmoved_covariates_not_drawn():
    rows = [("math", f"m{i}", 20.0 - i, 0.1) for i in range(15)]

    plot = moves_plot(moves(*rows, ("math", "still", 0.0, 0.0)))

    assert plot.count('class="bar"') == 12
    assert "4 more not shown" in plot
    assert "still" not in plot
    assert "No covariate moved" in moves_plot(moves(("math", "still", 0.0, 0.0)))


def test_a_plot_has_a_background_and_colours_for_light_and_dark():
    plot = moves_plot(moves(("math", "mtld", 1.0, 0.1)))

    assert "prefers-color-scheme:dark" in plot
    assert '<rect class="back" width="100%" height="100%"/>' in plot
    assert set(re.findall(r"var\((--\w+)\)", plot)) == set(re.findall(r"(--\w+):#", plot))


@pytest.mark.parametrize(
    "curves",
    [
        [[5.0, 4.0, 3.5], [5.0, 3.0, 2.5]],
        [[4.0]],
        [[float("nan"), float("inf")], [3.0, float("nan")]],
        [[2.0, 2.0]],
    ],
)
def test_loss_curves_are_a_line_each_inside_the_picture_whatever_the_numbers(curves):
    picture = ElementTree.fromstring(loss_curves(curves))
    lines = picture.findall(f"{SVG}polyline")
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))

    assert len(lines) == len(curves)
    for line, curve in zip(lines, curves, strict=True):
        points = [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]
        assert len(points) == sum(loss == loss and abs(loss) != float("inf") for loss in curve)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_a_falling_loss_is_drawn_downwards_and_its_ends_are_labelled():
    svg = loss_curves([[5.0, 4.0, 2.5]])
    (line,) = ElementTree.fromstring(svg).findall(f"{SVG}polyline")
    heights = [float(point.split(",")[1]) for point in line.get("points", "").split()]

    assert heights == sorted(heights)
    assert ">5<" in svg
    assert ">2.5<" in svg
    assert svg_picture(svg, "losses").md_str.startswith("![losses](data:image/svg+xml;base64,")
