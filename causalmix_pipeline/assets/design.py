"""What the experiment trains: tasks, pool states, mixtures, and what that costs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.experiment import (
    DomainSampler,
    PoolTokenizer,
    build_evaluation,
    draw_states,
    fit_normaliser,
    keep_states,
    make_specs,
    spec_table,
)
from causalmix_pipeline.adapters.lm_eval_tasks import check_harness
from causalmix_pipeline.adapters.model_tokens import describe_model, write_model_tokens
from causalmix_pipeline.adapters.ngram_overlap import OverlapFinder, find_overlap
from causalmix_pipeline.adapters.run_store import EvalWindows
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.adapters.task_files import (
    harness_texts,
    read_questions,
    read_text_column,
)
from causalmix_pipeline.assets.pictures import (
    Strip,
    by_domain_table,
    histogram,
    markdown_table,
    plain,
    strips_plot,
    svg_picture,
)
from causalmix_pipeline.assets.sizes import at_sizes
from causalmix_pipeline.core.covariates import QUANTILES, measure_covariates
from causalmix_pipeline.core.design import Design, make_design
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.pretrained import PretrainedConfig
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxySpec
from causalmix_pipeline.core.tasks import HarnessTask, QuestionText
from causalmix_pipeline.resources.frame_store import FRAME, VALUES
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.study_settings import Task


def read_task_texts(project: Project) -> dict[str, list[str]]:
    """The held-out documents of each task that measures loss.

    Raises:
        ConfigError: if no task is named.
        PoolError: if a task's file is missing or holds no usable text.
    """
    return {
        task.name: read_text_column(path, project.settings.columns.text)
        for task, path in task_files(project)
        if task.kind == "loss"
    }


def read_task_questions(project: Project) -> dict[str, list[QuestionText]]:
    """The questions of each task that asks some.

    Raises:
        PoolError: if a task's file is missing, or a row breaks a rule.
    """
    return {
        task.name: read_questions(
            path,
            task.kind,
            max_questions=task.max_questions,
            max_new_tokens=task.max_new_tokens,
            measure=task.measure,
        )
        for task, path in task_files(project)
        if task.kind in ("choice", "exact")
    }


def read_harness_tasks(project: Project) -> dict[str, HarnessTask]:
    """Each task of the lm-evaluation-harness, which must find it in its folder.

    Raises:
        ConfigError: if the proxy isn't a pretrained model, or the harness lacks the task.
        PoolError: if a task's folder is missing.
    """
    found = {
        task.name: HarnessTask(str(path), task.harness_task, task.max_questions)
        for task, path in task_files(project)
        if task.kind == "lm_eval" and task.harness_task is not None
    }
    if found and project.settings.proxy.pretrained is None:
        raise ConfigError(
            f"tasks of kind lm_eval must have proxy.pretrained set, got null with {list(found)}: "
            "the harness takes real models only. Set it, or use the kinds loss, choice and exact."
        )
    if found:
        check_harness(found)
    return found


def task_files(project: Project) -> list[tuple[Task, Path]]:
    """Each task with its file, or its folder, which is there.

    Raises:
        ConfigError: if no task is named.
        PoolError: if one is missing.
    """
    settings = project.settings
    if not settings.tasks:
        raise ConfigError(
            "tasks must hold at least one task, got none: say in the settings what the model shall "
            "be good at, with held-out text or questions of it."
        )
    found = [(task, settings.resolve(task.path)) for task in settings.tasks]
    for i, (task, path) in enumerate(found):
        if task.kind == "lm_eval" and not path.is_dir():
            raise PoolError(
                f"tasks[{i}].path must be a folder with the harness's task, got {path}, which "
                "isn't there: correct the path, or put the YAML file and its data there."
            )
        if task.kind != "lm_eval" and not path.is_file():
            what = "held-out text" if task.kind == "loss" else "questions"
            raise PoolError(
                f"tasks[{i}].path must be a JSONL or Parquet file, got {path}, which isn't there: "
                f"correct the path, or put {what} there."
            )
    return found


def evaluation_texts(
    texts: Mapping[str, Sequence[str]],
    questions: Mapping[str, Sequence[QuestionText]],
    harness: Mapping[str, HarnessTask],
) -> dict[str, list[str]]:
    """What no training document may hold, by task."""
    return (
        {task: list(of_task) for task, of_task in texts.items()}
        | {task: [t for q in of_task for t in q.texts()] for task, of_task in questions.items()}
        | {task: harness_texts(place) for task, place in harness.items()}
    )


def pretrained_folder(project: Project) -> str | None:
    """The pretrained model whose tokenizer reads the tasks: a folder, or a name on a hub."""
    pretrained = project.settings.proxy.pretrained
    if pretrained is None:
        return None
    folder = project.settings.resolve(pretrained)
    return str(folder) if folder.exists() else pretrained


@dg.asset(
    dagster_type=VALUES,
    group_name="experiment",
    kinds={"python"},
    code_version="1",
    deps=["experiment_pool"],
    check_specs=[
        dg.AssetCheckSpec(
            "held_out",
            asset="eval_tasks",
            blocking=True,
            description="No 13 words in a row are shared by a task's file and the experiment "
            "pool, unless the settings leave such documents out of it.",
        )
    ],
)
def eval_tasks(project: dg.ResourceParam[Project], tokenizer: dict) -> dg.MaterializeResult:
    """What the model shall be good at: held-out text of tasks, cut into windows, and questions.

    Its loss, in bits per byte, or its score on the questions is the outcome of a proxy run. Stale
    when a task's file, the tokenizer or the window length changes; a weight may change freely.
    """
    texts, questions = read_task_texts(project), read_task_questions(project)
    harness, settings = read_harness_tasks(project), project.settings
    config, model = settings.proxy.to_config(), pretrained_folder(project)
    evaluation, eval_hash = build_evaluation(
        texts,
        PoolTokenizer.from_dict(tokenizer),
        sequence_length=config.eval_length,
        questions=questions,
        harness=harness,
        model_folder=model,
        context=config.sequence_length if model is None else describe_model(model).max_length,
    )
    project.run_store.put_eval(eval_hash, evaluation)
    spec = project.pool_spec(settings.experiment_path, tokenizer["domains"])
    overlap = OverlapFinder.of(evaluation_texts(texts, questions, harness))
    find_overlap(overlap, spec)
    n_shared, excluded = overlap.n_shared(), settings.quality.exclude_overlap
    value = {
        "eval_hash": eval_hash,
        "tasks": [task.name for task in settings.tasks],
        "unigram_nats": evaluation.unigram_nats,
        "n_bytes": evaluation.n_bytes,
    }
    if model is not None:
        value["model"] = describe_model(model).weights_hash
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "tasks": markdown_table(task_rows(project, evaluation, texts)),
            "overlap with the pool": markdown_table(overlap.table()),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="held_out",
                passed=n_shared == 0 or excluded,
                metadata={"shared": n_shared, "left out of the pools": excluded},
            )
        ],
    )


def task_rows(
    project: Project, evaluation: EvalWindows, texts: Mapping[str, Sequence[str]]
) -> list[dict]:
    """One row per task, for a table: kind, weight, size."""
    rows = []
    for task in project.settings.tasks:
        name = task.name
        row = {"task": name, "kind": task.kind, "weight": task.weight}
        if task.kind == "loss":
            size = {
                "documents": len(texts[name]),
                "windows": len(evaluation.windows[name]),
                "bytes": evaluation.n_bytes[name],
                "unigram nats": evaluation.unigram_nats[name],
            }
        else:
            size = {"questions": len(evaluation.questions.get(name, [])) or None}
        rows.append(row | size)
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


#: Columns of the states' table that aren't covariates.
STATE_COLUMNS = (
    "state_id",
    "domain",
    "source_shares",
    "size_share",
    "tilt",
    "unique_share",
    "noise_share",
    "state_hash",
    "tokens_hash",
)


@dg.asset(dagster_type=FRAME, group_name="experiment", kinds={"polars"}, code_version="2")
def pool_states(
    project: dg.ResourceParam[Project], tokenizer: dict, experiment_documents: pl.DataFrame
) -> dg.MaterializeResult:
    """One row per pool state and domain: how it was drawn from the experiment pool, its covariates.

    A state is a sub-pool that proxies train on; the states must reach as far as the live pool may
    drift. Every covariate that can be measured is; the settings say which are used. Stale when the
    experiment documents or the rules of drawing change.
    """
    domains, store = tokenizer["domains"], project.run_store
    states = draw_states(
        experiment_documents,
        domains,
        project.state_ranges,
        n_states=project.design_plan.n_states,
        seed=project.design_plan.seed,
        sampler=state_sampler(project, tokenizer, experiment_documents),
        also=quantiles_of(project.settings.covariates),
    )
    hashes = keep_states(store, experiment_documents, domains, states.memberships)
    frame = states.frame(domains).with_columns(
        state_hash=pl.Series(np.repeat(hashes, len(domains))),
        tokens_hash=pl.lit(experiment_documents["tokens_hash"][0]),
    )
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "states": float(len(hashes)),
            "covariates a domain": float(len(states.covariates)),
            "reach of the covariates in use": markdown_table(
                covariate_reach(frame, project.settings.covariates)
            ),
            "states beside the experiment pool": svg_picture(
                states_plot(frame, experiment_documents, domains, project.settings.covariates),
                "pool states",
            ),
        },
    )


def state_sampler(
    project: Project, tokenizer: dict, experiment_documents: pl.DataFrame
) -> DomainSampler:
    """Reads the text of pool states from the token store."""
    tokens = project.run_store.token_store(experiment_documents["tokens_hash"][0])
    ids = experiment_documents["document_id"].to_list()
    return DomainSampler(tokens, tokenizer["tokenizer"], ids)


def quantiles_of(covariates: Sequence[str]) -> list[str]:
    """The quantiles among covariates; every other one is measured anyway."""
    return [name for name in covariates if name.endswith(tuple(QUANTILES))]


@dg.asset(dagster_type=VALUES, group_name="experiment", kinds={"polars"}, code_version="1")
def normaliser(
    project: dg.ResourceParam[Project], tokenizer: dict, experiment_documents: pl.DataFrame
) -> dg.MaterializeResult:
    """Location and scale of each covariate over states of the experiment pool, and their scorers.

    The unit in which moves of a later pool are told; a pool that was measured by other scorers is
    refused. Stale when the experiment documents or the rules of drawing change.
    """
    fitted = fit_normaliser(
        experiment_documents,
        tokenizer["domains"],
        project.state_ranges,
        seed=project.design_plan.seed,
        sampler=state_sampler(project, tokenizer, experiment_documents),
        also=quantiles_of(project.settings.covariates),
    )
    value = fitted.to_dict()
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={
            "version": fitted.version,
            "scorers": ", ".join(fitted.scorers),
            "one unit, by domain": by_domain_table(
                fitted.domains,
                dict(zip(fitted.covariates, fitted.scale_DP.T.tolist(), strict=True)),
                "covariate",
            ),
        },
    )


def covariate_reach(states: pl.DataFrame, covariates: Sequence[str]) -> list[dict]:
    """Least, middle and largest value of covariates over states and domains, and their spread."""
    rows = []
    for name in covariates:
        if name in states.columns and (values := states[name].drop_nulls().drop_nans()).len():
            rows.append({"covariate": name, **_reach(values.to_numpy())})
    return rows


def _reach(values: np.ndarray) -> dict[str, float | str]:
    low, high = float(values.min()), float(values.max())
    return {
        "least": low,
        "median": float(np.median(values)),
        "largest": high,
        "least to largest": histogram(values.tolist(), low, high, cells=10),
    }


#: Most strips of a picture: more can't be read.
MOST_STRIPS = 40


def states_plot(
    states: pl.DataFrame,
    experiment_documents: pl.DataFrame,
    domains: Sequence[str],
    covariates: Sequence[str],
) -> str:
    """A strip per domain and covariate in use: a dot per state, a mark for the pool itself."""
    names = [name for name in covariates if name in states.columns]
    pool_DP = measure_covariates(experiment_documents, domains, names)
    strips = [
        Strip(
            f"{plain(domain, 12)} · {name}",
            states.filter(pl.col("domain") == domain)[name].drop_nulls().to_list(),
            float(pool_DP[d, p]) if np.isfinite(pool_DP[d, p]) else None,
        )
        for p, name in enumerate(names)
        for d, domain in enumerate(domains)
    ]
    return strips_plot(strips[:MOST_STRIPS], "A dot is a pool state, the line the whole pool")


def state_values(states: pl.DataFrame, n_domains: int, covariates: Sequence[str]) -> np.ndarray:
    """Raw covariates of each state; shape (M, D, P).

    Raises:
        PoolError: if a covariate has no value in some domain.
    """
    missing = [name for name in covariates if name not in states.columns]
    if missing:
        raise PoolError(
            f"covariates must be measured in the experiment, got {missing[0]!r}, which pool_states "
            "lacks: materialise experiment_documents and what follows."
        )
    for name in covariates:
        absent = states.filter(~pl.col(name).is_finite().fill_null(False))
        if absent.height:
            raise PoolError(
                f"covariates must have a value in every domain, got none of {name!r} in "
                f"{absent['domain'][0]!r}: take it off the list."
            )
    return states.select(covariates).to_numpy().reshape(-1, n_domains, len(covariates))


def design_of(mixture_design: pl.DataFrame) -> Design:
    """The design as arrays, from its table."""
    shares = [name for name in mixture_design.columns if name.startswith("share__")]
    staged = [name for name in mixture_design.columns if _STAGE_SHARE.match(name)]
    n_stages = len(staged) // len(shares)
    return Design(
        state_N=mixture_design["state_id"].to_numpy(),
        mixture_ND=mixture_design.select(shares).to_numpy(),
        data_seed_N=mixture_design["data_seed"].to_numpy(),
        cell_N=mixture_design["cell"].to_numpy(),
        stage_mixture_NSD=mixture_design.select(staged)
        .to_numpy()
        .reshape(-1, n_stages, len(shares))
        if staged
        else None,
    )


#: A column with the share of a domain in a stage; none where a run has one mixture.
_STAGE_SHARE = re.compile(r"stage\d+__share__")


def domains_of(mixture_design: pl.DataFrame) -> list[str]:
    """The domains of a design's table, in order."""
    names = mixture_design.columns
    return [name.removeprefix("share__") for name in names if name.startswith("share__")]


def model_tokens(project: Project, tokens_hash: str, domains: Sequence[str]) -> str:
    """The token store that proxies read: the pool's own, or one in the pretrained model's tokens.

    Args:
        project: names the model and the experiment pool.
        tokens_hash: of the experiment pool's own token store, whose documents are wanted.
        domains: of the experiment.
    """
    model = pretrained_folder(project)
    if model is None:
        return tokens_hash
    noise_seed = project.settings.design.seed if project.state_ranges.noise > 0 else None
    spec = project.pool_spec(project.settings.experiment_path, domains, noise_seed=noise_seed)
    ids = project.run_store.token_store(tokens_hash).document_ids()
    return write_model_tokens(
        project.run_store,
        spec,
        pl.DataFrame({"document_id": ids}),
        model,
        describe_model(model).weights_hash,
    )


def proxy_config(project: Project, tokens_hash: str) -> ProxyConfig | PretrainedConfig:
    """The model and recipe of the proxy runs.

    Args:
        project: its settings say which.
        tokens_hash: of the token store that proxies read; its documents say how many tokens a
            sample has.

    Raises:
        ConfigError: if the pretrained model can't be read, or not as long a sequence.
    """
    proxy, model = project.settings.proxy, pretrained_folder(project)
    if model is None:
        return proxy.to_config()
    facts = describe_model(model)
    lengths = np.diff(project.run_store.token_store(tokens_hash).offsets())
    config = proxy.to_pretrained(
        model, weights_hash=facts.weights_hash, mean_tokens=float(lengths[lengths > 0].mean())
    )
    if config.sequence_length > facts.max_length:
        raise ConfigError(
            f"proxy.sequence_length must be <= {facts.max_length}, the longest context of {model}, "
            f"got {config.sequence_length}. Set proxy.overrides.sequence_length."
        )
    return config


def specs_of(project: Project, mixture_design: pl.DataFrame) -> list[ProxySpec]:
    """The spec of each proxy run of a design's table.

    Raises:
        ConfigError: if the settings or the engine changed since the table was made.
    """
    config = proxy_config(project, mixture_design["tokens_hash"][0])
    hashes = {
        state: name for state, name in mixture_design.select("state_id", "state_hash").iter_rows()
    }
    specs = make_specs(
        design_of(mixture_design),
        [hashes[state] for state in range(len(hashes))],
        tokens_hash=mixture_design["tokens_hash"][0],
        eval_hash=mixture_design["eval_hash"][0],
        config=config,
        device=project.device,
    )
    specs = at_sizes(project.settings, specs, mixture_design["state_id"].to_numpy())
    if [spec.key for spec in specs] != mixture_design["proxy_run_id"].to_list():
        raise ConfigError(
            "proxy settings or the training engine changed since mixture_design was made: "
            "materialise mixture_design first, then proxy_runs."
        )
    return specs


@dg.asset(
    dagster_type=FRAME,
    group_name="experiment",
    kinds={"polars"},
    code_version="1",
    check_specs=[
        dg.AssetCheckSpec(
            "mixtures_sum_to_one",
            asset="mixture_design",
            blocking=True,
            description="Every mixture has shares >= 0 that sum to 1.",
        )
    ],
)
def mixture_design(
    project: dg.ResourceParam[Project],
    tokenizer: dict,
    eval_tasks: dict,
    pool_states: pl.DataFrame,
) -> dg.MaterializeResult:
    """One row per proxy run to make: a pool state, a mixture, a seed.

    States and mixtures are drawn independently; a few pairs are repeated with other seeds, which
    measures the noise floor. Row i stays the same when the design grows. Stale when states, tasks,
    design or proxy settings change.
    """
    domains, plan = tokenizer["domains"], project.design_plan
    design = make_design(plan, len(domains))
    hashes = pool_states.unique("state_id", maintain_order=True)["state_hash"].to_list()
    tokens_hash = model_tokens(project, pool_states["tokens_hash"][0], domains)
    eval_hash, config = eval_tasks["eval_hash"], proxy_config(project, tokens_hash)
    if isinstance(config, PretrainedConfig) and eval_tasks["model"] != config.weights_hash:
        raise ConfigError(
            f"proxy.pretrained must be the model whose tokens eval_tasks was made in "
            f"({eval_tasks['model']}), got {config.weights_hash}: materialise eval_tasks first."
        )
    specs = make_specs(
        design,
        hashes,
        tokens_hash=tokens_hash,
        eval_hash=eval_hash,
        config=config,
        device=project.device,
    )
    specs = at_sizes(project.settings, specs, design.state_N)
    frame = spec_table(specs, design, domains).with_columns(
        tokens_hash=pl.lit(tokens_hash), eval_hash=pl.lit(eval_hash)
    )
    worst = float(np.abs(design.mixture_ND.sum(axis=1) - 1).max())
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "proxy runs": float(len(specs)),
            "distinct pairs": float(plan.n_runs),
            "pool states": float(len(hashes)),
            **({"stages a run": float(plan.stages)} if plan.stages > 1 else {}),
            "engine": specs[0].engine,
            "shares": markdown_table(share_reach(design, domains)),
            "shares of all runs": svg_picture(
                strips_plot(
                    [
                        Strip(domain, share_N.tolist(), 1 / len(domains))
                        for domain, share_N in zip(domains, design.mixture_ND.T, strict=True)
                    ][:MOST_STRIPS],
                    "A dot is a run's share of a domain, the line the equal share",
                    limits=(0.0, 1.0),
                ),
                "shares of the design",
            ),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="mixtures_sum_to_one",
                passed=worst < 1e-6 and bool((design.mixture_ND >= 0).all()),
                metadata={"largest deviation": worst},
            )
        ],
    )


def share_reach(design: Design, domains: list[str]) -> list[dict]:
    """Least, middle and largest share of each domain over the design, and how they spread."""
    return [
        {
            "domain": domain,
            "least": float(share_N.min()),
            "median": float(np.median(share_N)),
            "largest": float(share_N.max()),
            "0 to 1": histogram(share_N.tolist(), 0, 1),
        }
        for domain, share_N in zip(domains, design.mixture_ND.T, strict=True)
    ]
