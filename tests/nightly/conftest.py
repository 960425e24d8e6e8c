"""Time and seed of the nightly tests: ``pytest -m nightly --nightly-seconds 60``."""

from __future__ import annotations

import pytest


@pytest.fixture
def nightly_seconds(pytestconfig: pytest.Config) -> float:
    """How long each nightly test runs."""
    return float(pytestconfig.getoption("--nightly-seconds"))


@pytest.fixture
def nightly_seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--nightly-seed"))
