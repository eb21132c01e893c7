"""From effects and the live pool's state to a mixture and its rivals."""

import math
from collections.abc import Sequence
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl

from causalmix_pipeline.adapters.asked_estimator import fit_asked
from causalmix_pipeline.adapters.baseline_mixtures import make_baselines
from causalmix_pipeline.adapters.estimators import fit_chosen
from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.assets.column_lineage import baselines_lineage
from causalmix_pipeline.assets.pictures import by_domain_table
from causalmix_pipeline.assets.recommendation_metadata import recommendation_metadata
from causalmix_pipeline.core.belief import Overlap, reach_of
from causalmix_pipeline.core.effects import Z90, EffectEstimator
from causalmix_pipeline.core.gain_calibration import read_calibration
from causalmix_pipeline.core.policy import Constraints, Recommendation, recommend, weighted_gain
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.top_up import plan_top_up, stack_top_ups
from causalmix_pipeline.resources.frame_store import FRAME, VALUES
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings


def weights_of(settings: Settings, runs: RunTable) -> np.ndarray:
    """Weight of each task in the order of the run table, sum 1; shape (T,)."""
    weights_T = np.array([settings.task_weights.get(task, 0.0) for task in runs.tasks])
    return weights_T / weights_T.sum()


def simplex_check(name: str, mixtures: Sequence[np.ndarray]) -> dg.AssetCheckResult:
    """Shares >= 0 that sum to 1."""
    worst = max(abs(float(mixture_D.sum()) - 1) for mixture_D in mixtures)
    least = min(float(mixture_D.min()) for mixture_D in mixtures)
    return dg.AssetCheckResult(
        check_name=name,
        passed=worst < 1e-6 and least >= 0,
        metadata={"largest deviation of the sum": worst, "least share": least},
    )


def baselines_for(settings: Settings, runs: RunTable, natural_D: np.ndarray) -> pl.DataFrame:
    """One row per domain, one column per baseline, and the reference, which is one of them."""
    fixed = settings.policy.fixed_mixture
    mixtures = make_baselines(
        runs,
        weights_of(settings, runs),
        natural_D,
        None if fixed is None else np.array([fixed.get(domain, 0.0) for domain in runs.domains]),
        seed=settings.seed,
    )
    mixtures["reference"] = mixtures[settings.policy.reference]
    return pl.DataFrame({"domain": runs.domains, **mixtures})


@dg.asset(
    dagster_type=FRAME,
    group_name="recommendation",
    kinds={"lightgbm"},
    code_version="2",
    check_specs=[
        dg.AssetCheckSpec(
            "baselines_sum_to_one",
            asset="baseline_mixtures",
            blocking=True,
            description="Every baseline has shares >= 0 that sum to 1.",
        )
    ],
)
def baseline_mixtures(
    project: dg.ResourceParam[Project], live_covariates: pl.DataFrame, run_table: pl.DataFrame
) -> dg.MaterializeResult:
    """One row per domain, one column per baseline, and the reference, which is one of them.

    What the recommended mixture is held against: equal, natural, fixed (where it is set), the best
    point of a grid, RegMix, the log-linear law, and, where each domain has a task of its name, DMO.
    The gains predicted of them are in `recommended_mixture`. Stale when the live pool's token
    shares, the run table, or task weights change.
    """
    runs, settings = RunTable.from_frame(run_table), project.settings
    frame = baselines_for(settings, runs, live_covariates["natural_share"].to_numpy())
    return dg.MaterializeResult(
        value=frame,
        data_version=dg.DataVersion(content_digest(frame)),
        metadata={
            "shares": by_domain_table(
                runs.domains,
                {name: frame[name].to_list() for name in frame.columns[1:]},
                "mixture",
            ),
            **baselines_lineage(settings, frame, runs),
        },
        check_results=[
            simplex_check(
                "baselines_sum_to_one", [frame[name].to_numpy() for name in frame.columns[1:]]
            )
        ],
    )


def known(value: float) -> float | None:
    """The number, or None where it isn't known."""
    return float(value) if math.isfinite(value) else None


def interval(gain: float, se: float) -> dict[str, float | None]:
    """A gain with its 90% interval; unknown ends are None."""
    return {"gain": known(gain), "low": known(gain - Z90 * se), "high": known(gain + Z90 * se)}


def constraints_of(
    settings: Settings, live_covariates: pl.DataFrame, reference_D: np.ndarray
) -> Constraints:
    """What the mixture must keep to."""
    policy, n_domains = settings.policy, len(reference_D)
    available_D = live_covariates["tokens"].to_numpy().astype(float)
    return Constraints(
        reference_D,
        np.full(n_domains, policy.least_share),
        np.full(n_domains, policy.most_share),
        trust_radius=policy.trust_radius,
        budget_tokens=float(policy.budget_tokens or available_D.sum()),
        available_D=available_D,
        max_epochs=policy.max_epochs,
        guard_rails=policy.guard_rails,
    )


def keep_reference(
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    constraints: Constraints,
    domains: Sequence[str],
) -> Recommendation:
    """The reference mixture as recommendation: no gain is promised where no run has been.

    Where shares or tokens forbid it, the nearest that they allow; its gain isn't known.
    """
    n_tasks = estimator.predict(state_DP, constraints.reference_D[None]).shape[1]
    mixture_D, moved = constraints.nearest_reference(domains)
    gain = math.nan if moved else 0.0
    return Recommendation(
        mixture_D=mixture_D,
        gain=gain,
        gain_se=math.nan,
        gain_T=np.full(n_tasks, gain),
        gain_se_T=np.full(n_tasks, math.nan),
        slack=constraints.slack(mixture_D, domains),
        unconstrained_D=mixture_D,
        unconstrained_gain=gain,
    )


def size_of_reach(reach: Overlap) -> dict:
    """How far the size of the model is from the proxies'; nothing where they have one size."""
    if reach.size is None:
        return {}
    return {"size": reach.size.to_dict() | {"pool_verdict": reach.pool_verdict}}


def describe_gains(
    estimator: EffectEstimator,
    state_DP: np.ndarray,
    mixtures: dict[str, np.ndarray],
    reference_D: np.ndarray,
    weights_T: np.ndarray,
    reach: Overlap,
) -> list[dict]:
    """Weighted gain of each mixture over the reference, in bits per byte, with its interval."""
    mixture_MD = np.stack(list(mixtures.values()))
    gain_M, se_M = weighted_gain(estimator, state_DP, mixture_MD, reference_D, weights_T)
    if reach.verdict == "unsupported":
        gain_M = se_M = np.full(len(mixtures), math.nan)
    return [
        {"mixture": name, **interval(gain, se * reach.doubt)}
        for name, gain, se in zip(mixtures, gain_M, se_M, strict=True)
    ]


def describe_tasks(
    runs: RunTable, choice: Recommendation, weights_T: np.ndarray, loss_T: np.ndarray
) -> list[dict]:
    """Gain of each task with its interval, and the loss predicted for the reference mixture.

    The loss is null for a model of a size beyond those trained: a level isn't read on.
    """
    return [
        {
            "task": task,
            "weight": float(weights_T[t]),
            **interval(choice.gain_T[t], choice.gain_se_T[t]),
            "reference_bits_per_byte": known(loss_T[t]),
        }
        for t, task in enumerate(runs.tasks)
    ]


def choose_mixture(
    settings: Settings,
    runs: RunTable,
    cate_model: dict,
    live_covariates: pl.DataFrame,
    baselines: pl.DataFrame,
    top_up_runs: pl.DataFrame,
) -> dict:
    """The recommendation with all that explains it, as plain values.

    The effect model is conditioned on the top-up runs; nothing is chosen or searched again.
    """
    runs = stack_top_ups(runs, top_up_runs)
    domains, weights_T = runs.domains, weights_of(settings, runs)
    chosen = cate_model["chosen"]
    calibration = read_calibration(cate_model["calibration"])
    kept = (settings.seed, cate_model["parameters"], calibration)
    estimator = fit_chosen(runs, chosen, *kept)
    live_DP = live_covariates.select(runs.covariates).to_numpy()
    reach = reach_of(runs, live_DP)
    planned = plan_top_up(reach, runs, top_up_runs, live_DP, seed=settings.seed)
    state_DP, reference_D = reach.edge_DP, baselines["reference"].to_numpy()
    constraints = constraints_of(settings, live_covariates, reference_D)
    constraints = constraints.doubted(reach.pool_doubt, domains)
    if reach.verdict == "unsupported":
        choice = keep_reference(estimator, state_DP, constraints, domains)
    else:
        asked = fit_asked(
            runs,
            chosen,
            dict(zip(runs.tasks, weights_T.tolist(), strict=True)),
            constraints.guard_rails,
            seed=settings.seed,
            parameters=cate_model["parameters"],
            calibration=calibration,
        )
        choice = recommend(
            settings.policy.name,
            asked.estimator,
            state_DP,
            asked.weights_T,
            constraints,
            domains=domains,
            tasks=asked.tasks,
            design_ND=runs.mixture_ND,
            confidence_z=settings.policy.confidence_z,
            seed=settings.seed,
        )
        by_task = estimator.gain(state_DP, choice.mixture_D[None], reference_D)
        choice = replace(
            choice,
            gain_se=choice.gain_se * reach.doubt,
            gain_T=by_task.mean_MT[0],
            gain_se_T=by_task.se_MT[0] * reach.doubt,
        )
    loss_T = -estimator.predict(state_DP, reference_D[None])[0]
    if reach.size is not None and reach.size.distance:  # it is of the size that is read at
        loss_T = np.full_like(loss_T, math.nan)
    mixtures = {"recommended": choice.mixture_D} | {
        name: baselines[name].to_numpy() for name in baselines.columns if name != "domain"
    }
    return {
        "domains": list(domains),
        "mixtures": {name: mixture_D.tolist() for name, mixture_D in mixtures.items()},
        "reference_name": settings.policy.reference,
        "policy": settings.policy.name,
        "verdict": reach.verdict,
        "overlap_score": known(reach.score),
        "domain_scores": reach.domain_score_D.tolist(),
        **size_of_reach(reach),
        "drift": reach.drift.to_dicts(),
        **interval(choice.gain, choice.gain_se),
        "gains": describe_gains(
            estimator,
            state_DP,
            mixtures,
            reference_D,
            weights_T,
            reach,
        ),
        "task_gains": describe_tasks(runs, choice, weights_T, loss_T),
        "slack": choice.slack.to_dicts(),
        "only_reference": choice.only_reference,
        "unconstrained": choice.unconstrained_D.tolist(),
        "unconstrained_gain": known(choice.unconstrained_gain),
        "budget_tokens": constraints.budget_tokens,
        "top_up": [
            {f"share__{d}": share for d, share in zip(domains, mixture_D.tolist(), strict=True)}
            for mixture_D in planned.values()
        ],
    }


@dg.asset(
    dagster_type=VALUES,
    group_name="recommendation",
    kinds={"python"},
    code_version="2",
    check_specs=[
        dg.AssetCheckSpec(
            "mixture_sums_to_one",
            asset="recommended_mixture",
            blocking=True,
            description="Shares >= 0 that sum to 1.",
        ),
        dg.AssetCheckSpec(
            "within_reach",
            asset="recommended_mixture",
            description="The live pool is near enough to the pool states of the proxy runs. Where "
            "it isn't, the reference mixture is kept.",
        ),
    ],
)
def recommended_mixture(
    project: dg.ResourceParam[Project],
    live_covariates: pl.DataFrame,
    baseline_mixtures: pl.DataFrame,
    run_table: pl.DataFrame,
    top_up_runs: pl.DataFrame,
    cate_model: dict,
) -> dg.MaterializeResult:
    """The mixture to train the live pool on, what it's expected to gain, and how sure that is.

    Gains are in bits per byte over the reference mixture, with 90% intervals. No proxy is trained
    for it. Stale when the live covariates, the effect model, top-up runs, task weights or the
    policy change.
    """
    value = choose_mixture(
        project.settings,
        RunTable.from_frame(run_table),
        cate_model,
        live_covariates,
        baseline_mixtures,
        top_up_runs,
    )
    best = value["mixtures"]["recommended"]
    reached = value["verdict"] != "unsupported"
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata=recommendation_metadata(value),
        check_results=[
            simplex_check("mixture_sums_to_one", [np.array(best)]),
            dg.AssetCheckResult(
                check_name="within_reach",
                passed=reached,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"verdict": value["verdict"], "score": value["overlap_score"] or 0.0},
            ),
        ],
    )
