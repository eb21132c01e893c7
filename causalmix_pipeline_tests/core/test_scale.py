"""Proxies of several sizes: who gets which, how far effects hold, and how far they're believed."""

from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.estimators import make_estimator
from causalmix_pipeline.adapters.synthetic import SyntheticPool
from causalmix_pipeline.core.belief import TOP_UP_RUNS, reach_of
from causalmix_pipeline.core.effects import Z90, flag_outliers, permute_states
from causalmix_pipeline.core.scale import (
    SIZE_COVARIATE,
    SizeReach,
    at_size,
    at_trained_size,
    nearest_size,
    on_one_level,
    size_reach,
    size_sentence,
    size_words,
    sizes_of_states,
    without_size,
)
from causalmix_pipeline.core.top_up import plan_top_up, top_up_frame
from causalmix_pipeline_tests.core.sized_worlds import (
    EQUAL_D,
    LARGE,
    LEVEL,
    SMALL,
    SizedWorld,
    with_size,
)

# ---------------------------------------------------------------------------- who gets which


@pytest.mark.parametrize("shares", [[0.25], [0.3, 0.2], [0.1, 0.1, 0.1]])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_any_first_states_have_each_size_as_often_as_its_share_says(shares, seed):
    for n_states in (8, 13, 32, 128):
        counts = np.bincount(
            sizes_of_states(n_states, shares, seed=seed), minlength=len(shares) + 1
        )
        wanted = n_states * np.array([1 - sum(shares), *shares])

        assert np.abs(counts - wanted).max() <= 2, (n_states, counts, wanted)


def test_a_states_size_stays_when_states_are_added():
    few, many = (sizes_of_states(n, [0.25, 0.1], seed=3) for n in (16, 200))

    assert few.tolist() == many[:16].tolist()


def test_another_size_takes_states_from_the_recipes_own_alone():
    one, two = (sizes_of_states(64, shares, seed=3) for shares in ([0.25], [0.25, 0.2]))

    assert (two[one == 1] == 1).all()


def test_which_states_are_large_depends_on_the_seed():
    first, second = (sizes_of_states(64, [0.25], seed=seed) for seed in (0, 1))

    assert (first != second).any()


# ---------------------------------------------------------------------------- reach


@pytest.mark.parametrize(
    ("asked", "distance", "read_at", "doubt"),
    [
        (16.6, 0.0, 16.6, 1.0),
        (LARGE, 0.0, LARGE, 1.0),
        (LARGE + 0.04, 0.0, LARGE + 0.04, 1.0),
        (LARGE + 1, 1.0, LARGE + 1, 1.25),
        (LARGE + 6, 6.0, LARGE + 2, 2.5),
        (SMALL - 4, 4.0, SMALL - 2, 2.0),
    ],
)
def test_doubt_grows_with_the_doublings_beyond_the_sizes_trained(asked, distance, read_at, doubt):
    reach = SizeReach(asked, SMALL, LARGE)

    assert reach.distance == pytest.approx(distance)
    assert reach.read_at == pytest.approx(read_at)
    assert reach.doubt == pytest.approx(doubt)


def test_the_pools_overlap_neither_knows_nor_is_thinned_by_the_size():
    runs = SizedWorld(shrink=0.1, seed=1).runs()
    for shift in (0.0, 2.0, 9.0):
        state_DP = runs.state_NDP[0] + shift
        alone = reach_of(without_size(runs), state_DP[:, :-1])
        for size in (SMALL, LARGE, LARGE + 5):
            both = reach_of(runs, at_size(runs.covariates, state_DP, size))

            assert (both.score, both.pool_verdict) == (alone.score, alone.verdict)
            assert both.domain_score_D.tolist() == alone.domain_score_D.tolist()
            assert both.drift.equals(alone.drift)
            assert both.edge_DP[:, :-1].tolist() == alone.edge_DP.tolist()
            assert both.pool_doubt == alone.doubt


def test_a_size_beyond_those_trained_extrapolates_and_is_never_unsupported_by_itself():
    runs = SizedWorld(shrink=0.1, seed=1).runs()
    near_DP = runs.state_NDP[0]

    def verdict(state_DP, size):
        return reach_of(runs, at_size(runs.covariates, state_DP, size)).verdict

    assert verdict(near_DP, SMALL) == verdict(near_DP, LARGE) == "supported"
    for beyond in (LARGE + 0.5, LARGE + 6, LARGE + 20, SMALL - 1):
        assert verdict(near_DP, beyond) == "extrapolating"
    assert verdict(near_DP + 30, LARGE + 1) == "unsupported"


def test_effects_are_read_at_the_size_asked_for_and_believed_less_beyond():
    runs = SizedWorld(shrink=0.1, seed=1).runs()
    within, beyond = (
        reach_of(runs, at_size(runs.covariates, runs.state_NDP[0], size)) for size in (LARGE, 21.6)
    )

    assert within.size is not None
    assert (within.doubt, set(within.edge_DP[:, -1])) == (within.pool_doubt, {LARGE})
    assert beyond.doubt == pytest.approx(2 * beyond.pool_doubt)
    assert beyond.edge_DP[:, -1] == pytest.approx(LARGE + 2)


def test_without_sizes_nothing_is_said_of_them():
    runs = SyntheticPool.draw(seed=0).run_table(seed=0)
    state_DP = runs.state_NDP[0]

    assert size_reach(runs, state_DP) is None
    assert reach_of(runs, state_DP).size is None
    assert without_size(runs) is runs
    assert on_one_level(runs) is runs
    assert at_trained_size(runs, state_DP) is state_DP


def test_a_pool_asked_about_at_any_size_is_trained_at_the_nearest_one():
    runs = SizedWorld(shrink=0.1, seed=1).runs()
    for asked, nearest in ((14.0, SMALL), (16.0, SMALL), (17.0, LARGE), (30.0, LARGE)):
        state_DP = at_size(runs.covariates, runs.state_NDP[0], asked)

        assert set(at_trained_size(runs, state_DP)[:, -1]) == {nearest}
    assert nearest_size([15.0, 17.0], 16.0) == 0


# ---------------------------------------------------------------------------- levels


def test_a_pool_trained_at_two_sizes_is_one_state_where_sizes_dont_count():
    runs = SyntheticPool.draw(5, 3, 1, seed=0).run_table(16, 4, seed=0)
    size_N = np.where(np.arange(runs.n_runs) % 2 == 0, SMALL, LARGE)
    both = with_size(replace(runs, state_ids=2 * runs.state_ids + (size_N == LARGE)), size_N)

    assert both.n_states == 32
    assert without_size(both).n_states == 16


def test_methods_that_see_mixtures_alone_get_runs_of_all_sizes_on_one_level():
    world = SizedWorld(shrink=0.0, seed=2)
    runs = world.runs(64, noise=0.05)
    large_N = runs.state_NDP[:, 0, -1] == LARGE

    level = on_one_level(runs)

    rise = dict(zip(level.run_ids, level.outcome_NT[:, 0], strict=True))
    moved_N = np.array([rise[run] for run in runs.run_ids]) - runs.outcome_NT[:, 0]
    assert moved_N[~large_N] == pytest.approx(0)
    assert np.ptp(moved_N[large_N]) == pytest.approx(0, abs=1e-9)
    # The larger ones lie .8 higher, and states differ besides.
    assert moved_N[large_N][0] == pytest.approx(-2 * LEVEL, abs=0.4)
    assert SIZE_COVARIATE not in level.covariates


# ---------------------------------------------------------------------------- coverage


def promised_and_true(n_worlds: int, beyond: float) -> np.ndarray:
    """Gain, its error, what it's multiplied by, and the true gain of mixtures that look best."""
    rows = []
    for seed in range(n_worlds):
        for shrink in (0.0, 0.1, 0.2):
            world = SizedWorld(shrink=shrink, seed=seed)
            runs = world.runs()
            surface = make_estimator("response_surface", 0).fit(runs)
            for state_DP in world.pool.draw_states(3, world.rng):
                asked_DP = np.column_stack([state_DP, np.full(5, LARGE + beyond)])
                size = size_reach(runs, asked_DP)
                assert size is not None
                read_DP = at_size(runs.covariates, asked_DP, size.read_at)
                mixture_MD = world.rng.dirichlet(np.ones(5), 200)
                gain = surface.gain(read_DP, mixture_MD, EQUAL_D)
                best = int(np.argmax(gain.mean_MT[:, 0] - gain.se_MT[:, 0]))
                true = world.gain(state_DP, mixture_MD[best], LARGE + beyond)
                rows.append((gain.mean_MT[best, 0], gain.se_MT[best, 0], size.doubt, true))
    return np.array(rows).T


@pytest.mark.parametrize("beyond", [1.0, 3.0, 6.0])
def test_intervals_hold_the_true_gain_of_a_larger_model_whose_effects_have_shrunk(beyond):
    gain_N, se_N, doubt_N, true_N = promised_and_true(4, beyond)

    covered = np.abs(gain_N - true_N) <= Z90 * se_N * doubt_N
    assert covered.mean() >= 0.9
    # Not because they are endless: most say that there is a gain, up to two doublings.
    if beyond <= 1:
        assert (gain_N - Z90 * se_N * doubt_N > 0).mean() > 0.5


# ---------------------------------------------------------------------------- elsewhere


def test_runs_lie_far_off_only_among_runs_of_their_own_size():
    runs = SizedWorld(shrink=0.0, seed=3).runs(32, share=0.25)
    assert runs.size_N is not None
    lifted_NT = runs.outcome_NT + 1000 * (runs.size_N == LARGE)[:, None]
    assert flag_outliers(replace(runs, outcome_NT=lifted_NT)).is_empty()

    small = int(np.flatnonzero(runs.size_N == SMALL)[0])
    lifted_NT[small] += 1000  # where the larger ones are
    found = flag_outliers(replace(runs, outcome_NT=lifted_NT))

    assert found["run_id"].to_list() == [runs.run_ids[small]]


def test_a_placebo_of_pool_states_leaves_each_run_its_size():
    runs = SizedWorld(shrink=0.0, seed=3).runs(32)
    permuted = permute_states(runs, np.random.default_rng(0))

    assert (permuted.state_NDP[:, :, -1] == runs.state_NDP[:, :, -1]).all()
    assert (permuted.state_NDP[:, :, :-1] != runs.state_NDP[:, :, :-1]).any()


def test_no_top_up_is_planned_for_a_size_out_of_reach_alone():
    runs = SizedWorld(shrink=0.1, seed=1).runs()
    none = top_up_frame(runs, [], np.empty(0), np.empty(0), [])

    def planned(shift: float, done=none) -> dict:
        state_DP = at_size(runs.covariates, runs.state_NDP[0] + shift, LARGE + 3)
        return plan_top_up(reach_of(runs, state_DP), runs, done, state_DP, seed=0)

    assert planned(0.0) == {}
    assert len(planned(5.0)) == TOP_UP_RUNS
    # What was trained at the nearest size isn't planned again.
    trained_DP = at_size(runs.covariates, runs.state_NDP[0] + 5.0, LARGE)
    mixture_MD = list(planned(5.0).values())
    done = top_up_frame(
        runs,
        [f"top_up/abc/{number:03d}" for number in range(4)],
        [trained_DP] * 4,
        mixture_MD[:4],
        [{"task_0": 0.0}] * 4,
    )
    assert list(planned(5.0, done)) == list(range(4, TOP_UP_RUNS))


@pytest.mark.parametrize(
    ("verdict", "pool_verdict", "is_of_size"),
    [
        ("extrapolating", "supported", True),
        ("extrapolating", "extrapolating", False),
        ("unsupported", "unsupported", False),
        ("supported", "supported", False),
    ],
)
def test_a_verdict_is_put_down_to_the_size_only_where_the_pool_is_supported(
    verdict, pool_verdict, is_of_size
):
    size = SizeReach(20.0, SMALL, LARGE).to_dict() | {"pool_verdict": pool_verdict}

    assert (size_words(verdict, size) is not None) == is_of_size
    assert size_words(verdict, None) is None


def test_a_sentence_says_what_size_is_asked_for_and_how_far_it_is():
    within, beyond = (size_sentence(SizeReach(s, 16.0, 18.0).to_dict()) for s in (18.0, 21.0))

    assert within == "For a model of 262,144 parameters; proxies had 65,536 to 262,144."
    assert beyond.endswith(
        "2,097,152 parameters; proxies had 65,536 to 262,144, 3.0 doublings away: effects are read "
        "at 1,048,576, and the interval is 1.75 times as wide."
    )
    near = SizeReach(19.0, 16.0, 18.0).to_dict()
    assert near["read_at_parameters"] == near["parameters"] == 2**19
    assert size_sentence(near).endswith(
        "1.0 doublings away, so the interval is 1.25 times as wide."
    )
