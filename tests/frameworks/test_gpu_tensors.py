"""Tensors of frameworks that live on an Apple GPU. Elsewhere all of it is skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import checks, reference

pytestmark = pytest.mark.gpu

SHAPE = (2, 130, 4, 64)


def arrays(dtype: Any = np.float32) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    return [rng.standard_normal(SHAPE, np.float32).astype(dtype) for _ in range(3)]


def close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], dtype: str) -> None:
    checks.assert_close(found.astype(np.float64), expected, checks.BASE[dtype])


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.backends.mps.is_available():
        pytest.skip("torch has no MPS device here")
    return torch


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_on_mps(dtype: str, torch: Any) -> None:
    q, k, v = (torch.from_numpy(a).to("mps").to(getattr(torch, dtype)) for a in arrays())
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out.device.type == lse.device.type == "mps"
    assert umfa.stats().metal_calls - before.metal_calls == 1
    assert umfa.stats().tensors_copied == before.tensors_copied
    inputs = [t.float().cpu().numpy() for t in (q, k, v)]
    expected_out, expected_lse = reference.attention(*inputs, causal=True)
    close(out.float().cpu().numpy(), expected_out, dtype)
    checks.assert_close(lse.cpu().numpy().astype(np.float64), expected_lse, checks.LSE)


def test_torch_on_mps_does_not_wait(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward go into torch's stream, in the order of the calls."""
    leaves = [torch.from_numpy(a).to("mps").requires_grad_() for a in arrays()]
    q, k, v = leaves
    before = umfa.stats()
    with monkeypatch.context() as patch:
        patch.setattr(torch.mps, "synchronize", lambda: pytest.fail("somebody waits"))
        out = umfa.flash_attn_func(umfa.flash_attn_func(q, k, v), k, v, causal=True)
        found = torch.autograd.grad(out.sum(), leaves)
    after = umfa.stats()
    assert after.plans_in_stream - before.plans_in_stream == 4
    assert after.waits == before.waits
    assert after.command_buffers == before.command_buffers
    host = [torch.from_numpy(a).requires_grad_() for a in arrays()]
    q, k, v = host
    expected = umfa.flash_attn_func(umfa.flash_attn_func(q, k, v), k, v, causal=True)
    close(out.detach().cpu().numpy(), expected.detach().double().numpy(), "float32")
    for mine, other in zip(found, torch.autograd.grad(expected.sum(), host), strict=True):
        bound = 1e-4 * float(other.abs().max())
        assert float((mine.cpu() - other).abs().max()) <= bound


def test_torch_on_mps_by_umfas_queue(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMFA_TORCH_STREAM", "0")
    q, k, v = (torch.from_numpy(a).to("mps") for a in arrays())
    before = umfa.stats()
    out = umfa.flash_attn_func(2 * q, k, v)
    after = umfa.stats()
    assert after.plans_in_stream == before.plans_in_stream
    assert after.command_buffers == before.command_buffers + 1
    reason = "UMFA_TORCH_STREAM=0"
    assert after.waits[reason] == before.waits.get(reason, 0) + 1
    a, b, c = arrays()
    close(out.cpu().numpy(), reference.attention(2 * a, b, c)[0], "float32")


def test_torch_slices_on_mps(torch: Any) -> None:
    """Views begin inside the buffer of their base."""
    qkv = torch.from_numpy(np.stack(arrays(), axis=2)).to("mps")
    out = umfa.flash_attn_qkvpacked_func(qkv[:, 3:])
    expected = reference.attention(*(a[:, 3:] for a in arrays()))[0]
    close(out.cpu().numpy(), expected, "float32")


def test_what_torch_has_queued_comes_first(torch: Any) -> None:
    q, k, v = (torch.from_numpy(a).to("mps") for a in arrays())
    big = torch.randn(4096, 4096, device="mps")
    for _ in range(20):
        big = big @ big * 1e-3
    late = q + 0 * big[0, 0].nan_to_num()  # ready only when all that has run
    out = umfa.flash_attn_func(late, k, v)
    close(out.cpu().numpy(), reference.attention(*arrays())[0], "float32")


def test_torch_on_mps_is_not_for_the_cpu(torch: Any) -> None:
    q = torch.zeros(SHAPE, device="mps")
    with pytest.raises(umfa.UnsupportedError, match="cpu: the tensors are on metal:0"):
        umfa.flash_attn_func(q, q, q, backend="cpu")


@pytest.mark.parametrize("choice", ["auto", "metal", "cpu"])
def test_mlx(choice: str) -> None:
    mx = pytest.importorskip("mlx.core")
    q, k, v = (mx.array(a) * 1 for a in arrays())  # lazy until umfa asks
    before = umfa.stats()
    out = umfa.flash_attn_func(q, k, v, backend=choice)
    assert isinstance(out, mx.array)
    assert umfa.stats().tensors_copied == before.tensors_copied
    assert (umfa.stats().cpu_calls > before.cpu_calls) == (choice == "cpu")
    close(np.array(out), reference.attention(*arrays())[0], "float32")


def test_numpy_is_mapped_not_copied() -> None:
    q, k, v = arrays()
    before = umfa.stats()
    out = umfa.flash_attn_func(q[:, 1:], k, v, backend="metal")
    assert umfa.stats().tensors_copied == before.tensors_copied
    close(out, reference.attention(q[:, 1:], k, v)[0], "float32")


def test_two_launches_and_scratch() -> None:
    q, k, v = (np.tile(a[:1], (1, 40, 1, 1)) for a in arrays())
    out = umfa.flash_attn_func(q[:, :1], k, v, backend="metal")
    close(out, reference.attention(q[:, :1], k, v)[0], "float32")
