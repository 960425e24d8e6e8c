"""Long calls in several command buffers: the same bits, and an error that says which one failed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import umfa
from tests.checks import assert_same_bits
from tests.metal.host import test_encode  # the C interface's helpers
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

TIMEOUT = 2


def tensors(seqlen_q: int = 100) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    lengths = (seqlen_q, 700, 700)
    return tuple(rng.standard_normal((2, n, 2, 32), np.float32) for n in lengths)


def buffers_of(call: Any) -> int:
    before = umfa.stats().command_buffers
    call()
    return umfa.stats().command_buffers - before


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("seqlen_q", [100, 1], ids=["forward", "decode"])
def test_command_buffers_give_the_same_bits(
    seqlen_q: int, shuffle: int, emulated: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.set_machine(shuffle=shuffle)
    q, k, v = tensors(seqlen_q)
    whole = umfa.flash_attn_func(q, k, v, backend="metal")
    found = []
    for milliseconds in ("0.03" if seqlen_q > 8 else "0.01", "0.000001"):
        monkeypatch.setenv("UMFA_METAL_SLICE_MS", milliseconds)
        found.append(
            buffers_of(
                lambda: assert_same_bits(umfa.flash_attn_func(q, k, v, backend="metal"), whole)
            )
        )
    assert 1 < found[0] < found[1]


def test_small_calls_take_one_command_buffer(double: Double) -> None:
    for seqlen_q in (1, 100):
        q, k, v = tensors(seqlen_q)
        assert buffers_of(lambda: umfa.flash_attn_func(q, k, v, backend="metal")) == 1  # noqa: B023


@pytest.mark.parametrize("failing", [0, 2, 5])
def test_the_slice_that_fails_is_named(
    failing: int, double: Double, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", "0.000001")
    q, k, v = tensors()  # 4 blocks of queries, 2 heads, 2 indices of the batch
    double.fault("execution", skip=failing, value=TIMEOUT)
    x, y, z = failing % 4, failing // 4 % 2, 0
    with pytest.raises(
        RuntimeError,
        match=rf"^\[umfa.flash_attn_func\] the GPU did not finish in time in its slices "
        rf"{failing + 1} \(forward_f32_d32_v32_k32, threadgroups \({x}, {y}, {z}\) to "
        rf"\({x + 1}, {y + 1}, {z + 1}\)\) of 16; got Caused GPU Timeout Error .*; expected a",
    ):
        umfa.flash_attn_func(q, k, v, backend="metal")
    assert len(recorder.dispatches) <= failing + 2, "what follows is not started"
    double.library.umfa_double_clear_faults()
    assert buffers_of(lambda: umfa.flash_attn_func(q, k, v, backend="metal")) == 16


@pytest.mark.parametrize("fault", ["command_buffer", "encoder"])
def test_nothing_runs_on_after_an_error(
    fault: str, double: Double, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller may free the tensors as soon as the call has failed."""
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", "0.000001")
    q, k, v = tensors()
    double.fault(fault, skip=3)
    with pytest.raises(RuntimeError, match=r"Metal made no command"):
        umfa.flash_attn_func(q, k, v, backend="metal")
    assert len(recorder.dispatches) == 3, "those before it have ended"


def test_a_callers_command_buffer_holds_all_slices(
    emulated: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors()
    whole = umfa.flash_attn_func(q, k, v, backend="metal")
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", "0.000001")
    out = np.full_like(q, np.nan)
    commands = test_encode.Commands(emulated)
    arrays = map(test_encode.host_tensor, (q, k, v, out))
    assert test_encode.encode(test_encode.c_library(), commands.handle, *arrays) == 0
    assert commands.run() == test_encode.COMPLETED
    commands.close()
    assert_same_bits(out, whole)


def test_threads_with_slices(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", "0.000001")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            q, k, v = tensors()
            for _ in range(3):
                umfa.flash_attn_func(q, k, v, backend="metal")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert buffers_of(run) == 4 * 3 * 16
    assert not failures
