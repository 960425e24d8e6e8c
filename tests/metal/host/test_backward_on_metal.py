"""Gradients by the Objective-C++ host, on a GPU that computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.attend import BSHD
from tests.cases import normal
from tests.gradients import RELATIVE, Forward, assert_gradients
from tools.metal.double import Double
from umfa import _ext


def given(dtype: str, heads_k: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "query": normal((2, 40, 4, 64), dtype, seed=1),
        "key": normal((2, 70, heads_k, 64), dtype, seed=2),
        "value": normal((2, 70, heads_k, 64), dtype, seed=3),
        **options,
    }


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
def test_gradients(emulated: Double, dtype: str) -> None:
    call = given(dtype, causal=True)
    dout = normal((2, 40, 4, 64), dtype, seed=4)
    found = Forward(BSHD, "metal", **call)
    calls = umfa.stats().metal_calls
    gradients = found.backward(dout)
    assert umfa.stats().metal_calls == calls + 1
    tensors = [call.pop(name) for name in ("query", "key", "value")]
    expected = reference.gradients(*tensors, dout, **call)
    assert_gradients(gradients, expected, RELATIVE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1024, 256])
def test_head_dims_that_want_many_threads(emulated: Double, limit: int) -> None:
    """The kernels of dK and dV have 512 threads where the GPU allows it, else half as many."""
    emulated.set_machine(max_threads=limit)
    call = {
        "query": normal((1, 20, 2, 576), "float16", seed=1),
        "key": normal((1, 35, 1, 576), "float16", seed=2),
        "value": normal((1, 35, 1, 512), "float16", seed=3),
    }
    dout = normal((1, 20, 2, 512), "float16", seed=4)
    gradients = Forward(BSHD, "metal", **call).backward(dout)
    expected = reference.gradients(*call.values(), dout)
    assert_gradients(gradients, expected, RELATIVE["float16"])


def test_key_that_broadcasts(emulated: Double) -> None:
    """Its gradient is a sum, which the core takes of the kernel's results in host memory."""
    function = _ext.Function("umfa.test", query="q", key="k", value="v", broadcasts=True)
    call = given("float32")
    call["key"] = call["key"][:1]
    dout = normal((2, 40, 4, 64), seed=4)
    found = Forward(function, "metal", **call)
    gradients = found.backward(dout)
    key = np.broadcast_to(call["key"], (2, *call["key"].shape[1:]))
    expected = reference.gradients(call["query"], key, call["value"], dout)
    assert gradients["dk"].shape == (1, 70, 2, 64)
    wide = expected._asdict() | {"dk": expected.dk.sum(0, keepdims=True)}
    assert_gradients(gradients, wide, RELATIVE["float32"])


def test_torch_gets_gradients_of_the_gpu(emulated: Double) -> None:
    torch = pytest.importorskip("torch")
    call = given("float16")
    leaves = {
        name: torch.from_numpy(x).requires_grad_()
        for name, x in zip(("q", "k", "v"), call.values(), strict=True)
    }
    dout = normal((2, 40, 4, 64), "float16", seed=4)
    calls = umfa.stats().metal_calls
    umfa.flash_attn_func(**leaves, causal=True, backend="metal").backward(torch.from_numpy(dout))
    assert umfa.stats().metal_calls == calls + 2
    found = {"d" + name: leaf.grad.numpy() for name, leaf in leaves.items()}
    expected = reference.gradients(*call.values(), dout, causal=True)
    assert_gradients(found, expected, RELATIVE["float16"])


def test_torch_gets_all_gradients_of_the_gpu(emulated: Double) -> None:
    """Options that have gradients: parameters of a model, in its dtype."""
    torch = pytest.importorskip("torch")
    call = given("float16")
    options = {
        "attn_mask": normal((4, 40, 70), "float16", seed=5),
        "learnable_sink": normal((4,), "float16", seed=6),
        "alibi_slopes": np.linspace(0.1, 0.4, 4, dtype=np.float32),
    }
    leaves = {
        name: torch.from_numpy(x).requires_grad_()
        for name, x in (*zip(("q", "k", "v"), call.values(), strict=True), *options.items())
    }
    dout = normal((2, 40, 4, 64), "float16", seed=4)
    calls = umfa.stats().metal_calls
    umfa.flash_attn_func(**leaves, backend="metal").backward(torch.from_numpy(dout))
    assert umfa.stats().metal_calls == calls + 2
    mask = options.pop("attn_mask")
    expected = reference.gradients(*call.values(), dout, mask=mask, **options)
    names = {"attn_mask": "dmask", "learnable_sink": "dsinks"}
    found = {names.get(name, f"d{name}"): leaf.grad.numpy() for name, leaf in leaves.items()}
    assert_gradients(found, expected, RELATIVE["float16"])
