"""The five answers of a report: what to train on, how much better, how sure, why, what changes it.

Each is a short sentence made of parts, so that the page and the Markdown can each show names from
data in their own safe way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.page_parts import (
    Name,
    is_known,
    number_text,
    share_text,
    signed_text,
)
from causalmix_pipeline.adapters.report_data import ReportData
from causalmix_pipeline.core.scale import size_sentence, size_words

#: What each verdict means, in a few words.
VERDICT_WORDS = {
    "supported": "proxy runs have seen pools like this one",
    "extrapolating": "the live pool lies beyond what proxy runs have seen, so the gain is a rough "
    "guide",
    "unsupported": "no proxy run has seen a pool like this one, so no gain can be promised",
}

#: Domains named in the first sentence.
NAMED = 3


#: Parts of a sentence, in order.
Sentence = tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """Sentences that answer a reader's questions."""

    what: Sentence
    better: Sentence
    sure: Sentence
    why: Sentence
    change: Sentence


def heading_of(data: ReportData) -> str:
    """What the report is about, in few words."""
    if data.verdict != "unsupported":
        return "Recommended mixture"
    if data.is_reference:
        return "Reference mixture kept"
    return "Nearest to the reference mixture that the limits allow"


def answers_of(data: ReportData) -> Answers:
    """The five answers."""
    gain = next(row for row in data.gains.to_dicts() if row["mixture"] == "recommended")
    return Answers(_what(data), _better(data, gain), _sure(data, gain), _why(data), _change(data))


# ---------------------------------------------------------------------------- the first three


def _what(data: ReportData) -> Sentence:
    shares = data.mixtures["recommended"]
    order = sorted(range(len(shares)), key=lambda d: (-shares[d], data.domains[d]))
    parts = ["Train on "]
    if data.verdict == "unsupported":
        nearest = "Train on the mixture nearest to the reference that the limits allow: "
        parts = ["Keep the reference mixture: " if data.is_reference else nearest]
    for place, d in enumerate(order[:NAMED]):
        parts += [", " if place else "", Name(data.domains[d]), f" {share_text(shares[d])}"]
    rest = len(order) - NAMED
    others = f", and {rest} more." if rest > 1 else ", and one more." if rest == 1 else "."
    return (*parts, others)


def _better(data: ReportData, gain: Mapping[str, Any]) -> Sentence:
    if data.verdict == "unsupported" or not is_known(gain["gain"]):
        return ("No gain is promised over the reference mixture.",)
    if data.is_reference:
        return ("The reference mixture itself (", Name(data.reference_name), ").")
    unit = data.unit if data.unit == "bits per byte" else f"in {data.unit}"
    return (
        f"{signed_text(gain['gain'])} {unit} over the reference mixture (",
        Name(data.reference_name),
        "), weighted over the tasks. Take it as an upper guess.",
    )


def _sure(data: ReportData, gain: Mapping[str, Any]) -> Sentence:
    words = size_words(data.verdict, data.size) or VERDICT_WORDS[data.verdict]
    word = f"{data.verdict.capitalize()}: {words}."
    if data.verdict == "unsupported":
        return (word,)
    if data.is_reference:
        return (f"{word} The reference mixture itself has no gain to doubt.",)
    if not (is_known(gain["low"]) and is_known(gain["high"])):
        return (f"{word} This estimator gives no interval.",)
    size = f" {size_sentence(data.size)}" if data.size else ""
    return (f"{word} 90% interval {_ends(data, gain['low'], gain['high'])}.{size}",)


def _ends(data: ReportData, low: float, high: float) -> str:
    """An interval and what it tells, judged by the numbers that are shown."""
    ends = f"{signed_text(low)} to {signed_text(high)}"
    if data.beliefs and data.beliefs.is_observational:
        return f"{ends}; it isn't calibrated, since the runs are observational"
    if round(low, 3) > 0:
        return f"{ends}, all of it a gain"
    if round(high, 3) < 0:
        return f"{ends}, all of it a loss"
    return f"{ends}: no gain at all is possible too"


# ---------------------------------------------------------------------------- why


def _why(data: ReportData) -> Sentence:
    if data.verdict == "unsupported":
        return _farthest(data)
    best, reference = np.array(data.mixtures["recommended"]), np.array(data.mixtures["reference"])
    change = best - reference
    up, down = int(np.argmax(change)), int(np.argmin(change))
    if change[up] < 5e-4:
        return (
            "No mixture within the limits is predicted to be better than the reference for certain "
            "enough (confidence_z).",
        )
    parts = [
        Name(data.domains[up]),
        f" is raised from {share_text(reference[up])} to {share_text(best[up])}",
        *_alone(data, up, float(best[up])),
        ", mostly at the cost of ",
        Name(data.domains[down]),
        *_decider(data, up),
        ".",
    ]
    return tuple(parts)


def _farthest(data: ReportData) -> Sentence:
    """The covariate that lies farthest outside the states."""
    rows = outside_rows(data.covariates.to_dicts())
    if not rows:
        return (
            "Taken together, its covariates are too far from every pool state of the proxy runs.",
        )
    row = rows[0]
    return (
        Name(row["covariate"]),
        " of ",
        Name(row["domain"]),
        f" is {number_text(row['live'])}, and the pools of the proxy runs had "
        f"{number_text(row['low'])} to {number_text(row['high'])}.",
    )


def _alone(data: ReportData, d: int, share: float) -> Sentence:
    """What a domain's new share gains by itself, read from its effect curve."""
    sets = list(data.interpretation.curves.values()) if data.interpretation else []
    if not sets:
        return ()
    curve = sets[0][d]
    gain = float(np.interp(share, curve.share_M, curve.gain_M))
    return (f", which alone is worth {signed_text(gain)}",) if gain > 5e-4 else ()


def _decider(data: ReportData, d: int) -> Sentence:
    """The covariate that moves a domain's effect most."""
    shown = data.interpretation
    if shown is None or shown.importance_CD is None or not shown.importance_CD[:, d].any():
        return ()
    row = _columns(data)[shown.columns[int(np.argmax(shown.importance_CD[:, d]))]]
    return (
        "; how much it helps depends most on ",
        Name(row["covariate"]),
        " of ",
        Name(row["domain"]),
    )


def _columns(data: ReportData) -> dict[str, Mapping[str, Any]]:
    """Rows of the covariates by the name of their column; names may hold `__` themselves."""
    return {f"{row['domain']}__{row['covariate']}": row for row in data.covariates.to_dicts()}


# ---------------------------------------------------------------------------- what would change it


def _change(data: ReportData) -> Sentence:
    if data.verdict != "supported" and data.top_up is not None and not data.top_up.is_empty():
        return (f"The {data.top_up.height} proxy runs of the top-up plan, made on this very pool.",)
    if data.verdict == "unsupported":
        return ("Proxy runs made on this very pool.",)
    binding = data.slack.filter("binds").to_dicts()
    if binding:
        return _loosen(binding, data.unconstrained_gain)
    turns = [row for row in threshold_rows(data) if row["now"] != row["then"]]
    if turns:
        return _turn(turns[0])
    if data.beliefs:
        return (f"More proxy runs: {data.beliefs.more_runs}.",)
    return ("No limit binds, and no threshold of the pool is known that would change it.",)


def _loosen(binding: Sequence[Mapping[str, Any]], free: float | None) -> Sentence:
    """The limits that bind, that of the trust region first."""
    row = next((row for row in binding if row["constraint"] == "trust region"), binding[0])
    more = f" and {len(binding) - 1} more" if len(binding) > 1 else ""
    limits = "the limits that bind: " if more else "the limit that binds: "
    without = f" Without any, the gain would be {signed_text(free)}." if is_known(free) else ""
    return (
        f"Loosening {limits}",
        Name(row["constraint"]),
        f" (at {number_text(row['limit'])}){more}.{without}",
    )


def _turn(row: Mapping[str, Any]) -> Sentence:
    way = "rose above" if row["live"] <= row["threshold"] else "fell to"
    wanted = (Name(row["then"]),) if row["then"] else ("nothing more of any domain",)
    return (
        "If ",
        Name(row["covariate"]),
        " of ",
        Name(row["domain"]),
        f" {way} {number_text(row['threshold'])} (it is {number_text(row['live'])}), ",
        "such a pool wants ",
        *wanted,
        " first",
        *((" instead of ", Name(row["now"])) if row["now"] else ()),
        ".",
    )


def threshold_rows(data: ReportData) -> list[dict[str, Any]]:
    """The questions of the tree on the live pool's way, nearest first.

    Each with what pools want on the live pool's side (`now`) and on the other (`then`), and the
    distance in standard deviations among the states; `now` and `then` are None where no domain
    gains.
    """
    shown = data.interpretation
    if shown is None or shown.tree is None:
        return []
    known = _columns(data)
    live = [known[column] for column in shown.columns]

    def leaf(node: Mapping[str, Any]) -> str | None:
        while "column" in node:
            row = live[node["column"]]
            node = node["below"] if row["live"] <= node["threshold"] else node["above"]
        best = int(np.argmax(node["effects"]))
        return shown.domains[best] if node["effects"][best] > 0 else None

    rows, node = [], shown.tree["root"]
    now = leaf(node)
    while "column" in node:
        row = live[node["column"]]
        is_below = row["live"] <= node["threshold"]
        other = node["above"] if is_below else node["below"]
        distance = abs(row["live"] - node["threshold"])
        rows.append(
            {"domain": row["domain"], "covariate": row["covariate"], "live": row["live"],
             "threshold": node["threshold"], "now": now, "then": leaf(other),
             "distance": distance / (float(np.std(row["states"])) or 1.0)}
        )  # fmt: skip
        node = node["below"] if is_below else node["above"]
    return sorted(rows, key=lambda row: row["distance"])


# ---------------------------------------------------------------------------- covariates


def beyond(row: Mapping[str, Any]) -> float:
    """How far the live value lies outside the states' range, in widths of that range.

    1 where the range has no width: how far is far can't be told there.
    """
    if not row["states"]:
        return 0.0
    low, high = min(row["states"]), max(row["states"])
    distance = max(low - row["live"], row["live"] - high, 0.0)
    slack = 1e-9 * (1 + abs(low) + abs(high))
    if distance <= slack:
        return 0.0
    return distance / (high - low) if high - low > slack else 1.0


def outside_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Covariates outside the range of the states, the farthest first."""
    found = [{**row, "beyond": beyond(row)} for row in rows]
    found = [row for row in found if row["beyond"] > 0]
    for row in found:
        row["low"], row["high"] = min(row["states"]), max(row["states"])
    return sorted(found, key=lambda row: -row["beyond"])
