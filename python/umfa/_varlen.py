"""flash-attn's functions on packed sequences, with its names, order and defaults."""

from __future__ import annotations

from typing import Any

from ._attention import Act, run, table
from ._errors import message
from ._flash_attn import check_packed
from ._frameworks import framework_of
from ._options import WindowSize, make_options


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    backend: str = "auto",
) -> Any:
    """`flash_attn_func` on sequences of different lengths, packed one after the other.

    Parameters
    ----------
    q : tensor, shape (total_q, nheads, head_dim)
    k : tensor, shape (total_k, nheads_kv, head_dim)
        With `block_table`: (pages, page_size, nheads_kv, head_dim), any page size.
    v : tensor, shape (total_k, nheads_kv, head_dim_v)
        With `block_table` as `k`.
    cu_seqlens_q : int32 or int64 tensor, shape (batch + 1,)
        Sequence ``b`` holds the rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of `q`. Empty
        sequences are fine. Rows of the output that belong to none are 0, their log-sum-exp -inf.
    cu_seqlens_k : int32 or int64 tensor, shape (batch + 1,)
        The same of `k` and `v`; with `block_table` only the lengths count.
    max_seqlen_q, max_seqlen_k : int or tensor without dimensions, or None
        At least the longest sequence; only checked.
    block_table : int32 or int64 tensor, shape (batch, pages of a sequence), optional
        Page ``block_table[b, j // page_size]`` holds key ``j`` of sequence ``b``.
    seqused_q, seqused_k : int32 or int64 tensor, shape (batch,), optional
        How many rows of each sequence count (flash-attn 3).
    attention_chunk : int
        If above 0, a query sees only keys of its own chunk of that many positions (flash-attn 3).
    learnable_sink : tensor, shape (nheads,), optional
        One more logit for each head's softmax, without a value (flash-attn 4).
    causal, window_size
        Aligned at the bottom right of each sequence.

    Everything else is as in `flash_attn_func`.

    Returns
    -------
    out : tensor, shape (total_q, nheads, head_dim_v)
    softmax_lse : tensor, shape (nheads, total_q), float32
        Only with `return_attn_probs`, followed by None.

    Raises
    ------
    ValueError, TypeError
        A table is not monotone, reaches past the end, or names a page that is not there: nothing
        has been written then.
    """
    return attend_varlen(
        run,
        "umfa.flash_attn_varlen_func",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
        seqused_q,
        seqused_k,
        attention_chunk,
        learnable_sink,
        backend,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """`flash_attn_varlen_func` on query, key and value stacked in one tensor.

    Parameters
    ----------
    qkv : tensor, shape (total, 3, nheads, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_varlen_func`.
    """
    return attend_varlen_qkvpacked(
        run,
        "umfa.flash_attn_varlen_qkvpacked_func",
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend,
    )


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """`flash_attn_varlen_func` on key and value stacked in one tensor.

    Parameters
    ----------
    kv : tensor, shape (total_k, 2, nheads_kv, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_varlen_func`.
    """
    return attend_varlen_kvpacked(
        run,
        "umfa.flash_attn_varlen_kvpacked_func",
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend,
    )


# The functions without their docstrings, for whoever does something else at the end (see `Act`).


def attend_varlen(
    act: Act,
    function: str,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    return_attn_probs: Any,
    block_table: Any,
    seqused_q: Any,
    seqused_k: Any,
    attention_chunk: Any,
    learnable_sink: Any,
    backend: Any,
) -> Any:
    tables = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "block_table": block_table,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
    }
    return _attend(
        act,
        function,
        {"q": q, "k": k, "v": v},
        tables,
        (max_seqlen_q, max_seqlen_k),
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic),
        alibi_slopes,
        return_attn_probs,
        backend,
        attention_chunk,
        learnable_sink,
    )


def attend_varlen_qkvpacked(
    act: Act,
    function: str,
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    return_attn_probs: Any,
    backend: Any,
) -> Any:
    check_packed(function, "qkv", qkv, 3, 1, "(total, 3, nheads, head_dim)")
    return _attend(
        act,
        function,
        {f"qkv[:, {i}]": qkv[:, i] for i in range(3)},
        {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens},
        (max_seqlen, max_seqlen),
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic),
        alibi_slopes,
        return_attn_probs,
        backend,
    )


def attend_varlen_kvpacked(
    act: Act,
    function: str,
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    return_attn_probs: Any,
    backend: Any,
) -> Any:
    check_packed(function, "kv", kv, 2, 1, "(total_k, 2, nheads_kv, head_dim)")
    return _attend(
        act,
        function,
        {"q": q, "kv[:, 0]": kv[:, 0], "kv[:, 1]": kv[:, 1]},
        {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        (max_seqlen_q, max_seqlen_k),
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic),
        alibi_slopes,
        return_attn_probs,
        backend,
    )


def _attend(
    act: Act,
    function: str,
    tensors: dict[str, Any],
    tables: dict[str, Any],
    longest: tuple[Any, Any],
    options: tuple[Any, Any, Any, Any, Any, Any],
    alibi_slopes: Any,
    return_attn_probs: Any,
    backend: Any,
    attention_chunk: Any = 0,
    learnable_sink: Any = None,
) -> Any:
    names = tuple(tensors)
    if alibi_slopes is not None:
        tensors["alibi_slopes"] = alibi_slopes
    if learnable_sink is not None:
        tensors["learnable_sink"] = learnable_sink
    framework = framework_of(function, tensors)
    made = make_options(
        function,
        names,
        *options,
        return_attn_probs,
        backend,
        attention_chunk=attention_chunk,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
    )
    for name, given in tables.items():
        if given is not None:
            tensors[name] = table(function, name, given)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if tables.get(name) is None and not (name == "cu_seqlens_k" and "block_table" in tensors):
            raise TypeError(
                message(function, f"{name} is missing", None, "an int32 or int64 tensor")
            )
    results = act(framework, function, made, tensors, backend)
    return (results[0], results[1], None) if len(results) == 2 else results[0]
