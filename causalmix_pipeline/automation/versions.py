"""Code versions that change with the settings an asset depends on.

So an edited setting makes stale what it decides, and nothing else: a new task weight reaches the
recommendation, another number of workers reaches nothing.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import dagster as dg

from causalmix_pipeline.resources.settings import Settings


def _proxy(settings: Settings) -> Any:
    return settings.proxy.to_config().to_dict()


def _objective(settings: Settings) -> Any:
    return [settings.policy.model_dump(mode="json"), settings.task_weights, settings.seed]


def _tasks(settings: Settings) -> Any:
    """Names of tasks, and the content of their held-out text, which no asset observes."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for name, path in settings.task_paths.items()
    }


def _states(settings: Settings) -> Any:
    design = settings.design
    n_states = -(-settings.n_runs // design.mixtures_per_state)
    return [design.states.model_dump(mode="json"), design.seed, n_states]


#: What of the settings each asset depends on by itself, its inputs apart.
DEPENDS_ON: dict[str, Callable[[Settings], Any]] = {
    "tokenizer": lambda s: [s.columns.model_dump(), s.domains, s.proxy.to_config().vocab_size],
    "experiment_documents": lambda s: [
        s.columns.model_dump(),
        s.design.seed if s.design.states.noise > 0 else None,
    ],
    "eval_tasks": lambda s: [_tasks(s), s.columns.text, s.proxy.to_config().sequence_length],
    "pool_states": _states,
    "mixture_design": lambda s: [s.design.model_dump(mode="json"), s.n_runs, _proxy(s)],
    "run_table": lambda s: s.covariates,
    "cate_model": lambda s: [s.estimators, s.seed],
    "cate_checks": lambda s: s.seed,
    "live_documents": lambda s: s.columns.model_dump(),
    "baseline_mixtures": _objective,
    "recommended_mixture": _objective,
    "training_export": lambda s: [s.policy.budget_tokens, s.seed],
    "report": _objective,
    "validation_runs": lambda s: [_proxy(s), s.task_weights, s.seed],
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
