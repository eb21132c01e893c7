"""Runs whose mixture changes between stages: rows of (run, stage).

Each stage's mixture is drawn independently of the pool, of the other stages and so of the
checkpoint that it meets: what it does given that checkpoint is identified. A checkpoint is what the
stages before left: losses of each domain, their slopes, tokens and epochs so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Covariates of a checkpoint, one of each for each domain.
CHECKPOINT_LOSS, CHECKPOINT_SLOPE = "checkpoint_loss", "checkpoint_slope"

#: What a row of the stage table tells of each domain, beside the covariates of the pool.
_BY_DOMAIN = ("tokens", "epochs", "loss", "slope", "share")


@dataclass(frozen=True, eq=False)
class StagedRuns:
    """Proxy runs, and for each of their S stages the mixture and what the stage started from.

    Attributes:
        runs: covariates of the pool, mean mixture and outcome of each run.
        mixture_NSD: mixture of each stage.
        tokens_NSD: tokens of each domain read before the stage.
        epochs_NSD: how often each domain was read before the stage.
        loss_NSD: nats per token of each domain at the stage's start; nan where not measured.
        slope_NSD: change of that loss over the stage before, per whole run; 0 where unknown.
    """

    runs: RunTable
    mixture_NSD: np.ndarray
    tokens_NSD: np.ndarray
    epochs_NSD: np.ndarray
    loss_NSD: np.ndarray
    slope_NSD: np.ndarray

    @property
    def n_stages(self) -> int:
        """Number of stages, S."""
        return self.mixture_NSD.shape[1]

    @classmethod
    def of(
        cls,
        runs: RunTable,
        controls: Sequence[Mapping[str, Any]],
        epochs: Sequence[Sequence[float]],
        mixture_NSD: np.ndarray,
        first_loss: float | None,
    ) -> StagedRuns:
        """Join finished runs with what their records keep of their schedules.

        Args:
            runs: the runs.
            controls: `ProxyRecord.control` of each.
            epochs: `ProxyRecord.epochs` of each.
            mixture_NSD: mixture of each stage of each.
            first_loss: loss of the untrained model, the logarithm of its vocabulary; None for a
                model that knows something, whose loss at the start isn't measured.
        """
        n_runs, n_stages, n_domains = mixture_NSD.shape
        tokens_NSD = np.zeros((n_runs, n_stages + 1, n_domains))
        loss_NSD = np.full(mixture_NSD.shape, np.nan if first_loss is None else first_loss)
        for n, control in enumerate(controls):
            for stage, block in enumerate(control["path"]):
                tokens_NSD[n, stage + 1] = tokens_NSD[n, stage] + block["tokens"]
                if stage + 1 < n_stages:
                    loss_NSD[n, stage + 1] = np.array(block["probe_loss"], dtype=float)
        total_ND = np.maximum(tokens_NSD[:, -1:], 1.0)
        slope_NSD = np.zeros_like(loss_NSD)
        slope_NSD[:, 1:] = np.nan_to_num(np.diff(loss_NSD, axis=1) * n_stages)
        return cls(
            runs,
            mixture_NSD,
            tokens_NSD[:, :-1],
            tokens_NSD[:, :-1] / total_ND * np.array(epochs)[:, None],
            loss_NSD,
            slope_NSD,
        )

    def subset(self, index: np.ndarray) -> StagedRuns:
        """The runs at integer positions, or of an (N,) mask."""
        arrays = {
            name: getattr(self, name)[index]
            for name in ("mixture_NSD", "tokens_NSD", "epochs_NSD", "loss_NSD", "slope_NSD")
        }
        return StagedRuns(self.runs.subset(index), **arrays)

    def permuted(self, rng: np.random.Generator) -> StagedRuns:
        """Each run's stages in a random order of its own: a placebo in which it can't matter.

        Runs that differ only by seed keep the same order.
        """
        cells, inverse_N = np.unique(self.runs.repeat_of_N, return_inverse=True)
        order_NS = np.tile(np.arange(self.n_stages), (len(cells), 1))
        order_NS = rng.permuted(order_NS, axis=1)[inverse_N]
        mixture_NSD = np.take_along_axis(self.mixture_NSD, order_NS[:, :, None], axis=1)
        return replace(self, mixture_NSD=mixture_NSD)

    def unmeasured(self) -> dict[str, int]:
        """Domains whose loss some runs' checkpoints lack, with how many runs those are.

        A domain that a run never reads isn't measured. Checkpoints then can't be covariates.
        """
        lacks_ND = ~np.isfinite(self.loss_NSD[:, 1:]).all(axis=1)
        counts = zip(self.runs.domains, lacks_ND.sum(axis=0).tolist(), strict=True)
        return {domain: count for domain, count in counts if count}

    def checkpoint_covariates(self, stage: int) -> tuple[str, ...]:
        """Covariates that a checkpoint adds before a stage, counted from 0.

        The first stage has none: all runs start alike. Where only one stage went before, the slope
        is the loss less a constant, and is left out.
        """
        return (CHECKPOINT_LOSS, CHECKPOINT_SLOPE)[: min(stage, 2)]

    def table(
        self, stage: int, outcome_NT: np.ndarray | None = None, *, checkpoint: bool = False
    ) -> RunTable:
        """The runs with a stage's mixture, for an effect estimator.

        Args:
            stage: counted from 0.
            outcome_NT: other outcomes, such as without the effects of the other stages.
            checkpoint: whether the checkpoint is among the covariates. Each run is then a state of
                its own, and folds keep the runs of a pool state together.
        """
        outcome_NT = self.runs.outcome_NT if outcome_NT is None else outcome_NT
        table = replace(self.runs, mixture_ND=self.mixture_NSD[:, stage], outcome_NT=outcome_NT)
        added = self.checkpoint_covariates(stage) if checkpoint else ()
        if not added:
            return table
        values = [self.loss_NSD[:, stage], self.slope_NSD[:, stage]][: len(added)]
        return replace(
            table,
            covariates=(*table.covariates, *added),
            state_NDP=np.concatenate([table.state_NDP, np.stack(values, axis=-1)], axis=-1),
            state_ids=np.arange(table.n_runs),
            repeat_of_N=np.arange(table.n_runs),
            group_N=table.groups,
        )

    def to_frame(self) -> pl.DataFrame:
        """One row per run and stage; stages counted from 1."""
        runs, n_stages = self.runs, self.n_stages
        frame = runs.to_frame()
        rows = frame.select(pl.exclude("^share__.*$"))[np.repeat(np.arange(runs.n_runs), n_stages)]
        stage_R = np.tile(np.arange(n_stages), runs.n_runs)
        columns = [
            pl.Series("stage", stage_R + 1),
            pl.Series("fraction", stage_R / n_stages),
        ]
        arrays = (self.tokens_NSD, self.epochs_NSD, self.loss_NSD, self.slope_NSD, self.mixture_NSD)
        for name, values_NSD in zip(_BY_DOMAIN, arrays, strict=True):
            columns += [
                pl.Series(f"{name}__{domain}", values_NSD[:, :, d].ravel(), nan_to_null=True)
                for d, domain in enumerate(runs.domains)
            ]
        return rows.with_columns(columns)

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> StagedRuns:
        """Inverse of `to_frame`.

        Raises:
            EstimationError: if the frame has no row, as where the design has one stage.
        """
        if not frame.height:
            raise EstimationError(
                "stage_table must have a row per run and stage, got none: set design.stages to 2 "
                "or more, and train the design."
            )
        n_stages = int(frame["stage"].max())  # pyright: ignore[reportArgumentType]
        domains = [
            name.removeprefix("share__") for name in frame.columns if name.startswith("share__")
        ]
        arrays = {
            name: frame.select(pl.col([f"{name}__{domain}" for domain in domains]).cast(pl.Float64))
            .fill_null(np.nan)
            .to_numpy()
            .reshape(-1, n_stages, len(domains))
            for name in _BY_DOMAIN
        }
        mean_ND = arrays["share"].mean(axis=1)
        own = [f"{name}__{domain}" for name in _BY_DOMAIN for domain in domains]
        of_runs = frame.filter(pl.col("stage") == 1).drop("stage", "fraction", *own)
        shares = {f"share__{domain}": mean_ND[:, d] for d, domain in enumerate(domains)}
        runs = RunTable.from_frame(of_runs.with_columns(**shares))
        return cls(runs, arrays.pop("share"), *(arrays[name] for name in _BY_DOMAIN[:-1]))
