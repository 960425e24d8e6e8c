"""A stand-in for MLX's Metal device: `mx.fast.metal_kernel`, whose kernels run on the emulator.

Kernels become operations of MLX's own graph (mlx_metal.cpp), on its CPU device. They run when MLX
evaluates them and not before; `mx.compile`, `mx.grad` and `mx.vmap` treat them as they would MLX's.
The text is what MLX 0.32.4 makes of its arguments, as its source says it: the signature, the names
of Metal's attributes that the body has, constant memory for fewer than eight elements. What MLX or
Metal would refuse is refused.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tools.metal.emulator import Library, toolchain
from tools.metal.emulator.build import cache_folder
from umfa._call import _public
from umfa._frameworks import _mlx_autodiff, _mlx_graph, _mlx_strides

HERE = Path(__file__).parent
_PREAMBLE = """#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""
"""What umfa's text sees of that which MLX puts in front."""

_TYPES = {
    mx.bool_: "bool", mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t",
    mx.uint64: "uint64_t", mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t",
    mx.int64: "int64_t", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float",
}  # fmt: skip
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
_IN_CONSTANT_MEMORY = 8  # fewer elements are
_MOST_BUFFERS, _MOST_THREADS, _MOST_THREADGROUP_BYTES = 31, 1024, 32768


class _Evaluated(ctypes.Structure):
    """As in mlx_metal.cpp."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("ndim", ctypes.c_int32),
        ("is_output", ctypes.c_int32),
    )


_RUN = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.POINTER(_Evaluated))


@functools.cache
def _primitive() -> Any:
    """mlx_metal.cpp, compiled against the MLX that is installed."""
    if sys.platform != "linux":
        pytest.skip("the stand-in for MLX's Metal is written for Linux")
    package = Path(mx.__file__).parent
    source = HERE / "mlx_metal.cpp"
    compiler = (toolchain.system_compiler(), "-std=c++20", "-O1", "-fPIC", "-shared")
    text = repr((compiler, mx.__version__, str(package), source.read_text()))
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"mlx-{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "made.so"
            toolchain.run(
                [
                    *(*compiler, f"-I{package / 'include'}", str(source), "-o", str(made)),
                    *(f"-L{package / 'lib'}", "-lmlx", f"-Wl,-rpath,{package / 'lib'}"),
                ]
            )
            os.replace(made, built)
    library = ctypes.CDLL(str(built))
    library.umfa_mlx_size.restype = ctypes.c_uint64
    library.umfa_mlx_size.argtypes = (ctypes.c_void_p,)
    return library


def _address(array: Any) -> int:
    """Of the C++ array inside of Python's: nanobind keeps its distance behind the object's head."""
    distance = ctypes.c_int32.from_address(id(array) + object.__basicsize__).value
    address = id(array) + distance
    assert _primitive().umfa_mlx_size(address) == array.size, "another nanobind than expected"
    return address


class MlxMetal:
    """The device: what has been compiled and what has run."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.compiled: list[str] = []
        self.memory: list[list[int]] = []
        """Of each kernel that ran, the bytes of the memory in which each of its arrays lies."""
        self.errors: list[BaseException] = []
        self.max_threads = _MOST_THREADS
        self._launches: list[Any] = []  # each lives as long as the graph may run it
        self._libraries: dict[str, tuple[str, Library]] = {}
        self._callback = _RUN(self._run)

    def metal_kernel(
        self,
        name: str,
        input_names: list[str],
        output_names: list[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
    ) -> Any:
        """As `mx.fast.metal_kernel`, with those of its options that umfa uses."""
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        if ensure_row_contiguous or atomic_outputs:
            raise NotImplementedError("umfa uses neither")

        def launch(
            *, inputs: Any, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any
        ) -> list[Any]:
            for what, given, names in (
                ("inputs", inputs, input_names),
                ("output_shapes", output_shapes, output_names),
                ("output_dtypes", output_dtypes, output_names),
            ):
                if len(given) != len(names):
                    raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)}")
            kinds = [(_TYPES[x.dtype], x.ndim, x.size < _IN_CONSTANT_MEMORY) for x in inputs]
            full = f"custom_kernel_{name}" + "".join(
                f"_{kind}{'s' * (ndim == 0) or 'c' * small}" for kind, ndim, small in kinds
            )
            full += "".join(f"_{_TYPES[dtype]}" for dtype in output_dtypes)
            parameters, asks = [], []
            for (kind, ndim, small), one in zip(kinds, input_names, strict=True):
                place = "constant" if small else "device"
                parameters.append(f"const {place} {kind}{'*' if ndim else '&'} {one}")
                if any(f"{one}_{what}" in source for what in ("shape", "ndim")):
                    raise NotImplementedError("umfa asks for strides alone")
                asks.append(ndim > 0 and f"{one}_strides" in source)
                if asks[-1]:
                    parameters.append(f"const constant int64_t* {one}_strides")
            for dtype, one in zip(output_dtypes, output_names, strict=True):
                parameters.append(f"device {_TYPES[dtype]}* {one}")
            parameters = [f"  {x} [[buffer({i})]]" for i, x in enumerate(parameters)]
            parameters += [f"  {t} {x} [[{x}]]" for x, t in ATTRIBUTES.items() if x in source]
            signature = f"[[kernel]] void {full}(\n" + ",\n".join(parameters) + ") {\n"
            text = header + signature + source + "\n}\n"
            return self._lazily(
                full, text, list(inputs), asks, tuple(grid), tuple(threadgroup), output_shapes,
                output_dtypes,
            )  # fmt: skip

        return launch

    def _lazily(
        self, name: str, text: str, inputs: Any, asks: Any, grid: Any, threadgroup: Any,
        shapes: Any, dtypes: Any,
    ) -> list[Any]:  # fmt: skip
        if len(inputs) + sum(asks) + len(shapes) > _MOST_BUFFERS:
            raise RuntimeError("Metal has 31 buffers")
        results = [mx.array(0) for _ in shapes]
        like = [mx.zeros((1,), dtype) for dtype in dtypes]
        sizes = [size for shape in shapes for size in shape]
        self._launches.append((name, text, grid, threadgroup, [*asks, *(False for _ in shapes)]))
        error = ctypes.create_string_buffer(4096)
        failed = _primitive().umfa_mlx_metal_kernel(
            ctypes.c_int64(len(self._launches) - 1),
            self._callback,
            (ctypes.c_void_p * len(inputs))(*map(_address, inputs)),
            len(inputs),
            (ctypes.c_void_p * len(results))(*map(_address, results)),
            (ctypes.c_void_p * len(results))(*map(_address, like)),
            (ctypes.c_int * len(shapes))(*map(len, shapes)),
            (ctypes.c_int * max(len(sizes), 1))(*sizes),
            len(results),
            error,
            len(error),
        )
        if failed:
            raise RuntimeError(error.value.decode())
        return results

    def _run(self, number: int, arrays: Any) -> None:
        """What MLX does when it evaluates a kernel. Errors wait: there is nobody to catch them."""
        try:
            self._dispatch(*self._launches[number], arrays)
        except BaseException as error:
            self.errors.append(error)

    def _dispatch(
        self, name: str, text: str, grid: Any, threadgroup: Any, asks: list[bool], arrays: Any
    ) -> None:
        threads = int(np.prod(threadgroup))
        if threads > self.max_threads:
            raise ValueError(f"Thread group size ({threads}) is greater than the maximum allowed")
        if any(count % size for count, size in zip(grid, threadgroup, strict=True)):
            raise RuntimeError("part of a threadgroup would run, which no kernel of umfa expects")
        library = self._library(name, text)
        if library.static_threadgroup_bytes(name) > _MOST_THREADGROUP_BYTES:
            raise RuntimeError("more threadgroup memory than a pipeline takes")
        buffers: list[Any] = []
        offsets: dict[int, int] = {}
        results = []
        for array, asked in zip(arrays[: len(asks)], asks, strict=True):
            size = array.size
            own = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(array.memory))
            memory = _as_metal_has_it(own[:size])
            if array.is_output:
                memory[:] = 0xFF  # NaN: memory of MLX's is not cleared
                results.append((own[:size], memory))
            offsets[len(buffers)] = array.offset
            buffers.append(memory)
            if asked:
                buffers.append(np.array(array.strides[: array.ndim], np.int64).tobytes())
        library.dispatch(
            name,
            threadgroups=[count // size for count, size in zip(grid, threadgroup, strict=True)],
            threads=threadgroup,
            buffers=dict(enumerate(buffers)),
            buffer_offsets=offsets,
        )
        for own, computed in results:
            own[:] = computed[: own.size]
        self.ran.append(name)
        self.memory.append([array.size for array in arrays[: len(asks)]])

    def _library(self, name: str, text: str) -> Library:
        """MLX keeps a library by its name, and compiles anew where the text is another."""
        known = self._libraries.get(name)
        if known is None or known[0] != text:
            assert known is None, "two texts of a name would be compiled in turn"
            library = Library(_PREAMBLE + text)
            if library._built.unset:
                raise RuntimeError(f"function constants have no value: {library._built.unset}")
            self.compiled.append(hashlib.sha256(text.encode()).hexdigest())
            known = self._libraries[name] = text, library
        return known[1]

    def read(self, array: Any) -> np.ndarray[Any, Any]:
        """The array's value as float64, when all is done that it needs."""
        mx.eval(array)
        mx.synchronize()
        self.check()
        return np.array(array.astype(mx.float32)).astype(np.float64)

    def check(self) -> None:
        """Raises what a kernel has raised."""
        if self.errors:
            raise self.errors[0]


def _as_metal_has_it(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy that starts at a multiple of 16: Metal aligns its buffers, and MLX's allocator for the
    CPU does not."""
    size = max(data.size, 16)
    memory = np.zeros(size + 16, np.uint8)
    first = -memory.ctypes.data % 16
    memory[first : first + data.size] = data
    return memory[first : first + size]


@contextmanager
def standing_in(patch: pytest.MonkeyPatch) -> Iterator[MlxMetal]:
    """umfa takes MLX's device for one of Metal's."""
    _primitive()
    device = MlxMetal()
    patch.setattr(_mlx_graph, "missing", lambda: "")
    # With a GPU as its default device, MLX is never computed for at once.
    patch.setattr(_mlx_autodiff, "applies", lambda _: True)
    patch.setattr(_public, "_repeat", lambda *_: False)
    patch.setattr(_public, "_REPEATED", {})
    patch.setattr(mx.fast, "metal_kernel", device.metal_kernel)
    _mlx_graph._kernel.cache_clear()
    _mlx_graph._unmapped.cache_clear()
    _mlx_strides._kernel.cache_clear()
    yield device
    mx.synchronize()
    _mlx_graph._kernel.cache_clear()
    _mlx_graph._unmapped.cache_clear()
    _mlx_strides._kernel.cache_clear()
    device.check()
