"""umfa: exact attention on any DLPack tensor, in O(N) memory.

The functions carry the names, arguments and defaults of flash-attn 2 and of torch. See
`flash_attn_func` and `scaled_dot_product_attention`. The modules `umfa.fa3` and `umfa.fa4` have
flash-attn 3's and 4's.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import NamedTuple

from . import _ext
from ._call.can_run import can_run
from ._call.warmup import Warmup, warmup
from ._errors import UnsupportedError
from ._functional.combine import flash_attn_combine
from ._functional.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from ._functional.kvcache import flash_attn_with_kvcache
from ._functional.rope import fused_rope_attention
from ._functional.sdpa import scaled_dot_product_attention
from ._functional.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ._stats import Left, Stats, stats
from .quant import QuantizedTensor, quantize, quantized_attention, sageattn, suggest_precision

__all__ = [
    "BackendInfo",
    "Left",
    "QuantizedTensor",
    "SelfTest",
    "Stats",
    "UnsupportedError",
    "Warmup",
    "backends",
    "can_run",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "fused_rope_attention",
    "get_include",
    "get_library",
    "get_num_threads",
    "quantize",
    "quantized_attention",
    "sageattn",
    "scaled_dot_product_attention",
    "self_test",
    "set_num_threads",
    "stats",
    "suggest_precision",
    "warmup",
]

__version__: str = _ext.version()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


can_run.__signature__ = signature(flash_attn_func).replace(  # type: ignore[attr-defined]
    return_annotation="tuple[bool, str]"
)
warmup.__signature__ = signature(flash_attn_func).replace(  # type: ignore[attr-defined]
    return_annotation="Warmup"
)


class BackendInfo(NamedTuple):
    """A backend, and whether this machine and build have it."""

    name: str
    available: bool
    reason: str
    """Why it is not available; or which kernels `self_test` excludes, if any."""
    device: str = ""
    """The GPU that it would use, in words."""


class SelfTest(NamedTuple):
    """Outcome of the GPU self-test for one dtype; see `self_test`."""

    dtype: str
    device: str
    """The GPU that was tested."""
    system: str
    when: str
    """UTC, as ``2026-11-29T09:13:20Z``."""
    seconds: float
    pipelines: int
    """Compute pipelines built for the test."""
    faults: dict[str, str]
    """For each kernel family, what is wrong with it; an empty string if nothing is."""
    kept: str
    """The file that stores the outcome for later processes; empty if there is none."""
    not_kept: str
    """Why `kept` is empty."""
    tried_again: list[str]
    """Kernel families tested again because an earlier process ended during their case."""

    @property
    def passed(self) -> bool:
        """Whether no family has a fault."""
        return not any(self.faults.values())


def backends() -> list[BackendInfo]:
    """Every backend umfa knows, in order of preference."""
    return [BackendInfo(*info) for info in _ext.backends()]


def self_test() -> list[SelfTest]:
    """Test this machine's GPU with each dtype not tested yet; return the outcome for each dtype.

    The first call that would use the GPU with a dtype runs the same test for that dtype. A small
    case of each kernel family runs on the GPU and on the CPU. umfa does not use a family whose
    results differ, or whose case fails or hangs. Later processes read the outcome from the user's
    cache folder until the GPU, macOS or umfa changes.

    The list is empty without a usable GPU, and with ``UMFA_SELF_TEST=0`` in the environment.
    ``UMFA_SELF_TEST=force`` repeats the test in each process.

    Raises
    ------
    ValueError
        ``UMFA_SELF_TEST`` is neither 0, 1 nor force.
    """
    return [SelfTest(**report) for report in _ext.self_tests(run=True)]


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
    _ext.set_num_threads(_ext.integer("umfa.set_num_threads", "count", count, "1 to 1024"))
