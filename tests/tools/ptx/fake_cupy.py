"""As much of CuPy as the runner's checks use, on the host: memory is ctypes', kernels run on the
warp machine. So the runner itself is tested where there is no GPU."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tests.tools.ptx import warp_machine
from tools.metal.ptx import bundle

GUARD = 256


class Memory:
    """What cudaMalloc returns, aligned as there, between guards that no kernel may write."""

    made: ClassVar[list[Memory]] = []

    def __init__(self, size: int) -> None:
        self._buffer = ctypes.create_string_buffer(b"\xa5" * (size + 3 * GUARD))
        start = ctypes.addressof(self._buffer)
        self.ptr = start + GUARD - start % GUARD + GUARD
        self.size = size
        self.made.append(self)

    def copy_from_host(self, address: int, size: int) -> None:
        assert size <= self.size
        ctypes.memmove(self.ptr, address, size)

    def copy_to_host(self, address: int, size: int) -> None:
        assert size <= self.size
        ctypes.memmove(address, self.ptr, size)

    def guards_hold(self) -> bool:
        around = [(self.ptr - GUARD, GUARD), (self.ptr + self.size, GUARD)]
        return all(set(ctypes.string_at(*span)) == {0xA5} for span in around)


def module(launches: dict[str, dict[str, Any]], shaders: Path) -> types.ModuleType:
    """A module to stand in for cupy. `launches`: of the bundle, by the end of their file's name."""

    class RawModule:
        def __init__(self, path: str) -> None:
            launch = launches[Path(path).stem.rsplit("-", 1)[1]]
            assert Path(path).read_bytes()  # what the GPU would load is there
            self.threads = launch["threadgroup"]
            self.library, _ = warp_machine.build(
                bundle.kernel_text(launch, shaders),
                include_dirs=[shaders],
                constants=launch["constants"],
                threads=self.threads,
            )

        def get_function(self, symbol: str) -> Any:
            def function(
                grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]
            ) -> None:
                assert tuple(block) == (int(np.prod(self.threads)), 1, 1)
                warp_machine.launch(
                    self.library, symbol, [int(x) for x in arguments], grid, self.threads
                )

            return function

    found = types.ModuleType("cupy")
    found.RawModule = RawModule
    found.asnumpy = np.asarray
    found.__getattr__ = lambda name: getattr(np, name)  # the rest is NumPy's
    found.cuda = types.SimpleNamespace(
        set_allocator=lambda allocator: None,
        alloc=Memory,
        get_current_stream=lambda: types.SimpleNamespace(synchronize=lambda: None),
        Device=lambda: types.SimpleNamespace(compute_capability="90"),
        runtime=types.SimpleNamespace(getDeviceProperties=lambda _: {"name": b"no GPU"}),
    )
    return found
