"""`torch.nn.attention.varlen` on umfa. Without umfa, torch has no kernels for it on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import umfa
from tests import reference
from tests.checks import BASE, assert_close
from tests.integrations.calls import Counted

torch = pytest.importorskip("torch")
umfa_torch = pytest.importorskip("umfa.torch")
varlen = pytest.importorskip("torch.nn.attention.varlen")

FORWARD = "torch._flash_attention_forward"
BACKWARD = "torch._flash_attention_backward"
OFFSETS = torch.tensor([0, 2, 2, 11], dtype=torch.int32)
LONGEST = 9
WINDOWS = [(-1, -1), (-1, 0), (3, 0), (2, 1)]


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    yield
    umfa_torch.disable()
    assert not umfa_torch.is_enabled()


def rows(heads: int = 2, dtype: Any = None, grad: bool = False, count: int = 11) -> Any:
    drawn = torch.randn(count, heads, 16, generator=torch.Generator().manual_seed(heads))
    return drawn.to(dtype or torch.float32).requires_grad_(grad)


def attend(*given: Any, **options: Any) -> Any:
    return varlen.varlen_attn(*given, OFFSETS, OFFSETS, LONGEST, LONGEST, **options)


def lse_too() -> Any:
    return varlen.AuxRequest(lse=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_each_sequence_as_if_it_were_alone(window: tuple[int, int], dtype: str) -> None:
    q, k, v = (rows(heads, getattr(torch, dtype)) for heads in (4, 2, 2))
    counted = Counted()
    with umfa_torch.sdpa():
        out, lse = attend(
            q, k, v, window_size=window, enable_gqa=True, scale=0.3, return_aux=lse_too()
        )
    assert counted.taken == {FORWARD: 1}
    assert out.dtype is q.dtype
    assert lse.shape == (4, 11)
    for start, stop in ((0, 2), (2, 11)):
        expected, expected_lse = reference.attention(
            *(x[None, start:stop].float().numpy() for x in (q, k, v)),
            window_size=window,
            softmax_scale=0.3,
        )
        assert_close(out[start:stop].double().numpy(), expected[0], BASE[dtype])
        assert_close(lse[:, start:stop].double().numpy(), expected_lse[0], BASE["float32"])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients(window: tuple[int, int]) -> None:
    given = [rows(heads, grad=True) for heads in (4, 2, 2)]
    alone = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[start:stop].transpose(0, 1)[None] for x in given),
            attn_mask=seen(stop - start, window),
            enable_gqa=True,
        )[0].transpose(0, 1)
        for start, stop in ((0, 2), (2, 11))
    ]
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), given)
    counted = Counted()
    with umfa_torch.sdpa():
        out = attend(*given, window_size=window, enable_gqa=True)
        found = torch.autograd.grad(out.square().sum(), given)
    assert counted.taken == {FORWARD: 1, BACKWARD: 1}
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def seen(length: int, window: tuple[int, int]) -> Any:
    distance = torch.arange(length) - torch.arange(length)[:, None]
    left, right = (length if x < 0 else x for x in window)
    return (distance >= -left) & (distance <= right)


def test_queries_of_other_lengths_are_aligned_at_the_end() -> None:
    q, k = rows(count=3), rows(count=9)
    q_offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    k_offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    with umfa_torch.sdpa():
        out = varlen.varlen_attn(q, k, k, q_offsets, k_offsets, 2, 5, window_size=(-1, 0))
    expected, _ = reference.attention(
        *(x[None].numpy() for x in (q[1:], k[4:], k[4:])), causal=True, alignment="lower_right"
    )
    assert_close(out[1:].double().numpy(), expected[0], BASE["float32"])


def test_inference_mode_and_a_given_result() -> None:
    q, k, v = rows(), rows(), rows()
    written = torch.empty_like(q)
    with umfa_torch.sdpa(), torch.inference_mode():
        expected, expected_lse = attend(q, k, v, return_aux=lse_too())
        found, lse = varlen.varlen_attn_out(
            written, q, k, v, OFFSETS, OFFSETS, LONGEST, LONGEST, return_aux=lse_too()
        )
    assert found is written
    assert torch.equal(written, expected)
    assert torch.equal(lse, expected_lse)


def test_autocast_does_not_reach_it() -> None:
    """As in torch, whose graphs expect the dtype of query."""
    q = rows(grad=True)
    with umfa_torch.sdpa(), torch.autocast("cpu", torch.bfloat16):
        out = attend(q, q, q)
        (gradient,) = torch.autograd.grad(out.sum(), q)
    assert out.dtype is gradient.dtype is torch.float32


@pytest.mark.parametrize("whole_pages", [False, True])
def test_pages(whole_pages: bool) -> None:
    """torch asks for seqused_k with pages."""
    pool = torch.randn(6, 4, 2, 16, generator=torch.Generator().manual_seed(3))
    table = torch.tensor([[5, 1, 3], [0, 2, 4]], dtype=torch.int32)
    used = torch.tensor([12, 12] if whole_pages else [9, 5], dtype=torch.int32)
    q_offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    q = rows(count=2)
    with umfa_torch.sdpa(), torch.inference_mode():
        out = varlen.varlen_attn(
            q, pool, pool, q_offsets, None, 1, 12, seqused_k=used, block_table=table
        )
        alone = varlen.varlen_attn(
            q[:1], pool, pool, q_offsets[:2], None, 1, 12,
            seqused_k=used[:1], block_table=table[:1], num_splits=1,
        )  # fmt: skip
        both = varlen.varlen_attn(
            q, pool, pool, q_offsets, None, 1, 12,
            seqused_k=used, block_table=table, num_splits=1,
        )  # fmt: skip
    assert torch.equal(alone, both[:1]), "num_splits=1 makes it independent of the batch"
    for b, pages in enumerate(table):
        k = pool[pages].flatten(0, 1)[: used[b]]
        expected, _ = reference.attention(*(x[None].numpy() for x in (q[b : b + 1], k, k)))
        assert_close(out[b : b + 1].double().numpy(), expected[0], BASE["float32"])


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compile(compiler: str) -> None:
    """Of query and key that are slices of one tensor, whose strides the graph asks about."""

    def doubled(qkv: Any, offsets: Any) -> Any:
        q, k, v = qkv.unbind(1)
        out = varlen.varlen_attn(q, k, v, offsets, offsets, LONGEST, LONGEST, window_size=(-1, 0))
        return out * 2

    qkv = torch.randn(11, 3, 2, 16, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(doubled, backend=compiler, fullgraph=True)
    with umfa_torch.sdpa():
        expected = doubled(qkv, OFFSETS)
        counted = Counted()
        found = compiled(qkv, OFFSETS)
        (gradient,) = torch.autograd.grad(found.square().sum(), qkv)
        assert counted.taken == {FORWARD: 1, BACKWARD: 1}
        torch.testing.assert_close(found, expected)
        (other,) = torch.autograd.grad(expected.square().sum(), qkv)
    torch.testing.assert_close(gradient, other)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        compiled(qkv, OFFSETS)


def test_errors_are_umfa_s() -> None:
    q = rows()
    with umfa_torch.sdpa():
        with pytest.raises(umfa.UnsupportedError, match=r"\[umfa.torch.varlen_attn\] .*float64"):
            attend(*[rows(dtype=torch.float64)] * 3)
        with pytest.raises(ValueError, match=r"\[umfa.torch.varlen_attn\] max_q is too small"):
            varlen.varlen_attn(q, q, q, OFFSETS, OFFSETS, 5, LONGEST)
        with pytest.raises(umfa.UnsupportedError, match="value has another head_dim"):
            attend(q, q, q[..., :8])
        forward = torch.ops.aten._flash_attention_forward
        given = (q, q, q, OFFSETS, OFFSETS, LONGEST, LONGEST)
        with pytest.raises(umfa.UnsupportedError, match=r"dropout_p=0\.5"):
            forward(*given, 0.5, False, False)
        with pytest.raises(umfa.UnsupportedError, match="return_debug_mask=True"):
            forward(*given, 0.0, False, True)
        with pytest.raises(umfa.UnsupportedError, match="cu_seq_q is missing"):
            forward(q[None], q[None], q[None], None, None, 11, 11, 0.0, False, False)


def test_disabled_it_raises_torch_s_own_error(run_python: Any) -> None:
    done = run_python(
        "import torch, umfa, umfa.torch\n"
        "from torch.nn.attention.varlen import varlen_attn\n"
        "q, cu = torch.randn(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)\n"
        "def error():\n"
        "    try:\n"
        "        varlen_attn(q, q, q, cu, cu, 3, 3)\n"
        "    except NotImplementedError as error:\n"
        "        return str(error)\n"
        "never = error()\n"
        "with umfa.torch.sdpa():\n"
        "    assert error() is None\n"
        "assert error() == never and 'CPU' in never\n"
        "umfa.torch.uninstall()\n"
        "assert error() == never\n"
    )
    assert done.returncode == 0, done.stderr


def test_torch_activates_it_by_name() -> None:
    attention = torch.nn.attention
    umfa_torch.register()
    assert "umfa" in attention.list_flash_attention_impls()
    assert not umfa_torch.is_enabled()
    q = rows()
    attention.activate_flash_attention_impl("umfa")
    try:
        assert attention.current_flash_attention_impl() == "umfa"
        counted = Counted()
        attend(q, q, q)
        assert counted.taken == {FORWARD: 1}
        attention.activate_flash_attention_impl("umfa")  # again
        umfa_torch.disable()
        assert umfa_torch.is_enabled(), "torch has activated it"
    finally:
        attention.restore_flash_attention_impl()
    assert not umfa_torch.is_enabled()
    with pytest.raises(NotImplementedError):
        attend(q, q, q)
