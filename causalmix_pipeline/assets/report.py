"""The report that people read: one HTML file, and the short of it as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.beliefs_html import Beliefs
from causalmix_pipeline.adapters.interpretation_html import Interpretation
from causalmix_pipeline.adapters.report_data import ReportData
from causalmix_pipeline.adapters.report_html import write_report
from causalmix_pipeline.adapters.report_markdown import write_markdown
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.adapters.what_if_html import WhatIf
from causalmix_pipeline.assets.interpretation import live_interpretation
from causalmix_pipeline.assets.other_weights import other_weights
from causalmix_pipeline.assets.recommendation import weights_of
from causalmix_pipeline.assets.recommendation_metadata import in_short
from causalmix_pipeline.assets.report_history import origins, recommendation_history
from causalmix_pipeline.core.belief import UNSUPPORTED_FACTOR
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.top_up import stack_top_ups
from causalmix_pipeline.resources.frame_store import VALUES
from causalmix_pipeline.resources.live_pools import pool_of_run
from causalmix_pipeline.resources.project import Project


def covariate_rows(live_covariates: pl.DataFrame, runs: RunTable) -> pl.DataFrame:
    """Each covariate of each domain: its live value, and its value in every state of the runs."""
    _, state_SDP = runs.distinct_states()
    rows = [
        {
            "domain": domain,
            "covariate": name,
            "live": float(live_covariates[name][d]),
            "states": state_SDP[:, d, p].tolist(),
        }
        for d, domain in enumerate(runs.domains)
        for p, name in enumerate(runs.covariates)
    ]
    return pl.DataFrame(rows)


def prediction_rows(runs: RunTable, cate_model: Mapping) -> pl.DataFrame:
    """Outcome of each proxy run beside its out-of-fold prediction, a row per run and task."""
    parts = [
        pl.DataFrame(
            {
                "observed": runs.outcome_NT[:, t],
                "predicted": cate_model["out_of_fold"][task],
            }
        ).select(pl.lit(task).alias("task"), pl.all())
        for t, task in enumerate(runs.tasks)
    ]
    return pl.concat(parts)


def signal_rows(
    cate_checks: Mapping, proxy_runs: pl.DataFrame, eval_tasks: Mapping
) -> pl.DataFrame:
    """Noise floor of each task, and how far its proxies are past the unigram regime."""
    rows = [
        {
            **row,
            "nats_per_token": None
            if row["task"] not in eval_tasks["unigram_nats"]  # questions have no loss
            else proxy_runs[f"nats_per_token__{row['task']}"].median(),
            "unigram_nats": eval_tasks["unigram_nats"].get(row["task"]),
        }
        for row in cate_checks["noise_floor"]
    ]
    floats = ("mixture_variance", "seed_variance", "ratio", "nats_per_token", "unigram_nats")
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(floats, pl.Float64))


def beliefs_of(cate_checks: Mapping) -> Beliefs:
    """What the checks of the effect model found, for the report."""
    found = cate_checks["robustness"]
    known = "value" in found
    return Beliefs(
        treatment_r2=cate_checks["treatment_r2"],
        observational_sources=cate_checks.get("observational_sources", ()),
        trials=cate_checks["falsification"],
        gain_of="the best mixtures of the runs",
        confounder=(found["value"], found["value_lower"]) if known else None,
        why_unknown="" if known else found["shown"]["can't be told"],
        more_runs=cate_checks["learning_curve"]["sentence"],
    )


def rows_frame(rows: list[dict]) -> pl.DataFrame:
    """Rows as a frame whose number columns stay numbers where every value is unknown."""
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(pl.col(pl.Null).cast(pl.Float64))


def report_data(
    recommended: Mapping,
    live_covariates: pl.DataFrame,
    runs: RunTable,
    cate_model: Mapping,
    signal: pl.DataFrame,
    interpretation: Interpretation | None = None,
    beliefs: Beliefs | None = None,
    stacked: RunTable | None = None,
    *,
    what_if: WhatIf | None = None,
    learning_curve: Sequence[Mapping[str, Any]] = (),
    history: pl.DataFrame | None = None,
    origins: Mapping[str, str] | None = None,
) -> ReportData:
    """Everything the report shows.

    `stacked` is the run table with its top-ups, if it has some; `origins` are fingerprints,
    versions and seeds that the values themselves don't hold.
    """
    stacked = stacked or runs
    n_top_ups = stacked.n_runs - runs.n_runs
    slack_schema = {
        "constraint": pl.String,
        "value": pl.Float64,
        "limit": pl.Float64,
        "slack": pl.Float64,
        "binds": pl.Boolean,
    }
    return ReportData(
        domains=runs.domains,
        mixtures={name: tuple(shares) for name, shares in recommended["mixtures"].items()},
        reference_name=recommended["reference_name"],
        verdict=recommended["verdict"],
        size=recommended.get("size"),
        overlap_score=recommended["overlap_score"],
        supported_limit=1.0,
        unsupported_limit=UNSUPPORTED_FACTOR,
        gains=rows_frame(recommended["gains"]),
        task_gains=rows_frame(recommended["task_gains"]),
        slack=pl.DataFrame(recommended["slack"], schema=slack_schema),
        covariates=covariate_rows(live_covariates, stacked),
        predictions=prediction_rows(runs, cate_model),
        estimators=rows_frame(cate_model["scores"]),
        signal=signal,
        losses=frozenset(signal.drop_nulls("unigram_nats")["task"]),
        provenance={
            "proxy runs": str(runs.n_runs),
            "pool states": str(runs.n_states),
            **({"top-up runs": str(n_top_ups)} if n_top_ups else {}),
            "recommended mixture": content_digest(dict(recommended))[:16],
            "live covariates": content_digest(live_covariates)[:16],
            "run table": content_digest(runs.to_frame())[:16],
            "seed": str(cate_model["seed"]),
            **(origins or {}),
        },
        policy=recommended["policy"],
        budget_tokens=recommended["budget_tokens"],
        top_up=pl.DataFrame(recommended["top_up"]) if recommended["top_up"] else None,
        interpretation=interpretation,
        beliefs=beliefs,
        what_if=what_if,
        unconstrained_gain=recommended["unconstrained_gain"],
        learning_curve=tuple(learning_curve),
        history=history,
    )


@dg.asset(dagster_type=VALUES, group_name="recommendation", kinds={"html"}, code_version="3")
def report(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    recommended_mixture: dict,
    live_covariates: pl.DataFrame,
    run_table: pl.DataFrame,
    top_up_runs: pl.DataFrame,
    cate_model: dict,
    cate_checks: dict,
    cate_interpretation: dict,
    proxy_runs: pl.DataFrame,
    eval_tasks: dict,
) -> dg.MaterializeResult:
    """One page for people: the mixture, its gains, whether to believe them, and why.

    Written to `data/reports/report.html`, which opens without network; `report.md` beside it says
    the same in short, for pull requests. Stale when anything that it shows changes, but for what
    validation runs realised: that is what was known when this report was made; materialise `report`
    again after `validate`.
    """
    settings, runs = project.settings, RunTable.from_frame(run_table)
    pool, stacked = pool_of_run(context, settings), stack_top_ups(runs, top_up_runs)
    data = report_data(
        recommended_mixture,
        live_covariates,
        runs,
        cate_model,
        signal_rows(cate_checks, proxy_runs, eval_tasks),
        live_interpretation(
            stacked,
            cate_model,
            cate_interpretation,
            recommended_mixture,
            live_covariates,
            weights_of(settings, runs),
        ),
        beliefs_of(cate_checks),
        stacked,
        what_if=other_weights(settings, stacked, cate_model, recommended_mixture, live_covariates),
        learning_curve=cate_checks["learning_curve"]["table"],
        history=recommendation_history(context.instance, settings, pool),
        origins=origins(context.instance, settings, pool),
    )
    path = write_report(pool.folder("reports", "report.html"), data)
    short = write_markdown(path.with_suffix(".md"), data)
    value = {"path": str(path), "recommended_mixture": content_digest(recommended_mixture)}
    texts = [file.read_text(encoding="utf-8") for file in (path, short)]
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest("\n".join(texts).split("\n"))),
        metadata={
            "in short": in_short(recommended_mixture),
            # Not a link: browsers follow none from a served page to a file.
            "report (a click copies the address; paste it into a new tab)": dg.MetadataValue.path(
                path.as_uri()
            ),
            "file": dg.MetadataValue.path(str(path)),
            "for pull requests": dg.MetadataValue.path(str(short)),
            "kilobytes": round(path.stat().st_size / 1000, 1),
        },
    )
