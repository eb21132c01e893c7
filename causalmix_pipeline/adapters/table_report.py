"""The page of `causalmix explain`: one HTML file that asks nothing of the network.

It shares style and axes with the pipeline's report (`report_html.py`). All text from tables is
escaped by the template engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.report_html import (
    _Axis,
    _number_text,
    _share_text,
    _signed_text,
    template_environment,
)

#: Covariates that are listed; the others move the gain less.
MOST_COVARIATES = 12


@dataclass(frozen=True, eq=False)
class Curve:
    """Gain against the share of a domain, with the ends of its 90% interval; shapes (M,)."""

    domain: str
    share_M: np.ndarray
    gain_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray


@dataclass(frozen=True, eq=False)
class TableReport:
    """What the page shows; gains are weighted means in the metrics' own units.

    Attributes:
        domains: names.
        metrics: names.
        weights: of each metric in the gain.
        maximised: whether more of a metric is better.
        n_runs: runs that the model was fitted on.
        n_states: their distinct pool states.
        covariates: names; empty without.
        notes: what was left out or changed in the tables.
        mixture: recommended for the mean pool state, without constraints.
        gain: its gain over the equal mixture.
        low: lower end of the 90% interval; nan if unknown.
        high: the upper end.
        scores: a row per estimator and metric, as `CrossValidation.frame` has it, and `chosen`.
        curves: one per domain.
        scatters: pairs (observed, predicted out of fold) by metric.
        importance: covariate columns and how far they move the gain.
        noise: rows of `core.belief.noise_floor`.
        treatment_r2: R2 of the mixture given the covariates; None without covariates.
        observational: whether it is too large for an experiment.
        placebo: rows of `core.belief.placebo`.
    """

    domains: Sequence[str]
    metrics: Sequence[str]
    weights: Sequence[float]
    maximised: Sequence[bool]
    n_runs: int
    n_states: int
    covariates: Sequence[str]
    notes: Sequence[str]
    mixture: Sequence[float]
    gain: float
    low: float
    high: float
    scores: list[dict[str, Any]]
    curves: list[Curve]
    scatters: Mapping[str, list[tuple[float, float]]]
    importance: list[tuple[str, float]]
    noise: list[dict[str, Any]]
    treatment_r2: float | None
    observational: bool
    placebo: list[dict[str, Any]]


def render_table_report(report: TableReport) -> str:
    """The page as text."""
    environment = template_environment()
    environment.filters.update(share=_share_text, number=_number_text, signed=_signed_text)
    view = {
        "report": report,
        "shares": sorted(
            zip(report.domains, report.mixture, strict=True), key=lambda row: (-row[1], row[0])
        ),
        "groups": [
            (task, [row for row in report.scores if row["task"] == task]) for task in report.metrics
        ],
        "curves": _curves(report.curves),
        "scatters": [_scatter(task, pairs) for task, pairs in report.scatters.items()],
        "importance": _importance(report.importance),
    }
    return environment.get_template("tables.html.j2").render(view)


def _curves(curves: list[Curve]) -> list[dict[str, Any]]:
    """Each curve in a square of 0..100, all with one axis of gains."""
    ends = np.concatenate([part for c in curves for part in (c.gain_M, c.low_M, c.high_M)])
    ends = ends[np.isfinite(ends)]
    axis = _Axis.around(min(float(ends.min()), 0.0), max(float(ends.max()), 0.0))
    placed = []
    for curve in curves:
        across = _Axis.around(0.0, float(curve.share_M[-1]), n_ticks=3)
        x_M = [across.at(share) for share in curve.share_M]

        def line(values: np.ndarray, x_M: list[float] = x_M) -> list[str]:
            return [f"{x},{100 - axis.at(v):.2f}" for x, v in zip(x_M, values, strict=True)]

        known = bool(np.isfinite(curve.low_M).all())
        band = [*line(curve.high_M), *reversed(line(curve.low_M))] if known else []
        placed.append(
            {
                "domain": curve.domain,
                "line": " ".join(line(curve.gain_M)),
                "band": " ".join(band),
                "zero": round(100 - axis.at(0.0), 2),
                "across": [{"at": across.at(t), "text": f"{100 * t:.3g}%"} for t in across.ticks],
                "up": [{"at": round(100 - axis.at(t), 2), "text": f"{t:.3g}"} for t in axis.ticks],
            }
        )
    return placed


def _scatter(task: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    flat = [value for pair in pairs for value in pair]
    axis = _Axis.around(min(flat), max(flat), n_ticks=3)
    return {
        "task": task,
        "n": len(pairs),
        "ticks": [{"at": axis.at(t), "text": f"{t:.4g}"} for t in axis.ticks],
        "points": [(axis.at(o), round(100 - axis.at(p), 2)) for o, p in pairs],
    }


def _importance(rows: list[tuple[str, float]]) -> list[dict[str, Any]]:
    top = max((size for _, size in rows), default=0.0) or 1.0
    return [
        {"name": name, "size": size, "x": round(100 * size / top, 2)}
        for name, size in rows[:MOST_COVARIATES]
    ]
