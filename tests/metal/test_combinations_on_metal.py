"""Every two features together on the emulated GPU; see combinations.py."""

from __future__ import annotations

import zlib

import pytest

from tests.combinations import PAIRS, check
from tests.metal import emulated

pytestmark = pytest.mark.usefixtures("own_settings")
FAMILIES = (7, 9)  # bfloat as float, and fragments of bfloat


def check_pair(pair: tuple[str, str]) -> None:
    seed = zlib.crc32("-".join(pair).encode())
    emulated.settings.schedule_seed = seed | 1
    emulated.settings.family = FAMILIES[seed % 2]
    check(*pair, 100, "metal-emulated")


# Each has kernels of its own to be compiled: a few are enough for every run.
@pytest.mark.parametrize("pair", PAIRS[::36], ids="-".join)
def test_some_pairs(pair: tuple[str, str]) -> None:
    check_pair(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_on_metal(pair: tuple[str, str]) -> None:
    check_pair(pair)


def test_enough_pairs() -> None:
    assert len(PAIRS) >= 150
