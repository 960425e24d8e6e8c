"""A case on the GPU: its buffers, its kernels, its launches. The only module that needs CuPy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from .cases import Case
from .inputs import Array, poison
from .placement import placements, written

# Every buffer its own cudaMalloc, so that memcheck knows where each ends.
cupy.cuda.set_allocator(None)


def upload(data: Array) -> Any:
    """A buffer with the bytes of `data`, and no byte more."""
    memory = cupy.cuda.alloc(max(data.nbytes, 1))
    contiguous = np.ascontiguousarray(data)
    memory.copy_from_host(contiguous.ctypes.data, contiguous.nbytes)
    return memory


def download(memory: Any, like: Array) -> Array:
    result = np.empty_like(like)
    memory.copy_to_host(result.ctypes.data, result.nbytes)
    return result


@functools.cache
def kernel(folder: Path, file: str, symbol: str) -> Any:
    return cupy.RawModule(path=str(folder / file)).get_function(symbol)


def code_of(launch: dict[str, Any]) -> str:
    """Machine code where it was made for this GPU, else PTX, which the driver compiles."""
    fits = cupy.cuda.Device().compute_capability == "90" and "cubin" in launch
    return str(launch["cubin" if fits else "ptx"])


class Prepared:
    """A case with its buffers in place, ready to be launched again and again."""

    def __init__(
        self,
        folder: Path,
        described: dict[str, Any],
        inputs: dict[str, Any],
        poisoned: bool = True,
    ) -> None:
        """`inputs` are memory of the GPU. Outputs hold NaN at first: they may have gaps between
        their rows, and every element must be written. Not `poisoned`: scratch stays uninitialised,
        for initcheck to see it read."""
        self.case = Case.read(described["case"])
        self.places = placements(self.case)
        self.memory = dict(inputs)
        for name in written(self.case):
            if name in self.places:
                self.memory[name] = upload(poison(self.places[name]))
        self.tensors = described["tensors"]
        self.scratch = [
            upload(np.full(max(size, 1), 0xFF, np.uint8)) if poisoned else cupy.cuda.alloc(size)
            for size in described["scratch_bytes"]
        ]
        self.data = [
            upload(np.frombuffer(bytes.fromhex(piece), np.uint8)) for piece in described["data"]
        ]
        self.launches: list[tuple[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = []
        self.keep: list[Any] = []
        for launch in described["launches"]:
            self._bind(folder, launch)

    def _bind(self, folder: Path, launch: dict[str, Any]) -> None:
        params = upload(np.frombuffer(bytes.fromhex(launch["params"]), np.uint8))
        self.keep.append(params)
        pointers = {launch["params_index"]: params.ptr}
        for index, kind, piece, byte_offset in launch["bindings"]:
            pointers[index] = self._start(kind, piece) + byte_offset
        block = launch["threadgroup"]
        arguments = (
            *(np.uint64(pointers.get(index, 0)) for index in launch["buffers"]),
            *(np.uint32(n) for n in block),
        )
        function = kernel(folder, code_of(launch), launch["symbol"])
        threads = int(np.prod(block))
        if threads % 32:
            raise ValueError("a simdgroup would be incomplete, and its lanes in the wrong order")
        self.launches.append((function, tuple(launch["grid"]), (threads, 1, 1), arguments))

    def _start(self, kind: str, piece: int) -> int:
        """Where a piece of scratch or data or the first element of a tensor is."""
        if kind != "tensor":
            return int({"scratch": self.scratch, "data": self.data}[kind][piece].ptr)
        name = self.tensors[piece]
        place = self.places[name]
        return int(self.memory[name].ptr) + place.start * place.item_bytes

    def play(self) -> None:
        """Enqueues the launches on the current stream."""
        for function, grid, block, arguments in self.launches:
            function(grid, block, arguments)

    def results(self) -> dict[str, Array]:
        """Waits, and reads back what was written; any error of the GPU is raised here."""
        cupy.cuda.get_current_stream().synchronize()
        return {
            name: place.view(download(self.memory[name], poison(place)))
            for name in written(self.case)
            if (place := self.places.get(name))
        }
