"""Every two features together on the emulated GPU; see combinations.py."""

from __future__ import annotations

import pytest

from tests.combinations import PAIRS, check
from tests.metal.pairs import check_emulated

pytestmark = pytest.mark.usefixtures("own_settings")


# Each has kernels of its own to be compiled: a few are enough for every run.
@pytest.mark.parametrize("pair", PAIRS[::72], ids="-".join)
def test_some_pairs(pair: tuple[str, str]) -> None:
    check_emulated(check, pair)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_on_metal(pair: tuple[str, str]) -> None:
    check_emulated(check, pair)


def test_enough_pairs() -> None:
    assert len(PAIRS) >= 150
