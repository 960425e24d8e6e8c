"""flash-attn 2's functions, with its names, order and defaults."""

from __future__ import annotations

from typing import Any

from ._attention import Act, run
from ._errors import message
from ._frameworks import framework_of
from ._options import WindowSize, make_options


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
    attention_chunk: int = 0,
    learnable_sink: Any = None,
) -> Any:
    """Exact attention: ``softmax(q kᵀ · softmax_scale) v`` for each head.

    Memory beyond inputs and output is independent of both sequence lengths. Results are the same
    bits on every call, whatever the number of threads.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
        Query: float32, float16 or bfloat16 (ml_dtypes' under numpy), any strides, of torch, numpy,
        jax, mlx or any library that speaks DLPack. ``head_dim`` from 1 to 512.
    k : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim)
        Key, same dtype and framework. ``nheads`` is a multiple of ``nheads_kv``; query head ``h``
        reads key head ``h // (nheads // nheads_kv)``.
    v : tensor, shape (batch, seqlen_kv, nheads_kv, head_dim_v)
        Value, same dtype and framework. ``head_dim_v`` may differ from ``head_dim``.
    dropout_p : float
        Only 0 for now; a larger probability raises `UnsupportedError`.
    softmax_scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` if None.
    causal : bool
        Query ``i`` sees the keys ``j <= i + seqlen_kv - seqlen_q`` (aligned at the bottom right).
    window_size : (int, int)
        ``(left, right)``: query ``i`` sees the keys ``j`` with ``p - left <= j <= p + right``,
        where ``p = i + seqlen_kv - seqlen_q``; -1 is unbounded. ``causal`` makes ``right`` 0.
    softcap : float
        If above 0, scores become ``softcap * tanh(score / softcap)`` before masking.
    alibi_slopes : tensor, shape (nheads,) or (batch, nheads), optional
        float32; adds ``-slope * |i + seqlen_kv - seqlen_q - j|`` to the scores (Press et al. 2022).
    deterministic : bool
        Accepted for compatibility: every result is deterministic.
    return_attn_probs : bool
        Also return the log-sum-exp of the scores.
    backend : {"auto", "metal", "cpu"}
        Who computes. "auto" takes the Apple GPU where there is one, for tensors that it owns and
        for work on CPU tensors that is large enough to be worth the way (an estimate, not yet
        measured on Apple hardware). The others insist: what such a backend cannot do is refused,
        never done elsewhere. The environment variable ``UMFA_BACKEND`` can insist for "auto". See
        `umfa.backends`.

    Returns
    -------
    out : tensor, shape (batch, seqlen_q, nheads, head_dim_v)
        In the dtype and framework of `q`. A query that sees no key, or none with a score above
        -inf, gets 0.
    softmax_lse : tensor, shape (batch, nheads, seqlen_q), float32
        Only with `return_attn_probs`: natural log of the sum of ``exp(score)``; -inf for a query
        that sees no key (flash-attn 2 writes +inf there).
    S_dmask : None
        Only with `return_attn_probs`: present so that three results can be unpacked.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; the message holds the offending value.
    umfa.UnsupportedError
        The call is sound but not implemented yet: gradients (tensors that require grad, traced
        arrays), dropout, float64 and float8, ``head_dim`` above 512.

    Notes
    -----
    Online softmax over key tiles: Milakov & Gimelshein 2018 (arXiv:1805.02867), Dao et al. 2022
    (arXiv:2205.14135).
    """
    return _attend(
        run,
        "umfa.flash_attn_func",
        {"q": q, "k": k, "v": v},
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        backend,
        attention_chunk,
        learnable_sink,
    )


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
) -> Any:
    """`flash_attn_func` on query, key and value stacked in one tensor.

    Parameters
    ----------
    qkv : tensor, shape (batch, seqlen, 3, nheads, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_func`.
    """
    return attend_qkvpacked(
        run,
        "umfa.flash_attn_qkvpacked_func",
        qkv,
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
) -> Any:
    """`flash_attn_func` on key and value stacked in one tensor.

    Parameters
    ----------
    q : tensor, shape (batch, seqlen_q, nheads, head_dim)
    kv : tensor, shape (batch, seqlen_kv, 2, nheads_kv, head_dim)
        Read in place (jax copies the slices).

    Everything else, results and errors included, is as in `flash_attn_func`.
    """
    return attend_kvpacked(
        run,
        "umfa.flash_attn_kvpacked_func",
        q,
        kv,
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


def attend(act: Act, function: str, q: Any, k: Any, v: Any, *options: Any) -> Any:
    return _attend(act, function, {"q": q, "k": k, "v": v}, *options)


def attend_qkvpacked(act: Act, function: str, qkv: Any, *options: Any) -> Any:
    check_packed(function, "qkv", qkv, 3, 2, "(batch, seqlen, 3, nheads, head_dim)")
    parts = {f"qkv[:, :, {i}]": qkv[:, :, i] for i in range(3)}
    return _attend(act, function, parts, *options)


def attend_kvpacked(act: Act, function: str, q: Any, kv: Any, *options: Any) -> Any:
    check_packed(function, "kv", kv, 2, 2, "(batch, seqlen_kv, 2, nheads_kv, head_dim)")
    parts = {"q": q, "kv[:, :, 0]": kv[:, :, 0], "kv[:, :, 1]": kv[:, :, 1]}
    return _attend(act, function, parts, *options)


def check_packed(
    function: str, name: str, packed: Any, count: int, dimension: int, layout: str
) -> None:
    """Whether `packed` can be sliced into `count` parts along `dimension`, two before the last."""
    framework_of(function, {name: packed})
    if not hasattr(type(packed), "__getitem__"):
        raise TypeError(
            message(
                function,
                f"{name} cannot be sliced into its parts",
                type(packed).__qualname__,
                "a tensor with __getitem__ and shape",
            )
        )
    shape = tuple(getattr(packed, "shape", None) or ())
    if len(shape) != dimension + 3 or shape[dimension] != count:
        raise ValueError(message(function, f"{name} has the wrong shape", shape, layout))


def _attend(
    act: Act,
    function: str,
    tensors: dict[str, Any],
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
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
    options = make_options(
        function,
        names,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
        backend,
        attention_chunk=attention_chunk,
    )
    results = act(framework, function, options, tensors, backend)
    return (results[0], results[1], None) if len(results) == 2 else results[0]
