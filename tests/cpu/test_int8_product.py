"""The int8 micro-kernel against integer arithmetic: every bit, over the whole range of int8."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import arm64
import numpy as np
import pytest

import umfa

SOURCE = Path(__file__).with_name("int8_product.cpp")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# By machine: the feature it takes, and the compiler's flags.
NATIVE = {
    "x86_64": ("avx512_vnni", [*AVX512, "-mavx512vnni"]),
    "aarch64": ("dotprod", ["-march=armv8.2-a+dotprod"]),
    "arm64": ("dotprod", ["-march=armv8.2-a+dotprod"]),
}
Run = Callable[..., bytes]


def native(work: Path) -> Run:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    feature, flags = NATIVE.get(platform.machine(), ("an int8 product", []))
    if feature not in umfa._ext.cpu_features():
        pytest.skip(f"this CPU has no {feature}")
    program = work / "int8_product"
    subprocess.run(
        [
            *compiler.split(),
            *("-std=c++20", "-O3", "-w", *flags),
            *(f"-I{arm64.ROOT / folder}" for folder in ("src", "shaders")),
            *(str(SOURCE), "-o", str(program)),
        ],
        check=True,
    )
    return lambda *arguments, stdin=b"": (
        subprocess.run(
            [program, *arguments], input=stdin, stdout=subprocess.PIPE, check=True
        ).stdout
    )


def emulated(work: Path) -> Run:
    arm64.qemu()
    arm64.zig(*arm64.KERNEL_FLAGS, *arm64.DOTPROD, "-c", SOURCE, "-o", work / "int8.o")
    arm64.zig(work / "int8.o", "-o", work / "int8_product")
    return functools.partial(arm64.run, work / "int8_product")


@pytest.fixture(scope="module", params=[native, emulated], ids=["native", "arm64"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return request.param(tmp_path_factory.mktemp("int8"))


@pytest.mark.parametrize("depth", [1, 2, 33, 128])
@pytest.mark.parametrize("extreme", [False, True])
def test_sums_are_exact(depth: int, extreme: bool, run: Run) -> None:
    rows, lanes, offset = map(int, run("shape").split())
    rng = np.random.default_rng(depth)
    low, high = np.iinfo(np.int8).min, np.iinfo(np.int8).max
    a = rng.integers(low, high + 1, (rows, depth, 4))
    b = rng.integers(low, high + 1, (lanes, depth, 4))
    if extreme:
        a, b = (np.where(x < 0, low, high) for x in (a, b))
        a[0], b[:2] = low, low
        b[1] = high

    def panel(x: np.ndarray) -> bytes:
        """Units of a step side by side."""
        return x.transpose(1, 0, 2).astype(np.uint8).tobytes()

    got = run(str(depth), stdin=panel(a) + panel(b + offset))
    sums = np.frombuffer(got, np.int32).reshape(rows, lanes)
    want = np.einsum("mki,nki->mn", a, b)
    np.testing.assert_array_equal(sums - offset * a.sum((1, 2))[:, None], want)
