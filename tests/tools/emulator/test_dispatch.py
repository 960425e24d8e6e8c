"""What a dispatch is given: sizes, memory, and buffers that share it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tools.metal.emulator import DispatchError, Library

TEXT = """
#include <metal_stdlib>
using namespace metal;
kernel void f(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
              device float* out [[buffer(2)]], threadgroup float* tile [[threadgroup(0)]],
              uint t [[thread_index_in_threadgroup]]) {
    tile[t] = a[0] + b[0];
    out[t] = tile[t];
}"""


def run(**changes: Any) -> None:
    arguments = {
        "threadgroups": 1,
        "threads": 4,
        "buffers": {
            0: np.ones(8, np.float32),
            1: np.ones(8, np.float32),
            2: np.ones(4, np.float32),
        },
        "threadgroup_memory": {0: 16},
    } | changes
    Library(TEXT).dispatch("f", **arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    run(threadgroups=np.int64(1), threads=(np.int32(4), 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 4.0}, "threads must be an integer; got 4.0"),
        ({"threads": 0}, "threads must be one to three positive numbers; got 0"),
        ({"threads": -4}, "threads must be at least 0 .*; got -4"),
        ({"threads": (1, 1, 1, 1)}, "threads must be one to three"),
        ({"threadgroups": 2**32 + 1}, "threadgroups must be .* below 4294967296; got 4294967297"),
        ({"threadgroup_memory": {0: -16}}, "threadgroup memory 0 must be at least 0 .*; got -16"),
        ({"threadgroup_memory": {0: 20}}, "threadgroup memory 0 has 20 bytes"),
        ({"schedule_seed": -1}, "schedule_seed must be at least 0 .*; got -1"),
        ({"schedule_seed": 2**64}, "schedule_seed must be"),
    ],
    ids=str,
)
def test_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DispatchError, match=message):
        run(**changes)


def test_what_is_written_shares_memory_with_nothing() -> None:
    whole = np.ones(64, np.float32)
    with pytest.raises(DispatchError, match="buffers 0 and 2 overlap"):
        run(buffers={0: whole, 1: np.ones(8, np.float32), 2: whole[40:44]})
    # Also where another buffer lies between the two.
    with pytest.raises(DispatchError, match="buffers 0 and 2 overlap"):
        run(buffers={0: whole, 1: whole[4:8], 2: whole[40:44]})
    run(buffers={0: whole[:40], 1: whole[4:8], 2: whole[40:44]})  # readers may share
