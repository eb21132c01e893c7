"""The page of `causalmix explain`: one HTML file that asks nothing of the network.

It shares style and axes with the pipeline's report (`page_parts.py`). All text from tables is
escaped by the template engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causalmix_pipeline.adapters.beliefs_html import Beliefs, beliefs_view
from causalmix_pipeline.adapters.interpretation_html import Interpretation, interpretation_view
from causalmix_pipeline.adapters.page_parts import (
    Axis,
    number_text,
    share_text,
    signed_text,
    template_environment,
)


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
        pool: name of the pool at hand; empty for the mean of the runs' pool states.
        verdict: how near that pool is to those of the runs; `supported` where none is named.
        mixture: recommended for it, without constraints; the equal one where it's `unsupported`.
        gain: its gain over the equal mixture.
        low: lower end of the 90% interval; nan if unknown.
        high: the upper end.
        scores: a row per estimator and metric, as `CrossValidation.frame` has it, and `chosen`.
        interpretation: effects of domains, and what they depend on.
        scatters: pairs (observed, predicted out of fold) by metric.
        noise: rows of `core.belief.noise_floor`.
        placebo: rows of `core.belief.placebo`.
        beliefs: what was tried to prove the model wrong, and what can't be known.
    """

    domains: Sequence[str]
    metrics: Sequence[str]
    weights: Sequence[float]
    maximised: Sequence[bool]
    n_runs: int
    n_states: int
    covariates: Sequence[str]
    notes: Sequence[str]
    pool: str
    verdict: str
    mixture: Sequence[float]
    gain: float
    low: float
    high: float
    scores: list[dict[str, Any]]
    interpretation: Interpretation
    scatters: Mapping[str, list[tuple[float, float]]]
    noise: list[dict[str, Any]]
    placebo: list[dict[str, Any]]
    beliefs: Beliefs


def render_table_report(report: TableReport) -> str:
    """The page as text."""
    environment = template_environment()
    environment.filters.update(share=share_text, number=number_text, signed=signed_text)
    view = {
        "report": report,
        "shares": sorted(
            zip(report.domains, report.mixture, strict=True), key=lambda row: (-row[1], row[0])
        ),
        "groups": [
            (task, [row for row in report.scores if row["task"] == task]) for task in report.metrics
        ],
        "shown": interpretation_view(report.interpretation),
        "believed": beliefs_view(report.beliefs),
        "scatters": [_scatter(task, pairs) for task, pairs in report.scatters.items()],
    }
    return environment.get_template("tables.html.j2").render(view)


def _scatter(task: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    flat = [value for pair in pairs for value in pair]
    axis = Axis.around(min(flat), max(flat), n_ticks=3)
    return {
        "task": task,
        "n": len(pairs),
        "ticks": [{"at": axis.at(t), "text": f"{t:.4g}"} for t in axis.ticks],
        "points": [(axis.at(o), round(100 - axis.at(p), 2)) for o, p in pairs],
    }
