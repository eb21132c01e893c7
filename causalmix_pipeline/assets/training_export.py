"""From a recommended mixture to what a trainer reads: documents, copies, configurations."""

from collections.abc import Sequence

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.exporter import Export, make_export
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.adapters.trainer_formats import HandedOver, hand_over
from causalmix_pipeline.assets.column_lineage import export_lineage
from causalmix_pipeline.assets.pictures import bar, by_domain_table, markdown_table
from causalmix_pipeline.resources.frame_store import FRAME
from causalmix_pipeline.resources.live_pools import LivePool, pool_of_run
from causalmix_pipeline.resources.progress import progress_teller
from causalmix_pipeline.resources.project import Project, column_map
from causalmix_pipeline.resources.settings import Settings


def export_of(
    settings: Settings,
    recommended_mixture: dict,
    live_documents: pl.DataFrame,
    *,
    tokens: int | None = None,
) -> Export:
    """The documents of the recommended mixture, and how often each is read.

    Args:
        settings: of the project.
        recommended_mixture: the asset's value.
        live_documents: the asset's value.
        tokens: of the training run; None takes `export.tokens`, else the recommendation's budget.
    """
    budget = tokens or settings.export.tokens or recommended_mixture["budget_tokens"]
    return make_export(
        recommended_mixture["mixtures"]["recommended"],
        recommended_mixture["domains"],
        live_documents,
        budget_tokens=int(budget),
        seed=settings.seed,
        verdict=recommended_mixture["verdict"],
        fingerprints={
            "live_documents": content_digest(live_documents),
            "recommended_mixture": content_digest(recommended_mixture),
        },
        columns=column_map(settings),
    )


@dg.asset(dagster_type=FRAME, group_name="recommendation", kinds={"parquet"}, code_version="1")
def training_export(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    recommended_mixture: dict,
    live_documents: pl.DataFrame,
) -> dg.MaterializeResult:
    """One row per document to train on, and how often: the recommended mixture made exact.

    Also written as `mixture.json` and `manifest.parquet` into `data/export`, and as the
    configuration of each trainer in `export.formats` into a folder of its name there. Stale when
    the recommended mixture, the live documents or `export` change.
    """
    pool = pool_of_run(context, project.settings)
    export = export_of(project.settings, recommended_mixture, live_documents)
    handed = write_formats(context, project, pool, export)
    manifest = export.manifest
    versions = [content_digest(manifest), export.to_dict()]
    versions += [[found.name, found.achieved_D.tolist()] for found in handed]
    return dg.MaterializeResult(
        value=manifest,
        data_version=dg.DataVersion(content_digest(versions)),
        metadata={
            "documents": float(manifest.height),
            "tokens": float((manifest["n_tokens"] * manifest["copies"]).sum()),
            "domains": markdown_table(export_rows(export)),
            **format_metadata(export, handed),
            **export_lineage(project.settings, manifest),
            "folder": dg.MetadataValue.path(str(pool.folder("export"))),
        },
    )


def write_formats(
    context: dg.AssetExecutionContext, project: Project, pool: LivePool, export: Export
) -> list[HandedOver]:
    """Write `mixture.json`, and each further format of the settings in a folder of its own."""
    folder, spec = pool.folder("export"), project.pool_spec(pool.location, None)
    names = [name for name in dict.fromkeys(project.settings.export.formats) if name != "json"]
    hand_over(folder, export, "json", spec)
    return [
        hand_over(folder / name, export, name, spec, on_progress=progress_teller(context.log.info))
        for name in names
    ]


def export_rows(export: Export) -> list[dict]:
    """Share, tokens and epochs of each domain, as exported."""
    told = export.to_dict()
    most = max(told["weights"].values())
    return [
        {
            "domain": domain,
            "share": told["weights"][domain],
            "tokens": told["tokens"][domain],
            "epochs": round(told["epochs"][domain], 3),
            "by tokens": bar(told["weights"][domain] / most),
        }
        for domain in export.domains
    ]


def format_metadata(export: Export, handed: Sequence[HandedOver]) -> dict:
    """The shares that each trainer achieves by the numbers written; nothing without a format."""
    if not handed:
        return {}
    shares = {"asked": export.mixture_D} | {found.name: found.achieved_D for found in handed}
    worst = max(float(abs(found.achieved_D - export.mixture_D).max()) for found in handed)
    rows = {name: share_D.tolist() for name, share_D in shares.items()}
    return {
        "shares of tokens by format": by_domain_table(export.domains, rows, "format"),
        "largest deviation of a share": worst,
    }
