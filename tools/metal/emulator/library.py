"""The public face: a library of kernels that runs on the CPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import checks as run_time
from .build import Built, build, runtime
from .counters import Counters
from .errors import DispatchError, KernelError
from .instrument import COUNTS

Buffer = npt.NDArray[Any] | bytes
Size = int | Sequence[int]

_BUFFERS = 31


@dataclass(frozen=True)
class Options:
    """How a library is built and run.

    ``checks`` are the run-time checks: all, none, or by name (`CHECKS`) those that
    are not on, as ``{"race": False}``. Without any a kernel runs faster and errors are undefined
    behaviour, as on a GPU. ``step_limit`` is how many accesses and rounds of loops one thread may
    make before it counts as spinning. ``allow`` names rules of the linter to ignore.
    """

    checks: bool | Mapping[str, bool] = field(default=True, hash=False)
    step_limit: int = 1 << 26
    flush_to_zero: bool = False
    math_noise: bool = False
    reverse_reductions: bool = False
    permute_lanes: bool = False
    allow: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        run_time.chosen(self.checks)
        _integer("step_limit", self.step_limit, 1 << 63)


class _Binding(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("misalignment", ctypes.c_uint32),
        ("may_write", ctypes.c_uint32),
    )


class _Site(ctypes.Structure):
    _fields_ = (("file", ctypes.c_char_p), ("line", ctypes.c_uint32))


class _Variable(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    )


class _Unset(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("index", ctypes.c_uint32),
    )


class _Dispatch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("threadgroups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("buffers", _Binding * _BUFFERS),
        ("threadgroup_bytes", ctypes.c_uint64 * _BUFFERS),
        ("sites", ctypes.POINTER(_Site)),
        ("site_count", ctypes.c_uint64),
        ("variables", ctypes.POINTER(_Variable)),
        ("variable_count", ctypes.c_uint64),
        ("unset", ctypes.POINTER(_Unset)),
        ("unset_count", ctypes.c_uint64),
        ("schedule_seed", ctypes.c_uint64),
        ("step_limit", ctypes.c_uint64),
        ("checks", ctypes.c_uint32),
        ("flush_to_zero", ctypes.c_uint32),
        ("math_noise", ctypes.c_uint32),
        ("reverse_reductions", ctypes.c_uint32),
        ("permute_lanes", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


_DYNAMIC = (
    "mma",
    "exp2",
    "exp",
    "shuffles",
    "simd_operations",
    "threadgroup_barriers",
    "simdgroup_barriers",
    "threadgroups",
    "threadgroup_memory",
)


class _Result(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in _DYNAMIC),
        ("buffer_read", ctypes.c_uint64 * _BUFFERS),
        ("buffer_written", ctypes.c_uint64 * _BUFFERS),
        *((name, ctypes.c_uint64) for name in COUNTS),
        ("check", ctypes.c_char_p),
        ("error", ctypes.c_char_p),
        ("site", ctypes.c_uint64),
    )


# The runtime's state is the process's: one dispatch at a time.
_running = threading.Lock()


@functools.cache
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(runtime()), mode=ctypes.RTLD_GLOBAL)


class _Loaded(NamedTuple):
    handle: ctypes.CDLL
    sites: Any
    unset: Any
    unset_count: int


class Library:
    """Kernels of one Metal source, specialised with one set of function constants.

    Parameters
    ----------
    source_or_path
        Metal text, or the path of a ``.metal`` file.
    include_dirs
        Where ``#include "..."`` and ``#include <...>`` of the project's own headers look.
    macros
        Names to define before the text, with their values.
    constants
        Function constants by index. Their types must fit: a bool for a bool.
    options
        See `Options`.

    Raises
    ------
    SourceError
        The text is not Metal.
    """

    def __init__(
        self,
        source_or_path: str | Path,
        include_dirs: Sequence[str | Path] = (),
        macros: Mapping[str, Any] | None = None,
        constants: Mapping[int, Any] | None = None,
        *,
        options: Options | None = None,
    ) -> None:
        self.options = options or Options()
        self._built: Built = build(
            source_or_path,
            include_dirs,
            macros or {},
            constants or {},
            bool(run_time.chosen(self.options.checks)),
            self.options.allow,
        )
        self._loaded: _Loaded | None = None

    @classmethod
    def build_all(cls, makers: Sequence[Callable[[], Library]], workers: int = 2) -> list[Library]:
        """Builds several libraries side by side: ``build_all([lambda: Library(...), ...])``."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda make: make(), makers))

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names that `dispatch` takes."""
        return tuple(self._built.kernels)

    def static_threadgroup_bytes(self, kernel: str) -> int:
        """Threadgroup memory that a kernel declares, as a pipeline would tell."""
        number = list(self.kernels).index(kernel)
        return sum(size for _, size in self._built.variables.get(number, []))

    def dispatch(
        self,
        kernel: str,
        threadgroups: Size,
        threads: Size,
        buffers: Mapping[int, Buffer] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        schedule_seed: int = 0,
        *,
        buffer_offsets: Mapping[int, int] | None = None,
        options: Options | None = None,
    ) -> Counters:
        """Runs a kernel to its end.

        Parameters
        ----------
        kernel
            Its host name.
        threadgroups, threads
            Size of the grid in threadgroups, and of a threadgroup in threads: up to three numbers.
        buffers
            By index. Arrays must be C-contiguous; those that the kernel may write are written in
            place. Of ``bytes`` the kernel gets a copy, and what it writes there is gone. An array
            whose memory is not aligned to 16 bytes is seen so by the kernel, as a buffer bound with
            an offset would be.
        threadgroup_memory
            Bytes of each ``[[threadgroup(index)]]``.
        schedule_seed
            Zero runs threads and threadgroups in order; other values shuffle both.
        buffer_offsets
            Bytes into each buffer at which the kernel's pointer starts, as ``setBuffer:offset:``.
        options
            Instead of the library's, for this run; ``checks`` and ``allow`` stay the library's.

        Raises
        ------
        KernelError
            A check fired.
        """
        kernels = self._built.kernels
        if kernel not in kernels:
            known = ", ".join(kernels) or "none"
            raise DispatchError(f"no kernel '{kernel}' in this library; there are: {known}")
        number = list(kernels).index(kernel)
        loaded = self._load()
        how = options or self.options
        request = _Dispatch()
        request.entry = ctypes.cast(loaded.handle[f"umfa_entry_{number}"], ctypes.c_void_p).value
        request.threadgroups[:] = _three("threadgroups", threadgroups)
        request.threads[:] = _three("threads", threads)
        keep = self._bind(request, number, buffers or {}, threadgroup_memory or {})
        for index, offset in (buffer_offsets or {}).items():
            if index not in (buffers or {}) or not 0 <= offset <= request.buffers[index].size:
                raise DispatchError(f"buffer {index} has no byte {offset} to start at")
            request.buffers[index].offset = offset
        variables = self._variables(loaded, number)
        request.sites, request.site_count = loaded.sites, len(self._built.sites)
        request.variables, request.variable_count = variables, len(variables)
        request.unset, request.unset_count = loaded.unset, loaded.unset_count
        request.schedule_seed = _integer("schedule_seed", schedule_seed, 1 << 64)
        request.checks = run_time.bits(run_time.chosen(self.options.checks))
        request.step_limit = how.step_limit
        request.flush_to_zero = how.flush_to_zero
        request.math_noise = how.math_noise
        request.reverse_reductions = how.reverse_reductions
        request.permute_lanes = how.permute_lanes
        result = _Result()
        with _running:
            failed = _runtime().umfa_run(ctypes.byref(request), ctypes.byref(result))
            check, error = result.check.decode(), result.error.decode()
        del keep
        if failed:
            file, line = self._built.sites[result.site]
            place = f"{file}:{line}" if file else kernels[kernel]
            raise KernelError(check, kernel, place, error)
        return _counters(result, set(buffers or {}))

    def _load(self) -> _Loaded:
        if self._loaded is None:
            _runtime()
            handle = ctypes.CDLL(str(self._built.path))
            sites = (_Site * len(self._built.sites))()
            for entry, (file, line) in zip(sites, self._built.sites, strict=True):
                entry.file, entry.line = file.encode(), line
            unset = (_Unset * len(self._built.unset))()
            for slot, (symbol, name, index) in zip(unset, self._built.unset, strict=True):
                slot.address = ctypes.addressof(ctypes.c_char.in_dll(handle, symbol))
                slot.name, slot.index = name.encode(), index
            self._loaded = _Loaded(handle, sites, unset, len(self._built.unset))
        return self._loaded

    def _variables(self, loaded: _Loaded, number: int) -> Any:
        found = self._built.variables.get(number, [])
        table = (_Variable * len(found))()
        if found:
            pointers = (ctypes.c_void_p * len(found)).in_dll(
                loaded.handle, f"umfa_variables_{number}"
            )
            for slot, pointer, (name, size) in zip(table, pointers, found, strict=True):
                slot.address, slot.size, slot.name = pointer, size, name.encode()
        return table

    def _bind(
        self,
        request: _Dispatch,
        number: int,
        buffers: Mapping[int, Buffer],
        threadgroup_memory: Mapping[int, int],
    ) -> list[npt.NDArray[Any]]:
        loaded = self._load()
        writable = ctypes.c_uint32.in_dll(loaded.handle, f"umfa_writable_{number}").value
        keep = []
        spans: list[tuple[int, int, int]] = []
        for index, data in buffers.items():
            if not 0 <= index < _BUFFERS:
                raise DispatchError(f"buffer index {index} is not in 0..{_BUFFERS - 1}")
            may_write = bool(writable >> index & 1)
            array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
            if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
                raise DispatchError(f"buffer {index} must be bytes or a C-contiguous array")
            if may_write and not array.flags.writeable and not isinstance(data, bytes):
                raise DispatchError(f"buffer {index} is read-only, and the kernel may write it")
            if may_write and isinstance(data, bytes):
                array = array.copy()
            keep.append(array)
            binding = request.buffers[index]
            binding.data = array.ctypes.data
            binding.size = array.nbytes
            binding.misalignment = 0 if isinstance(data, bytes) else array.ctypes.data % 16
            binding.may_write = may_write
            spans.append((array.ctypes.data, array.ctypes.data + array.nbytes, index))
        _refuse_aliases(sorted(spans), writable)
        for index, size in threadgroup_memory.items():
            if not 0 <= index < _BUFFERS:
                raise DispatchError(f"threadgroup index {index} is not in 0..{_BUFFERS - 1}")
            size = _integer(f"threadgroup memory {index}", size, 1 << 32)
            if size % 16:
                raise DispatchError(
                    f"threadgroup memory {index} has {size} bytes; Metal takes multiples of 16"
                )
            request.threadgroup_bytes[index] = size
        return keep


def _refuse_aliases(spans: list[tuple[int, int, int]], writable: int) -> None:
    """Metal takes different arguments for different memory if one of them is written."""
    for (_, end, a), (start, stop, b) in itertools.combinations(spans, 2):
        overlap = start < end and start < stop  # sorted: b starts where a does, or later
        if overlap and (writable >> a | writable >> b) & 1:
            raise DispatchError(
                f"buffers {a} and {b} overlap, and the kernel may write one of them"
            )


def _integer(name: str, value: Any, limit: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise DispatchError(f"{name} must be an integer; got {value!r}") from None
    if not 0 <= number < limit:
        raise DispatchError(f"{name} must be at least 0 and below {limit}; got {value!r}")
    return number


def _three(name: str, size: Size) -> tuple[int, int, int]:
    given = tuple(size) if isinstance(size, Iterable) else (size,)
    numbers = [_integer(name, n, 1 << 32) for n in given]
    if not 1 <= len(numbers) <= 3 or 0 in numbers:
        raise DispatchError(f"{name} must be one to three positive numbers; got {size!r}")
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def _counters(result: _Result, bound: set[int]) -> Counters:
    dynamic = {name: getattr(result, name) for name in _DYNAMIC}
    names = {name: name for name in ("flops", "fma")}
    for space in ("device", "constant", "threadgroup"):
        for word in ("read", "written"):
            names[f"{space}_{word}"] = f"{space}_bytes_{word}"
    static = {names[name]: getattr(result, name) for name in COUNTS}
    return Counters(
        **dynamic,
        **static,
        buffer_bytes_read={i: result.buffer_read[i] for i in sorted(bound)},
        buffer_bytes_written={i: result.buffer_written[i] for i in sorted(bound)},
    )
