"""Calls on MPS tensors, in torch's own stream: nothing waits for the GPU.

Launches go through `torch.mps.compile_shader`. It takes neither function constants nor threadgroup
memory of a size that the launch sets, so that the kernels' constants are lines in front of their
text. Small data are numbers that torch copies into the command buffer.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from .. import _ext
from .._errors import HostReadsError, UnsupportedError, message
from .._stats import count_in_stream, count_wait
from . import _torch_tables

MOST_BYTES = 4095
"""Metal copies no more into a command buffer (setBytes)."""

_SPARE = 16
"""Bytes of each buffer that a launch leaves out: its kernel reads none of them."""

_MOST_BUFFERS = 31


def is_mps(tensor: Any) -> bool:
    """Whether the tensor lies in the memory of torch's MPS device."""
    return bool(tensor.is_mps)


def wait(reason: str) -> None:
    """Until the GPU has done what torch has queued, because `reason`."""
    count_wait(reason)
    torch.mps.synchronize()
    _torch_tables.check()


def missing() -> str:
    """Why this process cannot launch kernels in torch's stream; empty if it can."""
    if os.environ.get("UMFA_TORCH_STREAM") == "0":  # another value than 1 is the core's to refuse
        return "UMFA_TORCH_STREAM=0"
    if not hasattr(torch.mps, "compile_shader"):
        return f"torch {torch.__version__} has no torch.mps.compile_shader"
    if os.environ.get("PYTORCH_MPS_FAST_MATH", "0") != "0":
        return "PYTORCH_MPS_FAST_MATH lets torch compile with fast mathematics, without infinities"
    return ""


class Stream:
    """One call's launches in torch's stream.

    Parameters
    ----------
    function
        Its public name, for messages.
    tensors
        The call's tensors on MPS, by the names in a plan.
    results
        The names of what `allocate` is asked for, in this order.
    allocate
        The framework's.

    Attributes
    ----------
    used, built
        Kernels that `warm_up` has found, and those of them that it had to compile.
    """

    def __init__(
        self,
        function: str,
        tensors: Mapping[str, Any],
        results: Sequence[str],
        allocate: Callable[..., tuple[Any, Any]],
    ) -> None:
        # A lazily negated view is shown as a copy (`_torch.export`), whose layout this one has.
        self._tensors = {name: x.detach().resolve_neg() for name, x in tensors.items()}
        self._function = function
        self._results = iter(results)
        self._allocate = allocate
        self._device = next(iter(tensors.values())).device
        self._tables: Mapping[str, str] = {}
        self.used = self.built = 0

    def read_tables(self, names: Mapping[str, str]) -> None:
        """Lets a kernel read these tables, fields of the record with their callers' names: they are
        among the tensors."""
        self._tables = names

    def allocate(self, *arguments: Any) -> tuple[Any, Any]:
        """As the framework's `allocate`."""
        shown, tensor = self._allocate(*arguments)
        self._tensors[next(self._results)] = tensor
        return shown, tensor

    def play(self, plan: dict[str, Any]) -> int | None:
        """Queues the launches of `_ext`'s plan.

        Returns None, or the most threads of a threadgroup that its kernels take if the plan has
        more, or 0 after a wait if the launches must not go there.
        """
        launches = plan["launches"]
        if any(launch["further_slice"] for launch in launches):
            # macOS ends command buffers that take seconds, and torch decides where its own end.
            if self._tables:
                raise HostReadsError
            wait("the call is long, and umfa divides it into command buffers of its own")
            return 0
        kernels, most = self._kernels(launches)
        if most is not None:
            return most
        fault, place = _torch_tables.take(self._device) if self._tables else (None, 0)
        pieces = {
            "tensor": [
                _from_byte(fault, place)
                if name == "table_fault"
                else _from_byte(self._tensors[name], offset)
                for (name, _), offset in zip(plan["tensors"], plan["byte_offsets"], strict=True)
            ],
            "scratch": [_empty(max(size, _SPARE), self._device) for size in plan["scratch_bytes"]],
            "data": [_data(data, self._device) for data in plan["data"]],
        }
        for launch, kernel in zip(launches, kernels, strict=True):
            grid, group = launch["grid"], launch["threadgroup"]
            threads = tuple(count * size for count, size in zip(grid, group, strict=True))
            kernel(*self._arguments(launch, pieces), threads=threads, group_size=group)
        count_in_stream()
        if self._tables and _torch_tables.queued(self._device, place, self._function, self._tables):
            wait(f"{_torch_tables.PLACES // 2} calls had tables on the GPU, and it is time to look")
        return None

    def warm_up(self, plan: dict[str, Any]) -> int | None:
        """Compiles the kernels of a plan, and counts them in `used` and `built`."""
        launches = plan["launches"]
        before = _compiled.cache_info().misses
        kernels, most = self._kernels(launches)
        self.built += _compiled.cache_info().misses - before
        if most is None:
            self.used = max(self.used, len(set(map(id, kernels))))
        return most

    def _kernels(self, launches: list[dict[str, Any]]) -> tuple[list[Any], int | None]:
        """The launches' kernels, and None or the most threads that one takes with too many."""
        kernels = [_kernel(self._function, launch) for launch in launches]
        for launch, kernel in zip(launches, kernels, strict=True):
            x, y, z = launch["threadgroup"]
            if x * y * z > kernel.max_threads_per_threadgroup:
                return kernels, int(kernel.max_threads_per_threadgroup)
        return kernels, None

    def _arguments(self, launch: dict[str, Any], pieces: dict[str, list[Any]]) -> list[Any]:
        """What is at each buffer index of the kernel."""
        arguments: list[Any] = list(_spare(self._device)[: launch["buffer_count"]])
        for index, kind, piece, offset in launch["buffers"]:
            memory = pieces[kind][piece]
            if memory is not None:  # else a tensor without elements, which has no memory
                arguments[index] = memory if offset == 0 else _further(memory, offset)
        arguments[launch["params_index"]] = _numbers(launch["params"])
        return arguments


def _kernel(function: str, launch: dict[str, Any]) -> Any:
    text = launch["constant_defines"] + launch["defines"]
    try:
        kernel = _compiled(launch["kernel"], launch["source"], text)
    except RuntimeError as error:
        raise RuntimeError(
            message(
                function,
                f"torch.mps.compile_shader refused the kernel {launch['kernel']}",
                error,
                "a macOS whose Metal is 3.1 or newer; else report this as a bug",
            )
        ) from error
    if kernel.thread_execution_width != 32:
        raise UnsupportedError(
            message(
                function,
                "this GPU's simdgroups have another size",
                kernel.thread_execution_width,
                "32 threads",
            )
        )
    return kernel


@lru_cache(maxsize=256)
def _compiled(name: str, source: str, defines: str) -> Any:
    """The kernel that these #define lines make of a shader. Each set of constants is a text of its
    own; a model needs a few."""
    return getattr(torch.mps.compile_shader(defines + _ext.shader_text(source)), name)


def _numbers(data: bytes) -> tuple[int, ...]:
    """The same bytes as 64-bit integers, which torch copies into the command buffer."""
    return struct.unpack(f"<{-(-len(data) // 8)}q", data + bytes(-len(data) % 8))


def _data(data: bytes, device: torch.device) -> Any:
    """What kernels only read, as an argument. Device memory where it is too much for one."""
    if len(data) + 7 <= MOST_BYTES:
        return _numbers(data)
    return _uploaded(data, str(device))


@lru_cache(maxsize=16)
def _uploaded(data: bytes, device: str) -> torch.Tensor:
    # The copy waits: without that, the host memory would have to stay for as long as the GPU needs.
    count_wait("the call has a table of more than 4 KB, which is copied to the GPU once")
    return _to_device(torch.frombuffer(bytearray(data), dtype=torch.uint8), device)


def _to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.to(device)


def _empty(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


@lru_cache(maxsize=4)
def _spare(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Memory for each buffer index that a launch leaves out."""
    return tuple(_empty(_SPARE, device) for _ in range(_MOST_BUFFERS))


def _from_byte(tensor: Any, offset: int) -> Any:
    """A tensor that starts at a byte of the same memory, as Metal counts; None if there is none."""
    if tensor.numel() == 0:
        return None
    return tensor.as_strided((1,), (1,), offset // tensor.element_size())


def _further(memory: Any, offset: int) -> Any:
    """A tensor that starts so many bytes later."""
    first = memory.storage_offset() + offset // memory.element_size()
    return memory.as_strided((1,), (1,), first)
