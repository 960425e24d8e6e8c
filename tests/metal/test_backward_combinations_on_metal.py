"""Gradients of every two features together on the emulated GPU; see backward_combinations.py."""

from __future__ import annotations

import pytest

from tests.backward_combinations import BACKWARD_PAIRS, check
from tests.metal.pairs import check_emulated

pytestmark = pytest.mark.usefixtures("own_settings")


# Each has kernels of its own to be compiled: a few are enough for every run.
@pytest.mark.parametrize("pair", BACKWARD_PAIRS[::90], ids="-".join)
def test_some_pairs(pair: tuple[str, str]) -> None:
    check_emulated(check, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", BACKWARD_PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    check_emulated(check, pair)


def test_enough_pairs() -> None:
    """A third of them run with -m slow."""
    assert len(BACKWARD_PAIRS) >= 3 * 60
