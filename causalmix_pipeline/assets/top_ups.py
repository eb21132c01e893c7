"""Top-ups: proxy runs at a live pool out of reach, trained only when a person asks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import make_specs
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.adapters.top_up_records import (
    TopUpPlan,
    keep_top_up_plan,
    read_top_up_plans,
)
from causalmix_pipeline.assets.design import domains_of, specs_of
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.assets.plan import refuse_over_budget
from causalmix_pipeline.assets.proxy import TRAINING_POOL, train_watched, training_figures
from causalmix_pipeline.assets.sizes import top_up_config
from causalmix_pipeline.assets.validation import keep_live_pool
from causalmix_pipeline.core.belief import TOP_UP_RUNS, reach_of
from causalmix_pipeline.core.covariates import measure_covariates
from causalmix_pipeline.core.design import Design
from causalmix_pipeline.core.errors import PoolError, ProxyError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import CODE_VERSION, ProxyRecord, ProxySpec
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.scale import SIZE_COVARIATE, log2_parameters
from causalmix_pipeline.core.tasks import outcome_of
from causalmix_pipeline.core.top_up import (
    plan_top_up,
    stack_top_ups,
    top_up_frame,
    top_up_name,
)
from causalmix_pipeline.resources.asset_keys import asset_key
from causalmix_pipeline.resources.live_pools import pool_of_run
from causalmix_pipeline.resources.project import Project

#: Tag of a Dagster run that may train a top-up; the job `top_up` sets it.
TOP_UP_TAG = "causalmix/top_up"

#: Keeps the seeds of top-ups apart from those of the design, whose numbers are cells.
_SEED_PLACE = 2**32

#: Columns of `live_covariates` that aren't covariates.
_LIVE_COLUMNS = ("domain", "documents", "tokens", "natural_share")


@dataclass(frozen=True, eq=False)
class Collected:
    """Top-up runs that fit the run table, and what was left out.

    Attributes:
        frame: the runs, as `core.top_up.top_up_frame` makes them.
        misfits: runs of another proxy, evaluation, list of domains or measure.
        untrained: runs that were planned and have no sound record.
    """

    frame: pl.DataFrame
    misfits: int
    untrained: int

    @property
    def diverged(self) -> int:
        """Runs without an outcome."""
        return self.frame.height - self.frame.drop_nulls().height


def collect_top_up_runs(
    project: Project, mixture_design: pl.DataFrame, runs: RunTable, scorers: Sequence[str]
) -> Collected:
    """Find the top-up runs that were trained so far and are like those of the run table.

    Args:
        project: where plans and records are kept, and which way scores are better.
        mixture_design: says how the experiment's own runs are trained and evaluated.
        runs: the run table; names domains, covariates and tasks.
        scorers: what the experiment's covariates were measured by.
    """
    wanted = {
        "domains": list(runs.domains),
        "scorers": list(scorers),
        "eval_hash": mixture_design["eval_hash"][0],
        "code_version": CODE_VERSION,
    }
    configs = set(mixture_design["config"])  # runs of any size of the design tell of the pool
    misfits, planned = set(), set()
    rows: dict[str, tuple] = {}
    for plan in read_top_up_plans(project.folder("top_ups")):
        fits = all(getattr(plan, name) == value for name, value in wanted.items())
        fits = fits and plan.config in configs
        if not fits or not set(runs.covariates) <= set(plan.covariates):
            misfits |= set(plan.keys)
            continue
        state_DP = plan.state(runs.covariates)
        has_sizes = SIZE_COVARIATE in runs.covariates
        size = plan.covariates[SIZE_COVARIATE][0] if has_sizes else None
        for number, mixture, key in zip(plan.numbers, plan.mixtures, plan.keys, strict=True):
            name = top_up_name(plan.state_hash, number, size)
            planned.add(name)
            record = None if name in rows else _sound_record(project, key)
            if record is not None:
                directions = project.settings.task_directions
                outcomes = {task: outcome_of(record, task, directions) for task in runs.tasks}
                rows[name] = (name, state_DP, mixture, outcomes)
    columns = list(zip(*rows.values(), strict=True)) or [(), (), (), ()]
    return Collected(top_up_frame(runs, *columns), len(misfits), len(planned - set(rows)))


def _sound_record(project: Project, key: str) -> ProxyRecord | None:
    """The record of a run; None for none, and for a damaged one, which the next top-up mends."""
    try:
        return project.run_store.get(key)
    except ProxyError:
        return None


def specs_of_top_up(
    project: Project,
    mixture_design: pl.DataFrame,
    config: str,
    mixtures: dict[int, np.ndarray],
    state_hash: str,
    tokens_hash: str,
) -> list[ProxySpec]:
    """The specs of planned runs: trained and evaluated as the experiment's own runs are.

    Args:
        project: its seed and device.
        mixture_design: the experiment's own runs.
        config: their recipe, see `top_up_config`.
        mixtures: by the number of the run.
        state_hash: of the live pool.
        tokens_hash: of its token store.

    Raises:
        ConfigError: if proxy settings or engine changed since the design was made.
    """
    own = specs_of(project, mixture_design)[mixture_design["config"].to_list().index(config)]
    seeds = [
        int(np.random.SeedSequence([project.settings.seed, _SEED_PLACE, n]).generate_state(1)[0])
        for n in mixtures
    ]
    design = Design(
        state_N=np.zeros(len(mixtures), dtype=int),
        mixture_ND=np.array(list(mixtures.values())),
        data_seed_N=np.array(seeds, dtype=np.int64),
        cell_N=np.arange(len(mixtures)),
    )
    return make_specs(
        design,
        [state_hash],
        tokens_hash=tokens_hash,
        eval_hash=own.eval_hash,
        config=own.config,
        device=project.device,
    )


def refuse_moved_pool(
    runs: RunTable, live_documents: pl.DataFrame, live_covariates: pl.DataFrame
) -> None:
    """Refuse covariates that aren't those of the documents which would be trained on.

    Raises:
        PoolError: naming the covariates that differ.
    """
    names = [name for name in runs.covariates if name != SIZE_COVARIATE]
    measured_DP = measure_covariates(live_documents, list(runs.domains), names)
    known_DP = live_covariates.select(names).to_numpy()
    odd = [name for p, name in enumerate(names) if (measured_DP != known_DP)[:, p].any()]
    if odd:
        raise PoolError(
            f"live_covariates must be those of live_documents, got other values of "
            f"{', '.join(odd)}: the pool changed meanwhile. Run `causalmix refresh` (the job "
            "refresh), then the top-up again."
        )


def plan_of(
    mixture_design: pl.DataFrame,
    mixtures: dict[int, np.ndarray],
    specs: Sequence[ProxySpec],
    live_covariates: pl.DataFrame,
    normaliser: dict,
) -> TopUpPlan:
    """What must be known of planned runs for ever, whatever the live pool becomes."""
    covariates, config = live_covariates.drop(_LIVE_COLUMNS), specs[0].config
    if SIZE_COVARIATE in covariates.columns and isinstance(config, ProxyConfig):
        trained = log2_parameters(config.n_parameters)
        covariates = covariates.with_columns(pl.lit(trained).alias(SIZE_COVARIATE))
    return TopUpPlan(
        state_hash=specs[0].state_hash,
        domains=domains_of(mixture_design),
        covariates={
            column.name: column.to_list()
            for column in covariates.iter_columns()
            if np.isfinite(column.to_numpy()).all()
        },
        scorers=normaliser["scorers"],
        eval_hash=specs[0].eval_hash,
        config=json.dumps(config.to_dict(), sort_keys=True),
        code_version=CODE_VERSION,
        numbers=list(mixtures),
        mixtures=[mixture_D.tolist() for mixture_D in mixtures.values()],
        keys=[spec.key for spec in specs],
    )


# ---------------------------------------------------------------------------- the asset


@dg.op(
    out={
        "asked": dg.Out(dg.Nothing, is_required=False),
        "not_asked": dg.Out(dg.Nothing, is_required=False),
    }
)
def ask_for_top_up(context: dg.OpExecutionContext) -> Iterator[dg.Output]:
    """Whether this run may train: it must carry the tag that the job `top_up` sets."""
    yield dg.Output(None, "asked" if context.run.tags.get(TOP_UP_TAG) == "yes" else "not_asked")


# A step of its own: one that only collects must not wait for the slot of a long training.
@dg.op(pool=TRAINING_POOL, ins={"asked": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
def train_top_up_runs(
    context: dg.OpExecutionContext,
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    mixture_design: pl.DataFrame,
    run_table: pl.DataFrame,
    normaliser: dict,
    live_documents: pl.DataFrame,
    live_covariates: pl.DataFrame,
) -> None:
    """Train the runs that `recommended_mixture` plans, at the live pool's present state."""
    runs = RunTable.from_frame(run_table)
    before = collect_top_up_runs(project, mixture_design, runs, normaliser["scorers"]).frame
    state_DP = live_covariates.select(runs.covariates).to_numpy()
    reach = reach_of(stack_top_ups(runs, before), state_DP)
    mixtures = plan_top_up(reach, runs, before, state_DP, seed=project.settings.seed)
    if not mixtures:
        context.log.info("The live pool is supported: there is nothing to train.")
        return
    refuse_moved_pool(runs, live_documents, live_covariates)
    pool = pool_of_run(context, project.settings)
    hashes = keep_live_pool(project, pool, tokenizer, live_documents)
    config = top_up_config(mixture_design, runs, state_DP)
    specs = specs_of_top_up(project, mixture_design, config, mixtures, *hashes)
    refuse_over_budget(project, specs, context.run.tags)
    plan = plan_of(mixture_design, mixtures, specs, live_covariates, normaliser)
    keep_top_up_plan(project.folder("top_ups"), plan)
    domains = domains_of(mixture_design)
    progress = train_watched(
        context, project, specs, asset=asset_key(project.settings, "top_up_runs"), domains=domains
    )
    context.add_output_metadata(training_figures(progress, domains))


@dg.op(
    ins={"ready": dg.In(dg.Nothing)},
    out=dg.Out(pl.DataFrame, io_manager_key="io_manager"),
)
def collect_top_ups(
    context: dg.OpExecutionContext,
    project: dg.ResourceParam[Project],
    mixture_design: pl.DataFrame,
    run_table: pl.DataFrame,
    normaliser: dict,
) -> dg.Output[pl.DataFrame]:
    """Read the records of all top-up runs that fit the run table."""
    runs = RunTable.from_frame(run_table)
    found = collect_top_up_runs(project, mixture_design, runs, normaliser["scorers"])
    version = content_digest(found.frame)
    context.set_data_version(asset_key(project.settings, "top_up_runs"), dg.DataVersion(version))
    return dg.Output(
        found.frame,
        metadata={
            "top-up runs": float(found.frame.height),
            "diverged": float(found.diverged),
            "planned, not trained": float(found.untrained),
            "left out (another proxy, tasks or measure)": float(found.misfits),
            "by pool state": markdown_table(state_rows(found.frame)),
            "how to train": "Nothing is trained here by itself, nor by a click on this asset. Run "
            "the job top_up, or causalmix refresh --top-up: it trains the plan of "
            f"recommended_mixture, {TOP_UP_RUNS} runs, if the live pool isn't supported.",
        },
    )


def state_rows(frame: pl.DataFrame) -> list[dict]:
    """How many runs there are of each state, for a table."""
    state = pl.col("run_id").str.split("/").list.get(1).alias("state")
    return frame.group_by(state, maintain_order=True).agg(runs=pl.len()).to_dicts()


@dg.graph_asset(
    group_name="live",
    kinds={"torch"},
    code_version="1",
    description="One row per top-up run that is finished: covariates of the live pool's state it "
    "was trained on, its mixture, its outcomes; often no row.\n\nProxy runs by the experiment's "
    "own recipe, at a live pool that was out of reach; the recommendation is conditioned on them. "
    "By itself this asset only collects what was trained before. The job `top_up` trains the plan "
    "of `recommended_mixture`. Stale when the live pool, the run table or the design change.",
)
def top_up_runs(
    tokenizer: dict,
    mixture_design: pl.DataFrame,
    run_table: pl.DataFrame,
    normaliser: dict,
    live_documents: pl.DataFrame,
    live_covariates: pl.DataFrame,
):
    """Train if asked, collect."""
    asked, not_asked = ask_for_top_up()
    trained = train_top_up_runs(
        asked=asked,
        tokenizer=tokenizer,
        mixture_design=mixture_design,
        run_table=run_table,
        normaliser=normaliser,
        live_documents=live_documents,
        live_covariates=live_covariates,
    )
    return collect_top_ups(
        ready=[trained, not_asked],
        mixture_design=mixture_design,
        run_table=run_table,
        normaliser=normaliser,
    )
