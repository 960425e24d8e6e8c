"""Numbers at the ends of their ranges: huge scores, tiny scales, many keys, odd float modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits

if TYPE_CHECKING:
    from tests.attend import Attend


@pytest.mark.cpu_only
@pytest.mark.sanitize
@pytest.mark.parametrize("exponent", [0, 5, 10, 15, 20, 25])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_huge_scores(causal: bool, exponent: int, isa: str, attend_numpy: Attend) -> None:
    """Small integers times a power of two: float32 holds the scores exactly, so no excuse."""
    rng = np.random.default_rng(exponent)
    query = rng.integers(-8, 9, (1, 40, 2, 16)).astype(np.float32) * np.float32(2.0**exponent)
    key = rng.integers(-8, 9, (1, 70, 2, 16)).astype(np.float32) * np.float32(2.0**exponent)
    value = normal((1, 70, 2, 16), seed=1)
    out, lse = reference.attention(query, key, value, causal=causal)
    found = attend_numpy.arrays(query, key, value, causal=causal)
    assert_close(found.out.astype(np.float64), out, BASE["float32"])
    assert_close(found.lse.astype(np.float64) / np.abs(lse).max(), lse / np.abs(lse).max(), LSE)


@pytest.mark.cpu_only
@pytest.mark.sanitize
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, -1e-40, -0.3, 1e4])
def test_scales_at_the_ends(scale: float, isa: str, attend_numpy: Attend) -> None:
    query, key, value = (normal((1, 40, 2, 8), seed=i) for i in range(3))
    if scale == 1e4:  # exact scores, as above
        query, key = np.round(query), np.round(key)
    out, lse = reference.attention(query, key, value, causal=True, softmax_scale=scale)
    found = attend_numpy.arrays(query, key, value, causal=True, softmax_scale=scale)
    assert_close(found.out.astype(np.float64), out, BASE["float32"])
    assert_close(found.lse.astype(np.float64), lse, LSE._replace(rtol=1e-6))


@pytest.mark.parametrize(
    ("name", "value"),
    [("softmax_scale", 2.4e38), ("softmax_scale", -2.4e38), ("softcap", 1e-46), ("softcap", 1e-40),
     ("softcap", 2.5e38)],
)  # fmt: skip
def test_numbers_that_leave_float32_are_refused(name: str, value: float) -> None:
    x = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(
        ValueError, match=rf"\[umfa\.flash_attn_func\] {name} .*{value:g}".replace("+", r"\+")
    ):
        umfa.flash_attn_func(x, x, x, **{name: value})


@pytest.mark.cpu_only
# Equal values are the worst case: every tile's sum rounds the same way when it is added.
@pytest.mark.parametrize(
    ("count", "tolerance"), [(2**14, 2e-5), (2**17, 2e-5), (2**25, 5e-3)], ids=str
)
def test_very_many_keys_of_equal_weight(count: int, tolerance: float, attend_numpy: Attend) -> None:
    """Adding one key at a time to a float32 sum would stop counting at 2**24."""
    zeros = np.broadcast_to(np.float32(0), (1, count, 1, 1))
    value = np.broadcast_to(np.float32(0.7), (1, count, 1, 1))
    found = attend_numpy(np.zeros((1, 1, 1, 1), np.float32), zeros, value)
    assert abs(float(found.out.item()) - np.float64(np.float32(0.7))) <= tolerance
    assert abs(float(found.lse.item()) - np.log(count)) <= 2e-5


def test_the_callers_float_mode_does_not_matter() -> None:
    """Flush-to-zero in the calling thread only: the pool's threads would disagree with it."""
    torch = array_libraries.load("torch").module
    query, key = (torch.randn(1, 512, 4, 16) for _ in range(2))
    value = torch.full((1, 512, 4, 16), 1e-40)
    umfa.set_num_threads(4)
    before = umfa.flash_attn_func(query, key, value).numpy()
    assert (before > 0).all()
    try:
        assert torch.set_flush_denormal(True)
        found = [umfa.flash_attn_func(query, key, value) for _ in range(5)]
        umfa.set_num_threads(1)
        found.append(umfa.flash_attn_func(query, key, value))
        assert (torch.tensor(1e-40) * 1 == 0).all()  # and it is still the caller's mode
    finally:
        torch.set_flush_denormal(False)
    for each in found:
        assert_same_bits(each.numpy(), before)
