"""Gradients of every two features together on the CPU; see backward_combinations.py."""

from __future__ import annotations

import pytest

from tests.backward_combinations import BACKWARD_FEATURES, BACKWARD_PAIRS, check

USUAL = [pair for i, pair in enumerate(BACKWARD_PAIRS) if i % 7 == 0]


@pytest.mark.sanitize
@pytest.mark.parametrize("pair", USUAL, ids="-".join)
def test_some_pairs(pair: tuple[str, str]) -> None:
    check(*pair, 0)


@pytest.mark.slow
@pytest.mark.parametrize("pair", BACKWARD_PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    for seed in range(1, 5):
        check(*pair, seed)


def test_enough_of_them() -> None:
    assert 4 * len(BACKWARD_PAIRS) >= 500
    assert {x for pair in USUAL for x in pair} == set(BACKWARD_FEATURES)
