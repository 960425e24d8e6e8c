"""What a kernel reads that it did not write is NaN, whatever the type that carries it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tools.emulator.emulator_kernels import library, run
from tools.metal.emulator import Options

HEAD = """
    struct Pair { uint a; uchar b; uint c; };
    struct Half { uint a; uint b; Half(uint x) : a(x) {} };
    template <typename T> void some(thread T& x, uint n) { if (n > 1000) x = T(1); }
    void some(thread Pair& x, uint n) { if (n > 1000) x.a = x.b = x.c = 1; }
    template <typename T, int N>
    void some(thread T (&x)[N], uint n) { if (n > 1000) x[n % N] = T(1); }
"""
WHOLE = 0xFFFFFFFF


BODIES = [
    ("uint x; some(x, n); *out = x;", WHOLE),
    ("int x; some(x, n); *out = as_type<uint>(x);", WHOLE),
    ("ushort x; some(x, n); *out = x;", 0xFFFF),
    ("uchar x; some(x, n); *out = x;", 0xFF),
    ("ulong x; some(x, n); *out = uint(x >> 32);", WHOLE),
    ("uint4 x; some(x, n); *out = x.z;", WHOLE),
    ("uchar4 x; some(x, n); *out = as_type<uint>(x);", WHOLE),
    ("uint x[5]; some(x, n); *out = x[t % 5];", WHOLE),
    ("uint4 x[3]; some(x, n); *out = x[t % 3].y;", WHOLE),
    ("Pair x; some(x, n); *out = x.a & x.c & (x.b | 0xffffff00u);", WHOLE),
    ("Pair x[2]; for (int i = 0; i < 2; i++) some(x[i], n); *out = x[t % 2].c;", WHOLE),
    ("Half x(t); *out = x.b;", WHOLE),
    ("half x; some(x, n); *out = as_type<ushort>(x);", 0xFFFF),
    ("float x; some(x, n); *out = as_type<uint>(x);", WHOLE),
    ("threadgroup uint x[32]; *out = x[t];", WHOLE),
    # What is written partly is not touched otherwise.
    ("Pair x = {7}; some(x, n); *out = x.a + x.b + x.c;", 7),
    ("uint x = 0xAAAAAAAAu; some(x, n); *out = x;", 0xAAAAAAAA),
]


def test_registers_without_a_value() -> None:
    blocks = [f"    {{ {body} out += 32; }}" for body, _ in BODIES]
    out = np.zeros((len(BODIES), 32), np.uint32)
    run(
        HEAD
        + """kernel void f(device uint* all [[buffer(0)]], constant uint& n [[buffer(1)]],
                           uint t [[thread_index_in_threadgroup]]) {
            device uint* out = all + t;\n"""
        + "\n".join(blocks)
        + "\n}",
        {0: out, 1: np.uint32(5).tobytes()},
        options=Options(checks={"uninitialised": False}),
    )
    for (body, expected), found in zip(BODIES, out, strict=True):
        assert (found == expected).all(), (body, hex(found[0]))


STAGING = """kernel void f(device const half* in [[buffer(0)]], device half* out [[buffer(1)]],
                           constant uint& rows [[buffer(2)]],
                           uint t [[thread_index_in_threadgroup]]) {
    threadgroup half tile[32 * 8];
    uint4 words[1];
    for (int step = 0; step < 1; step++) {
        words[step] = uint4(0u);
        if (t < rows) words[step] = *reinterpret_cast<device const uint4*>(in + t * 8);
    }
    for (int step = 0; step < 1; step++)
        *reinterpret_cast<threadgroup uint4*>(tile + t * 8) = words[step];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    half total = 0.0h;
    for (uint i = 0; i < 32; i++) total += tile[i * 8 + t % 8];
    out[t] = total;
}"""


@pytest.mark.parametrize("cleared", [True, False])
def test_integers_that_carry_halves(cleared: bool) -> None:
    """As umfa's tiles are staged: sixteen bytes at a time, and zeros past the last row."""
    text = STAGING if cleared else STAGING.replace("words[step] = uint4(0u);", "")
    out = np.zeros(32, np.float16)
    rows = np.full((9, 8), 0.5, np.float16)
    library(text).dispatch("f", 1, 32, {0: rows, 1: out, 2: np.uint32(9).tobytes()})
    if cleared:
        assert (out == 4.5).all()
    else:
        assert np.isnan(out).all()
