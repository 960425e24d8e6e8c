"""Random problems with fresh seeds for a given time, compared with the reference."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import combinations, reference
from tests.functional.test_fa3_fa4 import check_cache, check_varlen

MOST = {"cpu": 400, "metal-emulated": 150}  # keys


def pairs(backend: str, seed: int) -> None:
    """A problem with two given features and others at random."""
    first, second = combinations.PAIRS[seed % len(combinations.PAIRS)]
    combinations.check(first, second, seed, backend)


def cache(backend: str, seed: int) -> None:
    check_cache(backend, seed, MOST[backend])


def varlen(backend: str, seed: int) -> None:
    check_varlen(backend, seed, MOST[backend])


def soak(check: Callable[[str, int], None], backend: str, seed: int, seconds: float) -> int:
    """Checks problems for `seconds`; returns how many. A failure says how to repeat its problem."""
    end = time.monotonic() + seconds
    rng = np.random.default_rng(seed)
    for count in itertools.count(1):
        own = int(rng.integers(2**32))
        try:
            check(backend, own)
        except Exception as error:
            again = f"tests.nightly.test_soak.{check.__name__}({backend!r}, {own})"
            raise AssertionError(f"problem {count}; to repeat it: {again}") from error
        if time.monotonic() > end:
            return count
    raise AssertionError


@pytest.mark.nightly
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("metal-emulated", marks=pytest.mark.metal)]
)
@pytest.mark.parametrize("check", [pairs, cache, varlen], ids=lambda check: check.__name__)
def test_soak(
    check: Callable[[str, int], None], backend: str, nightly_seed: int, nightly_seconds: float
) -> None:
    print(f"seed {nightly_seed}: {soak(check, backend, nightly_seed, nightly_seconds)} problems")


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that ignores softcap has the same effect as an umfa that does."""
    right = reference.attention

    def wrong(*tensors: Any, **options: Any) -> Any:
        return right(*tensors, **(options | {"softcap": 0.0}))

    monkeypatch.setattr(reference, "attention", wrong)
    with pytest.raises(AssertionError, match=r"to repeat it: .*pairs\('cpu', \d+\)"):
        soak(pairs, "cpu", 1, 60)
