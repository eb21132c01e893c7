"""Tables that the UI shows inline: short, and unbroken by names from data."""

from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.assets.pictures import INLINE_LIMIT, cell, markdown_table, share_bars


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
    assert "0.1235" in text


def test_nothing_is_told_as_nothing():
    assert markdown_table([]).md_str == "nothing"
    assert cell(None) == "-"


def test_a_long_name_is_cut():
    assert cell("x" * 90) == "x" * 37 + "..."


def test_bars_are_as_long_as_the_shares():
    lines = share_bars({"math": 0.75, "code": 0.25}).md_str.splitlines()

    assert [line.count("█") for line in lines[2:]] == [15, 5]
