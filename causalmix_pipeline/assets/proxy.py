"""Proxy runs: what they cost, training those that are missing, and the table of outcomes."""

import os
from collections.abc import Sequence
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import collect_runs
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.design import design_of, domains_of, specs_of, state_values
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.core.errors import ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.resources.frame_store import FRAME, VALUES
from causalmix_pipeline.resources.progress import Progress
from causalmix_pipeline.resources.project import Project

#: Dagster's concurrency pool of training steps: one at a time (`dagster.yaml`).
TRAINING_POOL = "proxy_training"

#: Optimiser steps of the calibration run; enough to leave the first, slow ones behind.
CALIBRATION_STEPS = 20

#: Nats a token by which a run must end below the entropy of the pool's tokens.
UNIGRAM_MARGIN = 1.0

#: Largest share of diverged proxy runs to go on with: more means that the recipe is wrong.
MAX_DIVERGED_SHARE = 0.05


def calibrate(config: ProxyConfig, n_models: int) -> float:
    """Measure a run's CPU seconds by training a stack of models for a few steps on random tokens.

    Returns:
        CPU seconds of one run of `config.steps` steps, evaluation left out.
    """
    from causalmix_pipeline.adapters.torch_proxy import train_stack

    short = replace(config, steps=CALIBRATION_STEPS)
    rng = np.random.default_rng(0)
    shape = (n_models, config.batch_size, config.sequence_length + 1)
    windows = rng.integers(0, config.vocab_size, shape[1:])
    result = train_stack(
        short, lambda step: rng.integers(0, config.vocab_size, shape), n_models, {"any": windows}
    )
    return result.cpu_seconds / CALIBRATION_STEPS * config.steps / n_models


def price_runs(project: Project, specs: Sequence[ProxySpec]) -> dict[str, float]:
    """What is to train, and what that costs on this machine."""
    store, proxy = project.run_store, project.settings.proxy
    config = proxy.to_config()
    n_all = len({spec.key for spec in specs})
    n_pending = len(store.missing(specs))
    seconds = calibrate(config, proxy.models_per_stack)
    workers = project.settings.backend.workers or os.cpu_count() or 1
    return {
        "proxy runs": float(n_all),
        "to train": float(n_pending),
        "million tokens a run": config.tokens / 1e6,
        "million tokens to train": n_pending * config.tokens / 1e6,
        "FLOPs to train": n_pending * config.flops,
        "parameters of a proxy": float(config.n_parameters),
        "CPU seconds a run": round(seconds, 2),
        "workers": float(workers),
        "hours": round(n_pending * seconds / workers / 3600, 4),
    }


@dg.asset(dagster_type=VALUES, group_name="experiment", kinds={"python"}, code_version="1")
def proxy_plan(
    project: dg.ResourceParam[Project], mixture_design: pl.DataFrame
) -> dg.MaterializeResult:
    """What the proxy runs cost, before any is trained: runs, tokens, FLOPs, hours on this machine.

    Measured by a short calibration run. Stale when the design changes.
    """
    specs = specs_of(project, mixture_design)
    price = price_runs(project, specs)
    # The version stands for what is planned, not for how fast the machine was just now.
    return dg.MaterializeResult(
        value=price,
        data_version=dg.DataVersion(content_digest([spec.key for spec in specs])),
        metadata=dict(price),
    )


@dg.op(out=dg.Out(list, description="Ids of the proxy runs without a record."))
def pending_proxy_runs(
    context: dg.OpExecutionContext,
    project: dg.ResourceParam[Project],
    mixture_design: pl.DataFrame,
    proxy_plan: dict,
) -> list:
    """List the proxy runs of the design that aren't in the run store yet."""
    pending = project.run_store.missing(specs_of(project, mixture_design))
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
    """Train the pending proxy runs; each is kept as it ends, so a killed study goes on."""
    wanted = set(pending)
    specs = [spec for spec in specs_of(project, mixture_design) if spec.key in wanted]
    progress = Progress(len(wanted), "proxy runs trained", context.log.info)
    project.backend.train(specs, lambda records: progress.add(len(records)))
    context.add_output_metadata({"proxy runs trained": float(len(wanted))})
    return {"trained": len(wanted)}


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
    shown = [name for name in frame.columns if name.startswith("bits_per_byte__")]
    context.log.info(f"proxy runs trained: {trained['trained']}")
    version = content_digest(frame.drop("cpu_seconds"))
    context.set_data_version(dg.AssetKey("proxy_runs"), dg.DataVersion(version))
    return dg.Output(
        frame,
        metadata={
            "proxy runs": float(frame.height),
            "trained now": float(trained["trained"]),
            "diverged": float(frame["diverged"].sum()),
            "CPU seconds a run": float(frame["cpu_seconds"].mean()),  # pyright: ignore[reportArgumentType]
            "bits per byte": markdown_table(
                [
                    {
                        "task": name.removeprefix("bits_per_byte__"),
                        "best": frame[name].min(),
                        "median": frame[name].median(),
                        "worst": frame[name].max(),
                    }
                    for name in shown
                ]
            ),
        },
    )


def read_records(project: Project, specs: Sequence[ProxySpec]) -> list[ProxyRecord]:
    """The record of each spec.

    Raises:
        ProxyError: if one is missing.
    """
    records = [project.run_store.get(spec.key) for spec in specs]
    missing = [spec.key for spec, record in zip(specs, records, strict=True) if record is None]
    if missing:
        raise ProxyError(
            f"{len(missing)} of {len(specs)} proxy runs have no record, such as {missing[0]}: "
            "materialise proxy_runs, which trains those that are missing."
        )
    return [record for record in records if record is not None]


def records_frame(records: Sequence[ProxyRecord], mixture_design: pl.DataFrame) -> pl.DataFrame:
    """One row per proxy run: its place in the design, losses, divergence, cost."""
    losses = {
        f"{kind}__{task}": [getattr(record, kind)[task] for record in records]
        for kind in ("bits_per_byte", "nats_per_token")
        for task in records[0].bits_per_byte
    }
    return mixture_design.select("proxy_run_id", "state_id", "cell").with_columns(
        **{name: pl.Series(values) for name, values in losses.items()},
        diverged=pl.Series([record.diverged for record in records]),
        last_train_loss=pl.Series([record.train_loss[-1] for record in records]),
        cpu_seconds=pl.Series([record.cpu_seconds for record in records]),
    )


def records_of(proxy_runs: pl.DataFrame, tasks: Sequence[str]) -> list[ProxyRecord]:
    """The outcomes of proxy runs as records again, from their table."""
    return [
        ProxyRecord(
            key=row["proxy_run_id"],
            spec={},
            bits_per_byte={task: row[f"bits_per_byte__{task}"] for task in tasks},
            nats_per_token={task: row[f"nats_per_token__{task}"] for task in tasks},
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


@dg.asset_check(
    asset=proxy_runs,
    additional_ins={"eval_tasks": dg.AssetIn(), "tokenizer": dg.AssetIn()},
    description="Every proxy run ends training a nat a token below the entropy of the pool's "
    "tokens: above that, it has learned only how often tokens occur.",
)
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
) -> dg.MaterializeResult:
    """One row per finished proxy run: covariates of its pool state, mixture, outcome per task.

    What every effect estimator is fitted on. Outcomes are minus bits per byte, so larger is
    better; diverged runs are left out. Stale when proxy runs or the list of covariates change.
    """
    domains = domains_of(mixture_design)
    runs = collect_runs(
        records_of(proxy_runs, eval_tasks["tasks"]),
        design_of(mixture_design),
        state_values(pool_states, len(domains), project.settings.covariates),
        domains=domains,
        covariates=project.settings.covariates,
        tasks=eval_tasks["tasks"],
    )
    frame = runs.to_frame()
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "runs": float(runs.n_runs),
            "left out (diverged)": float(proxy_runs.height - runs.n_runs),
            "pool states": float(runs.n_states),
            "covariates a domain": float(len(runs.covariates)),
        },
    )
