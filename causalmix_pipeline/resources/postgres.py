"""PostgreSQL as storage of Dagster's instance: is it all there, before Dagster asks for it?

The URL with its password stands in the environment alone. What is printed of it is the server's
address; what the driver says isn't printed, since it may quote the URL.
"""

import importlib.util
import os
import re

from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.resources.serving_settings import Instance

#: Seconds that the server may take to answer.
CONNECT_SECONDS = 5

#: With the driver: without, SQLAlchemy 2.1 takes one that Dagster doesn't bring. One `@` only: an
#: unencoded one in the password would put a part of it into the host's name.
_URL = re.compile(
    r"postgresql\+psycopg2://([^:/@?#\s]+(:[^:/@?#\s]*)?@)?"
    r"(?P<server>([^:/@?#\s]*|\[[0-9a-fA-F:]+\])(:\d+)?/[^:/@?#\s]+)(\?\S*)?"
)

#: What the driver's messages hold, and what it means.
_REASONS = {
    r"password authentication|no password|pg_hba|role .* does not exist": "it refuses the user or "
    "the password",
    r"database .* does not exist": "it has no such database",
    r"too many|connection slots": "it has no connection left",
    r"starting up|shutting down|recovery": "it is starting or stopping",
    r"refused|timeout|timed out|translate host|No route|unreachable": "no server answers there",
}


def require_postgres(wanted: Instance) -> str:
    """The URL of the server, once it has answered.

    Raises:
        ConfigError: if the package or the variable is missing, or the server doesn't answer.
    """
    if importlib.util.find_spec("dagster_postgres") is None:
        raise ConfigError(
            "instance.storage postgres needs the package dagster-postgres, which isn't installed: "
            "pip install 'causalmix_pipeline[postgres]', or set instance.storage: sqlite."
        )
    variable, url = wanted.postgres_env, os.environ.get(wanted.postgres_env) or ""
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(
            f"instance.postgres_env must name an environment variable that holds "
            f"postgresql+psycopg2://user:password@host:port/database, got {variable}, which "
            f"{'holds something else' if url else 'is not set'}: set it, and write : / @ ? # of "
            "the password as %3A %2F %40 %3F %23."
        )
    reason = why_unreachable(url)
    if reason is not None:
        raise ConfigError(
            f"instance.postgres_env ({variable}) must lead to a PostgreSQL server, got "
            f"{match['server']}, and {reason}: start the server, correct {variable}, or set "
            "instance.storage: sqlite."
        )
    return url


def why_unreachable(url: str) -> str | None:
    """Why no connection can be opened, in words that quote nothing of the URL; None if one can."""
    import psycopg2

    try:
        psycopg2.connect(url.replace("+psycopg2", "", 1), connect_timeout=CONNECT_SECONDS).close()
    except (psycopg2.Error, UnicodeError) as error:
        text = str(error)
        known = (told for pattern, told in _REASONS.items() if re.search(pattern, text))
        return next(known, "it can't be reached")
    return None
