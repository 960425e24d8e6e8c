"""A stand-in for torch's MPS device, whose stream runs later.

CPU tensors stand for MPS tensors: those in memory that the stand-in has made. Kernels that
`compile_shader` makes run on the emulator, when somebody waits for the stream and not before. New
memory is poisoned, so that a result that is read too early shows it. The stand-in refuses what
torch 2.13 or Metal would refuse.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.capsules import _DLManagedTensor, _DLTensor, _new_capsule
from tests.metal.metal_tensors import METAL
from tools.metal.emulator import Library
from umfa._call import _public
from umfa._frameworks import _torch, _torch_mps, _torch_tables

_CODES = {
    torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.bool: (6, 8),
    torch.int32: (0, 32), torch.int64: (0, 64), torch.uint8: (1, 8), torch.float64: (2, 64),
    torch.int8: (0, 8),
}  # fmt: skip
_MOST_BUFFERS, _MOST_BYTES = 31, 4096


class Kernel:
    """What `getattr` of a compiled library gives."""

    thread_execution_width = 32

    def __init__(self, device: TorchMps, library: Library, name: str) -> None:
        self._device, self._library, self._name = device, library, name
        self.max_threads_per_threadgroup = device.max_threads
        self.static_thread_group_memory_length = library.static_threadgroup_bytes(name)

    def __call__(self, *arguments: Any, threads: Any = None, group_size: Any = None) -> None:
        if len(arguments) > _MOST_BUFFERS:
            raise RuntimeError(f"{len(arguments)} arguments; Metal has {_MOST_BUFFERS} buffers")
        if threads is None or group_size is None or len(threads) != len(group_size):
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        if np.prod(group_size) > self.max_threads_per_threadgroup:
            raise RuntimeError("threads of a threadgroup exceed the pipeline's")
        if any(count % size for count, size in zip(threads, group_size, strict=True)):
            raise RuntimeError("part of a threadgroup would run, which no kernel of umfa expects")
        bound = [self._device.bound(argument) for argument in arguments]
        groups = [count // size for count, size in zip(threads, group_size, strict=True)]

        def run() -> None:
            self._library.dispatch(
                self._name,
                threadgroups=groups,
                threads=tuple(group_size),
                buffers={i: memory for i, (memory, _) in enumerate(bound)},
                buffer_offsets={i: first for i, (_, first) in enumerate(bound)},
            )

        self._device.queue.append(run)
        self._device.launched.append(self._name)


class Compiled:
    """What `compile_shader` returns: a kernel for each name."""

    def __init__(self, device: TorchMps, library: Library) -> None:
        self._device, self._library = device, library

    def __getattr__(self, name: str) -> Kernel:
        if name not in self._library.kernels:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        return Kernel(self._device, self._library, name)


class Shown:
    """An MPS tensor as DLPack has it: a buffer, and where the tensor starts in it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._sizes = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
        self._strides = (ctypes.c_int64 * tensor.dim())(*tensor.stride())
        code, bits = _CODES[tensor.dtype]
        self._managed = _DLManagedTensor(
            _DLTensor(
                data=tensor.untyped_storage().data_ptr(),
                device_type=METAL,
                ndim=tensor.dim(),
                code=code,
                bits=bits,
                lanes=1,
                shape=self._sizes,
                strides=self._strides,
                byte_offset=tensor.storage_offset() * tensor.element_size(),
            ),
            None,
            None,
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return METAL, 0

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


class TorchMps:
    """The device, its memory and its stream."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.launched: list[str] = []
        self.compiled: list[str] = []
        self.waits = 0
        self.max_threads = 1024
        self._memory: dict[int, Any] = {}  # storages by address; all live as long as the device
        self._shown: list[Shown] = []  # the core does not keep them

    # ---- torch.mps -------------------------------------------------------------------------------

    def synchronize(self) -> None:
        self.waits += 1
        self.finish()

    def compile_shader(self, text: str) -> Compiled:
        if re.search(r"\[\[\s*threadgroup\s*\(", text):
            raise RuntimeError("no threadgroup memory whose size the launch sets")
        library = Library(text)
        if library._built.unset:
            raise RuntimeError(f"function constants have no value: {library._built.unset}")
        self.compiled.append(text)
        return Compiled(self, library)

    # ---- memory ----------------------------------------------------------------------------------

    def tensor(self, value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy on the device."""
        return self.adopt(torch.as_tensor(value, dtype=dtype).detach().clone())

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, on the device from now on."""
        storage = tensor.untyped_storage()
        self._memory[storage.data_ptr()] = storage
        return tensor

    def empty(self, size: int, device: torch.device) -> torch.Tensor:
        return self.adopt(torch.full((size,), 0xFF, dtype=torch.uint8))

    def has(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self._memory
        )

    def bound(self, argument: Any) -> tuple[Any, int]:
        """(memory, first byte) of a kernel's argument."""
        if isinstance(argument, torch.Tensor):
            if not self.has(argument):
                raise RuntimeError("Passed CPU tensor to MPS op")
            storage = argument.untyped_storage()
            size = storage.nbytes()
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(storage.data_ptr()))
            return memory, argument.storage_offset() * argument.element_size()
        values = list(argument) if isinstance(argument, (tuple, list)) else [argument]
        if not values:
            raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
        if not all(type(value) is int for value in values):
            raise RuntimeError("Unsupported argument type")
        data = np.array(values, np.int64).tobytes()
        if len(data) >= _MOST_BYTES:
            raise RuntimeError(f"setBytes of {len(data)} bytes")
        return data, 0

    def finish(self) -> None:
        """Runs what is queued, in order. Not a wait of umfa's."""
        while self.queue:
            self.queue.pop(0)()

    def read(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """What the tensor holds after all that is queued, as float64."""
        self.finish()
        return tensor.detach().double().numpy()

    def poisoned(self, tensor: torch.Tensor) -> bool:
        """Whether nothing has been written to a result yet."""
        return bool(tensor.detach().isnan().all())

    # ---- what umfa asks of MPS tensors -----------------------------------------------------------

    def show(self, tensor: torch.Tensor) -> Shown:
        """What torch shows of an MPS tensor."""
        shown = Shown(tensor)
        self._shown.append(shown)
        return shown


@contextmanager
def standing_in(patch: pytest.MonkeyPatch) -> Iterator[TorchMps]:
    """umfa takes the device's tensors for MPS tensors."""
    device = TorchMps()
    export, allocate, to_host = _torch.export, _torch.allocate, _torch.to_host

    def shown(tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
        found = export(tensor, function, argument, backend)
        return device.show(found) if device.has(found) else found

    def made(like: Any, shape: Any, dtype: str, backend: str = "auto") -> tuple[Any, Any]:
        memory, tensor = allocate(like, shape, dtype, backend)
        if not device.has(like):
            return memory, tensor
        poison = float("nan") if tensor.is_floating_point() else 0x6E
        tensor = device.adopt(tensor.fill_(poison))
        return device.show(tensor), tensor

    def on_host(tensor: Any, function: str, argument: str) -> Any:
        if not device.has(tensor):
            return to_host(tensor, function, argument)
        device.synchronize()  # as torch's copy does
        return to_host(tensor, function, argument).clone()

    def to_device(tensor: torch.Tensor, name: str) -> torch.Tensor:
        device.synchronize()
        return device.tensor(tensor)

    def zeros(size: int, _: torch.device) -> torch.Tensor:
        return device.tensor(torch.zeros(size, dtype=torch.int64))

    patch.setattr(_torch, "export", shown)
    patch.setattr(_torch, "allocate", made)
    patch.setattr(_torch, "to_host", on_host)
    # By their class, the device's tensors are torch's on the CPU: calls that repeat another one's
    # options would read them there.
    patch.setattr(_public, "_repeat", lambda *_: False)
    patch.setattr(_public, "_REPEATED", {})
    patch.setattr(_torch_mps, "is_mps", device.has)
    patch.setattr(_torch_mps, "_empty", device.empty)
    patch.setattr(_torch_mps, "_to_device", to_device)
    patch.setattr(_torch_tables, "_zeros", zeros)
    patch.setattr(_torch_tables, "_devices", {})
    patch.setattr(torch.mps, "synchronize", device.synchronize)
    patch.setattr(torch.mps, "compile_shader", device.compile_shader)
    caches = (_torch_mps._compiled, _torch_mps._spare, _torch_mps._uploaded)
    for cache in caches:
        cache.cache_clear()
    yield device
    for cache in caches:
        cache.cache_clear()
