"""How the numerical tests call umfa: any framework, any backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

import umfa
from tests import cases, checks, mac, reference
from tests.array_libraries import Array, Framework
from tests.cases import Case
from tests.checks import Tolerance
from tests.metal import emulated
from umfa import _ext
from umfa._call.run import run

BSHD = _ext.Function("umfa.flash_attn_func", query="q", key="k", value="v")
BHSD = _ext.Function("umfa.flash_attn_func", layout="bhsd", broadcasts=True)


class Result(NamedTuple):
    """What umfa returned, in the caller's framework."""

    out: Any
    lse: Any


def call_on(backend: str, function: Any, *tensors: Any, **options: Any) -> Any:
    """A public function on NumPy arrays; of "metal-emulated" its body, with what it asks played on
    the emulator, which gives (out, lse) always."""
    if backend in ("cpu", "metal"):
        return function(*tensors, backend=backend, **options)
    assert backend == "metal-emulated", backend
    # The second: a call that repeats another one's options would not come to `compute`.
    with (
        mock.patch("umfa._call.run.compute", emulated.compute),
        mock.patch("umfa._call._public._repeat", return_value=False),
    ):
        return function(*tensors, **options)


def call_core(
    q: Array, k: Array, v: Array, function: _ext.Function = BSHD, **given: Any
) -> tuple[Array, Array]:
    """The core's common entry on the CPU backend, with any of its options and tensors together:
    output and log-sum-exp. `given` are fields of the record."""
    given = {"backend": "cpu", "return_lse": True, **given}
    out, lse = run(_ext.Attention(function, query=q, key=k, value=v, **given))
    return out, lse


class Attend:
    """Calls umfa on tensors of one framework and checks what holds for every call.

    Numerical tests go through this module, so this is the one place that knows about backends:
    "cpu" and "metal" are the public functions, "metal" on the real Objective-C++ host over a double
    of Metal; the others play the Metal backend's plan on the emulator, which is no part of umfa and
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
        with self._done_here():
            out, lse, probabilities = umfa.flash_attn_func(
                query, key, value, return_attn_probs=True, backend=self.backend, **options
            )
        assert probabilities is None
        assert isinstance(out, self.framework.array_type)
        assert isinstance(lse, self.framework.array_type)
        assert tuple(out.shape) == (*query.shape[:3], value.shape[3])
        assert tuple(lse.shape) == (query.shape[0], query.shape[2], query.shape[1])
        assert self.framework.dtype_name(out) == self.framework.dtype_name(query)
        assert self.framework.dtype_name(lse) == "float32"
        return Result(out, lse)

    @contextmanager
    def _done_here(self) -> Iterator[None]:
        """The calls inside are carried out by this backend."""
        before = umfa.stats()
        yield
        # Other threads may call the same backend meanwhile.
        after = umfa.stats()
        metal, cpu = after.metal_calls - before.metal_calls, after.cpu_calls - before.cpu_calls
        mine, other = (metal, cpu) if self.backend == "metal" else (cpu, metal)
        assert mine >= 1, "nobody has done it"
        assert other == 0, "another backend has done it"

    def sdpa(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any
    ) -> NDArray[np.float64]:
        """`umfa.scaled_dot_product_attention` on this framework's tensors, as float64 numbers.

        The emulator without the host knows (batch, seqlen, heads, head_dim) only.
        """
        if self.backend.startswith("metal-"):
            return _sdpa_emulated(query, key, value, attn_mask, **options)
        with self._done_here():
            out = umfa.scaled_dot_product_attention(
                query, key, value, attn_mask, backend=self.backend, **options
            )
        assert isinstance(out, self.framework.array_type)
        assert self.framework.dtype_name(out) == self.framework.dtype_name(query)
        if self.framework.name == "torch":
            assert out.is_contiguous()
        return self.framework.float64(out)

    def sdpa_arrays(
        self,
        query: Array,
        key: Array,
        value: Array,
        attn_mask: Array | None = None,
        **options: Any,
    ) -> NDArray[np.float64]:
        """The same from NumPy arrays, by way of the framework."""
        make = self.framework.tensor
        tensors = (make(query), make(key), make(value))
        return self.sdpa(*tensors, None if attn_mask is None else make(attn_mask), **options)

    def sdpa_case(
        self,
        query: Array,
        key: Array,
        value: Array,
        attn_mask: Array | None = None,
        *,
        tolerance: Tolerance | None = None,
        **options: Any,
    ) -> None:
        """Compare with the reference."""
        found = self.sdpa_arrays(query, key, value, attn_mask, **options)
        expected = reference.scaled_dot_product(query, key, value, attn_mask, **options)
        tolerance = tolerance or checks.BASE[str(query.dtype)]
        checks.assert_close(found, expected, tolerance, "out")

    def arrays(self, query: Array, key: Array, value: Array, **options: Any) -> Result:
        """The same from NumPy arrays to NumPy arrays, by way of the framework."""
        tensors = (self.framework.tensor(array) for array in (query, key, value))
        result = self(*tensors, **options)
        return Result(*map(self.framework.numpy, result))

    def varlen(
        self,
        tensors: tuple[Array, Array, Array],
        cu_seqlens_q: Array,
        cu_seqlens_k: Array,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        **options: Any,
    ) -> Result:
        """`umfa.flash_attn_varlen_func` in the framework, from NumPy arrays and tables."""
        query, _, value = tensors
        found = self._by_framework(
            umfa.flash_attn_varlen_func,
            *(*tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            return_attn_probs=True,
            **options,
        )
        *results, probabilities = found
        assert probabilities is None
        shape = (*query.shape[:2], value.shape[-1])
        return self._checked(results, shape, shape[1::-1], query)

    def kvcache(self, *tensors: Array, **options: Any) -> Result:
        """`umfa.flash_attn_with_kvcache` in the framework, from NumPy arrays.

        Caches that are written are copied back into the given arrays.
        """
        batch, seqlen_q, heads, _ = tensors[0].shape
        ours = [self.framework.tensor(x) for x in tensors]
        results = self._by_framework(
            umfa.flash_attn_with_kvcache, *ours, return_softmax_lse=True, **options
        )
        if len(tensors) > 3:
            for array, tensor in zip(tensors[1:3], ours[1:3], strict=True):
                array[...] = self.framework.numpy(tensor)
        shape = (batch, seqlen_q, heads, tensors[2].shape[3])
        return self._checked(results, shape, (batch, heads, seqlen_q), tensors[0])

    def _by_framework(self, function: Any, *tensors: Any, **options: Any) -> Any:
        def made(x: Any) -> Any:
            return self.framework.tensor(x) if isinstance(x, np.ndarray) else x

        given = {name: made(option) for name, option in options.items()}
        return function(*map(made, tensors), backend=self.backend, **given)

    def _checked(
        self, results: Any, shape: tuple[int, ...], lse_shape: tuple[int, ...], query: Array
    ) -> Result:
        """The framework's results as NumPy arrays, after checking shapes and dtypes."""
        out, lse = results
        assert isinstance(out, self.framework.array_type)
        assert isinstance(lse, self.framework.array_type)
        assert tuple(out.shape) == shape
        assert tuple(lse.shape) == lse_shape
        assert self.framework.dtype_name(out) == query.dtype.name
        assert self.framework.dtype_name(lse) == "float32"
        return Result(self.framework.numpy(out), self.framework.numpy(lse))

    def case(
        self, case: Case, tolerance: Tolerance | None = None, lse_tolerance: Tolerance = checks.LSE
    ) -> None:
        """Run a case and compare output and log-sum-exp with the reference.

        On the emulator, batch and heads shrink to one group where the case is large: it does about
        0.4 GFLOP/s. Lengths and head dims never do.
        """
        if self.backend != "cpu" and not mac.IS_MAC:
            case = case.shrunk(limit=5e8)
            if self.backend == "metal" and case.flop > 4e9:
                pytest.skip("minutes on the emulator, which runs it without the host")
        result = self.arrays(*cases.inputs(case), **cases.options(case))
        out, lse = cases.expected(case)
        tolerance = tolerance or checks.BASE[case.dtype]
        checks.assert_close(result.out.astype(np.float64), out, tolerance, "out")
        checks.assert_close(result.lse.astype(np.float64), lse, lse_tolerance, "lse")


def _sdpa_emulated(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> NDArray[np.float64]:
    flat = reference.flattened(query, key, value, attn_mask, enable_gqa=enable_gqa)
    out, _ = emulated.attention(
        *flat.tensors,
        mask=flat.mask,
        causal=is_causal,
        alignment="upper_left",
        softmax_scale=scale,
    )
    return out.transpose(0, 2, 1, 3).reshape(flat.shape).astype(np.float64)
