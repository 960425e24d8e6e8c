"""Every two features together on the CPU; see combinations.py."""

from __future__ import annotations

import pytest

from tests.combinations import FEATURES, PAIRS, check


@pytest.mark.sanitize
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    for seed in range(2):
        check(*pair, seed)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_at_length(pair: tuple[str, str]) -> None:
    for seed in range(2, 14):
        check(*pair, seed)


def test_enough_of_them() -> None:
    assert 2 * len(PAIRS) >= 400
    assert 12 * len(PAIRS) >= 2000
    assert {x for pair in PAIRS for x in pair} == set(FEATURES)
