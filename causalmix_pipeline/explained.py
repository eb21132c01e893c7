"""What the page of `causalmix explain` shows, computed from a model."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from causalmix_pipeline.adapters.beliefs_html import Beliefs
from causalmix_pipeline.adapters.cate_tree import grow_cate_tree
from causalmix_pipeline.adapters.estimators import SEARCHED, CombinedEstimator
from causalmix_pipeline.adapters.interpretation_html import Interpretation
from causalmix_pipeline.adapters.state_tables import read_states
from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.adapters.table_report import TableReport, render_table_report
from causalmix_pipeline.beliefs import hidden_confounder, more_runs, trials
from causalmix_pipeline.core.belief import placebo, reach_of
from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.falsification import frame_rows
from causalmix_pipeline.core.interpretation import (
    EffectCurve,
    Effects,
    covariate_importance,
    effect_curves,
    extreme_states,
    rank_covariates,
    triangle,
)
from causalmix_pipeline.core.policy import USUAL_RADIUS
from causalmix_pipeline.table_model import Model, TableSource
from causalmix_pipeline.table_recommendations import best_mixture

#: What is said of more runs where that can't be measured.
UNTOLD = "what they would bring can't be told quickly from these"


class PoolState(NamedTuple):
    """A pool to explain the model for: its name and its covariates, shape (D, P)."""

    name: str
    state_DP: np.ndarray


def explain(model: Model, pool: PoolState | None = None) -> str:
    """The model as one HTML page: effects, what they depend on, estimators, predictions, checks.

    Args:
        model: from `fit` or `Model.load`.
        pool: the pool at hand, see `pool_state`; None for the mean of the runs' pool states.
    """
    return render_table_report(table_report(model, pool))


def pool_state(model: Model, pools: TableSource, name: str | None = None) -> PoolState:
    """Read a pool's covariates.

    Args:
        model: from `fit` or `Model.load`, with covariates.
        pools: `pool` and `<domain>__<covariate>`.
        name: which row; None where there is only one.

    Raises:
        ConfigError: if no row has that name, or several rows and no name are given.
        EstimationError: if the model has no covariates, or the table lacks some.
    """
    if not model.runs.covariates:
        raise EstimationError(
            "pools must be left out for a model without covariates, got some: to it all pools are "
            "alike."
        )
    table = open_table(pools, "pools")
    names, state_MDP, _ = read_states(
        table, model.runs.domains, model.runs.covariates, key="pool", known=model.runs
    )
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ConfigError(
            f"pool must be one of {table.name} ({known}), got {name or 'none'}: name one of them."
        )
    return PoolState(name, state_MDP[names.index(name)])


def table_report(model: Model, pool: PoolState | None = None) -> TableReport:
    """Compute all parts of the page."""
    runs = model.runs
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    asked_DP = pool.state_DP if pool else runs.distinct_states()[1].mean(axis=0)
    reach = reach_of(runs, asked_DP)
    verdict, state_DP = reach.verdict, reach.edge_DP
    free = Constraints.simplex_only(equal_D)
    if model.weighted[0].needs_trust_region:
        free = replace(free, trust_radius=USUAL_RADIUS)
    best_D, gain, se = best_mixture(model, state_DP, free)
    se *= reach.doubt
    if verdict == "unsupported":
        best_D, gain, se = equal_D, 0.0, float("nan")
    shown_NT = runs.outcome_NT * model.sign_T
    predicted_NT = model.out_of_fold_NT * model.sign_T
    return TableReport(
        domains=runs.domains,
        metrics=runs.tasks,
        weights=tuple(model.weights_T.tolist()),
        maximised=tuple((model.sign_T > 0).tolist()),
        n_runs=runs.n_runs,
        n_states=runs.n_states,
        covariates=runs.covariates,
        notes=model.notes,
        pool=pool.name if pool else "",
        verdict=verdict,
        mixture=tuple(best_D.tolist()),
        gain=gain,
        low=gain - Z90 * se,
        high=gain + Z90 * se,
        scores=model.scores.to_dicts(),
        interpretation=interpret(model, state_DP, best_D, pool.name if pool else None, reach.doubt),
        scatters={
            task: list(zip(shown_NT[:, t].tolist(), predicted_NT[:, t].tolist(), strict=True))
            for t, task in enumerate(runs.tasks)
        },
        noise=model.noise().to_dicts(),
        placebo=_placebo(model),
        beliefs=_beliefs(model, best_D, equal_D),
    )


def _beliefs(model: Model, mixture_D: np.ndarray, equal_D: np.ndarray) -> Beliefs:
    """What was tried to prove the model wrong, what can't be known, and the worth of more runs."""
    confounder, why_unknown = None, "there is no gain to explain away."
    if not np.allclose(mixture_D, equal_D):
        try:
            found = hidden_confounder(model, mixture_D)
            confounder = (found.value, found.value_lower)
        except EstimationError as error:
            why_unknown = str(error)
    more = more_runs(model)
    return Beliefs(
        treatment_r2=model.observational_r2(),
        observational_sources=model.runs.observational_sources,
        trials=frame_rows(trials(model)),
        gain_of="the recommended mixture",
        confounder=confounder,
        why_unknown=why_unknown,
        more_runs=f"{more.curve.describe()} ({more.estimator})" if more else UNTOLD,
    )


def interpret(
    model: Model,
    state_DP: np.ndarray,
    mixture_D: np.ndarray,
    name: str | None = None,
    doubt: float = 1.0,
) -> Interpretation:
    """Effects around the equal mixture: curves, triangle, and with covariates tree and importance.

    Args:
        model: from `fit` or `Model.load`.
        state_DP: the pool at hand.
        mixture_D: recommended for it.
        name: of the pool; None for the mean of the runs' states.
        doubt: how much wider its intervals are; see `core.belief.Overlap.doubt`.
    """
    runs = model.runs
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    effects = Effects(*model.weighted, equal_D)
    state_SDP = runs.distinct_states()[1]
    curves = _curves(
        model, replace(effects, doubt=doubt), {name or "mean of the pool states": state_DP}
    )
    tree = importance_CD = None
    if runs.covariates:
        tree = grow_cate_tree(effects, state_SDP, seed=model.seed)
        importance_CD = covariate_importance(effects, state_SDP, seed=model.seed)
        extremes = _extremes(runs.covariate_columns, state_SDP, importance_CD)
        curves |= _curves(model, effects, extremes)
    return Interpretation(
        domains=runs.domains,
        columns=runs.covariate_columns,
        reference_name="equal",
        curves=curves,
        triangle=triangle(effects, state_DP, mixture_D),
        mixture_D=mixture_D,
        reference_D=equal_D,
        run_mixture_ND=runs.mixture_ND,
        tree=tree,
        importance_CD=importance_CD,
    )


def _extremes(
    columns: tuple[str, ...], state_SDP: np.ndarray, importance_CD: np.ndarray
) -> dict[str, np.ndarray]:
    """The states with least and most of the covariate that matters most, if one does."""
    column = int(rank_covariates(importance_CD)[0])
    low, high = extreme_states(state_SDP, column)
    if low == high or not importance_CD[column].any():
        return {}
    value_S = state_SDP.reshape(len(state_SDP), -1)[:, column]
    return {
        f"state with {word} ({value_S[s]:.3g}) {columns[column]}": state_SDP[s]
        for word, s in (("least", low), ("most", high))
    }


def _curves(
    model: Model, effects: Effects, states: dict[str, np.ndarray]
) -> dict[str, list[EffectCurve]]:
    most_D = model.runs.mixture_ND.max(axis=0)
    return {
        label: effect_curves(effects, state_DP, model.runs.domains, most_D)
        for label, state_DP in states.items()
    }


def _placebo(model: Model) -> list[dict]:
    """Real against shuffled runs, by an estimator that needs no search."""
    runs = model.runs
    kept = model.parameters.get("stack", {}).get("members", {}) | model.parameters
    usable = [
        name for name in SEARCHED
        if set(runs.tasks) <= set(next(iter(kept.get(name, {"": {}}).values())))
    ]  # fmt: skip
    name = usable[0] if usable else "structured_ridge" if runs.covariates else "extra_trees"
    chosen = dict.fromkeys(runs.tasks, name)
    trial = placebo(lambda: CombinedEstimator(chosen, model.seed, kept), runs, seed=model.seed)
    return trial.to_dicts()
