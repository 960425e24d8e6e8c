"""mlx's automatic differentiation of the public functions, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import Array
from tests.cases import normal
from tests.frameworks import gradient_calls
from tests.frameworks.gradient_calls import CALLS, Call
from tests.gradients import RELATIVE, compare

NAME = r"^\[umfa\.flash_attn_func\] "


@pytest.fixture
def mlx() -> array_libraries.Framework:
    return array_libraries.load("mlx")


def weighted(mx: Any, call: Callable[..., Any], dout: Array, dlse: Array | None) -> Any:
    """The loss whose gradients are those of (dout, dlse)."""

    def loss(*tensors: Any) -> Any:
        if dlse is None:
            return (call(*tensors) * mx.array(dout)).sum()
        out, lse = call(*tensors, return_lse=True)
        return (out * mx.array(dout)).sum() + (lse * mx.array(dlse)).sum()

    return loss


def check(mlx: array_libraries.Framework, call: Call, found: Any, expected: Any) -> None:
    for (name, tensor), gradient in zip(call.tensors.items(), found, strict=True):
        compare(name, mlx.numpy(gradient), expected[name], RELATIVE[tensor.dtype.name])


def shapes_of(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tensors, function = call.rebuilt(np.asarray)
    results = function(*tensors, **({} if "query" in call.tensors else {"return_lse": True}))
    return (results.shape, ()) if "query" in call.tensors else tuple(x.shape for x in results)


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_gradients(mlx: array_libraries.Framework, make: Callable[[], Call]) -> None:
    call = make()
    mx = mlx.module
    out_shape, lse_shape = shapes_of(call)
    dout = normal(out_shape, seed=8)
    dlse = normal(lse_shape, seed=9) if lse_shape else None
    tensors, function = call.rebuilt(mlx.tensor)
    loss = weighted(mx, function, dout, dlse)
    value, found = mx.value_and_grad(loss, list(range(len(tensors))))(*tensors)
    found = found if isinstance(found, (list, tuple)) else [found]
    assert float(value) == pytest.approx(float(loss(*tensors)), rel=1e-6)
    check(mlx, call, found, call.gradients(dout, dlse))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_and_checkpoint(mlx: array_libraries.Framework, dtype: str) -> None:
    mx = mlx.module
    call = gradient_calls.plain()
    narrow = {name: x.astype(array_libraries.DTYPES[dtype]) for name, x in call.tensors.items()}
    call.tensors.update(narrow)
    tensors, function = call.rebuilt(mlx.tensor)
    dout = normal(function(*tensors).shape, dtype, seed=8).astype(np.float32)
    kept = mx.checkpoint(lambda *x: (function(*x).astype(mx.float32) * mx.array(dout)).sum())
    found = mx.grad(kept, [0, 1, 2])(*tensors)
    assert all(gradient.dtype == tensors[0].dtype for gradient in found)
    check(mlx, call, found, call.gradients(dout, None))


def test_gradient_of_the_log_sum_exp_alone(mlx: array_libraries.Framework) -> None:
    call = gradient_calls.plain()
    tensors, function = call.rebuilt(mlx.tensor)
    out_shape, lse_shape = shapes_of(call)
    dlse = normal(lse_shape, seed=9)

    def loss(*x: Any) -> Any:
        return (function(*x, return_lse=True)[1] * mlx.module.array(dlse)).sum()

    found = mlx.module.grad(loss, [0, 1])(*tensors)
    own = call.gradients(np.zeros(out_shape), dlse)
    for name, gradient in zip("qk", found, strict=True):
        compare(name, mlx.numpy(gradient), own[name], 2e-5)


def test_through_other_operations(mlx: array_libraries.Framework) -> None:
    """A lazy graph around the call: shared weights, several calls and a constant mask."""
    mx = mlx.module
    x, w = (mx.array(normal(shape, seed=i)) for i, shape in enumerate([(1, 6, 16), (16, 16)]))
    w = w / 4
    mask = mx.array(normal((6, 6), seed=3))

    def layers(attention: Callable[..., Any]) -> Callable[[Any], Any]:
        def loss(w: Any) -> Any:
            y = x
            for _ in range(2):
                heads = (y @ w).reshape(1, 6, 2, 8).transpose(0, 2, 1, 3)
                out = attention(heads, heads, heads)
                y = y + out.transpose(0, 2, 1, 3).reshape(y.shape)
            return (y**2).mean()

        return loss

    own = mx.grad(layers(lambda *x: umfa.scaled_dot_product_attention(*x, mask)))(w)
    fused = mx.fast.scaled_dot_product_attention
    theirs = mx.grad(layers(lambda *x: fused(*x, scale=8**-0.5, mask=mask)))(w)
    compare("dw", mlx.numpy(own), mlx.numpy(theirs).astype(np.float64), 2e-5)


def test_what_is_refused(mlx: array_libraries.Framework) -> None:
    mx = mlx.module
    tensors, call = gradient_calls.plain().rebuilt(mlx.tensor)

    def loss(*x: Any) -> Any:
        return (call(*x) ** 2).sum()

    def second(q: Any) -> Any:
        return mx.grad(loss)(q, *tensors[1:]).sum()

    for raises, what in (
        (lambda: mx.grad(second)(tensors[0]), "the gradient of a gradient"),
        (lambda: mx.jvp(loss, tensors, tensors), "forward-mode"),
        (lambda: mx.compile(loss)(*tensors), "q is being traced by mx.compile or mx.vmap"),
        (lambda: mx.vmap(loss)(*(x[None] for x in tensors)), "q is being traced"),
    ):
        with pytest.raises(umfa.UnsupportedError, match=NAME + what):
            mx.eval(raises())


def test_tensors_without_a_gradient_are_refused(mlx: array_libraries.Framework) -> None:
    """And only when theirs is asked for."""
    mx = mlx.module
    q, k, v = (mx.array(normal((1, 4, 1, 16), seed=i)) for i in range(3))
    cos, sin = (mx.array(normal((4, 4), seed=i)) for i in (3, 4))

    def rotated(q: Any, cos: Any) -> Any:
        return umfa.fused_rope_attention(q, k, v, cos, sin).sum()

    assert mx.grad(rotated)(q, cos).shape == q.shape
    with pytest.raises(umfa.UnsupportedError, match=r"^\[umfa.fused_rope_attention\] rotary_cos"):
        mx.eval(mx.grad(rotated, 1)(q, cos))

    def dropped(q: Any, which: int) -> Any:
        options = {"dropout_p": 0.5, "dropout_seed": 1, "return_attn_probs": True}
        return umfa.flash_attn_func(q, k, v, **options)[which].sum()

    assert mx.grad(dropped)(q, 0).shape == q.shape
    with pytest.raises(umfa.UnsupportedError, match=NAME + "the matrix of weights"):
        mx.eval(mx.grad(dropped)(q, 2))


def test_a_bool_mask_has_no_gradient(mlx: array_libraries.Framework) -> None:
    mx = mlx.module
    call = gradient_calls.sdpa()
    mask = call.tensors.pop("attn_mask") > 0
    mask[:, 0] = True
    call.options["attn_mask"] = mx.array(mask)
    tensors, function = call.rebuilt(mlx.tensor)
    found = mx.grad(lambda *x: function(*x).sum(), [0, 1, 2])(*tensors)
    turned = [x.transpose(0, 2, 1, 3) for x in call.tensors.values()]
    own = reference.gradients(*turned, np.ones(turned[0].shape), mask=mask)
    for name, gradient, expected in zip("qkv", found, own[:3], strict=True):
        compare(name, mlx.numpy(gradient), expected.transpose(0, 2, 1, 3), 2e-5)
