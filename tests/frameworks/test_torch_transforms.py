"""torch.func over umfa: grad, vmap and what combines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import umfa
from tests.cases import normal

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
func: Any = torch.func

SHAPE = (1, 4, 2, 8)


def tensors(count: int = 3, *lead: int) -> list[Any]:
    return [torch.from_numpy(normal((*lead, *SHAPE), seed=i)) for i in range(count)]


def attend(*x: Any) -> Any:
    return umfa.flash_attn_func(*x, causal=True)


def loss(*x: Any) -> Any:
    return attend(*x).square().sum()


def leaves(given: list[Any]) -> list[Any]:
    return [x.detach().clone().requires_grad_() for x in given]


def test_grad() -> None:
    given = tensors()
    expected = torch.autograd.grad(loss(*(own := leaves(given))), own)
    for one, other in zip(func.grad(loss, (0, 1, 2))(*given), expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(func.vjp(attend, *given)[0], attend(*given))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0)], ids=str)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    given = [
        torch.from_numpy(normal(SHAPE if dim is None else (*SHAPE[:dim], 3, *SHAPE[dim:]), seed=i))
        for i, dim in enumerate(in_dims)
    ]
    found = func.vmap(attend, in_dims)(*given)
    of_gradient = func.vmap(func.grad(loss, (0, 1, 2)), in_dims)(*given)
    for i in range(3):
        own = [
            x if dim is None else x.select(dim, i) for x, dim in zip(given, in_dims, strict=True)
        ]
        assert torch.equal(found[i], attend(*own))
        for one, other in zip(of_gradient, func.grad(loss, (0, 1, 2))(*own), strict=True):
            assert torch.equal(one[i], other)


def test_gradient_of_vmap() -> None:
    """Leaves outside, and a tensor that all slices share."""
    q, k, v = leaves(tensors())
    stacked = torch.stack([q, 2 * q])
    func.vmap(attend, (0, None, None))(stacked, k, v).square().sum().backward()
    again = leaves([q, k, v])
    (loss(again[0], *again[1:]) + loss(2 * again[0], *again[1:])).backward()
    for one, other in zip((q, k, v), again, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_jacrev() -> None:
    q, k, v = tensors()
    found = func.jacrev(attend)(q, k, v)
    own = leaves([q])[0]
    out = attend(own, k, v)
    for i in (0, 37, out.numel() - 1):
        one = torch.zeros_like(out).flatten()
        one[i] = 1
        (row,) = torch.autograd.grad(out, own, one.view_as(out), retain_graph=True)
        torch.testing.assert_close(found.flatten(0, 3)[i], row)


def test_tables_and_options() -> None:
    """Packed sequences under vmap, and the gradients of a mask and of sinks."""
    rows = [torch.from_numpy(normal((2, 6, 2, 8), seed=i)) for i in range(3)]
    table = torch.tensor([0, 2, 6], dtype=torch.int32)

    def packed(*x: Any) -> Any:
        return umfa.flash_attn_varlen_func(*x, table, table, 4, 4)

    found = func.vmap(packed)(*rows)
    for i in range(2):
        assert torch.equal(found[i], packed(*(x[i] for x in rows)))

    q, k, v = tensors()
    mask, sinks = torch.from_numpy(normal((4, 4), seed=5)), torch.from_numpy(normal((2,), seed=6))

    def masked(mask: Any, sinks: Any) -> Any:
        return umfa.flash_attn_func(q, k, v, attn_mask=mask, learnable_sink=sinks).square().sum()

    own = leaves([mask, sinks])
    expected = torch.autograd.grad(masked(*own), own)
    for one, other in zip(func.grad(masked, (0, 1))(mask, sinks), expected, strict=True):
        assert torch.equal(one, other)


def test_functionalize() -> None:
    given = tensors()
    assert torch.equal(func.functionalize(attend)(*given), attend(*given))


def test_dropout() -> None:
    given = tensors()

    def dropped(*x: Any) -> Any:
        return umfa.flash_attn_func(*x, 0.5).square().sum()

    torch.manual_seed(3)
    found = func.grad(dropped, (0, 1, 2))(*given)
    torch.manual_seed(3)
    own = leaves(given)
    for one, other in zip(found, torch.autograd.grad(dropped(*own), own), strict=True):
        assert torch.equal(one, other)


TWICE: dict[str, Callable[..., Any]] = {
    "jvp": lambda q, k, v: func.jvp(lambda q: attend(q, k, v), (q,), (q,)),
    "jacfwd": lambda q, k, v: func.jacfwd(lambda q: attend(q, k, v))(q),
    "grad of grad": lambda q, k, v: func.grad(
        lambda q: func.grad(lambda q: loss(q, k, v))(q).sum()
    )(q),
    "hessian": lambda q, k, v: func.hessian(lambda q: loss(q, k, v))(q),
}


# PyTorch's own forward mode still compiles its formulas with torch.jit, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TWICE)
def test_what_is_refused(name: str) -> None:
    text = r"\[umfa.flash_attn_func\] (forward-mode|the gradient of a gradient)"
    with pytest.raises(umfa.UnsupportedError, match=text):
        TWICE[name](*tensors())


def test_writing_is_refused() -> None:
    q, k, v = tensors()
    out = torch.zeros(SHAPE)
    with pytest.raises(umfa.UnsupportedError, match=r"\] out is written in place"):
        func.vmap(lambda q: umfa.flash_attn_func(q, k, v, out=out))(q[None])
    assert not out.any()


def test_can_run_cannot_see_through_a_transform() -> None:
    reasons = []

    def ask(*x: Any) -> Any:
        possible, reason = umfa.can_run(*x)
        assert not possible
        reasons.append(reason)
        return attend(*x)

    func.vmap(ask)(*tensors(3, 2))
    assert reasons[0].startswith("[umfa.can_run] q is inside a torch.func transform")
