"""Predicted against realised: larger models trained on the mixtures, only when a person asks."""

from collections.abc import Sequence
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import (
    PoolTokenizer,
    keep_states,
    make_specs,
    write_token_store,
)
from causalmix_pipeline.adapters.model_tokens import describe_model, write_model_tokens
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.design import pretrained_folder, proxy_config
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.assets.plan import refuse_over_budget
from causalmix_pipeline.assets.proxy import (
    TRAINING_POOL,
    read_records,
    train_watched,
    training_figures,
)
from causalmix_pipeline.assets.report_history import REALISED, REALISED_SE
from causalmix_pipeline.assets.small_pictures import Interval, interval_picture
from causalmix_pipeline.core.design import Design
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.pool_state import Membership
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.scale import SAME_SIZE, log2_parameters
from causalmix_pipeline.core.tasks import outcome_of
from causalmix_pipeline.resources.frame_store import FRAME
from causalmix_pipeline.resources.live_pools import LivePool, pool_of_run
from causalmix_pipeline.resources.project import Project

#: Seeds of each mixture; enough for a standard error.
VALIDATION_SEEDS = 3


def larger_config(config: ProxyConfig) -> ProxyConfig:
    """A model about four times as large: twice as wide and one layer more; gentler rates."""
    return replace(
        config,
        hidden=2 * config.hidden,
        layers=config.layers + 1,
        learning_rate=config.learning_rate / 2,
        init_std=config.init_std / 2**0.5,
    )


def validation_config(project: Project, tokens_hash: str) -> ProxyConfig | PretrainedConfig:
    """What mixtures are validated on: a larger small model, or the pretrained one itself."""
    config = proxy_config(project, tokens_hash)
    return larger_config(config) if isinstance(config, ProxyConfig) else config


def keep_live_pool(
    project: Project, pool: LivePool, tokenizer: dict, live_documents: pl.DataFrame
) -> tuple[str, str]:
    """Keep a live pool as a pool state for the workers.

    Returns:
        The state's hash and its token store's.

    Raises:
        PoolError: if the pool's files changed since they were profiled.
    """
    domains = tokenizer["domains"]
    spec = project.pool_spec(pool.location, domains)
    model = pretrained_folder(project)
    if model is None:
        tokens_hash = write_token_store(
            project.run_store, spec, live_documents, PoolTokenizer.from_dict(tokenizer)
        )
    else:
        tokens_hash = write_model_tokens(
            project.run_store, spec, live_documents, model, describe_model(model).weights_hash
        )
    whole = Membership(np.arange(live_documents.height), live_documents["copies"].to_numpy())
    state_hash = keep_states(project.run_store, live_documents, domains, [whole])[0]
    return state_hash, tokens_hash


def validation_specs(
    project: Project,
    mixtures: dict[str, list[float]],
    state_hash: str,
    *,
    tokens_hash: str,
    eval_hash: str,
) -> list[ProxySpec]:
    """A spec per mixture and seed; seeds are the same for all mixtures."""
    mixture_ND = np.repeat(np.array(list(mixtures.values())), VALIDATION_SEEDS, axis=0)
    seeds = [project.settings.seed + 10_000 + k for k in range(VALIDATION_SEEDS)]
    design = Design(
        state_N=np.zeros(len(mixture_ND), dtype=int),
        mixture_ND=mixture_ND,
        data_seed_N=np.tile(seeds, len(mixtures)),
        cell_N=np.repeat(np.arange(len(mixtures)), VALIDATION_SEEDS),
    )
    return make_specs(
        design,
        [state_hash],
        tokens_hash=tokens_hash,
        eval_hash=eval_hash,
        config=validation_config(project, tokens_hash),
        device=project.device,
    )


def realised_gains(
    outcome_MST: np.ndarray, names: Sequence[str], weights_T: np.ndarray, predicted: dict
) -> pl.DataFrame:
    """Gain of each mixture over the reference, realised with its standard error, and predicted.

    Args:
        outcome_MST: outcomes, larger is better, NaN for none; shape (M, S, T), seeds paired over
            mixtures.
        names: M mixtures, `reference` among them.
        weights_T: weight of each task, sum 1.
        predicted: mixture to its predicted gain.
    """
    score_MS = outcome_MST @ weights_T
    difference_MS = score_MS - score_MS[list(names).index("reference")]
    error_M = difference_MS.std(axis=1, ddof=1) / np.sqrt(difference_MS.shape[1])
    return pl.DataFrame(
        {
            "mixture": list(names),
            "predicted_gain": [predicted.get(name) for name in names],
            "realised_gain": difference_MS.mean(axis=1),
            "realised_se": error_M,
            "bits_per_byte": -score_MS.mean(axis=1),
        },
        schema_overrides={"predicted_gain": pl.Float64},
    )


def sizes_told(config: ProxyConfig | PretrainedConfig, size: dict | None) -> dict[str, str]:
    """Both sizes, where the one validated isn't the one that the mixture is for."""
    if size is None or not isinstance(config, ProxyConfig):
        return {}
    if abs(log2_parameters(config.n_parameters / size["parameters"])) <= SAME_SIZE:
        return {}
    return {
        "size of the model": f"Validated with {config.n_parameters:,} parameters; the mixture and "
        f"its predicted gain are for a model of {size['parameters']:,.0f}."
    }


@dg.asset(
    dagster_type=FRAME,
    group_name="recommendation",
    kinds={"torch"},
    code_version="1",
    pool=TRAINING_POOL,
)
def validation_runs(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    eval_tasks: dict,
    live_documents: pl.DataFrame,
    recommended_mixture: dict,
) -> dg.MaterializeResult:
    """One row per mixture: predicted gain, and the gain realised by a larger model on 3 seeds.

    Trained on request only (job `validate`), on the recommended mixture and on each baseline.
    Stale when the recommended mixture changes; never re-materialised by itself.
    """
    pool = pool_of_run(context, project.settings)
    state_hash, tokens_hash = keep_live_pool(project, pool, tokenizer, live_documents)
    mixtures = recommended_mixture["mixtures"]
    specs = validation_specs(
        project,
        mixtures,
        state_hash,
        tokens_hash=tokens_hash,
        eval_hash=eval_tasks["eval_hash"],
    )
    refuse_over_budget(project, specs, context.run.tags)
    progress = train_watched(
        context, project, specs, asset=context.asset_key, domains=tokenizer["domains"]
    )
    tasks = recommended_mixture["task_gains"]
    directions = project.settings.task_directions
    outcome_NT = np.array(
        [
            [outcome_of(record, row["task"], directions) for row in tasks]
            for record in read_records(project, specs)
        ],
        dtype=float,
    )
    frame = realised_gains(
        outcome_NT.reshape(len(mixtures), VALIDATION_SEEDS, -1),
        list(mixtures),
        np.array([row["weight"] for row in tasks]),
        {row["mixture"]: row["gain"] for row in recommended_mixture["gains"]},
    )
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "trained now": float(progress.total),
            **sizes_told(specs[0].config, recommended_mixture.get("size")),
            **dict(
                zip(
                    (REALISED, REALISED_SE),
                    frame.filter(mixture="recommended")
                    .select("realised_gain", "realised_se")
                    .row(0),
                    strict=True,
                )
            ),
            "realised (dot, 90% interval)": interval_picture(
                [
                    Interval(row["mixture"], gain, gain - Z90 * error, gain + Z90 * error)
                    for row in frame.iter_rows(named=True)
                    for gain, error in [(row["realised_gain"], row["realised_se"])]
                ],
                "realised gains",
            ),
            "gains over the reference, bits per byte": markdown_table(
                [
                    {
                        "mixture": row["mixture"],
                        "predicted": row["predicted_gain"],
                        "realised": row["realised_gain"],
                        "± se": row["realised_se"],
                        "loss": row["bits_per_byte"],
                    }
                    for row in frame.iter_rows(named=True)
                ]
            ),
            **training_figures(progress, tokenizer["domains"]),
        },
    )
