"""Which columns a frame's columns come from, as Dagster's catalogue follows them."""

from collections.abc import Iterable, Mapping

import dagster as dg
import polars as pl

from causalmix_pipeline.core.covariates import LANGUAGE_PREFIX, base_of
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import SIZE_COVARIATE
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.settings import Settings

#: Baselines that are found from the outcomes of the runs.
_FROM_RUNS = ("grid", "regmix", "log_linear", "dmo")

#: Columns of the documents that a domain as a whole is measured by.
_OF_DOMAIN = {
    "domain": ("domain",),
    "documents": ("document_id",),
    "tokens": ("n_tokens",),
    "natural_share": ("n_tokens", "copies"),
    "log2_tokens": ("n_tokens",),
    "duplicate_share": ("n_tokens", "copies"),
    "sample_compress_ratio": ("sample_compress_ratio",),
}


def lineage_metadata(
    settings: Settings, deps: Mapping[str, Iterable[tuple[str, str]]]
) -> dict[str, dg.MetadataValue]:
    """The metadata entry that says which (asset, column) pairs each column comes from."""
    lineage = dg.TableColumnLineage(
        {
            column: [
                dg.TableColumnDep(asset_key(settings, asset), name)
                for asset, name in dict.fromkeys(pairs)
            ]
            for column, pairs in deps.items()
        }
    )
    return {"dagster/column_lineage": dg.MetadataValue.column_lineage(lineage)}


def live_covariates_lineage(
    settings: Settings, covariates: pl.DataFrame, documents: pl.DataFrame
) -> dict[str, dg.MetadataValue]:
    """Each covariate from its metric of the documents, weighted by their tokens."""
    deps = {}
    for name in covariates.columns:
        if name in _OF_DOMAIN:
            names = _OF_DOMAIN[name]
        elif name == SIZE_COVARIATE:  # of the model, not of the pool
            names = ()
        elif name.startswith(LANGUAGE_PREFIX):
            names = ("language",)
        else:
            names = (base_of(name), "n_tokens", "copies")
        deps[name] = [("live_documents", n) for n in names if n in documents.columns]
    return lineage_metadata(settings, deps)


def run_table_lineage(
    settings: Settings, runs: RunTable, proxy_runs: pl.DataFrame
) -> dict[str, dg.MetadataValue]:
    """Shares from the design, covariates from the states, outcomes from the proxy runs."""
    deps: dict[str, list[tuple[str, str]]] = {
        "run_id": [("proxy_runs", "proxy_run_id")],
        "state_id": [("mixture_design", "state_id")],
        "repeat_of": [("mixture_design", "cell")],
    }
    for domain in runs.domains:
        deps[f"share__{domain}"] = [("mixture_design", f"share__{domain}")]
        for name in runs.covariates:
            deps[f"state__{domain}__{name}"] = [("pool_states", name), ("pool_states", "domain")]
            if name == SIZE_COVARIATE:
                deps[f"state__{domain}__{name}"] = [("mixture_design", "config")]
    for task in runs.tasks:
        names = (f"{kind}__{task}" for kind in ("bits_per_byte", "score"))
        deps[f"outcome__{task}"] = [("proxy_runs", n) for n in names if n in proxy_runs.columns]
    return lineage_metadata(settings, deps)


def baselines_lineage(
    settings: Settings, baselines: pl.DataFrame, runs: RunTable
) -> dict[str, dg.MetadataValue]:
    """The natural mixture from the live pool, those that are fitted from the runs."""
    fitted = [("run_table", f"share__{domain}") for domain in runs.domains]
    fitted += [("run_table", f"outcome__{task}") for task in runs.tasks]

    def deps_of(name: str) -> list[tuple[str, str]]:
        if name == "reference":
            return deps_of(settings.policy.reference)
        if name == "natural":
            return [("live_covariates", "natural_share")]
        return fitted if name in _FROM_RUNS else [("live_covariates", "domain")]

    return lineage_metadata(settings, {name: deps_of(name) for name in baselines.columns})


def export_lineage(settings: Settings, manifest: pl.DataFrame) -> dict[str, dg.MetadataValue]:
    """Every column from the live documents; copies by the tokens that the mixture asks for."""
    deps = {name: [("live_documents", name)] for name in manifest.columns}
    deps["copies"] = [("live_documents", name) for name in ("copies", "domain", "n_tokens")]
    return lineage_metadata(settings, deps)
