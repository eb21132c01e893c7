"""The two pools, and what is known of their documents."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import (
    PoolTokenizer,
    profile_documents,
    write_token_store,
)
from causalmix_pipeline.adapters.pool_reader import PoolDocuments, pool_fingerprint, read_pool
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.core.pool_state import COVARIATES, METRICS, measure_covariates
from causalmix_pipeline.resources.frame_store import (
    FRAME,
    VALUES,
    content_digest,
    read_value,
    write_value,
)
from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observed_version
from causalmix_pipeline.resources.project import Project

#: Fewest documents of a domain that pool states are drawn from.
MIN_DOCUMENTS = 20

#: What is kept of a scored document, by its content; the rest depends on the pool around it.
SCORE_COLUMNS = ["document_id", "n_bytes", "n_tokens"] + [
    name for name in METRICS if name not in ("near_duplicate", "bytes_per_token")
]


#: External: files that people write; it changes when its content is adopted by an observation.
experiment_pool = dg.AssetSpec(
    EXPERIMENT_POOL,
    group_name="experiment",
    kinds={"jsonl"},
    description="The pinned pool that proxy runs train on: a folder of JSONL and Parquet files. "
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
                kinds={"jsonl"},
                description="The pool to recommend a mixture for: a folder of JSONL and Parquet "
                "files that changes at any time. A sensor observes it. A change reaches the live "
                "side only, and trains no proxy.",
            )
        ],
    )
    def live_pool(project: dg.ResourceParam[Project]) -> Iterator[dg.ObserveResult]:
        """The content of the live pool."""
        version = dg.DataVersion(pool_fingerprint(project.settings.live_path))
        yield dg.ObserveResult(asset_key=LIVE_POOL, data_version=version)


def read_documents(
    project: Project, folder: Path, domains: Sequence[str] | None, quarantine: str
) -> PoolDocuments:
    """Read a pool, and keep its refused rows with their reasons in `data/quarantine`."""
    pool = read_pool(
        folder,
        project.columns,
        domains=domains,
        max_rejected_share=project.settings.quality.max_rejected_share,
    )
    write_value(project.folder("quarantine", f"{quarantine}.parquet"), pool.quarantine)
    return pool


def read_adopted_pool(context: dg.AssetExecutionContext, project: Project) -> PoolDocuments:
    """Read the experiment pool, which must be the one that was adopted.

    Raises:
        PoolError: if its content isn't what was observed last.
    """
    folder = project.settings.experiment_path
    adopted = observed_version(context.instance, EXPERIMENT_POOL)
    if adopted is not None and pool_fingerprint(folder) != adopted:
        raise PoolError(
            f"pools.experiment ({folder}) must be the pool that was adopted, got other content: "
            "put the files back, or run the job adopt_experiment_pool, which trains every "
            "proxy run anew."
        )
    return read_documents(project, folder, project.settings.domains, "experiment_pool")


def score_pool(
    project: Project, pool: PoolDocuments, tokenizer: PoolTokenizer, *, noise_seed: int | None
) -> tuple[pl.DataFrame, list[np.ndarray], int]:
    """Score documents, each content once: scores are kept by content hash in `data/scores`.

    Returns:
        The documents frame, their token ids, and how many contents were new.
    """
    path = project.folder("scores", f"{tokenizer.content_hash}.parquet")
    known = read_value(path) if path.is_file() else None
    documents, encoded = profile_documents(
        pool.documents, tokenizer, known_scores=known, noise_seed=noise_seed
    )
    scores = documents.select(SCORE_COLUMNS)
    if known is not None:
        scores = pl.concat([known, scores])
    scores = scores.unique("document_id", keep="first", maintain_order=True)
    n_new = scores.height - (0 if known is None else known.height)
    if n_new:
        write_value(path, scores)
    return documents, encoded, n_new


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


def pool_metadata(pool: PoolDocuments, documents: pl.DataFrame, n_new: int) -> dict:
    """What a person wants to know of a scored pool."""
    return {
        "documents": float(documents.filter(~pl.col("augmented")).height),
        "tokens": float(documents.filter(~pl.col("augmented"))["n_tokens"].sum()),
        "documents scored now": float(n_new),
        "rows rejected": float(pool.quarantine.height),
        "share rejected": pool.rejected_share,
        "first reasons": markdown_table(pool.quarantine.head(3).to_dicts()),
        "domains": markdown_table(domain_rows(documents)),
    }


@dg.asset(
    dagster_type=VALUES,
    group_name="experiment",
    kinds={"python"},
    code_version="1",
    deps=[experiment_pool],
)
def tokenizer(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """The byte-level BPE and the token frequencies that documents are measured by.

    Trained on the experiment pool; it also fixes the list of domains and their order. Stale when
    the experiment pool, the list of domains or the vocabulary size changes.
    """
    pool = read_adopted_pool(context, project)
    domains = project.settings.domains or pool.documents["domain"].unique().sort().to_list()
    if len(domains) < 2:
        raise PoolError(
            f"pools.experiment must hold two domains or more, got {domains}: with one there is "
            "nothing to mix. Put documents of another domain into a folder of their own, or name "
            "the column in columns.domain."
        )
    fitted = PoolTokenizer.fit(
        pool.documents, vocab_size=project.settings.proxy.to_config().vocab_size
    )
    unigram_V = np.sum([half.unigram_V for half in fitted.language_model.halves], axis=0)
    value = {"domains": domains, "unigram_nats": fitted.unigram_nats, **fitted.to_dict()}
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "vocabulary": float(len(unigram_V)),
            "tokens read": float(unigram_V.sum()),
            "unigram entropy, nats a token": fitted.unigram_nats,
            "domains": ", ".join(domains),
        },
    )


@dg.asset(
    dagster_type=FRAME,
    group_name="experiment",
    kinds={"polars"},
    code_version="1",
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
    when the experiment pool or the tokenizer changes.
    """
    pool, fitted = read_adopted_pool(context, project), PoolTokenizer.from_dict(tokenizer)
    noise_seed = project.settings.design.seed if project.state_ranges.noise > 0 else None
    documents, encoded, n_new = score_pool(project, pool, fitted, noise_seed=noise_seed)
    tokens_hash = write_token_store(project.run_store, documents, encoded, fitted)
    documents = documents.with_columns(tokens_hash=pl.lit(tokens_hash))
    least = min(domain_rows(documents), key=lambda row: row["documents"])
    return dg.MaterializeResult(
        value=documents,
        data_version=dg.DataVersion(content_digest(documents)),
        metadata=pool_metadata(pool, documents, n_new),
        check_results=[
            dg.AssetCheckResult(
                check_name="enough_documents",
                passed=least["documents"] >= MIN_DOCUMENTS,
                description=f"every domain must have {MIN_DOCUMENTS} documents or more; the "
                f"smallest is {least['domain']!r}, got {least['documents']}: add documents, or "
                "leave it out of `domains`.",
            )
        ],
    )


@dg.asset(
    dagster_type=FRAME, group_name="live", kinds={"polars"}, code_version="1", deps=[live_pool]
)
def live_documents(project: dg.ResourceParam[Project], tokenizer: dict) -> dg.MaterializeResult:
    """One row per document of the live pool, with its metrics; no text.

    Scores are kept by content, so only new documents are scored. Stale when the live pool or the
    tokenizer changes.
    """
    pool = read_documents(project, project.settings.live_path, tokenizer["domains"], "live_pool")
    fitted = PoolTokenizer.from_dict(tokenizer)
    documents, _, n_new = score_pool(project, pool, fitted, noise_seed=None)
    return dg.MaterializeResult(
        value=documents,
        data_version=dg.DataVersion(content_digest(documents)),
        metadata=pool_metadata(pool, documents, n_new),
    )


@dg.asset(
    dagster_type=FRAME,
    group_name="live",
    kinds={"polars"},
    code_version="1",
    check_specs=[
        dg.AssetCheckSpec(
            "no_covariate_missing",
            asset="live_covariates",
            blocking=True,
            description="Every covariate of every domain is a finite number.",
        )
    ],
)
def live_covariates(tokenizer: dict, live_documents: pl.DataFrame) -> dg.MaterializeResult:
    """One row per domain of the live pool: documents, tokens, token share and every covariate.

    Measured per domain before anything is mixed. Stale when the live documents change.
    """
    domains = tokenizer["domains"]
    values_DP = measure_covariates(live_documents, domains)
    frame = describe_domains(live_documents, domains).hstack(
        pl.DataFrame(values_DP, schema=list(COVARIATES))
    )
    missing = int((~np.isfinite(values_DP)).sum())
    shown = ["domain", "documents", "tokens", "natural_share", "duplicate_share"]
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "tokens": float(frame["tokens"].sum()),
            "covariates": markdown_table(frame.select(shown).to_dicts()),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="no_covariate_missing",
                passed=missing == 0,
                metadata={"missing": missing},
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
