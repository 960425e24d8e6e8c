"""Every two features together on the CPU; see combinations.py."""

from __future__ import annotations

import pytest

from tests.combinations import FEATURES, PAIRS, check


@pytest.mark.sanitize
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    check(*pair, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs_at_length(pair: tuple[str, str]) -> None:
    for seed in range(1, 14):
        check(*pair, seed)


def test_enough_of_them() -> None:
    assert len(PAIRS) >= 200
    assert 14 * len(PAIRS) >= 2800
    assert {x for pair in PAIRS for x in pair} == set(FEATURES)
