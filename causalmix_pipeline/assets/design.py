"""What the experiment trains: tasks, pool states, mixtures, and what that costs."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.demo_pool import count_shared_ngrams
from causalmix_pipeline.adapters.experiment import (
    DomainSampler,
    PoolTokenizer,
    build_evaluation,
    draw_states,
    fit_normaliser,
    keep_states,
    make_specs,
    spec_table,
)
from causalmix_pipeline.adapters.local_backend import engine_name
from causalmix_pipeline.adapters.pool_files import pool_files
from causalmix_pipeline.adapters.profiler import pool_batches
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.core.covariates import QUANTILES
from causalmix_pipeline.core.design import Design, make_design
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.resources.frame_store import FRAME, VALUES
from causalmix_pipeline.resources.project import Project


def read_task_texts(project: Project) -> dict[str, list[str]]:
    """The held-out documents of each task.

    Raises:
        ConfigError: if no task is named.
        PoolError: if a task's file is missing or holds no usable text.
    """
    settings = project.settings
    if not settings.tasks:
        raise ConfigError(
            "tasks must hold at least one task, got none: say in the settings what the model shall "
            "be good at, with held-out text of it."
        )
    texts = {}
    for i, (name, path) in enumerate(settings.task_paths.items()):
        if not path.is_file():
            raise PoolError(
                f"tasks[{i}].path must be a JSONL or Parquet file, got {path}, which isn't there: "
                "correct the path, or put held-out text there."
            )
        texts[name] = read_text_column(path, settings.columns.text)
    return texts


def read_text_column(path: Path, column: str) -> list[str]:
    """The texts of one file; held-out text must be clean, so nothing is left out.

    Raises:
        PoolError: if the file can't be read, lacks the column, or holds no text there.
    """
    try:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_ndjson(path)
        texts = frame[column].cast(pl.String).drop_nulls().to_list()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PoolError(f"{path} must hold text in column {column!r}, got: {error}.") from error
    if not any(text.strip() for text in texts):
        raise PoolError(f"{path} must hold text in column {column!r}, got none: add documents.")
    return texts


@dg.asset(
    dagster_type=VALUES,
    group_name="experiment",
    kinds={"python"},
    code_version="1",
    deps=["experiment_pool"],
    check_specs=[
        dg.AssetCheckSpec(
            "held_out",
            asset="eval_tasks",
            blocking=True,
            description="No 13 words in a row are shared by a task's text and the experiment pool.",
        )
    ],
)
def eval_tasks(project: dg.ResourceParam[Project], tokenizer: dict) -> dg.MaterializeResult:
    """What the model shall be good at: held-out text of each task, cut into windows.

    Its loss, in bits per byte, is the outcome of a proxy run. Stale when a task's text, the
    tokenizer or the window length changes; a weight may change freely.
    """
    texts, fitted = read_task_texts(project), PoolTokenizer.from_dict(tokenizer)
    length = project.settings.proxy.to_config().sequence_length
    evaluation, eval_hash = build_evaluation(texts, fitted, sequence_length=length)
    project.run_store.put_eval(eval_hash, evaluation)
    spec = project.pool_spec(project.settings.experiment_path, tokenizer["domains"])
    pool = (
        text
        for file in pool_files(spec.location)
        for documents, _, _ in pool_batches(file, spec)
        for text in documents["text"]
    )
    held_out = [text for of_task in texts.values() for text in of_task]
    n_shared = count_shared_ngrams(pool, held_out)
    rows = [
        {
            "task": task,
            "weight": project.settings.task_weights[task],
            "documents": len(texts[task]),
            "windows": len(windows),
            "bytes": evaluation.n_bytes[task],
            "unigram nats": evaluation.unigram_nats[task],
        }
        for task, windows in evaluation.windows.items()
    ]
    value = {
        "eval_hash": eval_hash,
        "tasks": list(texts),
        "unigram_nats": evaluation.unigram_nats,
        "n_bytes": evaluation.n_bytes,
    }
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={"tasks": markdown_table(rows)},
        check_results=[
            dg.AssetCheckResult(
                check_name="held_out", passed=n_shared == 0, metadata={"shared": n_shared}
            )
        ],
    )


#: Columns of the states' table that aren't covariates.
STATE_COLUMNS = (
    "state_id",
    "domain",
    "source_shares",
    "size_share",
    "tilt",
    "unique_share",
    "noise_share",
    "state_hash",
    "tokens_hash",
)


@dg.asset(dagster_type=FRAME, group_name="experiment", kinds={"polars"}, code_version="2")
def pool_states(
    project: dg.ResourceParam[Project], tokenizer: dict, experiment_documents: pl.DataFrame
) -> dg.MaterializeResult:
    """One row per pool state and domain: how it was drawn from the experiment pool, its covariates.

    A state is a sub-pool that proxies train on; the states must reach as far as the live pool may
    drift. Every covariate that can be measured is; the settings say which are used. Stale when the
    experiment documents or the rules of drawing change.
    """
    domains, store = tokenizer["domains"], project.run_store
    states = draw_states(
        experiment_documents,
        domains,
        project.state_ranges,
        n_states=project.design_plan.n_states,
        seed=project.design_plan.seed,
        sampler=state_sampler(project, tokenizer, experiment_documents),
        also=quantiles_of(project.settings.covariates),
    )
    hashes = keep_states(store, experiment_documents, domains, states.memberships)
    frame = states.frame(domains).with_columns(
        state_hash=pl.Series(np.repeat(hashes, len(domains))),
        tokens_hash=pl.lit(experiment_documents["tokens_hash"][0]),
    )
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "states": float(len(hashes)),
            "covariates a domain": float(len(states.covariates)),
            "reach of the covariates": markdown_table(covariate_reach(frame)),
        },
    )


def state_sampler(
    project: Project, tokenizer: dict, experiment_documents: pl.DataFrame
) -> DomainSampler:
    """Reads the text of pool states from the token store."""
    tokens = project.run_store.token_store(experiment_documents["tokens_hash"][0])
    ids = experiment_documents["document_id"].to_list()
    return DomainSampler(tokens, tokenizer["tokenizer"], ids)


def quantiles_of(covariates: Sequence[str]) -> list[str]:
    """The quantiles among covariates; every other one is measured anyway."""
    return [name for name in covariates if name.endswith(tuple(QUANTILES))]


@dg.asset(dagster_type=VALUES, group_name="experiment", kinds={"polars"}, code_version="1")
def normaliser(
    project: dg.ResourceParam[Project], tokenizer: dict, experiment_documents: pl.DataFrame
) -> dg.MaterializeResult:
    """Location and scale of each covariate over states of the experiment pool, and their scorers.

    The unit in which moves of a later pool are told; a pool that was measured by other scorers is
    refused. Stale when the experiment documents or the rules of drawing change.
    """
    fitted = fit_normaliser(
        experiment_documents,
        tokenizer["domains"],
        project.state_ranges,
        seed=project.design_plan.seed,
        sampler=state_sampler(project, tokenizer, experiment_documents),
        also=quantiles_of(project.settings.covariates),
    )
    value = fitted.to_dict()
    spread = pl.DataFrame({"covariate": fitted.covariates}).with_columns(
        pl.Series(domain, fitted.scale_DP[d]) for d, domain in enumerate(fitted.domains)
    )
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "version": fitted.version,
            "scorers": ", ".join(fitted.scorers),
            "one unit, by domain": markdown_table(spread.to_dicts()),
        },
    )


def covariate_reach(states: pl.DataFrame) -> list[dict]:
    """Least, middle and largest value of each covariate over states and domains."""
    return [
        {
            "covariate": name,
            "least": float(states[name].min()),  # pyright: ignore[reportArgumentType]
            "median": float(states[name].median()),  # pyright: ignore[reportArgumentType]
            "largest": float(states[name].max()),  # pyright: ignore[reportArgumentType]
        }
        for name in states.columns
        if name not in STATE_COLUMNS
    ]


def state_values(states: pl.DataFrame, n_domains: int, covariates: Sequence[str]) -> np.ndarray:
    """Raw covariates of each state; shape (M, D, P).

    Raises:
        PoolError: if a covariate has no value in some domain.
    """
    missing = [name for name in covariates if name not in states.columns]
    if missing:
        raise PoolError(
            f"covariates must be measured in the experiment, got {missing[0]!r}, which pool_states "
            "lacks: materialise experiment_documents and what follows."
        )
    for name in covariates:
        absent = states.filter(~pl.col(name).is_finite().fill_null(False))
        if absent.height:
            raise PoolError(
                f"covariates must have a value in every domain, got none of {name!r} in "
                f"{absent['domain'][0]!r}: take it off the list."
            )
    return states.select(covariates).to_numpy().reshape(-1, n_domains, len(covariates))


def design_of(mixture_design: pl.DataFrame) -> Design:
    """The design as arrays, from its table."""
    shares = [name for name in mixture_design.columns if name.startswith("share__")]
    return Design(
        state_N=mixture_design["state_id"].to_numpy(),
        mixture_ND=mixture_design.select(shares).to_numpy(),
        data_seed_N=mixture_design["data_seed"].to_numpy(),
        cell_N=mixture_design["cell"].to_numpy(),
    )


def domains_of(mixture_design: pl.DataFrame) -> list[str]:
    """The domains of a design's table, in order."""
    names = mixture_design.columns
    return [name.removeprefix("share__") for name in names if name.startswith("share__")]


def specs_of(project: Project, mixture_design: pl.DataFrame) -> list[ProxySpec]:
    """The spec of each proxy run of a design's table.

    Raises:
        ConfigError: if the settings or the engine changed since the table was made.
    """
    config = project.settings.proxy.to_config()
    hashes = {
        state: name for state, name in mixture_design.select("state_id", "state_hash").iter_rows()
    }
    specs = make_specs(
        design_of(mixture_design),
        [hashes[state] for state in range(len(hashes))],
        tokens_hash=mixture_design["tokens_hash"][0],
        eval_hash=mixture_design["eval_hash"][0],
        config=config,
    )
    if [spec.key for spec in specs] != mixture_design["proxy_run_id"].to_list():
        raise ConfigError(
            "proxy settings or the training engine changed since mixture_design was made: "
            "materialise mixture_design first, then proxy_runs."
        )
    return specs


@dg.asset(
    dagster_type=FRAME,
    group_name="experiment",
    kinds={"polars"},
    code_version="1",
    check_specs=[
        dg.AssetCheckSpec(
            "mixtures_sum_to_one",
            asset="mixture_design",
            blocking=True,
            description="Every mixture has shares >= 0 that sum to 1.",
        )
    ],
)
def mixture_design(
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    eval_tasks: dict,
    pool_states: pl.DataFrame,
) -> dg.MaterializeResult:
    """One row per proxy run to make: a pool state, a mixture, a seed.

    States and mixtures are drawn independently; a few pairs are repeated with other seeds, which
    measures the noise floor. Row i stays the same when the design grows. Stale when states, tasks,
    design or proxy settings change.
    """
    domains, plan = tokenizer["domains"], project.design_plan
    design = make_design(plan, len(domains))
    hashes = pool_states.unique("state_id", maintain_order=True)["state_hash"].to_list()
    tokens_hash, eval_hash = pool_states["tokens_hash"][0], eval_tasks["eval_hash"]
    specs = make_specs(
        design,
        hashes,
        tokens_hash=tokens_hash,
        eval_hash=eval_hash,
        config=project.settings.proxy.to_config(),
    )
    frame = spec_table(specs, design, domains).with_columns(
        tokens_hash=pl.lit(tokens_hash), eval_hash=pl.lit(eval_hash)
    )
    worst = float(np.abs(design.mixture_ND.sum(axis=1) - 1).max())
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "proxy runs": float(len(specs)),
            "distinct pairs": float(plan.n_runs),
            "pool states": float(len(hashes)),
            "engine": engine_name(),
            "shares": markdown_table(share_reach(design, domains)),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="mixtures_sum_to_one",
                passed=worst < 1e-6 and bool((design.mixture_ND >= 0).all()),
                metadata={"largest deviation": worst},
            )
        ],
    )


def share_reach(design: Design, domains: list[str]) -> list[dict]:
    """Least, middle and largest share of each domain over the design."""
    return [
        {
            "domain": domain,
            "least": float(share_N.min()),
            "median": float(np.median(share_N)),
            "largest": float(share_N.max()),
        }
        for domain, share_N in zip(domains, design.mixture_ND.T, strict=True)
    ]
