"""The exception tree: what a caller can catch."""

from __future__ import annotations

import pytest

from causalmix_pipeline.core import errors


@pytest.mark.parametrize("name", ["ConfigError", "PoolError", "EstimationError"])
def test_a_users_fault_is_a_value_error_too(name):
    assert issubclass(getattr(errors, name), errors.CausalMixError)
    assert issubclass(getattr(errors, name), ValueError)


def test_a_failed_proxy_is_not_a_users_fault():
    assert issubclass(errors.ProxyError, errors.CausalMixError)
    assert not issubclass(errors.ProxyError, ValueError)


def test_a_message_shows_letters_that_turn_text_as_escapes_and_keeps_its_lines():
    error = errors.PoolError("found \u202eevil\u0000,\nand \u0645\u06cc\u200c\u062e")

    assert str(error) == "found \\u202eevil\\x00,\nand \u0645\u06cc\u200c\u062e"
