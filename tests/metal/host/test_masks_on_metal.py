"""Dense masks and batch dimensions on the Metal host: everything is read where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests.metal.metal_tensors import MetalTensor
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

MASK, PARAMS = 5, 22


def bind(mask: np.ndarray[Any, Any], recorder: Recorder, shape: tuple[int, ...]) -> int:
    """Bytes that a call copies; the kernel gets the address of the mask's first element."""
    x = np.zeros(shape, np.float16)
    before = umfa.stats()
    umfa.scaled_dot_product_attention(x, x, x, mask, backend="metal")
    after = umfa.stats()
    assert recorder.addresses()[MASK] == mask.ctypes.data
    # What the kernel is given are the tensors and its parameters, and no scratch.
    assert set(recorder.dispatches[-1].buffers) == {0, 1, 2, 3, MASK, PARAMS}
    assert after.tensors_in_place - before.tensors_in_place == 5
    assert after.tensors_copied == before.tensors_copied
    return after.bytes_copied - before.bytes_copied


@pytest.mark.parametrize("dtype", [np.bool_, np.float32, np.float16])
def test_key_padding_at_the_size_of_flux(dtype: Any, double: Double, recorder: Recorder) -> None:
    """(B, 1, 1, Skv) at 1024x1024 pixels: nothing of the size of the scores exists anywhere."""
    mask = np.zeros((2, 1, 1, 4608), dtype)
    assert bind(mask, recorder, (2, 24, 4608, 128)) == 0


def test_an_expanded_mask_is_bound_as_what_it_holds(double: Double, recorder: Recorder) -> None:
    mask = np.broadcast_to(np.zeros((2, 1, 1, 4608), np.float32), (2, 24, 4608, 4608))
    assert bind(mask, recorder, (2, 24, 4608, 128)) == 0
    bound = recorder.dispatches[-1].buffers[MASK]
    assert bound.length <= 2 * 4608 * 4 + 2 * 16384  # by whole pages


@pytest.mark.parametrize("expanded", [False, True])
def test_a_mask_that_cannot_be_mapped_is_copied_as_it_is(
    expanded: bool, double: Double, recorder: Recorder
) -> None:
    x = np.zeros((2, 4, 3000, 64), np.float32)
    mask = np.zeros((2, 1, 1, 3000), np.float32)
    double.fault("no_copy", count=100)
    before = umfa.stats()
    given = np.broadcast_to(mask, (2, 4, 3000, 3000)) if expanded else mask
    umfa.scaled_dot_product_attention(x, x, x, given, backend="metal")
    after = umfa.stats()
    assert after.bytes_copied - before.bytes_copied <= 4 * x.nbytes + mask.nbytes


def test_batch_dimensions_are_one_where_strides_allow(double: Double, recorder: Recorder) -> None:
    x = np.zeros((3, 2, 4, 20, 16), np.float32)
    mask = np.zeros((3, 2, 1, 1, 20), np.float32)
    umfa.scaled_dot_product_attention(x, x, x, mask, backend="metal")
    assert len(recorder.dispatches) == 1
    assert recorder.dispatches[-1].threadgroups[2] == 6


def test_batch_dimensions_that_strides_part_are_dispatched_apart(
    double: Double, recorder: Recorder
) -> None:
    x = np.zeros((3, 2, 4, 20, 16), np.float32)
    y = np.zeros((2, 3, 4, 20, 16), np.float32).swapaxes(0, 1)
    before = umfa.stats()
    umfa.scaled_dot_product_attention(x, y, x, backend="metal")
    after = umfa.stats()
    assert len(recorder.dispatches) == 2  # the longer dimension is the batch
    assert {d.threadgroups[2] for d in recorder.dispatches} == {3}
    assert after.metal_calls - before.metal_calls == 1


def test_torch_shapes_on_metal_memory(double: Double, recorder: Recorder) -> None:
    q = MetalTensor(double, np.zeros((3, 2, 4, 20, 16), np.float32), 64)
    k = MetalTensor(double, np.zeros((2, 4, 30, 16), np.float32), 128)
    mask = MetalTensor(double, np.zeros((2, 1, 1, 30), np.float32), 4)
    umfa.scaled_dot_product_attention(q, k, k, mask)
    found = recorder.dispatches
    assert len(found) == 2
    starts = [[d.buffers[i].data + d.buffers[i].offset for i in (0, 1, MASK)] for d in found]
    assert starts[0] == [q.address, k.address, mask.address]
    steps = [b - a for a, b in zip(*starts, strict=True)]
    assert steps == [4 * 4 * 20 * 16, 4 * 4 * 30 * 16, 4 * 30]
