"""Objects with Python's buffer protocol: read as NumPy arrays, never written, never kept."""

from __future__ import annotations

import array
import ctypes
import inspect
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, checks, reference
from tests.cases import normal

Array = array_libraries.Array
CODES = {"float32": "f", "float16": "e", "bool": "?", "int32": "i", "int64": "q"}
C_TYPES = {"f": ctypes.c_float, "?": ctypes.c_bool, "i": ctypes.c_int, "q": ctypes.c_longlong}


def cast(memory: Any, x: Array) -> memoryview:
    """`memory` with the format and shape of `x`."""
    if x.dtype == np.float16:  # memoryview.cast does not know it before Python 3.12
        return memoryview(np.frombuffer(memory, np.float16).reshape(x.shape))
    return memoryview(memory).cast(CODES[x.dtype.name], x.shape)


def of_bytearray(x: Array) -> Any:
    return cast(bytearray(x.tobytes()), x)


def of_bytes(x: Array) -> Any:
    return cast(x.tobytes(), x)


def of_mmap(x: Array) -> Any:
    memory = mmap.mmap(-1, x.nbytes)
    memory[:] = x.tobytes()
    return cast(memory, x)


def of_ctypes(x: Array) -> Any:
    if x.dtype == np.float16:  # which C does not have
        return of_bytearray(x)
    kind: Any = C_TYPES[CODES[x.dtype.name]]
    for size in reversed(x.shape):
        kind = kind * size
    return kind.from_buffer_copy(x.tobytes())


def of_strides(x: Array) -> Any:
    """Backwards in the first dimension, and every other element of the last."""
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 0] = x[::-1]
    return memoryview(wide[::-1, ..., 0])


def of_array(x: Array) -> Any:
    """array.array has one dimension; what has more becomes a memoryview."""
    code = CODES[x.dtype.name]
    return array.array(code, x.tolist()) if x.ndim == 1 and code in "fiq" else of_bytearray(x)


MAKERS = (of_bytearray, of_bytes, of_mmap, of_ctypes, of_strides, of_array)


def given(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return normal(shape, dtype, seed=seed)


def inputs(dtype: str) -> dict[str, tuple[Callable[..., Any], dict[str, Array]]]:
    """Calls of every public function that computes, with arrays in each place for one."""
    q, k, v = (
        given(0, 2, 5, 4, 16, dtype=dtype),
        *(given(i, 2, 9, 2, 16, dtype=dtype) for i in (1, 2)),
    )
    rows, keys = given(3, 8, 4, 16, dtype=dtype), given(4, 9, 2, 16, dtype=dtype)
    mask = given(5, 2, 1, 5, 9) > -1
    starts_q, starts_k = np.array([0, 3, 8], np.int32), np.array([0, 4, 9], np.int64)
    angles = given(6, 9, 8)
    parts, lse = given(7, 3, 2, 5, 4, 16, dtype=dtype), given(8, 3, 2, 5, 4)
    return {
        "flash_attn_func": (
            umfa.flash_attn_func,
            {
                "q": q, "k": k, "v": v, "attn_mask": mask, "qv": given(9, 2, 5, 4, 16, dtype=dtype),
                "alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4]), "learnable_sink": given(10, 4),
            },
        ),
        "mask of numbers": (
            umfa.flash_attn_func, {"q": q, "k": k, "v": v, "attn_mask": given(5, 1, 4, 5, 9)},
        ),
        "flash_attn_qkvpacked_func": (
            umfa.flash_attn_qkvpacked_func, {"qkv": given(0, 2, 5, 3, 4, 16, dtype=dtype)},
        ),
        "flash_attn_kvpacked_func": (
            umfa.flash_attn_kvpacked_func, {"q": q, "kv": given(1, 2, 9, 2, 2, 16, dtype=dtype)},
        ),
        "flash_attn_varlen_func": (
            umfa.flash_attn_varlen_func,
            {
                "q": rows, "k": keys, "v": keys[::-1].copy(), "cu_seqlens_q": starts_q,
                "cu_seqlens_k": starts_k, "seqused_k": np.array([3, 5], np.int32),
            },
        ),
        "flash_attn_varlen_qkvpacked_func": (
            umfa.flash_attn_varlen_qkvpacked_func,
            {"qkv": given(0, 8, 3, 4, 16, dtype=dtype), "cu_seqlens": starts_q},
        ),
        "flash_attn_varlen_kvpacked_func": (
            umfa.flash_attn_varlen_kvpacked_func,
            {
                "q": rows, "kv": given(1, 9, 2, 2, 16, dtype=dtype), "cu_seqlens_q": starts_q,
                "cu_seqlens_k": starts_k,
            },
        ),
        "flash_attn_with_kvcache": (
            umfa.flash_attn_with_kvcache,
            {
                "q": q, "k_cache": k, "v_cache": v, "cache_seqlens": np.array([7, 9], np.int32),
                "cache_batch_idx": np.array([1, 0], np.int64),
                "cache_leftpad": np.array([0, 2], np.int32),
            },
        ),
        "paged": (
            umfa.flash_attn_with_kvcache,
            {
                "q": q, "k_cache": given(1, 4, 3, 2, 16, dtype=dtype),
                "v_cache": given(2, 4, 3, 2, 16, dtype=dtype),
                "cache_seqlens": np.array([5, 6], np.int32),
                "block_table": np.array([[3, 1], [0, 2]], np.int32),
            },
        ),
        "mask of a cache": (
            umfa.flash_attn_with_kvcache,
            {"q": q, "k_cache": k, "v_cache": v, "attn_mask": given(5, 2, 1, 5, 12) > -1},
        ),
        "fused_rope_attention": (
            umfa.fused_rope_attention,
            {"q": q, "k": k, "v": v, "rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)},
        ),
        "scaled_dot_product_attention": (
            umfa.scaled_dot_product_attention,
            {
                "query": given(0, 2, 4, 5, 16, dtype=dtype), "key": given(1, 4, 9, 16, dtype=dtype),
                "value": given(2, 2, 4, 9, 16, dtype=dtype), "attn_mask": mask,
            },
        ),
        "flash_attn_combine": (
            umfa.flash_attn_combine, {"out_partial": parts, "lse_partial": lse},
        ),
    }  # fmt: skip


MAX_SEQLEN = {"max_seqlen_q": 5, "max_seqlen_k": 5, "max_seqlen": 5}


def call(function: Callable[..., Any], tensors: dict[str, Any]) -> tuple[Array, ...]:
    wanted = inspect.signature(function).parameters
    lengths = {name: value for name, value in MAX_SEQLEN.items() if name in wanted}
    assert umfa.can_run(function, **tensors, **lengths) == (True, "")
    result = function(**tensors, **lengths)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", inputs("float32"))
@pytest.mark.parametrize("maker", MAKERS)
def test_a_buffer_is_an_array(maker: Callable[[Array], Any], name: str, dtype: str) -> None:
    function, arrays = inputs(dtype)[name]
    buffers = {argument: maker(x) for argument, x in arrays.items()}
    wanted = call(function, arrays)
    for found, expected in zip(call(function, buffers), wanted, strict=True):
        assert type(found) is np.ndarray
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", inputs("float32"))
def test_each_argument_may_be_the_only_buffer(name: str) -> None:
    function, arrays = inputs("float32")[name]
    wanted = call(function, arrays)
    for argument, x in arrays.items():
        found = call(function, {**arrays, argument: of_bytes(x)})
        assert type(found[0]) is np.ndarray
        np.testing.assert_array_equal(found[0], wanted[0], err_msg=argument)


def test_the_numbers_are_those_of_the_reference() -> None:
    q, k, v = given(0, 2, 5, 4, 16), given(1, 2, 9, 2, 16), given(2, 2, 9, 2, 16)
    out, lse = umfa.flash_attn_func(*map(of_ctypes, (q, k, v)), causal=True, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, causal=True)
    checks.assert_close(out, expected, checks.BASE["float32"])
    checks.assert_close(lse, expected_lse, checks.LSE)


def test_new_rows_may_be_buffers_where_the_cache_is_an_array() -> None:
    q, new_k, new_v = (given(i, 2, 2, 4, 16) for i in range(3))
    caches = [[given(i, 2, 8, 4, 16) for i in (3, 4)] for _ in range(2)]
    lengths = array.array("i", [3, 5])
    found = umfa.flash_attn_with_kvcache(
        *map(of_bytes, (q,)), *caches[0], of_bytes(new_k), of_mmap(new_v), cache_seqlens=lengths
    )
    wanted = umfa.flash_attn_with_kvcache(
        q, *caches[1], new_k, new_v, cache_seqlens=np.array([3, 5], np.int32)
    )
    np.testing.assert_array_equal(found, wanted)
    for x, y in zip(*caches, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(caches[0][0][1, 5:7], new_k[1])


@pytest.mark.parametrize(
    ("shape_q", "shape_k"), [((1, 0, 2, 8), (1, 4, 2, 8)), ((1, 3, 2, 8), (1, 0, 2, 8))]
)
@pytest.mark.parametrize("maker", [memoryview, of_ctypes])
def test_buffers_without_elements(
    maker: Callable[[Array], Any], shape_q: tuple[int, ...], shape_k: tuple[int, ...]
) -> None:
    q, k = np.ones(shape_q, np.float32), np.ones(shape_k, np.float32)
    found = umfa.flash_attn_func(maker(q), maker(k), maker(k))
    assert found.shape == shape_q
    assert not found.any()


# ---- lifetime ------------------------------------------------------------------------------------

SHAPE = (1, 4, 2, 8)
BYTES = 4 * 4 * 2 * 8


def test_a_buffer_is_locked_during_the_call_and_free_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, slopes = given(0, *SHAPE), array.array("f", [0.5, 0.25])
    locked = []
    forward = umfa._ext.attention_forward

    def watched(*arguments: Any) -> Any:
        with pytest.raises(BufferError):
            slopes.append(0)
        locked.append(True)
        return forward(*arguments)

    monkeypatch.setattr(umfa._ext, "attention_forward", watched)
    umfa.flash_attn_func(x, x, x, alibi_slopes=slopes)
    assert locked == [True]
    slopes.append(0)  # raises BufferError while anything holds the memory


def test_a_bytearray_can_be_resized_after_the_call() -> None:
    memory = bytearray(BYTES)
    out = umfa.flash_attn_func(*(memoryview(memory).cast("f", SHAPE) for _ in range(3)))
    memory.append(0)
    assert not out.any()


@pytest.mark.parametrize("wrong", ["softmax_scale", "shape", "mixed", "written"])
def test_a_refused_call_frees_the_buffers(wrong: str) -> None:
    memory = bytearray(BYTES)

    def refused() -> None:
        x = memoryview(memory).cast("f", SHAPE)
        other = np.zeros((1, 4, 2, 9 if wrong == "shape" else 8), np.float32)
        function: Any = umfa.flash_attn_func
        arguments: dict[str, Any] = {"q": x, "k": other, "v": x}
        if wrong == "softmax_scale":
            arguments["softmax_scale"] = "no number"
        elif wrong == "mixed":
            arguments["k"] = object()
        elif wrong == "written":
            function = umfa.flash_attn_with_kvcache
            arguments = {"q": other, "k_cache": x, "v_cache": other, "k": other, "v": other}
        assert not umfa.can_run(function, **arguments)[0]
        try:
            function(**arguments)
        except (TypeError, ValueError):
            return
        raise AssertionError("not refused")

    refused()
    memory.append(0)


def test_array_and_table_can_grow_after_the_call() -> None:
    starts, slopes = array.array("i", [0, 4]), array.array("f", [0.5, 0.25])
    x = given(0, 4, 2, 8)
    umfa.flash_attn_varlen_func(x, x, x, starts, starts, 4, 4, alibi_slopes=slopes)
    starts.append(4)
    slopes.append(1)


# ---- precedence ----------------------------------------------------------------------------------


class Both(bytearray):
    """A buffer of zeros that speaks DLPack, and then has ones."""

    def __dlpack__(self, **options: Any) -> Any:
        return np.ones(SHAPE, np.float32).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_dlpack_comes_before_the_buffer() -> None:
    found = umfa.flash_attn_func(*(Both(BYTES) for _ in range(3)))
    assert (np.from_dlpack(found) == 1).all()


# ---- refusals ------------------------------------------------------------------------------------


class Struct(ctypes.Structure):
    _fields_ = [("number", ctypes.c_float)]


class Union(ctypes.Union):
    _fields_ = [("number", ctypes.c_float)]


def released() -> memoryview:
    view = memoryview(bytearray(4))
    view.release()
    return view


def closed() -> mmap.mmap:
    memory = mmap.mmap(-1, 16)
    memory.close()
    return memory


def c_array(kind: Any) -> Any:
    return (kind * 8 * 2 * 4 * 1)()


def pointers() -> Any:
    """A buffer in the style of PIL: its rows are reached through pointers."""
    exporter: Any = pytest.importorskip("_testbuffer", reason="part of CPython's own tests")
    numbers = [0.0] * (BYTES // 4)
    return exporter.ndarray(numbers, shape=list(SHAPE), format="f", flags=exporter.ND_PIL)


FOREIGN = ">" if sys.byteorder == "little" else "<"
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "other byte order": (
        lambda: memoryview(np.zeros(SHAPE, f"{FOREIGN}f4")), TypeError, "not in native byte order",
    ),
    "other byte order of ctypes": (
        lambda: c_array(
            ctypes.c_float.__ctype_be__ if FOREIGN == ">" else ctypes.c_float.__ctype_le__
        ),
        TypeError, "not in native byte order",
    ),
    "fields": (
        lambda: memoryview(np.zeros(SHAPE, [("number", "f4")])), TypeError, "does not hold",
    ),
    "structure": (lambda: c_array(Struct), TypeError, "does not hold numbers; got 'T{"),
    "union": (lambda: c_array(Union), TypeError, "does not hold numbers; got 'B' of 4 bytes"),
    "pointers of C": (lambda: c_array(ctypes.POINTER(ctypes.c_float)), TypeError, "does not hold"),
    "strings": (lambda: memoryview(np.zeros(SHAPE, "S4")), TypeError, "does not hold"),
    "characters": (lambda: array.array("u", "ab"), TypeError, "does not hold numbers"),
    "float64": (
        lambda: memoryview(np.zeros(SHAPE)), umfa.UnsupportedError, "wrong dtype; got float64",
    ),
    "double of C": (
        lambda: c_array(ctypes.c_double), umfa.UnsupportedError, "wrong dtype; got float64",
    ),
    "integers": (lambda: c_array(ctypes.c_int), TypeError, "wrong dtype; got int32"),
    "signed bytes": (
        lambda: memoryview(bytearray(64)).cast("b", SHAPE), TypeError, "wrong dtype; got int8",
    ),
    "complex": (
        lambda: memoryview(np.zeros(SHAPE, "c8")), TypeError, "wrong dtype; got complex64",
    ),
    "bytes": (lambda: b"tensor", TypeError, "plain bytes; got 6 bytes of bytes; expected one with"),
    "bytearray": (lambda: bytearray(BYTES), TypeError, "plain bytes; got 256 bytes of bytearray"),
    "mmap": (lambda: mmap.mmap(-1, 16), TypeError, "plain bytes; got 16 bytes of mmap"),
    "one dimension": (
        lambda: array.array("f", [1.0]), ValueError, "1 dimensions; got shape (1,); expected 4",
    ),
    "alignment": (
        lambda: memoryview(bytearray(BYTES + 1))[1:].cast("f", SHAPE), ValueError, "not aligned",
    ),
    "released": (released, TypeError, "cannot be read; got operation forbidden"),
    "closed": (closed, TypeError, "cannot be read; got mmap closed"),
    "suboffsets": (pointers, ValueError, "has suboffsets; got suboffsets (0"),
    "a string": (lambda: "tensor", TypeError, "is not a tensor; got 'tensor'"),
    "a number of NumPy": (lambda: np.float32(1), TypeError, "is not a tensor"),
}  # fmt: skip


def refused(error: type[Exception], function: Callable[..., Any], **arguments: Any) -> str:
    """The message of the error that the call raises and that `can_run` gives."""
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    prefix = f"[umfa.{function.__name__}] "
    assert message.startswith(prefix)
    assert "; got " in message
    assert "; expected " in message
    reason = message.replace(prefix, "[umfa.can_run] ", 1)
    assert umfa.can_run(function, **arguments) == (False, reason)
    return message


# As an array, a mask or a slope of these is refused for its shape first, or is right.
ONLY_QKV = frozenset(
    ("float64", "double of C", "integers", "signed bytes", "one dimension", "alignment")
)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("label", "argument"),
    [
        (label, argument)
        for label in BAD
        for argument in (
            "q",
            "k",
            "v",
            *(() if label in ONLY_QKV else ("attn_mask", "alibi_slopes")),
        )
    ],
)
def test_bad_buffers(label: str, argument: str) -> None:
    make, error, text = BAD[label]
    arguments: dict[str, Any] = dict.fromkeys("qkv", given(0, *SHAPE))
    message = refused(error, umfa.flash_attn_func, **(arguments | {argument: make()}))
    assert argument in message
    assert text in message


@pytest.mark.parametrize("code", [*"bBhHILfd", f"{FOREIGN}i4"])
def test_tables_are_of_int32_or_int64(code: str) -> None:
    x, good = given(0, 4, 2, 8), array.array("q", [0, 4])
    foreign = len(code) > 1
    table = memoryview(np.array([0, 4], code)) if foreign else array.array(code, [0, 4])
    arguments = {
        "q": x, "k": x, "v": x, "cu_seqlens_q": table, "cu_seqlens_k": good, "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }  # fmt: skip
    message = refused(TypeError, umfa.flash_attn_varlen_func, **arguments)
    assert "cu_seqlens_q " in message
    assert not foreign or f"not in native byte order; got '{FOREIGN}i'" in message


@pytest.mark.parametrize("written", ["k_cache", "v_cache"])
@pytest.mark.parametrize("maker", [of_bytearray, of_bytes, of_ctypes])
def test_a_cache_that_is_written_is_no_buffer(maker: Callable[[Array], Any], written: str) -> None:
    x = given(0, *SHAPE)
    caches = {"k_cache": given(1, *SHAPE), "v_cache": given(2, *SHAPE)}
    before = {name: cache.tobytes() for name, cache in caches.items()}
    given_caches = caches | {written: maker(caches[written])}
    message = refused(
        TypeError, umfa.flash_attn_with_kvcache, q=x, k=x, v=x, cache_seqlens=0, **given_caches
    )
    assert f"{written} is written in place, but buffers are read-only" in message
    assert {name: memoryview(c).tobytes() for name, c in given_caches.items()} == before


def test_out_of_combine_is_no_buffer() -> None:
    parts, lse = given(0, 2, *SHAPE), given(1, 2, *SHAPE[:-1])
    out = of_bytearray(given(2, *SHAPE))
    before = out.tobytes()
    message = refused(
        TypeError, umfa.flash_attn_combine, out_partial=parts, lse_partial=lse, out=out
    )
    assert "out is written in place, but buffers are read-only" in message
    assert out.tobytes() == before


@pytest.mark.parametrize("name", ["torch", "jax", "mlx"])
def test_buffers_count_as_numpy(name: str) -> None:
    framework = array_libraries.load(name)
    x = given(0, *SHAPE)
    tensor, buffer = framework.tensor(x), of_bytes(x)
    message = refused(TypeError, umfa.flash_attn_func, q=buffer, k=tensor, v=buffer)
    assert f"frameworks differ: q is of numpy (a buffer), k of {name}; got " in message
    message = refused(TypeError, umfa.flash_attn_func, q=tensor, k=tensor, v=buffer)
    assert f"frameworks differ: q is of {name}, v of numpy (a buffer); got " in message


@pytest.mark.parametrize("name", ["torch", "jax", "mlx"])
def test_tables_may_be_buffers_beside_any_framework(name: str) -> None:
    framework = array_libraries.load(name)
    x, starts = given(0, 6, 2, 8), array.array("i", [0, 2, 6])
    lengths = starts, starts, 4, 4
    found = umfa.flash_attn_varlen_func(*(framework.tensor(x) for _ in range(3)), *lengths)
    assert isinstance(found, framework.array_type)
    wanted = umfa.flash_attn_varlen_func(x, x, x, *lengths)
    np.testing.assert_array_equal(framework.numpy(found), wanted)
