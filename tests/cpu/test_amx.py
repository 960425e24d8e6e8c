"""The registers of AMX: their double, how the system grants them, and that they are given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests.array_libraries import Array
from tests.cases import normal
from tests.cpu.test_kernel_math import FLAGS, ROOT
from umfa import _ext

HERE = Path(__file__).parent
ON_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
HAS_TILES = "amx_bf16" in _ext.cpu_features()
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="no amx_bf16 on this machine")
needs_avx512 = pytest.mark.skipif(
    "avx512_bf16" not in _ext.cpu_features(), reason="no avx512_bf16 on this machine"
)


def products(folder: Path, double: bool, tiles: Array) -> Array:
    """C + A B of each (A, B, C), by the CPU or by the double."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / ("double" if double else "tiles")
    own = ["-DUMFA_AMX_DOUBLE", "-iquote", str(HERE / "amx_double")] if double else []
    command = [*compiler.split(), "-std=c++20", "-O2", "-w", *FLAGS["avx512_bf16"], *own]
    source = str(HERE / "amx_product.cpp")
    subprocess.run([*command, f"-I{ROOT / 'src'}", source, "-o", str(program)], check=True)
    out = subprocess.run([program], input=tiles.tobytes(), stdout=subprocess.PIPE, check=True)
    return np.frombuffer(out.stdout, np.float32).reshape(len(tiles), 16, 16)


def pairs(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).view(np.uint32)


@needs_avx512
def test_the_double_multiplies(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((5, 16, 32)).astype(ml_dtypes.bfloat16) for _ in range(2))
    c = random.standard_normal((5, 16, 16)).astype(np.float32)
    tiles = np.stack([a.view(np.uint32), b.view(np.uint32), c.view(np.uint32)], axis=1)
    # B has a row for each pair of A's columns, and pairs along it.
    columns = b.astype(np.float64).reshape(5, 16, 16, 2).transpose(0, 1, 3, 2).reshape(5, 32, 16)
    expected = a.astype(np.float64) @ columns + c
    found = products(tmp_path, True, tiles)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@needs_tiles
def test_the_double_rounds_as_the_tiles_do(tmp_path: Path) -> None:
    """The same bits, for every kind of number; any NaN is as good as another."""
    random = np.random.default_rng(1)
    any_bits = random.integers(0, 1 << 32, (200, 3, 16, 16), dtype=np.uint32)
    sizes = np.exp2(random.integers(-70, 60, (200, 2, 16, 32)).astype(np.float32))
    finite = random.standard_normal(sizes.shape).astype(np.float32) * sizes
    sums = random.standard_normal((200, 1, 16, 16)).astype(np.float32) * 1e-38
    tiny = np.concatenate([pairs(finite), sums.view(np.uint32)], axis=1)
    for tiles in (any_bits, tiny):
        found, expected = (products(tmp_path, double, tiles) for double in (True, False))
        nan = np.isnan(expected)
        assert not nan.all()
        np.testing.assert_array_equal(np.isnan(found), nan)
        np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


REFUSE = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)  # too small a signal stack for 8 KiB of tiles
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from umfa import _ext
print(_ext.cpu_isa(), dict(_ext.cpu_isas())["amx_bf16"])
"""


@pytest.mark.skipif(
    not ON_LINUX or not HAS_TILES or "amx_bf16" not in dict(_ext.cpu_isas()),
    reason="Linux grants the registers of a CPU with AMX on request",
)
def test_without_permission_another_set_runs() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "UMFA_CPU_ISA"}
    command = [sys.executable, "-c", REFUSE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    isa, usable = done.stdout.split()
    pays = _ext.cpu_peak("bfloat16", "avx512_bf16") > _ext.cpu_peak("float32", "avx512")
    assert (isa, usable) == ("avx512_bf16" if pays else "avx512", "False")
    environment["UMFA_CPU_ISA"] = "amx_bf16"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    reason = "names an instruction set whose registers the system refuses (No space left on device)"
    assert f"UMFA_CPU_ISA {reason}; got 'amx_bf16'; expected one of auto, avx512" in done.stderr


TILE_CONFIGURATION, TILE_DATA = 1 << 17, 1 << 18


def state_in_use() -> int:
    """Which parts of this thread's registers are not in their initial state (XINUSE)."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(b"\xb9\x01\x00\x00\x00\x0f\x01\xd0\xc3")  # mov ecx, 1; xgetbv; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return int(ctypes.CFUNCTYPE(ctypes.c_uint32)(address)())


@pytest.mark.skipif(
    not HAS_TILES or not dict(_ext.cpu_isas()).get("amx_bf16"), reason="no amx_bf16 on this machine"
)
@pytest.mark.cpu_only
def test_no_tile_is_left_in_use() -> None:
    umfa.set_num_threads(1)  # the caller computes
    _ext.set_cpu_isa("amx_bf16")
    q = normal((1, 64, 1, 32), "float32", seed=0).astype(ml_dtypes.bfloat16)
    for n in (64, 1):
        umfa.flash_attn_func(q[:, :n], q, q)
    _ext.cpu_peak("bfloat16", "amx_bf16")
    used = state_in_use()
    assert used & 0b110, "SSE and AVX are always in use: XINUSE was read wrongly"
    assert not used & (TILE_CONFIGURATION | TILE_DATA)
