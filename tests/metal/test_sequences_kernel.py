"""Sequences packed, cached and paged, sinks and chunks, on the emulated GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.attend import Result, call_on
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.emulated import MACHINES
from tests.sequences import varlen_reference
from tests.tiers import crossed

Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.usefixtures("own_settings")


def varlen(
    q: Array, k: Array, v: Array, cu_q: Any, cu_k: Any, *, dtype: Any = np.int32, **options: Any
) -> Result:
    """`umfa.flash_attn_varlen_func(..., return_attn_probs=True)`."""
    for name in ("block_table", "seqused_q", "seqused_k"):
        if name in options:
            options[name] = np.asarray(options[name], dtype)
    return Result(
        *call_on(
            "metal-emulated", umfa.flash_attn_varlen_func, q, k, v, np.asarray(cu_q, dtype),
            None if cu_k is None else np.asarray(cu_k, dtype), None, None, return_lse=True,
            **options,
        )
    )  # fmt: skip


def kvcache(q: Array, k: Array, v: Array, **options: Any) -> Result:
    """flash_attn_with_kvcache on the emulated GPU."""
    function = umfa.flash_attn_with_kvcache
    return Result(*call_on("metal-emulated", function, q, k, v, return_softmax_lse=True, **options))


def expected_of(q: Array, k: Array, v: Array, **options: Any) -> Result:
    """One sequence (rows, heads, channels) by itself: out, and lse (heads, rows)."""
    out, lse = reference.attention(q[None], k[None], v[None], **options)
    return Result(out[0], lse[0])


def check_packed(
    found: Result, q: Array, k: Array, v: Array, cu_q: Any, cu_k: Any, **options: Any
) -> None:
    out, lse = varlen_reference(q, k, v, cu_q, cu_k, **options)
    assert_close(found.out.astype(np.float64), out, BASE[str(q.dtype)])
    assert_close(found.lse.astype(np.float64), lse, LSE, "lse")


def packed(
    lengths_q: list[int], lengths_k: list[int], dtype: str = "float16", heads: int = 4,
    heads_k: int = 2, head_dim: int = 64, head_dim_v: int | None = None,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]) for n in (lengths_q, lengths_k))
    q = normal((int(cu_q[-1]), heads, head_dim), dtype, seed=0)
    k = normal((int(cu_k[-1]), heads_k, head_dim), dtype, seed=1)
    v = normal((int(cu_k[-1]), heads_k, head_dim_v or head_dim), dtype, seed=2)
    return q, k, v, cu_q, cu_k


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "softcap, scale": {"softcap": 3.0, "softmax_scale": 0.3},
    "ALiBi": {"causal": True, "alibi_slopes": np.array([0.5, 0.1, 0.2, 0.3], np.float32)},
    "ALiBi of each": {"alibi_slopes": np.abs(normal((5, 4), seed=7))},
    "sink": {"learnable_sink": np.array([0.5, -2, 9, -np.inf], np.float32)},
    "chunk": {"attention_chunk": 16, "causal": True},
    "chunk and window": {"attention_chunk": 33, "window_size": (10, 40)},
    "all": {
        "learnable_sink": np.array([0.5, -2, 9, 3], np.float16), "attention_chunk": 50,
        "window_size": (30, 0), "softcap": 5.0,
    },
}  # fmt: skip
# Empty ones, queries without keys, more queries than keys, several tiles.
LENGTHS = ([10, 0, 70, 15, 40], [40, 20, 65, 0, 11])
FEW = ([1, 0, 3, 2, 8], [400, 20, 1, 0, 777])
LENGTHS_OF = {"tiles": LENGTHS, "decode": FEW}
KINDS = pytest.mark.parametrize("lengths", LENGTHS_OF.values(), ids=LENGTHS_OF)


@pytest.mark.parametrize(
    ("name", "kind", "machine"),
    crossed(
        list(OPTIONS),
        ["tiles", "decode"],
        [None, None, "permuted lane map", "permuted lane map"],
    ),
)
def test_packed(name: str, kind: str, machine: str | None) -> None:
    if machine:
        emulated.settings.options = MACHINES[machine]
    options, tensors = OPTIONS[name], packed(*LENGTHS_OF[kind])
    check_packed(varlen(*tensors, **options), *tensors, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_acceptance(dtype: str, index_dtype: Any, causal: bool) -> None:
    """A25."""
    emulated.settings.family = 9
    tensors = packed([8, 0, 16, 12], [10, 0, 20, 15], dtype, heads_k=4)
    found = varlen(*tensors, causal=causal, dtype=index_dtype)
    check_packed(found, *tensors, causal=causal)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype"),
    crossed([[40, 24], [192, 128], [300, 300]], ["float16", "float32"]),
)
@KINDS
def test_head_dims(lengths: Any, head_dim: int, head_dim_v: int, dtype: str) -> None:
    """Narrow loads, simdgroups that share channels, and one tile for K and V among them."""
    tensors = packed(*lengths, dtype, head_dim=head_dim, head_dim_v=head_dim_v)
    check_packed(varlen(*tensors, causal=True), *tensors, causal=True)


@pytest.mark.parametrize("seed", [1, 2])
@KINDS
def test_any_schedule(lengths: Any, seed: int) -> None:
    emulated.settings.schedule_seed = seed
    tensors = packed(*lengths)
    check_packed(varlen(*tensors), *tensors)


@pytest.mark.parametrize("few", [False, True])
def test_rows_that_no_sequence_uses(few: bool) -> None:
    """They become 0 and -inf, and what they hold on the other side is not read."""
    q, k, v, cu_q, cu_k = packed([30, 40, 10], [50, 60, 20])
    q = np.concatenate([q, np.full_like(q[:20], np.nan)])  # rows after the last
    used_q, used_k = (np.array([7, 0, 5]) if few else np.array([7, 0, 10])), np.array([33, 60, 0])
    for b in range(3):
        q[cu_q[b] + used_q[b] : cu_q[b + 1]] = np.nan
        k[cu_k[b] + used_k[b] : cu_k[b + 1]] = np.nan
        v[cu_k[b] + used_k[b] : cu_k[b + 1]] = np.nan
    used = {"seqused_q": used_q, "seqused_k": used_k}
    check_packed(varlen(q, k, v, cu_q, cu_k, **used), q, k, v, cu_q, cu_k, **used)
    assert emulated.last_plan["launches"][1]["kernel"].startswith("decode" if few else "forward")


def test_results_without_any_sequence() -> None:
    q, k, v, *_ = packed([40], [40])
    for cu in ([0], [0, 0], [0, 0, 0]):
        out, lse = varlen(q, k, v, cu, cu)
        assert (out == 0).all()
        assert np.isneginf(lse).all()


@pytest.mark.parametrize("sink", [1000.0, -1000.0, 1e30, -np.inf])
@pytest.mark.parametrize("lengths", [([20], [50]), ([2], [600]), ([20], [0]), ([2], [0])], ids=str)
def test_extreme_sinks(lengths: Any, sink: float) -> None:
    tensors = packed(*lengths)
    sinks = np.full(4, sink, np.float32)
    found = varlen(*tensors, learnable_sink=sinks)
    expected = expected_of(*tensors[:3], learnable_sink=sinks)
    assert_close(found.out.astype(np.float64), expected.out, BASE["float16"])
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "seqlen_q"), crossed(["float32", "float16", "bfloat16"], [20, 2])
)
def test_sinks_and_chunks_of_dense_tensors(seqlen_q: int, dtype: str) -> None:
    """No tables: the batch is what it is, its sinks of any dtype, every other one."""
    q = normal((2, seqlen_q, 4, 64), seed=0)
    k, v = (normal((2, 600, 2, 64), seed=i) for i in (1, 2))
    sinks = normal((8,), dtype, seed=3, factor=3)[::2]
    options = {"learnable_sink": sinks, "attention_chunk": 599}
    found = kvcache(q, k, v, causal=True, **options)
    for b in range(2):
        expected = expected_of(q[b], k[b], v[b], causal=True, **options)
        assert_close(found.out[b].astype(np.float64), expected.out, BASE["float32"])
        assert_close(found.lse[b].astype(np.float64), expected.lse, LSE, "lse")
    names = [launch["kernel"].split("_f32")[0] for launch in emulated.last_plan["launches"]]
    assert names == (["forward"] if seqlen_q > 8 else ["decode", "decode_merge"])


# ---- masks ---------------------------------------------------------------------------------------


MASKS = [
    *([kind, None] for kind in ("bool", "float32", "float16", "bfloat16")),
    ["bool", "permuted lane map"],
]


@pytest.mark.parametrize(
    ("kind", "machine", "shape", "of"),
    crossed(
        [*MASKS],
        [(5, 4, 1, 1), (1, 1, 1, 1), (5, 1, 0, 1), (1, 4, 1, 0)],
        ["tiles", "decode"],
    ),
    ids=str,
)
def test_masks(kind: str, machine: str | None, shape: tuple[int, ...], of: str) -> None:
    """Indexed within each sequence, and larger than the longest. What no key reaches is poison.

    `shape`: sequences, heads, and whether it has rows and columns, else one for all.
    """
    if machine:
        emulated.settings.options = MACHINES[machine]
    lengths = LENGTHS_OF[of]
    q, k, v, cu_q, cu_k = packed(*lengths)
    longest = (max(lengths[0]) + 3, max(lengths[1]) + 5)
    full = (*shape[:2], *(n if own else 1 for n, own in zip(longest, shape[2:], strict=True)))
    if kind == "bool":
        mask = np.random.default_rng(1).random(full) < 0.6
    else:
        mask = normal(full, kind, seed=5, factor=3)
        mask[..., 0] = -np.inf
        if shape[2:] == (1, 1):
            for b in range(shape[0] if shape[0] > 1 else 0):
                mask[b, :, :, lengths[1][b] :] = np.nan
    options = {"window_size": (100, -1), "causal": True}
    out, lse = emulated.call(q, k, v, options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, attn_mask=mask)
    for b, (n, m) in enumerate(zip(*lengths, strict=True)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = np.broadcast_to(mask, (5, 4, *longest))[b, :, :n, :m]
        expected, expected_lse = reference.attention(
            q[None, rows], k[None, keys], v[None, keys], mask=own[None],
            causal=True, window_size=(100, -1),
        )  # fmt: skip
        assert_close(out[None, rows].astype(np.float64), expected, BASE["float16"])
        assert_close(lse[None, :, rows].astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize("seqlen_q", [2, 20])
def test_masks_over_pages_and_new_rows(seqlen_q: int) -> None:
    """All at once: the mask counts the new keys too."""
    used, new, page_size = np.array([50, 0, 77]), 9, 7
    q = normal((3, seqlen_q, 4, 64), "float16", seed=0)
    k, v = (normal((3, 90, 2, 64), "float16", seed=i) for i in (1, 2))
    (k_pages, _), (v_pages, _) = (paged(x, page_size, used) for x in (k, v))
    # The same table with the pages of the new rows in it.
    columns = -(-90 // page_size) + 1
    table = np.random.default_rng(page_size).permutation(3 * columns).reshape(3, columns)
    rows = [normal((3, new, 2, 64), "float16", seed=i) for i in (3, 4)]
    mask = np.random.default_rng(1).random((3, 4, seqlen_q, 90)) < 0.6
    out, lse = emulated.call(
        q, k_pages, v_pages, {"causal": True}, new_key=rows[0], new_value=rows[1], seqused_k=used,
        block_table=table, attn_mask=mask,
    )  # fmt: skip
    for b, n in enumerate(used):
        keys, values = (
            np.concatenate([x[b, :n], y[b]])[None] for x, y in zip((k, v), rows, strict=True)
        )
        expected, expected_lse = reference.attention(
            q[b, None], keys, values, causal=True, mask=mask[b, None, ..., : n + new]
        )
        assert_close(out[b, None].astype(np.float64), expected, BASE["float16"])
        assert_close(lse[b, None].astype(np.float64), expected_lse, LSE, "lse")


# ---- caches and pages ----------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q", [1, 5, 40])
def test_cache(seqlen_q: int) -> None:
    """A batch in any order of a larger cache, of which a middle part counts."""
    q = normal((3, seqlen_q, 4, 64), "float16", seed=0)
    k, v = (normal((4, 300, 2, 64), "float16", seed=i) for i in (1, 2))
    lengths, left, index = np.array([300, 45, 280]), np.array([0, 5, 250]), np.array([3, 0, 2])
    for tensor in (k, v):
        tensor[1] = np.nan
        for b in range(3):
            tensor[index[b], : left[b]] = tensor[index[b], lengths[b] :] = np.nan
    found = kvcache(
        q, k, v, causal=True, cache_seqlens=lengths, cache_leftpad=left, cache_batch_idx=index
    )
    for b in range(3):
        keys = (index[b], slice(left[b], lengths[b]))
        expected = expected_of(q[b], k[keys], v[keys], causal=True)
        assert_close(found.out[b].astype(np.float64), expected.out, BASE["float16"])
        assert_close(found.lse[b].astype(np.float64), expected.lse, LSE, "lse")


def paged(k: Array, page_size: int, lengths: Array) -> tuple[Array, Array]:
    """A dense cache cut into pages in any order, and their table. Nothing else holds numbers."""
    batch, rows = k.shape[:2]
    columns = -(-rows // page_size) + 1
    order = np.random.default_rng(page_size).permutation(batch * columns)
    table = order.reshape(batch, columns)
    pages = np.full((batch * columns + 2, page_size, *k.shape[2:]), np.nan, k.dtype)
    for b in range(batch):
        for j in range(lengths[b]):
            pages[table[b, j // page_size], j % page_size] = k[b, j]
    table = table.copy()
    for b in range(batch):
        table[b, -(-lengths[b] // page_size) :] = 1_000_000  # no page: must not be looked at
    return pages, table


@pytest.mark.parametrize(
    ("page_size", "seqlen_q", "dtype", "head_dim"),
    crossed([1, 3, 16, 60, 256, 48], [1, 6, 70], [["float16", 64], ["float32", 30]]),
)
def test_pages_equal_a_cache_bit_for_bit(
    dtype: str, head_dim: int, seqlen_q: int, page_size: int
) -> None:
    lengths = np.array([333, 0, 17, 260])
    q = normal((4, seqlen_q, 4, head_dim), dtype, seed=0)
    k, v = (normal((4, 350, 2, head_dim), dtype, seed=i) for i in (1, 2))
    options = {"causal": True, "cache_seqlens": lengths}
    expected = kvcache(q, k, v, **options)
    k_pages, table = paged(k, page_size, lengths)
    v_pages, _ = paged(v, page_size, lengths)
    found = kvcache(q, k_pages, v_pages, block_table=table, **options)
    assert_same_bits(found.out.view(np.uint8), expected.out.view(np.uint8))
    assert_same_bits(found.lse.view(np.uint32), expected.lse.view(np.uint32), "lse")
    one = expected_of(q[0], k[0, :333], v[0, :333], causal=True)
    assert_close(found.out[0].astype(np.float64), one.out, BASE[dtype])


def test_packed_queries_over_pages() -> None:
    lengths = [33, 90, 5]
    q, k, v, cu_q, cu_k = packed([20, 40, 1], lengths)
    dense = np.zeros((2, 3, 90, 2, 64), q.dtype)
    for b, length in enumerate(lengths):
        for i, tensor in enumerate((k, v)):
            dense[i, b, :length] = tensor[cu_k[b] : cu_k[b + 1]]
    (k_pages, table), (v_pages, _) = (paged(x, 7, np.array(lengths)) for x in dense)
    for lengths_of in ({"seqused_k": lengths}, {}):
        cu = None if lengths_of else cu_k
        found = varlen(q, k_pages, v_pages, cu_q, cu, block_table=table, causal=True, **lengths_of)
        check_packed(found, q, k, v, cu_q, cu_k, causal=True)


# ---- cost ----------------------------------------------------------------------------------------


def test_few_queries_among_many_are_decoded() -> None:
    emulated.settings.cores = 40
    lengths_q, lengths_k = [1, 70, 8, 0, 9], [900, 70, 30, 10, 200]
    tensors = packed(lengths_q, lengths_k)
    check_packed(varlen(*tensors, causal=True), *tensors, causal=True)
    tiles, decode, merge = emulated.last_plan["launches"]
    assert tiles["kernel"].startswith("forward")
    assert tiles["grid"] == (2 + 1, 4, 1)
    assert decode["kernel"].startswith("decode")
    assert decode["grid"][0] > 2
    assert merge["grid"] == (1 + 8, 4, 1)


@pytest.mark.parametrize(("cores", "rows"), [(40, 64), (1, 128)])
def test_no_threadgroup_is_empty(cores: int, rows: int) -> None:
    emulated.settings.cores = cores
    lengths_q, lengths_k = [9, 0, 65, 200, 64], [50, 9, 70, 200, 0]
    varlen(*packed(lengths_q, lengths_k))
    (launch,) = emulated.last_plan["launches"]
    assert launch["grid"] == (sum(-(-n // rows) for n in lengths_q), 4, 1)


def test_decode_splits_by_length() -> None:
    emulated.settings.cores = 40
    lengths = [40, 5000, 0, 700]
    varlen(*packed([1, 1, 1, 2], lengths))
    decode, merge = emulated.last_plan["launches"]
    keys = int(np.frombuffer(decode["params"][-16:-12], np.int32)[0])
    pieces = [max(1, -(-n // keys)) for n in lengths]
    assert max(pieces) > 4
    assert decode["grid"] == (sum(pieces), 2, 1)
    assert merge["grid"] == (5, 4, 1)
    rows = sum(4 * n * s for n, s in zip([1, 1, 1, 2], pieces, strict=True))
    assert emulated.last_plan["scratch_bytes"] == [rows * 64 * 4, rows * 8]


@pytest.mark.parametrize("seqlen_q", [1, 60])
@pytest.mark.parametrize("page_size", [1, 24])
def test_pages_are_read_once(page_size: int, seqlen_q: int) -> None:
    """For each query tile and head; by decode once for all heads of a group. Tiles of 32 keys and
    of 64 queries, and decode's runs of 8 keys, have no guarded loads: past the end, they read a row
    again."""
    lengths = np.array([300, 130])
    q = normal((2, seqlen_q, 2, 64), "float16", seed=0)
    k, v = (normal((2, 300, 1, 64), "float16", seed=i) for i in (1, 2))
    k_pages, table = paged(k, page_size, lengths)
    v_pages, _ = paged(v, page_size, lengths)
    with emulated.counting() as counters:
        kvcache(q, k_pages, v_pages, cache_seqlens=lengths, block_table=table)
    once = (304 + 136) * 64 * 2 if seqlen_q == 1 else (320 + 160) * 64 * 2 * 2
    assert counters[0].buffer_bytes_read[1] == counters[0].buffer_bytes_read[2] == once
    if seqlen_q > 1:
        assert counters[0].buffer_bytes_read[0] == q.nbytes // 60 * 64


def test_unused_rows_cost_their_own_bytes() -> None:
    q, k, v, *_ = packed([100], [50])
    with emulated.counting() as counters:
        varlen(q, k, v, [0, 60], [0, 50])
    clear, forward = counters
    assert clear.buffer_bytes_written[0] == 40 * 4 * 64 * 2
    assert clear.buffer_bytes_written[1] == 40 * 4 * 4
    assert forward.buffer_bytes_written[3] == 60 * 4 * 64 * 2


@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_tiles_between_prefix_and_window_are_not_read(seqlen_q: int) -> None:
    """By bytes read of the keys; of 2048, some 30 and 64 are seen."""
    q = normal((1, seqlen_q, 2, 64), "float16", seed=0)
    k, v = (normal((1, 2048, 2, 64), "float16", seed=i) for i in (1, 2))
    options = {"causal": True, "window_size": (64, 0), "num_splits": 1}
    found = []
    for prefix in (0, 30, 2048):
        with emulated.counting() as counters:
            emulated.call(q, k, v, options, prefix_lens=np.array([prefix]))
        found.append(sum(c.buffer_bytes_read[1] for c in counters))
    window, some, everything = found
    assert window < some < 2.5 * window
    assert some < everything / 8
