"""From documents to specs and back to a table of runs, on a small pool."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.document_scores import CrossFittedModel, PoolLanguageModel
from causalmix_pipeline.adapters.experiment import (
    MAX_EVAL_WINDOWS,
    PoolTokenizer,
    build_evaluation,
    collect_runs,
    draw_states,
    keep_states,
    profile_documents,
    spec_table,
    write_token_store,
)
from causalmix_pipeline.adapters.local_backend import _Feed
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.tokenizer import encode_texts
from causalmix_pipeline.core.design import DesignPlan, make_design
from causalmix_pipeline.core.errors import EstimationError, PoolError
from causalmix_pipeline.core.pool_state import COVARIATES, Membership, StateRanges
from causalmix_pipeline.core.proxy_runs import ProxyRecord
from causalmix_pipeline_tests.adapters.small_pool import (
    DOMAINS,
    SmallExperiment,
    build_experiment,
    draw_texts,
    make_documents,
)

DOCUMENTS = make_documents()
TOKENIZER = PoolTokenizer.fit(DOCUMENTS, vocab_size=300)
SCORED, ENCODED = profile_documents(DOCUMENTS, TOKENIZER)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> SmallExperiment:
    return build_experiment(tmp_path_factory.mktemp("experiment"), n_runs=12, panel_mixtures=2)


# Tokenizer


def test_a_tokenizer_survives_json():
    back = PoolTokenizer.from_dict(json.loads(json.dumps(TOKENIZER.to_dict())))

    assert back.content_hash == TOKENIZER.content_hash
    for again, half in zip(
        back.language_model.halves, TOKENIZER.language_model.halves, strict=True
    ):
        np.testing.assert_array_equal(again.bigram_VV, half.bigram_VV)


def test_other_counts_under_the_same_tokenizer_have_another_name():
    """Scores are kept by that name, and cross-entropies follow the counts."""
    first, second = TOKENIZER.language_model.halves
    other = CrossFittedModel((first, PoolLanguageModel(second.unigram_V + 1, second.bigram_VV)))
    changed = replace(TOKENIZER, language_model=other)

    assert changed.content_hash != TOKENIZER.content_hash
    assert changed.tokenizer_hash == TOKENIZER.tokenizer_hash


# Profile


def test_documents_keep_their_order_beside_their_tokens():
    assert SCORED["document_id"].to_list() == DOCUMENTS["document_id"].to_list()
    assert SCORED["n_tokens"].to_list() == [len(ids) for ids in ENCODED]
    np.testing.assert_array_equal(
        ENCODED[5], encode_texts(TOKENIZER.tokenizer_json, [DOCUMENTS["text"][5]])[0]
    )


def test_noisy_twins_are_scored_beside_their_originals():
    scored, encoded = profile_documents(DOCUMENTS, TOKENIZER, noise_seed=1)
    twins, originals = scored.filter("augmented"), scored.filter(~pl.col("augmented"))

    assert twins.height == originals.height == DOCUMENTS.height
    assert originals.select(SCORED.columns).equals(SCORED)
    assert twins["unigram_cross_entropy"].min() > originals["unigram_cross_entropy"].max()
    assert scored["n_tokens"].to_list() == [len(ids) for ids in encoded]


# States


def test_more_states_leave_the_first_and_the_scale_as_they_were():
    few = draw_states(SCORED, DOMAINS, StateRanges(), n_states=3, seed=0)
    many = draw_states(SCORED, DOMAINS, StateRanges(), n_states=9, seed=0)

    assert many.draws[:3] == few.draws
    np.testing.assert_array_equal(many.values_MDP[:3], few.values_MDP)
    np.testing.assert_array_equal(many.normaliser.mean_DP, few.normaliser.mean_DP)
    np.testing.assert_array_equal(many.normaliser.scale_DP, few.normaliser.scale_DP)
    assert many.values_MDP.shape == (9, len(DOMAINS), len(COVARIATES))


def test_the_table_of_states_has_a_row_for_each_domain(experiment):
    frame = experiment.states.frame(DOMAINS)

    assert frame.height == 3 * len(DOMAINS)
    assert frame["domain"].to_list() == list(DOMAINS) * 3
    np.testing.assert_array_equal(
        frame.select(COVARIATES).to_numpy().reshape(3, 3, -1), experiment.states.values_MDP
    )


def kept(store: RunStore, documents: pl.DataFrame, encoded: list, domains=DOMAINS):
    """Name of the token store and hashes of two states of all their own documents."""
    tokens_hash = write_token_store(store, documents, encoded, TOKENIZER)
    drawn = draw_states(SCORED, domains, StateRanges(repetition=0.5), n_states=2, seed=0)
    place = {key: row for row, key in enumerate(documents.select("domain", "document_id").rows())}
    keys = SCORED.select("domain", "document_id").rows()
    moved = []
    for membership in drawn.memberships:
        rows = np.array([place[keys[row]] for row in membership.rows])
        moved.append(Membership(np.sort(rows), membership.copies[np.argsort(rows)]))
    return tokens_hash, keep_states(store, documents, domains, moved)


def read_by(store: RunStore, experiment: SmallExperiment, tokens_hash: str, state: str):
    """The first tokens that a run reads of that state in that token store."""
    spec = replace(experiment.specs[0], tokens_hash=tokens_hash, state_hash=state)
    return _Feed(store, spec).batch(0)


def test_a_state_holds_its_documents_by_domain_as_often_as_drawn(tmp_path):
    store = RunStore(tmp_path)
    drawn = draw_states(SCORED, DOMAINS, StateRanges(repetition=0.9), n_states=2, seed=0)
    hashes = keep_states(store, SCORED, DOMAINS, drawn.memberships)
    for name, membership in zip(hashes, drawn.memberships, strict=True):
        by_domain = store.state(name)
        for domain, ids in zip(DOMAINS, by_domain, strict=True):
            found = dict(zip(*np.unique(ids, return_counts=True), strict=True))
            rows = SCORED[membership.rows.tolist()].with_columns(n=membership.copies)
            wanted = rows.filter(domain=domain).select("document_id", "n").rows()
            assert {k.decode(): int(n) for k, n in found.items()} == dict(wanted)


def test_a_pool_that_grew_gives_an_old_state_its_old_documents(experiment, tmp_path):
    """Their positions move when documents come before them; the state's name doesn't change."""
    store = RunStore(tmp_path)
    store.put_eval(
        experiment.specs[0].eval_hash, experiment.store.evaluation(experiment.specs[0].eval_hash)
    )
    tokens_hash, states = kept(store, SCORED, ENCODED)
    before = read_by(store, experiment, tokens_hash, states[0])
    grown = pl.concat([DOCUMENTS, make_documents(40)]).unique(["domain", "document_id"])
    scored, encoded = profile_documents(grown.sort("domain", "document_id"), TOKENIZER)

    grown_hash, grown_states = kept(store, scored, encoded)

    assert scored.height > SCORED.height
    assert grown_states == states
    assert grown_hash != tokens_hash
    np.testing.assert_array_equal(read_by(store, experiment, grown_hash, states[0]), before)


def test_the_order_of_the_frame_changes_neither_name_nor_reading(experiment, tmp_path):
    order = np.random.default_rng(0).permutation(SCORED.height).tolist()
    one, other = RunStore(tmp_path / "one"), RunStore(tmp_path / "other")
    tokens_hash, states = kept(one, SCORED, ENCODED)
    shuffled_hash, shuffled = kept(other, SCORED[order], [ENCODED[i] for i in order])

    assert shuffled == states
    np.testing.assert_array_equal(
        read_by(other, experiment, shuffled_hash, states[1]),
        read_by(one, experiment, tokens_hash, states[1]),
    )


def test_domains_in_another_order_are_other_states(tmp_path):
    """A mixture names its domains by their order alone."""
    store = RunStore(tmp_path)
    membership = draw_states(SCORED, DOMAINS, StateRanges(), n_states=1, seed=0).memberships
    forth, back = (
        keep_states(store, SCORED, order, membership) for order in (DOMAINS, DOMAINS[::-1])
    )

    assert forth != back
    np.testing.assert_array_equal(
        np.sort(store.state(forth[0])[0]), np.sort(store.state(back[0])[2])
    )


# Evaluation


def test_bytes_of_an_evaluation_are_those_of_its_text():
    """Windows of one token predict all but the first, here the byte that "日" begins with."""
    text = "日本 is naïve"
    evaluation, _ = build_evaluation({"t": [text]}, TOKENIZER, sequence_length=1)

    assert evaluation.windows["t"][-1, -1] == 0  # the end of text is predicted and has no byte
    assert evaluation.n_bytes["t"] == len(text.encode()) - 1


def test_the_entropy_of_unigrams_is_that_by_hand():
    texts = draw_texts("math", 4, seed=5)
    evaluation, _ = build_evaluation({"t": texts}, TOKENIZER, sequence_length=16)
    tokens = np.concatenate(encode_texts(TOKENIZER.tokenizer_json, texts))
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)

    assert evaluation.unigram_nats["t"] == pytest.approx(-(share * np.log(share)).sum())


def test_a_long_text_is_sampled_evenly_to_its_ends():
    texts = draw_texts("prose", 200, seed=5)
    evaluation, _ = build_evaluation({"t": texts}, TOKENIZER, sequence_length=16)
    first = encode_texts(TOKENIZER.tokenizer_json, texts[:1])[0]

    assert evaluation.windows["t"].shape == (MAX_EVAL_WINDOWS, 17)
    np.testing.assert_array_equal(evaluation.windows["t"][0], first[:17])


def test_the_name_of_an_evaluation_follows_its_text_and_tasks():
    names = {
        build_evaluation({task: texts}, TOKENIZER, sequence_length=16)[1]
        for task in ("a", "b")
        for texts in (draw_texts("math", 4, seed=5), draw_texts("math", 4, seed=6))
    }

    assert len(names) == 4


@pytest.mark.parametrize("texts", [[], [""], ["too short"]])
def test_a_task_with_less_than_a_window_of_text_is_refused(texts):
    with pytest.raises(PoolError, match=r"tasks: the held-out text of 'qa' has \d+ tokens, fewer"):
        build_evaluation({"qa": texts}, TOKENIZER, sequence_length=100)


# Specs and runs


def test_every_run_of_a_design_has_a_name_of_its_own(experiment):
    specs = experiment.specs

    assert len(specs) == 12 + 2 * 2
    assert len({spec.key for spec in specs}) == len(specs)
    assert len({spec.state_hash for spec in specs}) == 3


def test_the_same_steps_taken_again_give_the_same_names(experiment, tmp_path):
    again = build_experiment(tmp_path, n_runs=12, panel_mixtures=2)

    assert again.specs == experiment.specs


def test_the_table_of_specs_has_a_row_for_each_run(experiment):
    table = spec_table(experiment.specs, experiment.design, DOMAINS)

    assert table["proxy_run_id"].to_list() == [spec.key for spec in experiment.specs]
    shares = table.select(f"share__{domain}" for domain in DOMAINS).to_numpy()
    np.testing.assert_array_equal(shares, experiment.design.mixture_ND)
    assert json.loads(table["config"][0]) == experiment.specs[0].config.to_dict()


def records_of(experiment: SmallExperiment, diverged: tuple[int, ...] = ()) -> list[ProxyRecord]:
    """Records whose loss on a task is the run's number, and half of it on the other."""
    return [
        ProxyRecord(
            key=spec.key,
            spec=spec.to_dict(),
            bits_per_byte={"code": float("nan") if i in diverged else float(i), "math": i / 2},
            nats_per_token={},
            train_loss=[],
            diverged=i in diverged,
            cpu_seconds=1.0,
        )
        for i, spec in enumerate(experiment.specs)
    ]


def collect(experiment: SmallExperiment, records: list[ProxyRecord]):
    return collect_runs(
        records,
        experiment.design,
        experiment.states.values_MDP,
        domains=DOMAINS,
        covariates=("log2_tokens", "compress_ratio"),
        tasks=("math", "code"),
    )


def test_runs_meet_the_covariates_of_their_states_and_larger_is_better(experiment):
    runs = collect(experiment, records_of(experiment))

    np.testing.assert_array_equal(runs.outcome_NT[:, 1], -np.arange(16.0))
    np.testing.assert_array_equal(runs.outcome_NT[:, 0], -np.arange(16.0) / 2)
    at = [COVARIATES.index(name) for name in ("log2_tokens", "compress_ratio")]
    for i, state in enumerate(experiment.design.state_N):
        np.testing.assert_array_equal(runs.state_NDP[i], experiment.states.values_MDP[state][:, at])
    np.testing.assert_array_equal(runs.mixture_ND, experiment.design.mixture_ND)
    np.testing.assert_array_equal(runs.repeat_of_N, experiment.design.cell_N)


def test_diverged_runs_are_left_out_with_all_that_is_theirs(experiment):
    runs = collect(experiment, records_of(experiment, diverged=(0, 7)))

    assert runs.run_ids == tuple(s.key for i, s in enumerate(experiment.specs) if i not in (0, 7))
    assert np.isfinite(runs.outcome_NT).all()
    assert runs.state_ids.tolist() == np.delete(experiment.design.state_N, [0, 7]).tolist()


def test_runs_that_all_diverged_are_refused(experiment):
    with pytest.raises(
        EstimationError, match=r"all 16 proxy runs diverged\. Lower proxy\.learning"
    ):
        collect(experiment, records_of(experiment, diverged=tuple(range(16))))


def test_a_design_of_a_demos_size_is_drawn_and_kept_whole(tmp_path):
    """Five hundred runs over 128 states: names stay distinct and the shares sum to 1."""
    plan = DesignPlan(n_runs=512)
    design = make_design(plan, len(DOMAINS))
    drawn = draw_states(SCORED, DOMAINS, StateRanges(), n_states=plan.n_states, seed=0)
    hashes = keep_states(RunStore(tmp_path), SCORED, DOMAINS, drawn.memberships)

    assert len(set(hashes)) == plan.n_states == 128
    assert design.state_N.max() == 127
