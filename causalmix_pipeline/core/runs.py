"""The table of finished proxy runs that every effect estimator is fitted on.

One row is one proxy run: a pool state, a mixture, a seed, and the outcome on each task. The table
checks itself when it is made, so that an estimator never meets a diverged or half-read run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import EstimationError

#: Largest distance of a mixture's sum from 1. Tables with shares rounded to .001 over tens of
#: domains (RegMix's: .996-1.003) must be rescaled by the caller, who knows that they are rounded.
SIMPLEX_TOLERANCE = 1e-6

#: Source of runs that the project made itself, and of all where nothing else is said.
OWN = "own"

#: The covariate that tells a run's size: log2 of its model's number of parameters.
SIZE_COVARIATE = "log2_parameters"

#: Most often that a state counts in `RunTable.weighed_states`: as many as a distance averages over.
MOST_COPIES = 5

_FIXED_COLUMNS = ("run_id", "state_id", "repeat_of")


@dataclass(frozen=True, eq=False)
class RunTable:
    """Proxy runs as arrays: covariates and mixtures in, outcomes out.

    Attributes:
        domains: names of the D domains, in the order of every D axis.
        covariates: names of the P covariates that each domain has; may be empty.
        tasks: names of the T tasks.
        run_ids: name of each of the N proxy runs; no two alike.
        state_ids: the pool state of each run, an integer; shape (N,).
        state_NDP: covariate values as measured, not standardised; shape (N, D, P).
        mixture_ND: shares of training tokens; shape (N, D), >= 0, each row sums to 1.
        outcome_NT: outcome per task, larger is better; shape (N, T).
        repeat_of_N: index of the (state, mixture) cell; runs of a cell differ only by seed; (N,).
        source_N: where each run is from, such as `own`; None for `own` everywhere.
        observational_sources: the sources whose mixtures weren't drawn at random.
        group_N: which runs stay together in folds, an integer, where that isn't each state's:
            runs of one pool state whose checkpoints differ. None for the state; shape (N,).
    """

    domains: tuple[str, ...]
    covariates: tuple[str, ...]
    tasks: tuple[str, ...]
    run_ids: tuple[str, ...]
    state_ids: np.ndarray
    state_NDP: np.ndarray
    mixture_ND: np.ndarray
    outcome_NT: np.ndarray
    repeat_of_N: np.ndarray
    source_N: tuple[str, ...] | None = None
    observational_sources: tuple[str, ...] = ()
    group_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Convert the arrays and refuse what no estimator can use.

        Raises:
            EstimationError: naming the run and the column, if a shape doesn't fit, a name occurs
                twice, a value isn't finite, a mixture is off the simplex, or runs of one state
                differ in their covariates or source.
        """
        if self.source_N is not None:
            source_N = tuple(map(str, self.source_N))
            object.__setattr__(self, "source_N", None if set(source_N) == {OWN} else source_N)
        known = set(self.observational_sources) & set(self.sources_of_runs)
        object.__setattr__(self, "observational_sources", tuple(sorted(known)))
        for name in ("domains", "covariates", "tasks", "run_ids"):
            object.__setattr__(self, name, tuple(str(value) for value in getattr(self, name)))
        for name in ("state_NDP", "mixture_ND", "outcome_NT"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=float))
        for name in ("state_ids", "repeat_of_N"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.int64))
        if self.group_N is not None:
            object.__setattr__(self, "group_N", np.array(self.group_N, dtype=np.int64))
        self._check_shapes()
        for name in ("domains", "covariates", "tasks", "run_ids"):
            _refuse_twice(name, getattr(self, name))
        self._check_finite()
        self._check_mixtures()
        self._check_states()

    @property
    def n_runs(self) -> int:
        """Number of proxy runs, N."""
        return len(self.run_ids)

    @property
    def size_N(self) -> np.ndarray | None:
        """Size of each run's model, log2 of its parameters; None where the runs don't tell it."""
        if SIZE_COVARIATE not in self.covariates:
            return None
        return self.state_NDP[:, 0, self.covariates.index(SIZE_COVARIATE)]

    @property
    def n_states(self) -> int:
        """Number of distinct pool states."""
        return len(np.unique(self.state_ids))

    @property
    def groups(self) -> np.ndarray:
        """What folds never split: the state of each run, unless `group_N` says; shape (N,)."""
        return self.state_ids if self.group_N is None else self.group_N

    @property
    def n_groups(self) -> int:
        """Number of distinct groups."""
        return len(np.unique(self.groups))

    @property
    def sources_of_runs(self) -> tuple[str, ...]:
        """The source of each run; N of them."""
        return (OWN,) * len(self.run_ids) if self.source_N is None else self.source_N

    @property
    def sources(self) -> tuple[str, ...]:
        """The distinct sources, `own` first."""
        return tuple(sorted(set(self.sources_of_runs), key=lambda name: (name != OWN, name)))

    @property
    def covariate_columns(self) -> tuple[str, ...]:
        """Names `<domain>__<covariate>` of the D x P covariates, domain by domain."""
        return tuple(f"{domain}__{name}" for domain in self.domains for name in self.covariates)

    def distinct_states(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (S,) of the distinct states, ascending, and their covariates (S, D, P)."""
        ids, first = np.unique(self.state_ids, return_index=True)
        return ids, self.state_NDP[first]

    def weighed_states(self) -> np.ndarray:
        """Return the distinct states, each as often as it has the usual number of mixtures.

        A state counts once for each multiple of the median number of distinct mixtures a state
        has, 1 to 5 times. So a distance to the nearest states sees that 16 further runs at one
        state, where 4 are usual, tell as much of it as four states do.

        Returns:
            Shape (S', D, P), S' >= S; the same as `distinct_states` where all have as many.
        """
        return self.state_NDP[self._weighed_rows()]

    def weighed_groups(self) -> np.ndarray | None:
        """Return the group of each of `weighed_states`; None where each state is its own."""
        return None if self.group_N is None else self.group_N[self._weighed_rows()]

    def _weighed_rows(self) -> np.ndarray:
        """Return a run of each state, as often as the state counts."""
        ids, row_S = np.unique(self.state_ids, return_index=True)
        _, first = np.unique(self.repeat_of_N, return_index=True)
        _, count_S = np.unique(self.state_ids[first], return_counts=True)
        assert len(count_S) == len(ids)
        copies_S = np.clip(count_S // max(int(np.median(count_S)), 1), 1, MOST_COPIES)
        return np.repeat(row_S, copies_S)

    def subset(self, index: np.ndarray | Sequence[int]) -> RunTable:
        """Return the runs at `index`, which is integer positions (any order) or an (N,) mask."""
        rows = np.asarray(index)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            run_ids=tuple(self.run_ids[i] for i in rows),
            state_ids=self.state_ids[rows],
            state_NDP=self.state_NDP[rows],
            mixture_ND=self.mixture_ND[rows],
            outcome_NT=self.outcome_NT[rows],
            repeat_of_N=self.repeat_of_N[rows],
            source_N=tuple(self.sources_of_runs[i] for i in rows),
            group_N=None if self.group_N is None else self.group_N[rows],
        )

    def select_tasks(self, tasks: Sequence[str]) -> RunTable:
        """Return the same runs with only `tasks`, in that order.

        Raises:
            EstimationError: if a task isn't in the table.
        """
        unknown = [task for task in tasks if task not in self.tasks]
        if unknown:
            raise EstimationError(
                f"tasks must be among those of the run table ({', '.join(self.tasks)}), "
                f"got {', '.join(unknown)}: correct the name or add the outcome to the runs."
            )
        columns = [self.tasks.index(task) for task in tasks]
        return replace(self, tasks=tuple(tasks), outcome_NT=self.outcome_NT[:, columns])

    def sorted_by_run(self) -> RunTable:
        """Return the table in the order of the run ids, so that row order can't move a fit."""
        return self.subset(np.argsort(np.array(self.run_ids), kind="stable"))

    def to_frame(self) -> pl.DataFrame:
        """Return one row per run; columns `share__`, `state__` and `outcome__` hold the arrays.

        Where all runs are our own and randomised, there is no column `source` or `randomised`.
        """
        columns: dict[str, object] = {
            "run_id": list(self.run_ids),
            "state_id": self.state_ids,
            "repeat_of": self.repeat_of_N,
        }
        for d, domain in enumerate(self.domains):
            columns[f"share__{domain}"] = self.mixture_ND[:, d]
        flat_NC = self.state_NDP.reshape(self.n_runs, len(self.covariate_columns))
        for c, name in enumerate(self.covariate_columns):
            columns[f"state__{name}"] = flat_NC[:, c]
        for t, task in enumerate(self.tasks):
            columns[f"outcome__{task}"] = self.outcome_NT[:, t]
        if self.group_N is not None:
            columns["group"] = self.group_N
        if self.sources != (OWN,) or self.observational_sources:
            columns["source"] = list(self.sources_of_runs)
            columns["randomised"] = [
                source not in self.observational_sources for source in self.sources_of_runs
            ]
        return pl.DataFrame(columns)

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> RunTable:
        """Read a frame as `to_frame` writes it; column order tells the order of names.

        Raises:
            EstimationError: if a column is missing, or a row is refused (see `__post_init__`).
        """
        missing = [name for name in _FIXED_COLUMNS if name not in frame.columns]
        domains = _names_after("share__", frame.columns)
        tasks = _names_after("outcome__", frame.columns)
        if missing or not domains or not tasks:
            raise EstimationError(
                "a run table needs the columns run_id, state_id, repeat_of, share__<domain> and "
                f"outcome__<task>, got {', '.join(frame.columns) or 'no column'}: rename them."
            )
        covariates = _covariates_of(domains, _names_after("state__", frame.columns))
        state_columns = [f"state__{d}__{name}" for d in domains for name in covariates]
        source_N, observational = None, ()
        if "source" in frame.columns:
            source_N = tuple(frame["source"].to_list())
        if "randomised" in frame.columns:
            rows = zip(source_N or (OWN,) * frame.height, frame["randomised"], strict=True)
            observational = tuple({source for source, randomised in rows if not randomised})
        return cls(
            domains=domains,
            covariates=covariates,
            tasks=tasks,
            run_ids=tuple(frame["run_id"].cast(pl.String).to_list()),
            state_ids=frame["state_id"].to_numpy(),
            state_NDP=_matrix(frame, state_columns).reshape(
                frame.height, len(domains), len(covariates)
            ),
            mixture_ND=_matrix(frame, [f"share__{name}" for name in domains]),
            outcome_NT=_matrix(frame, [f"outcome__{name}" for name in tasks]),
            repeat_of_N=frame["repeat_of"].to_numpy(),
            source_N=source_N,
            observational_sources=observational,
            group_N=frame["group"].to_numpy() if "group" in frame.columns else None,
        )

    def _check_shapes(self) -> None:
        n, d, t = len(self.run_ids), len(self.domains), len(self.tasks)
        expected = {
            "state_ids": (n,),
            "state_NDP": (n, d, len(self.covariates)),
            "mixture_ND": (n, d),
            "outcome_NT": (n, t),
            "repeat_of_N": (n,),
            **({} if self.group_N is None else {"group_N": (n,)}),
        }
        if len(self.sources_of_runs) != n:
            raise EstimationError(
                f"run_table.source_N must have {n} labels, got {len(self.sources_of_runs)}: give "
                "each run its source."
            )
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise EstimationError(
                    f"run_table.{name} must have shape {shape} for {n} runs, {d} domains, "
                    f"{len(self.covariates)} covariates and {t} tasks, got "
                    f"{getattr(self, name).shape}: pass arrays and names of the same runs."
                )

    def _check_finite(self) -> None:
        arrays = {
            "outcome": (self.outcome_NT, self.tasks),
            "share": (self.mixture_ND, self.domains),
            "covariate": (self.state_NDP.reshape(self.n_runs, -1), self.covariate_columns),
        }
        for kind, (values, names) in arrays.items():
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                run, column = bad[0]
                raise EstimationError(
                    f"{kind} {names[column]} of run {self.run_ids[run]} must be a finite number, "
                    f"got {values[run, column]} ({len(bad)} such values): drop the run, or train "
                    "or measure it again."
                )

    def _check_mixtures(self) -> None:
        sum_N = self.mixture_ND.sum(axis=1)
        low_N = self.mixture_ND.min(axis=1, initial=0.0)
        bad = np.flatnonzero((np.abs(sum_N - 1) > SIMPLEX_TOLERANCE) | (low_N < -SIMPLEX_TOLERANCE))
        if len(bad):
            i = bad[0]
            raise EstimationError(
                f"the mixture of run {self.run_ids[i]} must have shares >= 0 that sum to 1, got "
                f"sum {sum_N[i]:.6g} and least share {low_N[i]:.6g} ({len(bad)} such runs): "
                "divide each row by its sum if the shares are only rounded, else correct it."
            )

    def _check_states(self) -> None:
        ids, first, inverse = np.unique(self.state_ids, return_index=True, return_inverse=True)
        differs_N = (self.state_NDP != self.state_NDP[first][inverse]).any(axis=(1, 2))
        if differs_N.any():
            i = int(np.flatnonzero(differs_N)[0])
            raise EstimationError(
                f"runs of one pool state must have the same covariates, but run {self.run_ids[i]} "
                f"differs from run {self.run_ids[first[inverse[i]]]} of state "
                f"{ids[inverse[i]]}: give it a state id of its own."
            )
        source_N = np.array(self.sources_of_runs, dtype=object)
        mixed = np.flatnonzero(source_N != source_N[first][inverse])
        if len(mixed):
            i = int(mixed[0])
            raise EstimationError(
                f"runs of one pool state must have the same source, but run {self.run_ids[i]} is "
                f"of {source_N[i]!r} and run {self.run_ids[first[inverse[i]]]} of "
                f"{source_N[first[inverse[i]]]!r}: give it a state id of its own."
            )


def _refuse_twice(name: str, values: tuple[str, ...]) -> None:
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise EstimationError(
            f"run_table.{name} must not name anything twice, got {twice!r} "
            f"{values.count(twice)} times: drop or rename the duplicates."
        )


def _names_after(prefix: str, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix) for name in columns if name.startswith(prefix))


def _covariates_of(domains: tuple[str, ...], columns: tuple[str, ...]) -> tuple[str, ...]:
    first = columns[: len(columns) // len(domains)]
    names = tuple(name.removeprefix(f"{domains[0]}__") for name in first)
    expected = {f"{domain}__{name}" for domain in domains for name in names}
    if expected != set(columns):
        odd = sorted(expected ^ set(columns))
        raise EstimationError(
            "columns state__<domain>__<covariate> must give each domain the same covariates, "
            f"but {', '.join(odd)} are missing or have no counterpart: add or drop them."
        )
    return names


def _matrix(frame: pl.DataFrame, columns: list[str]) -> np.ndarray:
    if not columns:
        return np.empty((frame.height, 0))
    return frame.select(pl.col(columns).cast(pl.Float64).fill_null(float("nan"))).to_numpy()
