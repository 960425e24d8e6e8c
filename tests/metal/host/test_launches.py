"""Plans of several launches: their order, and the memory between them."""

from __future__ import annotations

import re

import numpy as np
import pytest

import umfa
from tests import checks, reference
from tests.metal.host import test_encode  # the C interface's helpers
from tools.metal.double import Double, Kernel
from tools.metal.double.gpus import Array, Recorder


def decode(seqlen: int = 4096, heads: int = 4) -> None:
    """One query over many keys, which are split among threadgroups, and the parts merged."""
    rng = np.random.default_rng(4)
    q = rng.standard_normal((1, 1, heads, 64), np.float32)
    k, v = (rng.standard_normal((1, seqlen, heads, 64), np.float32) for _ in range(2))
    out = umfa.flash_attn_func(q, k, v, backend="metal")
    checks.assert_close(
        out.astype(np.float64), reference.attention(q, k, v)[0], checks.BASE["float32"]
    )


@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_a_launch_sees_what_those_before_it_wrote(shuffle: int, emulated: Double) -> None:
    """The double runs launches without a barrier between them backwards, or shuffled."""
    emulated.set_machine(shuffle=shuffle)
    decode()


def scratch_of(kernel: Kernel, arrays: list[Array]) -> set[int]:
    """Where the buffers of a dispatch begin that hold none of the caller's tensors."""
    return {
        b.data
        for b in kernel.buffers.values()
        if not b.is_bytes
        and not any(b.data <= array.ctypes.data < b.data + b.length for array in arrays)
    }


def test_scratch_is_used_again(double: Double, recorder: Recorder) -> None:
    x, long = np.zeros((1, 1, 4, 64), np.float32), np.zeros((1, 4096, 4, 64), np.float32)
    seen = []
    for _ in range(3):
        out = umfa.flash_attn_func(x, long, long, backend="metal")
        first, second = (scratch_of(k, [x, long, out]) for k in recorder.dispatches[-2:])
        assert first == second, "what one launch writes, the next reads"
        seen.append(first)
    assert len(seen[0]) == 2, "partial results, and their states"
    assert seen[0] == seen[1] == seen[2]


def test_calls_at_the_same_time_do_not_share_scratch(double: Double, recorder: Recorder) -> None:
    """Recorded in one command buffer, two calls hold their scratch until it has completed."""
    x, long = np.zeros((1, 1, 4, 64), np.float32), np.zeros((1, 4096, 4, 64), np.float32)
    outs = [np.zeros((1, 1, 4, 64), np.float32) for _ in range(2)]
    commands = test_encode.Commands(double)
    for out in outs:
        tensors = map(test_encode.host_tensor, (x, long, long, out))
        assert test_encode.encode(test_encode.c_library(), commands.handle, *tensors) == 0
    assert commands.run() == test_encode.COMPLETED
    commands.close()
    assert len(recorder.dispatches) == 4
    pieces = [scratch_of(kernel, [x, long, *outs]) for kernel in recorder.dispatches]
    assert [len(p) for p in pieces] == [2, 2, 2, 2]
    assert pieces[0] == pieces[1]
    assert pieces[2] == pieces[3]
    assert not pieces[0] & pieces[2]


@pytest.mark.parametrize("limit", [128, 64])
def test_fewer_threads_for_every_launch(limit: int, emulated: Double) -> None:
    emulated.set_machine(max_threads=limit)
    decode()


@pytest.mark.parametrize("short", [0, 1], ids=["the first launch", "the launch that merges"])
def test_fewer_threads_for_one_launch_of_two(short: int, emulated: Double) -> None:
    """Apple's compiler spends registers by kernel: only one of a plan's may take fewer threads."""
    emulated.fault("pipeline_threads", skip=short, value=64)
    before = umfa.stats()
    decode()
    after = umfa.stats()
    assert after.command_buffers - before.command_buffers == 1
    assert after.pipelines - before.pipelines == 3 + short, "planned twice"
    decode()


def test_no_tile_small_enough(emulated: Double) -> None:
    emulated.set_machine(max_threads=32)
    with pytest.raises(
        umfa.UnsupportedError,
        match=re.escape("no tile small enough for this GPU; got 64 threads; expected at most 32"),
    ):
        decode()


def test_no_memory_for_scratch(emulated: Double) -> None:
    emulated.fault("buffer", skip=1)
    with pytest.raises(MemoryError, match=r"no memory for the GPU's intermediate results; got"):
        decode()
    emulated.library.umfa_double_clear_faults()
    decode()
