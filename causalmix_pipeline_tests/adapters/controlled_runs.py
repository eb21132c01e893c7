"""Controlled runs of a tiny pretrained model; run as a script, it trains one until it's killed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from causalmix_pipeline.adapters.pretrained_proxy import train_pretrained
from causalmix_pipeline.core.actor_critic import RLScheduler
from causalmix_pipeline.core.controllers import DoReMi, OnlineBandit, Schedule
from causalmix_pipeline_tests.adapters.pretrained_runs import small_config, write_run

#: Twelve steps in six blocks, checkpoints within the third and at the end of the fifth.
RECIPE = {"tokens": 64 * 4 * 12, "checkpoint_steps": 5}
CONTROLLERS = {
    "schedule": Schedule(stages=((0.5, (0.8, 0.2)), (0.5, (0.1, 0.9)))),
    "online_bandit": OnlineBandit(blocks=6),
    "doremi": DoReMi(blocks=6, probe_windows=2),
    "rl_scheduler": RLScheduler(blocks=6, probe_windows=2, updates=4),
}


def write_controlled(root: Path, model: Path | str, kind: str, **changes):
    """A store, a run with a controller and its tasks."""
    store, spec, evaluation = write_run(root, small_config(model, **RECIPE | changes))
    return store, replace(spec, controller=CONTROLLERS[kind]), evaluation


def main(root: str, model: str, kind: str) -> None:
    """Train a run and print each finished step."""
    store, spec, evaluation = write_controlled(Path(root), model, kind)
    train_pretrained(
        store,
        spec,
        device="cpu",
        evaluation=evaluation,
        progress=lambda step, loss: print(step, flush=True),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
