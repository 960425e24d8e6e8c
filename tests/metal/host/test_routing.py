"""Who carries a call out: the choice, what forces it, and what tells of it."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from typing import Any

import numpy as np
import pytest

import umfa
from tests.metal.metal_tensors import MetalTensor
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder
from umfa import _ext

SMALL = (1, 64, 2, 32)
LARGE = (1, 512, 4, 64)


def call(shape: tuple[int, ...], **options: Any) -> dict[str, int]:
    """The backends that were used, by count."""
    x = np.zeros(shape, np.float32)
    before = umfa.stats()
    umfa.flash_attn_func(x, x, x, **options)
    after = umfa.stats()
    return {
        "cpu": after.cpu_calls - before.cpu_calls,
        "metal": after.metal_calls - before.metal_calls,
    }


def test_auto_takes_the_gpu_for_large_work(double: Double) -> None:
    assert call(SMALL) == {"cpu": 1, "metal": 0}
    assert call(LARGE) == {"cpu": 0, "metal": 1}
    assert call(LARGE, causal=True) == {"cpu": 0, "metal": 1}


def test_force_either(double: Double) -> None:
    assert call(SMALL, backend="metal") == {"cpu": 0, "metal": 1}
    assert call(LARGE, backend="cpu") == {"cpu": 1, "metal": 0}


def test_auto_takes_the_cpu_where_there_is_no_gpu(double: Double) -> None:
    double.set_machine(present=False)
    assert call(LARGE) == {"cpu": 1, "metal": 0}


def test_a_failure_of_the_gpu_is_not_made_good_by_the_cpu(double: Double) -> None:
    double.fault("execution", value=2)
    before = umfa.stats()
    with pytest.raises(RuntimeError, match="did not finish in time"):
        call(LARGE)
    assert umfa.stats().cpu_calls == before.cpu_calls


def test_metal_tensors_go_to_metal_only(double: Double) -> None:
    x = MetalTensor(double, np.zeros(SMALL, np.float32))
    before = umfa.stats()
    umfa.flash_attn_func(x, x, x)
    assert umfa.stats().metal_calls - before.metal_calls == 1
    with pytest.raises(umfa.UnsupportedError, match=r"cpu: the tensors are on metal:0"):
        umfa.flash_attn_func(x, x, x, backend="cpu")
    assert umfa.can_run(x, x, x) == (True, "")
    assert not umfa.can_run(x, x, x, backend="cpu")[0]


def test_every_function_takes_it(double: Double) -> None:
    packed = np.zeros((1, 8, 3, 2, 16), np.float32)
    before = umfa.stats()
    umfa.flash_attn_qkvpacked_func(packed, backend="metal")
    umfa.flash_attn_kvpacked_func(packed[:, :, 0], packed[:, :, 1:], backend="metal")
    assert umfa.stats().metal_calls - before.metal_calls == 2


@pytest.mark.parametrize(
    ("family", "name", "architecture", "cores"),
    [
        (7, "Apple M1", "applegpu_g13g", 8),
        (8, "Apple M2 Ultra", "applegpu_g14d", 76),
        (9, "Apple M3 Max", "applegpu_g15s", 40),
        (9, "Apple M4 Pro", "applegpu_g16s", 20),
        (10, "Apple M5", "applegpu_g17g", 10),
        (10, "Apple M9", "applegpu_g21g", 8),
    ],
)
def test_what_the_gpu_is(
    family: int, name: str, architecture: str, cores: int, double: Double, recorder: Recorder
) -> None:
    double.set_machine(family=family, name=name, architecture=architecture)
    metal = umfa.backends()[0]
    assert metal.device == (
        f"{name} ({architecture}, Apple{family}, {cores} cores assumed, 6.0 GiB for the GPU), "
        "kernels compiled when first used"
    )
    # bfloat arithmetic is native from Apple9 on: the planner must have been told.
    q = _ext.empty((1, 8, 1, 64), "bfloat16")
    umfa.flash_attn_func(q, q, q, backend="metal")
    kernel = recorder.dispatches[-1].name
    assert ("bf16_as_f32" in kernel) == (family < 9)


def test_pipelines_are_built_once(double: Double, recorder: Recorder) -> None:
    before = umfa.stats()
    for options in ({}, {"causal": True}, {}, {"softcap": 5.0}, {"softcap": 7.0}):
        call(SMALL, backend="metal", **options)
    # Softcap is a function constant; causality and the value of the cap are parameters.
    assert umfa.stats().pipelines - before.pipelines == 2
    assert {kernel.name for kernel in recorder.prepared} == {recorder.dispatches[0].name}


def test_the_kernel_gets_the_text_that_umfa_carries(double: Double, recorder: Recorder) -> None:
    call(SMALL, backend="metal")
    defines, line, shader = recorder.dispatches[-1].source.partition("#line")
    assert line + shader == _ext.shader_text("forward.metal")
    assert set(re.findall("(?m)^#(\\w+)", defines)) == {"define"}
    assert '#include "' not in recorder.dispatches[-1].source


def test_many_threads(double: Double, recorder: Recorder) -> None:
    before = umfa.stats()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                call((1, 8 + i, 1, 16 * (1 + number % 3)), backend="metal", causal=bool(i % 2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert umfa.stats().metal_calls - before.metal_calls == 80
    assert umfa.stats().command_buffers - before.command_buffers == 80
    assert len(recorder.dispatches) == 80
    # Threads that want the same pipeline at the same time build one.
    assert umfa.stats().pipelines - before.pipelines == len(
        {(k.name, tuple(k.constants.items())) for k in recorder.dispatches}
    )


def _in_a_forked_child(connection: Any) -> None:
    x = np.zeros(SMALL, np.float32)
    connection.send((umfa.can_run(x, x, x, backend="metal"), umfa.can_run(x, x, x)))
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")  # jax's
def test_a_forked_child_is_told(double: Double) -> None:
    """Metal's connection does not survive fork(); using it there would crash or hang."""
    call(SMALL, backend="metal")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_a_forked_child, args=(there,))
    child.start()
    forced, free = here.recv()
    child.join()
    assert not forced[0]
    assert "forked" in forced[1]
    assert "spawn" in forced[1]
    assert free == (True, ""), "the CPU backend goes on"
