"""Tables of covariates, `<domain>__<covariate>`: of each run's pool, or of pools to answer for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from causalmix_pipeline.adapters.table_files import (
    Table,
    numbers,
    row_ids,
    rows_by_id,
    shared_key,
)
from causalmix_pipeline.core.effects import MINIMUM_RUNS
from causalmix_pipeline.core.errors import EstimationError
from causalmix_pipeline.core.runs import RunTable

#: Largest distance of a covariate from its median, in robust standard deviations. Covariates such
#: as token counts spread over orders of magnitude, so this only stops values that mean "broken".
COVARIATE_LIMIT = 1e6

#: Part of a pool's columns that tells how many tokens a domain has.
TOKENS = "tokens"


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


def read_states(
    table: Table,
    domains: Sequence[str],
    covariates: Sequence[str],
    *,
    key: str | None = None,
    known: RunTable | None = None,
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Return ids, covariates (M, D, P) and tokens (M, D) of pools or runs; tokens None if absent.

    Covariates that the model doesn't know are left aside.

    Args:
        table: columns `pool` (or what names a run) and `<domain>__<covariate>`.
        domains: the model's.
        covariates: the model's.
        key: column that names the rows; None takes what names a run.
        known: the model's runs, on whose scale a value counts as broken.

    Raises:
        EstimationError: if a column or a value is missing, or a value is broken.
    """
    key = key or shared_key([table])
    if key not in table.frame.columns:
        raise EstimationError(
            f"{table.name} must have a column {key!r} that names the rows, got "
            f"{', '.join(table.frame.columns[:4])}...: add it."
        )
    column_of = split_covariates(table, domains)
    ids = rows_by_id(table, key)
    rows = list(ids.values())
    state_MDP = _state_values(table, column_of, domains, covariates, key, rows)
    if known is not None and covariates:
        _refuse_far(table, key, list(ids), state_MDP, known)
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


def read_covariates(
    table: Table, domains: Sequence[str], key: str, run_ids: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return names, sorted, and values (N, D, P) of all covariates of these runs."""
    column_of = split_covariates(table, domains)
    names = tuple(sorted({name for _, name in column_of}))
    if not names:
        raise EstimationError(f"{table.name} must have at least one column <domain>__<covariate>.")
    rows = rows_by_id(table, key)
    refuse_lacking(table, key, [run for run in run_ids if run not in rows])
    chosen = [rows[run] for run in run_ids]
    return names, _state_values(table, column_of, domains, names, key, chosen)


def refuse_lacking(table: Table, key: str, lacking: Sequence[str]) -> None:
    """Refuse a table that has no row for some runs."""
    if lacking:
        raise EstimationError(
            f"{table.name} must have a row for every run, but lacks {key} {lacking[0]!r} "
            f"({len(lacking)} such runs): add it, or drop the run from the other tables."
        )


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
    value_NC = numbers(table, columns, key, rows)
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
                f"({key} {row_ids(table, key)[rows[worst]]!r}): measure it again, or drop the run."
            )


def _refuse_far(
    table: Table, key: str, ids: Sequence[str], state_MDP: np.ndarray, known: RunTable
) -> None:
    """Refuse covariates so far from those of the known runs that they mean "broken"."""
    flat_NC = state_MDP.reshape(len(ids), -1)
    known_NC = known.state_NDP.reshape(known.n_runs, -1)
    middle_C, spread_C = np.median(known_NC, axis=0), known_NC.std(axis=0)
    limit_C = COVARIATE_LIMIT * np.maximum(spread_C, np.maximum(np.abs(middle_C), 1e-9))
    bad = np.argwhere(np.abs(flat_NC - middle_C) > limit_C)
    if len(bad):
        row, column = bad[0]
        raise EstimationError(
            f"{table.name}: column {known.covariate_columns[column]!r} must be of the size of the "
            f"model's runs (about {middle_C[column]:.4g}), got {flat_NC[row, column]:.6g} in row "
            f"{row + 1} ({key} {ids[row]!r}): measure it again, or drop the row."
        )


def drop_constant(
    domains: Sequence[str], names: tuple[str, ...], state_NDP: np.ndarray, notes: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return names and values without covariates that vary in no domain, and note them."""
    constant_DP = np.ptp(state_NDP, axis=0) <= 1e-12 * np.abs(state_NDP).max(axis=0, initial=0.0)
    gone = [f"{domains[d]}__{names[p]}" for d, p in np.argwhere(constant_DP)]
    if gone:
        notes.append(f"covariates that never vary were dropped: {', '.join(gone)}")
    kept_P = ~constant_DP.all(axis=0)
    return tuple(np.array(names, dtype=object)[kept_P]), state_NDP[:, :, kept_P]


def common_tokens(names: Sequence[str], state_NDP: np.ndarray) -> np.ndarray | None:
    """Return the tokens of each domain (D,) where all runs agree on them."""
    if TOKENS not in names:
        return None
    tokens_ND = state_NDP[:, :, list(names).index(TOKENS)]
    return tokens_ND[0] if not np.ptp(tokens_ND, axis=0).any() else None
