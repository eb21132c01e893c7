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
