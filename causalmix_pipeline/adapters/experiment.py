"""From documents to proxy runs: tokenizer, scores, pool states, evaluation windows, run specs.

The steps that assets and studies share. Each is a function of its arguments; what workers must
read goes into the run store under its content hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.local_backend import engine_name
from causalmix_pipeline.adapters.pretrained_proxy import pretrained_engine_name
from causalmix_pipeline.adapters.profiler import (
    PoolSpec,
    document_batches,
    sample_compress_ratio,
    survey_pool,
)
from causalmix_pipeline.adapters.run_store import EvalWindows, RunStore
from causalmix_pipeline.adapters.task_files import file_digest
from causalmix_pipeline.adapters.task_tokenizers import check_questions, open_task_tokenizer
from causalmix_pipeline.adapters.token_scores import (
    CrossFittedModel,
    PoolLanguageModel,
    TokenScorer,
)
from causalmix_pipeline.adapters.tokenizer import (
    TokenStore,
    cut_windows,
    encode_texts,
    token_bytes,
    train_tokenizer,
    vocab_size_of,
)
from causalmix_pipeline.core.controllers import Schedule
from causalmix_pipeline.core.covariates import (
    SAMPLE_BYTES,
    SAMPLE_CHARS,
    CovariateMeter,
    Normaliser,
    covariates_of,
)
from causalmix_pipeline.core.design import Design
from causalmix_pipeline.core.errors import EstimationError, PoolError
from causalmix_pipeline.core.pool_state import (
    N_REFERENCE_STATES,
    DomainDraw,
    Membership,
    StateRanges,
    draw_state,
    index_documents,
)
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.tasks import Direction, HarnessTask, QuestionText, outcome_of

#: Evaluation windows of a task, spread evenly over its text.
MAX_EVAL_WINDOWS = 64

#: Windows or sequences of each domain whose loss is measured after each stage of a run.
STAGE_PROBE_WINDOWS = 8


@dataclass(frozen=True, eq=False)
class PoolTokenizer:
    """The experiment pool's tokenizer and token frequencies: the scale that documents are read on.

    Attributes:
        tokenizer_json: byte-level BPE.
        language_model: unigram and bigram counts of the experiment pool's two halves.
    """

    tokenizer_json: str
    language_model: CrossFittedModel

    @classmethod
    def fit(cls, documents: pl.DataFrame, *, vocab_size: int) -> PoolTokenizer:
        """Train the tokenizer on the documents of a pool and count its tokens.

        Args:
            documents: the reader's frame.
            vocab_size: number of tokens.
        """
        texts = documents["text"].to_list()
        tokenizer_json = train_tokenizer(texts, vocab_size=vocab_size)
        encoded = encode_texts(tokenizer_json, texts)
        n_tokens = vocab_size_of(tokenizer_json)
        identities = documents["document_id"].to_list()
        return cls(tokenizer_json, CrossFittedModel.fit(encoded, identities, n_tokens))

    @property
    def tokenizer_hash(self) -> str:
        """Names the tokenizer, 32 hex digits: what token ids depend on."""
        return hashlib.sha256(self.tokenizer_json.encode()).hexdigest()[:32]

    @property
    def content_hash(self) -> str:
        """Names tokenizer and counts, 32 hex digits: what scores depend on."""
        digest = hashlib.sha256(self.tokenizer_json.encode())
        for half in self.language_model.halves:
            digest.update(half.unigram_V.tobytes())
            digest.update(half.bigram_VV.tobytes())
        return digest.hexdigest()[:32]

    @property
    def unigram_nats(self) -> float:
        """Entropy of the pool's token frequencies in nats, the bound of models without context."""
        counts_V = np.sum([half.unigram_V for half in self.language_model.halves], axis=0)
        share_V = counts_V[counts_V > 0] / counts_V.sum()
        return float(-(share_V * np.log(share_V)).sum())

    def scorer(self, folder: Path) -> TokenScorer:
        """What measures documents by this tokenizer; its tables are kept below `folder`."""
        return TokenScorer.write(folder, self.tokenizer_json, self.language_model)

    def to_dict(self) -> dict:
        """Plain values that JSON can hold."""
        halves = []
        for half in self.language_model.halves:
            first, second = np.nonzero(half.bigram_VV)
            counts = half.bigram_VV[first, second]
            halves.append(
                {
                    "unigram": half.unigram_V.tolist(),
                    "pairs": [first.tolist(), second.tolist(), counts.tolist()],
                }
            )
        return {"tokenizer": self.tokenizer_json, "halves": halves}

    @classmethod
    def from_dict(cls, values: Mapping) -> PoolTokenizer:
        """Inverse of `to_dict`."""
        first, second = (_counts_of(half) for half in values["halves"])
        return cls(values["tokenizer"], CrossFittedModel((first, second)))


def fit_on_sample(task: tuple[PoolSpec, int, int]) -> PoolTokenizer:
    """Fit a tokenizer on a sample of a pool: a task for a worker, which takes its memory with it.

    Args:
        task: the pool, most bytes of the sample, number of tokens.
    """
    spec, max_bytes, vocab_size = task
    sample = survey_pool(spec, max_bytes=max_bytes).sample
    return PoolTokenizer.fit(sample, vocab_size=vocab_size)


def _counts_of(values: Mapping) -> PoolLanguageModel:
    unigram_V = np.array(values["unigram"], dtype=np.int64)
    bigram_VV = np.zeros((len(unigram_V), len(unigram_V)), dtype=np.int64)
    first, second, counts = values["pairs"]
    bigram_VV[first, second] = counts
    return PoolLanguageModel(unigram_V, bigram_VV)


def write_token_store(
    store: RunStore, spec: PoolSpec, documents: pl.DataFrame, tokenizer: PoolTokenizer
) -> str:
    """Keep a pool's tokens for the workers; the pool is read again, unless they are kept already.

    Args:
        store: where.
        spec: the pool.
        documents: its documents frame.
        tokenizer: of the experiment pool.

    Returns:
        The name of the token store: the hash of the documents' ids and of the tokenizer.

    Raises:
        PoolError: if the pool's files lack a document of the frame.
    """
    ids = documents["document_id"].to_list()
    name = hashlib.sha256((tokenizer.tokenizer_hash + "\n".join(ids)).encode()).hexdigest()[:32]
    if store.has_tokens(name):
        return name

    def encoded() -> Iterator[tuple[list[str], list[np.ndarray]]]:
        for batch in document_batches(spec, ids):
            texts = batch["text"].to_list()
            yield batch["document_id"].to_list(), encode_texts(tokenizer.tokenizer_json, texts)

    store.put_tokens(name, encoded(), vocab_size_of(tokenizer.tokenizer_json))
    return name


@dataclass(frozen=True, eq=False)
class DrawnStates:
    """Pool states of a design.

    Attributes:
        draws: how each domain of each state was drawn.
        memberships: documents of each state.
        covariates: P names.
        values_MDP: raw covariates.
    """

    draws: list[list[DomainDraw]]
    memberships: list[Membership]
    covariates: tuple[str, ...]
    values_MDP: np.ndarray

    def frame(self, domains: Sequence[str]) -> pl.DataFrame:
        """One row per state and domain: how it was drawn, and each covariate, raw."""
        rows = [
            {
                "state_id": m,
                "domain": domain,
                "source_shares": list(draw.source_shares),
                "size_share": draw.size_share,
                "tilt": draw.tilt,
                "unique_share": draw.unique_share,
                "noise_share": draw.noise_share,
            }
            for m, draws in enumerate(self.draws)
            for domain, draw in zip(domains, draws, strict=True)
        ]
        values = self.values_MDP.reshape(-1, len(self.covariates))
        return pl.DataFrame(rows).hstack(pl.DataFrame(values, schema=list(self.covariates)))


def draw_states(
    documents: pl.DataFrame,
    domains: Sequence[str],
    ranges: StateRanges,
    *,
    n_states: int,
    seed: int,
    sampler: DomainSampler | None = None,
    also: Sequence[str] = (),
) -> DrawnStates:
    """Draw the first `n_states` pool states of an experiment pool and measure them.

    Args:
        documents: the experiment pool's documents frame.
        domains: D domains.
        ranges: how far the states reach.
        n_states: states that are wanted.
        seed: the design's seed.
        sampler: gives the text whose compression is measured; None leaves that covariate out.
        also: covariates to measure besides those that every documents frame offers: quantiles.
    """
    index = index_documents(documents, domains, ranges)
    drawn = [draw_state(index, ranges, state_id=m, seed=seed) for m in range(n_states)]
    memberships = [membership for _, membership in drawn]
    offered = (*covariates_of(documents), *also)
    covariates = tuple(
        name
        for name in dict.fromkeys(offered)
        if sampler is not None or name != "sample_compress_ratio"
    )
    return DrawnStates(
        draws=[draws for draws, _ in drawn],
        memberships=memberships,
        covariates=covariates,
        values_MDP=measure_states(documents, domains, covariates, memberships, sampler),
    )


def fit_normaliser(
    documents: pl.DataFrame,
    domains: Sequence[str],
    ranges: StateRanges,
    *,
    seed: int,
    sampler: DomainSampler | None = None,
    also: Sequence[str] = (),
) -> Normaliser:
    """Fit the normaliser on the first `N_REFERENCE_STATES` states, however many a design has."""
    states = draw_states(
        documents,
        domains,
        ranges,
        n_states=N_REFERENCE_STATES,
        seed=seed,
        sampler=sampler,
        also=also,
    )
    scorers = documents["scorers"][0].split(";")
    return Normaliser.fit(states.values_MDP, domains, states.covariates, scorers)


def measure_states(
    documents: pl.DataFrame,
    domains: Sequence[str],
    covariates: Sequence[str],
    memberships: Sequence[Membership],
    sampler: DomainSampler | None = None,
) -> np.ndarray:
    """Covariates of pool states; shape (M, D, P)."""
    meter = CovariateMeter.of(documents, domains, covariates)
    return np.array(
        [
            meter.measure(
                m.rows,
                m.copies,
                None
                if sampler is None
                else [sampler.ratio(m, meter.domain_N == d) for d in range(len(domains))],
            )
            for m in memberships
        ]
    )


class DomainSampler:
    """The text of a pool state's domains, from the token store, and how well it compresses.

    A state is sampled as a pool is: documents in the order of their content hash, copies beside
    each other, the first characters of each, up to the same number of bytes.
    """

    def __init__(self, tokens: TokenStore, tokenizer_json: str, document_ids: Sequence[str]):
        """Prepare.

        Args:
            tokens: holds every document of the frame.
            tokenizer_json: the byte-level BPE that made them.
            document_ids: id of each row of the documents frame.
        """
        self._bytes_of = token_bytes(tokenizer_json)
        self._ids = np.array(document_ids, dtype="S")
        self._place = tokens.positions(self._ids)
        self._tokens, self._offsets = tokens.tokens(), tokens.offsets()
        self._heads: dict[int, bytes] = {}

    def ratio(self, membership: Membership, of_domain: np.ndarray) -> float:
        """Compression of one domain's sample.

        Args:
            membership: the state's documents.
            of_domain: which rows of the documents frame belong to the domain.
        """
        mask = of_domain[membership.rows]
        rows, copies = membership.rows[mask], membership.copies[mask]
        parts, size = [], 0
        for i in np.argsort(self._ids[rows], kind="stable"):
            head = self._head(int(rows[i]))
            for _ in range(int(copies[i])):
                if size >= SAMPLE_BYTES:
                    break
                parts.append(head)
                size += len(head)
            if size >= SAMPLE_BYTES:
                break
        return sample_compress_ratio(b"\n\n".join(parts))

    def _head(self, row: int) -> bytes:
        if row not in self._heads:
            place = self._place[row]
            begin, end = int(self._offsets[place]), int(self._offsets[place + 1])
            # A token has a byte at least, a character four bytes at most.
            ids = self._tokens[begin : min(end, begin + 4 * SAMPLE_CHARS)]
            text = b"".join(self._bytes_of[i] for i in ids.tolist()).decode("utf-8", "ignore")
            self._heads[row] = text[:SAMPLE_CHARS].encode()
        return self._heads[row]


def keep_states(
    store: RunStore,
    documents: pl.DataFrame,
    domains: Sequence[str],
    memberships: Sequence[Membership],
) -> list[str]:
    """Keep the states for the workers: their documents, repeated, in a random order of their own.

    Returns:
        The content hash of each state.
    """
    ids = documents["document_id"].to_list()
    place = {domain: number for number, domain in enumerate(domains)}
    numbers = [place.get(domain, -1) for domain in documents["domain"].to_list()]
    id_bytes, number_of_row = np.array(ids, dtype="S"), np.array(numbers)
    hashes = []
    for membership in memberships:
        name = membership.content_hash(ids, numbers)
        # Not the digits that order the windows: the two shuffles are independent.
        rng = np.random.default_rng(int(name[15:30], 16))
        # By id, so that the order of reading doesn't depend on the frame's.
        order = np.argsort(id_bytes[membership.rows], kind="stable")
        rows, copies = membership.rows[order], membership.copies[order]
        by_domain = {}
        for domain, number in place.items():
            mask = number_of_row[rows] == number
            by_domain[domain] = rng.permutation(np.repeat(id_bytes[rows[mask]], copies[mask]))
        store.put_state(name, by_domain)
        hashes.append(name)
    return hashes


def build_evaluation(
    texts: Mapping[str, Sequence[str]],
    tokenizer: PoolTokenizer,
    *,
    sequence_length: int,
    questions: Mapping[str, Sequence[QuestionText]] | None = None,
    harness: Mapping[str, HarnessTask] | None = None,
    model_folder: str | None = None,
    context: int | None = None,
) -> tuple[EvalWindows, str]:
    """Cut each task's held-out text into windows, and encode the questions of the others.

    Args:
        texts: task to its held-out documents.
        tokenizer: of the experiment pool.
        sequence_length: predicted tokens a window, L.
        questions: task to its questions.
        harness: task to its place in the lm-evaluation-harness.
        model_folder: folder of the pretrained model whose own tokenizer is used instead.
        context: tokens that the model can read; None takes L.

    Returns:
        The evaluation, and its content hash.

    Raises:
        PoolError: if a task's text is shorter than one window, or a question fills the context.
    """
    encoder = open_task_tokenizer(model_folder or tokenizer.tokenizer_json)
    digest = hashlib.sha256(encoder.digest.encode())
    windows, n_bytes, unigram_nats = {}, {}, {}
    for task, documents in texts.items():
        encoded, sizes = encoder.encode_with_bytes(list(documents))
        tokens = np.concatenate([np.zeros(0, np.uint32), *encoded])
        if len(tokens) <= sequence_length:
            raise PoolError(
                f"tasks: the held-out text of {task!r} has {len(tokens)} tokens, fewer than one "
                f"window of {sequence_length + 1}. Add text to the task's path."
            )
        offsets = np.concatenate([[0], np.cumsum([len(e) for e in encoded])])
        order = np.arange(len(encoded))
        cut = cut_windows(tokens, offsets, order, sequence_length, end_id=encoder.end_id)
        # The end of text stands for no byte.
        bytes_WL = cut_windows(np.concatenate(sizes), offsets, order, sequence_length, end_id=0)
        chosen = np.unique(np.linspace(0, len(cut) - 1, MAX_EVAL_WINDOWS).round().astype(int))
        windows[task] = cut[chosen]
        n_bytes[task] = int(bytes_WL[chosen, 1:].sum())
        share = np.bincount(tokens) / len(tokens)
        share = share[share > 0]
        unigram_nats[task] = float(-(share * np.log(share)).sum())
        digest.update(task.encode() + b"\0" + windows[task].tobytes())
    evaluation = EvalWindows(windows, n_bytes, unigram_nats)
    if questions or harness:
        encoded_questions = {
            task: [encoder.question(text) for text in of_task]
            for task, of_task in (questions or {}).items()
        }
        for task, of_task in encoded_questions.items():
            check_questions(task, of_task, context=context or sequence_length)
        evaluation = replace(
            evaluation,
            questions=encoded_questions,
            harness=dict(harness or {}),
            tokenizer=encoder.name,
        )
        digest.update(_questions_content(evaluation))
    return evaluation, digest.hexdigest()[:32]


def _questions_content(evaluation: EvalWindows) -> bytes:
    """What names questions and harness tasks: their content, not the folders they lie in."""
    places = {
        task: [file_digest(Path(place.folder)), place.name, place.max_questions]
        for task, place in evaluation.harness.items()
    }
    named = replace(evaluation, tokenizer="", harness={})
    return named.questions_json() + json.dumps(places, sort_keys=True).encode()


def make_specs(
    design: Design,
    state_hashes: Sequence[str],
    *,
    tokens_hash: str,
    eval_hash: str,
    config: ProxyConfig | PretrainedConfig,
    device: str = "cpu",
) -> list[ProxySpec]:
    """The spec of each proxy run of a design, trained on a kind of device."""
    name = engine_name if isinstance(config, ProxyConfig) else pretrained_engine_name
    engine = name(device)
    controllers = stage_controllers(design)
    return [
        ProxySpec(
            state_hash=state_hashes[int(state)],
            tokens_hash=tokens_hash,
            eval_hash=eval_hash,
            mixture=tuple(mixture_D.tolist()),
            data_seed=int(seed),
            config=config,
            engine=engine,
            controller=controller,
        )
        for state, mixture_D, seed, controller in zip(
            design.state_N, design.mixture_ND, design.data_seed_N, controllers, strict=True
        )
    ]


def stage_controllers(design: Design) -> list[Schedule] | list[None]:
    """The schedule of each run of a design, its stages probed; None where it has no stages."""
    if design.stage_mixture_NSD is None:
        return [None] * len(design.state_N)
    part = 1 / design.stage_mixture_NSD.shape[1]
    return [
        Schedule(
            stages=tuple((part, tuple(mixture_D.round(12).tolist())) for mixture_D in mixture_SD),
            probe_windows=STAGE_PROBE_WINDOWS,
        )
        for mixture_SD in design.stage_mixture_NSD
    ]


def collect_runs(
    records: Sequence[ProxyRecord],
    design: Design,
    values_MDP: np.ndarray,
    *,
    domains: Sequence[str],
    covariates: Sequence[str],
    tasks: Sequence[str],
    directions: Mapping[str, Direction] | None = None,
) -> RunTable:
    """Join finished runs with the covariates of their states.

    Runs that diverged or lack an outcome of a task are left out. Larger outcomes are better: minus
    the bits per byte of held-out text, the score otherwise.

    Args:
        records: one per run of the design, in its order.
        design: states and mixtures.
        values_MDP: covariates of the design's states.
        domains: D domains.
        covariates: their names, P of them.
        tasks: T tasks.
        directions: which way a task's score is better; see `outcome_of`.

    Raises:
        EstimationError: if every run diverged, or no run has an outcome of every task.
    """
    if all(record.diverged for record in records):
        raise EstimationError(
            f"all {len(records)} proxy runs diverged. Lower proxy.learning_rate and train again."
        )
    outcomes = [[outcome_of(record, task, directions) for task in tasks] for record in records]
    kept = [i for i, row in enumerate(outcomes) if None not in row]
    if not kept:
        lacking = [task for t, task in enumerate(tasks) if all(row[t] is None for row in outcomes)]
        raise EstimationError(
            f"tasks must have an outcome in some proxy run, got none of {lacking or list(tasks)} "
            f"in {len(records)} runs: materialise eval_tasks and what follows, or take the task "
            "off the settings."
        )
    return RunTable(
        domains=tuple(domains),
        covariates=tuple(covariates),
        tasks=tuple(tasks),
        run_ids=tuple(records[i].key for i in kept),
        state_ids=design.state_N[kept],
        state_NDP=values_MDP[design.state_N[kept]],
        mixture_ND=design.mixture_ND[kept],
        outcome_NT=np.array([outcomes[i] for i in kept], dtype=float),
        repeat_of_N=design.cell_N[kept],
    )


def spec_table(specs: Sequence[ProxySpec], design: Design, domains: Sequence[str]) -> pl.DataFrame:
    """The design as a table: a row per proxy run, a column per domain's share."""
    return pl.DataFrame(
        {
            "proxy_run_id": [spec.key for spec in specs],
            "state_id": design.state_N,
            "state_hash": [spec.state_hash for spec in specs],
            "cell": design.cell_N,
            "data_seed": design.data_seed_N,
            **{f"share__{d}": design.mixture_ND[:, i] for i, d in enumerate(domains)},
            **_stage_columns(design, domains),
            "config": [json.dumps(spec.config.to_dict(), sort_keys=True) for spec in specs],
        }
    )


def _stage_columns(design: Design, domains: Sequence[str]) -> dict[str, np.ndarray]:
    """Shares of each stage, counted from 1; no column where a run has no stages."""
    if design.stage_mixture_NSD is None:
        return {}
    return {
        f"stage{stage + 1}__share__{domain}": design.stage_mixture_NSD[:, stage, d]
        for stage in range(design.stage_mixture_NSD.shape[1])
        for d, domain in enumerate(domains)
    }
