from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import OWN, RunTable
from causalmix_pipeline.core.sources import join_sources, stack_runs

POOL = SyntheticPool.draw(4, 3, 2, seed=1)
OWN_RUNS = POOL.run_table(24, 4, noise=0.1, seed=2)


def labelled(runs: RunTable, source: str = "team_b", *, randomised: bool = False) -> RunTable:
    return replace(
        runs,
        run_ids=tuple(f"{source}/{run}" for run in runs.run_ids),
        source_N=(source,) * runs.n_runs,
        observational_sources=() if randomised else (source,),
    )


OTHERS = labelled(POOL.run_table(60, 1, noise=0.1, confounding=2.0, seed=3))


def moved(runs: RunTable, by) -> RunTable:
    return replace(runs, outcome_NT=runs.outcome_NT + np.array(by))


def test_own_runs_stay_as_they_are_and_no_state_is_shared():
    runs = join_sources(OWN_RUNS, OTHERS).runs
    n = OWN_RUNS.n_runs

    assert runs.n_runs == n + 60
    assert runs.sources == (OWN, "team_b")
    assert runs.observational_sources == ("team_b",)
    own = runs.subset(np.arange(n))
    assert own.to_frame().equals(OWN_RUNS.to_frame())
    assert not set(runs.state_ids[:n]) & set(runs.state_ids[n:])
    assert not set(runs.repeat_of_N[:n]) & set(runs.repeat_of_N[n:])
    assert RunTable.from_frame(runs.to_frame()).observational_sources == ("team_b",)


def test_a_constant_added_to_a_source_changes_nothing():
    plain = join_sources(OWN_RUNS, OTHERS)
    offset = join_sources(OWN_RUNS, moved(OTHERS, [40.0, -7.0]))

    np.testing.assert_allclose(offset.runs.outcome_NT, plain.runs.outcome_NT, atol=1e-9)
    difference = offset.levels["level"] - plain.levels["level"]
    np.testing.assert_allclose(difference.to_numpy(), [40.0, -7.0], atol=1e-9)


def test_a_factor_on_the_losses_of_a_source_changes_nothing():
    own, others = moved(OWN_RUNS, -20.0), moved(OTHERS, -20.0)
    larger = replace(others, outcome_NT=others.outcome_NT * 0.8)

    plain, scaled = join_sources(own, others), join_sources(own, larger)

    assert scaled.levels["of_a_loss"].all()
    np.testing.assert_allclose(scaled.runs.outcome_NT, plain.runs.outcome_NT, rtol=1e-9)
    ratio = scaled.levels["level"] / plain.levels["level"]
    np.testing.assert_allclose(ratio.to_numpy(), 0.8)


def test_a_source_that_tried_better_mixtures_keeps_what_they_brought():
    """Centring each source would take the gain of its mixtures for its level."""
    reference_D = np.full(4, 0.25)
    value_N = [
        POOL.expected_gain(state, mixture, reference_D).mean()
        for state, mixture in zip(OTHERS.state_NDP, OTHERS.mixture_ND, strict=True)
    ]
    good = OTHERS.subset(np.argsort(value_N)[30:])

    found = join_sources(OWN_RUNS, good).levels["level"].to_numpy()
    centred = good.outcome_NT.mean(axis=0) - OWN_RUNS.outcome_NT.mean(axis=0)

    assert np.abs(found).max() < 0.5 * np.abs(centred).max()


def test_names_are_matched_whatever_their_order():
    turned = replace(
        OTHERS,
        domains=OTHERS.domains[::-1],
        tasks=OTHERS.tasks[::-1],
        covariates=OTHERS.covariates[::-1],
        mixture_ND=OTHERS.mixture_ND[:, ::-1],
        outcome_NT=OTHERS.outcome_NT[:, ::-1],
        state_NDP=OTHERS.state_NDP[:, ::-1, ::-1],
    )

    plain, found = join_sources(OWN_RUNS, OTHERS).runs, join_sources(OWN_RUNS, turned).runs

    np.testing.assert_array_equal(found.state_NDP, plain.state_NDP)
    np.testing.assert_allclose(found.outcome_NT, plain.outcome_NT, atol=1e-9)


def test_each_of_several_sources_has_a_level_of_its_own():
    both = stack_runs([OTHERS, labelled(moved(POOL.run_table(20, 2, seed=4), 5.0), "team_c")])

    levels = join_sources(OWN_RUNS, both).levels

    assert levels["source"].to_list() == ["team_b", "team_b", "team_c", "team_c"]
    assert levels["runs"].to_list() == [60, 60, 40, 40]
    np.testing.assert_allclose(levels["level"].to_numpy(), [0, 0, 5, 5], atol=0.5)


def test_sources_that_dont_fit_are_refused():
    renamed = replace(OTHERS, tasks=("task_0", "other"))
    with pytest.raises(EstimationError, match="must have the tasks of the project"):
        join_sources(OWN_RUNS, renamed)
    with pytest.raises(EstimationError, match="another name than 'own'"):
        join_sources(OWN_RUNS, POOL.run_table(5, 4))
    with pytest.raises(EstimationError, match=r"task_0 must be 0 or more.*turned sign"):
        join_sources(moved(OWN_RUNS, -20.0), moved(OTHERS, 20.0))
