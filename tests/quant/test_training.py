"""umfa.torch.quantized_attention: results and straight-through gradients against the float64
reference on the numbers of the codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import quantization, reference
from tests.array_libraries import Array
from tests.checks import BASE, assert_close
from tests.gradients import RELATIVE
from tests.quantization import Format

torch = pytest.importorskip("torch", exc_type=ImportError)
attention: Any = pytest.importorskip("umfa.torch").quantized_attention

pytestmark = pytest.mark.cpu_only

INT8 = Format("int8", "row", True, None, "float32")
INT4 = Format("int4", "block", False, (1, 32), "float16")


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()


def three(dtype: str = "float32", layout: str = "bshd") -> list[Any]:
    made = []
    for seed, (rows, heads, channels) in enumerate(((41, 4, 64), (53, 2, 64), (53, 2, 48))):
        shape = (2, rows, heads, channels) if layout == "bshd" else (2, heads, rows, channels)
        made.append(draw(*shape, dtype=dtype, seed=seed))
    return made


def numbers(x: Any, form: Format, layout: str = "bshd") -> Array:
    """What the codes of `x` stand for, as (batch, seqlen, heads, head_dim)."""
    found = umfa.quantize(x.detach(), **form._asdict(), layout=layout).dequantize()
    return np.asarray(found if layout == "bshd" else found.transpose(1, 2))


def check(tensors: list[Any], form: Format, layout: str = "bshd", **options: Any) -> None:
    """Out and all gradients."""
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    out = attention(*tensors, *form, layout=layout, **options)
    assert out.dtype == tensors[0].dtype
    dout = draw(*out.shape, dtype=dtype, seed=9).detach()
    out.backward(dout)

    def array(x: Any) -> Array:
        return np.asarray(x.detach().double())

    def rows(x: Any) -> Array:
        return array(x if layout == "bshd" else x.transpose(1, 2))

    known = {"attn_mask": "mask"}
    plain = {
        known.get(name, name): array(x) if isinstance(x, torch.Tensor) else x
        for name, x in options.items()
    }
    given = [numbers(x, form, layout) for x in tensors]
    expected, _ = reference.attention(*given, **plain)
    assert_close(rows(out), expected, BASE[dtype])
    wanted = reference.gradients(*given, rows(dout), **plain)
    found = {name: rows(x.grad) for name, x in zip(("dq", "dk", "dv"), tensors, strict=True)}
    for name, field in (("attn_mask", "dmask"), ("learnable_sink", "dsinks")):
        if name in options:
            found[field] = array(options[name].grad)
    for name, gradient in found.items():
        right = getattr(wanted, name)
        if name == "dmask":
            right = reference.summed_to(right, gradient.shape)
        error = np.abs(gradient - right).max() / np.abs(right).max()
        assert error <= RELATIVE[dtype], (name, error)


@pytest.mark.parametrize("form", list(quantization.legal()), ids=str)
def test_every_format(form: Format) -> None:
    check(three(), form)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_dtypes_and_layouts(dtype: str, layout: str, form: Format) -> None:
    check(three(dtype, layout), form, layout)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": (20, 5)},
        {"softcap": 5.0, "softmax_scale": 0.3},
        {"attn_mask": (41, 53)},
        {"attn_mask": (2, 1, 1, 53)},
        {"learnable_sink": (4,)},
        {"causal": True, "attn_mask": (4, 41, 53), "learnable_sink": (4,)},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    given = {
        name: draw(*x, seed=5) if name in ("attn_mask", "learnable_sink") else x
        for name, x in options.items()
    }
    check(three(), INT8, **given)


def test_only_what_is_asked_for() -> None:
    q, k, v = three()
    v.requires_grad_(False)
    attention(q, k, v, *INT8).sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is None
    with torch.no_grad():
        assert attention(q, k, v, *INT8).grad_fn is None


def test_autocast() -> None:
    tensors = three()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*tensors, *INT8)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*(x.bfloat16() for x in tensors), *INT8))
    out.float().sum().backward()
    assert {x.grad.dtype for x in tensors} == {torch.float32}


def saved_bytes(call: Any) -> int:
    """Bytes of what autograd keeps of a call."""
    kept: dict[int, int] = {}

    def pack(x: Any) -> Any:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_a_quarter_less_is_saved(dtype: str, form: Format) -> None:
    tensors = [draw(1, 128, 4, 64, dtype=dtype, seed=i) for i in range(3)]
    plain = saved_bytes(lambda: umfa.flash_attn_func(*tensors))
    codes = saved_bytes(lambda: attention(*tensors, *form))
    assert codes <= 0.75 * plain


def test_what_cannot_be_had() -> None:
    q, k, v = three()
    with pytest.raises(ValueError, match=r"umfa\.torch\.quantized_attention\] layout is unknown"):
        attention(q, k, v, layout="sbhd")
    with pytest.raises(ValueError, match="layout is unknown"):
        attention(q, k, v, layout=["bshd"])
    with pytest.raises(TypeError, match=r"k is not torch's; got .*ndarray.*; expected torch"):
        attention(q, np.zeros((2, 53, 2, 64), np.float32), v)
    with pytest.raises(umfa.UnsupportedError, match="granularity"):
        attention(q, k, v, "mxfp8", "row")
    with pytest.raises(ValueError, match="x has a NaN or an infinity"):
        attention(q, k * float("nan"), v)
    (gradient,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
