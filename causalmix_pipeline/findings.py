"""What a check of the doctor found, and how it is mended."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: what was looked at.
        level: ok, warning or wrong; mended once it was.
        detail: what was seen, and the way out.
        mend: mends it and says what was done; None where only a person can.
    """

    what: str
    level: str
    detail: str
    mend: Callable[[], str] | None = None
