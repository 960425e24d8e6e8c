"""How the numerical tests call umfa: any framework, any backend."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import emulated
import numpy as np
import pytest

import cases
import checks
import umfa
from cases import Case
from checks import Tolerance
from frameworks import Array, Framework


class Result(NamedTuple):
    """What umfa returned, in the caller's framework."""

    out: Any
    lse: Any


class Attend:
    """Calls umfa on tensors of one framework and checks what holds for every call.

    All numerical tests go through here, so this is the one place that knows about backends: "cpu"
    and "metal" are the public functions, "metal" on the real Objective-C++ host over a double of
    Metal; the others play the Metal backend's plan on the emulator, which is no part of umfa and
    takes NumPy arrays only.
    """

    def __init__(self, framework: Framework, backend: str = "cpu") -> None:
        self.framework = framework
        self.backend = backend

    def __call__(self, query: Any, key: Any, value: Any, **options: Any) -> Result:
        if self.backend.startswith("metal-"):
            return Result(*emulated.attention(query, key, value, **options))
        if isinstance(options.get("alibi_slopes"), np.ndarray):
            options["alibi_slopes"] = self.framework.tensor(options["alibi_slopes"])
        before = umfa.stats()
        out, lse, probabilities = umfa.flash_attn_func(
            query, key, value, return_attn_probs=True, backend=self.backend, **options
        )
        assert probabilities is None
        # Other threads may call the same backend meanwhile.
        after = umfa.stats()
        metal, cpu = after.metal_calls - before.metal_calls, after.cpu_calls - before.cpu_calls
        mine, other = (metal, cpu) if self.backend == "metal" else (cpu, metal)
        assert mine >= 1, "nobody has done it"
        assert other == 0, "another backend has done it"
        assert isinstance(out, self.framework.array_type)
        assert isinstance(lse, self.framework.array_type)
        assert tuple(out.shape) == (*query.shape[:3], value.shape[3])
        assert tuple(lse.shape) == (query.shape[0], query.shape[2], query.shape[1])
        assert self.framework.dtype_name(out) == self.framework.dtype_name(query)
        assert self.framework.dtype_name(lse) == "float32"
        return Result(out, lse)

    def arrays(self, query: Array, key: Array, value: Array, **options: Any) -> Result:
        """The same from NumPy arrays to NumPy arrays, by way of the framework."""
        tensors = (self.framework.tensor(array) for array in (query, key, value))
        result = self(*tensors, **options)
        return Result(*map(self.framework.numpy, result))

    def case(
        self, case: Case, tolerance: Tolerance | None = None, lse_tolerance: Tolerance = checks.LSE
    ) -> None:
        """Run a case and compare output and log-sum-exp with the reference.

        On the emulator, batch and heads shrink to one group where the case is large: it does about
        0.4 GFLOP/s. Lengths and head dims never do.
        """
        if self.backend != "cpu" and sys.platform != "darwin":
            case = case.shrunk(limit=5e8)
            if self.backend == "metal" and case.flop > 4e9:
                pytest.skip("minutes on the emulator, which runs it without the host")
        result = self.arrays(*cases.inputs(case), **cases.options(case))
        out, lse = cases.expected(case)
        tolerance = tolerance or checks.BASE[case.dtype]
        checks.assert_close(result.out.astype(np.float64), out, tolerance, "out")
        checks.assert_close(result.lse.astype(np.float64), lse, lse_tolerance, "lse")
