"""Work recorded in a command buffer of the caller's, through the C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import checks, reference
from tests.capsules import _DLTensor
from tests.metal.metal_tensors import MetalTensor
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

OK, VALUE_ERROR, UNSUPPORTED = 0, 1, 3
COMPLETED, NOT_ENQUEUED = 4, 0

Array = np.ndarray[Any, np.dtype[Any]]


def c_library() -> ctypes.CDLL:
    found = ctypes.CDLL(umfa.get_library())
    found.umfa_last_error.restype = ctypes.c_char_p
    found.umfa_attention_forward_encode.argtypes = [ctypes.c_void_p] * 7
    return found


@pytest.fixture
def library() -> ctypes.CDLL:
    return c_library()


class Commands:
    """A caller's command buffer."""

    def __init__(self, double: Double) -> None:
        self.api = double.library
        self.queue = self.api.umfa_double_new_queue()
        self.handle = self.api.umfa_double_new_command_buffer(self.queue)

    def run(self) -> int:
        self.api.umfa_double_commit(self.handle)
        return self.api.umfa_double_wait(self.handle)

    def close(self) -> None:
        self.api.umfa_double_object_release(self.handle)
        self.api.umfa_double_object_release(self.queue)


@pytest.fixture
def commands(double: Double) -> Iterator[Commands]:
    made = Commands(double)
    yield made
    made.close()


def host_tensor(array: Array) -> Any:
    """A DLTensor of a float32 numpy array."""
    tensor = _DLTensor(
        data=array.ctypes.data,
        device_type=1,
        ndim=array.ndim,
        code=2,
        bits=32,
        lanes=1,
        shape=(ctypes.c_int64 * array.ndim)(*array.shape),
        strides=(ctypes.c_int64 * array.ndim)(*(s // 4 for s in array.strides)),
    )
    tensor.owner = array
    return tensor


def encode(library: ctypes.CDLL, commands: Any, *tensors: Any, options: Any = None) -> int:
    handles = [
        ctypes.addressof(t._managed.tensor if isinstance(t, MetalTensor) else t) for t in tensors
    ]
    return library.umfa_attention_forward_encode(commands, *handles, None, options)


def test_recorded_then_run_by_the_caller(emulated: Double, library: ctypes.CDLL) -> None:
    commands = Commands(emulated)
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((1, 33, 2, 32), np.float32) for _ in range(3)]
    q, k, v = (MetalTensor(emulated, array, 16) for array in arrays)
    middle, out = (MetalTensor(emulated, np.zeros((1, 33, 2, 32), np.float32)) for _ in range(2))
    before = umfa.stats()
    # Two in one command buffer: the second reads what the first wrote.
    assert encode(library, commands.handle, q, k, v, middle) == OK, library.umfa_last_error()
    assert encode(library, commands.handle, middle, k, v, out) == OK
    assert emulated.library.umfa_double_status(commands.handle) == NOT_ENQUEUED
    assert commands.run() == COMPLETED
    expected = reference.attention(*arrays)[0].astype(np.float32)
    expected = reference.attention(expected, *arrays[1:])[0]
    found = np.frombuffer(ctypes.string_at(out.address, 4 * 33 * 64), np.float32)
    checks.assert_close(
        found.reshape(1, 33, 2, 32).astype(np.float64), expected, checks.BASE["float32"]
    )
    after = umfa.stats()
    assert after.metal_calls - before.metal_calls == 2
    assert after.command_buffers == before.command_buffers, "the caller's, not umfa's"
    commands.close()


def test_host_memory_is_mapped(
    double: Double, recorder: Recorder, commands: Commands, library: ctypes.CDLL
) -> None:
    arrays = [np.zeros((1, 20, 2, 16), np.float32) for _ in range(4)]
    assert encode(library, commands.handle, *map(host_tensor, arrays)) == OK
    assert commands.run() == COMPLETED
    assert [recorder.addresses()[i] for i in range(4)] == [a.ctypes.data for a in arrays]


def test_memory_that_needs_a_copy_is_refused(
    double: Double, recorder: Recorder, commands: Commands, library: ctypes.CDLL
) -> None:
    arrays = [np.zeros((1, 20, 2, 16), np.float32) for _ in range(4)]
    double.fault("no_copy", count=100)
    assert encode(library, commands.handle, *map(host_tensor, arrays)) == UNSUPPORTED
    assert b"a copy would have to be waited for" in library.umfa_last_error()
    assert commands.run() == COMPLETED, "nothing was left half encoded"
    assert not recorder.dispatches


def test_a_committed_command_buffer_is_refused(
    double: Double, recorder: Recorder, commands: Commands, library: ctypes.CDLL
) -> None:
    commands.run()
    arrays = [np.zeros((1, 20, 2, 16), np.float32) for _ in range(4)]
    assert encode(library, commands.handle, *map(host_tensor, arrays)) == VALUE_ERROR
    assert b"already committed" in library.umfa_last_error()


def test_no_command_buffer(double: Double, library: ctypes.CDLL) -> None:
    arrays = [np.zeros((1, 20, 2, 16), np.float32) for _ in range(4)]
    assert encode(library, None, *map(host_tensor, arrays)) == VALUE_ERROR
    assert library.umfa_last_error() == (
        b"[umfa_attention_forward_encode] metal_command_buffer is missing; got NULL; "
        b"expected an id<MTLCommandBuffer> that is not committed"
    )


def test_without_metal(library: ctypes.CDLL) -> None:
    arrays = [np.zeros((1, 20, 2, 16), np.float32) for _ in range(4)]
    assert encode(library, 16, *map(host_tensor, arrays)) == UNSUPPORTED
    assert b"metal: " in library.umfa_last_error()
