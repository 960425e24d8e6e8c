"""Whether the suite runs on a Mac, and what its GPU is good for.

On a Mac the suite's "metal" is the Mac's own GPU, and there is no emulator. Hosted Macs have no GPU
that umfa can use: what needs one is skipped there, with the reason that `umfa.backends` gives.
``UMFA_TEST_PRETEND_MAC=1`` makes the suite take any machine for such a Mac.
"""

from __future__ import annotations

import functools
import os
import platform
import sys

import umfa

_PRETENDED = os.environ.get("UMFA_TEST_PRETEND_MAC", "")
if _PRETENDED not in ("", "1"):
    raise ValueError(f"UMFA_TEST_PRETEND_MAC is unknown; got {_PRETENDED!r}; expected '1'")

IS_MAC = sys.platform == "darwin" or _PRETENDED == "1"
# Its fibers switch stacks in assembly, of which only this has been run.
EMULATOR_RUNS = not IS_MAC and sys.platform == "linux" and platform.machine() == "x86_64"

EMULATOR_REASON = "the emulator of Metal has only been run on Linux x86-64"
_NO_GPU = "no Apple GPU that umfa can use: "


@functools.cache
def missing_gpu() -> str:
    """Why tests cannot use this machine's GPU; empty where they can.

    Asked when the first test needs it: on a Mac the question opens the GPU.
    """
    if not IS_MAC:
        return _NO_GPU + "this is not a Mac"
    metal = next(backend for backend in umfa.backends() if backend.name == "metal")
    return "" if metal.available else _NO_GPU + metal.reason


def is_reason(text: str) -> bool:
    """Whether a test was skipped for this machine's sake."""
    return text == EMULATOR_REASON or text.startswith(_NO_GPU)
