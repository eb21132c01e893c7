"""Does the stage of training matter for the mixture? Measured on real text.

A design of proxy runs whose mixture changes between equal stages, each stage's drawn independently.
Held out by pool state: how well outcomes are predicted from the mixtures of the stages, with and
without the checkpoints, and from their mean alone; a placebo in which the stages of each run are
permuted; the mixtures that would be recommended for each stage of new pool states. Everything is
kept in the run store of `state_matters`.

    python -m causalmix_pipeline_tests.benchmarks.stage_matters --runs 240 --stages 2
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.demo_pool import assemble_demo_pool
from causalmix_pipeline.adapters.estimators import CombinedEstimator, fit_chosen
from causalmix_pipeline.adapters.experiment import measure_states
from causalmix_pipeline.adapters.staged_fits import Remembering, fit_stages
from causalmix_pipeline.core.design import DesignPlan
from causalmix_pipeline.core.effects import center_by_state, cross_validate, r_squared
from causalmix_pipeline.core.policy import Constraints, recommend
from causalmix_pipeline.core.pool_state import draw_state, index_documents
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.core.stage_effects import predict_staged
from causalmix_pipeline.core.stage_schedule import (
    StageObjective,
    joint_gain,
    joint_over_static,
    roll_schedule,
)
from causalmix_pipeline.core.stage_trial import stage_matters
from causalmix_pipeline.core.stages import StagedRuns
from causalmix_pipeline_tests.benchmarks.state_matters import (
    DEFAULT_COVARIATES,
    NEW_STATES_FROM,
    STATES,
    TASKS,
    Bench,
    prepare,
    run_design,
    weights_of,
)

OBJECTIVE = "wants"


def staged_runs(bench: Bench, runs: RunTable, first_loss: float) -> StagedRuns:
    """The runs with what their records keep of their stages."""
    records = [bench.store.get(run_id) for run_id in runs.run_ids]
    controls = [record.control for record in records if record and record.control]
    mixture_NSD = [[stage["shares"] for stage in control["path"]] for control in controls]
    epochs = [record.epochs for record in records if record]
    return StagedRuns.of(runs, controls, epochs, np.array(mixture_NSD), first_loss)


def held_out(staged: StagedRuns, names: tuple[str, ...], weights_T: np.ndarray) -> pl.DataFrame:
    """R2 within unseen pool states of the objective, and the mean of the wanted tasks' R2.

    Each by the mean mixture, by the stages' mixtures, and by these and the checkpoints.
    Hyper-parameters are searched anew without each fold.
    """
    tasks = [task for task, w in zip(staged.runs.tasks, weights_T, strict=True) if w > 0]
    staged = replace(staged, runs=staged.runs.select_tasks(tasks))
    weights_T = weights_T[weights_T > 0]
    rows = []
    for name in names:
        chosen = dict.fromkeys(tasks, name)
        predicted = {
            "mean mixture": cross_validate(
                lambda chosen=chosen: CombinedEstimator(chosen, 0), staged.runs
            ).prediction_NT,
            "stages": predict_staged(staged, Remembering(chosen, 0)),
            "stages and checkpoints": predict_staged(
                staged, Remembering(chosen, 0), checkpoint=True
            ),
        }
        for model, prediction_NT in predicted.items():
            y_NT = center_by_state(staged.runs.outcome_NT, staged.runs.groups)
            f_NT = center_by_state(prediction_NT, staged.runs.groups)
            of_tasks = [r_squared(y_NT[:, t], f_NT[:, t]) for t in range(len(tasks))]
            objective = r_squared(y_NT @ weights_T, f_NT @ weights_T)
            rows.append((name, model, objective, float(np.mean(of_tasks))))
            print(f"  {name}, {model}: R2 {objective:.3f}, mean of tasks {rows[-1][3]:.3f}",
                  flush=True)  # fmt: skip
    return pl.DataFrame(rows, ["estimator", "model", "r2_objective", "r2_tasks"], orient="row")


def new_states(bench: Bench, names: tuple[str, ...], n: int, seed: int) -> np.ndarray:
    """Scaled covariates of pool states that no run saw; (M, D, P)."""
    index = index_documents(bench.documents, bench.domains, bench.ranges)
    memberships = [
        draw_state(index, bench.ranges, state_id=NEW_STATES_FROM + m, seed=seed)[1]
        for m in range(n)
    ]
    known = bench.normaliser.covariates
    values_MDP = measure_states(bench.documents, bench.domains, known, memberships, bench.sampler)
    return bench.normaliser.scale(values_MDP)[:, :, [known.index(name) for name in names]]


def schedules(bench: Bench, staged: StagedRuns, name: str, n_new: int) -> pl.DataFrame:
    """The mixtures of each stage for new pool states, beside the static one, with their gains."""
    runs, weights_T = staged.runs, weights_of(OBJECTIVE, bench.tasks)
    weights = dict(zip(runs.tasks, weights_T.tolist(), strict=True))
    fits = fit_stages(staged, dict.fromkeys(runs.tasks, name), weights)
    for roll in fits.rolls:
        print(f"checkpoint after stage {roll.stage + 1}: losses predicted with R2 {roll.r2:.3f}")
    equal_D = np.full(len(bench.domains), 1 / len(bench.domains))
    free = Constraints.simplex_only(equal_D)
    wanted = runs.select_tasks(fits.tasks)
    static = fit_chosen(wanted, dict.fromkeys(fits.tasks, name))
    objective = StageObjective(fits.tasks, fits.weights_T, free, staged.n_stages)
    rows = []
    for m, state_DP in enumerate(new_states(bench, runs.covariates, n_new, 0)):
        best = recommend("optimum", static, state_DP, fits.weights_T, free,
                         domains=bench.domains, unconstrained_too=False)  # fmt: skip
        choices = roll_schedule(fits.models, fits.rolls, state_DP, best.mixture_D, objective)
        gain, se = joint_gain(choices)
        over_static, _ = joint_over_static(choices)
        rows.append((m, "static", best.gain, best.gain_se, None, best.mixture_D.tolist()))
        rows.append((m, "schedule", gain, se, over_static, None))
        rows += [
            (m, f"stage {choice.stage + 1}", choice.gain, choice.gain_se, None,
             choice.mixture_D.tolist())
            for choice in choices
        ]  # fmt: skip
    columns = ["state", "mixture", "gain", "se", "over_static", "shares"]
    return pl.DataFrame(rows, columns, orient="row")


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("data/demo"), help="the demo pool")
    parser.add_argument("--out", type=Path, default=Path("data/study"), help="run store, tables")
    parser.add_argument("--states", choices=list(STATES), default="natural")
    parser.add_argument("--tasks", choices=list(TASKS), default="first", help="held-out text of")
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--new-states", type=int, default=16)
    parser.add_argument("--placebos", type=int, default=199)
    parser.add_argument("--only-train", action="store_true")
    parser.add_argument("--covariates", default=",".join(DEFAULT_COVARIATES))
    args = parser.parse_args()
    config = replace(ProxyConfig(), steps=args.steps)
    if not (args.pool / "pool.json").exists():
        assemble_demo_pool(args.pool)
    bench = prepare(args.pool, args.tasks, args.out, STATES[args.states], args.workers)
    plan = DesignPlan(n_runs=args.runs, stages=args.stages)
    runs = run_design(bench, plan, config, tuple(args.covariates.split(",")))
    name = f"{args.states}_{args.tasks}_{args.stages}"
    staged = staged_runs(bench, runs, math.log(config.vocab_size))
    staged.to_frame().write_parquet(args.out / f"staged_runs_{name}.parquet")
    if args.only_train:
        return
    weights_T = weights_of(OBJECTIVE, bench.tasks)
    print(f"objective: {OBJECTIVE}; {stage_matters(staged, weights_T, args.placebos).describe()}")
    for t, task in enumerate(bench.tasks):
        alone_T = np.eye(len(bench.tasks))[t]
        print(f"  {task}: {stage_matters(staged, alone_T, args.placebos).describe()}")
    print("held out by pool state, within states:")
    held_out(staged, ("structured_ridge", "response_surface"), weights_T).write_csv(
        args.out / f"stage_held_out_{name}.csv"
    )
    table = schedules(bench, staged, "response_surface", args.new_states)
    table.write_parquet(args.out / f"stage_schedules_{name}.parquet")
    print(f"domains: {bench.domains}; means over {args.new_states} new states:")
    for mixture in table["mixture"].unique(maintain_order=True):
        rows = table.filter(mixture=mixture)
        shares = rows["shares"].drop_nulls().to_list()
        shown = np.mean(shares, axis=0).round(3).tolist() if shares else ""
        over = rows["over_static"].mean()
        print(f"  {mixture}: gain {rows['gain'].mean():.4f} +- {rows['se'].mean():.4f}"
              + ("" if over is None else f", over static {over:+.4f}"), shown)  # fmt: skip


if __name__ == "__main__":
    main()
