"""The sampler: shares are exact, every stretch has them, and a domain repeats only when used up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.token_sampler import (
    BlockSampler,
    EndlessOrder,
    domain_schedule,
    probe_items,
    window_counts,
    window_schedule,
)

#: No deadline: the machine that runs the tests may be busy.
property_of = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
MIXTURES = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=2, max_size=8).filter(
    lambda shares: sum(shares) > 0
)


@property_of
@given(MIXTURES, st.integers(1, 5000))
def test_counts_sum_to_the_run_and_are_within_one_window_of_the_share(shares, n_windows):
    mixture_D = np.array(shares) / sum(shares)
    counts_D = window_counts(mixture_D, n_windows)

    assert counts_D.sum() == n_windows
    assert (np.abs(counts_D - mixture_D * n_windows) < 1 + 1e-6).all()
    assert (counts_D[mixture_D == 0] == 0).all()


@property_of
@given(st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(lambda c: sum(c) > 0))
def test_shares_that_are_whole_windows_are_met_exactly(counts):
    counts_D = np.array(counts)

    np.testing.assert_array_equal(
        window_counts(counts_D / counts_D.sum(), int(counts_D.sum())), counts_D
    )


def test_the_largest_remainders_get_the_windows_left_over():
    np.testing.assert_array_equal(window_counts(np.array([0.47, 0.33, 0.2]), 10), [5, 3, 2])
    np.testing.assert_array_equal(window_counts(np.array([0.25, 0.25, 0.5]), 2), [1, 0, 1])


@property_of
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_a_schedule_has_each_domain_as_often_as_asked(counts, seed):
    schedule = domain_schedule(np.array(counts), seed=seed)

    np.testing.assert_array_equal(np.bincount(schedule, minlength=len(counts)), counts)


@property_of
@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_every_stretch_of_a_run_has_about_the_shares_of_the_run(counts, seed):
    """The windows read of a domain so far are near its share of all windows so far."""
    counts_D = np.array(counts)
    schedule = domain_schedule(counts_D, seed=seed)
    read_WD = np.cumsum(schedule[:, None] == np.arange(len(counts)), axis=0)
    expected_WD = np.arange(1, len(schedule) + 1)[:, None] * counts_D / counts_D.sum()

    assert np.abs(read_WD - expected_WD).max() <= len(counts) + 1


def test_a_schedule_spreads_far_better_than_a_shuffle():
    counts_D = np.array([500, 500])
    first = np.cumsum(domain_schedule(counts_D, seed=1) == 0)

    assert np.abs(first - np.arange(1, 1001) / 2).max() <= 2


def test_a_domain_starts_again_only_after_its_last_window():
    domain_W, window_W = window_schedule(
        np.array([23, 5]), np.array([10, 40]), seed=0, order_seed=9
    )
    read = window_W[domain_W == 0]

    for epoch in (read[:10], read[10:20]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert len(np.unique(read[20:])) == 3
    assert (read[:10] != read[10:20]).any()
    assert len(np.unique(window_W[domain_W == 1])) == 5


def test_runs_of_one_state_read_a_domain_in_one_order():
    """Whatever their mixtures and seeds, so that they differ by the mixture alone."""
    few = window_schedule(np.array([6, 3]), np.array([8, 8]), seed=1, order_seed=4)
    many = window_schedule(np.array([20, 7]), np.array([8, 8]), seed=2, order_seed=4)

    for d, n in ((0, 6), (1, 3)):
        np.testing.assert_array_equal(few[1][few[0] == d], many[1][many[0] == d][:n])


def test_seeds_decide_the_order_of_domains_and_of_windows():
    counts, available = np.array([20, 20]), np.array([30, 30])
    base = window_schedule(counts, available, seed=1, order_seed=1)
    other_seed = window_schedule(counts, available, seed=2, order_seed=1)
    other_order = window_schedule(counts, available, seed=1, order_seed=2)

    assert (base[0] != other_seed[0]).any()
    np.testing.assert_array_equal(base[0], other_order[0])
    assert (base[1] != other_order[1]).any()


def test_a_domain_without_a_share_needs_no_windows():
    domain_W, window_W = window_schedule(np.array([4, 0]), np.array([4, 0]), seed=0, order_seed=0)

    assert domain_W.tolist() == [0] * 4
    assert sorted(window_W.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("n_windows", [1, 7, 4000])
def test_equal_shares_never_differ_by_more_than_one_window(n_windows):
    counts_D = window_counts(np.full(7, 1 / 7), n_windows)

    assert np.ptp(counts_D) <= 1


# Blocks


@property_of
@given(MIXTURES, st.integers(1, 500), st.integers(0, 2**63))
def test_a_run_read_as_one_block_is_the_run_s_schedule(shares, n_windows, seed):
    mixture_D = np.array(shares) / sum(shares)
    available_D = np.arange(3, 3 + len(shares))
    sampler = BlockSampler(available_D, seed=seed, order_seed=9)
    counts_D = window_counts(mixture_D, n_windows)

    block = sampler.next_block(mixture_D, n_windows)
    whole = window_schedule(counts_D, available_D, seed=seed, order_seed=9)

    np.testing.assert_array_equal(block, whole)
    np.testing.assert_array_equal(sampler.read_D, counts_D)


POSITIVE = st.lists(st.lists(st.floats(1e-3, 1.0), min_size=3, max_size=3), min_size=1, max_size=9)


@property_of
@given(POSITIVE, st.integers(1, 60))
def test_blocks_have_their_shares_each_and_together(blocks, n_windows):
    sampler = BlockSampler(np.full(3, 50), seed=1, order_seed=2)
    wanted_D, read_D = np.zeros(3), np.zeros(3)
    for shares in blocks:
        shares_D = np.array(shares) / sum(shares)
        domain_W, _ = sampler.next_block(shares_D, n_windows)
        counts_D = np.bincount(domain_W, minlength=3)
        wanted_D, read_D = wanted_D + shares_D * n_windows, read_D + counts_D

        assert len(domain_W) == n_windows
        assert np.abs(counts_D - shares_D * n_windows).max() < 2
        assert np.abs(read_D - wanted_D).max() < 1 + 1e-6
    np.testing.assert_array_equal(sampler.read_D, read_D)


def test_a_share_below_a_window_a_block_is_read_in_some_blocks():
    sampler = BlockSampler(np.array([100, 100]), seed=0, order_seed=0)
    blocks = [sampler.next_block(np.array([0.97, 0.03]), 10)[0].sum() for _ in range(20)]

    assert sum(blocks) == 6
    assert max(blocks) == 1


@property_of
@given(st.lists(MIXTURES.map(lambda s: (s + [0.0] * 8)[:8]), min_size=2, max_size=9))
def test_a_domain_without_a_share_isn_t_read_whatever_it_is_owed(blocks):
    sampler = BlockSampler(np.full(8, 100), seed=0, order_seed=0)
    for shares in blocks:
        shares_D = np.array(shares) / sum(shares)
        domain_W, _ = sampler.next_block(shares_D, 7)

        assert len(domain_W) == 7
        assert (shares_D[domain_W] > 0).all()


def test_a_domain_that_gets_its_share_back_is_made_up_for_what_it_was_owed():
    sampler = BlockSampler(np.array([100, 100]), seed=0, order_seed=0)
    shares = ([0.54, 0.46], [0.0, 1.0], [0.54, 0.46])  # of 5 windows: 2.7 and 2.3

    counts = [np.bincount(sampler.next_block(np.array(s), 5)[0], minlength=2) for s in shares]

    np.testing.assert_array_equal(counts, [[3, 2], [0, 5], [2, 3]])


def test_a_domain_is_read_in_the_state_s_order_over_all_blocks():
    sampler = BlockSampler(np.array([8, 8]), seed=3, order_seed=4)
    parts = [sampler.next_block(np.array([share, 1 - share]), 10) for share in (0.9, 0.2, 0.5)]
    domain_W, window_W = np.concatenate(parts, axis=1)
    whole = window_schedule(np.array([16, 14]), np.array([8, 8]), seed=5, order_seed=4)

    for d in (0, 1):
        np.testing.assert_array_equal(window_W[domain_W == d], whole[1][whole[0] == d])


def test_blocks_differ_in_the_order_of_domains():
    sampler = BlockSampler(np.array([99, 99]), seed=3, order_seed=4)
    first, second = (sampler.next_block(np.array([0.5, 0.5]), 40)[0] for _ in "ab")

    assert (first != second).any()


def test_many_epochs_are_put_together_at_once(monkeypatch):
    """Not one by one, each time with a copy of all before it; the order is that of single ones."""
    single, whole = EndlessOrder(3, seed=[1]), EndlessOrder(3, seed=[1])
    expected = np.concatenate([single.take(3 * epoch, 3) for epoch in range(200)])
    original, calls = np.concatenate, []

    def counted(parts):
        calls.append(parts)
        return original(parts)

    monkeypatch.setattr(np, "concatenate", counted)
    order = whole.take(0, 600)

    assert len(calls) == 1
    np.testing.assert_array_equal(order, expected)


def test_an_empty_domain_with_a_share_is_refused():
    with pytest.raises(ProxyError, match="must have something to read, got nothing"):
        EndlessOrder(0, seed=[1]).take(0, 1)
    assert len(EndlessOrder(0, seed=[1]).take(0, 0)) == 0


def test_a_probe_looks_at_different_items_or_at_all():
    items = probe_items(20, 5, seed=[1, 2, 3])

    assert len(set(items.tolist())) == 5
    assert sorted(probe_items(3, 5, seed=[1])) == [0, 1, 2]
    np.testing.assert_array_equal(items, probe_items(20, 5, seed=[1, 2, 3]))
    assert (items != probe_items(20, 5, seed=[1, 2, 4])).any()
