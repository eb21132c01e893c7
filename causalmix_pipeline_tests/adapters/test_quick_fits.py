import numpy as np

from causalmix_pipeline.adapters.estimators import fit_chosen
from causalmix_pipeline.adapters.quick_fits import MOST_COVARIANCES, more_runs, quick_fit
from causalmix_pipeline.adapters.synthetic import SyntheticPool

RUNS = SyntheticPool.draw(4, 2, 2, seed=1).run_table(32, 4, seed=1)


def searched() -> dict:
    chosen = dict.fromkeys(RUNS.tasks, "response_surface")
    return fit_chosen(RUNS, chosen).parameters()["members"]


def test_a_surface_whose_hyper_parameters_are_known_is_kept_alone_or_in_a_stack():
    known = searched()

    for parameters in (known, {"stack": {"weights": {}, "members": known}}):
        quick = quick_fit(RUNS, parameters)
        assert quick is not None
        name, fit = quick
        assert name == "response_surface"
        assert fit(RUNS).parameters()["members"]["response_surface"] == known["response_surface"]


def test_the_ridge_stands_in_for_the_unknown_and_the_slow():
    known = searched()
    n_states = int(np.sqrt(MOST_COVARIANCES / 2)) // 4 + 1
    many = SyntheticPool.draw(4, 2, 2, seed=1).run_table(n_states, 4)

    for runs, parameters in ((RUNS, {}), (many, known)):
        quick = quick_fit(runs, parameters)
        assert quick is not None
        assert quick[0] == "structured_ridge"


def test_without_covariates_or_a_surface_there_is_no_curve():
    runs = SyntheticPool.draw(4, 0, 1).run_table(1, 100)

    assert more_runs(runs, np.array([1.0]), {"regmix": {}}) is None


def test_a_task_without_weight_is_left_out():
    more = more_runs(RUNS, np.array([1.0, 0.0]), {})

    assert more is not None
    alone = more_runs(RUNS.select_tasks(["task_0"]), np.array([1.0]), {})
    assert alone is not None
    assert more.curve.table.equals(alone.curve.table)
