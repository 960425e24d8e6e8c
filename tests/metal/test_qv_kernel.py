"""Queries with a second part that meets the values, and the shapes of DeepSeek's latent vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES
from tests.sequences import offsets, paged
from tests.tiers import crossed

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

# head_dim, head_dim_v: one tile for each of K and V, shared channels, one tile for both.
DIMS = [(64, 64), (40, 24), (160, 160), (64, 512), (576, 512), (512, 300)]


def tensors(
    dtype: str, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int, batch: int = 1
) -> tuple[Array, Array, Array, Array]:
    return (
        normal((batch, seqlen_q, 2, head_dim), dtype, seed=0),
        normal((batch, seqlen_k, 1, head_dim), dtype, seed=1),
        normal((batch, seqlen_k, 1, head_dim_v), dtype, seed=2),
        normal((batch, seqlen_q, 2, head_dim_v), dtype, seed=3),
    )


def check(
    query: Array, key: Array, value: Array, qv: Array | None, more: Any = None, **options: Any
) -> None:
    found = emulated.call(
        query, key, value, options, **(more or {}), **({} if qv is None else {"qv": qv})
    )
    mask = (more or {}).get("attn_mask")
    exact = reference.attention(query, key, value, qv=qv, mask=mask, **options)
    assert_close(found[0].astype(np.float64), exact[0], BASE[query.dtype.name])
    assert_close(found[1].astype(np.float64), exact[1], LSE, "lse")
    (launch,) = emulated.last_plan["launches"]
    assert launch["kernel"].startswith("forward")


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype"),
    crossed([list(dims) for dims in DIMS], ["float16", "bfloat16", "float32"]),
)
def test_dims(head_dim: int, head_dim_v: int, dtype: str) -> None:
    check(*tensors(dtype, 20, 45, head_dim, head_dim_v), causal=True)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype"),
    crossed([[576, 512], [513, 8], [24, 400]], ["float32", "float16", "bfloat16"]),
)
def test_dims_without_qv(head_dim: int, head_dim_v: int, dtype: str) -> None:
    query, key, value, _ = tensors(dtype, 20, 45, head_dim, head_dim_v)
    check(query, key, value, None, causal=True)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 512), (576, 512)])
def test_bfloat_fragments(head_dim: int, head_dim_v: int) -> None:
    emulated.settings.family = 9
    check(*tensors("bfloat16", 20, 45, head_dim, head_dim_v))


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_size": (20, 3)},
    "softcap, scale": {"softcap": 3.0, "softmax_scale": 0.05},
    "few queries": {},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (64, 512)])
def test_options(head_dim: int, head_dim_v: int, name: str) -> None:
    seqlen_q = 2 if name == "few queries" else 33
    check(*tensors("float16", seqlen_q, 70, head_dim, head_dim_v, batch=2), **OPTIONS[name])


def test_masks() -> None:
    mask = np.random.default_rng(0).random((1, 2, 33, 70)) < 0.5
    mask[:, :, 3] = False
    check(*tensors("float16", 33, 70, 64, 64), {"attn_mask": mask})


def test_any_strides() -> None:
    query, key, value, qv = tensors("float16", 20, 40, 64, 128)
    check(query, key, value[..., ::2], qv[:, ::-1, ::-1, ::2])


@pytest.mark.parametrize("machine", SOME_MACHINES)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(64, 64), pytest.param(576, 512, marks=pytest.mark.slow)]
)
def test_any_machine(head_dim: int, head_dim_v: int, machine: str) -> None:
    emulated.settings.options = MACHINES[machine]
    check(*tensors("float16", 20, 40, head_dim, head_dim_v), causal=True)


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (64, 512), (576, 512)])
def test_any_schedule(head_dim: int, head_dim_v: int, dtype: str, seed: int) -> None:
    """V takes K's place in between: what is read when is up to barriers."""
    emulated.settings.schedule_seed = seed
    check(*tensors(dtype, 40, 50, head_dim, head_dim_v), causal=True)


@pytest.mark.parametrize("page_size", [0, 7])
def test_sequences(page_size: int) -> None:
    lengths_q, lengths_k = [20, 0, 3, 40], [33, 5, 40, 40]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    q, qv = (normal((int(cu_q[-1]), 4, d), "float16", seed=i) for i, d in enumerate((64, 96)))
    k, v = (normal((int(cu_k[-1]), 2, d), "float16", seed=i) for i, d in enumerate((64, 96), 2))
    given: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    keys, values = k, v
    if page_size:
        caches = [np.zeros((4, 40, *x.shape[1:]), x.dtype) for x in (k, v)]
        for cache, packed in zip(caches, (k, v), strict=True):
            for b in range(4):
                cache[b, : lengths_k[b]] = packed[cu_k[b] : cu_k[b + 1]]
        (keys, values), table = paged(caches, page_size)
        given = {"cu_seqlens_q": cu_q, "seqused_k": np.array(lengths_k), "block_table": table}
    out, lse = emulated.call(q, keys, values, {"causal": True}, qv=qv, **given)
    for b in range(4):
        rows, own = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        exact = reference.attention(
            q[None, rows], k[None, own], v[None, own], qv=qv[None, rows], causal=True
        )
        assert_close(out[None, rows].astype(np.float64), exact[0], BASE["float16"])
        assert_close(lse[None, :, rows].astype(np.float64), exact[1], LSE, "lse")


def test_each_product_is_computed_once_and_each_value_read_once() -> None:
    query, key, value, qv = tensors("float16", 64, 96, 64, 64)
    with emulated.counting() as counters:
        check(query, key, value, qv)
    (launch,) = counters
    assert launch.mma * 1024 == 2 * 64 * 96 * 2 * (64 + 64 + 64)
    assert launch.buffer_bytes_read[1] == launch.buffer_bytes_read[2] == 2 * key.nbytes
    assert launch.buffer_bytes_read[13] == qv.nbytes
    assert launch.threadgroup_barriers == 2 * 2 * 96 // 32


def test_declared_threadgroup_memory_is_what_the_kernel_takes() -> None:
    for dtype in ("float16", "float32"):
        for dims in ((64, 512), (576, 512)):
            with emulated.counting() as counters:
                emulated.call(*tensors(dtype, 10, 16, *dims)[:3])
            (planned,) = emulated.last_plan["launches"]
            assert counters[0].threadgroup_memory == planned["threadgroup_bytes"]
