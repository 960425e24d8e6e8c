"""Metal compute kernels as PTX, for NVIDIA GPUs: the second back end of the emulator's headers.

>>> made = ptx.compile("kernels.metal", constants={0: True}, threads=128)
>>> ptx.ptxas_report(made)

``python -m tools.metal.ptx`` builds a bundle of kernels and cases and runs it where a GPU is.
The names below are imported on use: the machine with the GPU has neither clang nor the emulator.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ptxas import Resources, ptxas_report
    from .translate import Ptx, compile

__all__ = ["Ptx", "Resources", "compile", "ptxas_report"]

_HOMES = {"Ptx": "translate", "compile": "translate", "Resources": "ptxas", "ptxas_report": "ptxas"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
