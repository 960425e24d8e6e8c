"""Calls on MPS tensors in torch's stream: on a stand-in for torch's MPS device, whose stream runs
only when the test says so. No part of it is Apple's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.checks import BASE, LSE, assert_close
from tools.metal.double import Double

torch = pytest.importorskip("torch")

from tests.metal.host.torch_mps import TorchMps, standing_in  # noqa: E402


@pytest.fixture
def mps(double: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchMps]:
    """A Mac with an MPS device: umfa plans for the double's GPU."""
    with standing_in(monkeypatch) as device:
        yield device


def made(mps: TorchMps, dtype: Any, rows: int, keys: int, heads: int = 4, dim: int = 64) -> Any:
    """Query, key and value (batch, rows, heads, dim); half as many heads of keys."""
    generator = torch.Generator().manual_seed(rows * keys)
    shapes = [(2, rows, heads, dim), (2, keys, heads // 2, dim), (2, keys, heads // 2, dim)]
    return [mps.tensor(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def expected(mps: TorchMps, tensors: Any, **options: Any) -> Any:
    return reference.attention(*(mps.read(x) for x in tensors), **options)


def test_nothing_runs_and_nothing_waits_within_a_call(mps: TorchMps) -> None:
    q, k, v = made(mps, torch.float16, 20, 70)
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    after = umfa.stats()
    assert mps.poisoned(out)
    assert mps.poisoned(lse)
    assert mps.waits == 0
    assert mps.launched == ["forward_f16_d64_v64_k32"]
    assert after.metal_calls - before.metal_calls == 1
    assert after.plans_in_stream - before.plans_in_stream == 1
    assert after.command_buffers == before.command_buffers
    assert after.waits == before.waits
    wanted, wanted_lse = expected(mps, (q, k, v), causal=True)
    assert_close(mps.read(out), wanted, BASE["float16"])
    assert_close(mps.read(lse), wanted_lse, LSE, "lse")
