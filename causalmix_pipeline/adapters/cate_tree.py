"""EconML's tree over pool states: which covariates decide what is worth adding.

`SingleTreeCateInterpreter` (EconML, pywhy.org) fits one small regression tree to the effects that
a model gives; the model may be any of ours. Here the effects are those of all domains at once, so
that a leaf is a kind of pool in which the same domains help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from causalmix_pipeline.core.effects import StateScaler
from causalmix_pipeline.core.interpretation import Effects

#: Deepest leaf, in splits: more than three questions aren't read.
MAX_DEPTH = 3

#: Fewest states of a leaf, and the part of all states that it must have: below, a leaf tells of
#: single states.
LEAF_STATES, LEAF_PART = 4, 0.1

#: A split must explain this part of the variance of all effects; below it is noise.
SPLIT_PART = 0.02

#: Effects whose standard deviation is below this part of their size are alike: below it the tree
#: would part rounding.
NOTHING = 1e-6


@dataclass(frozen=True, eq=False)
class _EffectModel:
    """What EconML asks of an estimator: effects (S, D) of standardised covariates (S, D x P)."""

    effects: Effects
    scaler: StateScaler
    scale: float

    def const_marginal_effect(self, X: np.ndarray) -> np.ndarray:
        scaled_SDP = X.reshape(len(X), *self.scaler.mean_DP.shape)
        state_SDP = scaled_SDP * self.scaler.scale_DP + self.scaler.mean_DP
        return self.effects.of_domains(state_SDP) / self.scale


def grow_cate_tree(effects: Effects, state_SDP: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Split the pool states by covariates so that within a leaf the domains' effects are alike.

    Args:
        effects: the model.
        state_SDP: distinct pool states of the runs.
        seed: which of two equally good splits is taken.

    Returns:
        Plain values: `explained` (part of the variance of effects between states that the leaves
        explain; 0 without a split) and `root`. A node has `n_states`, `effects` (mean of each
        domain) and `spread` (its standard deviation among the node's states); one that is split
        also `column` (a covariate, counted domain by domain), `threshold` in the covariate's own
        unit, and the nodes `below` (up to the threshold) and `above`.
    """
    from econml.cate_interpreter import SingleTreeCateInterpreter

    scaler = StateScaler.fit(state_SDP)
    state_SC = scaler.transform(state_SDP).reshape(len(state_SDP), -1)
    effect_SD = effects.of_domains(state_SDP)
    variance = float(effect_SD.var(axis=0).mean())
    if variance <= (NOTHING * np.abs(effect_SD).max()) ** 2:
        return {"explained": 0.0, "root": _leaf(effect_SD)}
    least = max(LEAF_STATES, int(np.ceil(LEAF_PART * len(state_SDP))))
    interpreter = SingleTreeCateInterpreter(
        max_depth=MAX_DEPTH,
        min_samples_leaf=least,
        min_impurity_decrease=SPLIT_PART,  # the variance is scaled to 1
        random_state=seed,
    )
    interpreter.interpret(_EffectModel(effects, scaler, float(np.sqrt(variance))), state_SC)
    tree = interpreter.tree_model_.tree_
    leaves = tree.children_left < 0
    inside = float(tree.impurity[leaves] @ tree.n_node_samples[leaves]) / len(state_SDP)
    rows_of = interpreter.tree_model_.decision_path(state_SC).toarray().astype(bool)

    def node(index: int) -> dict[str, Any]:
        told = _leaf(effect_SD[rows_of[:, index]])
        if leaves[index]:
            return told
        column = int(tree.feature[index])
        mean, scale = scaler.mean_DP.ravel()[column], scaler.scale_DP.ravel()[column]
        return told | {
            "column": column,
            "threshold": float(tree.threshold[index] * scale + mean),
            "below": node(int(tree.children_left[index])),
            "above": node(int(tree.children_right[index])),
        }

    return {"explained": 1 - inside / float(tree.impurity[0]), "root": node(0)}


def tree_leaves(
    node: dict[str, Any], path: tuple[tuple[int, str, float], ...] = ()
) -> list[tuple[tuple[tuple[int, str, float], ...], dict[str, Any]]]:
    """Each leaf with the questions that lead to it: (column, `<=` or `>`, threshold)."""
    if "column" not in node:
        return [(path, node)]
    column, threshold = node["column"], node["threshold"]
    return [
        *tree_leaves(node["below"], (*path, (column, "<=", threshold))),
        *tree_leaves(node["above"], (*path, (column, ">", threshold))),
    ]


def _leaf(effect_SD: np.ndarray) -> dict[str, Any]:
    return {
        "n_states": len(effect_SD),
        "effects": effect_SD.mean(axis=0).tolist(),
        "spread": effect_SD.std(axis=0).tolist(),
    }
