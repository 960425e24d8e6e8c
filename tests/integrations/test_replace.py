"""Other programs may replace the same function while umfa has replaced it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import umfa
from umfa._replace import Replacement


def _stock(x: int) -> str:
    return f"stock {x}"


def _library() -> tuple[Any, Replacement]:
    library = SimpleNamespace(f=_stock)
    made = Replacement(
        library, "f", lambda stock: lambda x: "ours" if x > 0 else f"left: {stock(x)}"
    )
    return library, made


def _wrap(library: Any) -> Any:
    inner = library.f
    library.f = lambda x: f"wrapped {inner(x)}"
    return inner


def test_the_function_itself_is_restored() -> None:
    library, replacement = _library()
    replacement.remove()
    for _ in range(2):
        replacement.install()
        replacement.install()
        assert replacement.installed
        assert library.f(1) == "ours"
        assert library.f(0) == "left: stock 0"
        replacement.remove()
        replacement.remove()
        assert not replacement.installed
        assert library.f is _stock


def test_a_wrapper_stays_and_calls_the_library() -> None:
    library, replacement = _library()
    replacement.install()
    ours = _wrap(library)
    wrapper = library.f
    assert library.f(1) == "wrapped ours"
    replacement.remove()
    assert library.f is wrapper
    assert library.f(1) == "wrapped stock 1"
    replacement.install()
    assert library.f(1) == "ours"
    assert library.f(0) == "left: wrapped stock 0", "it does not call itself"
    replacement.remove()
    assert library.f is wrapper
    assert ours(1) == "stock 1", "a name that was imported while umfa was enabled"


def test_mlx() -> None:
    mx: Any = pytest.importorskip("mlx.core")
    umfa_mlx = pytest.importorskip("umfa.mlx")
    stock, q = mx.fast.scaled_dot_product_attention, mx.ones((1, 2, 3, 8))
    try:
        umfa_mlx.enable()
        inner = mx.fast.scaled_dot_product_attention
        mx.fast.scaled_dot_product_attention = lambda *args, **options: inner(*args, **options)
        umfa_mlx.disable()
        before = umfa.stats()
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)
        assert umfa.stats().taken == before.taken
        umfa_mlx.enable()
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, stream=mx.cpu)  # left to MLX
        assert umfa.stats().left != before.left
    finally:
        umfa_mlx.disable()
        mx.fast.scaled_dot_product_attention = stock


def test_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    umfa_torch: Any = pytest.importorskip("umfa.torch")
    ragged: Any = pytest.importorskip("torch.nested._internal.ops")
    attend, x = torch.nn.MultiheadAttention(8, 2), torch.ones(3, 1, 8)
    for holder, name in (
        (torch.nn.functional, "multi_head_attention_forward"),
        (ragged, "jagged_scaled_dot_product_attention"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # restored at the end
        with umfa_torch.sdpa():
            inner = getattr(holder, name)

            def wrapper(*args: Any, _inner: Any = inner, **options: Any) -> Any:
                return _inner(*args, **options)

            setattr(holder, name, wrapper)
        assert getattr(holder, name) is wrapper
    before = umfa.stats()
    attend(x, x, x)
    assert umfa.stats().left == before.left, "umfa is not enabled"
    with umfa_torch.sdpa():
        attend(x, x, x)
    after = umfa.stats()
    assert sum(x.calls for x in after.left) == sum(x.calls for x in before.left) + 1
