"""Pictures that are small enough to be shown without a click, whatever the names."""

import re
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from causalmix_pipeline.assets.pictures import INLINE_LIMIT
from causalmix_pipeline.assets.small_pictures import (
    Fit,
    Interval,
    fit_picture,
    interval_picture,
    mixture_picture,
)

SVG = "{http://www.w3.org/2000/svg}"


def drawn(markdown: str) -> ElementTree.Element:
    """The document of an inline picture, as a browser gets it from markdown."""
    content = re.fullmatch(r"!\[\w+( \w+)*\]\(<data:image/svg\+xml,(.*)>\)", markdown)
    assert content is not None
    assert not re.search(r"(?<!\\)[<>&]|#", content[2])
    return ElementTree.fromstring(unquote(re.sub(r"\\(.)", r"\1", content[2])))


def test_weights_are_inline_and_bars_are_as_long_as_they():
    picture = mixture_picture(
        ["math", "code", "talk"], [0.5, 0.25, 0.25], [0.3, 0.3, 0.4], [0.4, 0.3, 0.3]
    ).md_str

    assert len(picture) < INLINE_LIMIT
    bars = drawn(picture).findall(f"{SVG}path")[0].get("d", "")
    assert [int(n) for n in re.findall(r"h(\d+)", bars)] == [220, 110, 110]
    assert "50.0%" in picture.replace("%25", "%")


def test_names_from_data_stay_text_in_a_small_picture():
    evil = ["<script>", "a&b'\"#%\\", "\u202e" + "W" * 300]

    for picture in (
        mixture_picture(evil, [0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]),
        interval_picture([Interval(name, 0.1, 0.0, 0.2) for name in evil], "gains"),
    ):
        text = "".join(drawn(picture.md_str).itertext())
        assert "<script>" in text
        assert "a&b'\"#%\\" in text
        assert "?" + "W" * 14 + "..." in text


def test_a_picture_of_many_names_is_shown_after_a_click():
    many = [f"domain {d}" for d in range(60)]
    shares = [1 / 60] * 60

    picture = mixture_picture(many, shares, shares, shares).md_str

    assert len(picture) > INLINE_LIMIT
    assert picture.startswith("![weights](data:image/svg+xml;base64,")


def test_intervals_of_ten_names_are_inline_without_their_numbers():
    few, many = (
        interval_picture([Interval(f"rival {d}", 0.1, 0.0, 0.2) for d in range(n)], "gains").md_str
        for n in (3, 10)
    )

    assert max(len(few), len(many)) < INLINE_LIMIT
    assert few.count("+0.1") == 3 and "+0.1" not in many
    dots = drawn(many).findall(f"{SVG}path")[2].get("d", "")
    assert len(re.findall(r"M(\d+) (\d+)h0", dots)) == 10


@pytest.mark.parametrize(("n_runs", "n_tasks"), [(18, 2), (500, 1), (500, 2), (500, 9)])
def test_a_fit_is_inline_with_few_tasks_and_its_dots_are_inside(n_runs, n_tasks):
    rng = np.random.default_rng(0)
    fits = [
        Fit(f"task {t}", rng.normal(size=n_runs), rng.normal(size=n_runs)) for t in range(n_tasks)
    ]

    picture = fit_picture(fits).md_str

    assert (len(picture) < INLINE_LIMIT) == (n_tasks <= 2)
    if n_tasks <= 2:
        document = drawn(picture)
        width, height = float(document.get("width", 0)), float(document.get("height", 0))
        dots = re.findall(r"M(\d+) (\d+)h0", document.findall(f"{SVG}path")[1].get("d", ""))
        assert len(dots) >= 18
        assert all(int(x) < width and int(y) < height for x, y in dots)


def test_an_equal_fit_and_unknown_intervals_can_be_drawn():
    drawn(fit_picture([Fit("math", np.ones(3), np.ones(3))]).md_str)
    document = drawn(interval_picture([Interval("regmix", None, None, None)], "gains").md_str)

    assert "unknown" in "".join(document.itertext())
