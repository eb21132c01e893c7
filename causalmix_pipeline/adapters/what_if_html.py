"""Mixtures for other task weights as a part of the report: what its sliders choose among."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.page_parts import Axis, share_text

#: Decimals of shares, weights and gains that the page holds.
DECIMALS = 8


@dataclass(frozen=True, eq=False)
class WhatIf:
    """Mixtures that were found for task weights, and what each is expected to gain.

    Attributes:
        tasks: names of all T tasks.
        moved: positions of the tasks whose weights can be moved.
        weights_WT: task weights, those of the settings first.
        mixture_WD: the mixture of each.
        gain_WT3: gain of each task over the reference with the ends of its 90% interval (nan where
            unknown), shape (W, T, 3).
        total_W3: the same of the weighted gain, weighted as in that row; shape (W, 3).
    """

    tasks: tuple[str, ...]
    moved: tuple[int, ...]
    weights_WT: np.ndarray
    mixture_WD: np.ndarray
    gain_WT3: np.ndarray
    total_W3: np.ndarray


def what_if_view(what_if: WhatIf, domains: tuple[str, ...]) -> dict[str, Any]:
    """What the template draws, and the values that the page's script reads."""
    shares = Axis.around(0.0, float(what_if.mixture_WD.max()))
    finite = what_if.gain_WT3[np.isfinite(what_if.gain_WT3)]
    gains = Axis.around(min(0.0, float(finite.min())), max(0.0, float(finite.max())))
    own_D = what_if.mixture_WD[0]
    own_V = what_if.weights_WT[0][list(what_if.moved)]
    own_V = own_V / own_V.sum()
    return {
        "n_points": len(what_if.weights_WT),
        "sliders": [
            {"task": what_if.tasks[t], "percent": round(100 * weight), "weight": share_text(weight)}
            for t, weight in zip(what_if.moved, own_V, strict=True)
        ],
        "rows": [
            {"domain": domains[d], "share": share_text(own_D[d]), "x": shares.at(own_D[d])}
            for d in np.argsort(-own_D, kind="stable")
        ],
        "tasks": [
            {"task": task, "gain": what_if.gain_WT3[0, t, 0], **_whisker(what_if, gains, t)}
            for t, task in enumerate(what_if.tasks)
        ],
        "total": what_if.total_W3[0].tolist(),
        "has_interval": bool(np.isfinite(what_if.total_W3[0]).all()),
        "zero": gains.at(0.0),
        "alone": _alone(what_if, domains),
        "values": {
            "moved": list(what_if.moved),
            "order": np.argsort(-own_D, kind="stable").tolist(),
            "tasks": list(what_if.tasks),
            "weights": _plain(what_if.weights_WT),
            "mixtures": _plain(what_if.mixture_WD),
            "gains": _plain(what_if.gain_WT3),
            "totals": _plain(what_if.total_W3),
            "shares": [shares.low, shares.high],
            "axis": [gains.low, gains.high],
        },
    }


def _whisker(what_if: WhatIf, axis: Axis, t: int) -> dict[str, float]:
    gain, low, high = what_if.gain_WT3[0, t]
    known = np.isfinite([low, high]).all()
    ends = (low, high) if known else (gain, gain)
    return {"x": axis.at(gain), "x_low": axis.at(ends[0]), "x_high": axis.at(ends[1])}


def _alone(what_if: WhatIf, domains: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each task that can be moved: the mixture that leans to it most, for readers on paper."""
    rows = []
    for t in what_if.moved:
        w = int(np.argmax(what_if.weights_WT[:, t]))
        order = np.argsort(-what_if.mixture_WD[w], kind="stable")[:3]
        rows.append(
            {
                "task": what_if.tasks[t],
                "weight": share_text(what_if.weights_WT[w, t]),
                "shares": [(domains[d], share_text(what_if.mixture_WD[w, d])) for d in order],
                "gain": what_if.gain_WT3[w, t, 0],
                "own_gain": what_if.gain_WT3[0, t, 0],
            }
        )
    return rows


def _plain(values: np.ndarray) -> list[Any]:
    """Rounded values as lists; None where unknown, since JSON has no nan."""
    known = np.round(values, DECIMALS).astype(object)
    known[~np.isfinite(values)] = None
    return known.tolist()
