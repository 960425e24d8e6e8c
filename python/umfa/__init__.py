"""umfa: exact attention on any DLPack tensor, in O(N) memory.

The functions carry the names, arguments and defaults of flash-attn 2. See `flash_attn_func`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from . import _ext
from ._errors import UnsupportedError
from ._flash_attn import (
    can_run,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from ._options import integer

__all__ = [
    "BackendInfo",
    "UnsupportedError",
    "backends",
    "can_run",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "get_include",
    "get_library",
    "get_num_threads",
    "set_num_threads",
]

__version__: str = _ext.version()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class BackendInfo(NamedTuple):
    """A way to carry attention out, and whether this machine and build have it."""

    name: str
    available: bool
    reason: str
    """Why it is not available; empty when it is."""


def backends() -> list[BackendInfo]:
    """Every backend umfa knows, in order of preference."""
    return [BackendInfo(*info) for info in _ext.backends()]


def get_include() -> str:
    """Folder to put on a C or C++ compiler's include path, for ``#include <umfa/umfa.h>``."""
    return str(Path(_ext.__file__).parent / "include")


def get_library() -> str:
    """Path of the shared library that implements ``umfa/umfa.h``."""
    found = sorted(Path(_ext.__file__).parent.glob("libumfa.*"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"[umfa.get_library] the library is not where it was installed; "
            f"got {[path.name for path in found]}; expected one libumfa in the package"
        )
    return str(found[0])


def get_num_threads() -> int:
    """Threads that one call uses on the CPU.

    `set_num_threads` decides, else the environment variable ``UMFA_NUM_THREADS``, else
    ``OMP_NUM_THREADS``, else the number of CPUs this process may use.
    """
    return _ext.num_threads()


def set_num_threads(count: int) -> None:
    """Sets how many threads one call uses on the CPU, for the whole process.

    Raises
    ------
    ValueError, TypeError
        `count` is not an integer from 1 to 1024.
    """
    _ext.set_num_threads(integer("umfa.set_num_threads", "count", count, "1 to 1024"))
