"""Whatever fails becomes one clear exception, and the next call works."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

import umfa
from tests import checks, reference
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

TIMEOUT, PAGE_FAULT, REVOKED, OUT_OF_MEMORY = 2, 3, 4, 8


class Fault(NamedTuple):
    kind: str
    value: int
    exception: type[Exception]
    match: str


FAULTS = [
    Fault("queue", 0, RuntimeError, r"Metal made no command queue; got nil"),
    Fault(
        "library",
        0,
        RuntimeError,
        r"Metal's compiler refused the kernel forward_f32\w*; got injected: program_source:1:1: "
        r"error: expected unqualified-id \(MTLLibraryErrorDomain 3\)",
    ),
    Fault("function", 0, RuntimeError, r"Metal has no kernel forward_f32\w*; got injected"),
    Fault("pipeline", 0, RuntimeError, r"could not build the kernel forward_f32\w*; got injected"),
    Fault(
        "pipeline_memory",
        40960,
        umfa.UnsupportedError,
        r"needs more threadgroup memory than there is; got 40960 bytes; expected at most 32768",
    ),
    Fault(
        "pipeline_threads",
        16,
        umfa.UnsupportedError,
        r"no tile small enough for this GPU; got 32 threads; expected at most 16",
    ),
    Fault("command_buffer", 0, RuntimeError, r"Metal made no command buffer; got nil"),
    Fault("encoder", 0, RuntimeError, r"Metal made no command encoder; got nil"),
    Fault(
        "execution",
        TIMEOUT,
        RuntimeError,
        r"did not finish in time; got Caused GPU Timeout Error \(MTLCommandBufferErrorDomain 2\)",
    ),
    Fault("execution", PAGE_FAULT, RuntimeError, r"accessed memory that it may not"),
    Fault("execution", REVOKED, RuntimeError, r"the system refused the work"),
    Fault("execution", OUT_OF_MEMORY, MemoryError, r"the GPU ran out of memory"),
    Fault(
        "execution", 99, RuntimeError, r"the GPU failed; got .* \(MTLCommandBufferErrorDomain 99"
    ),
]


def call(**options: Any) -> tuple[np.ndarray[Any, Any], float]:
    """A small call, and how far it is from the reference as a share of what is allowed."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 20, 2, 32), np.float32) for _ in range(3))
    out = umfa.flash_attn_func(q, k, v, backend="metal", **options)
    checks.assert_close(
        out.astype(np.float64), reference.attention(q, k, v)[0], checks.BASE["float32"]
    )
    return out, 0.0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.kind}-{f.value}")
def test_fault_then_success(fault: Fault, emulated: Double) -> None:
    # A pipeline that takes 16 threads: so do the smaller ones that umfa then asks for.
    emulated.fault(fault.kind, value=fault.value, count=3 if "threads" in fault.kind else 1)
    with pytest.raises(fault.exception, match=r"^\[umfa.flash_attn_func\] .*" + fault.match):
        call()
    emulated.library.umfa_double_clear_faults()
    if fault.kind.startswith("pipeline_"):
        emulated.set_machine()  # the pipeline is kept, and has what it has
    call()


@pytest.mark.parametrize("failing", ["q", "out"])
def test_no_memory_for_a_copy(failing: str, emulated: Double) -> None:
    emulated.fault("no_copy", count=100)
    emulated.fault("buffer", skip=0 if failing == "q" else 3)
    with pytest.raises(
        MemoryError, match=r"no memory for the GPU's copy of a tensor; got \d+ byte"
    ):
        call()
    emulated.library.umfa_double_clear_faults()
    call()


def test_no_device(double: Double) -> None:
    x = np.zeros((1, 4, 1, 8), np.float32)
    double.set_machine(present=False)
    assert umfa.can_run(x, x, x, backend="metal") == (False, "metal: no Metal device")
    assert umfa.can_run(x, x, x) == (True, "")
    with pytest.raises(umfa.UnsupportedError) as caught:
        umfa.flash_attn_func(x, x, x, backend="metal")
    assert str(caught.value) == (
        "[umfa.flash_attn_func] the backend cannot run this (metal: no Metal device); "
        "got backend 'metal'; expected 'auto', or what that backend supports"
    )
    double.set_machine()
    umfa.flash_attn_func(x, x, x, backend="metal")


def test_a_failure_poisons_its_queue_only(double: Double, recorder: Recorder) -> None:
    x = np.zeros((1, 4, 1, 8), np.float32)
    before = umfa.stats()
    for _ in range(3):
        double.fault("execution", value=PAGE_FAULT)
        with pytest.raises(RuntimeError, match="Address Fault"):
            umfa.flash_attn_func(x, x, x, backend="metal")
        umfa.flash_attn_func(x, x, x, backend="metal")
    assert umfa.stats().queues_replaced - before.queues_replaced == 3
    assert umfa.stats().metal_calls - before.metal_calls == 3, "only those that worked"


def test_the_double_poisons_a_queue(double: Double) -> None:
    """What the test before relies on: without a new queue, nothing would work any more."""
    queue = double.library.umfa_double_new_queue()
    double.fault("execution", value=PAGE_FAULT)
    for _ in range(2):
        commands = double.library.umfa_double_new_command_buffer(queue)
        double.library.umfa_double_commit(commands)
        assert double.library.umfa_double_wait(commands) == 5
        double.library.umfa_double_object_release(commands)
    double.library.umfa_double_object_release(queue)


def test_a_kernel_that_fails_says_so(double: Double, recorder: Recorder) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("planted")

    recorder.run = fail  # type: ignore[method-assign]
    x = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: planted"):
        umfa.flash_attn_func(x, x, x, backend="metal")


@pytest.mark.parametrize(("limit", "threads"), [(64, 64), (96, 64), (32, 32)])
def test_a_smaller_tile_where_the_pipeline_takes_fewer_threads(
    limit: int, threads: int, emulated: Double
) -> None:
    emulated.set_machine(max_threads=limit)
    before = umfa.stats()
    call()
    assert umfa.stats().pipelines - before.pipelines == 2, "the usual one, and the one that fits"
    call()
    assert umfa.stats().pipelines - before.pipelines == 2, "both are kept"


def test_leaks_and_misuse_would_show(double: Double) -> None:
    """The checks at the end of each of these tests can fail."""
    buffer = double.library.umfa_double_new_buffer(16)
    count, alive = double.live(patience=0.05)
    assert count == 2
    assert "UMFABuffer: 1" in alive
    double.library.umfa_double_object_release(buffer)
    assert double.live()[0] == 0
    assert double.library.umfa_double_new_buffer(0) is None
    assert double.violations() == (1, "newBufferWithLength: zero bytes\n")
