"""The recommended mixture against its rivals, trained on new pool states when a person asks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl

from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.contest import Contest, prepare_contest
from causalmix_pipeline.assets.entrants import entrants_of, schedules_of
from causalmix_pipeline.assets.pictures import markdown_table
from causalmix_pipeline.assets.plan import WaysOut, refuse_over_budget
from causalmix_pipeline.assets.proxy import TRAINING_POOL, read_records, train_watched
from causalmix_pipeline.assets.small_pictures import Interval, interval_picture
from causalmix_pipeline.core.controller_tuning import tune
from causalmix_pipeline.core.effects import Z90
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.rival_gains import rival_table
from causalmix_pipeline.core.rivals import run_lanes, weighted_score
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.resources.frame_store import VALUES
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

#: Tags of a Dagster run that take the place of `compare.states` and `compare.seeds` in it.
STATES_TAG, SEEDS_TAG = "causalmix/compare_states", "causalmix/compare_seeds"

#: What to do about a comparison over the budget.
WAYS_OUT = WaysOut(
    "compare.states, compare.seeds, compare.tuning_runs, compare.controllers",
    "`causalmix compare --over-budget`",
)


def count_of(tags: Mapping[str, str], tag: str, default: int) -> int:
    """The number that a tag of the run gives, else the settings' one.

    Raises:
        ConfigError: if it isn't a whole number from 1 up.
    """
    text = tags.get(tag, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"the tag {tag} must be a whole number >= 1, got {text!r}: correct it.")
    return int(text)


def read_kept(project: Project, spec: ProxySpec) -> ProxyRecord | None:
    """The record of a run; None where it has none, or a damaged one, which is trained again."""
    return None if project.run_store.missing([spec]) else project.run_store.get(spec.key)


@dg.asset(
    dagster_type=VALUES,
    group_name="recommendation",
    kinds={"torch"},
    code_version="1",
    pool=TRAINING_POOL,
)
def rivals(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    experiment_documents: pl.DataFrame,
    mixture_design: pl.DataFrame,
    run_table: pl.DataFrame,
    cate_model: dict,
) -> dg.MaterializeResult:
    """What the recommended mixture and everything one could do instead gain, really trained.

    On new pool states of the experiment pool, at two sizes, each rival with the same tokens and
    seeds: gain over equal shares with its standard error over states, and what it cost with its
    search. Controllers' settings are searched first, on states of their own. Trained on request
    only (job `compare`); a comparison that was stopped goes on. Stale when the run table, the
    effect model, the policy or `compare` change; never re-materialised by itself.
    """
    settings, tags = project.settings, context.run.tags
    runs = RunTable.from_frame(run_table)
    schedule_of = schedules_of(project, run_table, mixture_design, cate_model)
    tell = context.log.info
    contest = prepare_contest(
        project,
        tokenizer,
        experiment_documents,
        mixture_design,
        lambda states, sizes: entrants_of(
            settings, runs, cate_model, states, sizes, tell=tell, schedule_of=schedule_of
        ),
        n_states=count_of(tags, STATES_TAG, settings.compare.states),
        n_seeds=count_of(tags, SEEDS_TAG, settings.compare.seeds),
    )
    score = weighted_score(settings.task_weights, settings.task_directions)
    to_price = contest.to_price(lambda spec: read_kept(project, spec), score)
    refuse_over_budget(project, to_price, tags, ways_out=WAYS_OUT)
    trained = 0

    def train(specs: Sequence[ProxySpec]) -> list[ProxyRecord]:
        nonlocal trained
        trained += train_watched(
            context, project, specs, asset=context.asset_key, domains=contest.domains
        ).done
        return read_records(project, specs)

    value = compete(contest, train, settings)
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={"trained now": float(trained), **rivals_metadata(value)},
    )


def compete(
    contest: Contest, train: Callable[[Sequence[ProxySpec]], list[ProxyRecord]], settings: Settings
) -> dict[str, Any]:
    """Choose the controllers' settings, train everything, and tell what it gave.

    Returns:
        Plain values: sizes, states and seeds, `table` (rows of `core.rival_gains.rival_table`),
        `trials` (every setting that was tried) and `outcomes` (a row per run).
    """
    score = weighted_score(settings.task_weights, settings.task_directions)
    tuning = tune(
        contest.drawn,
        contest.tuned_starts,
        contest.tuned_track,
        contest.sizes[0],
        train=train,
        score=score,
    )
    outcomes = run_lanes(contest.lanes(tuning.chosen), train, score)
    table = rival_table(outcomes, contest.sizes, contest.search_tokens(tuning))
    return {
        "sizes": [size.name for size in contest.sizes],
        "states": len(contest.track.state_hashes),
        "seeds": len(contest.track.seeds),
        "table": table.to_dicts(),
        "trials": tuning.trials,
        "outcomes": outcomes.to_dicts(),
    }


def rivals_metadata(value: Mapping) -> dict[str, Any]:
    """A picture and a table of each size, and the costs."""
    found: dict[str, Any] = {
        "new pool states": float(value["states"]),
        "seeds": float(value["seeds"]),
    }
    for size in value["sizes"]:
        rows = [row for row in value["table"] if row["size"] == size]
        diverged = any(row["diverged"] for row in rows)
        found[f"{size}: gain over equal (dot, 90% interval)"] = interval_picture(
            [Interval(row["entrant"], row["gain"], *ends(row)) for row in rows], f"gains {size}"
        )
        found[f"{size}: gains, bits per byte"] = markdown_table(
            [
                {
                    "rival": row["entrant"],
                    "gain over equal": with_se(row["gain"], row["se"]),
                    "ahead": f"{row['ahead']}/{row['states']}",
                    "ours more": with_se(row["ours"], row["ours_se"]),
                    **({"diverged": row["diverged"]} if diverged else {}),
                }
                for row in rows
            ]
        )
    found["cost"] = markdown_table(
        [
            {
                "rival": f"{row['entrant']} {row['size']}",
                "tokens a run": row["run_tokens"],
                "search": row["search_tokens"],
                "search a pool": row["state_search_tokens"],
                "FLOPs": f"{row['total_flops']:.2g}",
            }
            for row in value["table"]
        ]
    )
    return found


def with_se(value: float | None, se: float | None) -> str:
    """A number and its standard error; nothing where it isn't known."""
    if value is None:
        return ""
    return f"{value:+.3f}" if se is None else f"{value:+.3f} ± {se:.3f}"


def ends(row: Mapping) -> tuple[float | None, float | None]:
    """Ends of a gain's 90% interval; None where it isn't known."""
    if row["gain"] is None or row["se"] is None:
        return None, None
    return row["gain"] - Z90 * row["se"], row["gain"] + Z90 * row["se"]
