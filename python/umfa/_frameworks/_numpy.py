"""numpy arrays; bfloat16 through ml_dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import _ext
from .._errors import UnsupportedError, message

_EXPECTED = "float32, float16 or ml_dtypes.bfloat16"
# numpy keeps one object of each.
_FLOAT32, _FLOAT16, _BOOL = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.bool_)

_ext.plain_numpy(np.zeros((3, 5), _FLOAT16)[1:, ::2], np.empty, _FLOAT32, _FLOAT16)


def export(tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
    dtype = tensor.dtype
    # The common case first: what follows takes 5 us, more than all the rest of a call.
    known = dtype is _FLOAT32 or dtype is _FLOAT16 or dtype is _BOOL
    plain = known and type(tensor) is np.ndarray
    if plain and tensor.flags.c_contiguous:
        return tensor
    expected = {"alibi_slopes": "float32", "attn_mask": f"bool, {_EXPECTED}"}.get(
        argument, _EXPECTED
    )
    _check_not_masked(tensor, function, argument)
    if not dtype.isnative:
        raise TypeError(
            message(function, f"{argument} is not in native byte order", dtype.str, expected)
        )
    # Types registered by ml_dtypes refuse DLPack; their kind is 'V', or 'f' for some.
    if dtype.name == "bfloat16":
        return _ext.as_bfloat16(tensor.view(np.uint16), tensor)
    if dtype.name.startswith(("float8_", "float6_", "float4_")):
        raise UnsupportedError(
            message(function, f"{argument} has the wrong dtype", dtype.name, expected)
        )
    if dtype.kind not in "fiubc" or dtype.itemsize > 16:
        raise TypeError(message(function, f"{argument} has the wrong dtype", dtype, expected))
    if dtype.kind == "f" and dtype.itemsize == 16:  # longdouble has no DLPack code
        raise UnsupportedError(
            message(function, f"{argument} has the wrong dtype", dtype, expected)
        )
    if any(stride % dtype.itemsize for stride in tensor.strides):
        raise ValueError(
            message(
                function,
                f"{argument} has strides that are no multiple of its element size",
                f"strides {tensor.strides} in bytes of {dtype}",
                "an array of whole elements; make a copy",
            )
        )
    return tensor


def _check_not_masked(tensor: Any, function: str, argument: str) -> None:
    if isinstance(tensor, np.ma.MaskedArray):
        raise TypeError(
            message(
                function,
                f"{argument} is a masked array, whose mask would be ignored",
                "numpy.ma.MaskedArray",
                "a plain array",
            )
        )


def allocate(
    like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
) -> tuple[Any, Any]:
    if dtype == "float32":
        array = np.empty(shape, _FLOAT32)
        return array, array
    array = np.empty(shape, like.dtype if dtype == like.dtype.name else dtype)
    return export(array, "umfa", "out"), array


def finish(handle: Any) -> Any:
    return handle


call = None
recorded = None


def to_host(tensor: Any, function: str, argument: str) -> Any:
    _check_not_masked(tensor, function, argument)
    native = tensor.dtype.newbyteorder("=")
    return np.asarray(tensor, dtype=native, order="C")


def check_writable(tensor: Any, function: str, argument: str) -> None:
    _check_not_masked(tensor, function, argument)
    if not tensor.flags.writeable:
        raise ValueError(
            message(function, f"{argument} is read-only", "flags.writeable False", "a copy")
        )


autodiff = None

autocast = None

in_stream = None
reads_later = None


def draw_seed() -> int:
    # The generator that numpy.random.seed sets; there is no other one that all share.
    return int(np.random.randint(0, 2**63, dtype=np.uint64))


def trains(tensors: Iterable[Any]) -> bool:
    return False


stand_ins = None


def mark_written(tensor: Any) -> None:
    """Nothing to be told."""
