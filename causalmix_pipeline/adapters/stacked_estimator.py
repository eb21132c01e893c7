"""A stack: the weighted mean of several estimators, weights >= 0 that sum to 1, one set per task.

The weights minimise the squared error of out-of-fold predictions, within pool states where states
have several mixtures, since only gains count. Source: L. Breiman, Stacked regressions, Machine
Learning 24 (1996): the weights must not be negative, and members are predicted out of fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from causalmix_pipeline.core.effects import (
    FOLD_ARRAYS,
    EffectEstimator,
    FoldPrediction,
    Gain,
    assign_folds,
    center_by_state,
    check_runs,
    has_contrasts,
    join_folds,
    predict_fold,
)
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Members where there are covariates, and where there are none.
STATE_MEMBERS = (
    "response_surface",
    "structured_ridge",
    "lightgbm_state",
    "regmix",
    "extra_trees",
    "log_linear",
)
BLIND_MEMBERS = ("response_surface_blind", "regmix", "extra_trees", "log_linear")

#: A member that would get less is left out: it costs time at each prediction and changes little.
LEAST_WEIGHT = 0.04

#: Folds for the weights where none are given.
N_FOLDS = 5

#: Weight of each member, by task.
Weights = dict[str, dict[str, float]]


class StackedEstimator:
    """The weighted mean, behind `core.effects.EffectEstimator`.

    The standard error of a gain is the weighted mean of the members'; one without counts with that
    of the first member that has one. It's cautious: members' errors count as fully correlated.

    Attributes:
        weights: weight of each member, by task.
    """

    name = "stack"

    def __init__(
        self,
        make: Callable[[str], EffectEstimator],
        members: Sequence[str] = (),
        seed: int = 0,
    ):
        """Set up an unfitted stack.

        Args:
            make: returns a fresh estimator by name.
            members: their names; none for those of the tables above.
            seed: of the folds.
        """
        self.make = make
        self.members = tuple(members)
        self.seed = seed
        self.weights: Weights = {}
        self.task_correlation_TT = np.ones((0, 0))

    def fit(self, runs: RunTable, parameters: Mapping | None = None) -> StackedEstimator:
        """Find the weights by cross-validation and fit the members that have some.

        Args:
            runs: the proxy runs.
            parameters: what `parameters()` returned earlier, or at least its `weights`; members
                whose own parameters are there aren't searched again.

        Raises:
            EstimationError: if a member refuses the runs, or `parameters` lack a task.
        """
        check_runs(runs)
        runs = runs.sorted_by_run()
        members = self.members or (STATE_MEMBERS if runs.covariates else BLIND_MEMBERS)
        known = dict(parameters or {})
        if "weights" in known:
            self.weights = _weights_of(known["weights"], runs.tasks)
        else:
            fold_N = assign_folds(runs, N_FOLDS, self.seed)
            self.weights = stack_weights(
                runs,
                {
                    name: join_folds(
                        [predict_fold(lambda n=name: self.make(n), runs, fold_N, f)
                         for f in np.unique(fold_N)]
                    ).prediction_NT
                    for name in members
                },
            )  # fmt: skip
        used = {name for weights in self.weights.values() for name in weights}
        self._fitted: list[tuple[np.ndarray, list[int], EffectEstimator]] = []
        # In the order of `members`, so that the first with standard errors is the same each time.
        for name in (*members, *sorted(used - set(members))):
            columns = [t for t, task in enumerate(runs.tasks) if name in self.weights[task]]
            if columns:
                own = runs.select_tasks([runs.tasks[t] for t in columns])
                weight_T = np.array([self.weights[task].get(name, 0.0) for task in own.tasks])
                member = fit_member(self.make(name), own, known.get("members", {}).get(name))
                self._fitted.append((weight_T, columns, member))
        self._tasks = runs.tasks
        noise = [
            getattr(m, "noise_variance_T", np.full(len(c), np.nan)) for _, c, m in self._fitted
        ]
        self.noise_variance_T = self._mix([noise_T[None] for noise_T in noise], fill=True)[0]
        self.task_correlation_TT = self._correlation()
        return self

    def predict(self, state_DP: np.ndarray, mixture_MD: np.ndarray) -> np.ndarray:
        """Return the weighted mean of the members' expected outcomes; shape (M, T)."""
        return self._mix([m.predict(state_DP, mixture_MD) for _, _, m in self._fitted])

    def gain(self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray) -> Gain:
        """Return the weighted means of gains and of standard errors."""
        gains = [m.gain(state_DP, mixture_MD, reference_D) for _, _, m in self._fitted]
        mean_MT = self._mix([gain.mean_MT for gain in gains])
        return Gain(mean_MT, self._mix([gain.se_MT for gain in gains], fill=True))

    def smooth_gain(
        self, state_DP: np.ndarray, mixture_MD: np.ndarray, reference_D: np.ndarray
    ) -> Gain:
        """Return gains by the members that have standard errors alone: quick, and without steps.

        A task without such a member has nan.
        """
        parts = []
        for _, columns, member in self._fitted:
            if hasattr(member, "noise_variance_T"):
                parts.append(member.gain(state_DP, mixture_MD, reference_D))
            else:
                unknown_MT = np.full((len(np.atleast_2d(mixture_MD)), len(columns)), np.nan)
                parts.append(Gain(unknown_MT, unknown_MT))
        mean_MT = self._mix([part.mean_MT for part in parts], fill=True)
        return Gain(mean_MT, self._mix([part.se_MT for part in parts], fill=True))

    def parameters(self) -> dict:
        """Return the weights and each member's own parameters."""
        return {
            "weights": self.weights,
            "members": {member.name: member.parameters() for _, _, member in self._fitted},
        }

    def _mix(self, parts: list[np.ndarray], *, fill: bool = False) -> np.ndarray:
        """Weighted sum over members; with `fill`, unknown values become the first known ones."""
        shape = (len(parts[0]), len(self._tasks))
        total, first = np.zeros(shape), np.full(shape, np.nan)
        if fill:
            for (_, columns, _), part in zip(self._fitted, parts, strict=True):
                first[:, columns] = np.where(np.isnan(first[:, columns]), part, first[:, columns])
        for (weight_T, columns, _), part in zip(self._fitted, parts, strict=True):
            known = np.where(np.isnan(part), first[:, columns], part) if fill else part
            total[:, columns] += weight_T * known
        return total

    def _correlation(self) -> np.ndarray:
        """That of the first member with standard errors between its tasks, else 1."""
        correlation_TT = np.ones((len(self._tasks),) * 2)
        for _, columns, member in self._fitted:
            if hasattr(member, "noise_variance_T"):
                correlation_TT[np.ix_(columns, columns)] = member.task_correlation_TT
                break
        return correlation_TT


#: Estimators whose parameters, kept by task, save a search. The ridge has a closed form.
REUSED = ("response_surface", "response_surface_blind", "log_linear", "stack")


def fit_member(
    member: EffectEstimator, runs: RunTable, parameters: Mapping | None
) -> EffectEstimator:
    """Fit an estimator; one that can reuse the parameters given isn't searched again."""
    if parameters is not None and member.name in REUSED:
        return member.fit(runs, parameters=parameters)  # pyright: ignore[reportCallIssue]
    return member.fit(runs)


def stack_weights(runs: RunTable, out_of_fold: Mapping[str, np.ndarray]) -> Weights:
    """Weights of each task from out-of-fold predictions.

    The first member is always named, with 0 if need be: it lends others its standard errors.

    Args:
        runs: the proxy runs.
        out_of_fold: predictions by member; shape (N, T) each, in the order of `runs`.
    """
    names = list(out_of_fold)
    error_KNT = np.stack([runs.outcome_NT - out_of_fold[name] for name in names])
    if has_contrasts(runs):
        error_KNT = np.stack([center_by_state(error_NT, runs.groups) for error_NT in error_KNT])
    return {
        task: {
            name: float(weight)
            for name, weight in zip(names, _solve(error_KNT[:, :, t]), strict=True)
            if weight > 0 or name == names[0]
        }
        for t, task in enumerate(runs.tasks)
    }


def stack_folds(
    runs: RunTable, fold_N: np.ndarray, members: Mapping[str, Sequence[FoldPrediction]]
) -> FoldPrediction:
    """Predict each fold by weights that were found on the other folds.

    So the stack is scored as honestly as its members, at no further fit.
    """
    joined = {name: join_folds(folds) for name, folds in members.items()}
    parts = {}
    for field in FOLD_ARRAYS:
        filled = {name: getattr(one, field) for name, one in joined.items()}
        if field in ("se_NT", "noise_NT"):
            first = next((v for v in filled.values() if not np.isnan(v).all()), None)
            if first is not None:
                filled = {n: np.where(np.isnan(v), first, v) for n, v in filled.items()}
        parts[field] = filled
    out = {field: np.full(runs.outcome_NT.shape, np.nan) for field in parts}
    for fold in np.unique(fold_N):
        inside = fold_N == fold
        known = {name: one.prediction_NT[~inside] for name, one in joined.items()}
        weights = stack_weights(runs.subset(~inside), known)
        for field, values in parts.items():
            for t, task in enumerate(runs.tasks):
                out[field][inside, t] = sum(
                    weight * values[name][inside, t] for name, weight in weights[task].items()
                )
    return FoldPrediction("stack", **out)


def _solve(error_KN: np.ndarray) -> np.ndarray:
    """Weights >= 0 of sum 1 with the least squared error of the mean; small ones are left out."""
    from scipy.optimize import nnls

    kept = np.arange(len(error_KN))
    weight_K = np.zeros(len(error_KN))
    while True:
        if len(kept) == 1:
            weight_K[kept] = 1.0
            return weight_K
        error_NK = error_KN[kept].T / (np.linalg.norm(error_KN[kept]) or 1.0)
        # A row that asks for the sum 1: whatever its size, only the scale of the solution differs.
        system = np.vstack([error_NK, np.ones(len(kept))])
        solution = nnls(system, np.append(np.zeros(len(error_NK)), 1.0))[0]
        solution = solution / solution.sum()
        if (solution >= LEAST_WEIGHT).all():
            weight_K[kept] = solution
            return weight_K
        kept = kept[solution >= LEAST_WEIGHT]


def _weights_of(weights: Mapping, tasks: Sequence[str]) -> Weights:
    missing = [task for task in tasks if task not in weights]
    if missing:
        raise EstimationError(
            f"parameters must hold the weights of each task, got none of {', '.join(missing)}: fit "
            "without them."
        )
    return {task: {n: float(w) for n, w in weights[task].items()} for task in tasks}
