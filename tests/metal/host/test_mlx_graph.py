"""Calls on mlx arrays in MLX's graph: on a stand-in for its Metal device, whose kernels run when
MLX evaluates them. No part of it is Apple's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.checks import BASE, LSE, assert_close
from tools.metal.double import Double

mx = pytest.importorskip("mlx.core")

from tests.metal.host.mlx_metal import MlxMetal, standing_in  # noqa: E402


@pytest.fixture
def mlx(double: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlxMetal]:
    """A Mac whose MLX has a GPU: umfa plans for the double's."""
    with standing_in(monkeypatch) as device:
        yield device


def made(dtype: Any, rows: int, keys: int, heads: int = 4, dim: int = 64) -> Any:
    """Query, key and value (batch, rows, heads, dim); half as many heads of keys."""
    generator = np.random.default_rng(rows * keys)
    shapes = [(2, rows, heads, dim), (2, keys, heads // 2, dim), (2, keys, heads // 2, dim)]
    return [mx.array(generator.standard_normal(s).astype(np.float32)).astype(dtype) for s in shapes]


def numbers(array: Any) -> Any:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def expected(tensors: Any, **options: Any) -> Any:
    return reference.attention(*map(numbers, tensors), **options)


def test_nothing_runs_within_a_call(mlx: MlxMetal) -> None:
    q, k, v = made(mx.float16, 20, 70)
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    after = umfa.stats()
    assert mlx.ran == mlx.compiled == []
    assert after.metal_calls - before.metal_calls == 1
    assert after.plans_in_stream - before.plans_in_stream == 1
    assert after.command_buffers == before.command_buffers
    assert after.waits == before.waits
    wanted, wanted_lse = expected((q, k, v), causal=True)
    assert_close(mlx.read(out), wanted, BASE["float16"])
    assert_close(mlx.read(lse), wanted_lse, LSE, "lse")
    assert len(mlx.ran) == 1
