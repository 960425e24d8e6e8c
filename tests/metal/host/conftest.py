"""Tests of the Objective-C++ host on the double of Metal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.metal import double as metal_double
from tools.metal.double import Double
from tools.metal.double.gpus import Emulator, Recorder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs no emulator, whose fibers sanitizers do not understand, is for them too.

    A self-test on the emulator compiles a kernel of each family, and is slow.
    """
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if not {"emulated", "mps"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.sanitize)
        elif item.path.name == "test_self_test.py":
            item.add_marker(pytest.mark.slow)


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
