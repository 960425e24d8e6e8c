"""Runs Metal compute kernels on the CPU, and catches there what a GPU would not forgive.

>>> library = Library("kernels.metal", constants={0: True})
>>> counters = library.dispatch("add", 4, 32, {0: a, 1: b})
"""

from .checks import CHECKS
from .counters import Counters
from .errors import DispatchError, EmulatorError, KernelError, SourceError
from .library import Library, Options

__all__ = [
    "CHECKS",
    "Counters",
    "DispatchError",
    "EmulatorError",
    "KernelError",
    "Library",
    "Options",
    "SourceError",
]
