"""Code versions that change with the settings an asset depends on.

So an edited setting makes stale what it decides, and nothing else: a new task weight reaches the
recommendation, another number of workers reaches nothing.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import dagster as dg

from causalmix_pipeline.adapters.task_files import file_digest
from causalmix_pipeline.core.covariates import QUANTILES, tasks_asked
from causalmix_pipeline.resources.settings import Settings


def _proxy(settings: Settings) -> Any:
    config, pretrained = settings.proxy.to_config().to_dict(), settings.proxy.pretrained
    if settings.proxy.sizes:
        return [config, [size.model_dump(mode="json") for size in settings.proxy.sizes]]
    return config if pretrained is None else [pretrained, config]


def _design(settings: Settings) -> Any:
    """The design; stages only where there are several, so that others' versions stay."""
    design = settings.design
    return design.model_dump(mode="json", exclude={"stages"} if design.stages == 1 else None)


def _objective(settings: Settings) -> Any:
    # The target size is a covariate of the live pool.
    policy = settings.policy.model_dump(mode="json", exclude={"target_parameters"})
    return [policy, settings.task_weights, settings.seed]


def _tasks(settings: Settings) -> Any:
    """Names of tasks, how they are scored, and the content of their files, which none observes."""
    versions: dict[str, Any] = {}
    for task in settings.tasks:
        digest = file_digest(settings.resolve(task.path))
        others = {"name", "path", "weight", "direction"}
        scored = task.model_dump(mode="json", exclude=others, exclude_defaults=True)
        versions[task.name] = [digest, scored] if scored else digest
    return versions


def _outcomes(settings: Settings) -> Any:
    """Covariates, and tasks whose direction isn't their kind's."""
    odd = [task.name for task in settings.tasks if (task.direction, task.kind) in _ODD_DIRECTIONS]
    return [settings.run_covariates, odd] if odd else settings.run_covariates


def _imported(settings: Settings) -> Any:
    """Tables of runs made elsewhere, and what is read of them; their content is observed."""
    tables = [table.model_dump(mode="json") for table in settings.imported_runs]
    return [tables, _outcomes(settings), sorted(settings.task_weights)] if tables else []


def _exported(settings: Settings) -> list[Any]:
    """Formats and tokens of the export, where they aren't the defaults."""
    asked = settings.export.model_dump(mode="json", exclude_defaults=True)
    return [asked] if asked else []


_ODD_DIRECTIONS = [("minimize", kind) for kind in ("choice", "exact", "lm_eval")]


def _states(settings: Settings) -> Any:
    n_states = -(-settings.n_runs // settings.design.mixtures_per_state)
    return [_ranges(settings), n_states]


def _ranges(settings: Settings) -> Any:
    """What states are drawn from the experiment pool, and quantiles that are only made if asked."""
    design = settings.design
    quantiles = [name for name in settings.covariates if name.endswith(tuple(QUANTILES))]
    return [design.states.model_dump(mode="json"), design.seed, quantiles]


def _measured(settings: Settings) -> Any:
    """How documents are read and what is measured of them; where it runs doesn't count."""
    profile = settings.profile.model_dump(mode="json", exclude={"device"})
    quality = settings.quality
    door: list[Any] = [quality.max_document_bytes, quality.max_decompression_ratio]
    if quality.exclude_overlap:
        door.append(_tasks(settings))
    if asked := tasks_asked(settings.covariates):
        door.append({task: _tasks(settings)[task] for task in asked})
    return [settings.columns.model_dump(mode="json"), profile, door]


#: What of the settings each asset depends on by itself, its inputs apart.
DEPENDS_ON: dict[str, Callable[[Settings], Any]] = {
    "tokenizer": lambda s: [
        s.columns.model_dump(mode="json"),
        s.domains,
        s.proxy.pool_vocab_size,
    ],
    "experiment_documents": lambda s: [
        _measured(s),
        s.design.seed if s.design.states.noise > 0 else None,
    ],
    "eval_tasks": lambda s: [
        _tasks(s),
        s.columns.text,
        s.proxy.to_config().sequence_length,
        *([s.proxy.pretrained] if s.proxy.pretrained else []),
    ],
    "pool_states": _states,
    "normaliser": _ranges,
    "mixture_design": lambda s: [_design(s), s.n_runs, _proxy(s)],
    "proxy_plan": lambda s: s.budget.model_dump(mode="json"),
    "imported_runs": _imported,
    "run_table": _outcomes,
    "cate_model": lambda s: [s.estimators, s.seed],
    "stage_table": lambda s: [s.task_weights, s.seed],
    "cate_checks": lambda s: [s.seed, s.task_weights],
    "cate_interpretation": lambda s: s.task_weights,
    "live_documents": _measured,
    "live_covariates": lambda s: [s.covariates, s.target_size] if s.proxy.sizes else s.covariates,
    "baseline_mixtures": _objective,
    "recommended_mixture": _objective,
    "recommended_schedule": _objective,
    "training_export": lambda s: [s.policy.budget_tokens, s.seed, *_exported(s)],
    "report": _objective,
    "validation_runs": lambda s: [_proxy(s), s.task_weights, s.seed],
    "rivals": lambda s: [
        *[_proxy(s), _objective(s), s.compare.model_dump(mode="json")],
        *([s.target_size] if s.proxy.sizes else []),
    ],
}


def with_settings_version(asset: dg.AssetsDefinition, settings: Settings) -> dg.AssetsDefinition:
    """The asset, its code version followed by a digest of the settings it depends on."""

    def extend(spec: dg.AssetSpec) -> dg.AssetSpec:
        depends = DEPENDS_ON.get(spec.key.path[-1])
        if depends is None:
            return spec
        text = json.dumps(depends(settings), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return spec.replace_attributes(code_version=f"{spec.code_version}-{digest}")

    return asset.map_asset_specs(extend)
