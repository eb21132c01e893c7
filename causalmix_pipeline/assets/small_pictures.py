"""Pictures so small that Dagster shows them without a click: their markdown has a length limit.

Text and lines are of a middle tone, which can be read on a light and on a dark page.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg
import numpy as np

from causalmix_pipeline.assets.pictures import (
    INLINE_LIMIT,
    LETTER_WIDTH,
    plain,
    rounded,
    svg_picture,
)

#: Colours that stand out on white and on black; names, since markdown needs no escape for them.
TEXT, MAIN, OTHER = "gray", "steelblue", "darkorange"

#: Height of a row, in pixels.
ROW = 20

#: Points of a small scatter plot, from the most to the fewest that are tried to fit.
POINT_COUNTS = (400, 60, 40, 28)


def small_picture(parts: Sequence[str], width: int, height: int, name: str) -> str:
    """Parts of an SVG document as markdown of an image; see `inline_picture` for the limit."""
    svg = _svg(parts, width, height)
    for letter, escaped in (("%", "%25"), ("#", "%23"), ("\\", "\\\\")):
        svg = svg.replace(letter, escaped)
    for letter in "<>&":
        svg = svg.replace(letter, f"\\{letter}")
    return f"![{name}](<data:image/svg+xml,{svg}>)"


def inline_picture(
    parts: Sequence[str], width: int, height: int, name: str
) -> dg.MarkdownMetadataValue:
    """Parts of an SVG document as metadata; beyond the limit Dagster shows it after a click."""
    markdown = small_picture(parts, width, height, name)
    if len(markdown) < INLINE_LIMIT:
        return dg.MetadataValue.md(markdown)
    return svg_picture(_svg(parts, width, height), name)


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"font-family='monospace' font-size='12' fill='{TEXT}'>{''.join(parts)}</svg>"
    )


def mixture_picture(
    domains: Sequence[str],
    recommended: Sequence[float],
    reference: Sequence[float],
    natural: Sequence[float],
) -> dg.MarkdownMetadataValue:
    """Weights as bars, a tick at the reference's weight and a dot at the natural one."""
    labels = [plain(domain, 18) for domain in domains]
    left, bars = round(LETTER_WIDTH * max(map(len, labels))) + 8, 220
    scale = bars / max(*recommended, *reference, *natural)

    def path(shape: str, shares: Sequence[float]) -> str:
        return "".join(
            f"M{left} {ROW * d + 28}" + shape.format(round(share * scale))
            for d, share in enumerate(shares)
        )

    texts = "".join(
        f"<text y='{ROW * d + 32}'>{html.escape(label)}"
        f"<tspan x='{left + bars + 8}'>{share:.1%}</tspan></text>"
        for d, (label, share) in enumerate(zip(labels, recommended, strict=True))
    )
    parts = [
        "<text y='12'>bar: recommended, tick: reference, dot: natural</text>",
        texts,
        f"<path d='{path('h{}', recommended)}' stroke='{MAIN}' stroke-width='12'/>",
        f"<path d='{path('m{} -8v16', reference)}' stroke='{OTHER}' stroke-width='3'/>",
        f"<path d='{path('m{} 0h0', natural)}' stroke='{TEXT}' stroke-width='7' "
        "stroke-linecap='round'/>",
    ]
    return inline_picture(parts, max(left + bars + 64, 360), ROW * len(domains) + 24, "weights")


@dataclass(frozen=True, eq=False)
class Fit:
    """Observed outcomes of a task beside predictions; equally long, finite."""

    task: str
    observed: np.ndarray
    predicted: np.ndarray


def fit_picture(fits: Sequence[Fit]) -> dg.MarkdownMetadataValue:
    """Predicted (up) against observed (right), a square per task, a diagonal where they agree.

    Where all runs don't fit inline, evenly chosen ones are drawn; where those don't, all.
    """
    pictures = [_fit_parts(fits, count) for count in POINT_COUNTS]
    size = 160 * min(len(fits), 3), 186 * -(-len(fits) // 3)
    for parts in pictures:
        if len(small_picture(parts, *size, "fit")) < INLINE_LIMIT:
            return inline_picture(parts, *size, "fit")
    return inline_picture(pictures[0], *size, "fit")


def _fit_parts(fits: Sequence[Fit], count: int) -> list[str]:
    lines, dots, texts = "", "", ""
    for number, fit in enumerate(fits):
        left, top = 160 * (number % 3), 186 * (number // 3) + 18
        lines += f"M{left} {top}v140h140M{left} {top + 140}l140-140"
        both = np.concatenate([fit.observed, fit.predicted])
        low, high = float(both.min()), float(both.max())
        scale = 132 / ((high - low) or 1.0)
        chosen = np.unique(np.linspace(0, len(fit.observed) - 1, min(count, len(fit.observed))))
        for i in chosen.round().astype(int).tolist():
            x = left + 4 + (fit.observed[i] - low) * scale
            y = top + 136 - (fit.predicted[i] - low) * scale
            dots += f"M{x:.0f} {y:.0f}h0"
        label = f"{plain(fit.task, 12)} {rounded(low)}..{rounded(high)}"
        texts += f"<text x='{left}' y='{top - 6}'>{html.escape(label)}</text>"
    return [
        texts,
        f"<path d='{lines}' stroke='{TEXT}' fill='none'/>",
        f"<path d='{dots}' stroke='{MAIN}' stroke-width='5' stroke-linecap='round'/>",
    ]


@dataclass(frozen=True)
class Interval:
    """A name with an estimate and the ends of its interval; None where it isn't known."""

    label: str
    value: float | None
    low: float | None
    high: float | None


def interval_picture(rows: Sequence[Interval], name: str) -> dg.MarkdownMetadataValue:
    """Estimates as dots with intervals as lines, a vertical line at 0.

    The numbers are left out where with them it doesn't fit inline; a table beside it has them.
    """
    pictures = [_interval_parts(rows, numbers=numbers) for numbers in (True, False)]
    for parts, width, height in pictures:
        if len(small_picture(parts, width, height, name)) < INLINE_LIMIT:
            return inline_picture(parts, width, height, name)
    return inline_picture(*pictures[0], name)


def _interval_parts(rows: Sequence[Interval], *, numbers: bool) -> tuple[list[str], int, int]:
    """Parts of the picture, its width and its height."""
    known = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    labels = [plain(row.label, 18) for row in rows]
    left = round(LETTER_WIDTH * max(map(len, labels), default=0)) + 12
    scale = 200 / ((high - low) or 1.0)

    def at(value: float) -> int:
        return left + round((value - low) * scale)

    lines = dots = texts = ""
    for d, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = ROW * d + 12
        shown = "unknown" if row.value is None else f"{row.value:+.3g}"
        number = f"<tspan x='{left + 212}'>{shown}</tspan>" if numbers else ""
        texts += f"<text y='{y + 4}'>{html.escape(label)}{number}</text>"
        if row.low is not None and row.high is not None:
            lines += f"M{at(row.low)} {y}H{at(row.high)}"
        if row.value is not None:
            dots += f"M{at(row.value)} {y}h0"
    parts = [
        texts,
        f"<path d='M{at(0)} 0v{ROW * len(rows)}' stroke='{OTHER}'/>",
        f"<path d='{lines}' stroke='{TEXT}' stroke-width='2'/>",
        f"<path d='{dots}' stroke='{MAIN}' stroke-width='7' stroke-linecap='round'/>",
    ]
    return parts, left + (290 if numbers else 212), ROW * len(rows) + 4
