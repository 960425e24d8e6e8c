"""What ptxas makes of PTX: registers, spills, stack and shared memory of each kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .translate import Ptx

_KERNEL = re.compile(
    r"Function properties for (\w+)\s*\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s*\n"
    r".*?Used (\d+) registers(.*)"
)
_SHARED = re.compile(r"(\d+) bytes smem")
_OF_GRADIENTS = re.compile(r"\.entry d(q|kv)_")
_RESIDENT = re.compile(r"^\.minnctapersm (\d+)$", re.MULTILINE)


SPILLED = 48
"""Bytes that a kernel may spill for one more resident threadgroup.

Kernels spill so little in the passes that only NaN asks for (shaders/shared/values.h). On an H100,
three threadgroups with 40 spilled bytes against two without: decode from pages of 16 keys takes
0.240 ms against 0.396, packed sequences with D=128 5.18 against 5.54.
"""

SPILLED_BY_GRADIENTS = 192
"""The same of the kernels of the backward pass, which wait more.

H200, S = 4096, dQ, dK and dV together, with 56 to 184 spilled bytes against one threadgroup less:
8.6 ms against 10.1 (bfloat16, D=64), 26.7 against 31.2 (D=128), 124.6 against 153.7 (float32,
D=128). With 204 and 292 bytes: 9.4 (bfloat16, D=64), 27.8 (D=128).
"""


@dataclass(frozen=True)
class Resources:
    """Of one kernel, per thread but for ``shared``, which is a threadgroup's."""

    registers: int
    spilled: int
    stack: int
    shared: int


def find_ptxas() -> str | None:
    """The assembler of CUDA's toolkit, if it is on the path."""
    return shutil.which("ptxas")


def assemble(ptx: Ptx, output: Path, arch: str = "sm_90") -> str:
    """Writes machine code; returns what ptxas says of it. Raises ValueError if it is no PTX.

    Holds as many threadgroups on a multiprocessor as `ir.RESIDENT_THREADS` asks for, or as many as
    spill no more than `SPILLED` bytes (`SPILLED_BY_GRADIENTS`). On an H100, S = 4096: forward
    float16 D=64 162 TFLOP/s with four, 145 with three; D=128 101 with three, 90 with four (which
    spill 80 bytes) and with two.
    """
    text = ptx.text
    while True:
        said = _assemble(text, output, arch)
        most = SPILLED_BY_GRADIENTS if _OF_GRADIENTS.search(text) else SPILLED
        spills = any(int(stored) > most for _, _, stored, *_ in _KERNEL.findall(said))
        resident = max(map(int, _RESIDENT.findall(text)), default=1)
        if not spills or resident == 1:
            return said
        text = _RESIDENT.sub(f".minnctapersm {resident - 1}", text)


def _assemble(text: str, output: Path, arch: str) -> str:
    tool = find_ptxas()
    if tool is None:
        raise FileNotFoundError("ptxas is not on the path")
    done = subprocess.run(
        [tool, f"-arch={arch}", "-v", "-o", str(output), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"ptxas refused:\n{done.stderr}")
    return done.stderr


def ptxas_report(ptx: Ptx, arch: str = "sm_90") -> dict[str, Resources]:
    """Resources of each kernel by host name."""
    with tempfile.TemporaryDirectory() as folder:
        said = assemble(ptx, Path(folder) / "kernels.cubin", arch)
    by_symbol = {}
    for symbol, stack, stored, loaded, registers, rest in _KERNEL.findall(said):
        shared = _SHARED.search(rest)
        by_symbol[symbol] = Resources(
            int(registers),
            int(stored) + int(loaded),
            int(stack),
            int(shared.group(1)) if shared else 0,
        )
    return {name: by_symbol[entry.symbol] for name, entry in ptx.kernels.items()}
