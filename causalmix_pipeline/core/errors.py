"""What can go wrong, as a tree a caller can act on.

CausalMixError
    ConfigError       a setting breaks a rule (also a ValueError)
    PoolError         documents can't be read or used (also a ValueError)
    ProxyError        a proxy run failed or its record is unusable
        DiskFullError     there is no room for what a proxy run writes
    ScoringError      a scorer can't be loaded or its scores can't be used
    WorkError         a worker died, or its backend can't be reached
    EstimationError   runs that no effect can be estimated from (also a ValueError)
"""


class CausalMixError(Exception):
    """Anything this package raises on purpose."""

    def __str__(self) -> str:
        """The message, with letters that can't be seen as escapes: some turn what follows them."""
        return "".join(
            letter
            if letter.isprintable() or letter in "\n\u200c\u200d"
            else letter.encode("unicode_escape", "backslashreplace").decode()
            for letter in super().__str__()
        )


class ConfigError(CausalMixError, ValueError):
    """A setting breaks a rule; the message names the field, the rule, the value, the way out."""


class PoolError(CausalMixError, ValueError):
    """The documents of a pool can't be read, or there are too few of them to go on."""


class ProxyError(CausalMixError):
    """A proxy run failed, or a record in the run store can't be used."""


class DiskFullError(ProxyError):
    """The disk of the run store is full; what was finished before is kept."""


class ScoringError(CausalMixError):
    """A scorer can't be loaded, or kept scores can't be used."""


class WorkError(CausalMixError):
    """A worker died, or the backend that it belongs to can't be reached."""


class EstimationError(CausalMixError, ValueError):
    """The proxy runs at hand can't carry an estimate; the message says which rule they break."""
