"""Rotary embedding of queries and keys on their way into the forward kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES
from tests.sequences import offsets, paged, rotary_tables, rotated
from tests.tiers import crossed

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

INTERLEAVED = pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])


def lse_tolerance(query: Array) -> Tolerance:
    """A rotated number may round to 16 bits the other way than the exact one."""
    return LSE if query.dtype == np.float32 else Tolerance(1e-3, 0)


def dense(
    dtype: str, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int = 0, batch: int = 1
) -> tuple[Array, Array, Array]:
    return (
        normal((batch, seqlen_q, 4, head_dim), dtype, seed=0),
        normal((batch, seqlen_k, 2, head_dim), dtype, seed=1),
        normal((batch, seqlen_k, 2, head_dim_v or head_dim), dtype, seed=2),
    )


def check(
    query: Array, key: Array, value: Array, cos: Array, sin: Array, interleaved: bool,
    **options: Any,
) -> None:  # fmt: skip
    given = {"rotary_interleaved": interleaved, **options}
    found = emulated.call(query, key, value, given, rotary_cos=cos, rotary_sin=sin)
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    places = {"interleaved": interleaved}
    expected = reference.attention(
        rotated(query, cos, sin, np.arange(seqlen_q) + seqlen_k - seqlen_q, **places),
        rotated(key, cos, sin, np.arange(seqlen_k), **places),
        value,
        **options,
    )
    assert_close(found[0].astype(np.float64), expected[0], BASE[query.dtype.name])
    assert_close(found[1].astype(np.float64), expected[1], lse_tolerance(query), "lse")
    (launch,) = emulated.last_plan["launches"]
    assert launch["kernel"].startswith("forward")


@pytest.mark.parametrize(
    ("dtype", "table", "interleaved"),
    crossed(
        ["float32", "bfloat16", "float32", "float16"],
        ["float32", "float32", "bfloat16", "float16"],
        [True, False],
    ),
)
def test_tables_of_any_dtype(dtype: str, table: str, interleaved: bool) -> None:
    cos, sin = (normal((90, 16), table, seed=i) for i in (3, 4))
    check(*dense(dtype, 40, 70, 64), cos, sin, interleaved, causal=True)


@pytest.mark.parametrize(
    ("head_dim", "channels", "dtype", "interleaved"),
    crossed(
        [[64, 64], [64, 2], [30, 22], [33, 32], [192, 64], [300, 300]],
        ["float16", "float16", "float32"],
        [True, False],
    ),
)
def test_channels(dtype: str, head_dim: int, channels: int, interleaved: bool) -> None:
    """The first ones turn, the others do not; shared among simdgroups, odd numbers in all."""
    cos, sin = rotary_tables(60, channels)
    check(*dense(dtype, 20, 45, head_dim, 40), cos, sin, interleaved)


WIDE = 20  # the constant


@pytest.mark.parametrize(
    ("head_dim", "channels", "wide", "family", "dtype", "interleaved"),
    crossed(
        [[64, 64, True], [128, 32, True], [72, 64, True], [80, 80, True], [64, 40, False]],
        [[7, "float16"], [9, "bfloat16"], [9, "float16"], [7, "bfloat16"]],
        [True, False],
    ),
)
def test_keys_32_bytes_at_a_time(
    dtype: str, family: int, head_dim: int, channels: int, wide: bool, interleaved: bool
) -> None:
    emulated.settings.family = family
    check(*dense(dtype, 40, 77, head_dim, 40), *rotary_tables(77, channels), interleaved)
    assert emulated.last_plan["launches"][0]["constants"][WIDE] is wide


@INTERLEAVED
def test_what_keeps_keys_from_it(interleaved: bool) -> None:
    def chosen(tensors: tuple[Array, ...], cos: Array, sin: Array) -> bool:
        check(*tensors, cos, sin, interleaved)
        return bool(emulated.last_plan["launches"][0]["constants"][WIDE])

    cos, sin = rotary_tables(50, 32)
    tensors = dense("float32", 20, 50, 32)
    assert chosen(tensors, cos, sin)
    assert not chosen(tensors, cos.astype(np.float16), sin.astype(np.float16))
    assert not chosen(tensors, *(np.asfortranarray(x) for x in (cos, sin)))
    wider = [np.zeros((50, 18), np.float32) for _ in range(2)]
    for x, table in zip(wider, (cos, sin), strict=True):
        x[:, :16] = table
    assert not chosen(tensors, *(x[:, :16] for x in wider))  # rows not on 16 bytes
    odd = tuple(np.zeros((*x.shape[:3], 33), np.float32)[..., :32] for x in tensors)
    assert not chosen(odd, cos, sin)


@INTERLEAVED
def test_bfloat_fragments(interleaved: bool) -> None:
    emulated.settings.family = 9
    check(*dense("bfloat16", 40, 70, 64), *rotary_tables(70, 48), interleaved, causal=True)


@pytest.mark.nightly  # 160 s
@INTERLEAVED
def test_a30_flux(interleaved: bool) -> None:
    """A30, one head: the fused pass and rotating first."""
    emulated.settings.family = 9
    query, key, value = (normal((1, 4608, 1, 128), "bfloat16", seed=i) for i in range(3))
    cos, sin = rotary_tables(4608, 128)
    found, _ = emulated.call(
        query, key, value, {"rotary_interleaved": interleaved}, rotary_cos=cos, rotary_sin=sin
    )
    assert emulated.last_plan["launches"][0]["constants"][WIDE] is True
    at = np.arange(4608)
    turned = [rotated(x, cos, sin, at, interleaved=interleaved) for x in (query, key)]
    unfused, _ = emulated.call(*turned, value)
    tolerance = Tolerance(5e-3, 8e-3)
    assert_close(found.astype(np.float64), unfused.astype(np.float64), tolerance, "unfused")
    exact, _ = reference.attention(*turned, value)
    assert_close(found.astype(np.float64), exact, tolerance)


@INTERLEAVED
def test_few_queries_go_to_the_kernel_that_stages_keys(interleaved: bool) -> None:
    check(*dense("float16", 1, 200, 64), *rotary_tables(200, 64), interleaved)


@INTERLEAVED
def test_any_strides(interleaved: bool) -> None:
    tensors = [x[..., ::2] for x in dense("float16", 40, 70, 128)]
    cos, sin = (x[::-1, ::3] for x in rotary_tables(140, 192))
    check(*tensors, cos, sin, interleaved)


@pytest.mark.parametrize("machine", SOME_MACHINES)
@INTERLEAVED
def test_any_machine(interleaved: bool, machine: str) -> None:
    emulated.settings.options = MACHINES[machine]
    check(*dense("float16", 40, 70, 64), *rotary_tables(70, 40), interleaved, causal=True)


@pytest.mark.parametrize("seed", [1, 2])
@INTERLEAVED
def test_any_schedule(interleaved: bool, seed: int) -> None:
    emulated.settings.schedule_seed = seed
    check(*dense("float32", 40, 70, 160, batch=2), *rotary_tables(70, 80), interleaved)


@pytest.mark.parametrize(("page_size", "interleaved"), crossed([0, 7], [True, False]))
def test_sequences(page_size: int, interleaved: bool) -> None:
    """Each counts positions by itself: its last query stands where its last key does."""
    lengths_q, lengths_k = [20, 0, 3, 40], [33, 5, 40, 40]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    q = normal((int(cu_q[-1]), 4, 64), "float16", seed=0)
    k, v = (normal((int(cu_k[-1]), 2, 64), "float16", seed=i) for i in (1, 2))
    cos, sin = rotary_tables(80, 64)
    places = {"interleaved": interleaved}
    given: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    keys, values = k, v
    if page_size:
        caches = np.zeros((2, 4, 40, 2, 64), np.float16)
        for b, i in np.ndindex(4, 2):
            caches[i, b, : lengths_k[b]] = (k, v)[i][cu_k[b] : cu_k[b + 1]]
        (keys, values), table = paged(list(caches), page_size)
        given = {"cu_seqlens_q": cu_q, "seqused_k": np.array(lengths_k), "block_table": table}
    options = {"causal": True, "rotary_interleaved": interleaved}
    out, lse = emulated.call(q, keys, values, options, rotary_cos=cos, rotary_sin=sin, **given)
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, own = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        expected = reference.attention(
            rotated(q[None, rows], cos, sin, np.arange(n) + m - n, **places),
            rotated(k[None, own], cos, sin, np.arange(m), **places),
            v[None, own],
            causal=True,
        )
        assert_close(out[None, rows].astype(np.float64), expected[0], BASE["float16"])
        assert_close(lse[None, :, rows].astype(np.float64), expected[1], lse_tolerance(q), "lse")
    # A shorter sequence of keys would have queries before the first angle.
    longer = {**given, "cu_seqlens_q": offsets([20, 6, 3, 34])}
    with pytest.raises(ValueError, match=r"seqlen_q must not exceed seqlen_kv.*got 6 and 5"):
        emulated.call(q, keys, values, options, rotary_cos=cos, rotary_sin=sin, **longer)


def test_each_key_is_read_once_a_tile() -> None:
    """In tiles of 32 keys; past the end, the last row again. Angles once for each pair."""
    query, key, value = dense("float16", 40, 70, 64)
    cos, sin = rotary_tables(70, 32)
    with emulated.counting() as counters:
        check(query, key, value, cos, sin, interleaved=False)
    (launch,) = counters
    assert launch.buffer_bytes_read[1] == 2 * key.nbytes // 70 * 96  # once for each query head
    pairs = 16 * (70 + 2 * 40)  # each of a query's channels is loaded by itself
    assert launch.buffer_bytes_read[11] == launch.buffer_bytes_read[12] == 4 * 4 * pairs
