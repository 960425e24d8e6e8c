"""umfa.fa3 and umfa.fa4: flash-attention 3's and 4's signatures, and what only they can ask for."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.attend import call_on
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.metal import emulated
from tests.sequences import offsets, paged, rotary_tables, rotated, varlen_reference
from tests.signatures import by_keyword, by_position
from umfa import fa3, fa4
from umfa._functional._foreign import UNSUPPORTED

BACKENDS = ["cpu", "metal-emulated"]

NEEDED = inspect.Parameter.empty
_DESCALE: dict[str, Any] = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
_PROGRAMS: dict[str, Any] = dict.fromkeys(("score_mod", "score_mod_bwd", "mask_mod"))
_QKV = dict.fromkeys("qkv", NEEDED)
_GATHER = {"gather_bwd_recompute_p": False, "gather_bwd_token_chunk": None}

# hopper/flash_attn_interface.py
FA3_TAIL = {
    "softmax_scale": None, "causal": False, "qv": None, **_DESCALE, "window_size": (-1, -1),
    "attention_chunk": 0, "softcap": 0.0, "num_splits": 1, "pack_gqa": None,
    "deterministic": False, "sm_margin": 0, "return_attn_probs": False,
}  # fmt: skip
# flash_attn/cute/interface.py of flash-attn-4 4.0.0b36
FA4_MIDDLE = {
    "softmax_scale": None, "causal": False, "window_size": (None, None), "learnable_sink": None,
    "softcap": 0.0, "num_splits": 1, "pack_gqa": None, "deterministic": False, **_PROGRAMS,
}  # fmt: skip
SIGNATURES: dict[Any, dict[str, Any]] = {
    fa3.flash_attn_func: {**_QKV, **FA3_TAIL},
    fa3.flash_attn_varlen_func: {
        **_QKV, "cu_seqlens_q": NEEDED, "cu_seqlens_k": NEEDED, "max_seqlen_q": NEEDED,
        "max_seqlen_k": NEEDED, "seqused_q": None, "seqused_k": None, **FA3_TAIL,
    },
    fa3.flash_attn_qkvpacked_func: {
        "qkv": NEEDED, "softmax_scale": None, "causal": False, **_DESCALE,
        "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0, "deterministic": False,
        "num_heads_q": None, "sm_margin": 0, "return_attn_probs": False,
    },
    fa3.flash_attn_with_kvcache: {
        "q": NEEDED, "k_cache": NEEDED, "v_cache": NEEDED, "k": None, "v": None, "qv": None,
        "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None,
        "cache_leftpad": None, "page_table": None, "cu_seqlens_q": None,
        "cu_seqlens_k_new": None, "max_seqlen_q": None, "rotary_seqlens": None, **_DESCALE,
        "softmax_scale": None, "causal": False, "window_size": (-1, -1), "attention_chunk": 0,
        "softcap": 0.0, "rotary_interleaved": True, "scheduler_metadata": None, "num_splits": 0,
        "pack_gqa": None, "sm_margin": 0, "return_softmax_lse": False,
    },
    fa3.flash_attn_combine: {
        "out_partial": NEEDED, "lse_partial": NEEDED, "out": None, "out_dtype": None,
    },
    fa3.get_scheduler_metadata: {
        "batch_size": NEEDED, "max_seqlen_q": NEEDED, "max_seqlen_k": NEEDED,
        "num_heads_q": NEEDED, "num_heads_kv": NEEDED, "headdim": NEEDED,
        "cache_seqlens": NEEDED, "qkv_dtype": None,  # torch.bfloat16 there
        "headdim_v": None, "cu_seqlens_q": None, "cu_seqlens_k_new": None,
        "cache_leftpad": None, "page_size": None, "max_seqlen_k_new": 0, "causal": False,
        "window_size": (-1, -1), "attention_chunk": 0, "has_softcap": False, "num_splits": 0,
        "pack_gqa": None, "sm_margin": 0,
    },
    fa4.flash_attn_func: {
        **_QKV, "qv": None, "gather_kv_indices": None, **FA4_MIDDLE, "aux_tensors": None,
        "aux_scalars": None, "block_sparse_tensors": None, "block_sparse_tensors_bwd": None,
        "return_lse": False, **_GATHER,
    },
    fa4.flash_attn_varlen_func: {
        **_QKV, "qv": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None,
        "max_seqlen_k": None, "min_seqlen_k": None, "seqused_q": None, "seqused_k": None,
        "gather_kv_indices": None, "page_table": None, **FA4_MIDDLE,
        "block_sparse_tensors": None, "aux_tensors": None, "aux_scalars": None,
        "return_lse": False, "scheduler_metadata": None, "seqlen_k_per_split": None,
        "disable_scheduler_metadata": False, **_GATHER,
    },
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_signature(function: Any) -> None:
    """Names, order and defaults; beyond them `backend`, by keyword."""
    found = by_position(function)
    assert list(found) == list(SIGNATURES[function])
    assert found == SIGNATURES[function]
    assert by_keyword(function) in ([], ["backend"])


def test_what_the_modules_show() -> None:
    for module in (fa3, fa4):
        functions = {x.__name__ for x in SIGNATURES if getattr(module, x.__name__, None) is x}
        assert set(module.__all__) == functions | {"HINTS"}
    assert fa3.HINTS is fa4.HINTS
    assert fa3.flash_attn_combine is umfa.flash_attn_combine


Q, K, V = (normal((2, n, h, 16), seed=i) for i, (n, h) in enumerate([(7, 4), (11, 2), (11, 2)]))
PACKED = Q.reshape(14, 4, 16), K.reshape(22, 2, 16), V.reshape(22, 2, 16)
CU_Q, CU_K = offsets([7, 7]), offsets([11, 11])
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fa3 func": (fa3.flash_attn_func, (Q, K, V)),
    "fa3 varlen": (fa3.flash_attn_varlen_func, (*PACKED, CU_Q, CU_K, 7, 11)),
    "fa3 qkvpacked": (fa3.flash_attn_qkvpacked_func, (np.stack([K, K, V], axis=2),)),
    "fa3 kvcache": (fa3.flash_attn_with_kvcache, (Q, K, V)),
    "fa4 func": (fa4.flash_attn_func, (Q, K, V)),
    "fa4 varlen": (fa4.flash_attn_varlen_func, (*PACKED, None, CU_Q, CU_K)),
}
HINT_VALUES: dict[str, Any] = {"pack_gqa": True, "sm_margin": 3, "scheduler_metadata": object()}


@pytest.mark.parametrize("name", CALLS)
def test_hints_change_nothing_and_the_rest_is_refused(name: str) -> None:
    function, tensors = CALLS[name]
    plain = function(*tensors)
    out = plain[0] if name.startswith("fa4") else plain
    for parameter in inspect.signature(function).parameters:
        if parameter in fa3.HINTS:
            found = function(*tensors, **{parameter: HINT_VALUES.get(parameter, 1)})
            assert_same_bits(found[0] if name.startswith("fa4") else found, out)
        elif parameter in UNSUPPORTED:
            given = {parameter: np.ones((2, 2), np.float32)}
            with pytest.raises(umfa.UnsupportedError, match=f"{parameter} is not implemented"):
                function(*tensors, **given)
            possible, why = umfa.can_run(function, *tensors, **given)
            assert not possible
            assert why.startswith(f"[umfa.can_run] {parameter} is not implemented")


@pytest.mark.parametrize("name", CALLS)
def test_messages_name_the_module_and_the_parameter(name: str) -> None:
    function, tensors = CALLS[name]
    full = f"umfa.{name[:3]}.{function.__name__}"
    with pytest.raises(ValueError, match=rf"^\[{full}\] window_size left is out of range"):
        function(*tensors, window_size=(2**40, 0))
    assert umfa.can_run(function, *tensors) == (True, "")
    if name.startswith("fa3"):
        with pytest.raises(ValueError, match=r"got -2; expected -1 \(unbounded\) or 0 to"):
            function(*tensors, window_size=(-2, 0))


def test_scheduler_metadata_is_nothing() -> None:
    made = fa3.get_scheduler_metadata(2, 7, 11, 4, 2, 16, np.array([11, 11]), causal=True)
    assert made is None
    out = fa3.flash_attn_with_kvcache(Q, K, V, cache_seqlens=11, scheduler_metadata=made)
    assert_same_bits(out, umfa.flash_attn_with_kvcache(Q, K, V, cache_seqlens=11))


def test_results_have_the_shapes_of_the_originals(framework: Framework) -> None:
    make = framework.tensor
    q, k, v, qv = make(Q), make(K), make(V), make(Q + 1)
    out, lse = reference.attention(Q, K, V, causal=True)

    def check(found: Any, exact: Array, what: str = "out") -> None:
        assert isinstance(found, framework.array_type)
        tolerance = BASE["float32"] if what == "out" else LSE
        assert_close(framework.float64(found), exact, tolerance, what)

    check(fa3.flash_attn_func(q, k, v, None, True), out)
    pair = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    check(pair[0], out)
    check(pair[1], lse, "lse")
    found, none = fa4.flash_attn_func(q, k, v, causal=True)
    assert none is None
    check(found, out)
    check(fa4.flash_attn_func(q, k, v, causal=True, return_lse=True)[1], lse, "lse")
    # Heads are last with qv, in flash-attention 4 only.
    out, lse = reference.attention(Q, K, V, qv=Q + 1)
    assert tuple(fa3.flash_attn_func(q, k, v, qv=qv, return_attn_probs=True)[1].shape) == lse.shape
    found, found_lse = fa4.flash_attn_func(q, k, v, qv, return_lse=True)
    check(found, out)
    check(found_lse, lse.swapaxes(1, 2), "lse")


def test_qkvpacked_of_grouped_heads(framework: Framework) -> None:
    key, value = normal((2, 7, 2, 16), seed=8), normal((2, 7, 2, 16), seed=9)
    qkv = framework.tensor(np.concatenate([Q, key, value], axis=2))
    out, _ = reference.attention(Q, key, value, causal=True)
    found = fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    assert_close(framework.float64(found), out, BASE["float32"])
    for heads_q in (0, 8, 3, -2):
        with pytest.raises(ValueError, match="num_heads_q does not fit 8 heads"):
            fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=heads_q)
    with pytest.raises(TypeError, match="num_heads_q is not an integer"):
        fa3.flash_attn_qkvpacked_func(qkv)
    five = framework.tensor(np.stack([Q, Q, Q], axis=2))
    with pytest.raises(ValueError, match="num_heads_q is for a qkv of four dimensions"):
        fa3.flash_attn_qkvpacked_func(five, num_heads_q=4)


# ---- windows beside the diagonal -----------------------------------------------------------------

WINDOWS = [
    (-3, 9), (-1, 4), (12, -5), (0, -1), (-30, 60), (None, -4), (-4, None), (7, None), (None, 3),
    (-3, 2), (3, -4), (-1, -1), (-9, -2), (None, None), (-400, 500), (-40, 39),
]  # fmt: skip


def visible_window(window: tuple[Any, Any], causal: bool) -> tuple[Any, Any]:
    """As the reference takes it: bounds that leave no key are none. By
    _resolve_causal_local_window of flash_attn/cute/interface.py."""
    left, right = window[0], 0 if causal else window[1]
    none_left = left is not None and right is not None and left + right < 0
    return (None, None) if none_left else window


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 70), (40, 150), (90, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_windows_beside_the_diagonal(shape: tuple[int, int], dtype: str, backend: str) -> None:
    seqlen_q, seqlen_k = shape
    q = normal((1, seqlen_q, 4, 24), dtype, seed=1)
    k, v = (normal((1, seqlen_k, 2, 24), dtype, seed=n) for n in (2, 3))
    for window in WINDOWS:
        for causal in (False, True):
            out, lse = call_on(
                backend, fa4.flash_attn_func, q, k, v, window_size=window, causal=causal,
                return_lse=True,
            )  # fmt: skip
            exact, exact_lse = reference.attention(
                q,
                k,
                v,
                causal=causal,
                window_size=visible_window(window, causal),
                window_offsets=True,
            )
            assert_close(out.astype(np.float64), exact, BASE[dtype], f"out of {window}")
            assert_close(lse.astype(np.float64), exact_lse, LSE, f"lse of {window}")


@pytest.mark.parametrize("seqlen_q", [3, 64])
@pytest.mark.parametrize("backend", ["metal-emulated"])
def test_tiles_beside_an_offset_window_are_not_read(seqlen_q: int, backend: str) -> None:
    """Some 128 keys of 512, in whole tiles, by bytes read on the GPU."""
    q = normal((1, seqlen_q, 2, 32), seed=1)
    k, v = normal((1, 512, 2, 32), seed=2), normal((1, 512, 2, 32), seed=3)
    bytes_read = []
    for window in ((None, None), (200, -136), (3, -4), (None, -600)):
        with emulated.counting() as counters:
            call_on(backend, fa4.flash_attn_func, q, k, v, window_size=window)
        bytes_read.append(sum(c.buffer_bytes_read[1] for c in counters))  # of the keys
    everything, some, unbounded, none = bytes_read
    assert unbounded == everything
    assert 0 < some < 0.45 * everything
    assert none == 0


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_that_start_and_end_anywhere(dtype: str, backend: str) -> None:
    starts_q, starts_k = offsets([3, 0, 40, 1]) + 5, offsets([30, 4, 61, 0]) + 9
    q = normal((60, 4, 24), dtype, seed=1)
    k, v = normal((110, 2, 24), dtype, seed=2), normal((110, 2, 40), dtype, seed=3)
    used = np.array([30, 0, 50, 0])
    for x in (k, v):
        x[:9] = x[104:] = x[93:104] = np.nan
    q[:5] = np.nan
    for more in ({}, {"seqused_q": np.array([2, 0, 33, 1])}):
        given = {**more, "seqused_k": used}
        exact = varlen_reference(q, k, v, starts_q, starts_k, causal=True, **given)
        for function, options in (
            (fa3.flash_attn_varlen_func, {"return_attn_probs": True}),
            (fa4.flash_attn_varlen_func, {"return_lse": True}),
        ):
            out, lse = call_on(
                backend, function, q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k,
                max_seqlen_q=40, max_seqlen_k=61, causal=True, **given, **options,
            )  # fmt: skip
            assert_close(out.astype(np.float64), exact[0], BASE[dtype])
            assert_close(lse.astype(np.float64), exact[1], LSE, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_side_packed(backend: str) -> None:
    """cu_seqlens of one side, and rows in use of the other."""
    used_q, used_k = np.array([7, 2]), np.array([3, 11])
    exact, _ = reference.attention(Q[1:, :2], K[1:], V[1:])
    for given in (
        (PACKED[0], K, V, None, CU_Q, None),
        (Q, *PACKED[1:], None, None, CU_K),
        (Q, K, V, None, None, None),
    ):
        out, _ = call_on(
            backend, fa4.flash_attn_varlen_func, *given, seqused_q=used_q, seqused_k=used_k
        )
        assert_close(out.reshape(Q.shape)[1:, :2].astype(np.float64), exact, BASE["float32"])
        assert not out.reshape(Q.shape)[1, 2:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_qv_without_q(backend: str) -> None:
    """flash-attention 4's absorbed MLA without a rotary part."""
    qv, v = normal((2, 5, 4, 40), seed=1), normal((2, 33, 1, 40), seed=2)
    exact, exact_lse = reference.attention(qv, v, v, causal=True)
    out, lse = call_on(
        backend, fa4.flash_attn_func, None, None, v, qv=qv, causal=True, return_lse=True
    )
    assert_close(out.astype(np.float64), exact, BASE["float32"])
    assert_close(lse.astype(np.float64), exact_lse.swapaxes(1, 2), LSE, "lse")
    out, _ = call_on(
        backend, fa4.flash_attn_varlen_func, None, None, v.reshape(66, 1, 40),
        qv=qv.reshape(10, 4, 40), cu_seqlens_q=offsets([5, 5]), cu_seqlens_k=offsets([33, 33]),
        causal=True,
    )  # fmt: skip
    assert_close(out.reshape(exact.shape).astype(np.float64), exact, BASE["float32"])
    with pytest.raises(TypeError, match=r"\[umfa\.fa4\.flash_attn_func\] q is not a tensor"):
        fa4.flash_attn_func(None, V, V, qv=qv)
    with pytest.raises(TypeError, match="qv"):
        fa4.flash_attn_func(None, None, v, qv="qv")


# ---- the cache -----------------------------------------------------------------------------------


class Cache:
    """A call of flash_attn_with_kvcache drawn at random, and what it must give."""

    def __init__(self, rng: np.random.Generator, most: int) -> None:
        def integer(low: int, high: int) -> int:
            return int(rng.integers(low, high + 1))

        def flip(probability: float = 0.5) -> bool:
            return bool(rng.random() < probability)

        self.dtype = str(rng.choice(list(DTYPES)))
        batch, heads_k = integer(1, 4), integer(1, 2)
        heads, head_dim, head_dim_v = heads_k * integer(1, 3), integer(8, 40), integer(8, 40)
        spare = integer(0, 2)  # indices of the cache, or rows of the table, that nobody has
        self.packed_q, packed_new, has_pages = flip(), flip(), flip()
        appends, rotates = flip(0.8), flip(0.6)

        def lengths(low: int, high: int, varied: bool) -> Array:
            if not varied:
                return np.full(batch, integer(low, high))
            return np.array([integer(low, high) if flip(0.85) else 0 for _ in range(batch)])

        few = flip()
        self.seqlen_q = lengths(1, 4 if few else 70, self.packed_q)
        used = lengths(0, most, True)
        new = lengths(0, 20, packed_new) if appends else np.zeros(batch, np.int64)
        ends = used + new
        left = np.array([integer(0, int(x)) if flip() else 0 for x in ends])
        rows = int(ends.max()) + integer(0, 5) or 1

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[self.dtype])

        def laid_out(parts: list[Array], packed: bool) -> tuple[Array, Array | None]:
            """Parts (rows, heads, channels) one after the other, or one for each index."""
            if not packed:
                return np.stack(parts), None
            before = integer(0, 3)
            whole = normal(before + sum(map(len, parts)) + integer(0, 3), *parts[0].shape[1:])
            whole[:] = np.nan
            starts = offsets([len(x) for x in parts]) + before
            for start, part in zip(starts, parts, strict=False):
                whole[start : start + len(part)] = part
            return whole, starts

        index = np.arange(batch) if not flip() else rng.permutation(batch + spare)[:batch]
        queries = [normal(n, heads, head_dim) for n in self.seqlen_q]
        new_k = [normal(n, heads_k, head_dim) for n in new]
        new_v = [normal(n, heads_k, head_dim_v) for n in new]
        whole = len(index) if np.array_equal(index, np.arange(batch)) else batch + spare
        k, v = normal(whole, rows, heads_k, head_dim), normal(whole, rows, heads_k, head_dim_v)
        for b, at in enumerate(index):
            for x in (k, v):
                x[at, : left[b]] = x[at, used[b] :] = np.nan
        self.caches = [k, v]
        options: dict[str, Any] = {"causal": flip(), "cache_seqlens": used.astype(np.int32)}
        if not np.array_equal(index, np.arange(batch)) or flip():
            options["cache_batch_idx"] = index.astype(np.int32)
        if left.any():
            options["cache_leftpad"] = left.astype(np.int64)
        if flip(0.3):
            options["window_size"] = (integer(-1, 50), integer(-1, 50))
        if flip(0.2):
            options["attention_chunk"] = integer(1, 60)
        if flip(0.2):
            options["softcap"] = float(rng.uniform(2, 20))
        self.rules = {x: options[x] for x in options if not x.startswith("cache")}
        if flip(0.3):
            options["num_splits"] = integer(0, 5)
        q, cu_q = laid_out(queries, self.packed_q)
        if cu_q is not None:
            options |= {"cu_seqlens_q": cu_q, "max_seqlen_q": int(self.seqlen_q.max())}
        self.qv = None
        if flip(0.2):
            parts = [normal(n, heads, head_dim_v) for n in self.seqlen_q]
            self.qv = parts
            options["qv"] = np.stack(parts) if cu_q is None else normal(len(q), heads, head_dim_v)
            for start, part in zip(() if cu_q is None else cu_q, parts, strict=False):
                options["qv"][start : start + len(part)] = part
        self.after = [x.copy() for x in self.caches]
        self.new_tensors: list[Array] = []
        if appends:
            ks, cu_new = laid_out(new_k, packed_new)
            vs = laid_out(new_v, False)[0] if cu_new is None else ks_like(ks, new_v, cu_new)
            self.new_tensors = [ks, vs]
            if cu_new is not None:
                options["cu_seqlens_k_new"] = cu_new
        if appends and rotates:
            queries, new_k = self.rotate(rng, options, used, queries, new_k, head_dim)
        for b, at in enumerate(index):
            for x, added in zip(self.after, (new_k[b], new_v[b]), strict=True):
                x[at, used[b] : ends[b]] = added
        self.queries, self.used, self.ends, self.left = queries, used, ends, left
        self.index, self.rows, self.table = index, rows, None
        self.tensors = [q, *self.caches]
        if has_pages:
            pages, self.table = paged(self.caches, integer(1, 40), seed=integer(0, 99))
            self.tensors[1:] = pages
            options["page_table"] = self.unread(pages[0].shape[1])
        self.cu_q, self.options, self.starts = cu_q, options, cu_q

    def rotate(
        self, rng: np.random.Generator, options: dict[str, Any], used: Array,
        queries: list[Array], new_k: list[Array], head_dim: int,
    ) -> tuple[list[Array], list[Array]]:  # fmt: skip
        first = used
        if rng.random() < 0.5:
            first = rng.integers(0, 300, len(used))
            options["rotary_seqlens"] = first.astype(np.int32)
        cos, sin = rotary_tables(int(first.max()) + 80, 2 * int(rng.integers(1, head_dim // 2 + 1)))
        interleaved = bool(rng.random() < 0.5)
        left, right = options.get("window_size", (-1, -1))
        chunk = options.get("attention_chunk", 0)
        steps = options["causal"] or left >= 0 or right >= 0 or chunk > 0
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}

        def turned(parts: list[Array], step: int) -> list[Array]:
            return [
                rotated(x, cos, sin, p + step * np.arange(len(x)), interleaved=interleaved)
                for x, p in zip(parts, first, strict=True)
            ]

        return turned(queries, int(steps)), turned(new_k, 1)

    def unread(self, page_size: int) -> Array:
        """The table, with what is never read anything: pages before and behind the rows that count,
        and rows of the table that nobody has."""
        assert self.table is not None
        table = np.full_like(self.table, 2**31 - 1)
        for b, at in enumerate(self.index):
            own = slice(min(self.left[b], self.used[b]) // page_size, -(-self.ends[b] // page_size))
            table[at, own] = self.table[at, own]
        return table

    def check(self, found: tuple[Array, Array]) -> None:
        out, lse = found
        k, v = self.tensors[1:3]
        if self.table is not None:
            k, v = (
                x[self.table].reshape(len(self.table), -1, *x.shape[2:])[:, : self.rows]
                for x in (k, v)
            )
        turned = "rotary_cos" in self.options
        # umfa rotates in float32, and rounding to the dtype may then fall on the other side.
        own = {"float32": 3e-5, "float16": 1e-3, "bfloat16": 8e-3}[self.dtype]
        lse_tolerance = Tolerance(own if turned else LSE.atol, 1e-6)
        seen = np.zeros(out.shape[: 1 if self.packed_q else 2], bool)
        for b, at in enumerate(self.index):
            keys = slice(self.left[b], self.ends[b])
            for x, after in zip((k, v), self.after, strict=True):
                for rows in (keys, slice(self.used[b], self.ends[b])):
                    assert_close(
                        x[at, rows].astype(np.float64),
                        after[at, rows].astype(np.float64),
                        BASE[self.dtype],
                        "cache",
                    )
                assert np.isnan(x[at, self.ends[b] :].astype(np.float32)).all()
            exact, exact_lse = reference.attention(
                self.queries[b][None], k[at, None, keys], v[at, None, keys], **self.rules,
                qv=None if self.qv is None else self.qv[b][None],
            )  # fmt: skip
            start = self.cu_q[b] if self.cu_q is not None else 0
            rows = slice(start, start + self.seqlen_q[b])
            of_out = out[rows] if self.packed_q else out[b, rows]
            of_lse = lse[:, rows] if self.packed_q else lse[b, :, rows]
            seen[rows if self.packed_q else b] = True
            assert_close(of_out[None].astype(np.float64), exact, BASE[self.dtype], f"out of {b}")
            assert_close(of_lse[None].astype(np.float64), exact_lse, lse_tolerance, f"lse of {b}")
        assert not out[~seen].any()


def ks_like(keys: Array, values: list[Array], starts: Array) -> Array:
    """New values packed as the new keys are."""
    whole = np.full((len(keys), *values[0].shape[1:]), np.nan, keys.dtype)
    for start, part in zip(starts, values, strict=False):
        whole[start : start + len(part)] = part
    return whole


@pytest.mark.parametrize("seed", range(120))
def test_caches_of_every_kind(seed: int) -> None:
    check_cache("cpu", seed, most=300)


SEEDS_ON_METAL = [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 40))]


@pytest.mark.parametrize("seed", SEEDS_ON_METAL)
@pytest.mark.parametrize("backend", ["metal-emulated"])
def test_caches_of_every_kind_on_metal(seed: int, backend: str) -> None:
    check_cache(backend, seed, most=150)


def check_cache(backend: str, seed: int, most: int) -> None:
    cache = Cache(np.random.default_rng([34, seed]), most)
    try:
        found = call_on(
            backend, fa3.flash_attn_with_kvcache, *cache.tensors, *cache.new_tensors,
            return_softmax_lse=True, **cache.options,
        )  # fmt: skip
        cache.check(found)
    except Exception as error:
        shown = {k: getattr(x, "shape", x) for k, x in cache.options.items()}
        shapes = [x.shape for x in (*cache.tensors, *cache.new_tensors)]
        message = f"{cache.dtype} {shapes} {shown}"
        raise AssertionError(message) from error


# ---- flash-attention 4 in random combination -----------------------------------------------------


def check_varlen(backend: str, seed: int, most: int) -> None:
    rng = np.random.default_rng([44, seed])

    def integer(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    def flip(probability: float = 0.5) -> bool:
        return bool(rng.random() < probability)

    dtype, batch, heads_k = str(rng.choice(list(DTYPES))), integer(1, 4), integer(1, 2)
    heads, head_dim, head_dim_v = heads_k * integer(1, 3), integer(8, 40), integer(8, 40)
    few = flip()

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])

    def side(high: int, packed: bool, *channels: tuple[int, int]) -> tuple[list[Array], Any, Any]:
        """Tensors of one side, the first row of each sequence and the rows in use."""
        lengths = [integer(0, high) if flip(0.9) else 0 for _ in range(batch)]
        starts = offsets([n + integer(0, 3) for n in lengths]) + integer(0, 4)
        shape = (int(starts[-1]) + integer(0, 2),) if packed else (batch, max(lengths) + 1)
        return [normal(*shape, *x) for x in channels], starts if packed else None, lengths

    (q, qv), cu_q, used_q = side(4 if few else 80, flip(), (heads, head_dim), (heads, head_dim_v))
    (k, v), cu_k, used_k = side(most, flip(), (heads_k, head_dim), (heads_k, head_dim_v))

    def of(tensor: Array, starts: Any, used: Any, b: int) -> Array:
        found = tensor[b] if starts is None else tensor[starts[b] :]
        return found[None, : used[b]]

    parts = [
        [of(x, starts, used, b) for x, starts, used in (
            (q, cu_q, used_q), (k, cu_k, used_k), (v, cu_k, used_k), (qv, cu_q, used_q))]
        for b in range(batch)
    ]  # fmt: skip
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_q, "seqused_q": np.array(used_q), "seqused_k": np.array(used_k),
        "max_seqlen_q": max(used_q) if flip() else None, "num_splits": integer(0, 4),
    }  # fmt: skip
    if cu_k is None and flip():
        (k, v), options["page_table"] = paged([k, v], integer(1, 30), seed=seed)
    else:
        options["cu_seqlens_k"] = cu_k
    rules: dict[str, Any] = {"causal": flip(0.3)}
    rules["window_size"] = tuple(None if flip(0.2) else integer(-60, 60) for _ in range(2))
    if flip(0.3):
        rules["softcap"] = float(rng.uniform(2, 20))
    if flip(0.3):
        rules["learnable_sink"] = rng.standard_normal(heads).astype(np.float32)
    if flip(0.3):
        rules["softmax_scale"] = float(rng.uniform(0.05, 0.5))
    has_qv = flip(0.3)
    out, lse = call_on(
        backend, fa4.flash_attn_varlen_func, q, k, v, qv if has_qv else None, return_lse=True,
        **options, **rules,
    )  # fmt: skip
    assert out.shape == (*q.shape[:-1], head_dim_v)
    lse = lse if has_qv else lse.swapaxes(-1, -2)  # heads last, as those of out
    seen = np.zeros(q.shape[:-2], bool)
    rules["window_size"] = visible_window(rules["window_size"], rules["causal"])
    for b, (own_q, own_k, own_v, own_qv) in enumerate(parts):
        exact, exact_lse = reference.attention(
            own_q, own_k, own_v, qv=own_qv if has_qv else None, window_offsets=True, **rules
        )
        what = f"of {b}: {dtype} {q.shape} {k.shape} {used_q} {used_k} {rules} {options.keys()}"
        found, found_lse = (of(x, cu_q, used_q, b).astype(np.float64) for x in (out, lse))
        assert_close(found, exact, BASE[dtype], f"out {what}")
        assert_close(found_lse.swapaxes(1, 2), exact_lse, Tolerance(LSE.atol, 1e-6), f"lse {what}")
        of(seen, cu_q, used_q, b)[:] = True
    assert not out[~seen].any()
    assert np.isneginf(lse[~seen]).all()


@pytest.mark.parametrize("seed", range(100))
def test_varlen_of_every_kind(seed: int) -> None:
    check_varlen("cpu", seed, most=300)


@pytest.mark.parametrize("seed", SEEDS_ON_METAL)
@pytest.mark.parametrize("backend", ["metal-emulated"])
def test_varlen_of_every_kind_on_metal(seed: int, backend: str) -> None:
    check_varlen(backend, seed, most=150)
