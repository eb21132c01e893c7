"""What the page of `causalmix explain` shows, computed from a model."""

import numpy as np

from causalmix_pipeline.adapters.estimators import SEARCHED, CombinedEstimator
from causalmix_pipeline.adapters.table_report import Curve, TableReport, render_table_report
from causalmix_pipeline.core.belief import OBSERVATIONAL_R2, placebo
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.policy import Constraints, weighted_gain
from causalmix_pipeline.tables import Model, best_mixture

#: Points of an effect curve, and pool states that the importance of a covariate is measured on.
N_POINTS, N_STATES = 25, 16


def explain(model: Model) -> str:
    """The model as one HTML page: estimators, effects, predictions, covariates, checks."""
    return render_table_report(table_report(model))


def table_report(model: Model) -> TableReport:
    """Compute all parts of the page, for the mean of the runs' pool states."""
    runs = model.runs
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    state_DP = runs.distinct_states()[1].mean(axis=0)
    best_D, gain, se = best_mixture(model, state_DP, Constraints.simplex_only(equal_D))
    shown_NT = runs.outcome_NT * model.sign_T
    predicted_NT = model.out_of_fold_NT * model.sign_T
    r2 = model.observational_r2()
    return TableReport(
        domains=runs.domains,
        metrics=runs.tasks,
        weights=tuple(model.weights_T.tolist()),
        maximised=tuple((model.sign_T > 0).tolist()),
        n_runs=runs.n_runs,
        n_states=runs.n_states,
        covariates=runs.covariates,
        notes=model.notes,
        mixture=tuple(best_D.tolist()),
        gain=gain,
        low=gain - Z90 * se,
        high=gain + Z90 * se,
        scores=model.scores.to_dicts(),
        curves=effect_curves(model, state_DP, equal_D),
        scatters={
            task: list(zip(shown_NT[:, t].tolist(), predicted_NT[:, t].tolist(), strict=True))
            for t, task in enumerate(runs.tasks)
        },
        importance=covariate_importance(model, best_D, equal_D),
        noise=model.noise().to_dicts(),
        treatment_r2=r2,
        observational=r2 is not None and r2 > OBSERVATIONAL_R2,
        placebo=_placebo(model),
    )


def effect_curves(model: Model, state_DP: np.ndarray, reference_D: np.ndarray) -> list[Curve]:
    """Gain over the reference as one domain's share moves, the others in proportion.

    Each curve ends at the largest share that a run had: beyond it nothing was seen.
    """
    estimator, weights_T = model.weighted
    curves = []
    for d, domain in enumerate(model.runs.domains):
        share_M = np.linspace(0, model.runs.mixture_ND[:, d].max(), N_POINTS)
        others_D = np.where(np.arange(len(reference_D)) == d, 0.0, reference_D)
        mixture_MD = (1 - share_M)[:, None] * others_D / others_D.sum()
        mixture_MD[:, d] = share_M
        gain_M, se_M = weighted_gain(estimator, state_DP, mixture_MD, reference_D, weights_T)
        half_M = Z90 * se_M
        curves.append(Curve(domain, share_M, gain_M, gain_M - half_M, gain_M + half_M))
    return curves


def covariate_importance(
    model: Model, mixture_D: np.ndarray, reference_D: np.ndarray
) -> list[tuple[str, float]]:
    """By how much a mixture's gain moves when a covariate is exchanged among pool states.

    Returns:
        Each column `<domain>__<covariate>` and the root mean square change, the largest first.
    """
    runs = model.runs
    if not runs.covariates:
        return []
    estimator, weights_T = model.weighted
    rng = np.random.default_rng(model.seed)
    state_SDP = runs.distinct_states()[1]
    chosen = np.sort(rng.permutation(len(state_SDP))[:N_STATES])
    state_SDP = state_SDP[chosen]

    def gains(states: np.ndarray) -> np.ndarray:
        asked = [
            weighted_gain(estimator, state_DP, mixture_D[None], reference_D, weights_T)[0][0]
            for state_DP in states
        ]
        return np.array(asked)

    own_S = gains(state_SDP)
    rows = []
    for c, name in enumerate(runs.covariate_columns):
        d, p = divmod(c, len(runs.covariates))
        moved_SDP = state_SDP.copy()
        # A shift by half of the states: no state keeps its own value.
        moved_SDP[:, d, p] = np.roll(state_SDP[:, d, p], len(state_SDP) // 2)
        rows.append((name, float(np.sqrt(np.mean((gains(moved_SDP) - own_S) ** 2)))))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


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
