"""The two pools, and what is known of their documents."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import PoolTokenizer, write_token_store
from causalmix_pipeline.adapters.ngram_overlap import OverlapFinder, find_overlap
from causalmix_pipeline.adapters.pool_files import pool_fingerprint
from causalmix_pipeline.adapters.profiler import (
    PoolProfile,
    PoolSpec,
    ScorerPlan,
    profile_pool,
    survey_pool,
)
from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value, write_value
from causalmix_pipeline.adapters.task_likeness import TaskLikeScorer
from causalmix_pipeline.assets.column_lineage import live_covariates_lineage
from causalmix_pipeline.assets.design import (
    evaluation_texts,
    read_harness_tasks,
    read_task_questions,
    read_task_texts,
)
from causalmix_pipeline.assets.pictures import (
    bar,
    by_domain_table,
    markdown_table,
    markdown_text,
    moves_plot,
    number,
    svg_picture,
)
from causalmix_pipeline.assets.sizes import with_target
from causalmix_pipeline.core.covariates import (
    Normaliser,
    covariates_of,
    measure_covariates,
    tasks_asked,
)
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.pool_change import compare_profiles
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.frame_store import FRAME, VALUES
from causalmix_pipeline.resources.live_pools import LivePool, pool_of_run
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observed_version
from causalmix_pipeline.resources.progress import progress_teller
from causalmix_pipeline.resources.project import Project

#: Fewest documents of a domain that pool states are drawn from.
MIN_DOCUMENTS = 20

#: Most text that the tokenizer and the token frequencies are made from; of a larger pool, the
#: documents with the lowest content hash.
TOKENIZER_BYTES = 16 * 2**20


#: External: files that people write; it changes when its content is adopted by an observation.
experiment_pool = dg.AssetSpec(
    EXPERIMENT_POOL,
    group_name="experiment",
    kinds={"file"},
    description="The pinned pool that proxy runs train on: files of documents. "
    "It changes only when a person adopts its content (job `adopt_experiment_pool`): every proxy "
    "run is then trained anew.",
)

with warnings.catch_warnings():
    # Beta in 1.13. Conditions see observations of observable assets only, not of plain specs.
    warnings.simplefilter("ignore", dg.BetaWarning)

    @dg.multi_observable_source_asset(
        name="observe_live_pool",
        specs=[
            dg.AssetSpec(
                LIVE_POOL,
                group_name="live",
                kinds={"file"},
                description="The pool to recommend a mixture for: files of documents that change "
                "at any time. A sensor observes it. A change reaches the live side only, and "
                "trains no proxy.",
            )
        ],
    )
    def live_pool(
        context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
    ) -> Iterator[dg.ObserveResult]:
        """The content of the live pool."""
        location = pool_of_run(context, project.settings).location
        version = dg.DataVersion(pool_fingerprint(location))
        key = asset_key(project.settings, LIVE_POOL)
        yield dg.ObserveResult(asset_key=key, data_version=version)


def adopted_pool(context: dg.AssetExecutionContext, project: Project) -> PoolSpec:
    """The experiment pool, which must be the one that was adopted.

    Raises:
        PoolError: if its content isn't what was observed last.
    """
    location = project.settings.experiment_path
    adopted = observed_version(context.instance, asset_key(project.settings, EXPERIMENT_POOL))
    if adopted is not None and pool_fingerprint(location) != adopted:
        raise PoolError(
            f"pools.experiment ({location}) must be the pool that was adopted, got other content: "
            "put the files back, or run the job adopt_experiment_pool, which trains every "
            "proxy run anew."
        )
    return project.pool_spec(location, project.settings.domains)


def plans_of(project: Project, fitted: PoolTokenizer) -> list[ScorerPlan]:
    """What is measured of documents; tasks' text is read where a covariate asks for it.

    Raises:
        PoolError: if a task's file is missing.
        ScoringError: if it holds too little text.
    """
    plans = project.scorer_plans(fitted)
    if asked := tasks_asked(project.settings.covariates):
        texts = read_task_texts(project)
        scorer = TaskLikeScorer.write(
            project.folder("tokenizers"), fitted.tokenizer_json, {t: texts[t] for t in asked}
        )
        plans.append(ScorerPlan(scorer))
    return plans


def profile(
    project: Project,
    spec: PoolSpec,
    plans: Sequence[ScorerPlan],
    tell: Callable[[str], None],
    quarantine: Path,
) -> PoolProfile:
    """Profile a pool, and keep its refused rows with their reasons.

    Where the settings say so, documents that overlap with a task are refused, too.

    Args:
        project: where scores are kept and workers run.
        spec: the pool.
        plans: what to measure.
        tell: takes a line of progress.
        quarantine: file of the refused rows.
    """
    found = profile_pool(
        spec,
        plans,
        store=project.score_store,
        workers=project.workers,
        scratch=project.folder("scratch"),
        on_progress=progress_teller(tell),
    )
    if project.settings.quality.exclude_overlap:
        found = without_overlap(project, spec, found)
    write_value(quarantine, found.quarantine)
    return found


def without_overlap(project: Project, spec: PoolSpec, found: PoolProfile) -> PoolProfile:
    """The profile without documents that share 13 words in a row with a task, nor their twins.

    What was measured of a domain as a whole before, its compression, stays.
    """
    held_out = evaluation_texts(
        read_task_texts(project), read_task_questions(project), read_harness_tasks(project)
    )
    shared = find_overlap(OverlapFinder.of(held_out), replace(spec, noise_seed=None))
    ids = shared["document_id"].unique().to_list()
    refused = shared.select(
        "file", "row", reason=pl.format("overlaps task {}: 13 words in a row", "task")
    )
    original = pl.coalesce("twin_of", "document_id")
    return replace(
        found,
        documents=found.documents.filter(~original.is_in(ids)),
        quarantine=pl.concat([found.quarantine, refused]),
    )


def domain_rows(documents: pl.DataFrame) -> list[dict]:
    """Documents and tokens of each domain, for a table."""
    return (
        documents.filter(~pl.col("augmented"))
        .group_by("domain", maintain_order=True)
        .agg(
            documents=pl.len(), tokens=pl.col("n_tokens").sum(), sources=pl.col("source").n_unique()
        )
        .to_dicts()
    )


def pool_metadata(found: PoolProfile) -> dict:
    """What a person wants to know of a profiled pool."""
    originals = found.documents.filter(~pl.col("augmented"))
    return {
        "documents": float(originals.height),
        "tokens": float(originals["n_tokens"].sum()),
        "documents scored now": float(max(found.n_scored.values())),
        "rows rejected": float(found.quarantine.height),
        "share rejected": number(found.rejected_share),
        "domains": markdown_table(described_domains(found)),
        "rejected, by reason": markdown_table(reason_rows(found.quarantine), length=60),
        "first rejected rows": markdown_table(found.quarantine.head(3).to_dicts()),
    }


def described_domains(found: PoolProfile) -> list[dict]:
    """The table of domains with rejected rows, and a bar for the share of the tokens.

    A rejected row has the domain of its file, where all documents of the file are of one.
    """
    rows, originals = domain_rows(found.documents), found.documents.filter(~pl.col("augmented"))
    of_file = originals.group_by("file").agg(pl.col("domain").unique())
    of_file = of_file.filter(pl.col("domain").list.len() == 1).explode("domain")
    joined = found.quarantine.select("file").join(of_file, on="file", how="left")
    rejected = dict(joined["domain"].value_counts().iter_rows())
    most = max((row["tokens"] for row in rows), default=1)
    table = [
        row | {"rejected": rejected.get(row["domain"], 0), "by tokens": bar(row["tokens"] / most)}
        for row in rows
    ]
    if elsewhere := joined.height - sum(row["rejected"] for row in table):
        table.append(dict.fromkeys(table[0]) | {"domain": "unknown", "rejected": elsewhere})
    return table


def reason_rows(quarantine: pl.DataFrame) -> list[dict]:
    """How many rows were rejected for each reason, the most frequent first."""
    counted = quarantine.group_by("reason").agg(rows=pl.len()).sort("rows", "reason")
    return counted.reverse().select("rows", "reason").to_dicts()


@dg.asset(
    dagster_type=VALUES,
    group_name="experiment",
    kinds={"python"},
    code_version="2",
    deps=[experiment_pool],
)
def tokenizer(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """The byte-level BPE and the token frequencies that documents are measured by.

    Trained on the experiment pool; it also fixes the list of domains and their order. Stale when
    the experiment pool, the list of domains or the vocabulary size changes.
    """
    found = survey_pool(adopted_pool(context, project), max_bytes=TOKENIZER_BYTES)
    domains = project.settings.domains or sorted(found.documents_of)
    if len(domains) < 2:
        raise PoolError(
            f"pools.experiment must hold two domains or more, got {domains}: with one there is "
            "nothing to mix. Put documents of another domain into a folder of their own, or name "
            "the column in columns.domain."
        )
    fitted = PoolTokenizer.fit(found.sample, vocab_size=project.settings.proxy.pool_vocab_size)
    unigram_V = np.sum([half.unigram_V for half in fitted.language_model.halves], axis=0)
    value = {"domains": domains, "unigram_nats": fitted.unigram_nats, **fitted.to_dict()}
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "vocabulary": float(len(unigram_V)),
            "tokens read": float(unigram_V.sum()),
            "unigram entropy, nats a token": number(fitted.unigram_nats),
            "domains": markdown_table([{"order": d, "domain": n} for d, n in enumerate(domains)]),
        },
    )


@dg.asset(
    dagster_type=FRAME,
    group_name="experiment",
    kinds={"polars"},
    code_version="2",
    deps=[experiment_pool],
    check_specs=[
        dg.AssetCheckSpec(
            "enough_documents",
            asset="experiment_documents",
            blocking=True,
            description=f"Every domain has {MIN_DOCUMENTS} documents or more: with fewer, pool "
            "states hardly differ.",
        )
    ],
)
def experiment_documents(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project], tokenizer: dict
) -> dg.MaterializeResult:
    """One row per document of the experiment pool, with its metrics; no text.

    Repeated text is one row with its number of copies; noisy twins are marked `augmented`. Stale
    when the experiment pool, the tokenizer, or what is measured changes.
    """
    fitted = PoolTokenizer.from_dict(tokenizer)
    noise_seed = project.settings.design.seed if project.state_ranges.noise > 0 else None
    spec = replace(
        adopted_pool(context, project), domains=tuple(tokenizer["domains"]), noise_seed=noise_seed
    )
    plans = plans_of(project, fitted)
    quarantine = project.folder("quarantine", "experiment_pool.parquet")
    found = profile(project, spec, plans, context.log.info, quarantine)
    tokens_hash = write_token_store(project.run_store, spec, found.documents, fitted)
    documents = found.documents.with_columns(tokens_hash=pl.lit(tokens_hash))
    least = min(domain_rows(documents), key=lambda row: row["documents"])
    return dg.MaterializeResult(
        value=documents,
        data_version=dg.DataVersion(content_digest(documents)),
        metadata=pool_metadata(found),
        check_results=[
            dg.AssetCheckResult(
                check_name="enough_documents",
                passed=least["documents"] >= MIN_DOCUMENTS,
                description=f"every domain must have {MIN_DOCUMENTS} documents or more; the "
                f"smallest is '{markdown_text(least['domain'])}', got {least['documents']}: add "
                "documents, or leave it out of `domains`.",
            )
        ],
    )


@dg.asset(
    dagster_type=FRAME, group_name="live", kinds={"polars"}, code_version="2", deps=[live_pool]
)
def live_documents(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project], tokenizer: dict
) -> dg.MaterializeResult:
    """One row per document of the live pool, with its metrics; no text.

    Scores are kept by content, so only new documents are scored. Stale when the live pool, the
    tokenizer, or what is measured changes.
    """
    plans = plans_of(project, PoolTokenizer.from_dict(tokenizer))
    pool = pool_of_run(context, project.settings)
    spec = project.pool_spec(pool.location, tokenizer["domains"])
    quarantine = pool.folder("quarantine", "live_pool.parquet")
    found = profile(project, spec, plans, context.log.info, quarantine)
    return dg.MaterializeResult(
        value=found.documents,
        data_version=dg.DataVersion(content_digest(found.documents)),
        metadata=pool_metadata(found),
    )


@dg.asset(
    dagster_type=FRAME,
    group_name="live",
    kinds={"polars"},
    code_version="2",
    check_specs=[
        dg.AssetCheckSpec(
            "no_covariate_missing",
            asset="live_covariates",
            blocking=True,
            description="Every covariate of the settings is a finite number in every domain.",
        )
    ],
)
def live_covariates(
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    normaliser: dict,
    live_documents: pl.DataFrame,
) -> dg.MaterializeResult:
    """One row per domain of the live pool: documents, tokens, token share and every covariate.

    Measured per domain before anything is mixed, by the scorers that the experiment was measured
    by. Stale when the live documents, the normaliser or the list of covariates change.
    """
    domains, wanted = tokenizer["domains"], list(project.settings.covariates)
    scale = Normaliser.from_dict(normaliser)
    scale.check_scorers(live_documents["scorers"][0].split(";"), "the live pool")
    names = list(dict.fromkeys([*covariates_of(live_documents), *wanted]))
    values_DP = measure_covariates(live_documents, domains, names)
    frame = describe_domains(live_documents, domains).hstack(pl.DataFrame(values_DP, schema=names))
    frame = with_target(project.settings, frame)
    missing = [name for name in wanted if not np.isfinite(frame[name].to_numpy()).all()]
    shown = ["documents", "tokens", "natural_share", *wanted]
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "tokens": float(frame["tokens"].sum()),
            "normaliser": scale.version,
            "covariates": by_domain_table(
                domains, {name: frame[name].to_list() for name in shown}, "covariate"
            ),
            **live_covariates_lineage(project.settings, frame, live_documents),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="no_covariate_missing",
                passed=not missing,
                description=""
                if not missing
                else f"covariates must have a value in every "
                f"domain; {missing[0]!r} has none in some: take it off the list.",
                metadata={"missing": ", ".join(missing) or "none"},
            )
        ],
    )


def describe_domains(documents: pl.DataFrame, domains: Sequence[str]) -> pl.DataFrame:
    """One row per domain, in order: documents, distinct tokens, token share with copies."""
    tokens = pl.col("n_tokens") * pl.col("copies")
    counted = (
        documents.filter(~pl.col("augmented"))
        .group_by("domain")
        .agg(documents=pl.len(), tokens=pl.col("n_tokens").sum(), read=tokens.sum())
    )
    ordered = pl.DataFrame({"domain": list(domains)}).join(
        counted, on="domain", how="left", maintain_order="left"
    )
    return ordered.with_columns(natural_share=pl.col("read") / pl.col("read").sum()).drop("read")


@dg.asset(dagster_type=VALUES, group_name="live", kinds={"python"}, code_version="1")
def live_changes(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    normaliser: dict,
    live_documents: pl.DataFrame,
) -> dg.MaterializeResult:
    """What changed since the live pool was profiled before: documents in and out, covariates moved.

    A move is told in standard deviations over the experiment's states, with its standard error.
    Stale when the live documents change.
    """
    before = profile_before(pool_of_run(context, project.settings), live_documents)
    if before is None:
        value: dict = {"documents": [], "covariates": []}
        return dg.MaterializeResult(
            value=value,
            data_version=dg.DataVersion(content_digest(value)),
            metadata={"changes": "This is the first profile of the live pool."},
        )
    scale = Normaliser.from_dict(normaliser)
    both = set(covariates_of(before)) & set(covariates_of(live_documents))
    names = [name for name in scale.covariates if name in both]
    domains = [d for d in tokenizer["domains"] if d in set(before["domain"].unique())]
    columns = [scale.covariates.index(name) for name in names]
    rows = [scale.domains.index(domain) for domain in domains]
    change = compare_profiles(
        before.filter(pl.col("domain").is_in(domains)),
        live_documents.filter(pl.col("domain").is_in(domains)),
        domains,
        names,
        scale_DP=scale.scale_DP[rows][:, columns],
    )
    moves, moved = change.to_frame(), change.moved()
    value = {"documents": change.documents.to_dicts(), "covariates": moves.to_dicts()}
    used = moves.filter(pl.col("covariate").is_in(list(project.settings.covariates)))
    counted = ["domain", "documents_in", "documents_out", "documents_kept"]
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "documents in": float(change.documents["documents_in"].sum()),
            "documents out": float(change.documents["documents_out"].sum()),
            "covariates moved by 3 standard errors or more": float(moved.height),
            "documents": markdown_table(change.documents.select(counted).to_dicts()),
            "largest moves": markdown_table(
                moved.select("domain", "covariate", "before", "after", "z").to_dicts()
            ),
            "moves of the covariates in use": svg_picture(moves_plot(used), "moves"),
        },
    )


def profile_before(pool: LivePool, live_documents: pl.DataFrame) -> pl.DataFrame | None:
    """The profile that stood before this one, and remember this one; None for the first.

    Asked again with the same documents, it answers the same.
    """
    newest = pool.folder("history", "newest_profile.parquet")
    before = pool.folder("history", "profile_before.parquet")
    if not newest.is_file():
        write_value(newest, live_documents)
        return None
    seen = read_value(newest)
    if content_digest(seen) == content_digest(live_documents):
        return read_value(before) if before.is_file() else None
    write_value(before, seen)
    write_value(newest, live_documents)
    return seen
