"""Micro-kernels still without a user against integer arithmetic: every bit.

int8 over its whole range; bfloat16 on integers whose products and sums floats hold exactly.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests.cpu import arm64

SOURCE = Path(__file__).with_name("unit_product.cpp")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# By machine and product: the feature it takes, and the compiler's flags.
NATIVE = {
    ("x86_64", "DOT"): ("avx512_vnni", [*AVX512, "-mavx512vnni"]),
    ("aarch64", "DOT"): ("dotprod", ["-march=armv8.2-a+dotprod"]),
    ("aarch64", "SMMLA"): ("i8mm", ["-march=armv8.2-a+dotprod+i8mm"]),
    ("aarch64", "BFMMLA"): ("bf16", ["-march=armv8.2-a+dotprod+bf16"]),
}
ZIG = {"DOT": "dotprod", "SMMLA": "dotprod+i8mm", "BFMMLA": "dotprod+bf16"}
Run = Callable[..., bytes]


def native(product: str, work: Path) -> Run:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    machine = platform.machine().replace("arm64", "aarch64")
    feature, flags = NATIVE.get((machine, product), (f"{product} here", []))
    if feature not in umfa._ext.cpu_features():
        pytest.skip(f"this CPU has no {feature}")
    program = work / "unit_product"
    subprocess.run(
        [
            *compiler.split(),
            *("-std=c++20", "-O3", "-w", f"-DPRODUCT={product}", *flags),
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


def emulated(product: str, work: Path) -> Run:
    arm64.qemu()
    flags = (*arm64.KERNEL_FLAGS, f"-mcpu=generic+{ZIG[product]}", f"-DPRODUCT={product}")
    arm64.zig(*flags, "-Wno-unused", "-c", SOURCE, "-o", work / "unit_product.o")
    arm64.zig(work / "unit_product.o", "-o", work / "unit_product")
    return functools.partial(arm64.run, work / "unit_product")


@pytest.fixture(
    scope="module",
    params=[(native, "DOT"), (emulated, "DOT"), (emulated, "SMMLA"), (emulated, "BFMMLA")],
    ids=["native-dot", "arm64-dot", "arm64-smmla", "arm64-bfmmla"],
)
def product(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Run]:
    where, name = request.param
    return name, where(name, tmp_path_factory.mktemp("units"))


@pytest.mark.parametrize("depth", [1, 2, 33, 128])
@pytest.mark.parametrize("extreme", [False, True])
def test_sums_are_exact(depth: int, extreme: bool, product: tuple[str, Run]) -> None:
    name, run = product
    rows, lanes, unit_bytes, offset = map(int, run("shape").split())
    floats = name == "BFMMLA"
    elements = unit_bytes // (2 if floats else 1)
    low, high = -128, 127
    rng = np.random.default_rng(depth)
    a = rng.integers(low, high + 1, (rows, depth, elements))
    b = rng.integers(low, high + 1, (lanes, depth, elements))
    if extreme:
        a, b = (np.where(x < 0, low, high) for x in (a, b))
        a[0], b[:2] = low, low
        b[1] = high

    def panel(x: np.ndarray) -> bytes:
        """Units of a step side by side."""
        x = x.transpose(1, 0, 2)
        return x.astype(ml_dtypes.bfloat16 if floats else np.uint8).tobytes()

    got = run(str(depth), stdin=panel(a) + panel(b + offset))
    sums = np.frombuffer(got, np.float32 if floats else np.int32).reshape(rows, lanes)
    want = np.einsum("mki,nki->mn", a, b)
    np.testing.assert_array_equal(sums - offset * a.sum((1, 2))[:, None], want)
