"""How far to believe a model that was fitted on tables: what can fail, what can't be known."""

import numpy as np

from causalmix_pipeline.adapters import quick_fits
from causalmix_pipeline.adapters.quick_fits import MoreRuns
from causalmix_pipeline.core.falsification import Trial
from causalmix_pipeline.core.robustness import Robustness, best_of_runs, robustness
from causalmix_pipeline.table_model import Model


def trials(model: Model) -> list[Trial]:
    """Test whether mixtures and pool states matter; see `core.falsification`."""
    return quick_fits.run_trials(model.runs, model.weights_T, model.out_of_fold_NT, seed=model.seed)


def hidden_confounder(model: Model, mixture_D: np.ndarray | None = None) -> Robustness:
    """What a hidden confounder needs to explain the gain over the equal mixture away.

    Args:
        model: from `fit` or `Model.load`.
        mixture_D: the mixture that was recommended; shape (D,). None for the best of the runs' own
            in the mean pool state.

    Raises:
        EstimationError: if the runs are too few to tell.
    """
    runs = model.runs
    equal_D = np.full(len(runs.domains), 1 / len(runs.domains))
    if mixture_D is None:
        estimator, weights_T = model.weighted
        mixture_D = best_of_runs(estimator, runs, equal_D, weights_T)
    return robustness(runs, mixture_D, equal_D, model.weights_T)


def more_runs(model: Model) -> MoreRuns | None:
    """Measure what twice the runs would bring; None where it can't be told, or not quickly."""
    return quick_fits.more_runs(model.runs, model.weights_T, model.parameters, model.seed)
