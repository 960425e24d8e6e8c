"""Tests of the Objective-C++ host on the double of Metal."""

from __future__ import annotations

from collections.abc import Iterator

import metal_double
import pytest
from metal_double import Double
from metal_gpus import Emulator, Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def double(recorder: Recorder) -> Iterator[Double]:
    """An Apple GPU that records; afterwards nothing may be alive, and nothing misused."""
    with metal_double.machine(recorder) as machine:
        yield machine


@pytest.fixture
def emulated() -> Iterator[Double]:
    """An Apple GPU that computes."""
    with metal_double.machine(Emulator()) as machine:
        yield machine
