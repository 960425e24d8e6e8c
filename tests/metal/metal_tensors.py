"""Tensors in MTLBuffers of the double, as torch on MPS and mlx on a Mac show them: by DLPack."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from tests.capsules import _DLManagedTensor, _DLTensor, _new_capsule
from tools.metal.double import Double

Array = np.ndarray[Any, np.dtype[Any]]
METAL = 8
_CODES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int8": (0, 8),
    "uint8": (1, 8),
}
_DTYPES = {
    (2, 32): np.dtype(np.float32),
    (2, 16): np.dtype(np.float16),
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (0, 8): np.dtype(np.int8),
    (1, 8): np.dtype(np.uint8),
}

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class MetalTensor:
    """A copy of an array in a Metal buffer of its own, `byte_offset` bytes after its start.

    The buffer ends with the last element, so that nothing beyond may be touched. `device`: the
    number of the machine's GPU that has it.
    """

    def __init__(self, double: Double, array: Array, byte_offset: int = 0, device: int = 0) -> None:
        self.double = double
        self.shape = array.shape
        self.buffer = double.library.umfa_double_new_buffer_on(
            device, byte_offset + max(array.nbytes, 1)
        )
        contents = double.library.umfa_double_buffer_contents(self.buffer)
        self.address = contents + byte_offset
        if array.size:
            ctypes.memmove(self.address, np.ascontiguousarray(array).tobytes(), array.nbytes)
        sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
        code, bits = _CODES[array.dtype.name]
        self._managed = _DLManagedTensor(
            _DLTensor(
                data=self.buffer,
                device_type=METAL,
                ndim=array.ndim,
                code=code,
                bits=bits,
                lanes=1,
                shape=sizes,
                byte_offset=byte_offset,
            ),
            None,
            None,
        )
        self._keep = sizes

    def __del__(self) -> None:
        self.double.library.umfa_double_object_release(self.buffer)

    def __dlpack_device__(self) -> tuple[int, int]:
        return METAL, 0

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


def to_numpy(double: Double, tensor: Any) -> Array:
    """A copy of what a DLPack object on Metal holds."""
    capsule = tensor.__dlpack__()
    managed = _DLManagedTensor.from_address(_get_pointer(capsule, b"dltensor"))
    t = managed.tensor
    assert t.device_type == METAL
    shape = [t.shape[i] for i in range(t.ndim)]
    dtype = _DTYPES[t.code, t.bits]
    start = double.library.umfa_double_buffer_contents(t.data) + t.byte_offset
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(ctypes.string_at(start, size), dtype).reshape(shape)
