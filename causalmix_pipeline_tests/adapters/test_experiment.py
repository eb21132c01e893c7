"""From documents to specs and back to a table of runs, on a small pool."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.experiment import (
    MAX_EVAL_WINDOWS,
    STAGE_PROBE_WINDOWS,
    DomainSampler,
    PoolTokenizer,
    build_evaluation,
    collect_runs,
    draw_states,
    fit_normaliser,
    keep_states,
    make_specs,
    measure_states,
    spec_table,
    write_token_store,
)
from causalmix_pipeline.adapters.profiler import PoolSpec
from causalmix_pipeline.adapters.run_feed import RunFeed
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.adapters.token_scores import CrossFittedModel, PoolLanguageModel
from causalmix_pipeline.adapters.tokenizer import encode_texts
from causalmix_pipeline.core.controllers import Schedule
from causalmix_pipeline.core.covariates import METRICS, measure_covariates
from causalmix_pipeline.core.design import DesignPlan, make_design
from causalmix_pipeline.core.errors import EstimationError, PoolError
from causalmix_pipeline.core.pool_state import Membership, StateRanges
from causalmix_pipeline.core.proxy_runs import ProxyRecord
from causalmix_pipeline.core.tasks import QuestionText
from causalmix_pipeline_tests.adapters.small_models import save_model, small_lm
from causalmix_pipeline_tests.adapters.small_pool import (
    DOMAINS,
    SmallExperiment,
    build_experiment,
    draw_texts,
    make_documents,
    profiled,
    write_pool,
)

DOCUMENTS = make_documents()
TOKENIZER = PoolTokenizer.fit(DOCUMENTS, vocab_size=300)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> SmallExperiment:
    return build_experiment(tmp_path_factory.mktemp("experiment"), n_runs=12, panel_mixtures=2)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> PoolSpec:
    return write_pool(tmp_path_factory.mktemp("pool"), DOCUMENTS)


@pytest.fixture(scope="module")
def scored(experiment) -> pl.DataFrame:
    return experiment.documents


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


def test_every_document_is_scored_by_every_metric(scored):
    assert scored["document_id"].to_list() == DOCUMENTS["document_id"].to_list()
    whole = [metric for metric in METRICS if metric != "vocd_d"]
    assert scored.select(pl.col(whole).is_finite().all()).row(0) == (True,) * len(whole)
    encoded = encode_texts(TOKENIZER.tokenizer_json, DOCUMENTS["text"].to_list())
    assert scored["n_tokens"].to_list() == [len(ids) for ids in encoded]


def test_noisy_twins_are_scored_beside_their_originals(scored, spec, tmp_path):
    both = profiled(replace(spec, noise_seed=1), TOKENIZER, tmp_path)
    twins, originals = both.filter("augmented"), both.filter(~pl.col("augmented"))

    assert twins.height == originals.height == DOCUMENTS.height
    same = [name for name in scored.columns if name not in ("vocd_d", "scorers")]
    assert originals.select(same).equals(scored.select(same))
    assert twins["unigram_cross_entropy"].min() > originals["unigram_cross_entropy"].max()


def test_a_token_store_holds_each_document_with_its_own_tokens(spec, scored, tmp_path):
    store = RunStore(tmp_path)
    tokens = store.token_store(write_token_store(store, spec, scored, TOKENIZER))
    ids = np.array(DOCUMENTS["document_id"].to_list(), dtype="S")
    places, offsets = tokens.positions(ids), tokens.offsets()

    for place, text in zip(places.tolist(), DOCUMENTS["text"], strict=True):
        np.testing.assert_array_equal(
            tokens.tokens()[offsets[place] : offsets[place + 1]],
            encode_texts(TOKENIZER.tokenizer_json, [text])[0],
        )


def test_a_pool_that_lost_documents_since_its_profile_is_refused(scored, tmp_path):
    fewer = write_pool(tmp_path / "pool", DOCUMENTS.head(DOCUMENTS.height - 2))

    with pytest.raises(PoolError, match="but lacks 2 of 90 documents: profile it again"):
        write_token_store(RunStore(tmp_path / "store"), fewer, scored, TOKENIZER)


# States


def test_more_states_leave_the_first_as_they_were(scored):
    few = draw_states(scored, DOMAINS, StateRanges(), n_states=3, seed=0)
    many = draw_states(scored, DOMAINS, StateRanges(), n_states=9, seed=0)

    assert many.draws[:3] == few.draws
    np.testing.assert_array_equal(many.values_MDP[:3], few.values_MDP)
    assert many.values_MDP.shape == (9, len(DOMAINS), len(many.covariates))


def test_the_normaliser_knows_its_covariates_and_scorers(scored):
    fitted = fit_normaliser(scored, DOMAINS, StateRanges(), seed=0, also=["hdd_p90"])

    assert {"log2_tokens", "mtld", "hdd_p90"} <= set(fitted.covariates)
    assert set(fitted.scorers) == set(scored["scorers"][0].split(";"))
    assert fitted.scale_DP.shape == (len(DOMAINS), len(fitted.covariates))


def test_the_table_of_states_has_a_row_for_each_domain(experiment):
    frame = experiment.states.frame(DOMAINS)

    assert frame.height == 3 * len(DOMAINS)
    assert frame["domain"].to_list() == list(DOMAINS) * 3
    np.testing.assert_array_equal(
        frame.select(experiment.states.covariates).to_numpy().reshape(3, 3, -1),
        experiment.states.values_MDP,
    )


def test_a_whole_pool_as_a_state_compresses_as_the_pool_does(spec, scored, tmp_path):
    """The pool's sample is read from its files, the state's from its tokens."""
    store = RunStore(tmp_path)
    tokens = store.token_store(write_token_store(store, spec, scored, TOKENIZER))
    sampler = DomainSampler(tokens, TOKENIZER.tokenizer_json, scored["document_id"].to_list())
    everything = Membership(np.arange(scored.height), np.ones(scored.height, dtype=int))
    names = ["sample_compress_ratio", "mtld", "duplicate_share"]

    state_DP = measure_states(scored, DOMAINS, names, [everything], sampler)[0]

    np.testing.assert_array_equal(state_DP, measure_covariates(scored, DOMAINS, names))


def test_a_state_of_copies_compresses_better(spec, scored, tmp_path):
    store = RunStore(tmp_path)
    tokens = store.token_store(write_token_store(store, spec, scored, TOKENIZER))
    sampler = DomainSampler(tokens, TOKENIZER.tokenizer_json, scored["document_id"].to_list())
    rows = np.arange(scored.height)
    states = [Membership(rows, np.full(len(rows), n)) for n in (1, 4)]

    once, often = measure_states(scored, DOMAINS, ["sample_compress_ratio"], states, sampler)

    assert (often < 0.5 * once).all()


def kept(store: RunStore, spec: PoolSpec, first: pl.DataFrame, documents: pl.DataFrame):
    """Name of the token store and hashes of two states of the first pool's documents."""
    tokens_hash = write_token_store(store, spec, documents, TOKENIZER)
    drawn = draw_states(first, DOMAINS, StateRanges(repetition=0.5), n_states=2, seed=0)
    place = {key: row for row, key in enumerate(documents.select("domain", "document_id").rows())}
    keys = first.select("domain", "document_id").rows()
    moved = []
    for membership in drawn.memberships:
        rows = np.array([place[keys[row]] for row in membership.rows])
        moved.append(Membership(np.sort(rows), membership.copies[np.argsort(rows)]))
    return tokens_hash, keep_states(store, documents, DOMAINS, moved)


def read_by(store: RunStore, experiment: SmallExperiment, tokens_hash: str, state: str):
    """The first tokens that a run reads of that state in that token store."""
    spec = replace(experiment.specs[0], tokens_hash=tokens_hash, state_hash=state)
    return RunFeed(store, spec).batch(0)


def test_a_state_holds_its_documents_by_domain_as_often_as_drawn(scored, tmp_path):
    store = RunStore(tmp_path)
    drawn = draw_states(scored, DOMAINS, StateRanges(repetition=0.9), n_states=2, seed=0)
    hashes = keep_states(store, scored, DOMAINS, drawn.memberships)
    for name, membership in zip(hashes, drawn.memberships, strict=True):
        by_domain = store.state(name)
        for domain, ids in zip(DOMAINS, by_domain, strict=True):
            found = dict(zip(*np.unique(ids, return_counts=True), strict=True))
            rows = scored[membership.rows.tolist()].with_columns(n=membership.copies)
            wanted = rows.filter(domain=domain).select("document_id", "n").rows()
            assert {k.decode(): int(n) for k, n in found.items()} == dict(wanted)


def test_a_pool_that_grew_gives_an_old_state_its_old_documents(experiment, spec, tmp_path):
    """Their positions move when documents come before them; the state's name doesn't change."""
    store = RunStore(tmp_path)
    store.put_eval(
        experiment.specs[0].eval_hash, experiment.store.evaluation(experiment.specs[0].eval_hash)
    )
    scored = experiment.documents
    tokens_hash, states = kept(store, spec, scored, scored)
    before = read_by(store, experiment, tokens_hash, states[0])
    grown = pl.concat([DOCUMENTS, make_documents(40)]).unique(["domain", "document_id"])
    grown_spec = write_pool(tmp_path / "grown", grown)
    larger = profiled(grown_spec, TOKENIZER, tmp_path)

    grown_hash, grown_states = kept(store, grown_spec, scored, larger)

    assert larger.height > scored.height
    assert grown_states == states
    assert grown_hash != tokens_hash
    np.testing.assert_array_equal(read_by(store, experiment, grown_hash, states[0]), before)


def test_the_order_of_the_frame_changes_neither_name_nor_reading(experiment, spec, tmp_path):
    scored = experiment.documents
    order = np.random.default_rng(0).permutation(scored.height).tolist()
    one, other = RunStore(tmp_path / "one"), RunStore(tmp_path / "other")
    tokens_hash, states = kept(one, spec, scored, scored)
    shuffled_hash, shuffled = kept(other, spec, scored, scored[order])

    assert shuffled == states
    np.testing.assert_array_equal(
        read_by(other, experiment, shuffled_hash, states[1]),
        read_by(one, experiment, tokens_hash, states[1]),
    )


def test_domains_in_another_order_are_other_states(scored, tmp_path):
    """A mixture names its domains by their order alone."""
    store = RunStore(tmp_path)
    membership = draw_states(scored, DOMAINS, StateRanges(), n_states=1, seed=0).memberships
    forth, back = (
        keep_states(store, scored, order, membership) for order in (DOMAINS, DOMAINS[::-1])
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


def test_the_name_of_held_out_text_never_changes():
    """Records of earlier versions carry it: another name would train their runs again."""
    texts = {"a": draw_texts("math", 40, seed=5), "b": draw_texts("prose", 40, seed=6)}
    evaluation, name = build_evaluation(texts, TOKENIZER, sequence_length=16)

    assert name == "a5dd9d446d0cb80e5f7f841bdf721e36"
    assert evaluation.n_bytes == {"a": 1710, "b": 1724}


QUESTION = QuestionText("choice", "a sum of", ("numbers", "words"), 0)


def test_questions_are_part_of_an_evaluation_and_of_its_name():
    texts = {"t": draw_texts("math", 4, seed=5)}
    names = set()
    others = [replace(QUESTION, label=1), replace(QUESTION, measure="accuracy")]
    for questions in (
        {},
        {"q": [QUESTION]},
        *({"q": [each]} for each in others),
        {"r": [QUESTION]},
    ):
        evaluation, name = build_evaluation(
            texts, TOKENIZER, sequence_length=16, questions=questions
        )
        names.add(name)
        assert list(evaluation.questions) == list(questions)
        assert evaluation.tokenizer == (TOKENIZER.tokenizer_json if questions else "")

    assert len(names) == 5


def test_questions_alone_are_an_evaluation():
    evaluation, _ = build_evaluation({}, TOKENIZER, sequence_length=16, questions={"q": [QUESTION]})

    assert evaluation.windows == {}
    assert [q.label for q in evaluation.questions["q"]] == [0]


def test_a_question_that_fills_the_context_is_refused():
    with pytest.raises(PoolError, match="tasks: options of 'q' must be shorter"):
        build_evaluation({}, TOKENIZER, sequence_length=2, questions={"q": [QUESTION]})


def test_a_pretrained_model_reads_text_by_its_own_tokenizer(tmp_path):
    save_model(tmp_path / "m", small_lm())
    texts = {"t": draw_texts("prose", 10, seed=5)}
    _, pool_name = build_evaluation(texts, TOKENIZER, sequence_length=16)
    own, own_name = build_evaluation(
        texts, TOKENIZER, sequence_length=16, model_folder=str(tmp_path / "m")
    )
    (tmp_path / "m").rename(tmp_path / "moved")
    _, moved_name = build_evaluation(
        texts, TOKENIZER, sequence_length=16, model_folder=str(tmp_path / "moved")
    )

    assert own_name == moved_name != pool_name
    assert own.windows["t"].shape[1] == 17
    assert own.windows["t"].max() < 300
    assert 0 < own.n_bytes["t"] <= sum(len(text.encode()) for text in texts["t"])


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


def test_runs_with_stages_are_schedules_with_a_column_for_each_stage_s_shares(experiment):
    design = make_design(DesignPlan(n_runs=4, stages=2, panel_mixtures=1), len(DOMAINS))
    first = experiment.specs[0]
    hashes = {"tokens_hash": first.tokens_hash, "eval_hash": first.eval_hash}
    specs = make_specs(design, [first.state_hash], **hashes, config=first.config)

    table = spec_table(specs, design, DOMAINS)

    for run, spec in enumerate(specs):
        assert isinstance(spec.controller, Schedule)
        assert spec.controller.probe_windows == STAGE_PROBE_WINDOWS
        assert [part for part, _ in spec.controller.stages] == [0.5, 0.5]
        shares = [
            [table[f"stage{stage}__share__{domain}"][run] for domain in DOMAINS] for stage in (1, 2)
        ]
        np.testing.assert_allclose([list(mix) for _, mix in spec.controller.stages], shares)
        assert spec.mixture == pytest.approx(np.mean(shares, axis=0))
    assert len({spec.key for spec in specs}) == len(specs)
    static = spec_table(experiment.specs, experiment.design, DOMAINS).columns
    assert not [name for name in static if name.startswith("stage")]
    assert all("controller" not in spec.to_dict() for spec in experiment.specs)


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


def at_of(experiment: SmallExperiment) -> list[int]:
    return [experiment.states.covariates.index(n) for n in ("log2_tokens", "compress_ratio")]


def collect(experiment: SmallExperiment, records: list[ProxyRecord]):
    return collect_runs(
        records,
        experiment.design,
        experiment.states.values_MDP[:, :, at_of(experiment)],
        domains=DOMAINS,
        covariates=("log2_tokens", "compress_ratio"),
        tasks=("math", "code"),
    )


def test_runs_meet_the_covariates_of_their_states_and_larger_is_better(experiment):
    runs = collect(experiment, records_of(experiment))

    np.testing.assert_array_equal(runs.outcome_NT[:, 1], -np.arange(16.0))
    np.testing.assert_array_equal(runs.outcome_NT[:, 0], -np.arange(16.0) / 2)
    at = at_of(experiment)
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


def test_a_design_of_a_demos_size_is_drawn_and_kept_whole(scored, tmp_path):
    """Five hundred runs over 128 states: names stay distinct and the shares sum to 1."""
    plan = DesignPlan(n_runs=512)
    design = make_design(plan, len(DOMAINS))
    drawn = draw_states(scored, DOMAINS, StateRanges(), n_states=plan.n_states, seed=0)
    hashes = keep_states(RunStore(tmp_path), scored, DOMAINS, drawn.memberships)

    assert len(set(hashes)) == plan.n_states == 128
    assert design.state_N.max() == 127
