"""umfa under MLX's own attention: `umfa.mlx.enable`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import Array
from tests.cases import normal
from tests.checks import BASE, Tolerance, assert_close
from tests.gradients import RELATIVE, compare

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
umfa_mlx = pytest.importorskip("umfa.mlx")
library = array_libraries.load("mlx")

WHERE = "mlx.fast.scaled_dot_product_attention"
STOCK = mx.fast.scaled_dot_product_attention
B, N, K, T, S, D = 2, 4, 2, 6, 9, 16


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    yield
    umfa_mlx.disable()
    assert mx.fast.scaled_dot_product_attention is STOCK


class Counted:
    """What a block of calls adds to the counters."""

    def __init__(self) -> None:
        self.before = umfa.stats()

    @property
    def taken(self) -> int:
        return umfa.stats().taken.get(WHERE, 0) - self.before.taken.get(WHERE, 0)

    @property
    def left(self) -> dict[str, int]:
        def of(stats: umfa.Stats) -> Counter[str]:
            return Counter({x.reason: x.calls for x in stats.left if x.where == WHERE})

        return dict(of(umfa.stats()) - of(self.before))


def tensors(dtype: str = "float32") -> list[Array]:
    shapes = (B, N, T, D), (B, K, S, D), (B, K, S, D)
    return [normal(shape, dtype, seed=i) for i, shape in enumerate(shapes)]


def sees() -> Array:
    mask = normal((B, 1, T, S), seed=7) > 0
    mask[..., 0] = True
    return mask


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "causal"},
    "bool mask": {"mask": sees()},
    "mask of numbers": {"mask": normal((T, S), seed=5)},
    "sinks": {"sinks": normal((N,), seed=6), "mask": "causal"},
    "fused": {"force_fused": False, "stream": None},
}


def expected(arrays: list[Array], options: dict[str, Any]) -> Array:
    mask = options.get("mask")
    out, _ = reference.attention(
        *(x.swapaxes(1, 2) for x in arrays), softmax_scale=0.3, causal=isinstance(mask, str),
        mask=None if isinstance(mask, str) else mask, learnable_sink=options.get("sinks"),
    )  # fmt: skip
    return out.swapaxes(1, 2)


def given(options: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """With MLX's arrays; numbers in the dtype of the tensors, which MLX demands."""
    made = {}
    for name, x in options.items():
        made[name] = mx.array(x) if isinstance(x, np.ndarray) else x
        if isinstance(x, np.ndarray) and x.dtype != bool:
            made[name] = library.tensor(x.astype(array_libraries.DTYPES[dtype]))
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values(options: dict[str, Any], dtype: str) -> None:
    arrays = tensors(dtype)
    rounded = {
        name: x.astype(array_libraries.DTYPES[dtype]).astype(np.float64)
        if isinstance(x, np.ndarray) and x.dtype != bool
        else x
        for name, x in options.items()
    }
    q, k, v = (library.tensor(x) for x in arrays)
    more = given(options, dtype)
    counted = Counted()
    with umfa_mlx.sdpa():
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, **more)
    assert (counted.taken, counted.left) == (1, {})
    assert library.dtype_name(found) == dtype
    assert_close(library.float64(found), expected(arrays, rounded), BASE[dtype])
    theirs = library.float64(STOCK(q, k, v, scale=0.3, **more))
    slack = 1 if dtype == "float32" else 4  # MLX rounds the weights to the dtype, umfa does not
    assert_close(library.float64(found), theirs, Tolerance(*(slack * x for x in BASE[dtype])))


@pytest.mark.parametrize("options", ["plain", "bool mask", "mask of numbers", "sinks"])
def test_gradients(options: str) -> None:
    """Also of a mask, and through mx.checkpoint, as MLX computes them."""
    q, k, v = (library.tensor(x) for x in tensors())
    more = given(OPTIONS[options])
    names = [x for x in more if isinstance(more[x], mx.array) and more[x].dtype != mx.bool_]
    own = [more.pop(name) for name in names]

    def loss(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        call = mx.checkpoint(
            lambda q, k, v, *rest: mx.fast.scaled_dot_product_attention(
                q, k, v, scale=0.3, **more, **dict(zip(names, rest, strict=True))
            )
        )
        return (call(q, k, v, *rest) ** 2).sum()

    gradients = mx.grad(loss, list(range(3 + len(own))))
    theirs = gradients(q, k, v, *own)
    counted = Counted()
    with umfa_mlx.sdpa():
        found = gradients(q, k, v, *own)
        mx.eval(found)
    assert counted.taken >= 1
    assert not counted.left
    for name, a, b in zip(("q", "k", "v", *names), found, theirs, strict=True):
        compare(name, library.numpy(a), library.float64(b), 10 * RELATIVE["float32"])


def test_mixed_dtypes_give_mlx_s() -> None:
    q, k, v = (library.tensor(x) for x in tensors())
    q, k = q.astype(mx.float16), k.astype(mx.bfloat16)
    with umfa_mlx.sdpa():
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert found.dtype == STOCK(q, k, v, scale=0.3).dtype == mx.float32


def test_modules_and_strided_caches() -> None:
    """mlx.nn's attention; keys that are a part of a longer buffer."""
    module = nn.MultiHeadAttention(32, 4)
    x = library.tensor(normal((2, 7, 32), seed=3))
    mask = nn.MultiHeadAttention.create_additive_causal_mask(7)
    stock = module(x, x, x, mask)
    counted = Counted()
    umfa_mlx.enable()
    found = module(x, x, x, mask)
    q, k, v = (library.tensor(x) for x in tensors())
    longer = [mx.concatenate([x, x * mx.nan], 2)[..., :S, :] for x in (k, v)]
    cached = mx.fast.scaled_dot_product_attention(q[:, :, :1], *longer, scale=0.3)
    assert (counted.taken, counted.left) == (2, {})
    umfa_mlx.disable()
    compare("module", library.numpy(found), library.float64(stock), 1e-5)
    theirs = STOCK(q[:, :, :1], k, v, scale=0.3)
    compare("cached", library.numpy(cached), library.float64(theirs), 1e-5)


def test_what_mlx_traces_runs_on_mlx() -> None:
    """In mx.compile, with its gradients, and in mx.vmap, arrays have no values."""
    q, k, v = (library.tensor(x) for x in tensors())

    def loss(q: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal").sum()

    stock = mx.grad(loss)(q)
    many = mx.stack([q, 2 * q])
    counted = Counted()
    with umfa_mlx.sdpa():
        compiled = mx.compile(mx.grad(loss))(q)
        mapped = mx.vmap(loss)(many)
        mx.eval(compiled, mapped)
    assert mx.array_equal(compiled, stock)
    assert mx.allclose(mapped, mx.stack([loss(q), loss(2 * q)]), rtol=1e-5).item()
    assert counted.taken == 0
    reason = "q is being traced by mx.compile or mx.vmap; got a tracer"
    ((found, calls),) = counted.left.items()
    assert found.startswith(reason)
    assert calls == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stream": mx.cpu}, "a stream is given; got"),
        ({"mask": mx.zeros((T, S), mx.int32)}, "mask has the wrong dtype; got int32"),
    ],
    ids=str,
)
def test_what_umfa_leaves_to_mlx(change: dict[str, Any], reason: str) -> None:
    q, k, v = (library.tensor(x) for x in tensors())
    counted = Counted()
    with umfa_mlx.sdpa():
        try:
            found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, **change)
        except ValueError as error:
            assert not str(error).startswith("[umfa")  # MLX's own  # noqa: PT017
        else:
            assert mx.array_equal(found, STOCK(q, k, v, scale=0.3, **change))
    ((text, calls),) = counted.left.items()
    assert text.startswith(reason)
    assert (counted.taken, calls) == (0, 1)


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3, "mask": "future"}, {"scale": 0.3, "other": 1}], ids=str
)
def test_wrong_calls_raise_mlx_s_error(options: dict[str, Any]) -> None:
    q, k, v = (library.tensor(x) for x in tensors())
    with pytest.raises((TypeError, ValueError)) as theirs:
        STOCK(q, k, v, **options)
    with umfa_mlx.sdpa(), pytest.raises(type(theirs.value)) as ours:
        mx.fast.scaled_dot_product_attention(q, k, v, **options)
    assert str(ours.value) == str(theirs.value)


def test_arrays_of_others_raise_mlx_s_error() -> None:
    q, k, v = tensors()
    with pytest.raises(TypeError) as theirs:
        STOCK(q, k, v, scale=0.3)
    for given in ((q, k, v), (mx.array(q), k.astype(np.float16), v)):
        with umfa_mlx.sdpa(), pytest.raises(TypeError, match="incompatible function arguments"):
            mx.fast.scaled_dot_product_attention(*given, scale=0.3)
    assert "incompatible function arguments" in str(theirs.value)


def test_the_switch() -> None:
    """Reasons add up; each is taken back; another replacement is left alone."""
    assert not umfa_mlx.is_enabled()
    umfa_mlx.enable()
    umfa_mlx.enable()
    with umfa_mlx.sdpa(), umfa_mlx.sdpa():
        umfa_mlx.disable()
        assert umfa_mlx.is_enabled()
    assert not umfa_mlx.is_enabled()
    assert mx.fast.scaled_dot_product_attention is STOCK
    umfa_mlx.enable()

    def other(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    mx.fast.scaled_dot_product_attention = other
    try:
        umfa_mlx.disable()
        assert mx.fast.scaled_dot_product_attention is other
    finally:
        mx.fast.scaled_dot_product_attention = STOCK


def test_threads() -> None:
    """The switch holds for all of them."""
    q, k, v = (library.tensor(x) for x in tensors())
    mx.eval(q, k, v)
    counted = Counted()
    found: list[Any] = []

    def run() -> None:
        for _ in range(5):
            found.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3))
            mx.eval(found[-1])  # MLX's streams are those of a thread

    threads = [threading.Thread(target=run) for _ in range(3)]
    with umfa_mlx.sdpa():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counted.taken == 15
    assert all(mx.array_equal(x, found[0]) for x in found)
