"""The hyper-parameters of the structured Gaussian process: their priors, and the search.

They are found by maximising the marginal likelihood with weak priors (C. E. Rasmussen and C. K. I.
Williams, Gaussian Processes for Machine Learning, section 5.4.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from causalmix_pipeline.adapters.gp_covariance import Covariance, Points
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Prior median and standard deviation of the log of each hyper-parameter, for outcomes of unit
#: variance. Lengths are in units of sqrt(share), or of standard deviations of a typical covariate.
PRIORS = {
    "share": (1.0, 2.0),
    "share_state": (0.3, 2.0),
    "domain": (0.5, 2.0),
    "all": (0.1, 2.0),
    "state_linear": (0.1, 2.0),
    "state_smooth": (0.1, 2.0),
    "state_id": (0.02, 2.0),
    "noise": (0.05, 2.0),
    "near_length": (6.0, 0.5),
    "domain_share_length": (0.7, 0.7),
    "domain_state_length": (3.0, 0.7),
    "all_share_length": (0.8, 0.7),
    "all_state_length": (3.0, 0.7),
    "state_length": (3.0, 0.7),
}

#: Hyper-parameters that exist without covariates.
BLIND = ("share", "domain", "all", "state_id", "noise", "near_length", "domain_share_length",
         "all_share_length")  # fmt: skip

#: Prior standard deviation of the log weight of a domain's covariate or log importance of a domain;
#: the median is 1.
WEIGHT_DEVIATION = 1.0

#: Where the search starts, over the prior's median. From loud noise it can end where the steep part
#: of a curve near a share of zero is taken for noise (Spearman .914 against .946 on such a task).
START = {"noise": 0.1}

#: How many prior standard deviations a hyper-parameter may move.
SEARCH_WIDTH = 3.0

#: Most runs that the search of hyper-parameters sees; the posterior sees them all. With 512 runs a
#: search on all costs five times as much.
SEARCH_RUNS = 256


def hyper_names(runs: RunTable, sees_state: bool) -> tuple[str, ...]:
    """Names of the hyper-parameters of a task, those of domains and covariates last."""
    importance = [f"importance:{domain}" for domain in runs.domains]
    if not sees_state:
        return (*BLIND, *importance)
    weights = [f"weight:{domain}__{name}" for domain in runs.domains for name in runs.covariates]
    return (*PRIORS, *importance, *weights)


def prior_of(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Prior means and standard deviations of the logs; shape (H,) each."""
    pairs = [PRIORS.get(name, (1.0, WEIGHT_DEVIATION)) for name in names]
    return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


def negative_log_posterior(
    log_hyper_H: np.ndarray, names: tuple[str, ...], points: Points, standard_N: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return minus the log of marginal likelihood times prior (no constant), and its gradient.

    Args:
        log_hyper_H: logs of the hyper-parameters; shape (H,).
        names: their names, in that order.
        points: the runs' mixtures, covariates and states.
        standard_N: one task's outcomes with mean 0 and variance 1; shape (N,).
    """
    from scipy.linalg import cho_solve, get_lapack_funcs

    covariance = Covariance(dict(zip(names, np.exp(log_hyper_H), strict=True)), points)
    cholesky_NN = np.linalg.cholesky(covariance.matrix())
    alpha_N = cho_solve((cholesky_NN, True), standard_N)
    value = 0.5 * float(standard_N @ alpha_N) + float(np.log(np.diag(cholesky_NN)).sum())
    (invert,) = get_lapack_funcs(("potri",), (cholesky_NN,))
    lower_NN = np.tril(invert(cholesky_NN, lower=1)[0])
    inverse_NN = lower_NN + np.tril(lower_NN, -1).T
    gradient = covariance.gradient(0.5 * (inverse_NN - np.outer(alpha_N, alpha_N)))
    mean_H, deviation_H = prior_of(names)
    z_H = (log_hyper_H - mean_H) / deviation_H
    gradient_H = np.array([gradient[name] for name in names]) + z_H / deviation_H
    return value + 0.5 * float(z_H @ z_H), gradient_H


def _search_rows(state_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of whole states, at most `SEARCH_RUNS`; of a single state, any of its rows."""
    order_N = rng.permutation(len(state_ids))
    states = np.unique(state_ids)
    if len(states) > 1:
        rank_S = rng.permutation(len(states))
        order_N = np.argsort(rank_S[np.searchsorted(states, state_ids)], kind="stable")
    return np.sort(order_N[:SEARCH_RUNS])


def find_hyper_parameters(
    names: tuple[str, ...], points: Points, standard_NT: np.ndarray, *, seed: int
) -> list[dict[str, float]]:
    """Return the hyper-parameters of each task by name.

    Args:
        names: as `hyper_names` gives them.
        points: the runs' mixtures, covariates and states.
        standard_NT: outcomes with mean 0 and variance 1; shape (N, T).
        seed: draws the runs that the search sees, if there are more than `SEARCH_RUNS`.
    """
    seen = _search_rows(points.state_ids, np.random.default_rng(seed))
    few = Points(points.root_ND[seen], points.state_NDP[seen], points.state_ids[seen])
    return [_search(names, few, standard_N) for standard_N in standard_NT[seen].T]


def _search(names: tuple[str, ...], points: Points, standard_N: np.ndarray) -> dict[str, float]:
    from scipy.optimize import minimize

    mean_H, deviation_H = prior_of(names)
    first_H = mean_H + np.log([START.get(name, 1.0) for name in names])
    low_H, high_H = mean_H - SEARCH_WIDTH * deviation_H, mean_H + SEARCH_WIDTH * deviation_H
    found = minimize(
        negative_log_posterior,
        np.clip(first_H, low_H, high_H),
        args=(names, points, standard_N),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(low_H, high_H, strict=True)),
        options={"maxiter": 60, "ftol": 1e-5},
    )
    return dict(zip(names, np.exp(found.x).tolist(), strict=True))


def reuse_hyper_parameters(
    names: tuple[str, ...], parameters: Mapping, task: str
) -> dict[str, float]:
    """Return those of a task from what `ResponseSurface.parameters` gave.

    Raises:
        EstimationError: if they were made for other names.
    """
    given = dict(parameters.get("hyper_parameters", {}).get(task, {}))
    if set(given) != set(names):
        odd = sorted(set(given) ^ set(names))
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise EstimationError(
            f"parameters of task {task} must name the hyper-parameters of a fit on these runs, but "
            f"differ in {', '.join(odd[:4])}{more}: they were made for other names, or by another "
            "version; fit without them (in the pipeline: materialise cate_model)."
        )
    return {name: float(given[name]) for name in names}
