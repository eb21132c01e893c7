"""What the proxy runs cost, before any is trained, and whether the budget allows it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.blobs import write_atomically
from causalmix_pipeline.adapters.calibration import calibrate, machine
from causalmix_pipeline.adapters.experiment import collect_runs
from causalmix_pipeline.adapters.local_backend import engine_name
from causalmix_pipeline.adapters.local_workers import LocalWorkers, n_cores
from causalmix_pipeline.adapters.model_tokens import describe_model
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.design import design_of, domains_of, specs_of, state_values
from causalmix_pipeline.assets.pictures import number
from causalmix_pipeline.core.belief import noise_floor
from causalmix_pipeline.core.controller_tuning import run_cost
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.power import Experiment, power_table
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.price import (
    Calibration,
    Rates,
    Workload,
    over_budget,
    price,
    scaled,
    total,
)
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.resources.frame_store import VALUES
from causalmix_pipeline.resources.project import Project, visible_gpus

#: Tag of a Dagster run that a person agreed to though it costs more than the budget.
OVER_BUDGET_TAG = "causalmix/over_budget"

#: Bytes that a checkpoint holds for each trained weight: itself and AdamW's two moments, fp32.
CHECKPOINT_BYTES = 12

#: Low-rank additions of a layer: two thin matrices for each of its seven.
LORA_MATRICES = 14


def workload_of(project: Project, specs: Sequence[ProxySpec], n_pending: int) -> Workload:
    """What there is to train, and on how much of this machine."""
    config, backend = specs[0].config, project.backend
    workers = workers_at_once(project)
    on_gpu = backend.device.startswith("cuda")
    common: dict[str, Any] = {
        "n_all": len({spec.key for spec in specs}),
        "n_pending": n_pending,
        "tokens": config.tokens,
        "steps": config.steps,
        "n_workers": workers,
        "n_gpus": gpus_at_once(project, workers) if on_gpu else 0,
        "n_cores": workers,
    }
    if not isinstance(config, PretrainedConfig):
        return Workload(
            **common,
            flops=config.flops,
            n_parameters=config.n_parameters,
            # What a controlled run reads depends on its own losses: it's trained by itself.
            runs_per_stack=1 if specs[0].controller else backend.stack_size(config, n_pending or 1),
        )
    facts = describe_model(config.model)
    trained = facts.n_parameters
    if config.method == "lora":
        trained = LORA_MATRICES * facts.layers * facts.hidden * config.lora_rank
    return Workload(
        **common,
        flops=config.flops(facts.n_parameters, layers=facts.layers, hidden=facts.hidden),
        n_parameters=facts.n_parameters,
        runs_per_stack=1,
        scratch_bytes=CHECKPOINT_BYTES * trained,
    )


def workers_at_once(project: Project) -> int:
    """Stacks that train at once: on this machine, or on the cluster as it is now."""
    workers = project.backend.workers
    if isinstance(workers, RayWorkers) and workers.address is not None:
        return workers.n_at_once()
    cores = n_cores()
    if isinstance(workers, LocalWorkers):
        gpus = len(workers.gpus)
        n_workers = workers.n_workers or gpus or cores
        return min(n_workers, gpus) if gpus else n_workers
    assert isinstance(workers, RayWorkers)
    slots = [cores / workers.n_cpus_per_task] if workers.n_cpus_per_task else []
    if workers.n_gpus_per_task:
        slots.append(len(visible_gpus()) / workers.n_gpus_per_task)
    return max(1, int(min(slots)))


def gpus_at_once(project: Project, n_workers: int) -> float:
    """GPUs that so many workers take."""
    workers = project.backend.workers
    return n_workers * (workers.n_gpus_per_task if isinstance(workers, RayWorkers) else 1)


def calibration_of(project: Project, specs: Sequence[ProxySpec], workload: Workload) -> Calibration:
    """How fast this machine trains such runs: measured once, then read from `calibrations.json`.

    The file may be deleted at any time, for a new measurement.
    """
    backend = project.backend
    conditions = {
        "machine": machine("cpu") if backend.device == "cpu" else backend.ask(machine),
        "engine": engine_name(backend.device),
        "backend": project.settings.backend.model_dump(mode="json"),
        "config": specs[0].config.to_dict(),
        "evaluation": specs[0].eval_hash,
        "workers": workload.n_workers,
        "runs a stack": workload.runs_per_stack,
    }
    path, name = project.folder("calibrations.json"), content_digest(conditions)
    kept = read_calibrations(path)
    if name in kept:
        return Calibration(**kept[name]["figures"])
    found = calibrate(
        backend,
        specs,
        n_workers=workload.n_workers,
        runs_per_stack=workload.runs_per_stack,
        folder=project.folder("calibration"),
        flops=workload.flops,
    )
    kept[name] = {"conditions": conditions, "figures": asdict(found)}
    write_atomically(path, json.dumps(kept, indent=1).encode())
    return found


def read_calibrations(path: Path) -> dict[str, Any]:
    """What was measured so far; nothing where the file is missing or isn't ours."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def price_runs(
    project: Project, specs: Sequence[ProxySpec], n_pending: int | None = None
) -> dict[str, Any]:
    """What is to train of these runs, and what that costs on this hardware.

    Args:
        project: its run store, hardware and budget.
        specs: the runs.
        n_pending: how many such runs are to train; None counts those without a record.
    """
    if n_pending is not None:
        return price_alike(project, alike(specs)[0], n_pending)
    pending = {spec.key for spec in project.run_store.missing(specs)}
    prices = []
    for group in alike(specs):
        todo = {spec.key: spec for spec in group if spec.key in pending}
        costs = [
            run_cost(spec.controller, spec.config, len(spec.mixture)) for spec in todo.values()
        ]
        mean_cost = sum(costs) / max(len(costs), 1)
        prices.append(scaled(price_alike(project, group, len(todo)), mean_cost or 1.0))
    return total(prices)


def alike(specs: Sequence[ProxySpec]) -> list[list[ProxySpec]]:
    """The specs by what decides a run's time: its configuration, and whether it's controlled."""
    groups: dict[tuple, list[ProxySpec]] = {}
    for spec in specs:
        groups.setdefault((spec.config, spec.controller is not None), []).append(spec)
    return list(groups.values())


def price_alike(project: Project, specs: Sequence[ProxySpec], n_pending: int) -> dict[str, Any]:
    """What so many runs of one kind cost; a controlled run without its probes and its reference."""
    workload = workload_of(project, specs, n_pending)
    budget = project.settings.budget
    rates = Rates(budget.price_per_gpu_hour, budget.price_per_core_hour, budget.currency)
    return price(workload, calibration_of(project, specs, workload), rates)


def budget_breaches(project: Project, price: Mapping[str, Any]) -> list[str]:
    """Which limits of the budget a price breaks, each a sentence."""
    budget = project.settings.budget
    limits = budget.model_dump(include={"max_hours", "max_gpu_hours", "max_cost"})
    return over_budget(price, limits)


@dataclass(frozen=True)
class WaysOut:
    """What to do about training that is over the budget.

    Attributes:
        settings: those that make it less.
        command: agrees to it once.
    """

    settings: str = "design.n_runs, proxy.preset"
    command: str = "`causalmix refresh --train --over-budget` (a top-up: `--top-up` for `--train`)"


def refuse_over_budget(
    project: Project,
    specs: Sequence[ProxySpec],
    tags: Mapping[str, str],
    *,
    ways_out: WaysOut = WaysOut(),
) -> None:
    """Refuse to train what costs more than the budget, unless a person agreed to this run.

    Args:
        project: its budget, run store and kept calibration.
        specs: the runs of the design.
        tags: of the Dagster run; `OVER_BUDGET_TAG` is the agreement.
        ways_out: for the message.

    Raises:
        ConfigError: naming the limit, the price and the ways out.
    """
    budget = project.settings.budget
    if tags.get(OVER_BUDGET_TAG) == "yes" or (
        budget.max_hours,
        budget.max_gpu_hours,
        budget.max_cost,
    ) == (
        None,
        None,
        None,
    ):
        return
    breaches = budget_breaches(project, price_runs(project, specs))
    if breaches:
        raise ConfigError(budget_message(breaches, ways_out))


def budget_message(breaches: Sequence[str], ways_out: WaysOut = WaysOut()) -> str:
    """What is over the budget, and the ways out."""
    return (
        f"{'; '.join(breaches)}: train fewer or smaller runs ({ways_out.settings}), raise the "
        f"limit, or agree to this once: {ways_out.command}, in the UI a run with the tag "
        f"{OVER_BUDGET_TAG}: yes."
    )


@dg.asset(
    dagster_type=VALUES,
    group_name="experiment",
    kinds={"python"},
    code_version="2",
    check_specs=[
        dg.AssetCheckSpec(
            "within_budget",
            asset="proxy_plan",
            blocking=True,
            description="The proxy runs to train cost no more than `budget` in the settings "
            f"allows, or the run carries the tag {OVER_BUDGET_TAG}.",
        )
    ],
)
def proxy_plan(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    mixture_design: pl.DataFrame,
) -> dg.MaterializeResult:
    """What the proxy runs cost, before any is trained: FLOPs, hours, GPU hours, money, disk.

    Measured once by a short trial in as many workers as training takes. Stale when the design or
    the budget changes.
    """
    specs = specs_of(project, mixture_design)
    found = price_runs(project, specs)
    breaches = budget_breaches(project, found)
    agreed = context.run.tags.get(OVER_BUDGET_TAG) == "yes"
    # The version stands for what is planned, not for how fast the machine was just now.
    return dg.MaterializeResult(
        value=found,
        data_version=dg.DataVersion(content_digest([spec.key for spec in specs])),
        metadata={
            name: number(each) if isinstance(each, float) else each
            for name, each in found.items()
            if each is not None
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="within_budget",
                passed=not breaches or agreed,
                description=budget_message(breaches) if breaches else None,
                metadata={
                    "over": "; ".join(breaches) or "nothing",
                    "agreed to": "yes" if agreed else "no",
                },
            )
        ],
    )


# ---------------------------------------------------------------------------- power


def experiment_of(project: Project, mixture_design: pl.DataFrame) -> Experiment:
    """What of the design decides its power."""
    plan = project.design_plan
    return Experiment(plan.n_runs, plan.mixtures_per_state, len(domains_of(mixture_design)) - 1)


def pilot_of(mixture_design: pl.DataFrame) -> pl.DataFrame:
    """The runs of a design that tell its noise and its signal: those of the repeated pairs' states.

    The repeats give the noise of seeds, the other mixtures of the same states the signal.
    """
    repeated = mixture_design.filter(pl.col("cell").is_duplicated())["state_id"].unique()
    return mixture_design.filter(pl.col("state_id").is_in(repeated.implode()))


def power_of(
    project: Project, mixture_design: pl.DataFrame, pool_states: pl.DataFrame, tasks: Sequence[str]
) -> list[dict]:
    """What the design can tell of each task, by the noise of the runs in the store.

    Rows as `core.power.power_table` makes them; none where no pair was repeated so far.
    """
    specs = specs_of(project, mixture_design)
    pending = {spec.key for spec in project.run_store.missing(specs)}
    done = mixture_design.filter(~pl.col("proxy_run_id").is_in(list(pending)))
    if not done["cell"].is_duplicated().any():
        return []
    records = [project.run_store.get(spec.key) for spec in specs if spec.key not in pending]
    domains, covariates = domains_of(mixture_design), project.settings.covariates
    runs = collect_runs(
        [record for record in records if record is not None],
        design_of(done),
        state_values(pool_states, len(domains), covariates),
        domains=domains,
        covariates=covariates,
        tasks=tasks,
    )
    return power_table(noise_floor(runs), experiment_of(project, mixture_design))
