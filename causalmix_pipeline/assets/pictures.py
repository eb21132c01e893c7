"""Tables for metadata, which the UI shows inline below 1,000 characters; plots behind a click."""

import base64
import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.core.effects import Z90

#: Length from which Dagster hides markdown behind a click.
INLINE_LIMIT = 1000

#: Width of a fixed-width letter and height of a row of a plot, in pixels at a text size of 12.
LETTER_WIDTH, ROW_HEIGHT = 7.4, 22

#: Width of the part of a plot that holds the bars, in pixels.
BARS_WIDTH = 320

#: Width of a strip of dots, so that labels and numbers beside it fit a dialog.
STRIP_WIDTH = 230

#: Columns of numbers that fit the page of an asset.
MOST_COLUMNS = 5

#: What markdown would read as more than a letter.
_MARKDOWN = re.compile(r"[\\`*_\[\]<>&|~!:@#]")

#: What markdown makes a link of by itself, whatever is escaped.
_ADDRESS = re.compile(r"://|www\.|@")

#: Letters of a name in a table; more makes the table wider than the page.
MOST_LETTERS = 26

#: Invisible letters that scripts of Asia and combined signs need.
_JOINERS = "\u200c\u200d"

#: Own background, so that text can be read on a page of any colour.
PLOT_CSS = """
svg{--back:#fff;--text:#1a1a1a;--faint:#767676;--line:#d0d0d0;--bar:#2f6fb5;--mark:#c2410c}
@media(prefers-color-scheme:dark){
svg{--back:#1c1f24;--text:#eceff3;--faint:#9aa3ad;--line:#444b54;--bar:#6ca8e8;--mark:#fb923c}}
.back{fill:var(--back)}text{fill:var(--text);font:12px ui-monospace,Menlo,Consolas,monospace}
.faint{fill:var(--faint)}.line{stroke:var(--line)}.bar{fill:var(--bar)}
.error{stroke:var(--text);stroke-width:1.5}
.dots{stroke:var(--bar);stroke-width:5;stroke-linecap:round;opacity:.45;fill:none}
.mark{stroke:var(--mark);stroke-width:3}
"""


def plain(value: object, length: int = MOST_LETTERS) -> str:
    """A value as one short line: no line break, no letter that turns or hides what follows.

    Letters that can't be seen, such as marks of right-to-left text, become `?`; the two that join
    letters of some scripts stay.
    """
    text = _shortened(str(value), length)
    return "".join(a if a.isprintable() or a in _JOINERS else "?" for a in text)


def markdown_text(value: object, length: int = MOST_LETTERS) -> str:
    """A value as one short line of markdown that is shown as it is."""
    text = plain(value, length)
    if _ADDRESS.search(text) and not re.search(r"[`\\|]", text):
        return f"`{text}`"  # only code keeps an address from becoming a link
    return _MARKDOWN.sub(r"\\\g<0>", text)


def cell(value: object, length: int = MOST_LETTERS) -> str:
    """A value as a short text that a markdown table shows as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return rounded(value)
    return markdown_text(value, length)


def rounded(value: float) -> str:
    """A number with three significant digits; one of 1,000 or more without decimals."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"


def number(value: float) -> dg.FloatMetadataValue:
    """A number whose history Dagster plots, with four significant digits."""
    return dg.MetadataValue.float(float(f"{value:.4g}"))


def markdown_table(
    rows: Sequence[Mapping[str, object]], length: int = MOST_LETTERS
) -> dg.MarkdownMetadataValue:
    """Rows as a markdown table, numbers to the right, cut before it is too long to be inline.

    Args:
        rows: the rows; the first one's names are the columns.
        length: most letters of a cell.
    """
    if not rows:
        return dg.MetadataValue.md("nothing")
    names = list(rows[0])
    sides = ["-:" if _is_numbers([row[name] for row in rows]) else "-" for name in names]
    heads = [markdown_text(name, 32) for name in names]
    lines = ["|".join(["", *heads, ""]), "|".join(["", *sides, ""])]
    for i, row in enumerate(rows):
        line = "|".join(["", *(cell(row[name], length) for name in names), ""])
        if sum(map(len, lines)) + len(lines) + len(line) > INLINE_LIMIT - 40:
            return dg.MetadataValue.md("\n".join([*lines, "", f"and {len(rows) - i} more"]))
        lines.append(line)
    return dg.MetadataValue.md("\n".join(lines))


def by_domain_table(
    domains: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    name: str,
    of: str = "domain",
) -> dg.MarkdownMetadataValue:
    """A number per row and domain; domains are the columns while these fit the page.

    Args:
        domains: D names.
        rows: names to D numbers.
        name: head of the column that holds the names of the rows.
        of: what the numbers of a row are of, if it isn't domains.
    """
    if len(domains) <= MOST_COLUMNS:
        table = [
            {name: row, **dict(zip(domains, numbers, strict=True))} for row, numbers in rows.items()
        ]
    else:
        table = [
            {of: domain, **{row: numbers[d] for row, numbers in rows.items()}}
            for d, domain in enumerate(domains)
        ]
    return markdown_table(table)


def _is_numbers(values: Sequence[object]) -> bool:
    kinds = {type(value) for value in values if value is not None}
    return bool(kinds) and kinds <= {int, float}


def bar(share: float, cells: int = 12) -> str:
    """A share of 0 to 1 as blocks, eighths of a cell exact."""
    eighths = round(8 * cells * min(max(share, 0.0), 1.0))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def histogram(values: Sequence[float], low: float, high: float, cells: int = 16) -> str:
    """How values spread from `low` to `high`, as blocks of heights; a cell with any has a bar."""
    counts, _ = np.histogram(values, bins=cells, range=(low, high if high > low else low + 1))
    top = max(int(counts.max(initial=0)), 1)
    return "".join("·▁▂▃▄▅▆▇█"[math.ceil(8 * count / top)] for count in counts.tolist())


def moves_plot(moves: pl.DataFrame, limit: int = 12, unit: str = "standard deviations") -> str:
    """The largest moves of a pool's covariates as bars with 90% intervals, an SVG document.

    Args:
        moves: `PoolChange.to_frame()`, or rows of it.
        limit: most bars.
        unit: what an effect of 1 is.
    """
    rows = moves.filter(pl.col("effect").abs() > 0).head(limit).to_dicts()
    hidden = moves.height - len(rows)
    title = f"Moves in {unit}, lines are 90% intervals" if rows else "No covariate moved"
    below = f"{hidden} more not shown" if hidden and rows else ""
    labels = [_shortened(f"{row['domain']} · {row['covariate']}", 64) for row in rows]
    values = [f"{row['effect']:+.3g}" for row in rows]
    # The least that a number below an end of the scale needs, such as -2.6e-162.
    least = LETTER_WIDTH * 3
    label_width = max(LETTER_WIDTH * max(map(_letters, labels), default=0), least) + 16
    value_width = max(LETTER_WIDTH * max(map(_letters, values), default=0), least) + 16
    width = max(label_width + BARS_WIDTH + value_width, LETTER_WIDTH * _letters(title) + 32)
    height = ROW_HEIGHT * (len(rows) + 1 + bool(rows) + bool(below)) + 8
    middle, half = label_width + BARS_WIDTH / 2, BARS_WIDTH / 2 - 8
    reach = max(map(_reach, rows), default=1.0) or 1.0
    parts = [_text(8, 0, title)]
    for i, (row, label, value) in enumerate(zip(rows, labels, values, strict=True), start=1):
        parts.append(_text(label_width - 8, i, label, anchor="end"))
        parts.append(_bar(row, i, middle, half / reach, half))
        parts.append(_text(label_width + BARS_WIDTH + 8, i, value))
    if rows:
        bottom = ROW_HEIGHT * (len(rows) + 1) + 4
        parts.append(_line(middle, ROW_HEIGHT + 4, middle, bottom, "line"))
        for place, at in ((-reach, middle - half), (0, middle), (reach, middle + half)):
            parts.append(_text(at, len(rows) + 1, f"{place:.2g}", anchor="middle", css="faint"))
    if below:
        parts.append(_text(8, len(rows) + 2, below, css="faint"))
    return _document(parts, width, height, title)


def effect_map(size_CD: np.ndarray, covariates: Sequence[str], domains: Sequence[str]) -> str:
    """How far covariates (rows) move the effect of each domain (columns), an SVG document.

    Args:
        size_CD: sizes >= 0; the darkest cell is the largest.
        covariates: names of the rows.
        domains: names of the columns.
    """
    rows = [_shortened(name, 40) for name in covariates]
    heads = [_shortened(name, 16) for name in domains]
    title = "How far a covariate (row) moves the effect of a domain (column)"
    label_width = LETTER_WIDTH * max(map(_letters, rows), default=0) + 16
    cell = max(LETTER_WIDTH * max(map(_letters, heads), default=0) + 12, 56)
    width = max(label_width + cell * len(heads) + 8, LETTER_WIDTH * _letters(title) + 32)
    height = ROW_HEIGHT * (len(rows) + 2) + 8
    top = float(size_CD.max(initial=0.0)) or 1.0
    parts = [_text(8, 0, title)]
    middles = [label_width + (i + 0.5) * cell for i in range(len(heads))]
    parts += [_text(x, 1, head, anchor="middle") for x, head in zip(middles, heads, strict=True)]
    for number, (name, sizes) in enumerate(zip(rows, size_CD, strict=True), start=2):
        parts.append(_text(label_width - 8, number, name, anchor="end"))
        for x, size in zip(middles, sizes, strict=True):
            parts.append(
                f'<rect class="bar" x="{x - cell / 2 + 1:.1f}" y="{ROW_HEIGHT * number + 4}" '
                f'width="{cell - 2:.1f}" height="{ROW_HEIGHT - 2}" '
                f'opacity="{0.55 * size / top:.3f}"/>'
            )
            parts.append(_text(x, number, f"{size:.2g}", anchor="middle"))
    return _document(parts, width, height, title)


def loss_curves(curves: Sequence[Sequence[float]]) -> str:
    """Training losses of some runs as lines over the run, an SVG document.

    Args:
        curves: losses at equally spaced points; the last curve is drawn strongest. Those that
            aren't numbers are left out.
    """
    finite = [loss for curve in curves for loss in curve if math.isfinite(loss)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    title = f"Loss over the run, nats a token, last {len(curves)} runs"
    label_width, plot_height = 64, 120
    width = max(label_width + BARS_WIDTH + 16, LETTER_WIDTH * _letters(title) + 32)
    top = ROW_HEIGHT + 8
    pixels = plot_height / ((high - low) or 1.0)
    parts = [_text(8, 0, title)]
    for number, curve in enumerate(curves, start=1):
        step = BARS_WIDTH / max(len(curve) - 1, 1)
        points = " ".join(
            f"{label_width + i * step:.1f},{top + (high - loss) * pixels:.1f}"
            for i, loss in enumerate(curve)
            if math.isfinite(loss)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" style="stroke:var(--bar)" '
            f'stroke-width="1.5" opacity="{0.25 + 0.75 * number / len(curves):.2f}"/>'
        )
    bottom = top + plot_height
    parts.append(_line(label_width, top, label_width, bottom, "line"))
    parts.append(_line(label_width, bottom, label_width + BARS_WIDTH, bottom, "line"))
    for loss, y in ((high, top + 8), (low, bottom)):
        parts.append(
            f'<text class="faint" x="{label_width - 6}" y="{y}" text-anchor="end">{loss:.3g}</text>'
        )
    return _document(parts, width, bottom + 12, title)


@dataclass(frozen=True)
class Strip:
    """A row of a plot of strips: a name, the values seen, and one that is pointed out."""

    label: str
    values: Sequence[float]
    mark: float | None = None


def strips_plot(
    strips: Sequence[Strip], title: str, *, limits: tuple[float, float] | None = None
) -> str:
    """Values as dots on a strip a row, each strip on a scale of its own; an SVG document.

    Args:
        strips: the rows; numbers that aren't finite are left out.
        title: what a dot is and, where a strip has a mark, what that is.
        limits: one scale for all strips; None takes the least and largest value of each.
    """
    labels = [_shortened(strip.label, 34) for strip in strips]
    label_width = LETTER_WIDTH * max(map(_letters, labels), default=0) + 16
    width = max(label_width + STRIP_WIDTH + 160, LETTER_WIDTH * _letters(title) + 32)
    parts = [_text(8, 0, title)]
    for number, (strip, label) in enumerate(zip(strips, labels, strict=True), start=1):
        seen = [value for value in strip.values if math.isfinite(value)]
        ends = [*seen, *([] if strip.mark is None else [strip.mark])]
        low, high = limits or (min(ends, default=0.0), max(ends, default=1.0))
        parts.append(_text(label_width - 8, number, label, anchor="end"))
        parts += _strip(seen, strip.mark, label_width + 8, number, (low, high))
        parts.append(
            _text(
                label_width + STRIP_WIDTH + 8,
                number,
                f"{rounded(min(ends, default=0.0))} to {rounded(max(ends, default=0.0))}",
                css="faint",
            )
        )
    return _document(parts, width, ROW_HEIGHT * (len(strips) + 1) + 12, title)


def _strip(
    values: Sequence[float],
    mark: float | None,
    left: float,
    number: int,
    limits: tuple[float, float],
) -> list[str]:
    """The line, the dots and the mark of a strip; dots of one place are drawn once."""
    pixels, middle = (STRIP_WIDTH - 16) / ((limits[1] - limits[0]) or 1.0), ROW_HEIGHT * number + 14

    def at(value: float) -> int:
        return round(left + min(max((value - limits[0]) * pixels, 0), STRIP_WIDTH - 16))

    places = sorted({at(value) for value in values})
    path = "".join(f"M{place} {middle}h0" for place in places)
    parts = [_line(left, middle, left + STRIP_WIDTH - 16, middle, "line")]
    parts.append(f'<path class="dots" d="{path}"/>')
    if mark is not None:
        parts.append(_line(at(mark), middle - 8, at(mark), middle + 8, "mark"))
    return parts


def _document(parts: Sequence[str], width: float, height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<style>{PLOT_CSS}</style><rect class="back" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>"
    )


def svg_picture(svg: str, name: str) -> dg.MarkdownMetadataValue:
    """An SVG document as metadata that the UI shows as a picture."""
    content = base64.b64encode(svg.encode()).decode()
    return dg.MetadataValue.md(f"![{name}](data:image/svg+xml;base64,{content})")


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _letters(text: str) -> int:
    """Columns that a text takes in a fixed-width font; letters of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _reach(row: Mapping[str, float | None]) -> float:
    """How far from 0 a bar and its interval reach; 0 for an infinite one, which is cut."""
    reach = abs(row["effect"] or 0.0) + Z90 * (row["effect_se"] or 0.0)
    return reach if math.isfinite(reach) else 0.0


def _bar(
    row: Mapping[str, float | None], number: int, middle: float, pixels: float, half: float
) -> str:
    def at(value: float) -> float:
        return middle + max(-half, min(half, value * pixels))

    effect, error = row["effect"] or 0.0, Z90 * (row["effect_se"] or 0.0)
    top = ROW_HEIGHT * number + 9
    left, right = sorted((middle, at(effect)))
    bar = (
        f'<rect class="bar" x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="10" '
        'opacity=".75"/>'
    )
    if not error or not math.isfinite(effect):
        return bar
    return bar + _line(at(effect - error), top + 5, at(effect + error), top + 5, "error")


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}"/>'


def _text(x: float, number: int, text: str, *, anchor: str = "start", css: str = "text") -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{ROW_HEIGHT * number + 18}" '
        f'text-anchor="{anchor}">{html.escape(plain(text, 200))}</text>'
    )
