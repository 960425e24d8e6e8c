"""Which keys a row sees: causal, window, and that what it does not see never reaches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests import cases, reference
from tests.array_libraries import DTYPES, Array
from tests.cases import Case, normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits

if TYPE_CHECKING:
    from tests.attend import Attend

CAUSAL = ("causal", True)

LENGTHS = [(96, 96), (100, 37), (37, 100), (1, 70), (70, 1), (130, 257), (257, 130), (64, 128)]
WINDOWS = [(-1, -1), (0, 0), (-1, 0), (0, -1), (5, 3), (-1, 7), (7, -1), (63, 64), (1000, 1000)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"window{w[0]}_{w[1]}")
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{n[0]}x{n[1]}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_window_and_causal(
    causal: bool, lengths: tuple[int, int], window: tuple[int, int], attend_numpy: Attend
) -> None:
    """Every kind of band over every kind of rectangle, empty rows among them."""
    options = (("window_size", window), ("causal", causal))
    attend_numpy.case(Case((1, 2, *lengths, 16), heads_k=1, options=options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("window", [(31, 0), (0, 33), (8, 8)], ids=str)
def test_window_in_half_precision(window: tuple[int, int], dtype: str, attend: Attend) -> None:
    attend.case(Case((1, 3, 150, 150, 40), dtype, options=(("window_size", window),)))


@pytest.mark.parametrize("left", [0, 10, 1000])
@pytest.mark.parametrize("right", [-1, 0, 5, 2**31 - 1])
def test_causal_overrides_the_right_side(left: int, right: int, attend: Attend) -> None:
    arrays = [normal((1, 60, 2, 16), seed=i) for i in range(3)]
    found = attend.arrays(*arrays, causal=True, window_size=(left, right))
    expected = attend.arrays(*arrays, window_size=(left, 0))
    assert_same_bits(found.out.view("u4"), expected.out.view("u4"))
    assert_same_bits(found.lse.view("u4"), expected.lse.view("u4"), "lse")


@pytest.mark.parametrize("window", [(2**31 - 1, 2**31 - 1), (-1, 2**31 - 1), (60, 60)], ids=str)
def test_windows_wider_than_the_keys_change_nothing(
    window: tuple[int, int], attend_numpy: Attend
) -> None:
    arrays = [normal((1, 60, 2, 16), seed=i) for i in range(3)]
    found = attend_numpy(*arrays, window_size=window)
    assert_close(found.out, attend_numpy(*arrays).out, Tolerance(1e-6, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_rows_before_the_first_key_are_empty(dtype: str, attend: Attend) -> None:
    """seqlen_q > seqlen_k: bottom-right causal leaves the first rows nothing to see."""
    case = Case((2, 3, 50, 20, 32), dtype, options=(CAUSAL,))
    attend.case(case)
    result = attend.arrays(*cases.inputs(case), **cases.options(case))
    out = result.out.astype(np.float64)
    assert (out[:, :30] == 0).all()
    assert (result.lse[..., :30] == -np.inf).all()
    assert np.isfinite(result.lse[..., 30:]).all()
    assert (out[:, 30:] != 0).any(axis=(1, 3)).all()


def test_rows_past_the_window_are_empty(attend: Attend) -> None:
    """Keys end before the window of the first rows starts, and so on the other side."""
    array = [normal((1, 8, 1, 16), seed=i) for i in range(3)]
    # Row i sits on key i - 4 here, and sees only keys in [i - 4, i - 4].
    result = attend.arrays(array[0], array[1][:, :4], array[2][:, :4], window_size=(0, 0))
    assert (result.lse[0, 0, :4] == -np.inf).all()
    assert (result.out[0, :4] == 0).all()
    # A row that sees one key returns that key's value.
    assert_close(result.out[0, 4:, 0], array[2][0, :4, 0], BASE["float32"])


# Ten calls each. test_hidden_values.py, and test_the_future_does_not_leak in the forward kernel's
# tests, check the same on the emulated GPU in every run.
@pytest.mark.slow_emulated
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["key", "value", "key and value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unseen_keys_touch_nothing(
    dtype: str, where: str, poison: float, attend_numpy: Attend
) -> None:
    """A15 and more: rows that do not see a key keep their bits, whatever that key holds.

    Zero times NaN is NaN, so a weight of zero does not hide a key; it must not be read, or must be
    blanked. The poisoned key shares a tile with keys that are seen.
    """
    query, key, value = (normal((1, 96, 4, 64), dtype, seed=i) for i in range(3))
    clean = attend_numpy(query, key, value, causal=True)
    for position in (0, 1, 31, 32, 33, 63, 64, 77, 95):
        poisoned_key, poisoned_value = key.copy(), value.copy()
        if "key" in where:
            poisoned_key[:, position] = poison
        if "value" in where:
            poisoned_value[:, position] = poison
        found = attend_numpy(query, poisoned_key, poisoned_value, causal=True)
        assert_rows_unchanged(found, clean, slice(0, position), f"key {position}")
        seen = found.out[:, position:].astype(np.float64)
        assert not np.isfinite(seen).all(axis=(0, 2, 3)).any(), f"key {position} was dropped"


def assert_rows_unchanged(found: Any, clean: Any, rows: slice, what: str) -> None:
    def bits(array: Array) -> Array:
        return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")

    assert_same_bits(bits(found.out[:, rows]), bits(clean.out[:, rows]), f"out, {what}")
    assert_same_bits(bits(found.lse[:, :, rows]), bits(clean.lse[:, :, rows]), f"lse, {what}")


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "mlx"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a15_no_causal_leak(dtype: str, attend: Attend) -> None:
    """Changing key and value j, by ordinary numbers, must not change row i < j."""
    query, key, value = (normal((1, 96, 4, 64), dtype, seed=i) for i in range(3))
    clean = attend.arrays(query, key, value, causal=True)
    for position in (1, 2, 3, 5, 17, 48, 95):
        other_key, other_value = key.copy(), value.copy()
        other_key[:, position:] = normal((96 - position, 4, 64), dtype, seed=9, factor=30)
        other_value[:, position:] = normal((96 - position, 4, 64), dtype, seed=8, factor=30)
        found = attend.arrays(query, other_key, other_value, causal=True)
        assert_rows_unchanged(found, clean, slice(0, position), f"key {position}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_outside_the_window_touch_nothing(dtype: str, attend_numpy: Attend) -> None:
    left, right = 20, 9
    query, key, value = (normal((1, 150, 2, 32), dtype, seed=i) for i in range(3))
    clean = attend_numpy(query, key, value, window_size=(left, right))
    for position in (0, 31, 75, 128, 149):
        poisoned_key, poisoned_value = key.copy(), value.copy()
        poisoned_key[:, position] = poisoned_value[:, position] = np.nan
        found = attend_numpy(query, poisoned_key, poisoned_value, window_size=(left, right))
        before = slice(0, max(position - right, 0))
        after = slice(position + left + 1, None)
        assert_rows_unchanged(found, clean, before, f"before key {position}")
        assert_rows_unchanged(found, clean, after, f"after key {position}")
        seen = slice(before.stop, after.start)
        assert np.isnan(found.out[:, seen].astype(np.float64)).all()


def test_rows_do_not_touch_each_other(attend_numpy: Attend) -> None:
    """A NaN in one query row, head or batch stays in that row, head and batch."""
    query, key, value = (normal((2, 70, 3, 32), seed=i) for i in range(3))
    clean = attend_numpy(query, key, value)
    poisoned = query.copy()
    poisoned[1, 33, 2] = np.nan
    found = attend_numpy(poisoned, key, value)
    assert np.isnan(found.out[1, 33, 2]).all()
    assert np.isnan(found.lse[1, 2, 33])
    found.out[1, 33, 2] = clean.out[1, 33, 2]
    found.lse[1, 2, 33] = clean.lse[1, 2, 33]
    assert_same_bits(found.out.view("u4"), clean.out.view("u4"))
    assert_same_bits(found.lse.view("u4"), clean.lse.view("u4"), "lse")


ALIBI_OPTIONS = [(), (CAUSAL,), (("window_size", (30, 10)),), (CAUSAL, ("softcap", 5.0))]


@pytest.mark.parametrize("options", ALIBI_OPTIONS, ids=["full", "causal", "window", "softcap"])
@pytest.mark.parametrize("alibi", ["heads", "batch_heads"])
@pytest.mark.parametrize("lengths", [(64, 64), (40, 100), (100, 40)], ids=str)
def test_alibi(
    options: tuple[tuple[str, Any], ...], alibi: str, lengths: tuple[int, int], attend: Attend
) -> None:
    attend.case(
        Case((2, 4, *lengths, 32), heads_k=2, alibi=alibi, options=options),
        # With 4 queries per key head and slopes up to 1/2, biases reach -50.
        lse_tolerance=Tolerance(LSE.atol, 1e-6),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_alibi_in_half_precision(dtype: str, attend: Attend) -> None:
    attend.case(Case((1, 8, 128, 128, 64), dtype, alibi="heads", options=(CAUSAL,)))


def test_alibi_of_zero_or_negative_slope(attend_numpy: Attend) -> None:
    arrays = [normal((1, 50, 3, 16), seed=i) for i in range(3)]
    zero = attend_numpy(*arrays, alibi_slopes=np.zeros(3, np.float32))
    assert_close(zero.out, attend_numpy(*arrays).out, Tolerance(1e-6, 1e-6))
    slopes = np.float32([-0.1, 0.0, 0.1])
    negative = attend_numpy(*arrays, alibi_slopes=slopes)
    out, _ = reference.attention(*arrays, alibi_slopes=slopes)
    assert_close(negative.out.astype(np.float64), out, BASE["float32"])


def test_softcap_comes_before_the_mask(attend_numpy: Attend) -> None:
    """Capping a masked score of -inf would bring it back as -softcap."""
    options = (("softcap", 0.5), CAUSAL)
    attend_numpy.case(Case((1, 2, 90, 90, 32), options=options))
    # Rows that see one key only return its value, however the scores are capped.
    case = Case((1, 2, 90, 90, 32), options=(("softcap", 0.5), ("window_size", (0, 0))))
    result = attend_numpy(*cases.inputs(case), **cases.options(case))
    assert_close(result.out, cases.inputs(case)[2], BASE["float32"])


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 1e6])
def test_softcap_from_flat_to_absent(softcap: float, attend_numpy: Attend) -> None:
    attend_numpy.case(Case((1, 2, 64, 64, 64), options=(("softcap", softcap),)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_row_equals_its_row_in_the_full_pass(dtype: str, attend: Attend) -> None:
    """Generation: row i alone over keys 0..i is row i of the causal pass over everything."""
    query, key, value = (
        normal((2, 70, heads, 48), dtype, seed=s) for s, heads in enumerate((6, 2, 2))
    )
    full = attend.arrays(query, key, value, causal=True)
    for i in (0, 1, 31, 32, 63, 69):
        rows = slice(i, i + 1)
        one = attend.arrays(query[:, rows], key[:, : i + 1], value[:, : i + 1], causal=True)
        # Two float32 sums of the same terms in another order, then two roundings to the dtype.
        tolerance = BASE[dtype] if dtype != "float32" else Tolerance(2e-6, 2e-6)
        assert_close(
            one.out.astype(np.float64), full.out[:, rows].astype(np.float64), tolerance, f"row {i}"
        )
        assert_close(one.lse, full.lse[:, :, rows], Tolerance(1e-5, 0), f"lse of row {i}")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 4, 33, 40, 65])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_keys_touch_nothing(
    kind: str, seqlen_q: int, poison: float, attend_numpy: Attend
) -> None:
    """A mask hides a key as causal does: whatever its key and value hold, both kernels alike."""
    query, key, value = (
        normal((1, 2, rows, 24), "float32", seed=i) for i, rows in enumerate((seqlen_q, 50, 50))
    )
    shown = np.ones((seqlen_q, 50), bool)
    shown[:, [3, 30, 49]] = False
    mask = shown if kind == "bool" else np.where(shown, 0, -np.inf).astype(np.float32)
    clean = attend_numpy.sdpa(query, key, value, mask)
    key[:, :, [3, 30, 49]] = poison
    value[:, :, [3, 30, 49]] = poison
    found = attend_numpy.sdpa(query, key, value, mask)
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("seqlen_q", [9, 17, 25, 33, 49, 65, 97])
def test_keys_past_the_only_row_of_a_panel_touch_nothing(
    seqlen_q: int, attend_numpy: Attend
) -> None:
    """All rows of such a panel, or of a tile on Metal, see the same keys, and not all that are
    computed with them."""
    query, key, value = (
        normal((1, 1, rows, 8), "float32", seed=i)
        for i, rows in enumerate((seqlen_q, seqlen_q + 3, seqlen_q + 3))
    )
    value[:, :, seqlen_q:] = np.nan  # top left: nobody sees them
    out = attend_numpy.sdpa(query, key, value, is_causal=True)
    assert np.isfinite(out).all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("seqlen_q", [4, 40])
def test_the_lowest_number_is_not_minus_infinity(seqlen_q: int) -> None:
    """Masks that transformers makes hold finfo.min: a row of it weighs all keys alike."""
    query, key, value = (
        normal((1, 1, rows, 8), "float32", seed=i) for i, rows in enumerate((seqlen_q, 20, 20))
    )
    mask = np.full((seqlen_q, 20), np.finfo(np.float32).min, np.float32)
    out = umfa.scaled_dot_product_attention(query, key, value, attn_mask=mask, backend="cpu")
    assert_close(
        out.astype(np.float64),
        np.broadcast_to(value.astype(np.float64).mean(axis=2, keepdims=True), out.shape),
        BASE["float32"],
    )
