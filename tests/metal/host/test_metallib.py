"""A build that had Apple's compiler: kernels come from the metallib, and from text if they must.

The double's metallib is flattened text, which it takes for compiled.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import umfa
from tests.metal import emulated
from tools.metal import double as metal_double
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder

EMBED = emulated.SHADERS / "embed.py"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if metal_double.built_in():
        pytest.skip("this umfa has its double built in, without a metallib")
    folder = tmp_path_factory.mktemp("metallib")
    (folder / "metallib").write_text(emulated.embed.flatten("forward.metal"))
    embedded = folder / "embedded.cpp"
    subprocess.run([sys.executable, EMBED, embedded, "--metallib", folder / "metallib"], check=True)
    return metal_double.open_library(metal_double.build((embedded,)))


@pytest.fixture
def double(recorder: Recorder, library: ctypes.CDLL) -> Iterator[Double]:
    machine = Double(library, recorder)
    machine.start()
    yield machine
    machine.stop()


def call() -> tuple[int, int]:
    """(pipelines built, of them from text)."""
    x = np.zeros((1, 20, 2, 64), np.float32)
    before = umfa.stats()
    umfa.flash_attn_func(x, x, x, backend="metal")
    after = umfa.stats()
    return (
        after.pipelines - before.pipelines,
        after.pipelines_from_text - before.pipelines_from_text,
    )


def test_compiled_ahead(double: Double, recorder: Recorder) -> None:
    assert umfa.backends()[0].device.endswith(", kernels compiled ahead")
    assert call() == (1, 0)
    kernel = recorder.dispatches[-1]
    assert not kernel.source.startswith("#define")
    assert kernel.constants, "function constants specialise what was compiled ahead"


def test_a_metallib_that_does_not_open(double: Double, recorder: Recorder) -> None:
    """A system older than the compiler: Metal compiles the text."""
    double.fault("library")
    assert call() == (1, 1)
    kernel = recorder.dispatches[-1]
    assert kernel.source.startswith(f'#define UMFA_KERNEL "{kernel.name}"\n')


def test_a_kernel_that_was_not_compiled_ahead(double: Double, recorder: Recorder) -> None:
    double.fault("function")
    assert call() == (1, 1)
    assert recorder.dispatches[-1].source.startswith("#define UMFA_KERNEL")


def test_neither(double: Double, recorder: Recorder) -> None:
    double.fault("function", count=2)
    with pytest.raises(
        RuntimeError,
        match=r"Metal has no kernel forward_\w+; got in the metallib: injected.*; in the text: inj",
    ):
        call()
    assert call() == (1, 0)
