"""Every legal format, bit by bit against NumPy; and that the others are refused."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests import quantization
from tests.array_libraries import DTYPES, Array
from tests.quantization import Format, Quantized

pytestmark = pytest.mark.cpu_only

LEGAL = list(quantization.legal())
SHAPES = [(2, 3, 37, 72), (1, 2, 5, 7), (2, 1, 3, 576), (2, 2, 0, 32), (1, 1, 1, 1)]


def random(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    """(batch, head, row, channel): numbers of many magnitudes, and blocks of special ones."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape) * np.exp(generator.standard_normal(shape))
    x = x.astype(np.float32)
    rows = [slice(1, 2), slice(8, 12), slice(12, 13), slice(16, 20), slice(20, 24), slice(28, 32)]
    for row, value in zip(rows, (0.0, 0.0, -0.0, 2.5, -1e-3, 1e-42), strict=True):
        x[:, :, row] = value
    x[:, :, 24:28] *= np.float32(1e-7)
    return x.astype(DTYPES[dtype])


def quantize(x: Array, form: Format, **options: Any) -> umfa.QuantizedTensor:
    return umfa.quantize(x, **form._asdict(), layout="bhsd", **options)


def check(found: umfa.QuantizedTensor, expected: Quantized) -> None:
    assert found.scales.dtype == expected.scales.dtype
    assert found.scales.shape == expected.scales.shape
    bits = np.dtype(f"u{expected.scales.dtype.itemsize}")
    np.testing.assert_array_equal(found.scales.view(bits), expected.scales.view(bits), "scales")
    if expected.zero_points is None:
        assert found.zero_points is None
    else:
        assert found.zero_points.dtype == np.uint8
        np.testing.assert_array_equal(found.zero_points, expected.zero_points, "zero points")
    assert found.data.dtype == expected.data.dtype
    np.testing.assert_array_equal(found.data, expected.data, "data")


def assert_same(found: Array, expected: Array) -> None:
    assert found.dtype == expected.dtype
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    same = (found.view(bits) == expected.view(bits)) | (np.isnan(found) & np.isnan(expected))
    assert found.shape == expected.shape
    assert same.all(), (found[~same][:4], expected[~same][:4])


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_bits(form: Format) -> None:
    for shape in SHAPES:
        check_shape(form, shape)


def check_shape(form: Format, shape: tuple[int, ...]) -> None:
    x = random(shape)
    expected = quantization.quantize(x, form)
    found = quantize(x, form)
    check(found, expected)
    assert found.shape == shape
    assert found.nbytes == sum(p.nbytes for p in expected[1:] if p is not None)
    for dtype in DTYPES.values():
        assert_same(found.dequantize(dtype), quantization.dequantize(form, expected, dtype))


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_bits_of_16_bit_tensors(form: Format) -> None:
    for dtype in ("float16", "bfloat16"):
        x = random((1, 2, 33, 40), dtype, seed=1)
        check(quantize(x, form), quantization.quantize(x, form))


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_extreme_numbers(form: Format) -> None:
    """From the smallest subnormal to the largest number; float16 scales hold fewer."""
    generator = np.random.default_rng(2)
    most = 8e6 if form.scale_dtype == "float16" else 3.4e38
    if form.dtype == "nf4" and form.scale_dtype == "float16":
        most = 65000.0
    if form.scale_dtype == "float16" and form.dtype == "int4":
        most = 4.5e5
    exponents = generator.uniform(-45, np.log10(most), (1, 2, 64, 32))
    x = (np.sign(generator.standard_normal(exponents.shape)) * 10.0**exponents).astype(np.float32)
    x[:, :, ::3] *= generator.random((1, 2, 22, 32)) < 0.1  # few in a block
    expected = quantization.quantize(x, form)
    found = quantize(x, form)
    check(found, expected)
    assert_same(found.dequantize(), quantization.dequantize(form, expected))
    assert np.isfinite(found.dequantize()).all()


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_a33_numbers_that_are_not_finite(form: Format) -> None:
    x = random((2, 2, 8, 64), seed=3)
    for place, value in (((0, 0, 1, 3), np.nan), ((0, 1, 6, 40), np.inf), ((1, 0, 0, 0), -np.inf)):
        x[place] = value
    for value in (np.nan, np.inf, -np.inf):
        bad = random((1, 1, 3, 32))
        bad[0, 0, 1, 5] = value
        with pytest.raises(ValueError, match=r"\[umfa\.quantize\] x has a NaN or an infinity"):
            quantize(bad, form)
    expected = quantization.quantize(x, form)
    found = quantize(x, form, nonfinite="nan")
    check(found, expected)
    out = found.dequantize()
    assert_same(out, quantization.dequantize(form, expected))
    assert np.isnan(out[~np.isfinite(x)]).all()
    if form.granularity != "tensor":
        assert np.isfinite(out).any()


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4"])
def test_scales_too_large_for_float16(dtype: str) -> None:
    x = np.zeros((1, 1, 2, 32), np.float32)
    x[0, 0, 1, 4] = 3e38
    form = Format(dtype, scale_dtype="float16")
    with pytest.raises(ValueError, match=r"too large for float16 scales; got one in block .*row"):
        quantize(x, form)
    found = quantize(x, form, nonfinite="nan")
    assert np.isnan(found.dequantize()[0, 0, 1]).all()
    np.testing.assert_array_equal(found.dequantize()[0, 0, 0], 0)


@pytest.mark.parametrize(
    "form", [form for form in LEGAL if form.dtype in ("int8", "int4")], ids=str
)
def test_a33_error_is_at_most_half_a_scale(form: Format) -> None:
    shape = (2, 2, 69, 33)
    x = random(shape, seed=4)
    found = quantize(x, form)
    codes = found.data.view(np.uint8)
    if form.dtype == "int4":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*shape[:-1], -1)[..., : shape[-1]]
    numbers = quantization.numbers_of(form, np.ascontiguousarray(codes))
    if found.zero_points is not None:
        numbers -= quantization.expanded(form, found.zero_points.astype(np.float64), shape)
    scales = quantization.expanded(form, found.scales.astype(np.float64), shape)
    assert (np.abs(x.astype(np.float64) - numbers * scales) <= scales / 2).all()
    # What is returned has one rounding to float32 more.
    ulp = np.spacing(np.abs(found.dequantize())).astype(np.float64)
    error = np.abs(x.astype(np.float64) - found.dequantize().astype(np.float64))
    assert (error <= scales / 2 + ulp / 2).all()


def test_ties_go_to_even_codes() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    found = umfa.quantize(x[None], "int8", layout="bhsd")
    scale = np.float32(127) * (np.float32(1) / np.float32(127))
    np.testing.assert_array_equal(found.scales.ravel(), scale)
    assert scale == 1
    np.testing.assert_array_equal(found.data.ravel(), [127, 0, 2, 2, 0, -2, -2, 126])


def test_low_half_first_and_padding() -> None:
    x = np.array([[[7.0, -1.0, 2.0]]], np.float32)
    found = umfa.quantize(x, "int4", layout="bhsd")
    np.testing.assert_array_equal(found.data, [[[0xF7, 0x02]]])
    assert found.shape == (1, 1, 3)
    np.testing.assert_array_equal(found.dequantize(), x)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float8_e4m3fn", ml_dtypes.float8_e4m3fn), ("float8_e5m2", ml_dtypes.float8_e5m2)],
)
def test_every_float8_code(dtype: str, kind: Any) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    one = np.ones((1, 1, 1), np.float32)
    found = umfa.QuantizedTensor(codes, one, dtype=dtype, layout="bhsd").dequantize()
    assert_same(found, codes.view(kind).astype(np.float32))


def test_every_code_of_4_bits_and_every_e8m0_scale() -> None:
    data = np.tile(np.arange(256, dtype=np.uint8)[:16], (256, 1))[:, None]
    scales = np.arange(256, dtype=np.uint8).reshape(256, 1, 1)
    found = umfa.QuantizedTensor(data, scales, dtype="mxfp4").dequantize()
    form = Format("mxfp4", "block", True, (1, 32), "float8_e8m0fnu")
    codes = np.stack([data & 15, data >> 4], -1).reshape(256, 1, 32)
    numbers = quantization.numbers_of(form, codes)
    with np.errstate(over="ignore"):
        expected = (numbers * quantization.scale_values(form, scales)).astype(np.float32)
    assert_same(found, expected)


def test_subnormal_scales_count_as_zero() -> None:
    data = np.full((4, 1, 4), 3, np.int8)
    scales = np.array([1e-40, -1e-40, 2.0**-126, 0], np.float32).reshape(4, 1, 1)
    found = umfa.QuantizedTensor(data, scales, dtype="int8").dequantize()
    np.testing.assert_array_equal(found[:, 0, 0], np.float32([0, 0, 3 * 2.0**-126, 0]))
    half = np.array([2.0**-24, 3 * 2.0**-24], np.float16).reshape(2, 1, 1)
    found = umfa.QuantizedTensor(data[:2], half, dtype="int8", scale_dtype="float16").dequantize()
    np.testing.assert_array_equal(found[:, 0, 0], np.float32([3 * 2.0**-24, 9 * 2.0**-24]))


EVERY = [
    Format(dtype, granularity, symmetric, (1, 32) if granularity == "block" else None, scale_dtype)
    for dtype, granularity, symmetric, scale_dtype in itertools.product(
        ("int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4", "mxfp8", "mxfp4", "q8_0", "q4_0"),
        ("tensor", "row", "block", "channel"),
        (True, False),
        ("float32", "float16", "bfloat16", "float8_e8m0fnu", "inside"),
    )
]


def test_every_other_combination_is_refused() -> None:
    known = {form._replace(block=(1, 32) if form.block else None) for form in LEGAL}
    x = random((1, 1, 4, 32))
    refused = 0
    for form in EVERY:
        if form in known:
            quantize(x, form)
            continue
        with pytest.raises(umfa.UnsupportedError, match=r"\[umfa\.quantize\] .*; got .*; expected"):
            quantize(x, form)
        refused += 1
    assert refused == len(EVERY) - len(known) == 360 - 58


@pytest.mark.parametrize("block", [(1, 16), (3, 48), (64, None), (5, 512)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks(dtype: str, symmetric: bool, block: tuple[int, int | None]) -> None:
    form = Format(dtype, "block", symmetric, block, "float16")
    x = random((2, 2, 37, 75), seed=5)
    expected = quantization.quantize(x, form)
    found = quantize(x, form)
    check(found, expected)
    assert_same(found.dequantize(), quantization.dequantize(form, expected))


def test_any_strides_and_both_layouts() -> None:
    x = random((2, 3, 37, 72), seed=6)
    form = Format("int4", "block", False, (4, 32), "float16")
    expected = quantization.quantize(x, form)
    bshd = x.transpose(0, 2, 1, 3)
    found = umfa.quantize(bshd, **form._asdict())
    for part, other in zip(
        (found.data, found.scales, found.zero_points), expected[1:], strict=True
    ):
        np.testing.assert_array_equal(part.transpose(0, 2, 1, 3), other)
    np.testing.assert_array_equal(
        found.dequantize().transpose(0, 2, 1, 3), quantization.dequantize(form, expected)
    )
    check(quantize(np.asfortranarray(x), form), expected)
    check(quantize(np.repeat(x, 2, -1)[..., ::2], form), expected)
    check(quantize(x[..., ::-1], form), quantization.quantize(x[..., ::-1], form))


@pytest.mark.parametrize("form", LEGAL[::5], ids=str)
def test_the_same_bits_from_any_number_of_threads(form: Format) -> None:
    x = random((2, 3, 300, 64), seed=7)
    umfa.set_num_threads(1)
    one = quantize(x, form)
    umfa.set_num_threads(4)
    four = quantize(x, form)
    np.testing.assert_array_equal(one.data, four.data)
    np.testing.assert_array_equal(one.scales, four.scales)
    np.testing.assert_array_equal(one.dequantize(), four.dequantize())


def test_the_same_bits_from_every_instruction_set(isa: str) -> None:
    x = random((1, 2, 37, 75), seed=8)
    for form in LEGAL[::3]:
        expected = quantization.quantize(x, form)
        found = quantize(x, form)
        check(found, expected)
        assert_same(
            found.dequantize(np.float16), quantization.dequantize(form, expected, np.float16)
        )
