"""out=: results written where the caller wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries as libraries
from tests.array_libraries import Array
from tests.cases import normal

pytestmark = pytest.mark.cpu_only

Q, K, V = (
    normal((2, 9, 4, 16), seed=0),
    normal((2, 30, 2, 16), seed=1),
    normal((2, 30, 2, 8), seed=2),
)
CU_Q, CU_K = np.array([0, 4, 4, 17]), np.array([0, 9, 20, 59])
COS = normal((40, 4), seed=3)
HEADS_FIRST = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (Q, K, V)]
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "dense": (umfa.flash_attn_func, (Q, K, V), {"causal": True}),
    "qkvpacked": (umfa.flash_attn_qkvpacked_func, (normal((2, 9, 3, 4, 16), seed=4),), {}),
    "kvpacked": (umfa.flash_attn_kvpacked_func, (Q, normal((2, 30, 2, 2, 16), seed=5)), {}),
    "varlen": (
        umfa.flash_attn_varlen_func,
        (normal((20, 4, 16), seed=6), normal((60, 2, 16), seed=7), normal((60, 2, 8), seed=8),
         CU_Q, CU_K, 13, 39),
        {"window_size": (5, 5)},
    ),
    "cache": (umfa.flash_attn_with_kvcache, (Q, K, V), {"cache_seqlens": 20}),
    "rope": (umfa.fused_rope_attention, (Q, K, V, COS, COS), {}),
    "sdpa": (umfa.scaled_dot_product_attention, (*HEADS_FIRST,), {"enable_gqa": True}),
}  # fmt: skip


def inside(expected: Array) -> tuple[Array, Array]:
    """A larger array full of 7, and every second row and channel of a part of it."""
    shape = [n + 3 for n in expected.shape]
    shape[-1], shape[-3] = 2 * expected.shape[-1] + 1, 2 * expected.shape[-3]
    whole = np.full(shape, 7, expected.dtype)
    places = [slice(1, n + 1) for n in expected.shape]
    places[-1], places[-3] = slice(1, None, 2), slice(None, None, 2)
    return whole, whole[tuple(places)]


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_wherever_it_is_written(name: str) -> None:
    function, tensors, options = CALLS[name]
    expected = function(*tensors, **options)
    whole, out = inside(expected)
    found = function(*tensors, **options, out=out)
    assert found is out
    assert found.tobytes() == expected.tobytes()
    out[...] = 7
    assert (whole == 7).all(), "nothing beside it was written"


def test_with_log_sum_exp_and_weights() -> None:
    expected = umfa.flash_attn_func(Q, K, V, return_lse=True)
    out = np.empty_like(expected[0])
    found = umfa.flash_attn_func(Q, K, V, return_lse=True, out=out)
    assert found[0] is out
    assert out.tobytes() == expected[0].tobytes()
    assert found[1].tobytes() == expected[1].tobytes()
    given = {"dropout_p": 0.5, "dropout_seed": 1, "return_attn_probs": True}
    expected = umfa.flash_attn_func(Q, K, V, **given)
    found = umfa.flash_attn_func(Q, K, V, **given, out=out)
    for a, b in zip(found, expected, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", libraries.NAMES)
def test_frameworks(name: str) -> None:
    framework = libraries.load(name)
    q, k, v = (framework.tensor(x) for x in (Q, K, V))
    out = framework.tensor(np.zeros((2, 9, 4, 8), np.float32))
    if name in ("jax", "mlx"):
        with pytest.raises(umfa.UnsupportedError, match="out would have to be written in place"):
            umfa.flash_attn_func(q, k, v, out=out)
        return
    assert umfa.can_run(q, k, v, out=out) == (True, "")
    assert umfa.flash_attn_func(q, k, v, out=out) is out
    assert framework.numpy(out).tobytes() == umfa.flash_attn_func(Q, K, V).tobytes()


def test_fused_projection_needs_no_copy() -> None:
    """FLUX's single blocks: one product gives query, key, value and the MLP's channels; another
    takes the results of attention and of the MLP, side by side."""
    torch = libraries.load("torch").module
    heads, dim, mlp = 4, 16, 96
    inner = heads * dim
    projected = torch.from_numpy(normal((2, 33, 3 * inner + mlp), seed=9))
    q, k, v = projected[..., : 3 * inner].unflatten(-1, (3, heads, dim)).unbind(2)
    joined = torch.full((2, 33, inner + mlp), 7.0)
    joined[..., inner:] = torch.nn.functional.gelu(projected[..., 3 * inner :])
    beside = joined[..., inner:].clone()
    out = joined[..., :inner].unflatten(-1, (heads, dim))
    assert umfa.flash_attn_func(q, k, v, out=out) is out
    expected = umfa.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(joined[..., :inner], expected.flatten(2))
    assert torch.equal(joined[..., inner:], beside)


def test_torch_notices() -> None:
    torch = libraries.load("torch").module
    q, k, v = (torch.from_numpy(x) for x in (Q, K, V))
    out = torch.empty(2, 9, 4, 8)
    version = out._version
    umfa.flash_attn_func(q, k, v, out=out)
    assert out._version > version
    with pytest.raises(umfa.UnsupportedError, match="out cannot be written in place: it requires"):
        umfa.flash_attn_func(q, k, v, out=torch.empty(2, 9, 4, 8, requires_grad=True))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty((2, 9, 4, 9), "f4"), ValueError, r"out has the wrong shape; got \(2, 9, 4, 9\)"),
        (np.empty((2, 9, 4, 8), "i4"), TypeError, "out has the wrong dtype; got int32"),
        (np.broadcast_to(np.zeros(8, "f4"), (2, 9, 4, 8)), ValueError, "out is read-only"),
        (V[:, :9].repeat(2, 2)[..., ::-1][:, :, :, :4], ValueError, "out has the wrong shape"),
        (Q[..., :8], ValueError, "out overlaps q in memory"),
        (memoryview(bytearray(2304)).cast("f", (2, 9, 4, 8)), TypeError, "out is written in place"),
        ("here", TypeError, "out is not a tensor"),
    ],
    ids=["shape", "dtype", "read-only", "narrow", "overlap", "buffer", "text"],
)  # fmt: skip
def test_refusals(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"\[umfa\.flash_attn_func\] " + message):
        umfa.flash_attn_func(Q, K, V, out=out)
    assert umfa.can_run(Q, K, V, out=out)[0] is False


# ---- out_dtype -----------------------------------------------------------------------------------

DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_result_of_another_dtype(name: str, dtype: str) -> None:
    """The output is rounded once, from float32; the log-sum-exp stays float32."""
    function, tensors, options = CALLS[name]
    exact = function(*tensors, **options)
    found = function(*tensors, **options, out_dtype=dtype)
    assert found.dtype.name == dtype
    assert found.tobytes() == exact.astype(libraries.DTYPES[dtype]).tobytes()
    out = np.zeros_like(found)
    assert function(*tensors, **options, out=out) is out  # out has that dtype too
    assert out.tobytes() == found.tobytes()
    assert function(*tensors, **options, out=out, out_dtype=dtype) is out
    assert umfa.can_run(function, *tensors, **options, out_dtype=dtype) == (True, "")


def test_in_any_spelling(framework: libraries.Framework) -> None:
    q, k, v = (framework.tensor(x.astype(np.float16)) for x in (Q, K, V))
    own = framework.tensor(Q).dtype
    for dtype in ("float32", np.float32, np.dtype(np.float32), own):
        out, lse = umfa.flash_attn_func(q, k, v, out_dtype=dtype, return_lse=True)
        assert framework.dtype_name(out) == framework.dtype_name(lse) == "float32"
    assert framework.dtype_name(umfa.flash_attn_func(q, k, v, out_dtype=None)) == "float16"


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.int32, bool, "nonsense", 5, "float8_e4m3fn", np.float64, Q),
        *("", "any.float16", "numpy.float16", np.float16(1), np.dtype(np.float32).newbyteorder()),
    ],
    ids=repr,
)
def test_what_is_no_dtype_of_a_result(dtype: Any) -> None:
    for function, tensors, options in CALLS.values():
        with pytest.raises(
            TypeError, match=r"out_dtype is wrong; got .*; expected float32, float16"
        ):
            function(*tensors, **options, out_dtype=dtype)
        possible, reason = umfa.can_run(function, *tensors, **options, out_dtype=dtype)
        assert not possible
        assert "out_dtype is wrong" in reason


def test_out_of_another_dtype() -> None:
    text = "out and out_dtype differ; got float32 and float16; expected one dtype"
    for name, (function, tensors, options) in CALLS.items():
        out = np.zeros_like(function(*tensors, **options))
        with pytest.raises(TypeError, match=text):
            function(*tensors, **options, out=out, out_dtype="float16")
        assert not out.any(), name
        possible, reason = umfa.can_run(function, *tensors, **options, out=out, out_dtype="float16")
        assert not possible
        assert text in reason


def test_weights_keep_the_dtype_of_query() -> None:
    q, k, v = (x.astype(np.float16) for x in (Q, K, V))
    out, _, weights = umfa.flash_attn_func(
        q, k, v, 0.5, dropout_seed=3, return_attn_probs=True, out_dtype="float32"
    )
    assert (out.dtype, weights.dtype) == (np.float32, np.float16)


def test_rows_of_no_sequence_are_cleared_in_the_dtype_of_the_result() -> None:
    function, tensors, options = CALLS["varlen"]
    for dtype in DTYPES:
        out = np.full((20, 4, 8), 7, libraries.DTYPES[dtype])
        function(*tensors, **options, out=out)
        assert not out[17:].any()
        assert out[:17].any(axis=-1).all()
