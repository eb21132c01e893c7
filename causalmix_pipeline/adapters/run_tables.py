"""Tables of runs made elsewhere, read into `core.runs.RunTable`.

Read are OLMix's form (`ratios.csv`: run, name, index, a column per domain; `metrics.csv`: run,
name, index, a column per metric), RegMix's (the same with `index` alone), and Parquet of either
form; covariates come as `run, <domain>__<covariate>...`. Runs, domains and metrics are matched by
name, never by position, and brought into one order (names and run ids sorted), so that permuting
rows or columns changes no result. Every refusal names file, column, row and the way out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.core.belief import MINIMUM_OVERLAP_STATES
from causalmix_pipeline.core.effects import MINIMUM_RUNS, OUTLIER_LIMIT, flag_outliers
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Columns of a recommendation besides the domains.
RESULT_COLUMNS = ("pool", "gain", "gain_lower", "gain_upper", "verdict")
#: Columns that name a run, the first that all tables have; none of them is a domain or a metric.
KEYS = ("run", "run_id", "index", "name")

#: Least and largest tolerance of a row's sum around 1. Between them it's what rounding can do: half
#: a unit of the last decimal in each domain. RegMix's shares, rounded to .001 over 17 domains, sum
#: to .996-1.003. Shares within it are divided by their sum.
ROUNDING, COARSE_ROUNDING = 0.005, 0.05

#: Largest distance of a covariate from its median, in robust standard deviations. Covariates such
#: as token counts spread over orders of magnitude, so this only stops values that mean "broken".
COVARIATE_LIMIT = 1e6

#: Part of a pool's columns that tells how many tokens a domain has.
TOKENS = "tokens"

#: Share below zero that still counts as rounding.
_NEGATIVE = -1e-9


@dataclass(frozen=True, eq=False)
class Table:
    """A frame and what to call it in a message: its file, or the argument's name."""

    frame: pl.DataFrame
    name: str

    @property
    def value_columns(self) -> list[str]:
        """All columns but those that name the run."""
        return [column for column in self.frame.columns if column not in KEYS]


@dataclass(frozen=True, eq=False)
class ImportedRuns:
    """Runs from tables.

    Attributes:
        runs: in canonical order; outcomes are larger-is-better.
        sign_T: what an outcome is multiplied by to be in the metric's own sign: -1 for a loss.
        notes: what was left out or changed, in plain words.
        tokens_D: tokens of each domain where all runs agree on them, else None.
    """

    runs: RunTable
    sign_T: np.ndarray
    notes: tuple[str, ...]
    tokens_D: np.ndarray | None


def open_table(source: Any, argument: str) -> Table:
    """Take a frame, or read a CSV or Parquet file.

    Args:
        source: a polars (or pandas) frame, or a path.
        argument: what to call a frame in messages.

    Raises:
        ConfigError: if there is no such file.
        EstimationError: if the file can't be read, has no row, or names a column twice or not.
    """
    if not isinstance(source, str | Path):
        frame = source if isinstance(source, pl.DataFrame) else pl.DataFrame(source)
        return _check_table(Table(frame, argument))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{argument} must be a CSV or Parquet file, got {path}: no such file.")
    if path.suffix.lower() in (".parquet", ".pq"):
        try:
            return _check_table(Table(pl.read_parquet(path), path.name))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise EstimationError(f"{path} can't be read as Parquet: {error}") from error
    return _check_table(Table(_read_csv(path), path.name))


def _read_csv(path: Path) -> pl.DataFrame:
    """All cells as text; empty ones are null."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise EstimationError(
            f"{path} must be CSV in UTF-8, got {error}: save it as UTF-8."
        ) from error
    _refuse_names(header, path.name)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise EstimationError(
                f"{path.name}: row {number} must have {len(header)} cells as the header has, got "
                f"{len(row)}: correct it, or quote a name that holds a comma."
            )
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return pl.DataFrame(
        [
            pl.Series(name, [cell or None for cell in column], dtype=pl.String)
            for name, column in zip(header, columns, strict=True)
        ]
    )


def _check_table(table: Table) -> Table:
    _refuse_names(table.frame.columns, table.name)
    if not table.frame.height:
        raise EstimationError(f"{table.name} must have at least one row, got none: add the runs.")
    return table


def _refuse_names(names: Sequence[str], table: str) -> None:
    for position, name in enumerate(names, start=1):
        if not name.strip():
            raise EstimationError(
                f"{table}: column {position} must have a name, got {name!r}: name it, or drop it "
                "(a row number that a data frame wrote, as a rule)."
            )
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise EstimationError(
            f"{table}: column {twice!r} occurs {list(names).count(twice)} times: drop or rename "
            "one."
        )


# ---------------------------------------------------------------------------- runs


def import_runs(
    ratios: Table,
    metrics: Table,
    covariates: Table | None = None,
    *,
    minimize: Sequence[str] = (),
    maximize: Sequence[str] = (),
) -> ImportedRuns:
    """Join the tables by run and check them.

    Runs with equal covariates are one pool state; runs with equal state and mixture are repeats.
    Runs without a row of metrics are left out, and said; a missing value is refused.

    Args:
        ratios: shares of the domains.
        metrics: what was measured of each run.
        covariates: what was known of each run's pool.
        minimize: metrics that are losses; all that aren't in `maximize` are.
        maximize: metrics where more is better.

    Raises:
        ConfigError: for directions of unknown metrics.
        EstimationError: for tables that carry no estimate; says where and what to do.
    """
    notes: list[str] = []
    key = shared_key([ratios, metrics, *([covariates] if covariates else [])])
    domains = sorted(ratios.value_columns)
    if len(domains) < 2:
        raise EstimationError(
            f"{ratios.name} must have a column of shares for at least 2 domains, got "
            f"{', '.join(domains) or 'none'}: with one domain there is nothing to mix."
        )
    taken = [name for name in domains if name in RESULT_COLUMNS]
    if taken:
        raise EstimationError(
            f"{ratios.name}: column {taken[0]!r} is also a column of the recommendations: rename "
            "the domain."
        )
    tasks = sorted(metrics.value_columns)
    if not tasks:
        raise EstimationError(f"{metrics.name} must have at least one column with a metric.")
    sign_T = _signs(tasks, minimize, maximize)
    share_of = _rows_by_id(ratios, key)
    metric_of = _rows_by_id(metrics, key)
    run_ids = sorted(set(share_of) & set(metric_of))
    notes += _say_left_out(ratios, metrics, set(share_of), set(metric_of))
    if len(run_ids) < MINIMUM_RUNS:
        raise EstimationError(
            f"an effect needs at least {MINIMUM_RUNS} runs that are in both {ratios.name} and "
            f"{metrics.name}, got {len(run_ids)}: add runs, or give the same run the same "
            f"{key!r} in both."
        )
    rows_N = [share_of[run] for run in run_ids]
    mixture_ND = _mixtures(ratios, domains, key, rows_N, notes)
    metric_NT = _numbers(metrics, tasks, key, [metric_of[run] for run in run_ids])
    _refuse_constant(metrics, tasks, metric_NT)
    names, state_NDP = (), np.empty((len(run_ids), len(domains), 0))
    if covariates is not None:
        names, state_NDP = _covariates(covariates, domains, key, run_ids)
    tokens_D = _common_tokens(names, state_NDP)
    names, state_NDP = _drop_constant(domains, names, state_NDP, notes)
    flat_NC = state_NDP.reshape(len(run_ids), -1)
    state_N = _cells(flat_NC)
    # Covariates that differ in the last bits are one state, with the values of its first run.
    _, first, inverse = np.unique(state_N, return_index=True, return_inverse=True)
    state_NDP = state_NDP[first][inverse.ravel()]
    constant = [d for d, ptp in zip(domains, np.ptp(mixture_ND, axis=0), strict=True) if ptp == 0]
    notes += [
        f"{ratios.name}: the share of {d!r} never varies, so its effect can't be told"
        for d in constant
    ]
    if names and len(np.unique(state_N)) < MINIMUM_OVERLAP_STATES:
        raise EstimationError(
            f"{covariates.name if covariates else 'covariates'} must tell at least "
            f"{MINIMUM_OVERLAP_STATES} pool states apart, got {len(np.unique(state_N))}: add "
            "runs of "
            "other pools, or leave the covariates out."
        )
    runs = RunTable(
        domains=tuple(domains),
        covariates=names,
        tasks=tuple(tasks),
        run_ids=tuple(run_ids),
        state_ids=state_N,
        state_NDP=state_NDP,
        mixture_ND=mixture_ND,
        outcome_NT=metric_NT * sign_T,
        repeat_of_N=_cells(np.column_stack([state_N, mixture_ND])),
    )
    _refuse_outliers(runs, metrics, key, metric_of, metric_NT)
    return ImportedRuns(runs, sign_T, tuple(notes), tokens_D)


def shared_key(tables: Sequence[Table]) -> str:
    """The column that names the run in all tables.

    Raises:
        EstimationError: if there is none.
    """
    for key in KEYS:
        if all(key in table.frame.columns for table in tables):
            return key
    lacking = next(t for t in tables if not set(KEYS) & set(t.frame.columns)) if any(
        not set(KEYS) & set(t.frame.columns) for t in tables) else tables[-1]  # fmt: skip
    raise EstimationError(
        f"{' and '.join(table.name for table in tables)} must share a column that names the run "
        f"({', '.join(KEYS)}), but {lacking.name} has "
        f"{', '.join(lacking.frame.columns[:4])}...: add "
        "the column `run`."
    )


def _ids(table: Table, key: str) -> list[str]:
    column = table.frame[key]
    if column.dtype.is_float() and (column.drop_nulls() % 1 == 0).all():
        column = column.cast(pl.Int64)
    ids = [("" if value is None else str(value)).strip() for value in column.to_list()]
    if "" in ids:
        raise EstimationError(
            f"{table.name}: column {key!r} must name every row, got nothing in row "
            f"{ids.index('') + 1}: fill it in."
        )
    return ids


def _rows_by_id(table: Table, key: str) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, name in enumerate(_ids(table, key)):
        if name in rows:
            raise EstimationError(
                f"{table.name}: column {key!r} must not name a row twice, got {name!r} in rows "
                f"{rows[name] + 1} and {row + 1}: drop one, or name the second run otherwise."
            )
        rows[name] = row
    return rows


def _numbers(table: Table, columns: Sequence[str], key: str, rows: Sequence[int]) -> np.ndarray:
    """Values of some rows and columns as finite numbers; shape (rows, columns)."""
    ids = table.frame[key].to_list()
    values = np.empty((len(rows), len(columns)))
    for c, name in enumerate(columns):
        column = table.frame[name]
        if column.dtype == pl.String:
            number = column.str.strip_chars().cast(pl.Float64, strict=False)
        elif column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
            number = column.cast(pl.Float64)
        else:
            raise EstimationError(
                f"{table.name}: column {name!r} must hold numbers, got {column.dtype}: drop it."
            )
        values[:, c] = number.fill_null(float("nan")).to_numpy()[list(rows)]
        bad = np.flatnonzero(~np.isfinite(values[:, c]))
        if len(bad):
            row = rows[bad[0]]
            raise EstimationError(
                f"{table.name}: column {name!r} must hold a finite number in every row, got "
                f"{column[row]!r} in row {row + 1} (run {str(ids[row])!r}; {len(bad)} such rows): "
                f"drop the row, or drop the column."
            )
    return values


def _signs(tasks: Sequence[str], minimize: Sequence[str], maximize: Sequence[str]) -> np.ndarray:
    for option, names in (("minimize", minimize), ("maximize", maximize)):
        unknown = [name for name in names if name not in tasks]
        if unknown:
            raise ConfigError(
                f"{option} must name metrics of the table ({', '.join(tasks)}), got "
                f"{', '.join(unknown)}: correct the name."
            )
    both = sorted(set(minimize) & set(maximize))
    if both:
        raise ConfigError(f"minimize and maximize both name {', '.join(both)}: keep one of them.")
    if minimize and not maximize:
        return np.array([-1.0 if task in minimize else 1.0 for task in tasks])
    return np.array([1.0 if task in maximize else -1.0 for task in tasks])


def _say_left_out(
    ratios: Table, metrics: Table, share_ids: set[str], metric_ids: set[str]
) -> list[str]:
    notes = []
    for here, there, ids in (
        (ratios, metrics, share_ids - metric_ids),
        (metrics, ratios, metric_ids - share_ids),
    ):
        if ids:
            some = ", ".join(sorted(ids)[:3])
            notes.append(
                f"{len(ids)} runs of {here.name} aren't in {there.name} and were left out: {some}"
                + ("..." if len(ids) > 3 else "")
            )
    return notes


def _refuse_constant(metrics: Table, tasks: Sequence[str], metric_NT: np.ndarray) -> None:
    for t, task in enumerate(tasks):
        value_N = metric_NT[:, t]
        if np.ptp(value_N) <= 1e-12 * np.abs(value_N).max():
            raise EstimationError(
                f"{metrics.name}: column {task!r} must vary between runs, got {value_N[0]:g} in "
                "all "
                f"{len(value_N)}: drop the column."
            )


def _refuse_outliers(
    runs: RunTable, metrics: Table, key: str, row_of: dict[str, int], metric_NT: np.ndarray
) -> None:
    found = flag_outliers(runs)
    if found.height:
        run, task, _, score = found.row(0)
        value = metric_NT[runs.run_ids.index(run), runs.tasks.index(task)]
        raise EstimationError(
            f"{metrics.name}: column {task!r} must lie within {OUTLIER_LIMIT:g} robust standard "
            f"deviations of its median, got {value:.6g} in row {row_of[run] + 1} ({key} "
            f"{run!r}) at "
            f"{score:.3g}, one of {found.height} such values: the run diverged. Drop it."
        )


def _cells(values_NC: np.ndarray) -> np.ndarray:
    """Number of each distinct row, by its values; shape (N,)."""
    if not values_NC.shape[1]:
        return np.zeros(len(values_NC), dtype=np.int64)
    # -0 and 0 are equal; the twelfth decimal of a share divided by its sum is not the user's.
    _, cell_N = np.unique(np.round(values_NC, 12) + 0.0, axis=0, return_inverse=True)
    return cell_N.ravel()


# ---------------------------------------------------------------------------- shares


def _mixtures(
    ratios: Table, domains: Sequence[str], key: str, rows: Sequence[int], notes: list[str]
) -> np.ndarray:
    """Shares of some rows, closed where they are only rounded; shape (rows, D)."""
    share_ND = _numbers(ratios, domains, key, rows)
    ids = _ids(ratios, key)
    bad = np.argwhere(share_ND < _NEGATIVE)
    if len(bad):
        row, column = bad[0]
        raise EstimationError(
            f"{ratios.name}: column {domains[column]!r} must hold shares >= 0, got "
            f"{share_ND[row, column]:g} in row {rows[row] + 1} ({key} {ids[rows[row]]!r}): "
            "correct it."
        )
    share_ND = np.clip(share_ND, 0.0, None)
    sum_N = share_ND.sum(axis=1)
    off_N = np.abs(sum_N - 1)
    tolerance = _tolerance(share_ND)
    bad = np.flatnonzero(off_N > tolerance + 1e-9)
    if len(bad):
        row = rows[bad[0]]
        raise EstimationError(
            f"{ratios.name}: the shares of a row must sum to 1 within {tolerance:g}, got "
            f"{sum_N[bad[0]]:.6g} in row {row + 1} ({key} {ids[row]!r}; {len(bad)} such rows), "
            "over the "
            f"columns {', '.join(domains[:4])}{'...' if len(domains) > 4 else ''}: divide "
            "percent by "
            "100 or counts by their sum, and drop columns that aren't domains."
        )
    rounded = int((off_N > 1e-6).sum())
    if rounded:
        notes.append(
            f"{ratios.name}: {rounded} of {len(rows)} rows sum to "
            f"{sum_N.min():.4g}-{sum_N.max():.4g}, "
            "taken as rounding and divided by their sum"
        )
    return share_ND / sum_N[:, None]


def _tolerance(share_ND: np.ndarray) -> float:
    """How far rounding can move a row's sum, given the decimals that the shares have."""
    for decimals in range(1, 6):
        if np.abs(share_ND - np.round(share_ND, decimals)).max() < 1e-9:
            rounding = 0.5 * 10**-decimals * share_ND.shape[1]
            return min(max(rounding, ROUNDING), COARSE_ROUNDING)
    return ROUNDING


def read_mixtures(
    ratios: Table, domains: Sequence[str], *, key: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Return ids and mixtures of a table with these domains; shape (M, D).

    Args:
        ratios: the table.
        domains: the model's.
        key: column that names the rows; None takes what names a run.

    Raises:
        EstimationError: for missing or unknown domains, or rows that aren't mixtures.
    """
    key = key or shared_key([ratios])
    missing = [domain for domain in domains if domain not in ratios.frame.columns]
    unknown = [name for name in ratios.value_columns if name not in domains]
    if missing or unknown:
        raise EstimationError(
            f"{ratios.name} must have a column for each of the model's domains "
            f"({', '.join(domains)}) and no other, but "
            + " and ".join(
                f"{what} {', '.join(map(repr, names[:5]))}"
                for what, names in (("lacks", missing), ("has unknown", unknown))
                if names
            )
            + ": rename the columns, or add a domain that isn't used with shares 0."
        )
    rows = _rows_by_id(ratios, key)
    return list(rows), _mixtures(ratios, domains, key, list(rows.values()), [])


# ---------------------------------------------------------------------------- covariates


def split_covariates(table: Table, domains: Sequence[str]) -> dict[tuple[str, str], str]:
    """Tell domain and covariate of each column `<domain>__<covariate>`; the longest domain wins.

    Returns:
        (domain, covariate) to the column.

    Raises:
        EstimationError: if a column belongs to no domain.
    """
    longest_first = sorted(domains, key=len, reverse=True)
    found = {}
    for column in table.value_columns:
        if column == "pool":
            continue
        domain = next((d for d in longest_first if column.startswith(f"{d}__")), None)
        if domain is None or column == f"{domain}__":
            raise EstimationError(
                f"{table.name}: column {column!r} must be <domain>__<covariate> with one of the "
                f"domains {', '.join(domains)}: rename or drop it."
            )
        found[domain, column.removeprefix(f"{domain}__")] = column
    return found


def _covariates(
    table: Table, domains: Sequence[str], key: str, run_ids: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    column_of = split_covariates(table, domains)
    names = tuple(sorted({name for _, name in column_of}))
    if not names:
        raise EstimationError(f"{table.name} must have at least one column <domain>__<covariate>.")
    rows = _rows_by_id(table, key)
    lacking = [run for run in run_ids if run not in rows]
    if lacking:
        raise EstimationError(
            f"{table.name} must have a row for every run, but lacks {key} {lacking[0]!r} "
            f"({len(lacking)} such runs): add it, or drop the run from the other tables."
        )
    chosen = [rows[run] for run in run_ids]
    return names, _state_values(table, column_of, domains, names, key, chosen)


def _state_values(
    table: Table,
    column_of: dict[tuple[str, str], str],
    domains: Sequence[str],
    names: Sequence[str],
    key: str,
    rows: Sequence[int],
) -> np.ndarray:
    """Covariates of some rows; shape (rows, D, P)."""
    wanted = [(domain, name) for domain in domains for name in names]
    missing = [f"{domain}__{name}" for domain, name in wanted if (domain, name) not in column_of]
    if missing:
        raise EstimationError(
            f"{table.name} must give each domain the same covariates, but lacks the columns "
            f"{', '.join(missing[:5])}: add them, or drop the covariate from all domains."
        )
    columns = [column_of[pair] for pair in wanted]
    value_NC = _numbers(table, columns, key, rows)
    if len(rows) >= MINIMUM_RUNS:
        _refuse_broken(table, columns, key, rows, value_NC)
    return value_NC.reshape(len(rows), len(domains), len(names))


def _refuse_broken(
    table: Table, columns: Sequence[str], key: str, rows: Sequence[int], value_NC: np.ndarray
) -> None:
    distance_NC = np.abs(value_NC - np.median(value_NC, axis=0))
    for c, name in enumerate(columns):
        distance_N = distance_NC[:, c]
        moved_N = distance_N[distance_N > 0]
        if not len(moved_N):
            continue
        # The lower quartile of what moved: a single broken value can't be its own yardstick.
        spread = np.median(distance_N) or max(np.quantile(moved_N, 0.25), 0.0)
        size = np.abs(np.median(value_NC[:, c]))
        worst = int(np.argmax(distance_N))
        limit = COVARIATE_LIMIT * (spread if len(moved_N) > 1 else max(size, 1.0))
        if distance_N[worst] > limit:
            raise EstimationError(
                f"{table.name}: column {name!r} must lie within {COVARIATE_LIMIT:g} robust "
                "standard "
                f"deviations of its median, got {value_NC[worst, c]:.6g} in row {rows[worst] + 1} "
                f"({key} {_ids(table, key)[rows[worst]]!r}): measure it again, or drop the run."
            )


def _drop_constant(
    domains: Sequence[str], names: tuple[str, ...], state_NDP: np.ndarray, notes: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    constant_DP = np.ptp(state_NDP, axis=0) <= 1e-12 * np.abs(state_NDP).max(axis=0, initial=0.0)
    gone = [f"{domains[d]}__{names[p]}" for d, p in np.argwhere(constant_DP)]
    if gone:
        notes.append(f"covariates that never vary were dropped: {', '.join(gone)}")
    kept_P = ~constant_DP.all(axis=0)
    return tuple(np.array(names, dtype=object)[kept_P]), state_NDP[:, :, kept_P]


def _common_tokens(names: Sequence[str], state_NDP: np.ndarray) -> np.ndarray | None:
    if TOKENS not in names:
        return None
    tokens_ND = state_NDP[:, :, list(names).index(TOKENS)]
    return tokens_ND[0] if not np.ptp(tokens_ND, axis=0).any() else None


def read_states(
    table: Table, domains: Sequence[str], covariates: Sequence[str], *, key: str | None = None
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Return ids, covariates (M, D, P) and tokens (M, D) of pools or runs; tokens None if absent.

    Covariates that the model doesn't know are left aside.

    Args:
        table: columns `pool` (or what names a run) and `<domain>__<covariate>`.
        domains: the model's.
        covariates: the model's.
        key: column that names the rows; None takes what names a run.

    Raises:
        EstimationError: if a column or a value is missing.
    """
    key = key or shared_key([table])
    if key not in table.frame.columns:
        raise EstimationError(
            f"{table.name} must have a column {key!r} that names the rows, got "
            f"{', '.join(table.frame.columns[:4])}...: add it."
        )
    column_of = split_covariates(table, domains)
    ids = _rows_by_id(table, key)
    rows = list(ids.values())
    state_MDP = _state_values(table, column_of, domains, covariates, key, rows)
    tokens_MD = None
    # A covariate of that name may be scaled: then it's no count.
    if TOKENS not in covariates and any(name == TOKENS for _, name in column_of):
        tokens_MD = _state_values(table, column_of, domains, [TOKENS], key, rows)[:, :, 0]
        bad = np.argwhere((tokens_MD < 0) | (tokens_MD.sum(axis=1, keepdims=True) <= 0))
        if len(bad):
            m, d = int(bad[0, 0]), int(bad[0, 1])
            raise EstimationError(
                f"{table.name}: column {column_of[domains[d], TOKENS]!r} must hold token counts "
                ">= 0 "
                f"with one above 0 in the row, got {tokens_MD[m, d]:g} in row {rows[m] + 1}: "
                "correct it."
            )
    return list(ids), state_MDP, tokens_MD
