"""Calls on mlx arrays in MLX's graph: on a stand-in for its Metal device, whose kernels run when
MLX evaluates them. No part of it is Apple's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.checks import BASE, LSE, assert_close
from tests.gradients import RELATIVE, assert_gradients
from tools.metal.double import Double

mx = pytest.importorskip("mlx.core")

import umfa.mlx  # noqa: E402
from tests.metal.host.mlx_metal import MlxMetal, standing_in  # noqa: E402


@pytest.fixture
def mlx(double: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlxMetal]:
    """A Mac whose MLX has a GPU: umfa plans for the double's."""
    with standing_in(monkeypatch) as device:
        yield device


def made(dtype: Any, rows: int, keys: int, heads: int = 4, dim: int = 64) -> Any:
    """Query, key and value (batch, rows, heads, dim); half as many heads of keys."""
    generator = np.random.default_rng(rows * keys)
    shapes = [(2, rows, heads, dim), (2, keys, heads // 2, dim), (2, keys, heads // 2, dim)]
    return [mx.array(generator.standard_normal(s).astype(np.float32)).astype(dtype) for s in shapes]


def numbers(array: Any) -> Any:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def expected(tensors: Any, **options: Any) -> Any:
    return reference.attention(*map(numbers, tensors), **options)


def options_of(kind: str) -> dict[str, Any]:
    """Options of a call on 20 queries and 70 keys, arrays among them."""
    draw = np.random.default_rng(5)
    return {
        "plain": {},
        "window": {"window_size": (9, 3)},
        "softcap": {"softcap": 5.0},
        "mask of numbers": {"attn_mask": mx.array(draw.random((1, 4, 20, 70), np.float32))},
        "mask of bool": {"attn_mask": mx.array(draw.random((2, 1, 1, 70)) > 0.3)},
        "slopes": {"alibi_slopes": mx.array(draw.random(4, np.float32))},
        "sinks": {"learnable_sink": mx.array(draw.random(4, np.float32))},
        "dropout": {"dropout_p": 0.3, "dropout_seed": 7},
    }[kind]


def in_reference(options: dict[str, Any]) -> dict[str, Any]:
    """The options as tests/reference.py names them."""
    arrays = {
        name: (np.array(x) if x.dtype == mx.bool_ else numbers(x)) if isinstance(x, mx.array) else x
        for name, x in options.items()
    }
    return {"mask" if name == "attn_mask" else name: value for name, value in arrays.items()}


def test_nothing_runs_within_a_call(mlx: MlxMetal) -> None:
    q, k, v = made(mx.float16, 20, 70)
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    after = umfa.stats()
    assert mlx.ran == mlx.compiled == []
    assert after.metal_calls - before.metal_calls == 1
    assert after.plans_in_stream - before.plans_in_stream == 1
    assert after.command_buffers == before.command_buffers
    assert after.waits == before.waits
    wanted, wanted_lse = expected((q, k, v), causal=True)
    assert_close(mlx.read(out), wanted, BASE["float16"])
    assert_close(mlx.read(lse), wanted_lse, LSE, "lse")
    assert len(mlx.ran) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["plain", "window", "softcap", "mask of numbers", "mask of bool", "slopes", "sinks", "dropout"],
)
def test_options(mlx: MlxMetal, kind: str) -> None:
    """Of arrays that have no value yet; slopes and sinks are too few for device memory."""
    tensors = [x + 0 for x in made(mx.float16, 20, 70)]
    options = {
        name: mx.where(True, x, x) if isinstance(x, mx.array) else x
        for name, x in options_of(kind).items()
    }
    out = umfa.flash_attn_func(*tensors, **options)
    assert mlx.ran == []
    wanted, _ = expected(tensors, **in_reference(options_of(kind)))
    assert_close(mlx.read(out), wanted, BASE["float16"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [20, 1])
def test_dtypes(mlx: MlxMetal, dtype: str, rows: int) -> None:
    """Of many queries, and of one, whose keys are split over several kernels."""
    tensors = made(getattr(mx, dtype), rows, 500)
    out = umfa.flash_attn_func(*tensors, causal=True)
    wanted, _ = expected(tensors, causal=True)
    assert_close(mlx.read(out), wanted, BASE[dtype])
    assert len(mlx.ran) == (1 if rows == 20 else 2)


@pytest.mark.slow
def test_gradients_and_checkpoint(mlx: MlxMetal) -> None:
    tensors = made(mx.float16, 20, 70)
    dout = mx.array(np.random.default_rng(9).standard_normal((2, 20, 4, 64)).astype(np.float16))

    def loss(*x: Any) -> Any:
        return (umfa.flash_attn_func(*x, causal=True) * dout).astype(mx.float32).sum()

    before = umfa.stats()
    value, found = mx.value_and_grad(loss, (0, 1, 2))(*tensors)
    again = mx.grad(mx.checkpoint(loss), (0, 1, 2))(*tensors)
    assert mlx.ran == []
    assert umfa.stats().waits == before.waits
    wanted = reference.gradients(*map(numbers, tensors), numbers(dout), causal=True)
    names = ("dq", "dk", "dv")
    assert_gradients(
        dict(zip(names, map(mlx.read, found), strict=True)), wanted, RELATIVE["float16"]
    )
    out, _ = expected(tensors, causal=True)
    assert float(mlx.read(value)) == pytest.approx((out * numbers(dout)).sum(), rel=1e-2)
    for one, other in zip(found, again, strict=True):
        assert (mlx.read(one) == mlx.read(other)).all()


@pytest.mark.slow
def test_compile(mlx: MlxMetal) -> None:
    """A compiled function traces once and runs for other values, gradients included."""
    traced = []

    def step(q: Any, k: Any, v: Any) -> Any:
        traced.append(1)
        out = umfa.flash_attn_func(q * 2, k, v, causal=True)
        return (out.astype(mx.float32) ** 2).sum()

    compiled = mx.compile(mx.value_and_grad(step, (0, 1, 2)))
    for scale in (1, 0.5):
        tensors = [x * scale for x in made(mx.float16, 20, 70)]
        value, found = compiled(*tensors)
        doubled = [numbers(tensors[0] * 2), *map(numbers, tensors[1:])]
        out, _ = reference.attention(*doubled, causal=True)
        assert float(mlx.read(value)) == pytest.approx((out**2).sum(), rel=1e-2)
        wanted = reference.gradients(*doubled, 2 * out, causal=True)
        wanted = wanted._replace(dq=2 * wanted.dq)
        names = ("dq", "dk", "dv")
        assert_gradients(
            dict(zip(names, map(mlx.read, found), strict=True)), wanted, RELATIVE["float16"]
        )
    assert len(traced) == 1


def packed(dtype: Any, lengths: tuple[tuple[int, int], ...], gaps: int = 0) -> Any:
    """(query, key, value) packed, the offsets of both, and how many queries and keys are in use.
    Behind each sequence `gaps` rows are not."""
    draw = np.random.default_rng(3)
    offsets = [np.cumsum([0, *(n[i] + gaps for n in lengths)]).astype(np.int32) for i in (0, 1)]
    used = [np.array([n[i] for n in lengths], np.int32) for i in (0, 1)]
    q, k, v = (
        mx.array(draw.standard_normal((offsets[i][-1], heads, 64)).astype(np.float32)).astype(dtype)
        for i, heads in ((0, 4), (1, 2), (1, 2))
    )
    return (q, k, v), offsets, used


def check_packed(
    mlx: MlxMetal, tensors: Any, offsets: Any, used: Any, out: Any, lse: Any, **options: Any
) -> None:
    """Each sequence as a call of its own; rows that belong to none are 0, and -inf in lse."""
    found, found_lse = mlx.read(out), mlx.read(lse)
    free = np.ones(len(found), bool)
    for i, (rows, keys) in enumerate(zip(*used, strict=True)):
        mine = slice(offsets[0][i], offsets[0][i] + rows)
        theirs = slice(offsets[1][i], offsets[1][i] + keys)
        own = [tensors[0][mine][None], *(x[theirs][None] for x in tensors[1:])]
        wanted, wanted_lse = expected(own, **options)
        assert_close(found[mine][None], wanted, BASE["float16"])
        assert_close(found_lse[:, mine][None], wanted_lse, LSE, "lse")
        free[mine] = False
    assert (found[free] == 0).all()
    assert np.isneginf(found_lse[:, free]).all()


@pytest.mark.slow
@pytest.mark.parametrize("gaps", [0, 3])
@pytest.mark.parametrize("lengths", [((9, 20), (17, 33)), ((9, 20), (2, 300), (1, 40))])
def test_packed_sequences(mlx: MlxMetal, gaps: int, lengths: Any) -> None:
    """Several kernels write rows of the same results: for long sequences, for short ones, and for
    rows that belong to none."""
    tensors, offsets, used = packed(mx.float16, lengths, gaps)
    before = umfa.stats().waits
    out, lse, _ = umfa.flash_attn_varlen_func(
        *tensors, *offsets, 20, 303, seqused_q=used[0], seqused_k=used[1], causal=True,
        return_attn_probs=True,
    )  # fmt: skip
    assert mlx.ran == []
    check_packed(mlx, tensors, offsets, used, out, lse, causal=True)
    assert umfa.stats().waits == before
    assert len(mlx.ran) == 1 + 2 * (len(lengths) == 3)


MAPPED = {
    "all": (0, 0, 0, None),
    "queries": (1, None, None, None),
    "queries and a mask": (0, None, None, 0),
    "another axis": (3, 2, 0, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAPPED)
@pytest.mark.parametrize("gradients", [False, True])
def test_vmap(mlx: MlxMetal, kind: str, gradients: bool) -> None:
    """One call of a larger batch; each index as by itself."""
    draw = np.random.default_rng(2)
    axes = MAPPED[kind]
    shapes = [(2, 4, 20, 64), (2, 2, 70, 64), (2, 2, 70, 64), (4, 20, 70)]
    own = [
        mx.array(
            draw.standard_normal(
                shape if axis is None else (*shape[:axis], 3, *shape[axis:])
            ).astype(np.float16)
        )
        for shape, axis in zip(shapes, axes, strict=True)
    ]

    def call(*x: Any) -> Any:
        return umfa.scaled_dot_product_attention(*x, enable_gqa=True)

    def loss(*x: Any) -> Any:
        return (call(*x).astype(mx.float32) ** 2).sum()

    function = mx.grad(loss, (0, 1, 2, 3)) if gradients else call
    found = umfa.mlx.vmap(function, in_axes=axes)(*own)
    assert mlx.ran == []
    for i in range(3):
        one = [
            x if axis is None else mx.take(x, i, axis) for x, axis in zip(own, axes, strict=True)
        ]
        arrays = list(map(numbers, one))
        turned = [x.transpose(0, 2, 1, 3) for x in arrays[:3]]
        out, _ = reference.attention(*turned, mask=arrays[3])
        if not gradients:
            assert_close(mlx.read(found)[i], out.transpose(0, 2, 1, 3), BASE["float16"])
            continue
        wanted = reference.gradients(*turned, 2 * out, mask=arrays[3])
        named = {
            name: mlx.read(gradient)[i].transpose(0, 2, 1, 3)
            for name, gradient in zip(("dq", "dk", "dv"), found, strict=False)
        }
        named["dmask"] = mlx.read(found[3])[i]
        assert_gradients(named, wanted, RELATIVE["float16"])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rows"), [("float16", 20), ("bfloat16", 1), ("float32", 20)])
def test_arrays_that_start_anywhere(mlx: MlxMetal, dtype: str, rows: int) -> None:
    """Contiguous slices that no 16 bytes begin with; others are copied."""
    tensors = []
    for x in made(getattr(mx, dtype), rows, 500):
        joined = mx.concatenate([mx.zeros(1, x.dtype), x.reshape(-1)])
        mx.eval(joined)
        tensors.append(joined[1:].reshape(x.shape))
    mask = mx.array(np.random.default_rng(1).random(1 + rows * 500) > 0.3)
    mx.eval(mask)
    mask = mask[1:].reshape(1, 1, rows, 500)
    out = umfa.flash_attn_func(*tensors, attn_mask=mask)
    wanted, _ = expected(tensors, mask=np.array(mask))
    assert_close(mlx.read(out), wanted, BASE[dtype])
    reversed_keys = [tensors[0], *(x[:, ::-1] for x in tensors[1:])]
    out = umfa.flash_attn_func(*reversed_keys, causal=True)
    wanted, _ = expected(reversed_keys, causal=True)
    assert_close(mlx.read(out), wanted, BASE[dtype])
