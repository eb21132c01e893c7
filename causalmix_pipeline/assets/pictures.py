"""Small tables and bars for metadata, which the UI shows inline below 1,000 characters; a plot."""

import base64
import html
import math
import unicodedata
from collections.abc import Mapping, Sequence

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

#: Own background, so that text can be read on a page of any colour.
PLOT_CSS = """
svg{--back:#fff;--text:#1a1a1a;--faint:#767676;--line:#d0d0d0;--bar:#2f6fb5}
@media(prefers-color-scheme:dark){
svg{--back:#1c1f24;--text:#eceff3;--faint:#9aa3ad;--line:#444b54;--bar:#6ca8e8}}
.back{fill:var(--back)}text{fill:var(--text);font:12px ui-monospace,Menlo,Consolas,monospace}
.faint{fill:var(--faint)}.line{stroke:var(--line)}.bar{fill:var(--bar)}
.error{stroke:var(--text);stroke-width:1.5}
"""


def cell(value: object) -> str:
    """A value as a short text that can't break a markdown table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _shortened(str(value), 40).replace("\\", "\\\\").replace("|", "\\|")


def markdown_table(rows: Sequence[Mapping[str, object]]) -> dg.MarkdownMetadataValue:
    """Rows as a markdown table, cut before it is too long to be shown inline."""
    if not rows:
        return dg.MetadataValue.md("nothing")
    names = list(rows[0])
    lines = ["|".join(["", *map(cell, names), ""]), "|".join(["", *["-"] * len(names), ""])]
    for i, row in enumerate(rows):
        line = "|".join(["", *(cell(row[name]) for name in names), ""])
        if sum(map(len, lines)) + len(lines) + len(line) > INLINE_LIMIT - 40:
            return dg.MetadataValue.md("\n".join([*lines, "", f"and {len(rows) - i} more"]))
        lines.append(line)
    return dg.MetadataValue.md("\n".join(lines))


def share_bars(shares: Mapping[str, float]) -> dg.MarkdownMetadataValue:
    """Shares as a markdown table with bars of blocks; 20 blocks are everything."""
    return markdown_table(
        [
            {"domain": name, "share": f"{share:.3f}", "": "█" * round(20 * share)}
            for name, share in shares.items()
        ]
    )


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
    label_width = LETTER_WIDTH * max(map(_letters, labels), default=0) + 16
    value_width = LETTER_WIDTH * max(map(_letters, values), default=0) + 16
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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<style>{PLOT_CSS}</style><rect class="back" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>"
    )


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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<style>{PLOT_CSS}</style><rect class="back" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>"
    )


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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + 12}" '
        f'viewBox="0 0 {width:.0f} {bottom + 12}" role="img" aria-label="{html.escape(title)}">'
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
    text = "".join(letter if letter.isprintable() else "?" for letter in text)  # XML has no others
    return (
        f'<text class="{css}" x="{x:.1f}" y="{ROW_HEIGHT * number + 18}" '
        f'text-anchor="{anchor}">{html.escape(text)}</text>'
    )
