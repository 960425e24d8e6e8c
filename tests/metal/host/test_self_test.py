"""The self-test of a GPU: it excludes faulty kernel families with a reason, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests import quantization
from tests.checks import BASE, assert_close
from tests.metal import emulated as emulated_gpu
from tests.metal import test_quantize_kernel as quantize_kernel
from tests.metal.backward_calls import Call
from tests.metal.host.test_encode import c_library, encode
from tests.metal.metal_tensors import MetalTensor
from tests.metal.test_plan_backward import plan as backward_plan
from tests.metal.test_plan_forward import plan, plan_of
from tests.quantization import Format
from tests.reference import attention
from tools.metal import double as metal_double
from tools.metal.double import Double, Kernel
from tools.metal.double.gpus import Emulator, Recorder, memory
from tools.metal.emulator import Options
from umfa import _ext
from umfa.cli import env

ROOT = Path(__file__).parents[3]
QUERY_KIND = 22  # the constant of shaders/shared/constants.h
OUT = 3  # the buffer of out, of forward and decode
OUT_OF_DKV = 10  # of dk
LARGE = (1, 512, 4, 64)
TIMEOUT = 2
NARROW = {
    *("forward_f16_d64", "rotary_f16", "dropout_f16", "scores_f16", "sequences_f16"),
    "codes_f16",
}
"""Families tested with a head dim of 64."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache folder for umfa; the emulator keeps its own."""
    monkeypatch.setenv(metal_double.CACHES, str(tmp_path))
    return tmp_path


Machine = Callable[..., AbstractContextManager[Double]]


@pytest.fixture
def emulated() -> Machine:
    """Makes a machine with an emulated GPU, which a test may make faulty."""
    return lambda gpu=None, mode="1": metal_double.machine(gpu or Emulator(), mode)


@pytest.fixture
def recorded(recorder: Recorder) -> Iterator[Double]:
    """A GPU that computes nothing: a fast self-test in which every result is NaN."""
    with metal_double.machine(recorder, "1") as machine:
        yield machine


class Planted(Emulator):
    """An emulated GPU with a fault planted after one kernel."""

    def __init__(self, kernel: str, run: Callable[[Kernel], None]) -> None:
        super().__init__()
        self.kernel, self.planted = kernel, run
        self.names: list[str] = []

    def run(self, kernel: Kernel) -> None:
        self.names.append(kernel.name)
        super().run(kernel)
        if kernel.name.startswith(self.kernel):
            self.planted(kernel)


def negate_first(kernel: Kernel) -> None:
    """Flips the sign of the first 16-bit number of out."""
    bound = kernel.buffers[OUT]
    memory(bound)[bound.offset + 1] ^= 0x80


def half(*shape: int) -> Any:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float16)


def one(dtype: str = "float16") -> umfa.SelfTest:
    (found,) = [test for test in umfa.self_test() if test.dtype == dtype]
    return found


def excluded(test: umfa.SelfTest) -> dict[str, str]:
    return {family: fault for family, fault in test.faults.items() if fault}


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("umfa/*.txt"))


def forget(double: Double) -> None:
    """Drops the host's state, as if the process were new."""
    double.library.umfa_double_release()


# ---- what it finds ------------------------------------------------------------------------------


def test_a_sound_gpu_passes_and_is_not_tested_again(emulated: Machine, cache: Path) -> None:
    gpu = Planted("none", negate_first)
    q, k, v = half(1, 40, 2, 48), half(1, 40, 2, 48), half(1, 40, 2, 48)
    with emulated(gpu) as double:
        before = umfa.stats()
        assert umfa.can_run(q, k, v, backend="metal") == (True, "")
        assert umfa.stats().metal_calls == before.metal_calls
        launches = len(gpu.names)
        assert {"lanes_f16", "append_f16", "decode_merge_f16_d128"} <= set(gpu.names)
        out = umfa.flash_attn_func(q, k, v, backend="metal")
        expected = attention(q, k, v)[0]
        assert_close(out.astype(np.float64), expected, BASE["float16"])
        assert len(gpu.names) == launches + 1, "what is trusted is not tested again"
        (file,) = files(cache)
        forget(double)
        assert "float16" in {test.dtype for test in _known()}
        assert umfa.can_run(q, k, v, backend="metal") == (True, "")
        assert len(gpu.names) == launches + 1, "a later process reads the outcome"
        (test,) = _known()
    assert test.passed
    assert test.pipelines == 54
    assert test.device == "Apple M1, applegpu_g13g, Apple7"
    assert test.when.endswith("Z")
    assert test.kept == str(file)
    assert next(iter(test.faults)) == "lanes_f16"


def _known() -> list[umfa.SelfTest]:
    return [umfa.SelfTest(**report) for report in _ext.self_tests(run=False)]


def test_a_wrong_kernel_is_excluded_and_the_rest_goes_on(emulated: Machine) -> None:
    gpu = Planted("forward_f16_d64", negate_first)
    narrow, wide = half(*LARGE), half(1, 512, 4, 128)
    one_query = half(1, 1, 4, 64)
    with emulated(gpu):
        possible, reason = umfa.can_run(narrow, narrow, narrow, backend="metal")
        assert not possible
        assert reason.startswith(
            "metal: the self-test of this GPU excludes forward_f16_d64: out[0] is "
        )
        assert reason.endswith("on the CPU")
        assert umfa.backends()[0].available
        assert "excludes forward_f16_d64: out[0] is" in umfa.backends()[0].reason
        with pytest.raises(umfa.UnsupportedError, match=r"excludes forward_f16_d64: out\[0\] is"):
            umfa.flash_attn_func(narrow, narrow, narrow, backend="metal")
        before = umfa.stats()
        out = umfa.flash_attn_func(narrow, narrow, narrow)
        assert umfa.stats().cpu_calls - before.cpu_calls == 1
        assert_close(out.astype(np.float64), attention(narrow, narrow, narrow)[0], BASE["float16"])
        umfa.flash_attn_func(wide, wide, wide)
        umfa.flash_attn_func(one_query, narrow, narrow, backend="metal")
        assert umfa.stats().metal_calls - before.metal_calls == 2
        faults = excluded(_known()[0])
    # Families whose cases need the faulty kernel are excluded too.
    assert set(faults) == NARROW
    assert faults["rotary_f16"] == f"forward_f16_d64: {faults['forward_f16_d64']}"


@pytest.mark.parametrize(
    ("kernel", "out", "family"),
    [
        ("decode_f16_d256", 3, "decode_f16_d256"),
        ("decode_vector_f16", 3, "decode_vector_f16_d128"),
        ("decode_merge_f16", 2, "decode_merge_f16"),
        ("append_f16", 1, "append_f16"),
        ("clear_f16", 0, "clear_f16"),
        ("combine_f16", 3, "combine_f16"),
        ("quantize_f16", 3, "quantize_f16"),
        ("quantize_gathered_f16", 2, "quantize_f16"),
        ("dequantize_f16", 3, "dequantize_f16"),
        pytest.param("append_f16", 0, "append_f16", marks=pytest.mark.slow),
        pytest.param("clear_f16", 1, "clear_f16", marks=pytest.mark.slow),
        pytest.param("combine_f16", 2, "combine_f16", marks=pytest.mark.slow),
    ],
)
def test_one_wrong_number_excludes_any_family(
    kernel: str, out: int, family: str, emulated: Machine
) -> None:
    def spoil(dispatch: Kernel) -> None:
        bound = dispatch.buffers[out]
        memory(bound)[bound.offset + 1] ^= 0x52

    with emulated(Planted(kernel, spoil)):
        faults = excluded(one_after_can_run())
    # Packed heads split their keys, and so do tables on the GPU: they need the merge.
    needing = {"packed_f16", "tables"} if family == "decode_merge_f16" else set()
    assert set(faults) == {family} | needing


def test_a_wrong_map_of_lanes_excludes_kernels_with_matrices(emulated: Machine) -> None:
    with emulated(Emulator(Options(permute_lanes=True))):
        test = one()
        x = half(*LARGE)
        assert "lanes_f16: lane " in umfa.can_run(x, x, x, backend="metal")[1]
        merged, _ = umfa.flash_attn_combine(
            half(2, 1, 3, 2, 16), np.zeros((2, 1, 3, 2), np.float32), backend="metal"
        )
        assert merged.shape == (1, 3, 2, 16)
    faults = excluded(test)
    without = {
        *("clear_f16", "append_f16", "combine_f16", "decode_vector_f16_d128", "row_sums_f16"),
        *("quantize_f16", "dequantize_f16"),
    }
    assert set(test.faults) - set(faults) == without
    assert all("does not hold element" in fault for fault in faults.values())


def test_nan_is_a_fault(recorded: Double) -> None:
    test = one()
    assert "lane 0 does not hold element (0, 0)" in test.faults["lanes_f16"]
    for family in ("clear_f16", "combine_f16"):
        assert "out[0] is nan, and" in test.faults[family]
    assert all(test.faults.values())


FAULTS = {
    ("execution", TIMEOUT): "the GPU did not finish in time; got Caused GPU Timeout Error",
    ("pipeline", 0): "Metal could not build the kernel forward_f16_d64",
    ("library", 0): "Metal's compiler refused the kernel forward_f16_d64",
    ("pipeline_memory", 40960): "needs more threadgroup memory than there is; got 40960 bytes",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_what_fails_is_excluded(fault: tuple[str, int], emulated: Machine) -> None:
    kind, value = fault
    with emulated() as double:
        double.fault(kind, skip=1, value=value)  # after the lane map
        x = half(1, 20, 2, 32)
        assert FAULTS[fault] in umfa.can_run(x, x, x, backend="metal")[1]
        test = _known()[0]
        double.library.umfa_double_clear_faults()
    assert set(excluded(test)) == NARROW


def test_a_pipeline_for_too_few_threads_is_excluded(emulated: Machine) -> None:
    with emulated() as double:
        double.fault("pipeline_threads", skip=1, count=3, value=16)
        test = one_after_can_run()
        double.library.umfa_double_clear_faults()
    assert "no tile small enough for this GPU" in test.faults["forward_f16_d64"]
    assert not test.faults["forward_f16_d128"]


def one_after_can_run() -> umfa.SelfTest:
    x = half(1, 20, 2, 32)
    umfa.can_run(x, x, x, backend="metal")
    (test,) = _known()
    return test


class Hangs(Emulator):
    """The given kernels hang until the test sets `free`; the others write nothing, fast."""

    def __init__(self, *kernels: str) -> None:
        super().__init__()
        self.kernels, self.free = kernels, threading.Event()

    def run(self, kernel: Kernel) -> None:
        if kernel.name.startswith(self.kernels):
            self.free.wait()
        elif kernel.name.startswith("lanes"):
            super().run(kernel)


@pytest.mark.parametrize(
    "hanging",
    [
        ("decode_f16_d256",),
        pytest.param(("forward_f16_d64", "forward_f16_d128"), marks=pytest.mark.slow),
    ],
)
def test_what_hangs_is_excluded(hanging: tuple[str, ...], emulated: Machine) -> None:
    gpu = Hangs(*hanging)
    with emulated(gpu, "force") as double:
        gpu.free.set()
        one_after_can_run()  # compiles everything
        gpu.free.clear()
        forget(double)
        double.self_test_patience(2)
        try:
            test = one_after_can_run()
        finally:
            gpu.free.set()
    hung = "the GPU did not finish the test within 2 s"
    assert {family for family, fault in test.faults.items() if fault == hung} == set(hanging)
    if len(hanging) == 1:
        assert "nan" in test.faults["combine_f16"], "another queue runs the others"
    else:
        assert test.faults["combine_f16"] == "not tested, since other kernels hang"


def test_a_failed_allocation_is_not_kept(recorded: Double, cache: Path) -> None:
    recorded.fault("execution", value=8)  # out of memory
    test = one_after_can_run()
    assert "the GPU ran out of memory" in test.faults["lanes_f16"]
    assert test.not_kept == "there was not enough memory for the test"
    assert files(cache) == []


def test_tensors_on_the_gpu_are_refused_with_the_reason(recorded: Double) -> None:
    x = MetalTensor(recorded, half(*LARGE))
    with pytest.raises(
        umfa.UnsupportedError, match=r"metal: the self-test .* lanes_f16: .*; cpu: the tensors are"
    ):
        umfa.flash_attn_func(x, x, x)


def test_the_c_interface_refuses_with_the_reason(recorded: Double) -> None:
    x = MetalTensor(recorded, half(1, 4, 2, 16))
    queue = recorded.library.umfa_double_new_queue()
    commands = recorded.library.umfa_double_new_command_buffer(queue)
    library = c_library()
    assert encode(library, commands, x, x, x, x) != 0
    assert b"the self-test of this GPU excludes" in library.umfa_last_error()
    recorded.library.umfa_double_object_release(commands)
    recorded.library.umfa_double_object_release(queue)


# ---- when it runs -------------------------------------------------------------------------------


def test_small_work_on_the_cpu_starts_no_test(recorded: Double, recorder: Recorder) -> None:
    x = np.zeros((1, 8, 1, 16), np.float32)
    umfa.flash_attn_func(x, x, x)
    assert umfa.can_run(x, x, x) == (True, "")
    assert "self-test" not in umfa.backends()[0].reason
    assert recorder.dispatches == []


def test_each_dtype_is_tested_when_it_is_used(recorded: Double, recorder: Recorder) -> None:
    one_after_can_run()
    assert all("f16" in kernel.name for kernel in recorder.dispatches)
    assert [test.dtype for test in umfa.self_test()] == ["float16", "bfloat16", "float32"]


def test_tensors_of_different_dtypes_need_two_tests(recorded: Double) -> None:
    """Float kernels read the tensors; kernels that only write results have the result's dtype."""
    q, k = half(1, 20, 2, 32), half(1, 20, 2, 32).astype(np.float32)
    assert not umfa.can_run(q, k, k, backend="metal")[0]
    assert [test.dtype for test in _known()] == ["float32"], "the first fault is reason enough"
    assert "dtypes_f32" in one("float32").faults


@pytest.mark.slow  # compiles what mixes dtypes: 16 s
def test_a_fault_with_different_dtypes_is_excluded(emulated: Machine) -> None:
    half_kind = 3  # of shaders/shared/constants.h

    def negate_if_mixed(kernel: Kernel) -> None:
        if kernel.constants.get(QUERY_KIND) == half_kind:
            negate_first(kernel)

    q, k = half(1, 20, 2, 32), half(1, 20, 2, 32).astype(np.float32)
    with emulated(Planted("forward_f32_d64", negate_if_mixed)):
        assert "excludes dtypes_f32: out[0] is" in umfa.can_run(q, k, k, backend="metal")[1]
        assert umfa.can_run(k, k, k, backend="metal") == (True, "")
        (test,) = _known()
    assert set(excluded(test)) == {"dtypes_f32"}


@pytest.mark.slow  # compiles the kernels of the whole self-test
def test_gradients_are_refused_where_their_kernels_are_excluded(emulated: Machine) -> None:
    """By the call itself, before anything is computed."""
    torch = pytest.importorskip("torch")

    def spoil(dispatch: Kernel) -> None:
        bound = dispatch.buffers[OUT_OF_DKV]
        memory(bound)[bound.offset + 1] ^= 0x52

    with emulated(Planted("dkv_f16_d576", spoil)):
        q = torch.zeros(1, 4, 2, 264, dtype=torch.float16)
        umfa.flash_attn_func(q, q, q, backend="metal")
        q.requires_grad_()
        with pytest.raises(
            umfa.UnsupportedError,
            match=r"^\[umfa.flash_attn_func\] the gradients cannot be computed \(metal: the "
            r"self-test of this GPU excludes dkv_f16_d576: dk.*\); got backend 'metal'",
        ):
            umfa.flash_attn_func(q, q, q, backend="metal")
        narrow = torch.zeros(1, 4, 2, 64, dtype=torch.float16, requires_grad=True)
        umfa.flash_attn_func(narrow, narrow, narrow, backend="metal").sum().backward()


@pytest.mark.parametrize(
    ("kernel", "out", "family"),
    [("combine_f32_f32", 2, "combine_f32"), ("lanes_f32", 1, "lanes_f32")],
)
@pytest.mark.slow  # compiles the kernels of both dtypes
def test_weights_are_refused_where_their_kernels_are_excluded(
    kernel: str, out: int, family: str, emulated: Machine
) -> None:
    """The matrix of float16 tensors is computed by float kernels, and merged into float16."""

    def spoil(dispatch: Kernel) -> None:
        bound = dispatch.buffers[out]
        memory(bound)[bound.offset + 3] ^= 0x52

    q, k = half(1, 2, 2, 32), half(1, 20, 2, 32)
    options: dict[str, Any] = {"dropout_seed": 1, "return_attn_probs": True}
    with emulated(Planted(kernel, spoil)):
        assert umfa.can_run(q, k, k, 0.5, dropout_seed=1, backend="metal") == (True, "")
        possible, reason = umfa.can_run(q, k, k, 0.5, backend="metal", **options)
        excluded = "metal: for its weights, the self-test of this GPU excludes "
        assert not possible
        assert reason.startswith(excluded)
        assert f"{family}: " in reason
        with pytest.raises(
            umfa.UnsupportedError,
            match=rf"^\[umfa.flash_attn_func\] the backend cannot run this \({excluded}.*\); "
            "got backend 'metal'; expected 'auto', or what that backend supports$",
        ):
            umfa.flash_attn_func(q, k, k, 0.5, backend="metal", **options)
        before = umfa.stats()
        umfa.flash_attn_func(q, k, k, 0.5, **options)
        assert umfa.stats().metal_calls == before.metal_calls


def test_threads_share_one_test(recorded: Double, recorder: Recorder) -> None:
    def look() -> None:
        one_after_can_run()
        for _ in range(200):
            assert len(_known()) == 1, "what one thread reads, another may read at the same time"

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([kernel for kernel in recorder.dispatches if kernel.name == "combine_f16_f16"]) == 1


def test_never(recorder: Recorder, cache: Path) -> None:
    with metal_double.machine(recorder, "0"):
        x = half(*LARGE)
        assert umfa.can_run(x, x, x, backend="metal") == (True, "")
        assert umfa.self_test() == []
        assert recorder.dispatches == []
    assert files(cache) == []


def test_force(recorder: Recorder, cache: Path) -> None:
    with metal_double.machine(recorder, "1") as double:
        one_after_can_run()
        done = len(recorder.dispatches)
        forget(double)
        one_after_can_run()
        assert len(recorder.dispatches) == done
    with metal_double.machine(recorder, "force"):
        one_after_can_run()
        assert len(recorder.dispatches) == 2 * done
        one_after_can_run()
        assert len(recorder.dispatches) == 2 * done, "once a process"
    assert len(files(cache)) == 1


def test_another_value_is_an_error(recorder: Recorder) -> None:
    message = r"UMFA_SELF_TEST is wrong; got 'yes'; expected '0', '1' or 'force'"
    with metal_double.machine(recorder, "yes"):
        x = half(*LARGE)
        with pytest.raises(ValueError, match=message):
            umfa.flash_attn_func(x, x, x)
        with pytest.raises(ValueError, match=message):
            umfa.self_test()
        assert "UMFA_SELF_TEST is wrong" in umfa.can_run(x, x, x, backend="metal")[1]
        assert "UMFA_SELF_TEST is wrong" in umfa.backends()[0].reason
        umfa.flash_attn_func(x, x, x, backend="cpu")


def test_another_value_is_an_error_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMFA_SELF_TEST", "yes")
    with pytest.raises(ValueError, match="UMFA_SELF_TEST is wrong"):
        umfa.self_test()


# ---- what is kept -------------------------------------------------------------------------------


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "another byte": content.replace(b"fault out", b"fault 0ut"),
        "not text": bytes(range(256)),
        "of another key": content.replace(b"Apple7", b"Apple8"),
    }


@pytest.mark.parametrize("how", damaged(b""))
def test_a_damaged_file_is_replaced(
    how: str, recorded: Double, recorder: Recorder, cache: Path
) -> None:
    faults = one_after_can_run().faults
    (file,) = files(cache)
    content = file.read_bytes()
    done = len(recorder.dispatches)
    file.write_bytes(damaged(content)[how])
    assert file.read_bytes() != content
    forget(recorded)
    assert _known() == []
    one_after_can_run()
    assert len(recorder.dispatches) == 2 * done
    forget(recorded)
    (test,) = _known()
    assert test.faults == faults


@pytest.mark.parametrize(
    ("variable", "value"), [("XDG_CACHE_HOME", "/proc/nowhere"), ("HOME", ""), ("HOME", "/proc/x")]
)
def test_without_a_folder_the_test_still_counts(
    variable: str, value: str, recorded: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(variable, value)
    test = one_after_can_run()
    assert all(test.faults.values())
    assert test.kept == ""
    assert test.not_kept == "there is no HOME" if not value else value in test.not_kept


def test_what_the_outcome_depends_on(recorded: Double, cache: Path) -> None:
    one_after_can_run()
    recorded.set_machine(name="Apple M4", architecture="applegpu_g16g", family=9)
    assert _known() == []
    one_after_can_run()
    assert len(files(cache)) == 2
    key = files(cache)[0].read_text().splitlines()[1]
    assert umfa.__version__ in key
    assert os.uname().release in key


# ---- processes ----------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
import numpy as np
import umfa
from tools.metal import double as metal_double
from tools.metal.double.gpus import Recorder
from umfa import _ext

class Gpu(Recorder):
    def run(self, kernel):
        super().run(kernel)
        time.sleep(0.05)
        if kernel.name.startswith(sys.argv[1]):
            os._exit(9)

gpu = Gpu()
with metal_double.machine(gpu, "1"):
    x = np.zeros((1, 20, 2, 32), np.float16)
    umfa.can_run(x, x, x, backend="metal")
    (report,) = _ext.self_tests(run=False)
print(json.dumps([report, len(gpu.dispatches)]))
"""


def child(dies_in: str = "none") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, dies_in],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def outcome_of(process: subprocess.Popen[str]) -> tuple[dict[str, Any], int]:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    report, dispatches = json.loads(text)
    return report, dispatches


def test_two_processes_at_once(recorder: Recorder) -> None:
    metal_double.load()
    found = [outcome_of(process) for process in [child(), child()]]
    assert found[0][0] == found[1][0]
    assert sorted(dispatches > 0 for _, dispatches in found) == [False, True], "one waits"


def end_in(family: str) -> None:
    """A process that ends during the case of a family, as one does that is killed."""
    dying = child(family)
    dying.communicate(timeout=120)
    assert dying.returncode == 9


def test_after_a_process_that_died_the_case_is_tried_again(recorder: Recorder, cache: Path) -> None:
    metal_double.load()
    whole = outcome_of(child())
    (file,) = files(cache)
    file.unlink()
    end_in("clear_f16")
    assert files(cache) == []
    report, dispatches = outcome_of(child())
    assert report["faults"] == whole[0]["faults"], "what it finds counts"
    assert dispatches == whole[1]
    assert report["tried_again"] == ["clear_f16"]
    assert whole[0]["tried_again"] == []
    (journal,) = cache.glob("umfa/*.journal")
    assert journal.read_text() == ""
    assert outcome_of(child("clear_f16")) == (report, 0), "a later process reads the outcome"
    with metal_double.machine(recorder, "1"):
        text = env.rows(env.collect())["self-test"]
    assert "clear_f16 tested again: an earlier process ended during its test" in text


def test_two_processes_that_died_exclude_the_case(recorder: Recorder, cache: Path) -> None:
    metal_double.load()
    end_in("clear_f16")
    end_in("clear_f16")
    assert files(cache) == []
    report, dispatches = outcome_of(child("clear_f16"))
    assert report["faults"]["clear_f16"] == "2 processes in a row did not survive the test"
    assert "nan" in report["faults"]["combine_f16"]
    assert dispatches == 10, (
        "lanes, append, combine, the decode kernel without matrices, dsinks (2), and those of one "
        "format that is quantised (3) and dequantised"
    )
    assert report["tried_again"] == []
    (journal,) = cache.glob("umfa/*.journal")
    assert journal.read_text() == ""
    assert outcome_of(child())[0] == report


def test_deaths_in_different_cases_exclude_none(recorder: Recorder, cache: Path) -> None:
    """A process that survives a case also clears its earlier deaths."""
    metal_double.load()
    for family in ("clear_f16", "combine_f16", "clear_f16"):
        end_in(family)
    report, _ = outcome_of(child())
    assert all("nan" in report["faults"][family] for family in ("clear_f16", "combine_f16"))
    assert set(report["tried_again"]) == {"clear_f16", "combine_f16"}


# ---- where it is shown --------------------------------------------------------------------------


def test_the_report_shows_it(recorded: Double) -> None:
    report = env.collect()
    assert [test["dtype"] for test in report["self_tests"]] == ["float16", "bfloat16", "float32"]
    text = env.rows(report)["self-test"]
    assert "float16: 0 of 40 families of kernels pass" in text
    assert "Apple M1, applegpu_g13g, Apple7, " in text
    test = report["self_tests"][0]
    assert test["pipelines"] > 0  # of the process: another thread may compile meanwhile
    assert f"{test['when']}, {test['pipelines']} pipelines in " in text
    assert "combine_f16 excluded: out" in text
    assert "available in part" in env.rows(report)["metal backend"]


def test_the_report_shows_that_it_is_off(recorder: Recorder) -> None:
    with metal_double.machine(recorder, "0"):
        assert env.rows(env.collect())["self-test"] == "off: UMFA_SELF_TEST=0"


# ---- the families -------------------------------------------------------------------------------


CALLS: list[tuple[int, dict[str, Any]]] = [
    (20, {}),
    (1, {}),
    (1, {"num_splits": 4}),
    (20, {"dropout_p": 0.5, "dropout_seed": 1}),
    (1, {"dropout_p": 0.5, "dropout_seed": 1}),
    (1, {"seqused_q": np.zeros(1, np.int32)}),
    (20, {"seqused_k": np.full(1, 500, np.int32)}),
    (1, {"softcap": 5.0}),
]


def launched(dtype: Any, family: int) -> set[str]:
    """Kernel families that the planner launches for a dtype on a GPU family."""
    return {
        name
        for d, dv in [*((d, d) for d in range(8, 520, 8)), (192, 128), (576, 512), (64, 512)]
        for seqlen_q, options in CALLS
        for nheads_kv in (2, 4)
        for launch in plan(
            shape=(1, seqlen_q, 4, d),
            seqlen_kv=600,
            nheads_kv=nheads_kv,
            head_dim_v=dv,
            dtype=dtype,
            family=family,
            **options,
        )["launches"]
        for name in launch["families"]
    }


def launched_backward(dtype: Any, family: int) -> set[str]:
    """Likewise of backward passes."""
    name, given = np.dtype(dtype).name, {"lengths_q": [9], "lengths_k": [10]}
    calls = [Call(**given, dtype=name, head_dim=d) for d in (8, 64, 72, 128, 136, 256, 264, 512)]
    calls += [Call(**given, dtype=name, head_dim=d, head_dim_v=512) for d in (64, 576)]
    calls += [
        Call(**given, dtype=name, packed=True),
        Call(**given, dtype=name, options={"dropout_p": 0.5, "dropout_seed": 1}),
        Call(**given, dtype=name, options={"softcap": 5.0}),
    ]
    table = np.zeros((10, 8), np.float32)
    calls.append(Call(**given, dtype=name, options={"rotary_cos": table, "rotary_sin": table}))
    if name == "float32":
        calls.append(Call(**given, dtypes={"query": "float16"}))
    emulated_gpu.settings.family = family
    launches = [launch for call in calls for launch in backward_plan(call)["launches"]]
    bias = {"attn_mask": np.zeros((1, 1, 9, 10), np.float32)}
    for d in (64, 128, 256, 512):
        masked = Call(**given, dtype=name, head_dim=d, options=bias)
        launches += backward_plan(masked, ("dmask",))["launches"]
    sinks = {"learnable_sink": np.ones(2, dtype)}
    launches += backward_plan(Call(**given, dtype=name, options=sinks), ("dsinks",))["launches"]
    return {name for launch in launches for name in launch["families"]}


def launched_quantize(dtype: Any) -> set[str]:
    """Likewise of quantising a tensor, and of the way back."""
    x, form = np.zeros((1, 2, 300, 40), dtype), Format("int4", "channel", False)
    like, plans = quantization.quantize(x, form), []
    parts = like.data, like.scales, like.zero_points
    quantize_kernel.quantize(x, form)
    plans.append(dict(emulated_gpu.last_plan))
    emulated_gpu.dequantize(parts, quantization.ext_format(form), 40, x)
    plans.append(dict(emulated_gpu.last_plan))
    return {name for plan in plans for launch in plan["launches"] for name in launch["families"]}


def launched_codes(dtype: Any, family: int) -> set[str]:
    """Likewise of attention over a quantised cache."""
    cache = umfa.quantize(np.zeros((1, 600, 2, 64), np.float32), "int8")
    found = set()
    for seqlen_q in (1, 20):
        query = np.zeros((1, seqlen_q, 4, 64), dtype)
        codes = {"key_scales": cache.scales, "key_format": "int8 row none float32 0 0 64"}
        codes |= {"value_scales": cache.scales, "value_format": codes["key_format"]}
        made = plan_of(query, cache.data, cache.data, query.copy(), family=family, **codes)
        launches = made["launches"]
        found |= {name for launch in launches for name in launch["families"]}
    return found


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("family", [7, 9])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_family_has_a_case(dtype: Any, family: int, recorded: Double) -> None:
    recorded.set_machine(family=family)
    tested = set(one(np.dtype(dtype).name).faults)
    asked = launched(dtype, family) | launched_backward(dtype, family) | launched_quantize(dtype)
    asked |= launched_codes(dtype, family)
    # CALLS neither rotate nor append nor mix dtypes, and their tables are the host's; no plan
    # launches the lane map kernel.
    untried = ("lanes", "rotary", "append", "dtypes", "tables")
    others = {name for name in tested if name.split("_")[0] in untried}
    assert asked == tested - others - {f"combine_{name_of(dtype)}"}


def name_of(dtype: Any) -> str:
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[np.dtype(dtype).name]


def test_the_families_of_a_launch() -> None:
    """Constants that add arithmetic add families."""
    (launch,) = plan(
        shape=(1, 20, 4, 80), dtype=np.float16, dropout_p=0.5, dropout_seed=1, softcap=5.0,
        alibi=True,
        rotary_cos=np.zeros((20, 8), np.float32), rotary_sin=np.zeros((20, 8), np.float32),
    )["launches"]  # fmt: skip
    assert launch["families"] == [
        "forward_f16_d128", "rotary_f16", "dropout_f16", "scores_f16"
    ]  # fmt: skip
