"""The quantised formats in NumPy, written from docs/quantization.md: what the product must equal.

float64 holds every quotient and product here so well that rounding it once more changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests.array_libraries import Array
from umfa import _ext

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "mxfp8": 448.0, "mxfp4": 6.0}
FLOATS: dict[str, Any] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
}
NF4 = np.float32(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
SCALE_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e8m0fnu": np.uint8,
}
FOUR_BITS = ("int4", "nf4", "mxfp4")


class Format(NamedTuple):
    """A format, as `umfa.quantize` takes it."""

    dtype: str
    granularity: str = "row"
    symmetric: bool = True
    block: tuple[int, int | None] | None = None
    scale_dtype: str = "float32"

    def __str__(self) -> str:
        sign = "" if self.symmetric else "-zero_points"
        block = "" if self.block is None else "{}x{}".format(*self.block)
        return f"{self.dtype}-{self.granularity}{block}{sign}-{self.scale_dtype}"


def ext_format(form: Format, layout: str = "bhsd") -> _ext.QuantFormat:
    """The format as the binding takes it."""
    return _ext.QuantFormat(
        "umfa.test",
        form.dtype,
        form.granularity,
        "none" if form.symmetric else "zero_point",
        form.scale_dtype,
        form.block,
        layout,
    )


class Quantized(NamedTuple):
    """Codes before packing, stored scales, zero points; each block's places."""

    codes: Array
    data: Array
    scales: Array
    zero_points: Array | None


def legal() -> Iterator[Format]:
    """Every format that umfa quantises to: the matrix of docs/quantization.md, with one block."""
    granularities = ("tensor", "row", "block", "channel")
    for dtype, granularity, scale_dtype in itertools.product(
        ("int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4"),
        granularities,
        ("float32", "float16"),
    ):
        block = (4, 32) if granularity == "block" else None
        yield Format(dtype, granularity, True, block, scale_dtype)
        if dtype in ("int8", "int4"):
            yield Format(dtype, granularity, False, block, scale_dtype)
    for dtype in ("mxfp8", "mxfp4"):
        yield Format(dtype, "block", True, (1, 32), "float8_e8m0fnu")


def block_sizes(form: Format, rows: int, channels: int) -> tuple[int, int]:
    """Rows and channels that share a scale."""
    if form.granularity == "row":
        return 1, channels
    if form.granularity == "channel":
        return max(rows, 1), 1
    if form.granularity == "tensor":
        return max(rows, 1), channels
    assert form.block is not None
    return form.block[0], form.block[1] or channels


def blocks(form: Format, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    """(place of the scale, places of the elements), of a (batch, head, row, channel) tensor."""
    batch, heads, rows, channels = shape
    if form.granularity == "tensor":
        yield (0, 0, 0, 0), np.s_[:, :, :, :]
        return
    of_rows, of_channels = block_sizes(form, rows, channels)
    places = itertools.product(
        range(batch), range(heads), range(0, rows, of_rows), range(0, channels, of_channels)
    )
    for b, h, r, c in places:
        yield (
            (b, h, r // of_rows, c // of_channels),
            np.s_[b, h, r : r + of_rows, c : c + of_channels],
        )


def scales_shape(form: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    if form.granularity == "tensor":
        return (1, 1, 1, 1)
    batch, heads, rows, channels = shape
    of_rows, of_channels = block_sizes(form, rows, channels)
    return batch, heads, -(-rows // of_rows), -(-channels // of_channels)


def scale_of(form: Format, block: Array) -> Any:
    """The stored scale of a block, as an element of the scales' array."""
    largest = np.float32(np.abs(block).max(initial=0))
    poison, kind = not np.isfinite(block).all(), SCALE_DTYPES[form.scale_dtype]
    if form.scale_dtype == "float8_e8m0fnu":
        if poison:
            return kind(255)
        if largest == 0:
            return kind(0)
        exponent = int(np.frexp(np.float64(largest))[1]) - 1
        return kind(max(exponent - (2 if form.dtype == "mxfp4" else 8), -100) + 127)
    if poison:
        return kind(np.nan)
    if largest == 0:
        return kind(0)
    if form.symmetric:
        factor = {"int8": 127, "int4": 7, "nf4": 1}.get(form.dtype, LARGEST.get(form.dtype))
        step = largest * (np.float32(1) / np.float32(factor))
    else:
        low, high = min(np.float32(0), np.float32(block.min())), max(np.float32(0), block.max())
        half = np.float32(np.float64(high) / 2 - np.float64(low) / 2)
        step = half * np.float32(65794 / 2**23 if form.dtype == "int8" else 69906 / 2**19)
    step = max(np.float32(step), np.float32(2.0**-100))
    if kind is np.float32:
        return step
    with np.errstate(over="ignore"):
        stored = np.float16(step)
    if np.float64(stored) < np.float64(step):
        stored = np.nextafter(stored, np.float16(np.inf))
    return stored if np.isfinite(stored) else np.float16(np.nan)


def scale_values(form: Format, scales: Array) -> Array:
    """Stored scales as float64."""
    if form.scale_dtype != "float8_e8m0fnu":
        return scales.astype(np.float64)
    exact = np.ldexp(1.0, scales.astype(np.int64) - 127)
    return np.where(scales == 255, np.nan, np.where(scales == 0, 0, exact))


def float_codes(dtype: str, numbers: Array) -> Array:
    kind = FLOATS[dtype]
    clipped = np.clip(numbers, -LARGEST[dtype], LARGEST[dtype]).astype(np.float32)
    return clipped.astype(kind).view(np.uint8)


def codes_of(form: Format, block: Array, scale: float, zero: int) -> Array:
    """Codes of a finite block. `scale` is exact."""
    if scale == 0:
        return np.full(block.shape, 7 if form.dtype == "nf4" else 0, np.uint8)
    wide = block.astype(np.float64)
    if form.dtype == "nf4":
        middles = (NF4[1:].astype(np.float64) / 2 + NF4[:-1].astype(np.float64) / 2).astype(
            np.float32
        )
        bounds = middles * np.float32(scale)
        return (wide[..., None] > bounds).sum(-1).astype(np.uint8)
    if form.dtype in FLOATS:
        inverse = np.float32(1) / np.float32(scale)
        return float_codes(form.dtype, (block.astype(np.float32) + np.float32(0)) * inverse)
    bits = 8 if form.dtype == "int8" else 4
    steps = np.rint(wide / scale) + zero
    most = 2**bits - 1 if not form.symmetric else 2 ** (bits - 1) - 1
    clipped = np.clip(steps, 0 if not form.symmetric else -most, most).astype(np.int64)
    return (clipped & (2**bits - 1)).astype(np.uint8)


def zero_of(form: Format, block: Array, scale: float) -> int:
    if form.symmetric or scale == 0 or np.isnan(scale):
        return 0
    low = min(0.0, float(block.min()))
    return int(np.clip(np.rint(-low / scale), 0, 255 if form.dtype == "int8" else 15))


def pack(dtype: str, codes: Array) -> Array:
    """Two codes of 4 bits to a byte, the first in the low half."""
    if dtype not in FOUR_BITS:
        return codes
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return (padded[..., ::2] | padded[..., 1::2] << 4).astype(np.uint8)


def quantize(x: Array, form: Format) -> Quantized:
    """Of a (batch, head, row, channel) array."""
    numbers = x.astype(np.float32)
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros(scales_shape(form, x.shape), SCALE_DTYPES[form.scale_dtype])
    zeros = np.zeros(scales.shape, np.uint8)
    for place, elements in blocks(form, x.shape):
        block = numbers[elements]
        scales[place] = scale_of(form, block)
        scale = float(scale_values(form, np.asarray(scales[place])))
        if np.isnan(scale):
            continue
        zeros[place] = zero_of(form, block, scale)
        codes[elements] = codes_of(form, block, scale, int(zeros[place]))
    data = pack(form.dtype, codes)
    if form.dtype == "int8" and form.symmetric:
        data = data.view(np.int8)
    return Quantized(codes, data, scales, None if form.symmetric else zeros)


def numbers_of(form: Format, codes: Array) -> Array:
    """What codes stand for, before scale and zero point, as float64."""
    if form.dtype == "nf4":
        return NF4[codes].astype(np.float64)
    if form.dtype in FLOATS:
        return codes.view(FLOATS[form.dtype]).astype(np.float64)
    if not form.symmetric:
        return codes.astype(np.float64)
    half = 128 if form.dtype == "int8" else 8
    return ((codes.astype(np.int64) ^ half) - half).astype(np.float64)


def expanded(form: Format, of_blocks: Array, shape: tuple[int, ...]) -> Array:
    """One value for each element, of one for each block."""
    wide = np.zeros(shape, np.float64)
    for place, elements in blocks(form, shape):
        wide[elements] = of_blocks[place]
    return wide


def dequantize(form: Format, quantized: Quantized, dtype: Any = np.float32) -> Array:
    """The numbers: one rounding to float32, and then one to `dtype`."""
    shape = quantized.codes.shape
    numbers = numbers_of(form, quantized.codes)
    if quantized.zero_points is not None:
        numbers = numbers - expanded(form, quantized.zero_points.astype(np.float64), shape)
    scales = expanded(form, scale_values(form, quantized.scales), shape)
    return (numbers * scales).astype(np.float32).astype(dtype)
