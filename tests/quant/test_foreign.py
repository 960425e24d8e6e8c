"""Formats of other libraries, read from the bytes that those libraries make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries
from tests.array_libraries import Array, Framework
from tests.cases import normal

pytestmark = pytest.mark.cpu_only

SHAPE = (2, 3, 5, 128)  # batch, heads, tokens, channels


def affine(data: Array, scales: Array, biases: Array, bits: int) -> Array:
    """MLX's definition, in float64: code * scale + bias, the lowest bits first."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * bits
    codes = (data[..., None] >> shifts & (2**bits - 1)).reshape(*data.shape[:-1], -1)
    group = codes.shape[-1] // scales.shape[-1]
    wide = [np.repeat(x.astype(np.float64), group, -1) for x in (scales, biases)]
    return codes * wide[0] + wide[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_affine_groups(bits: int, group: int, dtype: str) -> None:
    mlx = array_libraries.load("mlx")
    x = mlx.tensor(normal(SHAPE, dtype, seed=1))
    data, scales, biases = mlx.module.quantize(x, group_size=group, bits=bits)
    found = umfa.QuantizedTensor.from_mlx(data, scales, biases, group_size=group, bits=bits)
    assert found.shape == SHAPE
    assert (found.dtype, found.granularity, found.block) == (f"int{bits}", "block", (1, group))
    assert not found.symmetric
    assert found.zero_points is None
    assert found.biases is biases
    assert found.nbytes == data.nbytes + scales.nbytes + biases.nbytes
    out = found.dequantize()
    assert isinstance(out, mlx.array_type)
    exact = affine(*(mlx.numpy(part) for part in (data, scales, biases)), bits)
    np.testing.assert_array_equal(mlx.numpy(out), exact.astype(np.float32))
    theirs = mlx.module.dequantize(data, scales, biases, group_size=group, bits=bits)
    # MLX rounds the product and the sum to the dtype of the scales.
    tolerance = {"float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(mlx.numpy(out), mlx.float64(theirs), atol=tolerance)


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"], indirect=True)
def test_mlx_bits_in_another_framework(framework: Framework) -> None:
    mlx = array_libraries.load("mlx")
    parts = mlx.module.quantize(mlx.tensor(normal(SHAPE, seed=2)), group_size=32, bits=4)
    data, scales, biases = (np.array(part) for part in parts)
    ours = [framework.tensor(part) for part in (data, scales, biases)]
    found = umfa.QuantizedTensor.from_mlx(*ours, group_size=32)
    exact = affine(data, scales, biases, 4).astype(np.float32)
    np.testing.assert_array_equal(framework.numpy(found.dequantize()), exact)


def gguf_bytes(kind: str, seed: int) -> tuple[Any, Array, Array]:
    """(the type, bytes, numbers) as the gguf package makes and reads them."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    type_ = getattr(gguf.GGMLQuantizationType, kind)
    x = normal(SHAPE, seed=seed)
    x[0, 0, 0, :64] = 0
    x[0, 0, 1, :32] *= 1e-6  # its scale is a subnormal float16
    data = gguf.quants.quantize(x, type_)
    return type_, data, gguf.quants.dequantize(data, type_)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_gguf_blocks(kind: str, bits: int, framework: Framework) -> None:
    _, data, theirs = gguf_bytes(kind, seed=3)
    found = umfa.QuantizedTensor.from_gguf(framework.tensor(data), kind.lower())
    assert found.shape == SHAPE
    assert found.scales is None
    assert found.nbytes == data.nbytes == 2 * 3 * 5 * 4 * (2 + 4 * bits)
    out = found.dequantize()
    assert isinstance(out, framework.array_type)
    np.testing.assert_array_equal(framework.numpy(out), theirs)


def test_gguf_rows_between_other_bytes() -> None:
    _, data, theirs = gguf_bytes("Q4_0", seed=4)
    spread = np.full((2, 3, 9, data.shape[-1] + 7), 255, np.uint8)
    spread[:, :, ::2, : data.shape[-1]] = data
    rows = spread[:, :, ::2, : data.shape[-1]]
    np.testing.assert_array_equal(umfa.QuantizedTensor.from_gguf(rows, "q4_0").dequantize(), theirs)


def test_refusals() -> None:
    bytes_ = np.zeros((1, 1, 2, 34), np.uint8)
    words, ones = np.zeros((1, 1, 2, 8), np.uint32), np.ones((1, 1, 2, 1), np.float16)
    tensor = umfa.QuantizedTensor
    with pytest.raises(ValueError, match="not made of q4_0 blocks; got 34; expected a multiple of"):
        tensor.from_gguf(bytes_, "q4_0")
    with pytest.raises(ValueError, match=r"dtype is not of GGUF; got int8; expected 'q8_0' or"):
        tensor.from_gguf(bytes_, "int8")
    with pytest.raises(ValueError, match="dtype is unknown; got 'q5_0'; expected 'int8' or"):
        tensor.from_gguf(bytes_, "q5_0")
    with pytest.raises(umfa.UnsupportedError, match="bits do not fit; got 3; expected 4 or 8"):
        tensor.from_mlx(words, ones, ones, bits=3)
    with pytest.raises(umfa.UnsupportedError, match=r"block does not fit MLX's affine groups; got"):
        tensor.from_mlx(words, ones, ones, group_size=16)
    with pytest.raises(ValueError, match=r"scales of data has the wrong shape; got \(1, 1, 2, 1\)"):
        tensor.from_mlx(words, ones, ones, group_size=32)
    with pytest.raises(ValueError, match="biases of data are missing; got None; expected a tensor"):
        tensor.from_mlx(words, ones, None)
    with pytest.raises(TypeError, match="data has the wrong dtype; got int32; expected uint32 or"):
        tensor.from_mlx(words.view(np.int32), ones, ones)
    with pytest.raises(
        TypeError, match="biases of data has the wrong dtype; got float32; expected"
    ):
        tensor.from_mlx(words, ones, ones.astype(np.float32))
    for dtype in ("q8_0", "q4_0"):
        with pytest.raises(umfa.UnsupportedError, match="reads this format and does not write it"):
            umfa.quantize(np.zeros((1, 1, 1, 32), np.float32), dtype)
