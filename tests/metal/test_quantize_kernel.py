"""Every quantised format on Metal, bit by bit against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import quantization
from tests.array_libraries import DTYPES, Array
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES
from tests.metal.test_plan_forward import host_names, layout
from tests.quant.test_formats import EVERY, assert_same, random
from tests.quantization import Format, Quantized, ext_format
from umfa import _ext

pytestmark = pytest.mark.usefixtures("own_settings")

LEGAL = list(quantization.legal())
SHAPES = [(2, 3, 37, 72), (1, 2, 5, 7), (2, 2, 0, 32), (1, 1, 1, 1)]
NONFINITE, TOO_LARGE = 1, 2  # UMFA_FAULT_ of shaders/shared/params.h


def quantize(x: Array, form: Format, faults: Array | None = None) -> tuple[Array, ...]:
    """Data, scales and zero points that the kernels write over other numbers."""
    like = quantization.quantize(x, form)
    data, scales = (
        np.full(part.nbytes, 0xEE, np.uint8).view(part.dtype).reshape(part.shape)
        for part in (like.data, like.scales)
    )
    zeros = None if like.zero_points is None else np.full(scales.shape, 0xEE, np.uint8)
    emulated.quantize(x, ext_format(form), (data, scales, zeros), faults)
    return data, scales, zeros


def check(found: tuple[Array, ...], expected: Quantized) -> None:
    for array, other, name in zip(found, expected[1:], ("data", "scales", "zeros"), strict=True):
        if other is None:
            assert array is None
            continue
        bits = np.dtype(f"u{other.dtype.itemsize}")
        np.testing.assert_array_equal(array.view(bits), other.view(bits), name)


def dequantize(form: Format, expected: Quantized, dtype: Any = np.float32) -> Array:
    out = np.full(expected.codes.shape, np.nan, dtype)
    parts = (expected.data, expected.scales, expected.zero_points)
    emulated.dequantize(parts, ext_format(form), out.shape[-1], out)
    return out


def check_both_ways(form: Format, x: Array) -> None:
    expected = quantization.quantize(x, form)
    check(quantize(x, form), expected)
    for dtype in DTYPES.values():
        assert_same(
            dequantize(form, expected, dtype), quantization.dequantize(form, expected, dtype)
        )


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_bits(form: Format) -> None:
    """All in one test, since it compiles the kernels of a format once."""
    for shape in SHAPES:
        check_both_ways(form, random(shape))
    check_extreme_numbers(form)
    check_numbers_that_are_not_finite(form)


def check_extreme_numbers(form: Format) -> None:
    """From the smallest subnormal to the largest number; float16 scales hold fewer."""
    generator = np.random.default_rng(2)
    most = 3.4e38 if form.scale_dtype != "float16" else 4.5e5 if form.dtype == "int4" else 65000.0
    exponents = generator.uniform(-45, np.log10(most), (1, 2, 64, 32))
    x = (np.sign(generator.standard_normal(exponents.shape)) * 10.0**exponents).astype(np.float32)
    x[:, :, ::3] *= generator.random((1, 2, 22, 32)) < 0.1  # few in a block
    expected = quantization.quantize(x, form)
    check(quantize(x, form), expected)
    assert_same(dequantize(form, expected), quantization.dequantize(form, expected))


def check_numbers_that_are_not_finite(form: Format) -> None:
    x = random((2, 2, 8, 64), seed=3)
    for place, value in (((0, 0, 1, 3), np.nan), ((0, 1, 6, 40), np.inf), ((1, 0, 0, 0), -np.inf)):
        x[place] = value
    expected = quantization.quantize(x, form)
    faults = np.full(expected.scales.size, 0xEE, np.uint8)
    check(quantize(x, form, faults), expected)
    bad = [
        NONFINITE * (not np.isfinite(x[at]).all()) for _, at in quantization.blocks(form, x.shape)
    ]
    np.testing.assert_array_equal(faults, bad)
    assert_same(dequantize(form, expected), quantization.dequantize(form, expected))


@pytest.mark.parametrize(
    "form",
    [pytest.param(f, marks=[] if i % 5 == 0 else pytest.mark.slow) for i, f in enumerate(LEGAL)],
    ids=str,
)
def test_16_bit_tensors(form: Format) -> None:
    for dtype in ("float16", "bfloat16"):
        x = random((1, 2, 33, 40), dtype, seed=1)
        check(quantize(x, form), quantization.quantize(x, form))


@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "channel"])
def test_scales_too_large_for_float16(granularity: str) -> None:
    x = np.zeros((1, 2, 5, 32), np.float32)
    x[0, 1, 4, 4] = 3e38
    form = Format(
        "int8", granularity, False, (4, 32) if granularity == "block" else None, "float16"
    )
    expected = quantization.quantize(x, form)
    faults = np.full(expected.scales.size, 0xEE, np.uint8)
    check(quantize(x, form, faults), expected)
    bad = [TOO_LARGE * bool(x[at].any()) for _, at in quantization.blocks(form, x.shape)]
    assert faults.tolist() == bad
    assert faults.sum() == TOO_LARGE


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_blocks_that_several_simdgroups_read(granularity: str, symmetric: bool) -> None:
    form = Format("int4", granularity, symmetric, (300, None) if granularity == "block" else None)
    x = random((2, 2, 700, 33), seed=4)
    check_both_ways(form, x)
    kernels = [launch["kernel"] for launch in emulated.last_plan["launches"]]
    assert kernels == ["dequantize_bf16"]
    quantize(x, form)
    kernels = [launch["kernel"] for launch in emulated.last_plan["launches"]]
    assert kernels == ["quantize_scales_f32", "quantize_gathered_f32", "quantize_f32"]


@pytest.mark.parametrize("block", [(1, 16), (3, 48), (64, None), (5, 512)], ids=str)
def test_blocks(block: tuple[int, int | None]) -> None:
    for symmetric in (True, False):
        form = Format("int4", "block", symmetric, block, "float16")
        check_both_ways(form, random((2, 2, 37, 75), seed=5))


@pytest.mark.parametrize("form", LEGAL[::7], ids=str)
def test_a_head_dim_of_576(form: Format) -> None:
    check_both_ways(form, random((2, 1, 3, 576), seed=6))


@pytest.mark.parametrize("form", LEGAL[2::9], ids=str)
@pytest.mark.parametrize("machine", SOME_MACHINES)
def test_other_machines(machine: str, form: Format) -> None:
    emulated.settings.options = MACHINES[machine]
    emulated.settings.schedule_seed = 3
    check_both_ways(form, random((2, 3, 37, 72)))


@pytest.mark.parametrize("form", LEGAL[3::11], ids=str)
def test_without_function_constants(form: Format) -> None:
    """As PyTorch and MLX launch it."""
    emulated.settings.function_constants = False
    check_both_ways(form, random((2, 2, 9, 40), seed=7))


def test_any_strides() -> None:
    """Channels backwards or apart, rows first; nothing else is written."""
    x = random((2, 3, 37, 72), seed=8)
    form = Format("int4", "block", False, (4, 32), "float16")
    expected = quantization.quantize(x, form)
    for strided in (
        np.asfortranarray(x),
        np.repeat(x, 2, -1)[..., ::2],
        x[..., ::-1].copy()[..., ::-1],
        x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3),
    ):
        check(quantize(strided, form), expected)
    wide_data = np.full((2, 3, 37, 40), 0xEE, np.uint8)
    wide_scales = np.full((2, 3, 20, 6), 7, np.float16)
    wide_zeros = np.full((3, 2, 10, 3), 0xEE, np.uint8)
    data, scales = wide_data[..., :36], wide_scales[..., ::2, ::2]
    zeros = wide_zeros.transpose(1, 0, 2, 3)
    emulated.quantize(x, ext_format(form), (data, scales, zeros), None)
    check((data, scales, zeros), expected)
    assert (wide_data[..., 36:] == 0xEE).all()
    assert (wide_scales[:, :, 1::2] == 7).all()
    out = np.full((2, 37, 3, 144), 7, np.float32)
    emulated.dequantize(
        (data, scales, zeros), ext_format(form), 72, out[..., ::2].transpose(0, 2, 1, 3)
    )
    numbers = quantization.dequantize(form, expected).transpose(0, 2, 1, 3)
    assert_same(np.ascontiguousarray(out[..., ::2]), np.ascontiguousarray(numbers))
    assert (out[..., 1::2] == 7).all()


def test_every_code_of_every_format() -> None:
    data = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 256)
    one = np.ones((1, 1, 1, 1), np.float32)
    for form in LEGAL:
        if form.granularity != "tensor" or not form.symmetric or form.scale_dtype != "float32":
            continue
        four = form.dtype in quantization.FOUR_BITS
        channels = 512 if four else 256
        codes = np.stack([data & 15, data >> 4], -1).reshape(1, 1, 1, -1) if four else data
        out = np.full((1, 1, 1, channels), np.nan, np.float32)
        own = data.view(np.int8) if form.dtype == "int8" else data
        emulated.dequantize((own, one, None), ext_format(form), channels, out)
        assert_same(out, quantization.numbers_of(form, codes).astype(np.float32))


@pytest.mark.parametrize("machine", [None, "flush to zero"])
def test_every_e8m0_scale_and_subnormal_scales(machine: str | None) -> None:
    if machine:
        emulated.settings.options = MACHINES[machine]
    data = np.full((1, 1, 256, 16), 0x77, np.uint8)  # of 6 each
    scales = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
    form = Format("mxfp4", "block", True, (1, 32), "float8_e8m0fnu")
    out = np.full((1, 1, 256, 32), 5, np.float32)
    emulated.dequantize((data, scales, None), ext_format(form), 32, out)
    with np.errstate(over="ignore"):
        numbers = (6 * quantization.scale_values(form, scales)).astype(np.float32)
    assert_same(out, np.broadcast_to(numbers, out.shape))
    codes = np.full((1, 1, 4, 4), 3, np.int8)
    single = np.array([1e-40, -1e-40, 2.0**-126, 0], np.float32).reshape(1, 1, 4, 1)
    out = np.full((1, 1, 4, 4), 5, np.float32)
    emulated.dequantize((codes, single, None), ext_format(Format("int8")), 4, out)
    np.testing.assert_array_equal(out[0, 0, :, 0], np.float32([0, 0, 3 * 2.0**-126, 0]))
    halves = np.array([2.0**-24, 3 * 2.0**-24, 0, 65504], np.float16).reshape(1, 1, 4, 1)
    emulated.dequantize(
        (codes, halves, None), ext_format(Format("int8", scale_dtype="float16")), 4, out
    )
    expected = np.float32([3 * 2.0**-24, 9 * 2.0**-24, 0, 3 * 65504])
    np.testing.assert_array_equal(out[0, 0, :, 0], expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_affine_groups_of_mlx(scale_dtype: str, bits: int) -> None:
    generator = np.random.default_rng(9)
    kind = DTYPES[scale_dtype]
    data = generator.integers(0, 256, (2, 3, 5, 128 * bits // 8), np.uint8)
    scales, biases = (generator.standard_normal((2, 3, 5, 2)).astype(kind) for _ in range(2))
    form = _ext.QuantFormat(
        "umfa.test", f"int{bits}", "block", "bias", scale_dtype, (1, 64), "bhsd"
    )
    codes = data if bits == 8 else np.stack([data & 15, data >> 4], -1).reshape(2, 3, 5, 128)
    wide, low = (np.repeat(part, 64, -1).astype(np.float64) for part in (scales, biases))
    for dtype in DTYPES.values():
        out = np.full((2, 3, 5, 128), np.nan, dtype)
        emulated.dequantize((data, scales, biases), form, 128, out)
        # Rounded to float32 once: float64 holds the product, and nearly always the sum.
        assert_same(out, (codes * wide + low).astype(np.float32).astype(dtype))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_blocks_of_gguf(dtype: str) -> None:
    generator = np.random.default_rng(10)
    size = 34 if dtype == "q8_0" else 18
    # Rows that begin at odd bytes, too.
    data = generator.integers(0, 256, (2, 3, 5, 4 * size + 1), np.uint8)[..., :-1]
    scales = generator.standard_normal((2, 3, 5, 4)).astype(np.float16)
    for i in range(4):
        data[..., i * size : i * size + 2] = scales[..., i : i + 1].copy().view(np.uint8)
    codes = np.stack([data[..., i * size + 2 : (i + 1) * size] for i in range(4)], -2)
    numbers = codes.view(np.int8).astype(np.float32)
    if dtype == "q4_0":
        numbers = np.concatenate([codes & 15, codes >> 4], -1).astype(np.float32) - 8
    form = _ext.QuantFormat("umfa.test", dtype, None, "none", None, None, "bhsd")
    out = np.full((2, 3, 5, 128), np.nan, np.float32)
    emulated.dequantize((data, None, None), form, 128, out)
    assert_same(out, (numbers * scales[..., None].astype(np.float32)).reshape(out.shape))


@pytest.mark.parametrize("shape", [(2, 2, 0, 32), (0, 2, 3, 32), (2, 0, 3, 32)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    for form in LEGAL[:8]:
        check_both_ways(form, x)
        assert emulated.last_plan["launches"] == []


def test_every_other_combination_is_refused() -> None:
    known = {form._replace(block=(1, 32) if form.block else None) for form in LEGAL}
    others = [form for form in EVERY if form not in known]
    x = np.zeros((1, 1, 4, 32), np.float32)
    for form in others:
        with pytest.raises(umfa.UnsupportedError):
            emulated.quantize(x, ext_format(form), (x, x, x), None)
    assert len(others) == 302


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_are_compiled_ahead(dtype: str) -> None:
    x = random((1, 2, 150, 40), dtype)
    form = Format("int4", "channel", False)
    quantize(x, form)
    names = {
        "scales": host_names("quantize_scales.metal"),
        "codes": host_names("quantize.metal"),
        "numbers": host_names("dequantize.metal"),
    }
    scales, gathered, codes = emulated.last_plan["launches"]
    assert {scales["kernel"], gathered["kernel"]} <= names["scales"]
    assert codes["kernel"] in names["codes"]
    assert scales["families"] == gathered["families"] == codes["families"] == [codes["kernel"]]
    assert scales["buffer_count"] == len(layout("QUANTIZE_SCALES"))
    assert codes["buffer_count"] == 5
    dequantize(form, quantization.quantize(x, form), DTYPES[dtype])
    (numbers,) = emulated.last_plan["launches"]
    assert numbers["kernel"] in names["numbers"]
    assert numbers["buffer_count"] == len(layout("DEQUANTIZE"))


def test_each_number_is_read_twice_and_each_code_once() -> None:
    x = random((1, 2, 16, 64), "float16")
    form = Format("int8", "row")
    with emulated.counting() as counters:
        data, _, _ = quantize(x, form)
    scales, codes = counters
    assert scales.buffer_bytes_read[0] == codes.buffer_bytes_read[0] == x.nbytes
    assert codes.buffer_bytes_written[3] == data.nbytes
    assert scales.threadgroup_barriers == codes.threadgroup_barriers == 0
    with emulated.counting() as counters:
        dequantize(form, quantization.quantize(x, form), np.float16)
    (numbers,) = counters
    assert numbers.buffer_bytes_read[0] == data.nbytes
    assert numbers.buffer_bytes_written[3] == x.nbytes
