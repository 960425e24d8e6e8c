"""Attention on quantised keys and values through the whole host."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import load
from tests.cases import normal
from tests.checks import BASE, assert_close
from tests.metal.metal_tensors import MetalTensor, to_numpy
from tests.quant.test_attention import KEY, VALUE
from tools.metal.double import Double
from umfa import QuantizedTensor


def expected(q: Any, k: QuantizedTensor, v: QuantizedTensor, **options: Any) -> Any:
    seen = [x.dequantize(q.dtype).astype(np.float64) for x in (k, v)]
    return reference.attention(q, *seen, **options)[0]


@pytest.mark.parametrize("seqlen_q", [20, 1])
def test_metal_buffers(seqlen_q: int, emulated: Double) -> None:
    """Quantised and attended to in the memory of the GPU, wherever in a buffer."""
    q, x = normal((2, 4, seqlen_q, 64), "float16", seed=1), normal((2, 2, 300, 64), seed=2)
    own = [umfa.quantize(x, **form._asdict(), layout="bhsd") for form in (KEY, VALUE)]
    k, v = (
        umfa.quantize(MetalTensor(emulated, x, 64), **form._asdict(), layout="bhsd")
        for form in (KEY, VALUE)
    )
    before = umfa.stats()
    out = umfa.quantized_attention(MetalTensor(emulated, q, 2), k, v, causal=True, layout="bhsd")
    after = umfa.stats()
    assert after.metal_calls - before.metal_calls == 1
    assert after.command_buffers - before.command_buffers == 1
    assert after.cpu_calls == before.cpu_calls
    turned = [QuantizedTensor(*(None if part is None else part.swapaxes(1, 2)
                                for part in (y.data, y.scales, y.zero_points)), **form._asdict())
              for y, form in zip(own, (KEY, VALUE), strict=True)]  # fmt: skip
    wanted = expected(q.swapaxes(1, 2), *turned, causal=True).swapaxes(1, 2)
    assert_close(to_numpy(emulated, out).astype(np.float64), wanted, BASE["float16"])


def test_host_memory(emulated: Double) -> None:
    q, x = normal((1, 20, 4, 64), "bfloat16", seed=1), normal((1, 70, 2, 64), seed=2)
    k, v = (umfa.quantize(x, **form._asdict()) for form in (KEY, VALUE))
    assert umfa.can_run(umfa.quantized_attention, q, k, v, backend="metal") == (True, "")
    before = umfa.stats().metal_calls
    out = umfa.quantized_attention(q, k, v, backend="metal")
    assert umfa.stats().metal_calls == before + 1
    assert_close(out.astype(np.float64), expected(q, k, v), BASE["bfloat16"])


def test_training(emulated: Double) -> None:
    """With the arithmetic of the numbers of the codes in float32, as on the CPU."""
    torch = load("torch").module
    quantized_attention = importlib.import_module("umfa.torch").quantized_attention
    before = umfa.stats().metal_calls
    draw = torch.Generator().manual_seed(3)
    found = []
    tensors = [torch.randn(1, n, 2, 64, generator=draw) for n in (20, 40, 40)]
    for backend in ("metal", "cpu"):
        own = [x.clone().requires_grad_() for x in tensors]
        out = quantized_attention(*own, "int8", causal=True, backend=backend)
        out.square().sum().backward()
        found.append([out.detach().double().numpy(), *(x.grad.double().numpy() for x in own)])
    # Each tensor into codes and, in each pass, back; attention; gradients.
    assert umfa.stats().metal_calls == before + 3 + 1 + 1 + 3 + 1
    for metal, cpu in zip(*found, strict=True):
        np.testing.assert_allclose(metal, cpu, rtol=1e-4, atol=1e-4)
