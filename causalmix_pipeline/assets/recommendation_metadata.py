"""What people see of a recommendation on the page of its asset."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from causalmix_pipeline.assets.pictures import (
    by_domain_table,
    markdown_table,
    number,
    plain,
    rounded,
)
from causalmix_pipeline.assets.small_pictures import Interval, interval_picture, mixture_picture
from causalmix_pipeline.core.scale import size_sentence, size_words

#: Covariates listed that are farthest from the runs.
LISTED = 6

#: What a verdict means for who trains on the mixture.
MEANINGS = {
    "supported": "proxy runs have been where the live pool is",
    "extrapolating": "the live pool is outside the runs: the gain is doubtful, the step shorter",
    "unsupported": "no run has been near the live pool: the reference mixture is kept",
}


def recommendation_metadata(value: Mapping[str, Any]) -> dict[str, Any]:
    """Verdict, gain, weights, rivals, tasks, limits and top-ups of a `recommended_mixture`."""
    domains, shares = value["domains"], value["mixtures"]
    best = shares["recommended"]
    metadata: dict[str, Any] = {"in short": in_short(value), "verdict": value["verdict"]}
    for name in ("gain", "low", "high"):
        if value[name] is not None:
            key = "gain" if name == "gain" else f"gain, {name} end of 90% interval"
            metadata[key] = number(value[name])
    if "size" in value:
        metadata["size of the model"] = size_sentence(value["size"])
    if value["only_reference"]:
        metadata["guard rails"] = "forbid whatever is better than the reference"
    if value["overlap_score"] is not None:
        metadata["overlap score (supported up to 1)"] = number(value["overlap_score"])
    natural = shares.get("natural", shares["reference"])
    return {
        **metadata,
        "weights": mixture_picture(domains, best, shares["reference"], natural),
        "beside the baselines": by_domain_table(domains, shares, "mixture"),
        "gains over the reference": gains_picture(value["gains"], "mixture"),
        "gains and 90% intervals": markdown_table(value["gains"]),
        "gains by task": markdown_table(task_rows(value["task_gains"])),
        "limits": markdown_table(limit_rows(value["slack"])),
        "farthest from the runs": markdown_table(drift_rows(value["drift"])),
        **top_up_metadata(value["top_up"]),
        **share_figures(domains, best),
    }


def in_short(value: Mapping[str, Any]) -> str:
    """Verdict, gain and its interval; what they mean comes last, since the UI cuts long lines."""
    verdict = value["verdict"]
    meaning = size_words(verdict, value.get("size")) or MEANINGS[verdict]
    if value["gain"] is None or value["low"] is None:
        return f"{verdict}: no gain is promised; {meaning}."
    return (
        f"{verdict}: {value['gain']:+.3g} ({value['low']:+.3g} to {value['high']:+.3g}, 90%) "
        f"bits per byte over {value['reference_name']}; {meaning}."
    )


def gains_picture(rows: Sequence[Mapping], name: str) -> dg.MarkdownMetadataValue:
    """Gains of mixtures or tasks as dots with their intervals."""
    return interval_picture(
        [Interval(row[name], row["gain"], row["low"], row["high"]) for row in rows], "gains"
    )


def task_rows(task_gains: Sequence[Mapping]) -> list[dict]:
    """A row per task: weight, gain and its interval, loss predicted for the reference."""
    return [
        {"task": row["task"], "weight": row["weight"]}
        | {name: row[name] for name in ("gain", "low", "high")}
        | {"loss of the reference": row["reference_bits_per_byte"]}
        for row in task_gains
    ]


def limit_rows(slack: Sequence[Mapping]) -> list[dict]:
    """A row per limit of the mixture, those that bind first."""
    names = ("constraint", "value", "limit", "binds")
    ordered = sorted(slack, key=lambda row: not row["binds"])
    return [{name: row[name] for name in names} for row in ordered]


def drift_rows(drift: Sequence[Mapping]) -> list[dict]:
    """The covariates of the live pool that are farthest from the runs' states."""
    farthest = sorted(drift, key=lambda row: -abs(row["z"] or 0.0))[:LISTED]
    return [
        {
            "domain": row["domain"],
            "covariate": row["covariate"],
            "live": row["value"],
            "runs": f"{rounded(row['least'])} to {rounded(row['most'])}",
            "inside": row["inside"],
        }
        for row in farthest
    ]


def top_up_metadata(top_up: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mixtures of the proxy runs that would settle what can't be told now; {} without any."""
    if not top_up:
        return {}
    rows = {f"run {i}": list(row.values()) for i, row in enumerate(top_up, start=1)}
    domains = [name.removeprefix("share__") for name in top_up[0]]
    return {
        "top-up runs planned": float(len(top_up)),
        "top-up plan": by_domain_table(domains, rows, "shares"),
        "how to train the top-up": "job top_up, or causalmix refresh --top-up",
    }


def share_figures(domains: Sequence[str], shares: Sequence[float]) -> dict[str, Any]:
    """A number per domain, so that its history is plotted.

    Names that are too long for a key are shortened; where two become equal, by their place.
    """
    keys = [f"share of {plain(domain)}" for domain in domains]
    return {
        (key if keys.count(key) == 1 else f"{key} ({d + 1})"): number(share)
        for d, (key, share) in enumerate(zip(keys, shares, strict=True))
    }
