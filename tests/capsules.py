"""DLPack capsules made by hand, for fields that no array library would ever fill in like that."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class DlpackObject:
    """A compact float32 tensor of ones that speaks DLPack, except for the fields given.

    Parameters
    ----------
    shape
        Of the tensor; None as `shape_pointer` is spelled ``shape=None`` among the changes.
    changes
        Fields of DLTensor by name; `size` and `stride` replace those of the second axis.
    """

    def __init__(self, dims: tuple[int, ...], **changes: Any) -> None:
        self.memory = np.ones(dims, np.float32)
        sizes = list(dims)
        strides = [step // 4 for step in self.memory.strides]
        sizes[1] = changes.pop("size", sizes[1])
        strides[1] = changes.pop("stride", strides[1])
        # Longer than needed, so that a wrong `ndim` reads numbers of ours.
        self._sizes = (ctypes.c_int64 * 64)(*sizes, *[1] * 60)
        self._strides = (ctypes.c_int64 * 64)(*strides, *[1] * 60)
        fields = {
            "data": self.memory.ctypes.data,
            "device_type": 1,
            "ndim": len(dims),
            "code": 2,
            "bits": 32,
            "lanes": 1,
            "shape": self._sizes,
            "strides": self._strides,
        }
        self._managed = _DLManagedTensor(_DLTensor(**(fields | changes)), None, None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.memory.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._managed.tensor.device_type, self._managed.tensor.device_id

    def __dlpack__(self, **_: Any) -> Any:
        # No deleter: the memory belongs to this object, which outlives the call.
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)
