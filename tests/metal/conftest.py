"""Fixtures of the tests that run Metal kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.metal import emulated


@pytest.fixture
def own_settings() -> Iterator[None]:
    """The emulated GPU as it is by default, and what the test makes of it gone afterwards."""
    before = emulated.settings
    emulated.settings = emulated.Settings()
    yield
    emulated.settings = before
