"""Each header of the CPU's kernels compiles alone, so that an editor's clangd can open it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest

from tests.cpu import test_kernel_math as kernel_math

ON_ARM = platform.machine() in ("arm64", "aarch64")
ELSEWHERE = ("amx", "avx") if ON_ARM else ("neon",)
PATHS = (kernel_math.ROOT / "src/cpu/isa").glob("*.h")
HEADERS = sorted(path.name for path in PATHS if not path.name.startswith(ELSEWHERE))


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = kernel_math.FLAGS["avx512_bf16"] if header.startswith("avx512") else []
    folders = (f"-I{kernel_math.ROOT / folder}" for folder in ("src", "shaders"))
    path = kernel_math.ROOT / "src/cpu/isa" / header
    command = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-w", *flags, *folders]
    subprocess.run([*command, "-x", "c++", path], check=True)
