"""What people say of pools, reference and constraints, read and checked."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.run_tables import ROUNDING, read_mixtures
from causalmix_pipeline.adapters.state_tables import read_states
from causalmix_pipeline.adapters.table_files import open_table
from causalmix_pipeline.core.constraints import Constraints
from causalmix_pipeline.core.errors import ConfigError, EstimationError
from causalmix_pipeline.table_model import Model, TableSource

#: Keys of a constraints file.
CONSTRAINT_NAMES = (
    "least_share",
    "most_share",
    "frozen",
    "trust_radius",
    "budget_tokens",
    "max_epochs",
    "guard_rails",
)


def read_rules(
    model: Model,
    pools: TableSource | None,
    reference: str | Path | Mapping[str, float],
    constraints: Path | str | Mapping[str, Any] | None,
) -> tuple[list[str], np.ndarray, list[Constraints]]:
    """Name, covariates and constraints of each pool."""
    domains = model.runs.domains
    names, state_MDP, tokens_MD = read_pools(model, pools)
    rules = _read_mapping(constraints, "constraints", CONSTRAINT_NAMES)
    rails = _read_mapping(rules.get("guard_rails"), "constraints: guard_rails", model.runs.tasks)
    guard_rails = {
        task: _number(loss, f"constraints: guard_rails: {task}") for task, loss in rails.items()
    }
    kept = [
        replace(
            _constraints(rules, domains, reference_D, None if tokens_MD is None else tokens_MD[m]),
            guard_rails=guard_rails,
        )
        for m, reference_D in enumerate(read_references(reference, domains, names, tokens_MD))
    ]
    return names, state_MDP, kept


def read_pools(
    model: Model, pools: TableSource | None
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Names, covariates (M, D, P) and tokens (M, D) of the pools."""
    runs = model.runs
    own = None if model.tokens_D is None else model.tokens_D[None]
    if pools is None:
        if runs.covariates:
            raise EstimationError(
                f"the model was fitted with covariates ({', '.join(runs.covariates)} of each "
                "domain), so a recommendation needs those of the pool, got none: pass pools."
            )
        return ["all"], np.empty((1, len(runs.domains), 0)), own
    table = open_table(pools, "pools")
    names, state_MDP, tokens_MD = read_states(
        table, runs.domains, runs.covariates, key="pool", known=runs
    )
    if tokens_MD is None and own is not None:
        tokens_MD = np.repeat(own, len(names), axis=0)
    return names, state_MDP, tokens_MD


def read_references(
    reference: str | Path | Mapping[str, float],
    domains: Sequence[str],
    names: Sequence[str],
    tokens_MD: np.ndarray | None,
) -> np.ndarray:
    """The reference mixture of each pool; shape (M, D)."""
    if isinstance(reference, str) and reference == "equal":
        return np.full((len(names), len(domains)), 1 / len(domains))
    if isinstance(reference, str) and reference == "natural":
        if tokens_MD is None:
            raise ConfigError(
                "reference natural needs the tokens of each domain, got none: add columns "
                "<domain>__tokens to the pools, or take another reference."
            )
        return tokens_MD / tokens_MD.sum(axis=1, keepdims=True)
    if not isinstance(reference, Mapping) and not Path(reference).is_file():
        raise ConfigError(
            f"reference must be equal, natural or a file, got {reference}: no such file."
        )
    if not isinstance(reference, Mapping) and Path(reference).suffix.lower() in (
        ".csv",
        ".parquet",
    ):
        table = open_table(reference, "reference")
        key = pl.Series("run", [f"row {i + 1}" for i in range(table.frame.height)])
        frame = table.frame.select(c for c in table.value_columns if c != "pool")
        _, mixture_MD = read_mixtures(replace(table, frame=frame.with_columns(key)), domains)
        if len(mixture_MD) != 1:
            raise ConfigError(f"{table.name} must have one row, got {len(mixture_MD)}: keep one.")
        return np.repeat(mixture_MD, len(names), axis=0)
    shares = _read_mapping(reference, "reference", domains)
    mixture_D = np.array([_number(shares.get(d, 0.0), f"reference: {d}") for d in domains])
    if mixture_D.min() < 0 or abs(mixture_D.sum() - 1) > ROUNDING:
        raise ConfigError(
            f"reference must be shares >= 0 that sum to 1 within {ROUNDING:g}, got "
            f"{mixture_D.tolist()} with sum {mixture_D.sum():.6g}: divide each by the sum."
        )
    return np.repeat((mixture_D / mixture_D.sum())[None], len(names), axis=0)


def _constraints(
    rules: Mapping[str, Any],
    domains: Sequence[str],
    reference_D: np.ndarray,
    tokens_D: np.ndarray | None,
) -> Constraints:
    lower_D = _by_domain(rules, "least_share", 0.0, domains)
    upper_D = _by_domain(rules, "most_share", 1.0, domains)
    frozen = _read_mapping(rules.get("frozen"), "constraints: frozen", domains)
    for domain, share in frozen.items():
        d = list(domains).index(domain)
        lower_D[d] = upper_D[d] = _number(share, f"constraints: frozen: {domain}", most=1.0)
    if tokens_D is not None:  # a domain without text can't be trained on
        upper_D = np.where(np.asarray(tokens_D) > 0, upper_D, 0.0)
    budget = rules.get("budget_tokens")
    if budget is not None and not _number(budget, "constraints: budget_tokens") > 0:
        raise ConfigError(f"constraints: budget_tokens must be above 0, got {budget!r}.")
    if budget is not None and tokens_D is None:
        raise ConfigError(
            "constraints: budget_tokens needs the tokens of each domain, got none: add columns "
            "<domain>__tokens to the pools, or drop budget_tokens."
        )
    radius = rules.get("trust_radius")
    kept = Constraints(
        reference_D,
        lower_D,
        upper_D,
        trust_radius=None if radius is None else _number(radius, "constraints: trust_radius"),
        budget_tokens=None if budget is None else _number(budget, "constraints: budget_tokens"),
        available_D=tokens_D,
        max_epochs=_number(rules.get("max_epochs", 4.0), "constraints: max_epochs"),
    )
    kept.box(domains)  # refuses what no mixture can meet
    return kept


def _by_domain(
    rules: Mapping[str, Any], name: str, default: float, domains: Sequence[str]
) -> np.ndarray:
    given = rules.get(name)
    if given is None:
        return np.full(len(domains), default)
    field = f"constraints: {name}"
    if not isinstance(given, Mapping):
        return np.full(len(domains), _number(given, field, most=1.0))
    given = _read_mapping(given, field, domains)
    return np.array([_number(given.get(d, default), f"{field}: {d}", most=1.0) for d in domains])


def _read_mapping(
    source: Path | str | Mapping[str, Any] | None, field: str, names: Sequence[str]
) -> dict[str, Any]:
    """A mapping, or the one in a YAML or JSON file, with no other keys than `names`."""
    if source is None:
        return {}
    value: Any = source
    if isinstance(source, str | Path):
        import yaml

        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"{field} must be a YAML file, got {path}: no such file.")
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{field}: {path} can't be read as YAML: {error}") from error
        field = f"{field} ({path.name})"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field} must be names with values, got {value!r}.")
    unknown = [str(name) for name in value if name not in names]
    if unknown:
        raise ConfigError(
            f"{field} must name only {', '.join(names)}, got {', '.join(unknown)}: correct the "
            "name."
        )
    return dict(value)


def _number(value: Any, field: str, most: float = math.inf) -> float:
    if isinstance(value, str):  # YAML reads 1e9 as text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        limit = f" and {most:g}" if math.isfinite(most) else " and finite"
        raise ConfigError(f"{field} must be a number between 0{limit}, got {value!r}.")
    if not math.isfinite(value):
        raise ConfigError(f"{field} must be a finite number, got {value!r}.")
    return float(value)
