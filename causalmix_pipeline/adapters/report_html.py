"""The report: one self-contained HTML file that answers first and explains after.

The file asks nothing of the network, follows the reader's light or dark setting, and prints. Plots
are inline SVG whose positions are percentages, so that text keeps its size on a phone. Everything
from data is escaped by the template engine, and the page's own policy lets no script run but the
one that is part of it. Without scripts all but the sliders and the switch of the theme is there.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from causalmix_pipeline.adapters.beliefs_html import beliefs_view
from causalmix_pipeline.adapters.interpretation_html import interpretation_view
from causalmix_pipeline.adapters.page_parts import (
    MINUS,
    Axis,
    is_known,
    number_text,
    share_text,
    signed_text,
    template_environment,
    tokens_text,
)
from causalmix_pipeline.adapters.report_answers import (
    answers_of,
    beyond,
    heading_of,
    outside_rows,
    threshold_rows,
)
from causalmix_pipeline.adapters.report_data import VERDICTS, ReportData
from causalmix_pipeline.adapters.what_if_html import what_if_view
from causalmix_pipeline.core.scale import size_sentence, size_words

if TYPE_CHECKING:
    from markupsafe import Markup

#: Domains drawn on the first screen, and on that of a phone.
FIRST_DOMAINS, FIRST_ON_PHONE = 12, 7

#: Ratio of variances below which a task can't tell mixtures apart, and the largest that is drawn.
NOISE_LIMIT, NOISE_TOP = 2.0, 1000.0

#: What each covariate says, for readers who don't know its name.
COVARIATE_LABELS = {
    "compress_ratio": "compressed over raw bytes, of a document",
    "token_entropy": "entropy of a document's tokens, bits",
    "unique_bigram_ratio": "distinct over all token pairs, of a document",
    "unigram_cross_entropy": "surprise of single tokens, bits a token",
    "bigram_cross_entropy": "surprise of token pairs, bits a token",
    "letter_share": "share of letters",
    "digit_share": "share of digits",
    "symbol_share": "share of symbols",
    "logical_words": "rate of words such as 'therefore'",
    "bytes_per_token": "bytes a token",
    "near_duplicate": "share of near-duplicates",
    "log2_tokens": "size, log2 of distinct tokens",
    "duplicate_share": "share of repeated text",
}

#: Colour class of each mixture, the same wherever it is drawn.
SERIES_CSS = {
    "recommended": "s0",
    "reference": "s1",
    "equal": "s2",
    "regmix": "s3",
    "natural": "s4",
    "grid": "s6",
    "log_linear": "s7",
    "dmo": "s8",
}

#: Mixtures drawn on the first screen.
FIRST_SERIES = ("recommended", "reference", "natural")


def render_report(data: ReportData) -> str:
    """The report as the text of one HTML file."""
    environment = template_environment()
    environment.filters.update(
        share=share_text, number=number_text, signed=signed_text, tokens=tokens_text
    )
    shares, series = _share_rows(data), _series(data)
    script = page_script()
    view = {
        "data": data,
        "policy": page_policy(script),
        "script": script,
        "heading": heading_of(data),
        "answered": answers_of(data),
        "explained": _explained(data),
        "first": _first_rows(shares),
        "first_series": [s for s in series if s["key"] in FIRST_SERIES],
        "n_on_phone": FIRST_ON_PHONE,
        "share_axis": _share_axis(data),
        "shares": shares,
        "series": series,
        "weighed": data.what_if and what_if_view(data.what_if, data.domains),
        "mixture_gains": _interval_plot(_comparison_rows(data)),
        "task_gains": _interval_plot(_task_rows(data)),
        "binding": data.slack.filter("binds").to_dicts(),
        "slack": [_slack_row(row) for row in data.slack.to_dicts()],
        "unconstrained": is_known(data.unconstrained_gain),
        "thresholds": threshold_rows(data),
        "curve": _curve_rows(data),
        "strips": _strips(data.covariates),
        "meanings": _meanings(data.covariates),
        "outside": outside_rows(data.covariates.to_dicts()),
        "history": _history(data),
        "scatters": _scatters(data.predictions, data.losses),
        "estimators": _estimator_groups(data),
        "signal": [_signal_row(row) for row in data.signal.to_dicts()],
        "top_up": _top_up_rows(data),
        "shown": data.interpretation and interpretation_view(data.interpretation),
        "believed": data.beliefs and beliefs_view(data.beliefs),
    }
    return environment.get_template("report.html.j2").render(view)


@cache
def page_script() -> Markup:
    """The page's own script, as it stands in the package."""
    from markupsafe import Markup

    return Markup(Path(__file__).with_name("templates").joinpath("report.js").read_text("utf-8"))


def page_policy(script: str) -> str:
    """What the browser lets the page do: its own script and styles, nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def write_report(path: Path, data: ReportData) -> Path:
    """Write the report whole or not at all, and return its path."""
    from causalmix_pipeline.adapters.run_store import write_atomically

    write_atomically(path, render_report(data).encode("utf-8"))
    return path


# ---------------------------------------------------------------------------- the mixture


def _series(data: ReportData) -> list[dict[str, str]]:
    """The mixtures to draw, in order: key, colour class and label."""
    labels = {"recommended": "recommended", "regmix": "RegMix", "dmo": "DMO"}
    unsupported = data.verdict == "unsupported"
    kept = unsupported and data.is_reference
    if unsupported:
        labels["recommended"] = "nearest to the reference that the limits allow"
    names = ["reference"] if kept else ["recommended", "reference"]
    others = [n for n in data.mixtures if n not in ("recommended", "reference")]
    # The reference is one of the baselines as a rule: it is drawn once.
    names += [n for n in others if data.mixtures[n] != data.mixtures["reference"]]
    reference = f"reference ({data.reference_name}){', kept' if kept else ''}"
    labels["reference"] = reference
    return [
        {"key": name, "label": labels.get(name, name.replace("_", " ")),
         "css": SERIES_CSS.get(name, "s5")}
        for name in names
    ]  # fmt: skip


def _share_axis(data: ReportData) -> dict[str, Any]:
    top = max(max(data.mixtures[s["key"]]) for s in _series(data))
    axis = Axis.around(0.0, top)
    return {"ticks": [{"x": axis.at(t), "text": f"{100 * t:.3g}%"} for t in axis.ticks]}


def _share_rows(data: ReportData) -> list[dict[str, Any]]:
    """A row per domain, the largest recommended share first: bars of all mixtures."""
    series = _series(data)
    axis = Axis.around(0.0, max(max(data.mixtures[s["key"]]) for s in series))
    chosen, reference = data.mixtures["recommended"], data.mixtures["reference"]
    order = sorted(range(len(data.domains)), key=lambda d: (-chosen[d], data.domains[d]))
    return [
        {
            "domain": data.domains[d],
            "share": chosen[d],
            "change": 100 * (chosen[d] - reference[d]),
            "bars": [
                {**s, "share": data.mixtures[s["key"]][d], "x": axis.at(data.mixtures[s["key"]][d])}
                for s in series
            ],
        }
        for d in order
    ]


def _explained(data: ReportData) -> str:
    """What the verdict means, and for what size of model."""
    words = size_words(data.verdict, data.size)
    explained = VERDICTS[data.verdict] if words is None else f"{words[0].upper()}{words[1:]}."
    return f"{explained} {size_sentence(data.size)}" if data.size else explained


def _first_rows(shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first screen: the largest shares, beside the reference and natural ones."""
    rows = [
        {**row, "bars": [bar for bar in row["bars"] if bar["key"] in FIRST_SERIES]}
        for row in shares[:FIRST_DOMAINS]
    ]
    axis = Axis(0.0, max(bar["share"] for row in rows for bar in row["bars"]) or 1.0, ())
    for row in rows:
        row["bars"] = [{**bar, "x": axis.at(bar["share"])} for bar in row["bars"]]
    return rows


# ---------------------------------------------------------------------------- gains


def _comparison_rows(data: ReportData) -> list[dict[str, Any]]:
    by_name = {row["mixture"]: row for row in data.gains.to_dicts()}
    return [
        {**by_name[s["key"]], "label": s["label"], "css": s["css"], "note": ""}
        for s in _series(data)
        if s["key"] in by_name and s["key"] != "reference"
    ]


def _task_rows(data: ReportData) -> list[dict[str, Any]]:
    """A row per task, the heaviest first."""
    total = data.task_gains["weight"].sum() or 1.0
    rows = []
    for row in data.task_gains.sort("weight", "task", descending=[True, False]).to_dicts():
        note = f"weight {share_text(row['weight'] / total)}" if row["weight"] else "only reported"
        loss = row["reference_bits_per_byte"] if row["task"] in data.losses else None
        rows.append({**row, "label": row["task"], "css": "s0" if row["weight"] else "s5",
                     "note": note, "reference_bits_per_byte": loss})  # fmt: skip
    return rows


def _interval_plot(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Dots with whiskers on one axis that holds 0."""
    values = [0.0]
    for row in rows:
        names = ("gain", "low", "high", "realised")
        values += [row[name] for name in names if is_known(row.get(name))]
    axis = Axis.around(min(values), max(values))
    placed = []
    for row in rows:
        known = is_known(row["low"]) and is_known(row["high"])
        x = axis.at(row["gain"]) if is_known(row["gain"]) else None
        low, high = (axis.at(row["low"]), axis.at(row["high"])) if known else (None, None)
        realised = axis.at(row["realised"]) if is_known(row.get("realised")) else None
        placed.append({**row, "x": x, "x_low": low, "x_high": high, "x_realised": realised})
    ticks = [{"x": axis.at(t), "text": f"{t:+.4g}".replace("-", MINUS) if t else "0"}
             for t in axis.ticks]  # fmt: skip
    return {"rows": placed, "zero": axis.at(0.0), "ticks": ticks}


# ---------------------------------------------------------------------------- covariates


def _strips(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """A group per domain; each covariate as a strip of the states' values and the live dot."""
    groups = []
    for domain in frame["domain"].unique(maintain_order=True).to_list():
        rows = frame.filter(pl.col("domain") == domain).to_dicts()
        groups.append({"domain": domain, "strips": [_strip(row) for row in rows]})
    return groups


def _strip(row: dict[str, Any]) -> dict[str, Any]:
    states, live = sorted(row["states"]), row["live"]
    low, high = (states[0], states[-1]) if states else (live, live)
    span = max(high, live) - min(low, live)
    # A little air on both sides, so that a dot at the end is seen as such.
    pad = 0.06 * span if span > 0 else 1.0
    axis = Axis(min(low, live) - pad, max(high, live) + pad, ())
    return {
        "covariate": row["covariate"],
        "live": live,
        "low": low,
        "high": high,
        "x": axis.at(live),
        "x_low": axis.at(low),
        "x_high": axis.at(high),
        "states": sorted({axis.at(value) for value in states}),
        "is_outside": beyond(row) > 0,
    }


def _meanings(frame: pl.DataFrame) -> dict[str, str]:
    """What each covariate shown is, where that is known."""
    names = frame["covariate"].unique(maintain_order=True).to_list()
    return {name: COVARIATE_LABELS[name] for name in names if name in COVARIATE_LABELS}


# ---------------------------------------------------------------------------- limits and noise


def _slack_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A constraint with the places of its value and its limit on a scale that holds both."""
    top = max(row["value"], row["limit"], 0.0) or 1.0
    axis = Axis(min(row["value"], row["limit"], 0.0), top, ())
    return {**row, "x": axis.at(row["value"]), "x_limit": axis.at(row["limit"])}


def _signal_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A task's signal with the places of its ratio and the limit on a logarithmic scale."""
    axis = Axis(0.0, math.log10(NOISE_TOP), ())
    known = is_known(row["ratio"]) and row["ratio"] > 0
    x = axis.at(math.log10(max(row["ratio"], 1.0))) if known else None
    return {**row, "x": x, "x_limit": axis.at(math.log10(NOISE_LIMIT))}


def _curve_rows(data: ReportData) -> list[dict[str, Any]]:
    axis = Axis(0.0, 1.0, ())
    return [{**row, "x": axis.at(row["r2"])} for row in data.learning_curve if is_known(row["r2"])]


def _history(data: ReportData) -> dict[str, Any] | None:
    """Recommendations over time, and what was realised, on one axis that holds 0."""
    if data.history is None or data.history.is_empty():
        return None
    rows = data.history.to_dicts()
    realised = any(is_known(row["realised"]) for row in rows)
    return {**_interval_plot(rows), "any_realised": realised}


# ---------------------------------------------------------------------------- predictions


def _scatters(frame: pl.DataFrame, losses: frozenset[str]) -> list[dict[str, Any]]:
    """A scatter per task, in a square of 0..100; losses are shown as bits per byte."""
    plots = []
    for task in frame["task"].unique(maintain_order=True).to_list():
        part = frame.filter(pl.col("task") == task)
        sign = -1.0 if task in losses else 1.0
        pairs = [(sign * o, sign * p) for o, p in part.select("observed", "predicted").iter_rows()
                 if is_known(o) and is_known(p)]  # fmt: skip
        if not pairs:
            continue
        flat = [value for pair in pairs for value in pair]
        axis = Axis.around(min(flat), max(flat), n_ticks=3)
        ticks = [{"at": axis.at(t), "text": f"{t:.4g}"} for t in axis.ticks]
        points = [(axis.at(o), round(100 - axis.at(p), 2)) for o, p in pairs]
        plots.append({"task": task, "points": points, "ticks": ticks, "n": len(points)})
    return plots


def _estimator_groups(data: ReportData) -> list[dict[str, Any]]:
    """The estimator table by task, tasks that count first."""
    weights = dict(data.task_gains.select("task", "weight").iter_rows())
    tasks = data.estimators["task"].unique(maintain_order=True).to_list()
    tasks.sort(key=lambda task: -weights.get(task, 0.0))
    return [
        {"task": task, "weight": weights.get(task, 0.0),
         "rows": data.estimators.filter(pl.col("task") == task).to_dicts()}
        for task in tasks
    ]  # fmt: skip


def _top_up_rows(data: ReportData) -> list[list[float]]:
    """Shares of each top-up run in the order of the domains."""
    if data.top_up is None or data.top_up.is_empty():
        return []
    return [list(row) for row in data.top_up.select(
        [f"share__{domain}" for domain in data.domains]).iter_rows()]  # fmt: skip
