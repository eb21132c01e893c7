"""`dagster.yaml` of a project: the shipped template, and what a file that is there holds.

A file that is still one of ours, of this version or an earlier one, may be replaced; one that a
person edited never is.
"""

import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.resources.serving_settings import Instance

#: SHA-256 of each template that was shipped before this one; add the old one's when it changes.
EARLIER_TEMPLATES = frozenset(
    {
        "a1c66f001b32e8cad2dc15a5817193dbaae48f61a9a121ed1f0870dd29339edb",
        "3b7410a9578680000b141dd2fb94e0a4bd4ccc49c4e0393e7194d7cc3290c27e",
        "5b3cd142141d01f2b358ad31dcd3e128e6e7ba4d597157f064af2cccf7e06ab7",
    }
)

#: What follows the template where runs are kept in PostgreSQL.
_POSTGRES = """
# Runs, events and schedules are in PostgreSQL. The URL is in this variable, never in a file.
storage:
  postgres:
    postgres_url:
      env: {variable}
"""


def template() -> str:
    """The shipped `dagster.yaml`, which keeps runs in SQLite."""
    path = resources.files("causalmix_pipeline.resources") / "dagster.yaml"
    return path.read_text(encoding="utf-8")


def config_for(variable: str | None) -> str:
    """`dagster.yaml` for SQLite, or for the PostgreSQL server whose URL a variable holds."""
    return template() + ("" if variable is None else _POSTGRES.format(variable=variable))


def is_ours(text: str) -> bool:
    """Tell whether a file is a template of ours as it was written, of any version."""
    pattern = re.escape(_POSTGRES).replace(re.escape("{variable}"), r"\w+")
    text = re.sub(rf"{pattern}\Z", "", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text == template() or digest in EARLIER_TEMPLATES


def postgres_variable(text: str, path: Path) -> str | None:
    """The variable with the server's URL that a `dagster.yaml` names; None where it names none.

    A server that is named in another way gives an empty text.

    Raises:
        ConfigError: if the file isn't YAML.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # The line itself may hold a password, and so may the error's own text.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise ConfigError(
            f"{path} must be YAML, and isn't{where}. Mend it, or delete it to get it as shipped."
        ) from None
    found: Any = raw
    for name in ("storage", "postgres"):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        return None
    url = found.get("postgres_url") if isinstance(found, dict) else None
    return str(url.get("env", "")) if isinstance(url, dict) else ""


def next_config(there: str | None, wanted: Instance | None, path: Path) -> str:
    """What a `dagster.yaml` must hold: as shipped, or as a person edited it.

    Args:
        there: what the file holds; None where there is none.
        wanted: where runs are to be kept; None leaves it as it is.
        path: the file, for messages.

    Raises:
        ConfigError: if a person edited it, and it names another storage than is wanted.
    """
    found = None if there is None else postgres_variable(there, path)
    variable = found
    if wanted is not None:
        variable = wanted.postgres_env if wanted.storage == "postgres" else None
    if there is None or (is_ours(there) and found != ""):
        return config_for(variable)
    if found != variable:
        raise ConfigError(
            f"instance.storage must be what {path} says, which was edited by hand, got "
            f"{wanted.storage if wanted else ''}: {_way_out(variable)}; or move the file away to "
            "get it as shipped."
        )
    return there


def _way_out(variable: str | None) -> str:
    """What to write into an edited file."""
    if variable is None:
        return "take the storage section off it"
    return f"write into it `storage: {{postgres: {{postgres_url: {{env: {variable}}}}}}}`"
