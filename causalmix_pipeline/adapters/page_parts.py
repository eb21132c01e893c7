"""What all pages share: how numbers read, axes, and the environment of their templates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

#: How an unknown number and a minus sign are set.
UNKNOWN, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def template_environment() -> Environment:
    """Where pages are made from their templates; values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("causalmix_pipeline.adapters", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = points_text
    environment.tests["label"] = lambda part: isinstance(part, Name)
    return environment


class Name(str):
    """A name from data: shown as text, and kept apart from what stands around it."""

    __slots__ = ()


def is_known(value: float | None) -> bool:
    """Whether a number is there and finite."""
    return value is not None and math.isfinite(value)


def share_text(value: float) -> str:
    """A share in percent: 0.5%, 7.2%, 34%."""
    percent = 100 * value
    return f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"


def number_text(value: float | None) -> str:
    """Three significant digits; a dash where unknown."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞"
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e5:
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
        return f"{value:,.{digits}f}"
    return f"{value:.1e}"


def signed_text(value: float | None) -> str:
    """Three decimals with a sign, as gains are shown."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:+.3f}".replace("-", MINUS)


def points_text(value: float) -> str:
    """A change of a share in points, with its sign."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", MINUS)


def tokens_text(value: float) -> str:
    """Tokens with a unit that people say: 3.2 million."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Axis:
    """A linear axis; `at` gives the position in percent."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, low: float, high: float, n_ticks: int = 4) -> Axis:
        """Widen a range to round ticks."""
        span = high - low
        if not span > 0:
            low, span = low - 0.5, 1.0
            high = low + span
        raw = span / n_ticks
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def at(self, value: float) -> float:
        """The position of a value; the nearer end outside of the axis."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)
