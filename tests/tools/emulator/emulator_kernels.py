"""Helpers shared by the emulator's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tools.metal.emulator import Counters, Library, Options

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"

Array = npt.NDArray[Any]


def library(body: str, **options: Any) -> Library:
    """A library of ``body`` after the usual first lines."""
    return Library(HEADER + body, **options)


def run(
    body: str,
    buffers: dict[int, Array | bytes],
    *,
    threads: int = 32,
    threadgroups: int | tuple[int, ...] = 1,
    kernel: str = "f",
    seed: int = 0,
    memory: dict[int, int] | None = None,
    constants: dict[int, Any] | None = None,
    options: Options | None = None,
) -> Counters:
    """Builds ``body`` and runs its kernel ``f``."""
    made = library(body, constants=constants or {}, options=options)
    return made.dispatch(kernel, threadgroups, threads, buffers, memory, seed)


def floats(n: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)
