"""Comparisons that say where and by how much two results differ."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.array_libraries import Array


class Tolerance(NamedTuple):
    """``|actual - expected| <= atol + rtol * |expected|`` for every element."""

    atol: float
    rtol: float


# The base tolerances of the acceptance set. The relative part is the rounding of the output to its
# dtype; the absolute part is what the arithmetic may cost.
BASE = {
    "float32": Tolerance(2e-5, 1e-5),
    "float16": Tolerance(1e-3, 1e-3),
    "bfloat16": Tolerance(5e-3, 8e-3),
}

# The log-sum-exp is always float32, and sums are float32 in every dtype.
LSE = Tolerance(2e-5, 0.0)


def assert_close(actual: Array, expected: Array, tolerance: Tolerance, what: str = "out") -> None:
    """Fail, with the worst element, unless all elements agree. NaN agrees with nothing."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    same = actual == expected  # infinities of the same sign among them
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(actual - expected))
        allowed = tolerance.atol + tolerance.rtol * np.abs(np.where(same, 0.0, expected))
        excess = np.where(np.isfinite(error), error / allowed, np.inf)
    if excess.size == 0 or excess.max() <= 1.0:
        return
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    raise AssertionError(
        f"{what} is off at {int((excess > 1).sum())} of {excess.size} elements; the worst is "
        f"{tuple(map(int, worst))}: {actual[worst]!r}, not {expected[worst]!r} "
        f"(|difference| {error[worst]:.3g}, allowed {allowed[worst]:.3g})"
    )


def assert_same_bits(actual: Any, expected: Any, what: str = "out") -> None:
    """Fail unless two arrays of bit patterns (`Framework.bits`) are equal."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    different = np.argwhere(actual != expected)
    assert len(different) == 0, (
        f"{what}: {len(different)} of {actual.size} elements differ in bits, the first at "
        f"{tuple(map(int, different[0]))}"
    )
