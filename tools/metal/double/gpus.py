"""What the double of Metal computes with: the emulator, or NumPy where kernels do not matter."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from tools.metal.double import Bound, Gpu, Kernel
from tools.metal.emulator import Library, Options

Array = np.ndarray[Any, np.dtype[Any]]


def memory(bound: Bound) -> Array:
    """The bytes of a buffer, in place."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * bound.length).from_address(bound.data))


@functools.lru_cache(maxsize=256)
def _library(
    source: str,
    constants: tuple[tuple[int, bool | int], ...],
    options: Options,
) -> Library:
    return Library(source, constants=dict(constants), options=options)


class Emulator(Gpu):
    """Runs the Metal text that umfa hands to Metal, kernel by kernel."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()

    def _find(self, kernel: Kernel) -> Library:
        library = _library(
            kernel.source,
            tuple(sorted(kernel.constants.items())),
            self.options,
        )
        if kernel.name not in library.kernels:
            raise LookupError(f"no kernel {kernel.name}; there are {library.kernels}")
        return library

    def prepare(self, kernel: Kernel) -> int:
        return self._find(kernel).static_threadgroup_bytes(kernel.name)

    def run(self, kernel: Kernel) -> None:
        # The emulator writes whole buffers back, and one that maps host memory holds the heap's
        # other objects too: it gets copies, and only bytes that it has changed go home.
        before = {index: memory(bound).copy() for index, bound in kernel.buffers.items()}
        after = {index: array.copy() for index, array in before.items()}
        self._find(kernel).dispatch(
            kernel.name,
            threadgroups=kernel.threadgroups,
            threads=kernel.threads,
            buffers={
                index: after[index].tobytes() if bound.is_bytes else after[index]
                for index, bound in kernel.buffers.items()
            },
            buffer_offsets={
                index: bound.offset for index, bound in kernel.buffers.items() if not bound.is_bytes
            },
        )
        for index, bound in kernel.buffers.items():
            changed = np.flatnonzero(after[index] != before[index])
            if changed.size:
                memory(bound)[changed] = after[index][changed]


class Recorder(Gpu):
    """Computes nothing: remembers what it was asked to, and fills what it is told to."""

    def __init__(self) -> None:
        self.prepared: list[Kernel] = []
        self.dispatches: list[Kernel] = []

    def prepare(self, kernel: Kernel) -> int:
        self.prepared.append(kernel)
        return 8192

    def run(self, kernel: Kernel) -> None:
        self.dispatches.append(kernel)

    def addresses(self) -> dict[int, int]:
        """Where each buffer of the last dispatch began, by index."""
        return {
            index: bound.data + bound.offset
            for index, bound in self.dispatches[-1].buffers.items()
            if not bound.is_bytes
        }
