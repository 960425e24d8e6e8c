"""``python -m umfa features``: what each backend can do, as `umfa.can_run` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

import umfa
from umfa import _ext, fa3, fa4
from umfa._call.can_run import gradients_can_run
from umfa.cli import terminal

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

# In the README: the project's own proof ends there.
WRITTEN = "written, not run on a Mac"


class Row(NamedTuple):
    """Calls that must all be possible for the line to be true."""

    text: str
    calls: list[Call]
    gradients: bool = False
    """Whether the line is about the gradients of all float tensors of the calls."""


def zeros(*shape: int, dtype: str = "float32") -> Any:
    """A tensor of any of the three dtypes; numpy alone has no bfloat16."""
    if dtype != "bfloat16":
        return np.zeros(shape, dtype)
    bits = np.zeros(shape, np.uint16)
    return _ext.as_bfloat16(bits, bits)


def _flash(heads_kv: int = 4, seqlen_q: int = 9, **options: Any) -> Call:
    key = zeros(2, 30, heads_kv, 16)
    return umfa.flash_attn_func, (zeros(2, seqlen_q, 4, 16), key, key), options


def _dims(dtype: str) -> Iterator[Call]:
    for head_dim, head_dim_v in ((1, 1), (64, 64), (77, 40), (192, 128), (512, 512), (576, 512)):
        for seqlen_q in (1, 40):
            query = zeros(1, seqlen_q, 2, head_dim, dtype=dtype)
            key, value = (zeros(1, 40, 2, d, dtype=dtype) for d in (head_dim, head_dim_v))
            yield umfa.flash_attn_func, (query, key, value), {}


def _mixed(query: str, cache: str) -> Iterator[Call]:
    """Decoding, a prompt, and new rows for a cache."""
    for seqlen_q in (1, 40):
        tensors = (zeros(2, seqlen_q, 4, 16, dtype=query), zeros(2, 40, 2, 16, dtype=cache),
                   zeros(2, 40, 2, 16, dtype=query))  # fmt: skip
        yield umfa.flash_attn_func, tensors, {}
        yield (
            umfa.flash_attn_with_kvcache,
            (*tensors, *(zeros(2, 1, 2, 16),) * 2),
            {"cache_seqlens": 3},
        )


def _varlen(**options: Any) -> Call:
    starts = np.array([0, 4, 4, 30], np.int32)
    tensors = zeros(30, 4, 16), zeros(30, 2, 16), zeros(30, 2, 16)
    return umfa.flash_attn_varlen_func, (*tensors, starts, starts, 26, 26), options


def _quantized(seqlen_q: int, dtype: str) -> Call:
    cache = umfa.quantize(zeros(2, 40, 2, 16), dtype)
    return umfa.quantized_attention, (zeros(2, seqlen_q, 4, 16), cache, cache), {}


def _sage(**options: Any) -> Call:
    tensors = zeros(2, 9, 4, 16), zeros(2, 40, 2, 16), zeros(2, 40, 2, 16)
    return umfa.quantized_attention, tensors, {"mode": "sage", **options}


def _cached(*more: Any, pages: bool = False, **options: Any) -> Call:
    if pages:
        options["block_table"] = np.zeros((2, 4), np.int32) + np.arange(2, dtype=np.int32)[:, None]
    cache = [zeros(8 if pages else 2, 20, 2, 16) for _ in range(2)]
    tensors = zeros(2, 1, 4, 16), *cache, *more
    return umfa.flash_attn_with_kvcache, tensors, {"cache_seqlens": 7, **options}


def _fa3_cached(new: tuple[Any, Any], *angles: Any, **options: Any) -> Call:
    """Packed queries and new rows. Sequences have different numbers of both."""
    _, (_, *cache), more = _cached(pages=True, **options)
    rows = [np.concatenate([x, x])[:, 0] for x in new]
    starts = np.array([0, 1, 4], np.int32)
    more["page_table"] = more.pop("block_table")
    more |= {"cu_seqlens_q": starts, "cu_seqlens_k_new": starts, "max_seqlen_q": 3}
    if angles:
        more |= {"rotary_cos": angles[0], "rotary_sin": angles[1]}
    return fa3.flash_attn_with_kvcache, (zeros(4, 4, 16), *cache, *rows), more


def _torch_like(*batch: int, mask: Any = None, **options: Any) -> Call:
    tensors = zeros(*batch, 4, 9, 16), zeros(*batch, 4, 30, 16), zeros(*batch, 4, 30, 16)
    return umfa.scaled_dot_product_attention, (*tensors, mask), options


def rows() -> list[Row]:
    """The table, in the order in which it is read."""
    slopes, sink = zeros(4), zeros(4, dtype="float16")
    angles = zeros(64, 8), zeros(64, 8)
    new = zeros(2, 1, 2, 16), zeros(2, 1, 2, 16)
    everything = {
        "causal": True, "window_size": (20, 0), "softcap": 30.0, "alibi_slopes": slopes,
        "learnable_sink": sink, "attention_chunk": 16, "attn_mask": zeros(2, 1, 1, 30) == 0,
        "return_lse": True,
    }  # fmt: skip
    dropped: dict[str, Any] = {"dropout_p": 0.1, "dropout_seed": 1}
    cached = {name: x for name, x in everything.items() if name != "return_lse"}
    rope = umfa.fused_rope_attention, (*_flash()[1], *angles)
    return [
        Row(
            "float32, float16, bfloat16; head dim 1 to 576, value's 1 to 512",
            [call for dtype in ("float32", "float16", "bfloat16") for call in _dims(dtype)],
        ),
        Row(
            "dtypes of query, key, value, new rows and result that differ, read as they are",
            [
                call
                for dtypes in (("float32", "float16"), ("float16", "float32"))
                for call in _mixed(*dtypes)
            ],
        ),
        Row(
            "causal, sliding window, softcap, ALiBi, grouped heads (GQA, MQA), log-sum-exp",
            [
                _flash(causal=True),
                _flash(window_size=(5, 3)),
                _flash(softcap=30.0),
                _flash(alibi_slopes=slopes),
                _flash(heads_kv=1, seqlen_q=1),
                _flash(return_attn_probs=True),
                _varlen(return_lse=True),
            ],
        ),
        Row(
            "masks and biases (bool or float), read through broadcast strides and never expanded",
            [
                _torch_like(2, mask=zeros(2, 1, 1, 30) == 0),
                _torch_like(2, mask=zeros(4, 9, 30)),
                _torch_like(2, mask=zeros(9, 1, dtype="float16")),
                _flash(attn_mask=zeros(30) == 0),
            ],
        ),
        Row(
            "PyTorch's shapes: 2 to 8 dimensions, which broadcast; top-left causal",
            [_torch_like(), _torch_like(2, 3, 1), _torch_like(2, is_causal=True)],
        ),
        Row(
            "sequences of different lengths, packed (`cu_seqlens`, `seqused`)",
            [
                _varlen(),
                _varlen(causal=True),
                _varlen(seqused_q=np.array([4, 0, 1]), seqused_k=np.array([4, 0, 9])),
            ],
        ),
        Row(
            "KV cache: paged with any page size, batch index, left padding",
            [
                _cached(),
                _cached(pages=True),
                _cached(cache_batch_idx=np.array([1, 0]), cache_leftpad=np.array([0, 3])),
                _cached(num_splits=2),
            ],
        ),
        Row(
            "KV cache: appended to in place, with rotary embedding of the new rows",
            [_cached(*new), _cached(*new, *angles), _cached(*new, *angles, pages=True)],
        ),
        Row(
            "rotary embedding of queries and keys as kernels load them (`fused_rope_attention`)",
            [(*rope, {}), (*rope, {"rotary_interleaved": False, "causal": True})],
        ),
        Row(
            "attention sinks (`learnable_sink`, `s_aux`), `attention_chunk`",
            [_flash(learnable_sink=sink), _flash(s_aux=slopes), _flash(attention_chunk=8)],
        ),
        Row(
            "dropout by a counter (Philox): the same weights on every backend",
            [_flash(seqlen_q=n, dropout_p=0.1, dropout_seed=1) for n in (9, 1)],
        ),
        Row(
            "attention over a compressed cache (`qv`, as in DeepSeek's MLA)",
            [_flash(qv=zeros(2, 9, 4, 16)), _cached(qv=zeros(2, 1, 4, 16), pages=True)],
        ),
        Row(
            "keys and values in any quantised format (`quantized_attention`)",
            [_quantized(n, dtype) for n in (1, 40) for dtype in ("int8", "int4", "nf4", "mxfp4")],
        ),
        Row(
            'products of int8 for scores, with keys smoothed (`sageattn`, `mode="sage"`)',
            [_sage(), _sage(causal=True, smooth_k=False)],
        ),
        Row(
            'products of int8 for values too (`mode="int8"`)',
            [_sage(mode="int8", causal=True)],
        ),
        Row(
            "flash-attn 3's and 4's functions as they are (`umfa.fa3`, `umfa.fa4`)",
            [
                _fa3_cached(new),
                _fa3_cached(new, *angles, rotary_seqlens=np.array([4, 50])),
                (fa4.flash_attn_func, _flash()[1], {"window_size": (-2, 12), "return_lse": True}),
            ],
        ),
        Row(
            "prefix-LM (`prefix_lens`), `causal_alignment`, `attention_chunk_offset`",
            [
                _flash(causal=True, prefix_lens=np.array([3, 0])),
                _varlen(window_size=(5, 0), prefix_lens=np.array([2, 0, 9])),
                _cached(causal=True, prefix_lens=np.array([3, 0])),
                _flash(causal=True, causal_alignment="top_left"),
                _flash(attention_chunk=8, attention_chunk_offset=3),
            ],
        ),
        Row(
            "results written where you want them (`out`), of the dtype you want (`out_dtype`), "
            "`batch_invariant`",
            [
                _flash(out=zeros(2, 9, 4, 16)),
                _torch_like(2, out=zeros(2, 4, 9, 16)),
                _flash(out_dtype="float16"),
                _varlen(out_dtype="bfloat16"),
                _cached(batch_invariant=True),
                _flash(batch_invariant=True),
            ],
        ),
        Row(
            "all of these options together",
            [
                _flash(2, **everything, **dropped, qv=zeros(2, 9, 4, 16)),
                _cached(*new, *angles, pages=True, qv=zeros(2, 1, 4, 16), **cached),
                (*rope, {**everything, **dropped, "qv": zeros(2, 9, 4, 16)}),
            ],
        ),
        Row(
            "gradients of query, key and value for all head dims, with and without causal, window, "
            "softcap, packed sequences, GQA and dropout",
            [
                *_dims("float32"),
                _flash(heads_kv=1, causal=True),
                _flash(window_size=(5, 3), softcap=30.0),
                _flash(**dropped),
                _varlen(causal=True),
                _torch_like(2, is_causal=True),
            ],
            gradients=True,
        ),
        Row(
            "gradients of float masks (in the mask's own shape), sinks, ALiBi slopes and `qv`",
            [
                _torch_like(2, mask=zeros(4, 1, 30)),
                _flash(learnable_sink=slopes),
                _flash(alibi_slopes=slopes),
                _flash(qv=zeros(2, 9, 4, 16)),
            ],
            gradients=True,
        ),
        Row(
            "merging of partial results over keys (`flash_attn_combine`)",
            [(umfa.flash_attn_combine, (zeros(3, 2, 9, 4, 16), zeros(3, 2, 9, 4)), {})],
        ),
    ]


def reason(call: Call, backend: str, *, gradients: bool = False) -> str:
    """Why the backend cannot run the call, or its backward pass; empty if it can."""
    function, tensors, options = call
    ask = gradients_can_run if gradients else umfa.can_run
    possible, why = ask(function, *tensors, **options, backend=backend)
    return "" if possible else why


def absent() -> dict[str, str]:
    """The reason that `can_run` gives where all that is missing is the backend itself."""
    return {
        info.name: f"{info.name}: {info.reason}" for info in umfa.backends() if not info.available
    }


def reasons(row: Row, backend: str, missing: dict[str, str]) -> set[str]:
    """Why not; empty if the backend can, or could if it were there."""
    found = {reason(call, backend, gradients=row.gradients) for call in row.calls}
    return found - {"", missing.get(backend)}


def markdown() -> str:
    """The README's table."""
    missing = absent()
    lines = ["| | CPU | Apple GPU |", "|---|---|---|"]
    for row in rows():
        cpu = "no" if reasons(row, "cpu", missing) else "yes"
        metal = "no" if reasons(row, "metal", missing) else WRITTEN
        lines.append(f"| {row.text} | {cpu} | {metal} |")
    return "\n".join(lines)


def run(*, as_markdown: bool) -> int:
    """Print the table."""
    if as_markdown:
        print(markdown())
        return 0
    missing = absent()
    names = [info.name for info in umfa.backends()]
    table = Table(*("", *names))
    for row in rows():
        cells = []
        for name in names:
            why = reasons(row, name, missing)
            cells.append("; ".join(sorted(why)) or ("not here" if name in missing else "yes"))
        table.add_row(row.text, *cells)
    console = terminal.console()
    console.print(table)
    for text in missing.values():
        console.print(f"not here: {text}", soft_wrap=True)
    return 0
