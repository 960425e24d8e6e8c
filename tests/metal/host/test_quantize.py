"""Quantising and dequantising through the whole host, with the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import quantization, reference
from tests.array_libraries import DTYPES, Array
from tests.cases import normal
from tests.checks import BASE, assert_close, assert_same_bits
from tests.metal.metal_tensors import MetalTensor, to_numpy
from tests.quant.test_formats import assert_same, check, random
from tests.quantization import Format
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

FORMATS = [
    Format("int8"),
    Format("int4", "tensor", False, None, "float16"),
    Format("float8_e4m3fn", "channel"),
    Format("nf4", "block", True, (4, 32), "float16"),
    Format("mxfp4", "block", True, (1, 32), "float8_e8m0fnu"),
]
LEGAL = list(quantization.legal())


def quantize(x: Any, form: Format, **options: Any) -> umfa.QuantizedTensor:
    return umfa.quantize(x, **form._asdict(), layout="bhsd", **options)


def parts_of(double: Double, found: umfa.QuantizedTensor) -> list[Array | None]:
    parts = (found.data, found.scales, found.zero_points)
    return [None if part is None else to_numpy(double, part) for part in parts]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_metal_buffers(form: Format, emulated: Double) -> None:
    """Numbers on the GPU become codes there, and numbers again."""
    x = random((2, 2, 37, 72))
    expected = quantization.quantize(x, form)
    before = umfa.stats()
    found = quantize(MetalTensor(emulated, x, 64), form)
    for part, other in zip(parts_of(emulated, found), expected[1:], strict=True):
        assert (part is None) == (other is None)
        if other is not None:
            assert part is not None
            assert part.dtype == other.dtype
            np.testing.assert_array_equal(part.view(np.uint8), other.view(np.uint8))
    for dtype in DTYPES.values():
        numbers = to_numpy(emulated, found.dequantize(dtype))
        assert_same(numbers, quantization.dequantize(form, expected, dtype))
    after = umfa.stats()
    assert after.metal_calls - before.metal_calls == 4
    assert after.command_buffers - before.command_buffers == 4
    assert after.cpu_calls == before.cpu_calls
    assert found.shape == x.shape


@pytest.mark.parametrize("form", LEGAL[::6], ids=str)
def test_host_memory(form: Format, emulated: Double) -> None:
    x = random((1, 2, 13, 40))
    expected = quantization.quantize(x, form)
    found = quantize(x, form, backend="metal")
    check(found, expected)
    assert_same(found.dequantize(backend="metal"), quantization.dequantize(form, expected))


def test_host_memory_stays_on_the_cpu(double: Double, recorder: Recorder) -> None:
    quantize(random((1, 1, 5, 32)), FORMATS[0]).dequantize()
    assert not recorder.dispatches
    quantize(random((1, 1, 5, 32)), FORMATS[0], backend="metal").dequantize(backend="metal")
    names = [dispatch.name for dispatch in recorder.dispatches]
    assert names == ["quantize_scales_f32", "quantize_f32", "dequantize_f32"]


def refusal_of(x: Any, form: Format, **options: Any) -> str:
    """The text of the error, which keeps nothing alive."""
    try:
        quantize(x, form, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_blocks_without_a_scale(granularity: str, emulated: Double) -> None:
    """The same message as the CPU's, about the same block."""
    nan, large = random((2, 2, 8, 40), seed=1), random((2, 2, 8, 40), seed=2)
    nan[1, 0, 3, 5], nan[1, 1, 3, 5] = np.nan, np.inf
    large[0, 1, 7, 39] = 1e38
    form = Format("int4", granularity, False, None, "float16")
    for x, what in ((nan, "a NaN or an infinity"), (large, "too large for float16 scales")):
        messages = {
            refusal_of(x, form, backend="cpu"),
            refusal_of(x, form, backend="metal"),
            refusal_of(MetalTensor(emulated, x), form),
        }
        (message,) = messages
        assert message.startswith("[umfa.quantize] x has ")
        assert what in message
        expected = quantization.quantize(x, form)
        found = quantize(x, form, backend="metal", nonfinite="nan")
        check(found, expected)
        assert_same(found.dequantize(backend="metal"), quantization.dequantize(form, expected))


def test_a_cache_grows_in_place(emulated: Double) -> None:
    x = random((2, 2, 37, 72), seed=3)
    form = Format("int4", "block", False, (4, 32), "float16")
    expected = quantization.quantize(x, form)
    room = quantize(np.zeros_like(x), form, backend="metal")
    room.append(x[:, :, :20], 0, backend="metal")
    room.append(x[:, :, 20:], 20, backend="metal")
    check(room, expected)


def test_other_libraries_formats(emulated: Double) -> None:
    generator = np.random.default_rng(4)
    data = generator.integers(0, 256, (1, 2, 5, 34), np.uint8)
    data[..., :2] = np.float16([0.5]).view(np.uint8)
    blocks = umfa.QuantizedTensor.from_gguf(data, "q8_0")
    assert_same(blocks.dequantize(backend="metal"), blocks.dequantize(backend="cpu"))
    scales, biases = (generator.standard_normal((1, 2, 5, 2)).astype(np.float16) for _ in range(2))
    codes = generator.integers(0, 256, (1, 2, 5, 64), np.uint8)
    groups = umfa.QuantizedTensor.from_mlx(codes, scales, biases, group_size=64)
    assert_same(groups.dequantize(backend="metal"), groups.dequantize(backend="cpu"))


@pytest.mark.parametrize("shape", [(1, 2, 0, 32), (0, 2, 3, 32)])
def test_no_tokens(shape: tuple[int, ...], emulated: Double) -> None:
    for form in (FORMATS[0], FORMATS[1]):
        x = np.zeros(shape, np.float32)
        found = quantize(x, form, backend="metal")
        check(found, quantization.quantize(x, form))
        assert found.dequantize(backend="metal").shape == shape


def test_parts_in_metal_buffers(emulated: Double) -> None:
    """What another library has quantised on the GPU."""
    form = Format("float8_e5m2", "row", True, None, "float16")
    x = random((2, 2, 9, 40), seed=5)
    expected = quantization.quantize(x, form)
    data, scales = (MetalTensor(emulated, part, 6) for part in (expected.data, expected.scales))
    found = umfa.QuantizedTensor(
        data, scales, dtype=form.dtype, scale_dtype="float16", layout="bhsd"
    )
    assert found.shape == x.shape
    numbers = to_numpy(emulated, found.dequantize("bfloat16"))
    assert_same(numbers, quantization.dequantize(form, expected, DTYPES["bfloat16"]))


def test_attention_on_codes_is_that_on_their_numbers(emulated: Double) -> None:
    q, k = (normal((1, n, 2, 16), "float16", seed=n) for n in (9, 40))
    cache = umfa.quantize(MetalTensor(emulated, k), "int8")
    query = MetalTensor(emulated, q)
    on_codes = to_numpy(emulated, umfa.quantized_attention(query, cache, cache))
    keys = cache.dequantize("float16")
    found = to_numpy(emulated, umfa.flash_attn_func(query, keys, keys))
    numbers = umfa.quantize(k, "int8").dequantize("float16")
    exact, _ = reference.attention(q, numbers, numbers)
    assert_close(found.astype(np.float64), exact, BASE["float16"])
    assert_same_bits(on_codes, found)
