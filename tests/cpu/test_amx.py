"""The matrix registers of AMX are given back."""

from __future__ import annotations

import ctypes
import mmap

import ml_dtypes
import pytest

import umfa
from tests.cases import normal
from umfa import _ext

pytestmark = pytest.mark.skipif(
    not dict(_ext.cpu_isas()).get("amx_bf16"), reason="no amx_bf16 on this machine"
)

TILE_CONFIGURATION, TILE_DATA = 1 << 17, 1 << 18


def state_in_use() -> int:
    """Which parts of this thread's registers are not in their initial state (XINUSE)."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(b"\xb9\x01\x00\x00\x00\x0f\x01\xd0\xc3")  # mov ecx, 1; xgetbv; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return int(ctypes.CFUNCTYPE(ctypes.c_uint32)(address)())


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
