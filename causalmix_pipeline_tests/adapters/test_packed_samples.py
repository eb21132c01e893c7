"""Packing documents into sequences, and which is read when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.packed_samples import BlockPacker, pack_domain, token_schedule
from causalmix_pipeline.adapters.tokenizer import TokenStore


def store_of(tmp_path, lengths, prompts=None) -> tuple[TokenStore, np.ndarray]:
    """Document i holds the ids 100 i, 100 i + 1, ..."""
    ids = [f"d{i:02d}" for i in range(len(lengths))]
    tokens = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    batch = (ids, tokens) if prompts is None else (ids, tokens, prompts)
    return TokenStore.write(tmp_path / "tokens", [batch], 10_000), np.array(ids, dtype="S")


def rows_of(store, packed):
    return [packed.rows(store.tokens(), s) for s in range(len(packed))]


def test_text_is_cut_at_the_end_of_a_sequence_and_goes_on_in_the_next(tmp_path):
    store, ids = store_of(tmp_path, [5, 6])

    packed = pack_domain(store, ids, length=4, response_only=True)
    rows = rows_of(store, packed)

    read = np.concatenate([row.ids_L[: row.n_tokens] for row in rows])
    assert read.tolist() == [*range(5), *range(100, 106)]
    assert rows[1].position_L.tolist() == [0, 0, 1, 2]
    assert rows[1].has_loss_L.tolist() == [False, False, True, True]
    assert packed.tokens_S.tolist() == [4, 4, 3]


def test_a_chat_sample_is_never_split_and_its_prompt_has_no_loss(tmp_path):
    store, ids = store_of(tmp_path, [5, 5, 3], [2, 3, 1])

    packed = pack_domain(store, ids, length=8, response_only=True)
    rows = rows_of(store, packed)

    assert rows[0].ids_L.tolist() == [*range(5), *range(200, 203)]
    assert rows[0].has_loss_L.tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert rows[1].ids_L[:5].tolist() == [*range(100, 105)]
    assert rows[1].has_loss_L.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert packed.tokens_S.tolist() == [8, 5]


def test_prompts_have_loss_where_the_recipe_says_so(tmp_path):
    store, ids = store_of(tmp_path, [5], [3])

    packed = pack_domain(store, ids, length=8, response_only=False)

    assert rows_of(store, packed)[0].has_loss_L.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_a_long_sample_is_cut_and_one_without_any_loss_left_is_left_out(tmp_path):
    store, ids = store_of(tmp_path, [9, 9, 0, 2], [2, 8, 0, 1])

    packed = pack_domain(store, ids, length=8, response_only=True)

    assert (packed.n_truncated, packed.n_dropped) == (2, 2)
    assert rows_of(store, packed)[0].ids_L.tolist() == [*range(8)]
    assert len(packed) == 2


def test_a_domain_without_any_token_to_learn_has_no_sequence(tmp_path):
    store, ids = store_of(tmp_path, [9, 1], [8, 0])

    assert len(pack_domain(store, ids, length=8, response_only=True)) == 0


def test_documents_come_in_reading_order_with_their_repeats(tmp_path):
    store, ids = store_of(tmp_path, [3, 3])

    packed = pack_domain(store, ids[[1, 0, 1]], length=16, response_only=True)
    row = rows_of(store, packed)[0]

    assert row.ids_L[: row.n_tokens].tolist() == [*range(100, 103), *range(3), *range(100, 103)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12)), min_size=1, max_size=80))
def test_every_token_of_samples_that_fit_is_packed_once(tmp_path_factory, shapes):
    shapes = [(n, min(prompt, n - 1)) for n, prompt in shapes]
    lengths, prompts = [n for n, _ in shapes], [prompt for _, prompt in shapes]
    store, ids = store_of(tmp_path_factory.mktemp("t"), lengths, prompts)

    rows = rows_of(store, pack_domain(store, ids, length=16, response_only=True))

    # Which tokens have loss doesn't depend on what they're packed with, cuts of text apart.
    expected = sum(min(n, 16) - p for n, p in shapes if p and min(n, 16) > p)
    from_samples = {100 * i + t for i, (n, p) in enumerate(shapes) if p for t in range(n)}
    found = [int(t) for row in rows for t in row.ids_L[row.has_loss_L] if int(t) in from_samples]
    assert len(found) == len(set(found)) == expected
    assert all(row.has_loss_L.any() and not row.has_loss_L[0] for row in rows)
    for row in rows:
        starts = np.flatnonzero(row.position_L == 0)
        assert not row.has_loss_L[starts].any()
        assert not row.has_loss_L[row.n_tokens :].any()


mixtures = st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda w: sum(w) > 0.1)


@settings(max_examples=200, deadline=None)
@given(mixtures, st.integers(0, 10_000), st.integers(64, 20_000), st.data())
def test_token_shares_are_within_one_sequence_of_the_mixture(weights, seed, n_tokens, data):
    mixture = np.array([0.0 if w < 0.05 else w for w in weights])
    mixture = mixture / mixture.sum() if mixture.sum() else np.eye(len(weights))[0]
    rng = np.random.default_rng(seed)
    sizes = [
        rng.integers(data.draw(st.sampled_from([8, 64])), 65, rng.integers(1, 50)) for _ in weights
    ]

    schedule = token_schedule(mixture, sizes, n_tokens, seed=seed, order_seed=seed + 1)

    read = np.zeros(len(weights))
    for d, s in zip(schedule.domain_W, schedule.sequence_W, strict=True):
        read[d] += sizes[d][s]
    assert np.abs(read - mixture * n_tokens).max() <= 64
    assert (read[mixture == 0] == 0).all()
    assert abs(read.sum() - n_tokens) <= 64
    assert len(schedule) >= 1
    assert schedule.tokens_D == pytest.approx(read)
    assert schedule.epochs_D == pytest.approx(
        [r / s.sum() for r, s in zip(read, sizes, strict=True)]
    )


def test_a_small_domain_is_read_again_and_each_epoch_reads_every_sequence_once():
    schedule = token_schedule(
        np.array([0.5, 0.5]), [np.full(4, 10), np.full(100, 10)], 200, seed=0, order_seed=0
    )

    of_first = schedule.sequence_W[schedule.domain_W == 0]
    assert schedule.epochs_D.tolist() == [2.5, 0.1]
    assert sorted(of_first[:4]) == sorted(of_first[4:8]) == [0, 1, 2, 3]


def test_runs_of_one_state_share_the_order_inside_a_domain():
    sizes = [np.full(20, 10), np.full(20, 10)]
    first = token_schedule(np.array([0.5, 0.5]), sizes, 300, seed=0, order_seed=5)
    second = token_schedule(np.array([0.2, 0.8]), sizes, 300, seed=1, order_seed=5)

    a, b = (s.sequence_W[s.domain_W == 0] for s in (first, second))
    assert a[: len(b)].tolist() == b.tolist()
    assert first.domain_W.tolist() != second.domain_W.tolist()


# Blocks


SEQUENCES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(SEQUENCES, st.integers(1, 2000), st.integers(0, 99))
def test_a_run_read_as_one_block_is_the_run_s_schedule(lengths, n_tokens, seed):
    tokens_DS = [np.array(of_domain) for of_domain in lengths]
    mixture_D = np.arange(1, len(lengths) + 1) / sum(range(len(lengths) + 1))
    whole = token_schedule(mixture_D, tokens_DS, n_tokens, seed=seed, order_seed=5)
    packer = BlockPacker(tokens_DS, seed=seed, order_seed=5)

    domain_W, sequence_W = packer.next_block(mixture_D, n_tokens, at_least=0)

    np.testing.assert_array_equal(domain_W, whole.domain_W)
    np.testing.assert_array_equal(sequence_W, whole.sequence_W)
    np.testing.assert_array_equal(packer.read_D, whole.tokens_D)


def test_blocks_follow_their_shares_and_make_up_for_what_rounding_left():
    rng = np.random.default_rng(0)
    tokens_DS = [rng.integers(20, 65, 30) for _ in range(3)]
    packer = BlockPacker(tokens_DS, seed=1, order_seed=2)
    wanted_D = np.zeros(3)
    for _ in range(40):
        shares_D = rng.dirichlet([1, 1, 0.1])
        before_D = packer.read_D
        domain_W, sequence_W = packer.next_block(shares_D, 500.0, at_least=4)
        wanted_D += 500.0 * shares_D
        read_D = [tokens_DS[d][sequence_W[domain_W == d]].sum() for d in range(3)]

        np.testing.assert_array_equal(packer.read_D - before_D, read_D)
        assert np.abs(packer.read_D - wanted_D).max() < 65
        assert abs(packer.read_D.sum() - wanted_D.sum()) < 65


def test_one_short_sequence_among_long_ones_makes_no_long_order():
    """As many epochs as the tokens fill are enough."""
    tokens_S = np.array([1, *[1000] * 9])
    packer = BlockPacker([tokens_S, tokens_S], seed=0, order_seed=0)

    for _ in range(3):
        packer.next_block(np.array([0.5, 0.5]), 40_000.0, at_least=4)

    np.testing.assert_allclose(packer.read_D, [60_000, 60_000], atol=1000)
    assert len(packer._ahead(0, 20_000.0, 4)) <= 4 * 10


@settings(deadline=None, max_examples=60)
@given(SEQUENCES, st.lists(st.floats(1, 500), min_size=1, max_size=9))
def test_blocks_of_any_size_read_as_much_as_they_are_to(lengths, sizes):
    tokens_DS = [np.array(of_domain) for of_domain in lengths]
    packer = BlockPacker(tokens_DS, seed=1, order_seed=2)
    shares_D = np.full(len(lengths), 1 / len(lengths))
    for size in sizes:
        packer.next_block(shares_D, size, at_least=0)

    assert np.abs(packer.read_D - shares_D * sum(sizes)).max() <= 40 + 1e-6


def test_a_domain_without_a_share_isn_t_read_whatever_it_is_owed():
    packer = BlockPacker([np.full(9, 10)] * 3, seed=0, order_seed=0)
    wanted = ([9.0, 9.0, 26.0], [22.0, 22.0, 0.0])  # 6 tokens stay owed to the last domain

    read = [packer.next_block(np.array(w) / 44, 44.0, at_least=1)[0] for w in wanted]

    np.testing.assert_array_equal(
        [np.bincount(domain_W, minlength=3) for domain_W in read], [[1, 1, 2], [3, 2, 0]]
    )


def test_what_lies_ahead_is_more_than_wanted_from_any_place_of_an_epoch():
    """The end of one epoch and the start of the next may both be short."""
    tokens_S = np.array([1, 100])
    for order_seed in range(20):
        packer = BlockPacker([tokens_S], seed=0, order_seed=order_seed)
        packer.next_block(np.array([1.0]), 100.0, at_least=1)

        assert tokens_S[packer._ahead(0, 60.0, 1)].sum() > 60


def test_a_block_has_a_sequence_for_every_step():
    packer = BlockPacker([np.full(5, 100), np.full(5, 100)], seed=0, order_seed=0)

    domain_W, _ = packer.next_block(np.array([0.5, 0.5]), 250.0, at_least=8)

    assert len(domain_W) == 8
