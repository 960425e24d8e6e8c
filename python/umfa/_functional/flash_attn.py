"""flash-attn 2's functions, with its names, order and defaults."""

from __future__ import annotations

from typing import Any

from .._call import public
from .._ext import Attention, Function
from ._packed import slices
from ._types import WindowSize

_FUNC = Function("umfa.flash_attn_func", query="q", key="k", value="v")
_QKVPACKED = Function(
    "umfa.flash_attn_qkvpacked_func",
    query="qkv[:, :, 0]",
    key="qkv[:, :, 1]",
    value="qkv[:, :, 2]",
)
_KVPACKED = Function(
    "umfa.flash_attn_kvpacked_func", query="q", key="kv[:, :, 0]", value="kv[:, :, 1]"
)


@public(_FUNC, reuse=True)
def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
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
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """Exact attention: ``softmax(q kᵀ · softmax_scale) v`` for each head.

    Memory beyond inputs and output is independent of both sequence lengths. Results are the same
    bits on every call, whatever the number of threads.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
        Query: float32, float16 or bfloat16 (ml_dtypes' under numpy), any strides, of torch, numpy,
        jax, mlx or any library that speaks DLPack. ``head_dim`` from 1 to 576. Or an object with
        Python's buffer protocol (see Notes).
    k : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim)
        Key, same framework; float32, float16 or bfloat16, also if `q` has another (see Notes).
        ``nheads`` is a multiple of ``nheads_kv``; query head ``h`` reads key head
        ``h // (nheads // nheads_kv)``.
    v : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim_v)
        Value; as for `k`. ``head_dim_v`` may differ from ``head_dim``, up to 512.
    dropout_p : float
        Probability, below 1, with which each attention weight is left out; the others are divided
        by ``1 - dropout_p``. The log-sum-exp is that of all of them.
    softmax_scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None (with `qv` both head dims count).
    causal : bool
        Query ``i`` sees the keys ``j <= i + seqlen_kv - seqlen_q``: aligned at the bottom right, or
        as `causal_alignment` says. None is False.
    window_size : pair of int or None, or None
        ``(left, right)``: query ``i`` sees the keys ``j`` with ``p - left <= j <= p + right``,
        where ``p = i + seqlen_kv - seqlen_q``. ``causal`` makes ``right`` 0. A bound of -1 or None
        is unbounded, and so are both sides if `window_size` is None. The pair is a tuple, a list,
        or an array or tensor of 2 integers.
    softcap : float
        If above 0, scores become ``softcap * tanh(score / softcap)`` before masking.
    alibi_slopes : tensor, shape (nheads,) or (batch, nheads), optional
        float32; adds ``-slope * |i + seqlen_kv - seqlen_q - j|`` to the scores (Press et al. 2022).
    deterministic : bool
        Accepted for compatibility: every result is deterministic.
    return_attn_probs : bool
        Also return the log-sum-exp of the scores, and with dropout the weights themselves.
    backend : {"auto", "metal", "cpu"}
        Which backend runs the call. "auto" takes the Apple GPU where there is one, for tensors that
        it owns and for work on CPU tensors that is large enough to amortise the launch (an
        estimate, not yet measured on Apple hardware). The others require that backend: umfa refuses
        what it cannot do and never uses another one. The environment variable ``UMFA_BACKEND`` sets
        the meaning of "auto". See `umfa.backends`.
    attn_mask : tensor that broadcasts to (batch, nheads, seqlen_q, seqlen_kv), optional
        bool: a query attends where it is True. float32, float16 or bfloat16: added to the scores.
        Read in place and never expanded. Composes with every other option.
    attention_chunk : int
        If above 0, a query sees only keys of its own chunk of that many positions (flash-attn 3).
    attention_chunk_offset : int
        Moves the chunks: position ``p`` is in chunk ``(p + attention_chunk_offset) //
        attention_chunk``. For keys whose first one is not at position 0 of the text, as in a cache
        that drops old rows (Llama 4).
    batch_invariant : bool
        Give each query the same bits whatever other queries and batch indices are computed with it,
        and whether it is decoded or part of a prompt. Prompts are as fast as without. Decoding uses
        the kernel for many queries, whose keys are not split: on the CPU it takes 10 to 14 times as
        long (docs/performance.md).
    out : tensor, shape (batch, seqlen_q, nheads, head_dim_v), optional
        Tensor to write the result to and return: float32, float16 or bfloat16, any strides. It must
        not overlap an input. Only for torch and numpy, whose arrays can be written.
    out_dtype : dtype of torch, numpy, jax or mlx, or its name, optional
        Dtype of the result: float32, float16 or bfloat16. If None, that of `out`, or else of `q`.
        If `out` is given too, it must be the dtype of `out`.
    num_splits : int
        Largest number of parts into which the keys of few queries are split, so that all threads
        have work. 1: no split; 0: umfa chooses. Calls with many queries never split the keys.
    prefix_lens : int32 or int64 tensor, shape (batch,), optional
        Every query of index ``b`` also sees the keys ``j < prefix_lens[b]`` (prefix-LM, as in
        PaliGemma) that `causal`, `window_size` or `attention_chunk` hide. `attn_mask` still hides
        keys.
    learnable_sink, s_aux : tensor, shape (nheads,), optional
        One more logit for each head's softmax, without a value: flash-attn 4's name, and that of
        transformers and vLLM. float32, float16 or bfloat16.
    qv : tensor, shape (batch, seqlen_q, nheads, head_dim_v), optional
        Adds ``qv vᵀ`` to ``q kᵀ`` (flash-attn 3): attention over a compressed cache, as in
        DeepSeek's MLA, whose values are the larger part of its keys. Dtype and framework of `q`.
    return_lse : bool
        Also return the log-sum-exp (flash-attn 4); excludes `return_attn_probs`.
    dropout_seed : int, optional
        0 to 2**64 - 1. With the same seed and offset the same weights are dropped, on every
        backend. If None, the framework's generator is asked for one (``torch.manual_seed``,
        ``numpy.random.seed``, ``mx.random.seed``); jax has none, and needs a seed. Outside
        training (NumPy arrays; no torch tensor requires grad; torch's grad mode is off), the first
        call of the process without a seed gives a `UserWarning`: pass ``dropout_p=0`` for
        inference, or a seed for intended dropout, as in Monte Carlo dropout.
    dropout_offset : int
        0 to 2**64 - 1; gives the same seed other weights to drop.
    causal_alignment : {"bottom_right", "top_left"}
        "top_left" gives query ``i`` the position ``i`` instead of ``i + seqlen_kv - seqlen_q``
        everywhere: in `causal`, `window_size`, `attention_chunk` and `alibi_slopes`. torch's
        ``is_causal`` and JAX align there.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim_v)
        In the framework of `q`, and in its dtype unless `out` or `out_dtype` gives another. A query
        that sees no key, or none with a score above -inf, gets 0.
    softmax_lse : tensor, shape (batch, nheads, seqlen_q), float32
        Only with `return_attn_probs` or `return_lse`: natural log of the sum of ``exp(score)``;
        -inf for a query that sees no key (flash-attn 2 writes +inf there).
    S_dmask : tensor, shape (batch, nheads, seqlen_q, seqlen_kv), or None
        Only with `return_attn_probs`, and not None only with dropout: the weights before dropout,
        negative where they were dropped. Only for small problems, because it allocates the whole
        matrix; not with `qv` or a `block_table`.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        The call is sound but not implemented yet: traced arrays of mlx, second derivatives
        and forward mode, float64 and float8, ``head_dim`` above 576.

    Notes
    -----
    If `q`, `k`, `v` and the result do not all have the same dtype, each tensor is read in its own
    dtype, without a converted copy, and the arithmetic is float32. A bfloat16 cache with a float32
    query keeps the memory and the traffic of bfloat16.

    An object with Python's buffer protocol (a `memoryview`, an `array.array`, a ctypes array, ...)
    is read as the NumPy array on its memory, in every function and for every tensor; it may stand
    beside NumPy arrays, and the result is a NumPy array. It needs the native format of a number and
    the argument's shape: ``memoryview(data).cast("f", shape)`` gives them to plain bytes. What a
    call writes (caches that are appended to, `out`) cannot be such an object.

    Under ``torch.autocast`` of their device, float32, float16 and bfloat16 tensors are cast to the
    autocast dtype, computed in it and returned in it, as PyTorch casts the arguments of its
    ``scaled_dot_product_attention``: query, key, value, new keys and values, `qv` and a mask of
    numbers. Slopes, sinks, rotary tables and the log-sum-exp keep their dtypes, and
    `flash_attn_combine` is not affected. Whole tensors are copied for it, a cache too; keep a cache
    in the autocast dtype. A cache that is appended to is never cast: it is read in its own dtype.
    `out_dtype` still sets the dtype of the result.

    Torch tensors that require grad get gradients, on the CPU: `q`, `k`, `v`, `qv`, an `attn_mask`
    of numbers, `learnable_sink` and `alibi_slopes`. The log-sum-exp is differentiable too. Autograd
    keeps the tensors, the result and the log-sum-exp. A call with `out` is refused then.

    Online softmax over key tiles: Milakov & Gimelshein 2018 (arXiv:1805.02867), Dao et al. 2022
    (arXiv:2205.14135). Dropout by Philox-4x32-10, Salmon et al. 2011.
    """
    return Attention(
        _FUNC,
        query=q,
        key=k,
        value=v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )


@public(_QKVPACKED, packed=("qkv",))
def flash_attn_qkvpacked_func(
    qkv: Any,
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
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """`flash_attn_func` on query, key and value stacked in one tensor.

    Parameters
    ----------
    qkv : tensor, shape (batch, seqlen, 3, nheads, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_func`.
    """
    q, k, v = slices(_QKVPACKED, "qkv", qkv, 3, 2, "(batch, seqlen, 3, nheads, head_dim)")
    return Attention(
        _QKVPACKED,
        query=q,
        key=k,
        value=v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )


@public(_KVPACKED, packed=("kv",))
def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
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
    attn_mask: Any = None,
    attention_chunk: int = 0,
    learnable_sink: Any = None,
    s_aux: Any = None,
    qv: Any = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    dropout_offset: int = 0,
    causal_alignment: str = "bottom_right",
    attention_chunk_offset: int = 0,
    prefix_lens: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
) -> Attention:
    """`flash_attn_func` on key and value stacked in one tensor.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
    kv : tensor, shape (batch, seqlen_kv, 2, nheads_kv, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_func`.
    """
    k, v = slices(_KVPACKED, "kv", kv, 2, 2, "(batch, seqlen_kv, 2, nheads_kv, head_dim)")
    return Attention(
        _KVPACKED,
        query=q,
        key=k,
        value=v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        attn_mask=attn_mask,
        attention_chunk=attention_chunk,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        qv=qv,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        causal_alignment=causal_alignment,
        attention_chunk_offset=attention_chunk_offset,
        prefix_lens=prefix_lens,
        out=out,
        out_dtype=out_dtype,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        backend=backend,
    )
