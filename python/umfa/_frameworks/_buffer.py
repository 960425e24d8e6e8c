"""Objects with Python's buffer protocol (PEP 3118): memoryview, array.array, ctypes, mmap, ...

They are only read, as NumPy arrays on their memory.
"""

from __future__ import annotations

import re
import reprlib
import struct
import sys
from typing import Any

import numpy as np

from .._errors import message

_FOREIGN = "<" if sys.byteorder == "big" else ">!"
_STANDARD = "?bBhHiIlLqQefd"  # these have a size of their own after '<', '=', ...
_NUMBER = re.compile(f"([@=<>!^|]?)([{_STANDARD}nNg]|Z[fdg])")
_EXPECTED = "a buffer of one native number format, as 'f' (float32), 'e' (float16), '?' or 'i'"


def is_buffer(value: Any) -> bool:
    """Whether `value` has the buffer protocol; NumPy's scalars do, but stand for numbers."""
    if isinstance(value, np.generic):
        return False
    try:
        memoryview(value).release()
    except TypeError:
        return False
    except (BufferError, RuntimeError, ValueError):
        pass  # a buffer that is closed, say: as_array gives the reason
    return True


def as_array(value: Any, function: str, argument: str) -> np.ndarray[Any, Any]:
    """A read-only array on the memory of `value`, which stays locked while the array lives."""
    try:
        view = memoryview(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            message(
                function,
                f"{argument} cannot be read",
                error,
                "a buffer that is not released or closed",
            )
        ) from error
    _check_format(view, value, function, argument)
    if view.suboffsets:
        raise ValueError(
            message(
                function,
                f"{argument} has suboffsets",
                f"suboffsets {view.suboffsets}",
                "a buffer of one block of memory; make a copy",
            )
        )
    try:
        return np.asarray(view.toreadonly())
    except (BufferError, RuntimeError, ValueError) as error:  # too many dimensions, say
        raise ValueError(
            message(function, f"{argument} cannot become a NumPy array", error, _EXPECTED)
        ) from error


def _sizes(kind: str) -> set[int]:
    """The sizes that a format has: ctypes writes '<l' for what has the native size."""
    native = np.dtype({"Zf": "F", "Zd": "D", "Zg": "G"}.get(kind, kind)).itemsize
    return {native, struct.calcsize(f"={kind}") if kind in _STANDARD else native}


def _check_format(view: memoryview, value: Any, function: str, argument: str) -> None:
    text = view.format
    number = _NUMBER.fullmatch(text)
    if number is None or view.itemsize not in _sizes(number[2]):
        raise TypeError(
            message(
                function,
                f"{argument} does not hold numbers",
                f"{reprlib.repr(text)} of {view.itemsize} bytes",
                _EXPECTED,
            )
        )
    if number[1] and number[1] in _FOREIGN and view.itemsize > 1:
        raise TypeError(
            message(function, f"{argument} is not in native byte order", repr(text), _EXPECTED)
        )
    if number[2] == "B" and view.ndim == 1:
        raise TypeError(
            message(
                function,
                f"{argument} is a buffer of plain bytes",
                f"{view.nbytes} bytes of {type(value).__name__}",
                f"one with a format and a shape, as memoryview({argument}).cast(format, shape)",
            )
        )
