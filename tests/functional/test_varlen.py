"""flash_attn_varlen_func: every sequence is what it would be alone, and nothing is between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries
from tests.array_libraries import DTYPES, Array, Framework
from tests.attend import Attend
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.sequences import offsets, varlen_reference
from tests.signatures import EXTRAS, by_keyword, by_position

A25_Q, A25_K = [8, 0, 16, 12], [10, 0, 20, 15]
HEADS = 4


def packed(
    lengths_q: list[int],
    lengths_k: list[int],
    dtype: str = "float32",
    *,
    heads_k: int = HEADS,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    more: int = 0,
) -> tuple[Array, Array, Array]:
    """Query, key and value, with `more` rows behind the last sequence."""
    rows_q, rows_k = sum(lengths_q) + more, sum(lengths_k) + more
    return (
        normal((rows_q, HEADS, head_dim), dtype, seed=1),
        normal((rows_k, heads_k, head_dim), dtype, seed=2),
        normal((rows_k, heads_k, head_dim_v or head_dim), dtype, seed=3),
    )


def check(
    framework: Framework,
    tensors: tuple[Array, Array, Array],
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    **options: Any,
) -> None:
    """Compare with the reference of each sequence."""
    known = {name: x for name, x in options.items() if not name.startswith("max_seqlen")}
    out, lse = varlen_reference(*tensors, cu_seqlens_q, cu_seqlens_k, **known)
    found, found_lse = Attend(framework).varlen(tensors, cu_seqlens_q, cu_seqlens_k, **options)
    assert_close(found.astype(np.float64), out, BASE[tensors[0].dtype.name])
    assert_close(found_lse.astype(np.float64), lse, LSE, "lse")


@pytest.fixture
def numpy() -> Framework:
    return array_libraries.load("numpy")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("integers", [np.int32, np.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a25_varlen(dtype: str, integers: Any, causal: bool, framework: Framework) -> None:
    check(
        framework,
        packed(A25_Q, A25_K, dtype),
        offsets(A25_Q, integers),
        offsets(A25_K, integers),
        causal=causal,
        max_seqlen_q=max(A25_Q),
        max_seqlen_k=max(A25_K),
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "left window": {"window_size": (3, -1), "causal": True},
    "softcap": {"softcap": 4.0, "causal": True},
    "scale": {"softmax_scale": -0.2},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.01, 1.5], np.float32)},
    "alibi by sequence": {"alibi_slopes": np.abs(normal((6, HEADS), seed=9)), "causal": True},
    "chunk": {"attention_chunk": 7, "causal": True},
    "sink": {"learnable_sink": np.array([1.0, -2.0, 0.0, 5.0], np.float32)},
    "all": {
        "window_size": (40, 3),
        "softcap": 6.0,
        "alibi_slopes": np.abs(normal((6, HEADS), seed=9)),
        "attention_chunk": 30,
        "learnable_sink": np.array([1.0, -2.0, 0.0, 5.0], np.float32),
    },
}
# Empty on either side, more queries than keys, one query, and lengths for both kinds of kernel.
LENGTHS_Q, LENGTHS_K = [37, 0, 1, 9, 70, 3], [70, 5, 33, 4, 0, 150]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("heads_k", "head_dim", "head_dim_v"), [(4, 32, 32), (2, 24, 40), (1, 64, 16), (2, 5, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(
    dtype: str,
    heads_k: int,
    head_dim: int,
    head_dim_v: int,
    options: dict[str, Any],
    numpy: Framework,
) -> None:
    tensors = packed(
        LENGTHS_Q, LENGTHS_K, dtype, heads_k=heads_k, head_dim=head_dim, head_dim_v=head_dim_v
    )
    check(numpy, tensors, offsets(LENGTHS_Q), offsets(LENGTHS_K), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_in_every_framework(options: dict[str, Any], framework: Framework) -> None:
    tensors = packed(LENGTHS_Q, LENGTHS_K, heads_k=2, head_dim=24)
    check(framework, tensors, offsets(LENGTHS_Q), offsets(LENGTHS_K), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_dense_calls_bit_for_bit(
    dtype: str, options: dict[str, Any], numpy: Framework
) -> None:
    """For flash_attn_func, one by one, as far as it has the options; else varlen with one."""
    tensors = packed(LENGTHS_Q, LENGTHS_K, dtype, heads_k=2, head_dim=24)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    out, lse = Attend(numpy).varlen(tensors, cu_q, cu_k, **options)
    extras = {"attention_chunk", "learnable_sink"} & set(options)
    for b, (length_q, length_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = dict(options)
        if np.ndim(own.get("alibi_slopes")) == 2:
            own["alibi_slopes"] = np.ascontiguousarray(options["alibi_slopes"][b])
        each = (tensors[0][rows], tensors[1][keys], tensors[2][keys])
        if extras:
            alone, alone_lse = Attend(numpy).varlen(
                each, offsets([length_q]), offsets([length_k]), **own
            )
        else:
            alone, alone_lse, _ = (
                None if x is None else x[0]
                for x in umfa.flash_attn_func(
                    *(x[None] for x in each), return_attn_probs=True, backend="cpu", **own
                )
            )
        assert_same_bits(numpy.bits(out[rows]), numpy.bits(alone), f"out of {b}")
        assert_same_bits(numpy.bits(lse[:, rows]), numpy.bits(alone_lse), f"lse of {b}")


@pytest.mark.parametrize("framework_of_tables", array_libraries.NAMES)
@pytest.mark.parametrize("integers", ["int32", "int64"])
def test_tables_of_any_framework(
    integers: str, framework_of_tables: str, framework: Framework
) -> None:
    tables = array_libraries.load(framework_of_tables)
    if integers == "int64" and framework_of_tables == "jax":
        pytest.skip("jax has no int64 unless told so")
    q, k, v = (framework.tensor(x) for x in packed(A25_Q, A25_K))
    used_q, used_k = np.array([3, 0, 16, 1]), np.array([10, 0, 0, 7])
    make = tables.tensor
    found = umfa.flash_attn_varlen_func(
        q,
        k,
        v,
        make(offsets(A25_Q, integers)),
        make(offsets(A25_K, integers)),
        make(np.array(16, integers)),
        make(np.array(20, integers)),
        seqused_q=make(used_q.astype(integers)),
        seqused_k=make(used_k.astype(integers)),
        causal=True,
        backend="cpu",
    )
    expected, _ = varlen_reference(
        *packed(A25_Q, A25_K),
        offsets(A25_Q),
        offsets(A25_K),
        seqused_q=used_q,
        seqused_k=used_k,
        causal=True,
    )
    assert isinstance(found, framework.array_type)
    assert_close(framework.float64(found), expected, BASE["float32"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_seqused(causal: bool, dtype: str, numpy: Framework) -> None:
    tensors = packed(LENGTHS_Q, LENGTHS_K, dtype, head_dim=24)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    used_q, used_k = np.array([30, 0, 0, 9, 65, 1]), np.array([12, 0, 33, 2, 0, 149])
    for more in (
        {"seqused_q": used_q},
        {"seqused_k": used_k},
        {"seqused_q": used_q, "seqused_k": used_k},
    ):
        poisoned = tuple(x.copy() for x in tensors)
        for b in range(len(LENGTHS_Q)):
            if "seqused_q" in more:
                poisoned[0][cu_q[b] + used_q[b] : cu_q[b + 1]] = np.nan
            if "seqused_k" in more:
                for x in poisoned[1:]:
                    x[cu_k[b] + used_k[b] : cu_k[b + 1]] = np.nan
        check(numpy, (poisoned[0], poisoned[1], poisoned[2]), cu_q, cu_k, causal=causal, **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_past_the_last_sequence(dtype: str, framework: Framework) -> None:
    tensors = packed(A25_Q, A25_K, dtype, more=5)
    for x in tensors:
        x[-5:] = np.nan
    cu_q, cu_k = offsets(A25_Q), offsets(A25_K)
    check(framework, tensors, cu_q, cu_k, causal=True)
    out, lse = Attend(framework).varlen(tensors, cu_q, cu_k)
    assert not out[-5:].any()
    assert np.isneginf(lse[:, -5:]).all()


def test_no_sequence_at_all(framework: Framework) -> None:
    tensors = packed([], [], more=3)
    none = np.zeros(1, np.int32)
    out, lse = Attend(framework).varlen(tensors, none, none)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_only_empty_sequences(framework: Framework) -> None:
    none = np.zeros(4, np.int64)
    out, lse = Attend(framework).varlen(packed([], []), none, none)
    assert out.shape == (0, HEADS, 64)
    assert lse.shape == (HEADS, 0)


def test_empty_keys_leave_the_sink(framework: Framework) -> None:
    sink = np.array([0.5, -3.0, 200.0, -np.inf], np.float32)
    tensors = packed([3, 40], [0, 0])
    out, lse = Attend(framework).varlen(
        tensors, offsets([3, 40]), offsets([0, 0]), learnable_sink=sink
    )
    assert not out.any()
    assert_close(lse, np.broadcast_to(sink[:, None], lse.shape), LSE, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_any_size_and_dtype(dtype: str, framework: Framework) -> None:
    """A sink that float cannot hold beside the keys still gives the right log-sum-exp."""
    sink = np.array([200.0, -200.0, 88.0, 30000.0]).astype(DTYPES[dtype])
    lengths_q, lengths_k = [3, 40], [700, 50]
    tensors = packed(lengths_q, lengths_k, "float32")
    out, lse = varlen_reference(
        *tensors, offsets(lengths_q), offsets(lengths_k), learnable_sink=sink
    )
    found, found_lse = Attend(framework).varlen(
        tensors, offsets(lengths_q), offsets(lengths_k), learnable_sink=sink
    )
    assert_close(found, out, BASE["float32"])
    np.testing.assert_allclose(found_lse, lse, rtol=1e-6, atol=2e-5)


LONGEST: dict[str, Any] = {
    "None": lambda _: None,
    "int": lambda _: 16,
    "larger": lambda _: 10**6,
    "numpy integer": lambda _: np.int64(16),
    "0-d": lambda framework: framework.tensor(np.array(16, np.int32)),
}


@pytest.mark.parametrize("longest", LONGEST.values(), ids=LONGEST.keys())
def test_max_seqlen(longest: Any, framework: Framework) -> None:
    tensors = packed(A25_Q, A25_Q)
    cu_seqlens = offsets(A25_Q)
    plain = Attend(framework).varlen(tensors, cu_seqlens, cu_seqlens, causal=True)
    found = Attend(framework).varlen(
        tensors,
        cu_seqlens,
        cu_seqlens,
        causal=True,
        max_seqlen_q=longest(framework),
        max_seqlen_k=longest(framework),
    )
    for a, b in zip(found, plain, strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 1)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_forms(dtype: str, options: dict[str, Any], framework: Framework) -> None:
    lengths = [8, 0, 16, 40]
    qkv = normal((sum(lengths) + 2, 3, HEADS, 24), dtype, seed=4)
    cu_seqlens = framework.tensor(offsets(lengths))
    parts = [framework.tensor(np.ascontiguousarray(qkv[:, i])) for i in range(3)]
    slopes = framework.tensor(np.abs(normal((4, HEADS), seed=5)))
    more = {**options, "alibi_slopes": slopes, "return_attn_probs": True, "backend": "cpu"}
    expected = umfa.flash_attn_varlen_func(*parts, cu_seqlens, cu_seqlens, 40, 40, **more)
    together = framework.tensor(qkv)
    by_qkv = umfa.flash_attn_varlen_qkvpacked_func(together, cu_seqlens, 40, **more)
    kv = framework.tensor(np.ascontiguousarray(qkv[:, 1:]))
    by_kv = umfa.flash_attn_varlen_kvpacked_func(
        parts[0], kv, cu_seqlens, cu_seqlens, 40, 40, **more
    )
    for found in (by_qkv, by_kv):
        assert found[2] is None
        for name, a, b in zip(("out", "lse"), found, expected, strict=False):
            assert_same_bits(framework.bits(a), framework.bits(b), name)
    alone = umfa.flash_attn_varlen_qkvpacked_func(together, cu_seqlens, 40, **options)
    assert isinstance(alone, framework.array_type)


def test_strided_tensors(numpy: Framework) -> None:
    lengths_q, lengths_k = [5, 33], [12, 40]
    tensors = packed(lengths_q, lengths_k, head_dim=24)
    wide = [np.full((2 * len(x), *x.shape[1:]), np.nan, np.float32) for x in tensors]
    for to, x in zip(wide, tensors, strict=True):
        to[::-2] = x
    views = (wide[0][::-2], wide[1][::-2], wide[2][::-2])
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    found = Attend(numpy).varlen(tensors, cu_q, cu_k, causal=True)
    of_views = umfa.flash_attn_varlen_func(
        *views, np.repeat(cu_q, 3)[::3], np.repeat(cu_k, 2)[::2], 33, 40, causal=True
    )
    assert_same_bits(numpy.bits(of_views), numpy.bits(found[0]))


def test_tables_may_be_strided_torch_views() -> None:
    torch = array_libraries.load("torch").module
    tensors = tuple(torch.from_numpy(x) for x in packed(A25_Q, A25_K))
    cu_q, cu_k = (torch.from_numpy(offsets(x)) for x in (A25_Q, A25_K))
    spread = torch.stack([cu_q, cu_k], dim=1)  # columns: strides of 2
    expected = umfa.flash_attn_varlen_func(*tensors, cu_q, cu_k, 16, 20)
    found = umfa.flash_attn_varlen_func(*tensors, spread[:, 0], spread[:, 1], 16, 20)
    assert torch.equal(found, expected)


def test_threads_change_no_bit(numpy: Framework) -> None:
    lengths_q, lengths_k = [1, 300, 2, 0, 70], [5000, 400, 900, 3, 130]
    tensors = packed(lengths_q, lengths_k, "float16", heads_k=2)
    tables = offsets(lengths_q), offsets(lengths_k)
    found = []
    for threads in (1, 2, 5):
        umfa.set_num_threads(threads)
        found.append(Attend(numpy).varlen(tensors, *tables, causal=True))
    for out, lse in found[1:]:
        assert_same_bits(numpy.bits(out), numpy.bits(found[0][0]))
        assert_same_bits(numpy.bits(lse), numpy.bits(found[0][1]), "lse")


def test_signature_is_that_of_flash_attn() -> None:
    tail = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
    tail += ["deterministic", "return_attn_probs"]
    both = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    for function, positional, more in (
        (
            umfa.flash_attn_varlen_func,
            ["q", "k", "v", *both, *tail, "block_table"],
            ["seqused_q", "seqused_k"],
        ),
        (umfa.flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen", *tail], []),
        (umfa.flash_attn_varlen_kvpacked_func, ["q", "kv", *both, *tail], []),
    ):
        assert list(by_position(function)) == positional
        assert by_keyword(function) == [*more, *EXTRAS]
