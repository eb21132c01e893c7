"""Proxy runs: training those that are missing, and the table of outcomes."""

from collections.abc import Sequence

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import collect_runs
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.column_lineage import run_table_lineage
from causalmix_pipeline.assets.design import design_of, domains_of, specs_of, state_values
from causalmix_pipeline.assets.imported import join_imported
from causalmix_pipeline.assets.pictures import (
    histogram,
    loss_curves,
    markdown_table,
    number,
    svg_picture,
)
from causalmix_pipeline.assets.plan import refuse_over_budget
from causalmix_pipeline.assets.sizes import with_sizes
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.frame_store import FRAME
from causalmix_pipeline.resources.progress import TrainingProgress
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: Dagster's concurrency pool of training steps: one at a time (`dagster.yaml`).
TRAINING_POOL = "proxy_training"

#: Nats a token by which a run must end below the entropy of the pool's tokens.
UNIGRAM_MARGIN = 1.0

#: Finished runs whose loss curves are shown while others train.
SHOWN_RUNS = 8

#: Largest share of diverged proxy runs to go on with: more means that the recipe is wrong.
MAX_DIVERGED_SHARE = 0.05

#: What a table's columns of outcomes begin with, and the record's field they are from.
OUTCOME_COLUMNS = {
    "bits_per_byte": "bits_per_byte",
    "nats_per_token": "nats_per_token",
    "score": "scores",
}


@dg.op(out=dg.Out(list, description="Ids of the proxy runs without a record."))
def pending_proxy_runs(
    context: dg.OpExecutionContext,
    project: dg.ResourceParam[Project],
    mixture_design: pl.DataFrame,
    proxy_plan: dict,
) -> list:
    """List the proxy runs of the design that aren't in the run store yet.

    Refuses to go on where they cost more than the budget allows and nobody agreed to it.
    """
    specs = specs_of(project, mixture_design)
    # The plan's own check stops only the run that made the plan.
    refuse_over_budget(project, specs, context.run.tags)
    pending = project.run_store.missing(specs)
    context.log.info(
        f"{len(pending)} of {mixture_design.height} proxy runs to train, "
        f"about {proxy_plan['CPU seconds a run']:.1f} CPU seconds each"
    )
    return [spec.key for spec in pending]


@dg.op(
    pool=TRAINING_POOL,
    out=dg.Out(dict, description="How many proxy runs were trained now."),
)
def train_proxy_runs(
    context: dg.OpExecutionContext,
    project: dg.ResourceParam[Project],
    mixture_design: pl.DataFrame,
    pending: list,
) -> dict:
    """Train the pending proxy runs; each is kept as it ends, so a killed study goes on.

    A run that fails again and again is given up, the others are trained; then the step fails.
    """
    wanted = set(pending)
    specs = [spec for spec in specs_of(project, mixture_design) if spec.key in wanted]
    domains = domains_of(mixture_design)
    progress = train_watched(
        context, project, specs, asset=asset_key(project.settings, "proxy_runs"), domains=domains
    )
    context.add_output_metadata(training_figures(progress, domains))
    return {"trained": progress.done, "tokens per second": progress.tokens_per_second}


def train_watched(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    project: Project,
    specs: Sequence[ProxySpec],
    *,
    asset: dg.AssetKey,
    domains: Sequence[str],
) -> TrainingProgress:
    """Train runs that lack a record, with progress lines, and loss curves as observations.

    Args:
        context: whose log and event list show how it goes.
        project: store and backend.
        specs: the runs; those that have a record aren't trained.
        asset: what the runs are of; its observations carry the pictures.
        domains: in the order of the specs' mixtures.

    Raises:
        ProxyError: at the end, if runs were given up.
    """

    def look(progress: TrainingProgress) -> None:
        metadata = training_figures(progress, domains)
        context.log_event(dg.AssetObservation(asset, metadata=metadata))

    missing = project.run_store.missing(specs)
    what = f"{asset.path[-1].replace('_runs', '')} runs trained"
    progress = TrainingProgress(missing, what, context.log.info, look)
    project.backend.train(
        missing,
        progress.on_done,
        on_failed=progress.on_failed,
        on_started=progress.on_started,
    )
    return progress


def training_figures(
    progress: TrainingProgress, domains: Sequence[str]
) -> dict[str, dg.MetadataValue]:
    """What became of the runs that were to train, how fast, and the last ones' loss curves."""
    figures = {
        "to train": dg.MetadataValue.int(progress.total),
        "done": dg.MetadataValue.int(progress.done),
        "failed": dg.MetadataValue.int(progress.failed),
        "diverged": dg.MetadataValue.int(progress.diverged),
        "running": dg.MetadataValue.int(len(progress.running)),
        "tokens per second": dg.MetadataValue.float(round(progress.tokens_per_second, 1)),
    }
    if progress.records:
        curves = [record.train_loss for record in progress.records[-SHOWN_RUNS:]]
        figures["loss of the last runs"] = svg_picture(loss_curves(curves), "losses")
        figures["most epochs that a run read"] = markdown_table(
            most_epochs(progress.records, domains)
        )
    return figures


@dg.op(out=dg.Out(pl.DataFrame, io_manager_key="io_manager"))
def collect_proxy_runs(
    context: dg.OpExecutionContext,
    project: dg.ResourceParam[Project],
    mixture_design: pl.DataFrame,
    trained: dict,
) -> dg.Output[pl.DataFrame]:
    """Read the records of all proxy runs of the design, in its order."""
    records = read_records(project, specs_of(project, mixture_design))
    frame = records_frame(records, mixture_design)
    context.log.info(f"proxy runs trained: {trained['trained']}")
    version = content_digest(frame.drop("cpu_seconds"))
    context.set_data_version(asset_key(project.settings, "proxy_runs"), dg.DataVersion(version))
    return dg.Output(
        frame,
        metadata={
            "proxy runs": float(frame.height),
            "trained now": float(trained["trained"]),
            "diverged": float(frame["diverged"].sum()),
            "tokens per second": round(trained["tokens per second"], 1),
            "CPU seconds a run": number(float(frame["cpu_seconds"].mean())),  # pyright: ignore[reportArgumentType]
            "outcomes": markdown_table(outcome_rows(frame)),
            "most epochs that a run read": markdown_table(
                most_epochs(records, domains_of(mixture_design))
            ),
            "loss of the last runs": svg_picture(
                loss_curves([record.train_loss for record in records[-SHOWN_RUNS:]]), "losses"
            ),
        },
    )


def outcome_rows(proxy_runs: pl.DataFrame) -> list[dict]:
    """A row per task: best, middle and worst loss, or score of questions, and the noise of seeds.

    The noise is the standard deviation of runs of one pair of state and mixture.
    """
    rows = []
    for name in proxy_runs.columns:
        column, _, task = name.partition("__")
        values = proxy_runs[name].drop_nulls() if column in OUTCOME_COLUMNS else pl.Series()
        if column == "nats_per_token" or not values.len():
            continue
        ends = [float(values.min()), float(values.max())]  # pyright: ignore[reportArgumentType]
        best, worst = reversed(ends) if column == "score" else ends
        rows.append(
            {
                "task": task,
                "of": "score" if column == "score" else "bits/byte",
                "best": best,
                "median": float(values.median()),  # pyright: ignore[reportArgumentType]
                "worst": worst,
                "seed sd": seed_sd(proxy_runs, name),
                "least to largest": histogram(values.to_list(), *ends, cells=10),
            }
        )
    return rows


def seed_sd(proxy_runs: pl.DataFrame, outcome: str) -> float | None:
    """Standard deviation of an outcome over seeds, pooled over repeated pairs; None without any."""
    cells = (
        proxy_runs.drop_nulls(outcome)
        .group_by("cell")
        .agg(n=pl.len() - 1, square=((pl.col(outcome) - pl.col(outcome).mean()) ** 2).sum())
    )
    freedom, square = int(cells["n"].sum()), float(cells["square"].sum())
    return (square / freedom) ** 0.5 if freedom else None


def read_records(project: Project, specs: Sequence[ProxySpec]) -> list[ProxyRecord]:
    """The record of each spec.

    Raises:
        ProxyError: if one is missing.
    """
    records = [project.run_store.get(spec.key) for spec in specs]
    missing = [spec.key for spec, record in zip(specs, records, strict=True) if record is None]
    if missing:
        failed = list(project.run_store.failed(missing).values())
        why = ""
        if failed:
            why = (
                f" {len(failed)} of them were tried and failed; {failed[0].key} after "
                f"{failed[0].tries} tries: {failed[0].reason}"
            )
        raise ProxyError(
            f"{len(missing)} of {len(specs)} proxy runs have no record, such as {missing[0]}: "
            f"materialise proxy_runs, which trains those that are missing.{why}"
        )
    return [record for record in records if record is not None]


def most_epochs(records: Sequence[ProxyRecord], domains: Sequence[str]) -> list[dict]:
    """Most often that any of the runs read each domain's data."""
    read = np.array([record.epochs for record in records if record.epochs])  # (N, D)
    if not read.size:  # records of an earlier version
        return []
    return [
        {"domain": domain, "most epochs": float(most)}
        for domain, most in zip(domains, read.max(axis=0), strict=True)
    ]


def records_frame(records: Sequence[ProxyRecord], mixture_design: pl.DataFrame) -> pl.DataFrame:
    """One row per proxy run: its place in the design, losses, scores, divergence, cost.

    A diverged run has no outcome: its losses and scores are null.
    """
    losses = {}
    for column, kind in OUTCOME_COLUMNS.items():
        tasks = dict.fromkeys(task for record in records for task in getattr(record, kind))
        for task in tasks:
            values = [
                None if record.diverged else getattr(record, kind).get(task) for record in records
            ]
            losses[f"{column}__{task}"] = pl.Series(values, dtype=pl.Float64)
    return mixture_design.select("proxy_run_id", "state_id", "cell").with_columns(
        **losses,
        diverged=pl.Series([record.diverged for record in records]),
        last_train_loss=pl.Series([record.train_loss[-1] for record in records]),
        cpu_seconds=pl.Series([record.cpu_seconds for record in records]),
    )


def records_of(proxy_runs: pl.DataFrame, tasks: Sequence[str]) -> list[ProxyRecord]:
    """The outcomes of proxy runs as records again, from their table."""

    def outcomes(row: dict, column: str) -> dict[str, float]:
        values = {task: row.get(f"{column}__{task}") for task in tasks}
        return {task: value for task, value in values.items() if value is not None}

    return [
        ProxyRecord(
            key=row["proxy_run_id"],
            spec={},
            **{kind: outcomes(row, column) for column, kind in OUTCOME_COLUMNS.items()},  # pyright: ignore[reportArgumentType]
            train_loss=[row["last_train_loss"]],
            diverged=row["diverged"],
            cpu_seconds=row["cpu_seconds"],
        )
        for row in proxy_runs.iter_rows(named=True)
    ]


@dg.graph_asset(
    group_name="experiment",
    kinds={"torch"},
    code_version="1",
    description="One row per proxy run: held-out loss of each task in bits per byte, whether it "
    "diverged, what it cost.\n\nSmall models trained from scratch, each on one mixture of one pool "
    "state. Only runs that aren't in the run store are trained, in worker processes. Stale when "
    "the design changes; never because of the live pool.",
)
def proxy_runs(mixture_design: pl.DataFrame, proxy_plan: dict):
    """What is pending, train it, collect."""
    pending = pending_proxy_runs(mixture_design, proxy_plan)
    return collect_proxy_runs(mixture_design, train_proxy_runs(mixture_design, pending))


@dg.asset_check(
    asset=proxy_runs,
    blocking=True,
    description="At most 5% of the proxy runs diverged; more means that the recipe is wrong.",
)
def few_diverged(proxy_runs: pl.DataFrame) -> dg.AssetCheckResult:
    """At most a small share of the proxy runs diverged."""
    share = float(proxy_runs["diverged"].mean())  # pyright: ignore[reportArgumentType]
    return dg.AssetCheckResult(
        passed=share <= MAX_DIVERGED_SHARE,
        metadata={"share diverged": share, "limit": MAX_DIVERGED_SHARE},
    )


def make_unigram_check(settings: Settings) -> dg.AssetChecksDefinition:
    """The check that proxies learned more than how often tokens occur.

    Made for a project's keys: Dagster's loader puts no name in front of additional inputs.
    """
    names = ("eval_tasks", "tokenizer")
    check = dg.asset_check(
        name="past_the_unigram_regime",
        asset=asset_key(settings, "proxy_runs"),
        additional_ins={name: dg.AssetIn(key=asset_key(settings, name)) for name in names},
        description="Every proxy run ends training a nat a token below the entropy of the pool's "
        "tokens: above that, it has learned only how often tokens occur.",
    )
    return check(past_the_unigram_regime)


def past_the_unigram_regime(
    proxy_runs: pl.DataFrame, eval_tasks: dict, tokenizer: dict
) -> dg.AssetCheckResult:
    """The proxies learned more than token frequencies."""
    margin = tokenizer["unigram_nats"] - proxy_runs["last_train_loss"]
    held_out = {
        f"{task}: median held-out nats below its unigrams": entropy
        - float(proxy_runs[f"nats_per_token__{task}"].median())  # pyright: ignore[reportArgumentType]
        for task, entropy in eval_tasks["unigram_nats"].items()
    }
    return dg.AssetCheckResult(
        passed=bool((margin >= UNIGRAM_MARGIN).all()),
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"least training nats below unigrams": float(margin.min()), **held_out},  # pyright: ignore[reportArgumentType]
    )


@dg.asset(dagster_type=FRAME, group_name="experiment", kinds={"polars"}, code_version="1")
def run_table(
    project: dg.ResourceParam[Project],
    proxy_runs: pl.DataFrame,
    pool_states: pl.DataFrame,
    mixture_design: pl.DataFrame,
    eval_tasks: dict,
    imported_runs: pl.DataFrame,
) -> dg.MaterializeResult:
    """One row per finished proxy run: covariates of its pool state, mixture, outcome per task.

    What every effect estimator is fitted on. Outcomes are minus bits per byte of held-out text, or
    the score on questions, so larger is better; runs that diverged or lack one are left out.
    Imported runs come after the own ones, each source on the level of these. Where proxies have
    several sizes, log2_parameters is a covariate. Stale when proxy runs, imported runs or the list
    of covariates change.
    """
    domains = domains_of(mixture_design)
    values_MDP = state_values(pool_states, len(domains), project.settings.covariates)
    runs = collect_runs(
        records_of(proxy_runs, eval_tasks["tasks"]),
        design_of(mixture_design),
        with_sizes(project.settings, values_MDP, mixture_design),
        domains=domains,
        covariates=project.settings.run_covariates,
        tasks=eval_tasks["tasks"],
        directions=project.settings.task_directions,
    )
    left_out = proxy_runs.height - runs.n_runs
    runs, found = join_imported(runs, imported_runs)
    frame = runs.to_frame()
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "runs": float(runs.n_runs),
            "left out (diverged or without an outcome)": float(left_out),
            "pool states": float(runs.n_states),
            "covariates a domain": float(len(runs.covariates)),
            "runs by source": markdown_table(
                [
                    {"source": source, "runs": runs.sources_of_runs.count(source)}
                    for source in runs.sources
                ]
            ),
            "outcomes, larger is better": markdown_table(
                [
                    {
                        "task": task,
                        "least": float(outcome_N.min()),
                        "median": float(np.median(outcome_N)),
                        "largest": float(outcome_N.max()),
                        "least to largest": histogram(
                            outcome_N.tolist(), float(outcome_N.min()), float(outcome_N.max())
                        ),
                    }
                    for task, outcome_N in zip(runs.tasks, runs.outcome_NT.T, strict=True)
                ]
            ),
            **found,
            **run_table_lineage(project.settings, runs, proxy_runs),
        },
    )
