"""The design: growing it changes nothing that was there, and states say nothing of mixtures."""

from __future__ import annotations

import numpy as np
import pytest

from causalmix_pipeline.core.design import Design, DesignPlan, make_design
from causalmix_pipeline.core.errors import ConfigError


def rows_of(design: Design) -> list[tuple]:
    """Each run as values that can be compared bit by bit."""
    return [
        (int(state), mixture.tobytes(), int(seed), int(cell))
        for state, mixture, seed, cell in zip(
            design.state_N, design.mixture_ND, design.data_seed_N, design.cell_N, strict=True
        )
    ]


@pytest.mark.parametrize("n_runs", [16, 30, 128])
def test_sixteen_more_runs_leave_all_others_as_they_were(n_runs):
    small = rows_of(make_design(DesignPlan(n_runs=n_runs, seed=5), 4))
    large = rows_of(make_design(DesignPlan(n_runs=n_runs + 16, seed=5), 4))

    assert large[:n_runs] == small[:n_runs]
    assert len(set(large) - set(small)) == 16
    assert set(small) <= set(large)


def test_repeats_do_not_depend_on_the_number_of_runs():
    small = rows_of(make_design(DesignPlan(n_runs=16), 3))
    large = rows_of(make_design(DesignPlan(n_runs=200), 3))

    assert small[16:] == large[200:]


def test_a_repeat_differs_from_its_run_by_its_seed_alone():
    design = make_design(DesignPlan(n_runs=24, panel_mixtures=4, panel_seeds=3), 3)

    for cell in (0, 4, 8, 12):
        same = design.cell_N == cell
        assert same.sum() == 3
        assert len(np.unique(design.data_seed_N[same])) == 3
        assert len(np.unique(design.mixture_ND[same], axis=0)) == 1
        assert len(np.unique(design.state_N[same])) == 1


def test_each_pair_of_the_panel_has_a_state_of_its_own():
    design = make_design(DesignPlan(n_runs=32), 3)
    repeats = design.state_N[32:]

    np.testing.assert_array_equal(repeats, np.repeat([0, 1, 2, 3], 2))


def test_a_panel_larger_than_the_design_repeats_what_there_is():
    design = make_design(DesignPlan(n_runs=6, panel_mixtures=9, panel_seeds=2), 3)

    np.testing.assert_array_equal(design.cell_N, [0, 1, 2, 3, 4, 5, 0, 4])


def test_without_a_panel_there_are_only_distinct_runs():
    for plan in (DesignPlan(n_runs=8, panel_seeds=1), DesignPlan(n_runs=8, panel_mixtures=0)):
        assert len(make_design(plan, 3).cell_N) == 8


def test_every_state_gets_four_mixtures_and_the_plan_counts_the_states():
    plan = DesignPlan(n_runs=30)
    counts = np.bincount(make_design(plan, 3).state_N[:30])

    assert counts.tolist() == [4] * 7 + [2]
    assert plan.n_states == 8


def test_seeds_are_all_distinct():
    seeds = make_design(DesignPlan(n_runs=512), 5).data_seed_N

    assert len(np.unique(seeds)) == len(seeds)


def test_the_number_of_a_state_says_nothing_of_its_mixtures():
    """Between states a share varies no more than four independent draws a state would let it."""
    design = make_design(DesignPlan(n_runs=1024, panel_mixtures=0), 4)
    shares = design.mixture_ND.reshape(256, 4, 4)  # (states, mixtures, D)
    between = shares.mean(axis=1).var(axis=0, ddof=1)
    expected = shares.reshape(-1, 4).var(axis=0, ddof=1) / 4

    assert (between < 1.25 * expected).all()


def test_another_seed_gives_other_mixtures_and_other_orders():
    first, second = (make_design(DesignPlan(n_runs=8, seed=seed), 3) for seed in (0, 1))

    assert not np.isin(first.data_seed_N, second.data_seed_N).any()
    assert np.abs(first.mixture_ND - second.mixture_ND).max() > 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_runs", 0),
        ("mixtures_per_state", 0),
        ("panel_seeds", 0),
        ("panel_mixtures", -1),
        ("seed", -3),
    ],
)
def test_a_count_below_its_least_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"design\.{field} must be >= \d, got {value}"):
        DesignPlan(**{field: value})


def test_a_single_domain_is_refused():
    with pytest.raises(ConfigError, match=r"domains must be at least 2 .* got 1"):
        make_design(DesignPlan(), 1)


# Stages


def test_a_design_without_stages_is_what_it_was_before_there_were_any():
    """Numbers of an earlier version."""
    design = make_design(DesignPlan(n_runs=8), 4)

    assert design.stage_mixture_NSD is None
    assert design.mixture_ND[0] == pytest.approx(
        [0.5586282513264232, 0.17364323625201408, 0.1743023300898111, 0.09342618233175154],
        abs=1e-14,
    )


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_run_s_mixture_is_the_mean_of_its_stages(stages):
    design = make_design(DesignPlan(n_runs=16, stages=stages), 3)

    assert design.stage_mixture_NSD is not None
    assert design.stage_mixture_NSD.shape == (24, stages, 3)
    assert design.stage_mixture_NSD.sum(axis=2) == pytest.approx(1.0)
    np.testing.assert_allclose(design.stage_mixture_NSD.mean(axis=1), design.mixture_ND)
    repeat = np.flatnonzero(design.cell_N == 0)
    assert len(repeat) == 3
    assert (design.stage_mixture_NSD[repeat] == design.stage_mixture_NSD[0]).all()


def test_stages_are_drawn_independently_and_each_as_a_run_without_stages():
    """Two Sobol sequences that are scrambled apart would be functions of each other."""
    staged = make_design(DesignPlan(n_runs=2048, stages=2, panel_mixtures=0), 4)
    static = make_design(DesignPlan(n_runs=2048, panel_mixtures=0), 4)
    assert staged.stage_mixture_NSD is not None
    first_ND, second_ND = staged.stage_mixture_NSD[:, 0], staged.stage_mixture_NSD[:, 1]

    across = np.corrcoef(first_ND.T, second_ND.T)[:4, 4:]
    assert np.abs(across).max() < 0.07
    # Nor are their squares, as those of one sequence would be.
    across = np.corrcoef(np.square(first_ND.T), np.square(second_ND.T))[:4, 4:]
    assert np.abs(across).max() < 0.07
    for stage_ND in (first_ND, second_ND):
        assert stage_ND.mean(0) == pytest.approx(static.mixture_ND.mean(0), abs=0.02)
        assert stage_ND.std(0) == pytest.approx(static.mixture_ND.std(0), abs=0.02)


def test_more_runs_leave_the_stages_of_others_as_they_were():
    small = make_design(DesignPlan(n_runs=16, stages=3, panel_mixtures=0), 3)
    large = make_design(DesignPlan(n_runs=48, stages=3, panel_mixtures=0), 3)
    assert small.stage_mixture_NSD is not None and large.stage_mixture_NSD is not None

    np.testing.assert_array_equal(large.stage_mixture_NSD[:16], small.stage_mixture_NSD)


@pytest.mark.parametrize("stages", [0, 6])
def test_stages_must_be_few(stages):
    with pytest.raises(ConfigError, match=rf"design\.stages must be 1 to 5, got {stages}"):
        DesignPlan(stages=stages)
