"""Makes the emulator importable and marks every test here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest

_HERE = Path(__file__).parent
if str(_HERE) not in sys.path:
    sys.path.insert(0, str(_HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.metal)


@pytest.fixture
def own_settings() -> Iterator[None]:
    """The emulated GPU as it is by default, and what the test makes of it gone afterwards."""
    before = emulated.settings
    emulated.settings = emulated.Settings()
    yield
    emulated.settings = before
