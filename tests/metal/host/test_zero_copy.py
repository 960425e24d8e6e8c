"""Tensors reach the kernel where they are, whoever owns them and wherever they begin."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests import checks, reference
from tests.metal.metal_tensors import MetalTensor, to_numpy
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

OFFSETS = [0, 2, 4, 6, 8, 14, 16, 62, 64, 250, 4094, 4096, 4098]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
QUERY, KEY, VALUE, OUT, LSE, SLOPES = 0, 1, 2, 3, 4, 6


def placed(shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> np.ndarray[Any, Any]:
    """A numpy array that begins `offset` bytes after the start of a page."""
    size = int(np.prod(shape)) * dtype.itemsize
    block = np.zeros(size + offset + 8192, np.uint8)
    start = -block.ctypes.data % 4096 + offset
    return block[start : start + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_numpy_at_any_offset(
    dtype: np.dtype[Any], offset: int, double: Double, recorder: Recorder
) -> None:
    if offset % dtype.itemsize:
        pytest.skip("no element can begin there")
    q, k, v = (placed((1, 20, 2, 16), dtype, offset + 64 * i) for i in range(3))
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, return_attn_probs=True, backend="metal")
    after = umfa.stats()
    found = recorder.addresses()
    expected = {QUERY: q, KEY: k, VALUE: v, OUT: out, LSE: lse}
    assert found == {index: array.ctypes.data for index, array in expected.items()}
    assert after.tensors_in_place - before.tensors_in_place == 5
    assert after.tensors_copied == before.tensors_copied
    assert after.bytes_copied == before.bytes_copied


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("elements", [0, 1, 7, 511, 2049])
def test_torch_on_the_cpu(elements: int, dtype: str, double: Double, recorder: Recorder) -> None:
    torch = pytest.importorskip("torch")
    block = torch.randn(3 * 640 + elements).to(getattr(torch, dtype))
    q, k, v = (block[elements + 640 * i :][:640].view(1, 20, 2, 16) for i in range(3))
    before = umfa.stats()
    out = umfa.flash_attn_func(q, k, v, backend="metal")
    found = recorder.addresses()
    assert found == {
        index: tensor.data_ptr() for index, tensor in {0: q, 1: k, 2: v, 3: out}.items()
    }
    assert umfa.stats().tensors_in_place - before.tensors_in_place == 4
    assert umfa.stats().tensors_copied == before.tensors_copied


@pytest.mark.parametrize("offset", OFFSETS)
def test_metal_tensors_at_any_offset(offset: int, double: Double, recorder: Recorder) -> None:
    if offset % 4:
        pytest.skip("no element can begin there")
    array = np.zeros((1, 20, 2, 16), np.float32)
    q, k, v = (MetalTensor(double, array, offset + 4 * i) for i in range(3))
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, return_attn_probs=True)  # Metal's: no other choice
    found = recorder.addresses()
    assert [found[i] for i in (QUERY, KEY, VALUE)] == [q.address, k.address, v.address]
    assert umfa.stats().tensors_in_place - before.tensors_in_place == 5
    assert umfa.stats().tensors_copied == before.tensors_copied
    assert out.__dlpack_device__() == lse.__dlpack_device__() == (8, 0)
    assert to_numpy(double, out).shape == (1, 20, 2, 16)
    assert to_numpy(double, lse).shape == (1, 2, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_metal_tensors_in_and_out(dtype: np.dtype[Any], emulated: Double) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 33, 2, 32), np.float32).astype(dtype) for _ in range(3)]
    tensors = [MetalTensor(emulated, array, 48) for array in arrays]
    out, lse, _ = umfa.flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    expected_out, expected_lse = reference.attention(*arrays, causal=True)
    found = to_numpy(emulated, out).astype(np.float64)
    checks.assert_close(found, expected_out, checks.BASE[dtype.name])
    checks.assert_close(to_numpy(emulated, lse).astype(np.float64), expected_lse, checks.LSE)


def test_slices_of_one_tensor_share_a_buffer(double: Double, recorder: Recorder) -> None:
    """No memory is in two Metal buffers: hazards between them would not be tracked."""
    qkv = np.zeros((1, 50, 3, 2, 64), np.float32)
    out = umfa.flash_attn_qkvpacked_func(qkv, backend="metal")
    buffers = recorder.dispatches[-1].buffers
    spans = {(b.data, b.data + b.length) for b in buffers.values() if not b.is_bytes}
    for a in spans:
        for b in spans:
            assert a == b or a[1] <= b[0] or b[1] <= a[0]
    assert buffers[QUERY].data == buffers[KEY].data == buffers[VALUE].data
    assert [recorder.addresses()[i] - qkv.ctypes.data for i in (0, 1, 2)] == [0, 512, 1024]
    assert recorder.addresses()[OUT] == out.ctypes.data


def test_a_fused_projection_is_read_and_written_in_place(
    double: Double, recorder: Recorder
) -> None:
    """FLUX's single blocks: query, key and value lie beside the MLP's channels, and so does out."""
    inner, mlp = 2 * 16, 96
    projected = np.zeros((1, 20, 3 * inner + mlp), np.float32)
    joined = np.zeros((1, 20, inner + mlp), np.float32)
    parts = [projected[..., i * inner : (i + 1) * inner].reshape(1, 20, 2, 16) for i in range(3)]
    out = joined[..., :inner].reshape(1, 20, 2, 16)
    before = umfa.stats()
    assert umfa.flash_attn_func(*parts, out=out, backend="metal") is out
    after = umfa.stats()
    found = recorder.addresses()
    assert [found[i] - projected.ctypes.data for i in (QUERY, KEY, VALUE)] == [0, 128, 256]
    assert found[OUT] == joined.ctypes.data
    assert after.tensors_in_place - before.tensors_in_place == 4
    assert after.tensors_copied == before.tensors_copied


def test_negative_strides_begin_at_their_first_element(double: Double, recorder: Recorder) -> None:
    q = np.zeros((1, 2000, 2, 16), np.float32)[:, ::-1]
    umfa.flash_attn_func(q, q, q, backend="metal")
    bound = recorder.dispatches[-1].buffers[QUERY]
    assert bound.data + bound.offset == q.ctypes.data
    assert bound.data <= q.base.ctypes.data
    assert bound.data + bound.length >= q.ctypes.data + 2 * 16 * 4


@pytest.mark.parametrize("strided", [False, True])
def test_what_cannot_be_mapped_is_copied_and_counted(strided: bool, emulated: Double) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 40, 4, 32), np.float32) for _ in range(3))
    if strided:
        q, k, v = (x[:, ::-2, 1:] for x in (q, k, v))
    emulated.fault("no_copy", count=100)
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, return_attn_probs=True, backend="metal")
    after = umfa.stats()
    expected_out, expected_lse = reference.attention(q, k, v)
    checks.assert_close(out.astype(np.float64), expected_out, checks.BASE["float32"])
    checks.assert_close(lse.astype(np.float64), expected_lse, checks.LSE)
    assert after.tensors_copied - before.tensors_copied == 5
    assert after.tensors_in_place == before.tensors_in_place
    assert after.bytes_copied - before.bytes_copied >= 4 * out.nbytes


def test_a_view_that_leaves_its_buffer_is_refused(double: Double, recorder: Recorder) -> None:
    array = np.zeros((1, 20, 2, 16), np.float32)
    q, k = MetalTensor(double, array), MetalTensor(double, array)
    k._managed.tensor.byte_offset = 4
    with pytest.raises(ValueError, match="reaches outside its Metal buffer; got bytes 4 to 2564"):
        umfa.flash_attn_func(q, k, k)
    assert not recorder.dispatches


def test_tensors_without_elements_need_no_memory(double: Double, recorder: Recorder) -> None:
    q, k = np.zeros((1, 5, 2, 16), np.float32), np.zeros((1, 0, 2, 16), np.float32)
    umfa.flash_attn_func(q, k, k, backend="metal")
    assert recorder.dispatches
    umfa.flash_attn_func(k, q, q, backend="metal")
    assert len(recorder.dispatches) == 1, "no query, nothing to do"
