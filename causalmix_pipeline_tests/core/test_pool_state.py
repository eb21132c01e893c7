"""Pool states: drawn as wished, measured as by hand, the same whatever stands around them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.core.covariates import METRICS
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.pool_state import (
    DomainDraw,
    Membership,
    StateRanges,
    _choose_documents,
    draw_domain,
    draw_state,
    index_documents,
)

DOMAINS = ("code", "math", "prose")


def make_documents(n: int = 200, *, twins: bool = True, seed: int = 0) -> pl.DataFrame:
    """A documents frame of three domains with two sources each, every document 50 to 150 tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for domain in DOMAINS:
        for i in range(n):
            common = {
                "domain": domain,
                "source": ("first", "second")[i % 2],
                "copies": 1,
                "n_tokens": int(rng.integers(50, 150)),
                **{metric: float(rng.normal(2.0, 1.0)) for metric in METRICS},
            }
            identity = f"{domain}{i:04d}"
            rows.append({"document_id": identity, "augmented": False, "twin_of": None, **common})
            if twins:
                rows.append(
                    {
                        "document_id": f"{identity}~",
                        "augmented": True,
                        "twin_of": identity,
                        **common,
                    }
                )
    frame = pl.DataFrame(rows, schema_overrides={"twin_of": pl.String})
    return frame.sort("domain", "augmented", "document_id")


DOCUMENTS = make_documents()


def states(ranges: StateRanges, n: int, documents: pl.DataFrame = DOCUMENTS, seed: int = 0) -> list:
    """The first n states: (draws, membership) each."""
    index = index_documents(documents, DOMAINS, ranges)
    return [draw_state(index, ranges, state_id=m, seed=seed) for m in range(n)]


def draw(**changes: object) -> DomainDraw:
    """A whole domain as it is, but for the changes."""
    plain = DomainDraw((0.5, 0.5), size_share=1.0, tilt=0.0, unique_share=1.0, noise_share=0.0)
    return replace(plain, **changes)


def tokens_of(draw_of_it: DomainDraw, seed: int = 0) -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    """Copies and tokens of the documents that one domain's draw chooses, and their rows."""
    domain = index_documents(DOCUMENTS, DOMAINS, StateRanges())[0]
    rows, copies = _choose_documents(domain, draw_of_it, np.random.default_rng(seed))
    chosen = DOCUMENTS[rows.tolist()]
    return copies, chosen["n_tokens"].to_numpy(), chosen


def numbers_of(documents: pl.DataFrame) -> list[int]:
    """Place of each row's domain."""
    return [DOMAINS.index(domain) for domain in documents["domain"]]


def hash_of(membership: Membership, documents: pl.DataFrame) -> str:
    """Content hash of a state of this frame."""
    return membership.content_hash(documents["document_id"].to_list(), numbers_of(documents))


# Drawing


def test_a_state_is_the_same_whatever_other_states_are_drawn():
    ranges = StateRanges(tilt_sd=1.0, repetition=0.5, noise=0.5)
    index = index_documents(DOCUMENTS, DOMAINS, ranges)
    in_turn = states(ranges, 6)

    alone_draws, alone = draw_state(index, ranges, state_id=5, seed=0)

    assert alone_draws == in_turn[5][0]
    np.testing.assert_array_equal(alone.rows, in_turn[5][1].rows)
    np.testing.assert_array_equal(alone.copies, in_turn[5][1].copies)


def test_states_differ_from_each_other_and_by_seed():
    hashes = [
        hash_of(m, DOCUMENTS) for seed in (0, 1) for _, m in states(StateRanges(), 8, seed=seed)
    ]

    assert len(set(hashes)) == 16


@pytest.mark.parametrize("size", [0.1, 0.4, 1.0])
def test_the_size_is_within_a_document_of_the_one_drawn(size):
    """Of each of both sources, hence within two documents of at most 150 tokens."""
    capacity = index_documents(DOCUMENTS, DOMAINS, StateRanges())[0].capacity
    _, n_tokens, _ = tokens_of(draw(size_share=size))

    assert size * capacity <= n_tokens.sum() <= size * capacity + 300


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_blend_of_sources_is_the_one_drawn(share):
    _, n_tokens, chosen = tokens_of(draw(source_shares=(share, 1 - share), size_share=0.5))
    is_first = (chosen["source"] == "first").to_numpy()

    assert n_tokens[is_first].sum() / n_tokens.sum() == pytest.approx(share, abs=0.04)


def test_a_source_without_share_gives_no_document():
    _, _, chosen = tokens_of(draw(source_shares=(0.0, 1.0)))

    assert chosen["source"].unique().to_list() == ["second"]


@pytest.mark.parametrize("unique", [0.6, 0.3, 0.08])
def test_a_repeated_part_fills_the_size_that_was_drawn(unique):
    capacity = index_documents(DOCUMENTS, DOMAINS, StateRanges())[0].capacity
    copies, n_tokens, _ = tokens_of(draw(unique_share=unique))

    assert (n_tokens * copies).sum() == pytest.approx(capacity, rel=0.05)
    assert n_tokens.sum() / (n_tokens * copies).sum() == pytest.approx(unique, abs=0.05)
    assert copies.min() >= 1
    assert np.ptp(copies) <= 2  # at most 1 within each of the two sources


def test_without_repetition_no_document_occurs_twice():
    for _, membership in states(StateRanges(), 8):
        assert (membership.copies == 1).all()
        assert len(np.unique(membership.rows)) == len(membership.rows)
        assert (np.diff(membership.rows) > 0).all()


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9])
def test_noisy_twins_stand_in_for_the_share_of_documents_that_was_drawn(noise):
    _, _, chosen = tokens_of(draw(noise_share=noise))

    assert chosen["augmented"].mean() == pytest.approx(noise, abs=0.1)
    originals = chosen["twin_of"].fill_null(chosen["document_id"])
    assert originals.n_unique() == chosen.height


def test_a_domain_without_twins_stays_clean():
    documents = make_documents(50, twins=False)
    for _, membership in states(StateRanges(noise=1.0), 4, documents):
        assert not documents[membership.rows.tolist()]["augmented"].any()


def test_a_tilt_prefers_documents_by_their_metric():
    means = {
        tilt: tokens_of(draw(size_share=0.3, tilt=tilt))[2]["compress_ratio"].mean()
        for tilt in (-2.0, 0.0, 2.0)
    }

    assert means[-2.0] < means[0.0] - 0.5
    assert means[2.0] > means[0.0] + 0.5


def test_draws_reach_as_far_as_their_ranges_and_no_farther():
    rng = np.random.default_rng(0)
    ranges = StateRanges(size_range=(0.2, 0.8), tilt_sd=0.5, repetition=0.25, noise=0.4)
    draws = [draw_domain(2, ranges, rng) for _ in range(2000)]
    sizes = np.array([d.size_share for d in draws])

    assert sizes.min() >= 0.2
    assert sizes.max() <= 0.8
    assert np.median(sizes) == pytest.approx(0.4, abs=0.02)  # log-uniform: the geometric middle
    assert np.std([d.tilt for d in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([d.unique_share < 1 for d in draws]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([d.noise_share > 0 for d in draws]) == pytest.approx(0.4, abs=0.04)
    assert np.mean([max(d.source_shares) == 1 for d in draws]) == pytest.approx(0.5, abs=0.04)
    assert all(sum(d.source_shares) == pytest.approx(1) for d in draws)


def test_a_range_that_is_switched_off_leaves_the_other_draws_as_they_were():
    """Each draw takes the same number of random numbers, so that states can be compared."""
    plain, noisy = states(StateRanges(), 5), states(StateRanges(noise=1.0, repetition=1.0), 5)

    for (before, _), (after, _) in zip(plain, noisy, strict=True):
        assert [d.size_share for d in before] == [d.size_share for d in after]
        assert [d.source_shares for d in before] == [d.source_shares for d in after]


def test_without_blending_sources_stand_side_by_side():
    draws, _ = states(StateRanges(blend_sources=False), 1)[0]

    assert all(d.source_shares == (0.5, 0.5) for d in draws)


def test_a_tiny_domain_keeps_a_document_in_every_state():
    """A domain of ten tokens at a tenth of its size: less than a token would be drawn."""
    tiny = DOCUMENTS.filter(pl.col("domain") != "math")
    one = (
        DOCUMENTS.filter(pl.col("domain") == "math")
        .head(1)
        .with_columns(n_tokens=pl.lit(6, pl.Int64))
    )
    documents = pl.concat([tiny, one])

    for _, membership in states(StateRanges(), 20, documents):
        assert "math" in documents[membership.rows.tolist()]["domain"].to_list()


def test_a_metric_that_never_varies_tilts_nothing():
    documents = DOCUMENTS.with_columns(compress_ratio=pl.lit(0.5))
    index = index_documents(documents, DOMAINS, StateRanges(tilt_sd=1.0))

    assert all((domain.tilt_score == 0).all() for domain in index)


# Names


def test_the_order_of_documents_in_the_frame_does_not_change_a_states_name():
    membership = states(StateRanges(repetition=0.5), 1)[0][1]
    order = np.random.default_rng(0).permutation(DOCUMENTS.height)
    place = np.argsort(order)
    shuffled = DOCUMENTS[order.tolist()]

    rows = place[membership.rows]
    moved = Membership(np.sort(rows), membership.copies[np.argsort(rows)])

    assert hash_of(moved, shuffled) == hash_of(membership, DOCUMENTS)


def test_one_document_or_one_copy_more_is_another_state():
    membership = Membership(np.arange(5), np.ones(5, int))
    fewer = Membership(np.arange(4), np.ones(4, int))
    oftener = Membership(np.arange(5), np.array([1, 1, 2, 1, 1]))

    assert len({hash_of(m, DOCUMENTS) for m in (membership, fewer, oftener)}) == 3


def test_the_same_documents_in_other_domains_are_another_state():
    """Else a run of (.3, .7) would be read back for domains that have changed places."""
    ids = ["a", "b"]
    membership = Membership(np.array([0, 1]), np.array([1, 1]))

    assert membership.content_hash(ids, [0, 1]) != membership.content_hash(ids, [1, 0])
    assert membership.content_hash(ids, [0, 1]) != membership.content_hash(ids, [0, 0])


def test_a_domain_without_documents_has_no_states():
    with pytest.raises(PoolError, match="experiment pool: domain 'law' has no usable document"):
        index_documents(DOCUMENTS, ["code", "law"], StateRanges())


# Refusals


@pytest.mark.parametrize("size_range", [(0.0, 1.0), (0.5, 0.2), (0.1, 1.5), (float("nan"), 1.0)])
def test_impossible_sizes_are_refused(size_range):
    with pytest.raises(ConfigError, match=r"design\.states\.size_range must be 0 < least"):
        StateRanges(size_range=size_range)


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"tilt_metric must be one of .*token_entropy.*'quality'"):
        StateRanges(tilt_metric="quality")
