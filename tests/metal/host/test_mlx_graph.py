"""Calls on mlx arrays in MLX's graph: on a stand-in for its Metal device, whose kernels run when
MLX evaluates them. No part of it is Apple's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.checks import BASE, LSE, assert_close
from tests.gradients import RELATIVE, assert_gradients
from tools.metal.double import Double
from tools.metal.emulator.reserved import macros_of

mx = pytest.importorskip("mlx.core")

import umfa.mlx  # noqa: E402
from tests.metal.host.mlx_metal import ATTRIBUTES, MlxMetal, standing_in  # noqa: E402
from umfa._frameworks import _metal_body, _mlx_graph  # noqa: E402


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


def attending(ran: list[str]) -> list[str]:
    """The kernels that attend, without those that put strides into their parameters."""
    return [name for name in ran if "umfa_strides" not in name]


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
    assert after.plans_in_graph - before.plans_in_graph == 1
    assert after.command_buffers == before.command_buffers
    assert after.waits == before.waits
    wanted, wanted_lse = expected((q, k, v), causal=True)
    assert_close(mlx.read(out), wanted, BASE["float16"])
    assert_close(mlx.read(lse), wanted_lse, LSE, "lse")
    assert len(attending(mlx.ran)) == 1


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
    assert len(attending(mlx.ran)) == (1 if rows == 20 else 2)


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
    assert len(attending(mlx.ran)) == 1 + 2 * (len(lengths) == 3)


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
    """Slices that no 16 bytes begin with."""
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


STRIDED = {
    "of a cache": lambda x: mx.concatenate([x, x + 7], axis=1)[:, : x.shape[1]],
    "heads in front": lambda x: mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "reversed": lambda x: mx.contiguous(x[:, ::-1])[:, ::-1],
    "of a packed tensor": lambda x: mx.concatenate([x + 7, x, x + 7], axis=-1)[..., 64:128],
    "channels in front": lambda x: mx.contiguous(x.swapaxes(1, 3)).swapaxes(1, 3),
    "every other channel": lambda x: mx.repeat(x, 2, axis=-1)[..., ::2],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("rows", [20, 1])
def test_arrays_lie_as_they_do(mlx: MlxMetal, kind: str, rows: int) -> None:
    """Strides that are known when MLX has evaluated the arrays, masks and gradients included."""
    plain = made(mx.float16, rows, 500)
    tensors = [STRIDED[kind](x) for x in plain]
    mask = mx.array(np.random.default_rng(1).standard_normal((1, 4, 600, rows)), mx.float16)
    mask = mask.swapaxes(2, 3)[..., :500]
    weights = mx.array(np.random.default_rng(2).standard_normal((2, 4, rows, 64)), mx.float16)

    def loss(*x: Any) -> Any:
        out = umfa.flash_attn_func(*x, attn_mask=mask)
        return (out.transpose(0, 2, 1, 3) * weights).astype(mx.float32).sum(), out

    (_, out), found = mx.value_and_grad(loss, (0, 1, 2))(*tensors)
    assert mlx.ran == []
    wanted, _ = expected(plain, mask=numbers(mask))
    assert_close(mlx.read(out), wanted, BASE["float16"])
    dout = numbers(weights).transpose(0, 2, 1, 3)
    wanted_ = reference.gradients(*map(numbers, plain), dout, mask=numbers(mask))
    named = dict(zip(("dq", "dk", "dv"), map(mlx.read, found), strict=True))
    assert_gradients(named, wanted_, RELATIVE["float16"])


@pytest.mark.slow
def test_a_gradient_of_a_map_and_a_map_of_maps(mlx: MlxMetal) -> None:
    draw = np.random.default_rng(2)
    q, k, v = (
        mx.array(draw.standard_normal((2, 3, 1, n, 2, 64)).astype(np.float16)) for n in (20, 70, 70)
    )

    def call(*x: Any) -> Any:
        return umfa.flash_attn_func(*x, causal=True)

    twice = umfa.mlx.vmap(umfa.mlx.vmap(call, in_axes=(0, 0, 0)), in_axes=(0, 0, 0))
    found, gradient = mx.value_and_grad(lambda *x: twice(*x).astype(mx.float32).sum())(q, k, v)
    assert mlx.ran == []
    arrays = [numbers(x).reshape(6, *x.shape[3:]) for x in (q, k, v)]
    out, _ = reference.attention(*arrays, causal=True)
    assert float(mlx.read(found)) == pytest.approx(out.sum(), rel=1e-2, abs=0.5)
    wanted = reference.gradients(*arrays, np.ones_like(out), causal=True)
    assert_gradients(
        {"dq": mlx.read(gradient).reshape(arrays[0].shape)}, wanted, RELATIVE["float16"]
    )


def test_what_vmap_refuses(mlx: MlxMetal) -> None:
    q, k, v = (x[None] for x in made(mx.float16, 20, 70))
    sinks = mx.zeros((1, 4), mx.float16)

    def refused(message: str, options: dict[str, Any], *more: Any, axes: Any = 0) -> None:
        def call(q: Any, k: Any, v: Any, *more: Any) -> Any:
            return umfa.flash_attn_func(q, k, v, **dict(zip(("learnable_sink",), more)), **options)  # noqa: B905

        with pytest.raises(umfa.UnsupportedError, match=message):
            umfa.mlx.vmap(call, in_axes=axes)(q, k, v, *more)

    refused("the dropped weights depend", {"dropout_p": 0.5, "dropout_seed": 1})
    refused("learnable_sink has no batch dimension", {}, sinks)
    offsets = np.array([0, 20], np.int32), np.array([0, 70], np.int32)
    with pytest.raises(umfa.UnsupportedError, match="sequences of different lengths"):
        umfa.mlx.vmap(lambda *x: umfa.flash_attn_varlen_func(*x, *offsets, 20, 70))(
            *(x[:, 0] for x in (q, k, v))
        )
    with pytest.raises(ValueError, match=r"\[Primitive::vmap\] Not implemented"):  # MLX's
        mx.vmap(umfa.flash_attn_func)(q, k, v)
    assert mlx.ran == []


@pytest.mark.slow
@pytest.mark.parametrize("first", ["mapped", "by itself"])
def test_a_compiled_function_mapped_and_by_itself(mlx: MlxMetal, first: str) -> None:
    """Neither trace is taken for the other."""
    compiled = mx.compile(umfa.flash_attn_func)
    tensors = made(mx.float16, 20, 70)
    calls = {
        "mapped": lambda: umfa.mlx.vmap(compiled)(*(x[None] for x in tensors))[0],
        "by itself": lambda: compiled(*tensors),
    }
    wanted, _ = expected(tensors)
    for name in sorted(calls, key=lambda name: name != first):
        assert_close(mlx.read(calls[name]()), wanted, BASE["float16"])


def test_what_stands_for_a_mapped_result_has_no_value(mlx: MlxMetal) -> None:
    with _mlx_graph.mapping():
        graph = _mlx_graph.Graph({}, ["out"])
        _, cell = graph.allocate(None, (2, 3), "float16")
        graph.play({"launches": [], "tensors": [("out", True)]})
    assert cell.result().shape == (2, 3)
    mx.eval(cell.result())
    mx.synchronize()
    with pytest.raises(ValueError, match="greater than the maximum"):
        mlx.check()
    mlx.errors.clear()


@pytest.mark.slow
def test_mlxs_own_attention(mlx: MlxMetal) -> None:
    """With `umfa.mlx`, compiled, as a program calls it that knows nothing of umfa."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in made(mx.float16, 20, 70))
    sinks = mx.array(np.random.default_rng(1).standard_normal(4).astype(np.float16))
    before = umfa.stats()

    def model(q: Any, k: Any, v: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=0.125, mask="causal", sinks=sinks
        )

    with umfa.mlx.sdpa():
        out = mx.compile(model)(q, k, v)
    after = umfa.stats()
    assert after.left == before.left
    assert sum(after.taken.values()) == sum(before.taken.values()) + 1
    assert mlx.ran == []
    wanted, _ = expected(
        (x.transpose(0, 2, 1, 3) for x in (q, k, v)), causal=True, learnable_sink=numbers(sinks)
    )
    assert_close(mlx.read(out.transpose(0, 2, 1, 3)), wanted, BASE["float16"])


@pytest.mark.slow
def test_combine(mlx: MlxMetal) -> None:
    draw = np.random.default_rng(6)
    parts = mx.array(draw.standard_normal((3, 2, 5, 2, 24)).astype(np.float32))
    sums = mx.array(draw.standard_normal((3, 2, 5, 2)).astype(np.float32))
    merged, lse = mx.compile(umfa.flash_attn_combine)(parts, sums)
    assert mlx.ran == []
    wanted, wanted_lse = reference.combine(numbers(parts), numbers(sums))
    assert_close(mlx.read(merged), wanted, BASE["float32"])
    assert_close(mlx.read(lse), wanted_lse, LSE, "lse")


def test_verdicts_evaluate_nothing(mlx: MlxMetal) -> None:
    tensors = made(mx.float16, 20, 70)
    out = umfa.flash_attn_func(*tensors, causal=True)
    assert umfa.can_run(out, *tensors[1:]) == (True, "")
    seeded = umfa.flash_attn_func(out, *tensors[1:], dropout_p=0.5)
    parts = mx.stack([out, out])
    assert umfa.can_run(umfa.flash_attn_combine, parts, mx.zeros((2, 2, 20, 4))) == (True, "")
    assert seeded.shape == out.shape
    assert mlx.ran == []
    possible, reason = umfa.can_run(*tensors, backend="cpu")
    assert (possible, reason) == (True, "")


def test_tables_are_evaluated(mlx: MlxMetal) -> None:
    """One of MLX's is the host's to read, and that is counted; one that is traced has no value."""
    q, k, v = (x[0] for x in made(mx.float16, 20, 20))
    offsets = mx.array([0, 5, 20], mx.int32)
    reason = "cu_seqlens_q is a table of mlx's, which the host reads"
    before = umfa.stats().waits.get(reason, 0)

    def call(offsets: Any) -> Any:
        return umfa.flash_attn_varlen_func(q, k, v, offsets, offsets, 15, 15, causal=True)

    out = call(offsets)
    assert out.shape == q.shape
    assert umfa.stats().waits[reason] == before + 1
    assert mlx.ran == []
    with pytest.raises(umfa.UnsupportedError, match=r"cu_seqlens_[qk] is being traced"):
        mx.compile(call)(offsets)


@pytest.mark.slow
def test_warmup_compiles_for_the_graph(mlx: MlxMetal) -> None:
    tensors = made(mx.float16, 20, 70)
    before = umfa.stats()
    assert umfa.warmup(*tensors, causal=True)[:3] == ("metal", 1, 1)
    assert umfa.warmup(*tensors, causal=True)[:3] == ("metal", 1, 0)
    assert umfa.stats() == before
    ran = len(mlx.ran)
    mlx.read(umfa.flash_attn_func(*tensors, causal=True))
    assert len(mlx.compiled) == 2, "that for strides, too"
    assert len(mlx.ran) == ran + 2


@pytest.mark.slow
def test_a_part_of_a_cache_is_not_copied(mlx: MlxMetal) -> None:
    """As programs keep it: (batch, heads, rows, channels), of which the first rows are in use."""
    q = mx.zeros((1, 4, 1, 64), mx.float16)
    cache = mx.zeros((1, 2, 2000, 64), mx.float16)
    used = cache[:, :, :300]
    mlx.read(umfa.scaled_dot_product_attention(q, used, used, enable_gqa=True))
    query, key, value, *_ = next(
        sizes for name, sizes in zip(mlx.ran, mlx.memory, strict=True) if "decode" in name
    )
    assert key >= cache.nbytes
    assert value >= cache.nbytes > query


@pytest.mark.slow
def test_a_model_compiles_few_texts(mlx: MlxMetal) -> None:
    """Layers and steps of different lengths share their kernels."""
    for step in range(4):
        q, k, v = made(mx.float16, 20 + step, 70 + step)
        for _ in range(2):
            q = umfa.flash_attn_func(q, k, v, causal=True)
        mlx.read(q)
    assert len(attending(mlx.ran)) == 8
    assert len(mlx.compiled) == 2


@pytest.mark.slow
def test_arrays_without_elements(mlx: MlxMetal) -> None:
    q, k, v = made(mx.float16, 20, 70)
    assert (mlx.read(umfa.flash_attn_func(q, k[:, :0], v[:, :0])) == 0).all()
    assert umfa.flash_attn_func(q[:, :0], k, v).shape == (2, 0, 4, 64)


def test_bad_input_is_refused_while_it_is_traced(mlx: MlxMetal) -> None:
    q, k, v = made(mx.float16, 20, 70)
    with pytest.raises(ValueError, match=r"^\[umfa.flash_attn_func\] .*; got .*; expected "):
        mx.compile(umfa.flash_attn_func)(q, k[..., :32], v)
    with pytest.raises(TypeError, match="q has the wrong dtype; got int32"):
        umfa.flash_attn_func(*(x.astype(mx.int32) for x in (q, k, v)))


def test_what_cannot_be_part_of_the_graph(mlx: MlxMetal, monkeypatch: Any) -> None:
    """Is evaluated, and counted with the reason; where it is traced, an error has the reason."""
    shapes = [(3, 2, 4, n, 64) for n in (20, 70, 70)]
    q, k, v = (mx.zeros(shape, mx.float16) for shape in shapes)
    k = k[:, :1]  # no stride joins the batch dimensions
    monkeypatch.setattr(
        _mlx_graph, "_evaluating", lambda why: (_ for _ in ()).throw(AssertionError(why))
    )
    with pytest.raises(AssertionError, match="its batch dimensions are not one"):
        umfa.scaled_dot_product_attention(q, k, v)
    monkeypatch.undo()


def test_the_switch(mlx: MlxMetal, monkeypatch: Any) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("UMFA_MLX_GRAPH", "0")
    assert _mlx_graph.missing() == "UMFA_MLX_GRAPH=0"
    monkeypatch.setenv("UMFA_MLX_GRAPH", "yes")
    with pytest.raises(ValueError, match="UMFA_MLX_GRAPH is wrong; got 'yes'; expected '0' or"):
        umfa.flash_attn_func(*made(mx.float16, 20, 70))
    monkeypatch.delenv("UMFA_MLX_GRAPH")
    assert _mlx_graph.missing() == "this MLX has no Metal"


# ---- the text ------------------------------------------------------------------------------------

SOURCES = (
    "backward.metal", "backward_mask.metal", "combine.metal", "decode.metal",
    "decode_vector.metal", "forward.metal", "row_sums.metal",
)  # fmt: skip


def names_of_mlx(text: str, file: str) -> set[str]:
    """What a header of MLX's declares, each at the left, macros included."""
    patterns = (
        r"^[^\s#/][^(;=]*?\b(\w+)\(",
        r"^(?:struct|class)[^{;]*?\b(\w+)\s*[{;<]",
        r"^typedef [^;]*\b(\w+);",
        r"^using (\w+) =",
        r"^[^\s#(]*(?:constexpr|constant) [^=(]*\b(\w+) =",
    )
    found = {name for pattern in patterns for name in re.findall(pattern, text, re.MULTILINE)}
    return found | {macro.name for macro in macros_of(text, file)}


@pytest.mark.parametrize("source", SOURCES)
def test_no_name_is_one_of_mlxs(source: str) -> None:
    """MLX puts its own headers in front of a kernel's text, in the same namespaces."""
    headers = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
    theirs: set[str] = set()
    for name in ("utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h"):
        theirs |= names_of_mlx((headers / name).read_text(), name)
    assert {"elem_to_loc", "Limits", "instantiate_kernel", "float16_t", "ceildiv"} <= theirs
    for shader in _metal_body.shaders(source).values():
        text = re.sub(r"//[^\n]*", "", shader.before + shader.body)
        own = set(re.findall(r"\w+", text))
        assert "uchar" in own or source == "combine.metal"
        assert own & theirs <= {"static_assert"}  # a word of the language


@pytest.mark.parametrize("source", SOURCES)
def test_a_body_asks_for_nothing_by_accident(source: str) -> None:
    """MLX adds a parameter for each of Metal's attributes that a body names."""
    for shader in _metal_body.shaders(source).values():
        inputs = {buffer.place: f"umfa_{buffer.name}" for buffer in shader.buffers}
        for attribute in ATTRIBUTES:
            assert attribute not in shader.body
        for name in inputs.values():
            assert name not in shader.body
        assert all(attribute in ATTRIBUTES for *_, attribute in shader.attributes)
        assert len(shader.buffers) <= 31


@pytest.mark.parametrize(("dtype", "granularity"), [("int8", "row"), ("int4", "tensor")])
def test_quantising_in_the_graph(mlx: MlxMetal, dtype: str, granularity: str) -> None:
    x = np.random.default_rng(8).standard_normal((2, 60, 2, 33)).astype(np.float32)
    expected = umfa.quantize(x, dtype, granularity)
    array = mx.array(x)
    found = umfa.quantize(array, dtype, granularity, nonfinite="nan")
    out = found.dequantize("float16")
    assert not mlx.ran
    np.testing.assert_array_equal(np.array(out), expected.dequantize("float16"))
    np.testing.assert_array_equal(np.array(found.data), expected.data)
    np.testing.assert_array_equal(np.array(found.scales), expected.scales)
    assert mlx.ran


def test_mlxs_own_groups_in_the_graph(mlx: MlxMetal) -> None:
    x = mx.random.normal((2, 3, 40, 64), key=mx.random.key(1))
    parts = mx.quantize(x, group_size=32, bits=4)
    own = umfa.QuantizedTensor.from_mlx(*map(np.array, parts), group_size=32)
    found = umfa.QuantizedTensor.from_mlx(*parts, group_size=32).dequantize()
    assert not mlx.ran
    np.testing.assert_array_equal(np.array(found), own.dequantize())
    assert mlx.ran


def test_quantising_waits_for_numbers_like_nan(mlx: MlxMetal) -> None:
    x = np.random.default_rng(9).standard_normal((2, 60, 2, 32)).astype(np.float32)
    expected = umfa.quantize(x, "int8")
    before = umfa.stats().waits
    found = umfa.quantize(mx.array(x), "int8")
    [reason] = [why for why, n in umfa.stats().waits.items() if n > before.get(why, 0)]
    assert "nonfinite='raise' has to know of numbers like NaN" in reason
    np.testing.assert_array_equal(np.array(found.data), expected.data)


@pytest.mark.parametrize("rows", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_attention_on_codes_in_the_graph(mlx: MlxMetal, rows: int) -> None:
    """Codes, scales and zero points have the strides that they turn out to have."""
    q, k, v = made(mx.float16, rows, 500)
    keys = umfa.quantize(k, "int8", nonfinite="nan")
    values = umfa.quantize(v, "int4", "block", symmetric=False, block=(4, 32), nonfinite="nan")
    out = umfa.quantized_attention(q, keys, values, causal=True)
    assert not mlx.ran
    seen = [np.array(x.dequantize("float16")).astype(np.float64) for x in (keys, values)]
    wanted, _ = reference.attention(numbers(q), *seen, causal=True)
    assert_close(mlx.read(out), wanted, BASE["float16"])


@pytest.mark.slow
def test_codes_with_any_strides_in_the_graph(mlx: MlxMetal) -> None:
    """Part of a cache in another order of dimensions, whose codes start at an odd byte."""
    q, k, _ = made(mx.float16, 20, 500)
    room = umfa.quantize(np.array(k.astype(mx.float32)).swapaxes(1, 2), "int8", layout="bhsd")
    whole = [mx.array(x) for x in (room.data, room.scales)]
    odd = mx.concatenate([mx.zeros(1, mx.int8), whole[0].reshape(-1)])[1:].reshape(whole[0].shape)
    data, scales = (x[:, :, 100:400].swapaxes(1, 2) for x in (odd, whole[1]))
    cache = umfa.QuantizedTensor(data, scales, dtype="int8")
    out = umfa.quantized_attention(q, cache, cache)
    assert not mlx.ran
    seen = np.array(cache.dequantize("float16")).astype(np.float64)
    wanted, _ = reference.attention(numbers(q), seen, seen)
    assert_close(mlx.read(out), wanted, BASE["float16"])


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_attention_on_mlxs_own_groups_in_the_graph(mlx: MlxMetal, bits: int) -> None:
    q, k, v = (x.swapaxes(1, 2) for x in made(mx.float16, 20, 60))
    cache = [
        umfa.QuantizedTensor.from_mlx(*mx.quantize(x, group_size=32, bits=bits), group_size=32,
                                      bits=bits)
        for x in (k, v)
    ]  # fmt: skip
    out = umfa.quantized_attention(q, *cache, layout="bhsd")
    assert not mlx.ran
    seen = [np.array(x.dequantize("float16")).astype(np.float64) for x in cache]
    turned = [x.swapaxes(1, 2) for x in (numbers(q), *seen)]
    wanted, _ = reference.attention(*turned)
    assert_close(mlx.read(out).swapaxes(1, 2), wanted, BASE["float16"])
