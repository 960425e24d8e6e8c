"""What the loops over keys cost beside their products, in optimised code."""

from __future__ import annotations

import re

import pytest

from tests.metal.test_traffic import DOCUMENT
from tools.metal.ptx.loops import CASES, LoopCounts, tile_loop_of, tile_loop_of_case

GUARDED = """
define dso_local ptx_kernel void @kernel(ptr addrspace(1) noalias %v0, ptr addrspace(1) %v1) {
  %v2 = tail call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %v3 = load i64, ptr addrspace(1) %v1, align 8
  %v4 = zext nneg i32 %v2 to i64
  br label %v5

v5:
  %v6 = phi i64 [ 0, %2 ], [ %v20, %v15 ]
  %v7 = trunc i64 %v6 to i32
  %v8 = icmp CONDITION
  br i1 %v8, label %v9, label %v15

v9:
  %v10 = mul nsw i64 %v3, %v6
  %v11 = mul nsw i64 %v4, 24
  %v12 = mul nsw i64 %v4, %v4
  %v13 = getelementptr i8, ptr addrspace(1) %v0, i64 %v10
  %v14 = load i32, ptr addrspace(1) %v13, align 4
  br label %v15

v15:
  %v16 = phi i32 [ 0, %v5 ], [ %v14, %v9 ]
  %v17 = load i32, ptr addrspace(1) %v1, align 4
  %v18 = sdiv i32 %v16, %v17
  %v19 = tail call i32 asm "mma.sync", "=r,r"(i32 %v18)
  %v20 = add i64 %v6, 1
  %v21 = icmp eq i64 %v20, 9
  br i1 %v21, label %v22, label %v5

v22:
  ret void
}
"""


@pytest.mark.parametrize(
    ("condition", "conditional"), [("ult i32 %v2, %v7", 1), ("ult i32 %v7, 5", 0)]
)
def test_loads_that_some_threads_make_are_counted(condition: str, conditional: int) -> None:
    """A branch that all threads take alike is none of these."""
    ir = GUARDED.replace("CONDITION", condition)
    assert tile_loop_of(ir) == LoopCounts(4, 4 * conditional, late=0, products=1, divisions=1)


STATED = re.findall(
    r"^\| ([fd]\w+, D = .*?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| .* \|$",
    DOCUMENT.read_text(),
    re.MULTILINE,
)


def test_the_document_has_every_case() -> None:
    assert [row[0] for row in STATED] == list(CASES)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        pytest.param(row[0], row[1:], marks=pytest.mark.slow if n % 4 else ())
        for n, row in enumerate(STATED)
    ],
)
def test_kernels_cost_what_is_stated(name: str, cells: tuple[str, ...]) -> None:
    assert tile_loop_of_case(CASES[name]) == LoopCounts(*map(int, cells))
