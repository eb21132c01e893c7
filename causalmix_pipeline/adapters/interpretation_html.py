"""Effect curves, the tree over pool states, the map of covariates and the triangle, as page parts.

Everything is drawn by `templates/interpretation.html.j2` as text, tables and inline SVG; here the
positions are worked out. Both the page of `causalmix explain` and the pipeline's report show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.cate_tree import tree_leaves
from causalmix_pipeline.adapters.page_parts import MINUS, Axis
from causalmix_pipeline.core.interpretation import (
    STEP,
    EffectCurve,
    Triangle,
    rank_covariates,
)

#: Covariates listed, and domains drawn in a leaf; the others move less.
MOST_COVARIATES, MOST_DOMAINS = 12, 8

#: Letters of a name inside a drawing, where nothing can wrap.
MOST_LETTERS = 20

#: Losses are told apart down to this multiple of the largest gain: it's gains that matter.
MOST_LOSS = 2.0

#: Height of a triangle of width 100.
_HEIGHT = 86.6

#: Colour class of each set of curves.
_CURVE_CSS = ("s0", "s2", "s4")


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What an effect model says about domains and pool states.

    Attributes:
        domains: names.
        columns: covariates `<domain>__<covariate>`, domain by domain; may be empty.
        reference_name: what gains are measured from, in a word.
        curves: effect curves by what pool they are of, at most three; the first is the pool at
            hand.
        triangle: gains over three domains; None below three.
        mixture_D: the recommended mixture, marked in the triangle.
        reference_D: the reference mixture, marked too.
        run_mixture_ND: mixtures of the runs, its dots.
        tree: see `adapters.cate_tree.grow_cate_tree`; None without covariates.
        importance_CD: see `core.interpretation.covariate_importance`; None without covariates.
        tree_reference: the mixture that domains are added to in the tree and the importance.
    """

    domains: Sequence[str]
    columns: Sequence[str]
    reference_name: str
    curves: Mapping[str, Sequence[EffectCurve]]
    triangle: Triangle | None
    mixture_D: np.ndarray
    reference_D: np.ndarray
    run_mixture_ND: np.ndarray = field(repr=False)
    tree: Mapping[str, Any] | None = None
    importance_CD: np.ndarray | None = None
    tree_reference: str = "equal"


def interpretation_view(shown: Interpretation) -> dict[str, Any]:
    """What the template draws."""
    domains, columns = list(shown.domains), list(shown.columns)
    return {
        "reference": shown.reference_name,
        "tree_reference": shown.tree_reference,
        "points": round(100 * STEP),
        "curves": _curves(shown.curves) if shown.curves else None,
        "triangle": None if shown.triangle is None else _triangle(shown, shown.triangle),
        "tree": None if shown.tree is None else _tree(shown.tree, columns, domains),
        "heat": None
        if shown.importance_CD is None
        else _heat(shown.importance_CD, columns, domains),
    }


# ---------------------------------------------------------------------------- curves


def _curves(sets: Mapping[str, Sequence[EffectCurve]]) -> dict[str, Any]:
    """Each domain's curves in a square of 0..100, all with one axis of gains."""
    every = [curve for curves in sets.values() for curve in curves]
    ends = np.concatenate([part for c in every for part in (c.gain_M, c.low_M, c.high_M)])
    ends = ends[np.isfinite(ends)]
    axis = Axis.around(min(float(ends.min()), 0.0), max(float(ends.max()), 0.0))
    plots = []
    for of_domain in zip(*sets.values(), strict=True):
        across = Axis.around(0.0, float(of_domain[0].share_M[-1]), n_ticks=3)
        plots.append(
            {
                "domain": of_domain[0].domain,
                "lines": [
                    _line(curve, axis, across) | {"css": css}
                    for curve, css in zip(of_domain, _CURVE_CSS, strict=False)
                ],
                "zero": round(100 - axis.at(0.0), 2),
                "across": [{"at": across.at(t), "text": f"{100 * t:.3g}%"} for t in across.ticks],
                "up": [{"at": round(100 - axis.at(t), 2), "text": f"{t:.3g}"} for t in axis.ticks],
            }
        )
    legend = [{"css": css, "label": label} for label, css in zip(sets, _CURVE_CSS, strict=False)]
    return {
        "plots": plots,
        "legend": legend if len(legend) > 1 else [],
        "has_band": any(line["band"] for plot in plots for line in plot["lines"]),
    }


def _line(curve: EffectCurve, axis: Axis, across: Axis) -> dict[str, str]:
    def points(values: np.ndarray) -> list[str]:
        return [
            f"{across.at(share)},{100 - axis.at(value):.2f}"
            for share, value in zip(curve.share_M, values, strict=True)
        ]

    known = bool(np.isfinite(curve.low_M).all())
    band = [*points(curve.high_M), *reversed(points(curve.low_M))] if known else []
    return {"line": " ".join(points(curve.gain_M)), "band": " ".join(band)}


# ---------------------------------------------------------------------------- the tree


def _tree(tree: Mapping[str, Any], columns: list[str], domains: list[str]) -> dict[str, Any]:
    """The nodes with names, and each leaf's effects as bars on one axis."""
    leaves = [leaf for _, leaf in tree_leaves(dict(tree["root"]))]
    effect_LD = np.array([leaf["effects"] for leaf in leaves])
    mean_D = np.array(tree["root"]["effects"])
    # In every leaf the same domains in the same order, so that leaves can be compared.
    size_D = np.abs(effect_LD).max(axis=0) + effect_LD.std(axis=0)
    kept = np.sort(np.argsort(-size_D, kind="stable")[:MOST_DOMAINS])
    order = kept[np.argsort(-mean_D[kept], kind="stable")].tolist()
    reach = float(np.abs(effect_LD[:, order]).max()) or 1.0
    axis = Axis(-reach, reach, ())

    def node(told: Mapping[str, Any]) -> dict[str, Any]:
        if "column" in told:
            return {
                "column": columns[told["column"]],
                "threshold": told["threshold"],
                "n_states": told["n_states"],
                "below": node(told["below"]),
                "above": node(told["above"]),
            }
        effect_D = told["effects"]
        best = int(np.argmax(effect_D))
        bars = [
            {
                "domain": domains[d],
                "text": _in_step(effect_D[d], reach, "+"),
                "x": min(axis.at(effect_D[d]), 50.0),
                "width": round(abs(axis.at(effect_D[d]) - 50), 2),
                "css": "up" if effect_D[d] > 0 else "down",
                "mean": axis.at(float(mean_D[d])),
                "is_best": d == best,
            }
            for d in order
        ]
        return {
            "column": None,
            "n_states": told["n_states"],
            "best": domains[best] if effect_D[best] > 0 else None,
            "bars": bars,
        }

    return {
        "root": node(tree["root"]),
        "explained": tree["explained"],
        "n_states": tree["root"]["n_states"],
        "n_hidden": len(domains) - len(order),
        "is_split": len(leaves) > 1,
    }


# ---------------------------------------------------------------------------- covariates


def _heat(importance_CD: np.ndarray, columns: list[str], domains: list[str]) -> dict[str, Any]:
    """The covariates that move most, a cell for each domain whose effect they move."""
    top = float(importance_CD.max(initial=0.0)) or 1.0
    n_covariates = len(columns) // len(domains)
    ranked = rank_covariates(importance_CD)[:MOST_COVARIATES]
    rows = [
        {
            "column": columns[c],
            "cells": [
                {
                    "text": _in_step(importance_CD[c, d], top),
                    "heat": round(float(importance_CD[c, d]) / top, 3),
                    "is_own": c // n_covariates == d,
                }
                for d in range(len(domains))
            ],
        }
        for c in ranked
    ]
    return {"domains": domains, "rows": rows, "n_hidden": len(columns) - len(rows)}


# ---------------------------------------------------------------------------- the triangle


def _triangle(shown: Interpretation, triangle: Triangle) -> dict[str, Any]:
    """Cells by steps of gain, dots of the runs, and the two mixtures."""
    mass_N = shown.run_mixture_ND[:, list(triangle.domains)].sum(axis=1)
    dot_N2 = _flat(triangle.place(shown.run_mixture_ND))
    return {
        "bands": _bands(triangle),
        "corners": [_short(shown.domains[d]) for d in triangle.domains],
        "names": [shown.domains[d] for d in triangle.domains],
        "total": triangle.total,
        "is_all": len(shown.domains) == 3,
        "dots": [
            {"x": round(float(x), 2), "y": round(float(y), 2), "opacity": round(float(mass), 2)}
            for (x, y), mass in zip(dot_N2, mass_N, strict=True)
            if np.isfinite(x) and mass > 0.01
        ],
        "recommended": _spot(triangle, shown.mixture_D),
        "reference": _spot(triangle, shown.reference_D),
    }


def _bands(triangle: Triangle) -> list[dict[str, Any]]:
    """The cells by steps of gain, one outline each; great losses share the first step."""
    gain_M = np.nan_to_num(triangle.gain_M)
    low, high = min(float(gain_M.min()), 0.0), max(float(gain_M.max()), 0.0)
    if high > 0:
        low = max(low, -MOST_LOSS * high)
    axis = Axis.around(low, high, n_ticks=9)
    reach = max(abs(axis.low), abs(axis.high))
    step_M = np.clip(np.searchsorted(axis.ticks, gain_M, side="right"), 1, len(axis.ticks) - 1)
    is_cut = bool(gain_M.min() < axis.low)
    xy_M32 = _flat(triangle.corners_M33)
    return [
        {
            "text": f"below {_tick(axis.ticks[1])}"
            if step == 1 and is_cut
            else f"{_tick(axis.ticks[step - 1])} to {_tick(axis.ticks[step])}",
            "css": "up" if axis.ticks[step] > 0 else "down",
            "heat": round(abs(axis.ticks[step - 1] + axis.ticks[step]) / 2 / reach, 3),
            "path": "".join(
                "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in cell) + "Z"
                for cell in xy_M32[step_M == step]
            ),
        }
        for step in np.unique(step_M).tolist()
    ]


def _tick(gain: float) -> str:
    return f"{gain:+.4g}".replace("-", MINUS) if gain else "0"


def _flat(corners: np.ndarray) -> np.ndarray:
    """Barycentric coordinates to the plane: first corner on top, then left, then right."""
    places_32 = np.array([[50.0, 0.0], [0.0, _HEIGHT], [100.0, _HEIGHT]])
    return corners @ places_32


def _spot(triangle: Triangle, mixture_D: np.ndarray) -> dict[str, float] | None:
    x, y = _flat(triangle.place(mixture_D))
    return {"x": round(float(x), 2), "y": round(float(y), 2)} if np.isfinite(x) else None


def _in_step(value: float, top: float, sign: str = "") -> str:
    """A number with as many decimals as the largest beside it needs for three digits."""
    decimals = min(max(2 - math.floor(math.log10(top)), 0), 9)
    return f"{value:{sign}.{decimals}f}".replace("-", MINUS)


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
